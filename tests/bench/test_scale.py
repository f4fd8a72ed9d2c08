"""What follows from the figures of several layouts, schedules and steps: pure parts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import result
from bench.engine import kvcache, profile, scale, scheduler
from bench.engine.scale import Row
from bench.engine.trial import LoadOutcome, Ready
from bench.errors import BenchError
from bench.experiments import gpu_run
from bench.pages import story
from bench.pages.loaded import KINDS
from bench.records import Record
from bench.result import Result
from tests.bench import made


def test_layouts_are_powers_of_two_and_all_there_are() -> None:
    assert scale.layouts(1) == [(1, 1)]
    assert scale.layouts(2) == [(1, 1), (2, 1), (1, 2)]
    assert scale.layouts(4) == [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4)]
    assert scale.layouts(6)[-2:] == [(6, 1), (1, 6)]


def test_an_engine_stands_in_each_variant_and_replicas_do_not() -> None:
    one_split = {"attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 1}}
    rows = scale.rows_of(2, ["w"], {"one": one_split}, [])
    names = ["TP=1", "TP=1 one", "TP=2", "TP=2 one", "2 replicas"]
    assert [row.name for row in rows] == names
    assert [row.engine for row in rows] == [{}, one_split, {}, one_split, {}]
    only = scale.rows_of(2, ["a", "b"], {"one": one_split}, ["TP=1", "TP=2 one"])
    assert [row.name for row in only] == ["TP=1", "TP=1", "TP=2 one", "TP=2 one"]
    with pytest.raises(BenchError, match=r"only = 'TP=3': no such layout"):
        scale.rows_of(2, ["w"], {}, ["TP=3"])


def test_a_variant_is_compared_with_the_plain_single_gpu() -> None:
    better = Row(tensor_parallel=1, replicas=1, variant="one", tpot_s=[0.009])
    plain = Row(tensor_parallel=1, replicas=1, tpot_s=[0.010])
    both = Row(tensor_parallel=2, replicas=1, variant="one", tpot_s=[0.005])
    table = scale.table([better, plain, both])
    assert [row.tpot_s_times for row in table] == pytest.approx([0.9, 1.0, 0.5])
    goal = "2 GPUs: for the latency of one request TP=2 one (0.50 of one GPU's time per token)"
    assert scale.advice(table) == [goal]


def test_layouts_that_stand_together_share_the_gpus_evenly() -> None:
    wanted = scale.layouts(4)
    places = scale.placed(wanted, 4)
    assert [len(place) for place in places] == [parallel * many for parallel, many in wanted]
    waiting = [0.0] * 4
    for (parallel, _), place in zip(wanted, places, strict=True):
        assert len(set(place)) == len(place)
        for gpu_ in place:
            waiting[gpu_] += 1 / parallel
    assert max(waiting) <= 2.75  # In models: 4 replicas, 2 replicas, one, and parts of two more.
    assert scale.placed([(1, 1)], 1) == [[0]]


def test_at_saturation_long_prompts_are_fewer() -> None:
    assert scale.at_saturation("synthetic:input=200,output=128", 256, 4) == 1024
    assert scale.at_saturation("synthetic:input=1024,output=64", 256, 4) == 256
    # Fewer than are asked at once anyway.
    assert scale.at_saturation("synthetic:input=8000,output=64", 256, 4) is None


ROWS = [
    Row(
        tensor_parallel=1,
        replicas=1,
        ttft_s=[0.1, 0.1],
        tpot_s=[0.010, 0.010],
        tokens_per_s=[1000.0, 1010.0],
        saturated=[2000.0, 2020.0],
    ),
    Row(
        tensor_parallel=2,
        replicas=1,
        ttft_s=[0.06, 0.06],
        tpot_s=[0.006, 0.006],
        tokens_per_s=[1500.0, 1490.0],
        saturated=[3000.0, 3010.0],
    ),
    Row(
        tensor_parallel=1,
        replicas=2,
        ttft_s=[0.1, 0.1],
        tpot_s=[0.010, 0.010],
        tokens_per_s=[1800.0, 1790.0],
        saturated=[3900.0, 3980.0],
    ),
    Row(tensor_parallel=4, replicas=1, failure="out of memory"),
]


def test_a_split_is_advised_for_each_goal() -> None:
    table = scale.table(ROWS)
    assert table[1].tpot_s_times == pytest.approx(0.6)
    assert table[2].saturated_efficiency == pytest.approx(0.98, abs=0.01)
    low, high = table[2].saturated_bounds
    assert low < table[2].saturated_times < high
    output = scale.advice(table)
    assert len(output) == 2
    assert "latency of one request TP=2 (0.60" in output[0]
    assert "throughput 2 replicas (1.96 times one GPU, 0.98 of linear)" in output[0]
    assert output[1] == "4 GPUs: not measured"
    # A single GPU that failed leaves nothing to compare with.
    assert scale.table(ROWS[1:])[0].tpot_s_times is None


def record(index: int, kind: str, planned_s: float, first_s: float) -> Record:
    return Record(
        index=index,
        kind=kind,
        planned_s=planned_s,
        sent_s=planned_s,
        status=200,
        chunk_s=[first_s, first_s + 0.1],
        end_s=first_s + 0.1,
        input_tokens=10,
        output_tokens=2,
    )


def test_who_passes_whom() -> None:
    longs = [record(0, "long", 0.0, 1.0)]
    shorts = [
        record(1, "short", 0.0, 0.5),  # Behind it, and passed it.
        record(2, "short", 0.2, 1.2),  # Behind it, and waited.
        record(3, "short", 1.1, 1.2),  # It had its token already.
    ]
    assert scheduler.order(longs, shorts) == (0.5, 1.0)
    assert scheduler.order(longs, shorts[1:2]) == (0.0, 0.0)
    assert scheduler.order(longs, shorts[2:]) == (None, None)
    on = scheduler.case("fcfs", True, [*longs, *shorts], 2.0)
    assert on.ttft_max_s == {"short": 1.0, "long": 1.0}
    assert on.tokens_per_s == 4.0
    slow = [record(1, "short", 0.0, 2.0), record(0, "long", 0.0, 1.0)]
    off = scheduler.case("fcfs", False, slow, 2.0)
    output = scheduler.advice([on, off])
    assert output == [
        "fcfs: without chunked prefill short prompts wait 4.00 times as long for their first "
        "token (median), long ones 1.00 times"
    ]


def test_blocks_that_are_partly_empty_are_waste() -> None:
    ready = Ready(limits={}, kv_blocks=101, block_tokens=16, load_s=1.0)
    sample = {"t_s": 1.0, "blocks": 50.0, "tokens": 600.0, "running": 3.0, "waiting": 1.0}
    answer = LoadOutcome(records=[], kv=[sample, sample | {"tokens": 900.0}], preempted=2)
    view = kvcache.view(ready, answer)
    assert view.tokens == 1600
    assert view.used_peak == 0.5
    assert view.waste_share == pytest.approx(0.125)  # A quarter, and none.
    assert view.preempted == 2
    assert view.hit_rate is None
    assert kvcache.fits(100, 16, (16, 17, 5000)) == {16: 100, 17: 50, 5000: 0}
    assert len(kvcache.thinned([sample] * 1000, 100)) == 100


def test_the_hottest_function_is_the_one_most_samples_ended_in() -> None:
    stacks = "main;a (x.py:1);b (x.py:2) 30\nmain;a (x.py:1) 10\nmain;c;b (x.py:2) 20\nnonsense\n"
    outcome = profile.hottest(stacks)
    assert outcome[0] == profile.Hot(function="b (x.py:2)", share=50 / 60)
    assert outcome[1].share == pytest.approx(10 / 60)
    assert profile.hottest("") == []


# --- the GPU's part in one command ----------------------------------------------------------


def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, *more: str) -> dict[str, Any]:
    """Run stages with `bench` replaced by a script."""
    (tmp_path / "bench").mkdir(exist_ok=True)
    (tmp_path / "bench" / "__init__.py").write_text("")
    (tmp_path / "bench" / "__main__.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    words = ["gpu_run", "--models", "/m/seven,/m/half", "--out", str(tmp_path / "out")]
    words += ["--work", str(tmp_path / "work"), *more]
    monkeypatch.setattr(sys, "argv", words)
    gpu_run.main()
    rows = [json.loads(line) for line in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


GOOD = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
(out / "result.json").write_text("{}")
print("noise")
print(json.dumps({"benchmark": sys.argv[1], "valid": True}))
"""
SLOW = """
import subprocess, sys, time
if sys.argv[1] == "baseline":
    subprocess.Popen(["sleep", "77"])
    print("it had this", flush=True)
    time.sleep(60)
sys.exit(3)
"""


def test_stages_are_run_one_after_the_other_and_what_they_made_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    rows = gpu(
        tmp_path, monkeypatch, GOOD, "--stage", "roofline,baseline,profile", "--limit-s", "100"
    )
    # All of the first model comes before any of the second.
    assert list(rows) == [
        f"{stage}-{model}"
        for model in ("seven", "half")
        for stage in ("roofline", "baseline", "profile")
    ]
    assert all(row["status"] == 0 for row in rows.values())
    assert rows["profile-half"]["last"] == {"benchmark": "profile", "valid": True}
    assert "--roofline" in rows["baseline-seven"]["command"]
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        names = archive.getnames()
    assert "baseline-half/result.json" in names
    assert "profile-seven.log" in names


def test_a_step_that_fails_or_is_too_slow_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(gpu_run, "_END_S", 0.5)
    monkeypatch.setattr(gpu_run.Step, "__init__", _small(gpu_run.Step.__init__))
    rows = gpu(tmp_path, monkeypatch, SLOW, "--stage", "roofline,baseline", "--limit-s", "4")
    assert rows["roofline-seven"]["status"] == 3
    assert str(rows["baseline-seven"]["status"]).startswith("stopped after")
    assert rows["baseline-seven"]["last"] == "it had this"
    assert "not begun" in str(rows["baseline-half"]["status"])
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "77"]]
    assert left == []


def _small(init: Any) -> Any:
    """Steps that are worth a start however little time is left."""

    def made(self: Any, name: str, words: tuple[str, ...], least_s: float = 1.0) -> None:
        init(self, name, words, 1.0)

    return made


# --- the story ------------------------------------------------------------------------------


def outcome_of(benchmark: str, **more: Any) -> Result:
    about = {"benchmark": benchmark, "name": benchmark, "command": f"bench {benchmark}"}
    return made.typed(KINDS[benchmark], about | more)


GAIN = {"ratio": 1.2, "low": 1.1, "high": 1.3}
TUNE = outcome_of(
    "tune",
    score="output tokens/s",
    best={"described": "max_num_seqs <64>", "score": 120.0},
    default={"score": 100.0},
    gain=GAIN,
    trials=[{"described": "a", "rung": 1, "score": 120.0, "failure": ""}],
    pruned={"b": "cannot exceed 3"},
    effects=[
        {"knob": "k", "value": 64, "trials": 2} | GAIN,
        {"knob": "k", "value": {"a": 1}, "trials": 2, "ratio": 1.0, "low": None, "high": None},
    ],
)


def test_a_story_has_each_step_with_its_gain_and_its_command(tmp_path: Path) -> None:
    rows = scale.table(ROWS)
    of_all = {"table": rows, "advice": scale.advice(rows)}
    scaled = outcome_of("scale", **of_all)
    workloads = [{"workload": what} | of_all for what in ("short", "long ones")]
    twice = outcome_of("scale", workloads=workloads, **of_all)
    verdict = {
        "took_s": 0.006,
        "least_s": 0.005,
        "mbu": 0.83,
        "mfu": 0.01,
        "memory_s": 0.005,
        "compute_s": 0.0001,
        "host_s": 0.001,
        "text": "",
        "bound": "memory-bound",
        "times": 5.0,
    }
    of_cell = dict(name="5-50-1", workload="", input_tokens=5, users=1, output_tokens=50)
    cell = {"name": "5-50-1", "cell": of_cell, "roofline": {"decode": verdict}} | made.UNMEASURED
    ceilings = {"flops_per_s": 1.0, "bytes_per_s": 1.0, "source": "measured"}
    base = outcome_of("baseline", cells=[cell], roofline={"ceilings": ceilings})
    kv = {
        "blocks": 10,
        "block_tokens": 16,
        "tokens": 160,
        "used_peak": 0.5,
        "used_mean": 0.2,
        "hit_rate": None,
        "running_peak": 1,
        "waiting_peak": 0,
        "waste_share": 0.1,
        "preempted": 0,
        "fits": {"500": 3},
    }
    sample = {"t_s": 0.0, "blocks": 5.0, "tokens": 60.0, "running": 2.0, "waiting": 0.0}
    cached = outcome_of("kv", kv=kv, samples=[sample, sample | {"t_s": 1.0}])
    confirmed = outcome_of(
        "confirm", system="bare", gain=GAIN, scores={"default": [1.0], "best": [1.2]}
    )
    compared = story.chapters([scaled, TUNE, base, cached, confirmed, outcome_of("starts")])
    assert [each.kind for each in compared] == ["baseline", "kv", "tune", "confirm", "scale"]
    steps = story.steps(compared)
    assert steps[0]["gain"] == "decode MBU 0.83 at best"
    assert steps[1]["gain"].startswith("1.20 times the output tokens/s by max_num_seqs")
    assert "(1.10 to 1.30)" in steps[1]["gain"]
    page = tmp_path / "story.html"
    story.page([scaled, TUNE, base, cached, confirmed], page, ["a machine"])
    both = tmp_path / "both.html"
    story.page([twice], both, ["a machine"])
    assert "long ones, 2 GPUs" in both.read_text()
    assert both.read_text().count("<svg") == 2
    html = page.read_text()
    assert "bench tune" in html
    assert "&lt;64&gt;" in html
    assert "<64>" not in html
    assert html.count("<svg") == 3
    assert "src=" not in html
    assert "not measured" in html


def test_a_report_has_chapters_beside_its_own_sections(tmp_path: Path) -> None:
    from bench.pages import report

    made.cells(tmp_path / "base", "baseline", "alone")
    result.write(tmp_path / "tune", TUNE)
    report.report([tmp_path / "base", tmp_path / "tune"], tmp_path / "all.html")
    html = (tmp_path / "all.html").read_text()
    assert 'href="#chapter-1"' in html
    assert 'id="chapter-1"' in html
    report.report([tmp_path / "tune"], tmp_path / "alone.html")
    report.tell_story([tmp_path / "tune"], tmp_path / "story.html")
    assert "Retrospective" in (tmp_path / "story.html").read_text()
    with pytest.raises(result.ResultError, match="chapter"):
        report.tell_story([tmp_path / "base"], tmp_path / "none.html")
