"""The chapters of a report, and the page that they make."""

from pathlib import Path
from typing import Any

import pytest

from bench import result
from bench.engine import scaled
from bench.pages import story
from bench.pages.loaded import KINDS
from bench.result import Result
from tests.bench import made
from tests.bench.test_scale import ROWS, SYSTEMS


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
    rows = scaled.table([*ROWS, *SYSTEMS[1:3], *SYSTEMS[4:]])
    of_all = {"table": rows, "advice": scaled.advice(rows)}
    scaling = outcome_of("scale", **of_all)
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
    compared = story.chapters([scaling, TUNE, base, cached, confirmed, outcome_of("starts")])
    assert [each.kind for each in compared] == ["baseline", "kv", "tune", "confirm", "scale"]
    steps = story.steps(compared)
    assert steps[0]["gain"] == "decode MBU 0.83 at best"
    assert steps[1]["gain"].startswith("1.20 times the output tokens/s by max_num_seqs")
    assert "(1.10 to 1.30)" in steps[1]["gain"]
    page = tmp_path / "story.html"
    story.page([scaling, TUNE, base, cached, confirmed], page, ["a machine"])
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
