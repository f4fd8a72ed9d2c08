"""`python -m bench tune` on real engines: small ones, of a two-layer model on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.engine import gain, kvcache, score, served, stand, trial
from bench.engine.journal import JOURNAL, Journal
from bench.engine.measured import Measured, Outcome, Trial
from bench.engine.orders import LoadOutcome
from bench.engine.stand import Stand
from bench.engine.trial import Engine, EngineError, failure
from bench.errors import BenchError, ResultError
from bench.measure import Slo
from bench.records import Record
from bench.traffic.request import Request
from serve_app.settings import Settings

ROOT = Path(__file__).parent.parent.parent
ENGINE = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**26,
    "block_size": 32,
    "dtype": "float32",
    "enforce_eager": True,
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
WORKLOAD = "synthetic:input=20,output=8"
FAST = Slo(ttft_s=60.0, tpot_s=60.0, percentile=90.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def engine(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Engine(str(tiny), ENGINE, tmp_path_factory.mktemp("engine")) as running:
        yield running


class Shop:
    """A load of requests that take `e2e_s` each, and are good while the rate is below `holds`."""

    def __init__(self, e2e_s: float, holds: float) -> None:
        self.e2e_s, self.holds, self.lasted_s = e2e_s, holds, []

    def load(self, what: str, when: str, *, count: int, seed: int, slo: Slo) -> LoadOutcome:
        rate = float(when.partition("=")[2])
        self.lasted_s.append(count / rate)
        first_s = 0.1 if rate < self.holds else 9.0
        records = [
            Record(
                index=index,
                planned_s=index / rate,
                sent_s=index / rate,
                end_s=index / rate + self.e2e_s,
                chunk_s=[index / rate + first_s, index / rate + self.e2e_s],
                status=200,
                output_tokens=2,
                asked_output_tokens=2,
            )
            for index in range(count)
        ]
        return LoadOutcome(records=records)


@pytest.mark.parametrize(
    ("e2e_s", "least_s", "most_s"), [(0.5, 4.5, 5.5), (8, 15, 17), (90, 19, 21)]
)
def test_a_probe_lasts_as_long_as_requests_do(e2e_s: float, least_s: float, most_s: float) -> None:
    goal = score.Goal(slo=Slo(ttft_s=1.0, percentile=90.0), what="w", seconds=5.0)
    pace = score.Pace(requests_per_s=40.0, step_s=0.01, read=20.0, written=8.0)
    shop = Shop(e2e_s, holds=45.0)
    result, _ = score.score(shop.load, goal, pace, 1.0, 0, 0, True)
    assert 45.0 / 1.05 < result < 45.0
    assert least_s < max(shop.lasted_s) < most_s
    # Lengthened once: the probes after it begin with that.
    assert len([lasted_s for lasted_s in shop.lasted_s if lasted_s < least_s]) <= 1


def test_no_two_loads_of_a_server_have_the_same_prompts() -> None:
    first = Request(prompt="some words", output_tokens=1)
    chat = Request(prompt=[{"role": "user", "content": "hi"}], output_tokens=1)
    prompts = {served._begun(first, number).prompt for number in range(9)}
    assert len(prompts) == 9
    assert all(str(prompt).endswith("some words") for prompt in prompts)
    assert served._begun(chat, 3) == chat


def test_greedy_completions_are_the_same_twice(engine: Engine) -> None:
    first = engine.complete(["some words", "other words"], 6, 60.0)
    assert [len(tokens) for tokens in first] == [6, 6]
    assert engine.complete(["some words", "other words"], 6, 60.0) == first


def test_a_load_is_answered_whole_and_timed(engine: Engine) -> None:
    answer = engine.load(WORKLOAD, "poisson:rate=200", count=24, seed=0, slo=FAST)
    assert not answer.lost
    assert len(answer.records) == 24
    assert all(r.ok and r.output_tokens == 8 for r in answer.records)
    assert all(r.planned_s <= r.sent_s <= r.chunk_s[0] <= r.end_s for r in answer.records)
    assert answer.steps > 8
    assert 0 < answer.step_s <= answer.elapsed_s
    assert trial.good_share(answer.records, FAST) == 1.0
    assert trial.tpot_s(answer.records) is not None
    # Other seeds are other prompts and times; the same is the same.
    again = engine.load(WORKLOAD, "poisson:rate=200", count=24, seed=0)
    other = engine.load(WORKLOAD, "poisson:rate=200", count=24, seed=1)
    assert [r.planned_s for r in again.records] == [r.planned_s for r in answer.records]
    assert [r.planned_s for r in other.records] != [r.planned_s for r in answer.records]


def test_a_running_engine_is_told_its_limits(engine: Engine) -> None:
    free = engine.load(WORKLOAD, "users=1", count=12, seed=0)
    first = engine.load(WORKLOAD, "users=1", count=12, seed=0, live={"max_num_seqs": 1})
    back = engine.load(WORKLOAD, "users=1", count=12, seed=0)
    # One after the other needs a step for each token of each; together, a step for all.
    assert first.steps >= 12 * 8
    assert free.steps < first.steps / 3
    assert back.steps < first.steps / 3
    small = engine.load(WORKLOAD, "users=1", count=4, seed=0, live={"max_num_batched_tokens": 4})
    assert small.steps > free.steps
    assert engine.ready is not None
    maximum = engine.ready.limits["max_num_seqs"]
    with pytest.raises(BenchError, match=f"was started with {maximum}"):
        engine.load(WORKLOAD, "users=1", count=1, seed=0, live={"max_num_seqs": maximum + 1})
    with pytest.raises(BenchError, match="cannot be changed"):
        engine.load(WORKLOAD, "users=1", count=1, seed=0, live={"dtype": 1})
    # A mistake in an order does not end the engine.
    assert len(engine.load(WORKLOAD, "users=1", count=1, seed=0).records) == 1


def test_a_load_that_cannot_keep_its_objective_is_broken_off(engine: Engine) -> None:
    long = "synthetic:input=20,output=400"
    hard = Slo(ttft_s=1e-6, percentile=90.0)
    answer = engine.load(long, "poisson:rate=500", count=200, seed=0, slo=hard)
    assert answer.lost
    assert sum(record.ok for record in answer.records) < 200
    assert trial.missed(answer.records, hard) > 20
    # And the engine is as it was.
    assert not engine.load(WORKLOAD, "users=1", count=8, seed=0, slo=FAST).lost


def test_the_kv_cache_is_seen_while_it_is_used(engine: Engine) -> None:
    answer = engine.load("synthetic:input=40,output=300", "users=1", count=16, seed=0)
    assert engine.ready is not None
    view = kvcache.view(engine.ready, answer)
    assert view.blocks == engine.ready.kv_blocks - 1
    assert 0 < view.used_mean <= view.used_peak <= 1
    assert 0 <= view.waste_share < 0.7
    assert view.running_peak > 1
    assert view.fits[500] == view.blocks // 16
    assert view.hit_rate == 0.0
    assert len(kvcache.describe(view)) == 3


@pytest.mark.slow
def test_an_engine_that_runs_out_of_memory_is_an_error_that_says_so(
    tiny: Path, tmp_path: Path
) -> None:
    greedy = ENGINE | {"kv_cache_memory_bytes": 2**46}
    with pytest.raises(EngineError) as raised, Engine(str(tiny), greedy, tmp_path):
        pass
    assert raised.value.oom, raised.value


def test_why_an_engine_ended_is_the_error_it_ended_with() -> None:
    cuda = "INFO\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nTraceback\n"
    assert failure(cuda, 1).oom
    assert "CUDA out of memory" in str(failure(cuda, 1))
    assert failure("Loading", -signal.SIGKILL).oom
    other = failure("Traceback\nValueError: no such dtype\n", 1)
    assert not other.oom
    assert "no such dtype" in str(other)
    room = "ValueError: No available memory for the cache blocks. Try increasing"
    assert failure(room, 1).oom


# --- the command ----------------------------------------------------------------------------


def words(tiny: Path, folder: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "bench", "tune", "--model", str(tiny), "--out", str(folder)),
        *("--engine", json.dumps(ENGINE), "--goal", "cost", "--workload", WORKLOAD),
        *("--seconds", "0.3", "--rungs", "2", "--repeats", "2", "--budget-s", "200", *more),
    ]


@pytest.mark.slow
def test_a_search_survives_a_failure_continues_after_an_interruption_and_ends_in_a_configuration(
    tiny: Path, tmp_path: Path
) -> None:
    knobs = ["--knob", "max_num_seqs=2,64", "--knob", f"kv_cache_memory_bytes={2**46}"]
    engine = {name: value for name, value in ENGINE.items() if name != "kv_cache_memory_bytes"}
    engine |= {"gpu_memory_utilization": 0.05}
    order = [*words(tiny, tmp_path, *knobs), "--engine", json.dumps(engine)]
    first = subprocess.Popen(
        order, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / JOURNAL
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and first.poll() is None:
        if journal.is_file() and len(journal.read_text().splitlines()) >= 3:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out, output = first.communicate(timeout=60)
    assert out, output
    interrupted = json.loads(out.splitlines()[-1])
    assert "interrupted" in " ".join(interrupted["doubts"]), output
    before = journal.read_text().splitlines()
    # The line that was being written when a machine went away.
    journal.write_text("\n".join(before) + '\n{"trial": {"sett')
    done = subprocess.run(order, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, last
    rows = journal.read_text().splitlines()
    assert rows[: len(before)] == before
    assert all(json.loads(row) for row in rows)
    body = json.loads((tmp_path / "result.json").read_text())
    failed = [each for each in body["failed"] if each["oom"]]
    assert len(failed) == 1, body["failed"]
    assert failed[0]["settings"]["kv_cache_memory_bytes"] == 2**46
    assert body["default"]["scores"]["1"]
    assert last["best"]["settings"].get("max_num_seqs") != 2
    tried = {each["described"] for each in body["trials"]}
    pruned = " ".join(body["pruned"].values())
    assert "max_num_seqs 2" in tried or "cannot exceed" in pruned
    config = yaml.safe_load(Path(body["config"]).read_text())
    settings = Settings.parse(config["applications"][0]["args"])
    assert settings.engine["gpu_memory_utilization"] == 0.05
    assert settings.model == str(tiny)
    # Another search does not go on from this one.
    other = subprocess.run(
        words(tiny, tmp_path, "--knob", "max_num_seqs=4"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert other.returncode == 2
    assert "journal of another search" in other.stderr


def test_a_journal_gives_back_what_was_measured(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"a": 1})
    pace = score.Pace(requests_per_s=5.0, step_s=0.01, read=20.0, written=8.0)
    journal.begin(pace, {"max_num_seqs": 128})
    request = Trial(settings={"max_num_seqs": 4}, rung=1, share=0.5, repeats=1, why="")
    standing = Stand("m", {}, [], tmp_path)
    journal.add(request, Outcome(scores=[3.0, 4.0]), standing)
    again = Journal(tmp_path, {"a": 1})
    assert again.pace == pace
    assert again.limits == {"max_num_seqs": 128}
    assert again.outcome(request) == Outcome(scores=[3.0, 4.0])
    with pytest.raises(ResultError, match="another search"):
        Journal(tmp_path, {"a": 2})


def test_a_gain_has_an_interval_and_a_ladder_widens_it() -> None:
    best = Measured(settings={"a": 1}, outcomes={2: Outcome(scores=[12.0, 11.0, 12.5])})
    default = Measured(settings={}, outcomes={2: Outcome(scores=[10.0, 9.5, 10.0])})
    plain, wide = (gain.gain(best, default, 2, ladder) for ladder in (False, True))
    assert plain is not None
    assert wide is not None
    assert plain["low"] < plain["ratio"] < plain["high"]
    assert wide["low"] < plain["low"]
    assert wide["high"] > plain["high"]
    assert gain.gain(best, None, 2, False) is None
    nothing = Measured(settings={}, outcomes={0: Outcome(scores=[1.0])})
    assert gain.gain(best, nothing, 2, False) is None


def test_a_gain_is_that_of_the_scores_which_chose_nothing() -> None:
    best = Measured(
        settings={"a": 1}, outcomes={2: Outcome(scores=[15.0] * 3)}, held_out=[11.0, 11.0, 11.1]
    )
    default = Measured(
        settings={}, outcomes={2: Outcome(scores=[10.0] * 3)}, held_out=[10.0, 10.1, 10.0]
    )
    result = gain.gain(best, default, 2, False)
    assert result is not None
    assert result["ratio"] == pytest.approx(1.1, abs=0.01)
    same = gain.gain(default, default, 2, False)
    assert same is not None
    assert (same["ratio"], same["low"], same["in_full"]) == (1.0, None, True)


def test_a_limit_that_an_engine_was_not_started_with_needs_another_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.engine import knobs

    started: list[dict[str, Any]] = []

    class Fake:
        def __init__(self, model: str, arguments: dict[str, Any], *_: Any) -> None:
            started.append(arguments)
            limits = {
                "max_num_seqs": arguments.get("max_num_seqs", 128),
                "max_num_batched_tokens": arguments.get("max_num_batched_tokens", 2048),
            }
            self.ready = trial.Ready(limits=limits, kv_blocks=9, block_tokens=16, load_s=1.0)

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *_: object) -> None:
            return

    monkeypatch.setattr(stand, "Engine", Fake)
    space = knobs.space(
        ["max_num_seqs=16,256", "max_num_batched_tokens=64", "dtype=x"],
        on_gpu=False,
        lossy=False,
        dummy=False,
        fixed={},
    )
    standing = Stand("m", {"block_size": 32}, space, tmp_path)

    def limits(settings: dict[str, Any]) -> dict[str, int]:
        with standing.engine(settings, 10.0) as (_, result):
            return result

    assert limits({}) == {"max_num_seqs": 128, "max_num_batched_tokens": 2048}
    assert limits({"max_num_seqs": 16})["max_num_seqs"] == 16
    # vLLM takes no more sequences than there are tokens in a step.
    assert limits({"max_num_batched_tokens": 64})["max_num_seqs"] == 64
    assert len(started) == 1
    assert limits({"max_num_seqs": 256})["max_num_seqs"] == 256
    assert len(started) == 2
    # The one that stands can be told vLLM's default, which is known by now.
    assert limits({})["max_num_seqs"] == 128
    assert len(started) == 2
    assert limits({"dtype": "x"})["max_num_seqs"] == 128
    assert started[-1] == {"block_size": 32, "dtype": "x"}
    assert not standing.would_start({"dtype": "x", "max_num_seqs": 16})
    assert standing.would_start({})


def test_no_engine_is_left_when_a_trial_is_over(engine: Engine) -> None:
    pid = engine._process.pid
    assert os.getpgid(pid) == pid
