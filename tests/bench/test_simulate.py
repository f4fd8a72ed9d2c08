"""`bench simulate`: what comes, whose trial is best, what is written, and the command itself."""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import records, result
from bench.errors import BenchError, LoadError
from bench.figures import Run
from bench.measure import Slo
from bench.scrape import Sample
from bench.simulation import demand, simulate, simulation_page
from bench.simulation.batch import serve, serve_closed
from bench.simulation.demand import Surge, Wave
from bench.simulation.enginemodel import Costs, Engine
from bench.simulation.fleet import Fleet
from bench.simulation.job import Job
from bench.simulation.simulate import Case
from bench.simulation.simulated import Simulated
from tests.bench import made

ENGINE = Engine(
    Costs(0.02, 1e-4, 1e-3, 1e-7), max_num_seqs=16, token_budget=512, kv_blocks=2000, name="small"
)
CASE = Case(
    workload="synthetic:input=200,output=20",
    load="surge:base=3,peak=40,every=90,lasting=10",
    fleet=Fleet(ENGINE, start_s=10.0, max_replicas=6),
    slo=Slo(ttft_s=1.0, tpot_s=0.1, percentile=95.0),
    duration_s=200.0,
)
TRACES = Path(__file__).parents[3] / "shared" / "traces"


# --- what comes -----------------------------------------------------------------------------


def rate(load: demand.schedule.Open, from_s: float, to_s: float) -> float:
    times = load.times_s(None, to_s, seed=0)
    return sum(at_s >= from_s for at_s in times) / (to_s - from_s)


def test_a_wave_swings_between_its_rates() -> None:
    load = Wave(2.0, 20.0, 1000.0)
    assert rate(load, 0, 20) == pytest.approx(2, rel=0.3)
    assert rate(load, 450, 550) == pytest.approx(20, rel=0.1)
    assert rate(load, 0, 1000) == pytest.approx(11, rel=0.05)


def test_a_surge_peaks_for_a_while() -> None:
    load = Surge(2.0, 20.0, 100.0, 10.0)
    assert rate(load, 0, 100) == pytest.approx(2, rel=0.2)
    assert rate(load, 300, 310) == pytest.approx(20, rel=0.2)
    assert rate(load, 310, 400) == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize(
    "text", ["wave:low=2,high=20,period=1800", "surge:base=2,peak=20,every=600,lasting=60"]
)
def test_a_load_is_its_spec(text: str) -> None:
    assert str(demand.parse(text)) == text
    assert demand.parse(str(demand.parse(text))) == demand.parse(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("users=3", "closed loop"),
        ("waves:low=1", "'wave'"),
        ("wave:low=5,high=4,period=9", "from 5"),
        ("surge:base=1,peak=2,every=10,lasting=11", "to 10"),
    ],
)
def test_a_load_that_cannot_be(text: str, names: str) -> None:
    with pytest.raises(LoadError, match=names):
        demand.parse(text)


def test_copies_keep_the_shape_and_multiply_the_traffic() -> None:
    (once, thrice) = (
        demand.jobs(CASE.workload, "constant:rate=2", ENGINE, count=50, copies=copies)
        for copies in (1, 3)
    )
    assert len(thrice) == 3 * len(once)
    assert [job.index for job in thrice] == list(range(150))
    assert [job.at_s for job in thrice] == sorted(job.at_s for job in thrice)
    assert thrice[-1].at_s < once[-1].at_s + demand.SPREAD_S
    assert len({job.at_s for job in thrice}) == 150


def test_prompts_that_begin_alike_share_their_hashes() -> None:
    engine = replace(ENGINE, prefix_caching=True)
    text = "prefix:groups=2,shared=160,unique=40,output=5"
    outcome = demand.jobs(text, "constant:rate=1", engine, count=20)
    assert len({job.hashes[:10] for job in outcome}) == 2
    assert len({job.hashes for job in outcome}) == 20
    assert all(len(job.hashes) == 12 for job in outcome)
    assert demand.jobs(text, "constant:rate=1", ENGINE, count=1)[0].hashes == ()


# --- trials ---------------------------------------------------------------------------------


POLICIES = ("static:n=1|2|6", "serve:target=8,up=0,down=30", "foresight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture(scope="module")
def data(folder: Path) -> Simulated:
    return simulate.simulate(CASE, POLICIES, folder, keep=True)


def test_the_best_is_the_cheapest_that_holds(data: Simulated) -> None:
    static = data.policies[0]
    assert [trial.spec for trial in static.tried] == [
        "static:n=1",
        "static:n=2",
        "static:n=6",
    ]
    remaining = [trial.kept for trial in static.tried]
    assert remaining[0] < 0.95 <= remaining[2]
    assert static.holds
    assert static.spec == ("static:n=2" if remaining[1] >= 0.95 else "static:n=6")


def test_where_none_holds_the_nearest_is_told() -> None:
    data = simulate.simulate(CASE, ["static:n=1"])
    assert not data.policies[0].holds
    assert "(not held)" in simulation_page.table(data)


def test_foresight_is_no_dearer_than_a_fleet_for_the_peak(data: Simulated) -> None:
    static, _, foresight = data.policies
    assert foresight.holds
    assert foresight.gpu_hours < static.gpu_hours
    assert len(foresight.tried) < len(simulate._SHARES)  # It ended with the first that holds.


def test_a_static_fleet_costs_its_size_times_the_time(data: Simulated) -> None:
    trial, _ = simulate.trial_of(CASE, CASE.jobs(), "static:n=3")
    assert trial.changes == trial.reversals == 0
    assert trial.gpu_hours == pytest.approx(3 * trial.timeline.t_s[-1] / 3600)
    assert trial.replicas_mean == pytest.approx(3)
    two = replace(CASE, fleet=replace(CASE.fleet, engine=replace(ENGINE, gpus=2)))
    assert simulate.trial_of(two, CASE.jobs(), "static:n=3")[0].gpu_hours == pytest.approx(
        2 * trial.gpu_hours
    )


def test_what_came_before_is_not_judged() -> None:
    """Surges at 90 and 180 s: one replica keeps the objective before the first."""
    whole, _ = simulate.trial_of(CASE, CASE.jobs(), "static:n=1")
    late = replace(CASE, judged_from_s=85.0)
    trial, _ = simulate.trial_of(late, CASE.jobs(), "static:n=1")
    assert trial.kept < whole.kept < 1.0
    assert trial.gpu_hours == pytest.approx(whole.gpu_hours - 85 / 3600)
    assert trial.replicas_mean == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_result(data: Simulated) -> None:
    again = simulate.simulate(CASE, POLICIES)
    for before, after in zip(data.policies, again.policies, strict=True):
        assert replace(before, took_s=0) == replace(after, took_s=0)
    other = simulate.simulate(replace(CASE, seed=1), POLICIES[:1])
    assert other.policies[0].measures != data.policies[0].measures


def test_shares_by_limit_are_told_apart() -> None:
    slow = replace(CASE, slo=Slo(ttft_s=100.0, tpot_s=0.001, percentile=95.0))
    trial, _ = simulate.trial_of(slow, slow.jobs(), "static:n=4")
    assert (trial.kept_ttft, trial.kept_tpot, trial.kept) == (1.0, 0.0, 0.0)


# --- what is written ------------------------------------------------------------------------


def test_the_folder_holds_result_records_and_page(data: Simulated, folder: Path) -> None:
    read = result.read(folder, simulate=Simulated)
    assert read == data
    assert [row.policy for row in read.policies] == list(POLICIES)
    remaining = list(records.read(folder / result.RECORDS))
    assert len(remaining) == 3 * read.requests
    assert {record.repeat for record in remaining} == {0, 1, 2}
    page = (folder / result.REPORT).read_text()
    assert page.count("<svg") == 2
    assert all(row.spec in page for row in read.policies)
    assert "src=" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_table_has_a_line_and_a_bar_for_each(data: Simulated) -> None:
    lines = simulation_page.table(data).splitlines()
    for row in data.policies:
        assert sum(row.spec in line for line in lines) == 2
    assert simulation_page.bar(data.policies[0], 6).count("█") in (0, 41, 42, 43)


# --- the command ----------------------------------------------------------------------------


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    simulate.arguments(parser)
    return parser.parse_args(words)


SHORT = ("--workload", CASE.workload, "--load", "poisson:rate=5", "--requests", "100")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = simulate.command(
        options(*SHORT, "--out", str(tmp_path), "--policy", "static:n=1", "--policy", "waiting")
    )
    assert json.loads(json.dumps(outcome)) == outcome
    assert [row["spec"] for row in outcome["policies"]] == ["static:n=1", "waiting"]
    assert outcome["policies"][0]["kept"] == 1.0
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "result.json"}
    assert "replicas over time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), "give one of it and --beside"),
        ((*SHORT, "--policy", "stat:n=1"), "'static'"),
        ((*SHORT, "--policy", "static:n=1|x"), "not a whole number"),
        ((*SHORT, "--gpu", "H10"), "'H100'"),
        ((*SHORT, "--min", "9", "--max", "3"), "min_replicas"),
        ((*SHORT, "--copies", "0"), "copies"),
    ],
)
def test_a_command_that_cannot_be(words: Sequence[str], names: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=names):
        simulate.command(options(*words, "--out", str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_an_engine_is_fitted_and_then_used(tmp_path: Path) -> None:
    """A measured run in, an engine out, and a simulation with it."""
    rng = random.Random(0)
    for users in (1, 4, 16):
        mine = [Job(index, 0.0, rng.randint(20, 400), rng.randint(10, 60)) for index in range(80)]
        folder = tmp_path / "runs" / f"users{users}"
        folder.mkdir(parents=True)
        records.append(folder / result.RECORDS, serve_closed(ENGINE, mine, users))
    fitted = tmp_path / "fitted"
    limits = ("--max-num-seqs", "16", "--token-budget", "512", "--kv-blocks", "2000")
    outcome = simulate.command(
        options("--validate", str(tmp_path / "runs"), "--out", str(fitted), *limits)
    )
    assert outcome["costs"]["step_s"] == pytest.approx(0.02, rel=0.05)
    assert outcome["errors"]["output_tokens_per_s"]["largest"] < 0.1
    outcome = simulate.command(
        options(*SHORT, "--engine", str(fitted), "--policy", "static", "--out", str(tmp_path / "s"))
    )
    size = result.read(tmp_path / "s", simulate=Simulated).fleet.engine
    assert (size.max_num_seqs, size.kv_blocks) == (16, 2000)
    assert size.name == "fitted to 3 measured loads"


# --- beside a measured run ------------------------------------------------------------------


POLICY = "serve:target=8,up=0,down=30"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `bench run --dashboard` would have left of a fleet that is itself simulated."""
    trial, outcome = simulate.trial_of(CASE, CASE.jobs(), POLICY)
    line, folder = trial.timeline, tmp_path_factory.mktemp("measured")
    samples = [
        Sample(t_s=t_s, wanted=wanted, replicas=serving, starting=starting, stopping=draining)
        for t_s, wanted, serving, starting, draining in zip(
            line.t_s, line.wanted, line.serving, line.starting, line.draining, strict=True
        )
    ]
    lost = [Sample(t_s=7.5, running=1.0)]  # The dashboard did not answer.
    path = result.prepare(folder)
    result.write(
        folder, Run(name="a burst", server=[[*samples[:2], *lost, *samples[2:]]], **made.UNMEASURED)
    )
    records.append(path, outcome.records())
    return folder


def beside(measured: Path, *words: str, tmp_path: Path) -> dict[str, Any]:
    engine = tmp_path / "engine.json"
    engine.write_bytes(msgspec.json.encode(ENGINE))
    given = ("--beside", str(measured), "--engine", str(engine), "--out", str(tmp_path / "out"))
    slo = ("--slo", "ttft_ms=1000,tpot_ms=100,percentile=95", "--max", "6", "--initial", "1")
    return simulate.command(options(*given, *slo, *words))


def test_a_run_that_went_as_simulated_differs_in_nothing(measured: Path, tmp_path: Path) -> None:
    outcome = beside(measured, "--policy", POLICY, tmp_path=tmp_path)
    first, second = outcome["policies"]
    assert (first["spec"], second["spec"]) == ("measured", POLICY)
    assert first["replicas_mean"] > 1.2
    assert first["changes"] == second["changes"] > 1
    # The start is taken from the run; seconds of one period of 5 s are not seen.
    assert outcome["beside"]["start_s"] == pytest.approx(10.0, abs=5.0)
    (single,) = outcome["beside"]["policies"]
    assert single["kept_minus_measured"] == pytest.approx(0.0, abs=0.02)
    assert single["gpu_hours_error"] == pytest.approx(0.0, abs=0.05)
    assert single["replicas_most_minus_measured"] == 0
    assert single["serving_apart_mean"] < 0.1
    page = (tmp_path / "out" / result.REPORT).read_text()
    assert page.count(">measured<") >= 2  # Its row, and its curves' label.


def test_a_fleet_that_starts_later_is_seen_to_differ(measured: Path, tmp_path: Path) -> None:
    outcome = beside(measured, "--policy", POLICY, "--start", "85", tmp_path=tmp_path)
    (first,) = outcome["beside"]["policies"]
    assert first["kept_minus_measured"] < -0.02
    assert first["serving_apart_mean"] > 0.1


def test_a_run_without_counted_replicas_says_what_is_missing(
    measured: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    result.write(bare, Run(server=[[Sample(t_s=0.0)]], **made.UNMEASURED))
    with pytest.raises(BenchError, match="--dashboard"):
        beside(bare, tmp_path=tmp_path)
    with pytest.raises(BenchError, match="give one of it and --beside"):
        beside(measured, *SHORT, tmp_path=tmp_path)


# --- real traffic ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "code"])
def test_a_minute_of_real_traffic(name: str) -> None:
    path = TRACES / f"azure-llm-2023-{name}.csv"
    if not path.exists():
        pytest.skip("the Azure traces are not here: shared/traces")
    case = replace(CASE, workload=f"azure:{path},start_s=600,duration_s=60", load="trace")
    data = simulate.simulate(replace(case, duration_s=None), ["static:n=6"])
    (row,) = data.policies
    assert row.unfinished == 0
    assert row.measures.requests == data.requests > 20


def test_an_open_load_on_one_engine_is_a_fleet_of_one() -> None:
    """The two ways to run an engine agree to the last token."""
    jobs = list(islice(CASE.jobs(), 200))
    alone = serve(ENGINE, jobs)
    case = replace(CASE, fleet=replace(CASE.fleet, max_replicas=1))
    _, outcome = simulate.trial_of(case, jobs, "static:n=1")
    for each, other in zip(alone, outcome.records(), strict=True):
        assert each.chunk_s == pytest.approx(other.chunk_s)
