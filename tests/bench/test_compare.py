"""Comparisons: a difference is told where there is one, and noise is called noise."""

import random
from typing import Any

import pytest

from bench.errors import ResultError
from bench.figures import Run
from bench.itself.power import served
from bench.matrix import Matrix
from bench.measure import Measures, measure
from bench.pages import compare
from bench.pages.compare import Row
from bench.records import Record
from bench.search import SweepResult
from tests.bench import made


def result(*repeats: dict[str, Any], **about: Any) -> Run:
    measured = {"repeats": list(repeats), "whole": list(repeats), "summary": {}}
    fields = {"workload": "w", "load": "users=4"} | measured | about
    return made.typed(Run, fields)


def throughputs(*values: float | None, **about: Any) -> Run:
    return result(*({"output_tokens_per_s": value} for value in values), **about)


def only(rows: list[Row]) -> Row:
    assert len(rows) == 1
    return rows[0]


def test_more_throughput_is_better_and_less_is_worse() -> None:
    slow, fast = throughputs(100.0, 101.0, 99.0), throughputs(120.0, 121.0, 119.0)
    row = only(compare.compare(slow, fast))
    assert (row.metric, row.better, row.verdict) == ("output_tokens_per_s", "higher", "better")
    assert (row.a, row.b) == (100.0, 120.0)
    assert row.ratio == pytest.approx(1.2, rel=1e-3)
    assert row.low is not None
    assert row.high is not None
    assert 1.18 < row.low < row.ratio < row.high < 1.22
    assert only(compare.compare(fast, slow)).verdict == "worse"


def test_more_latency_is_worse() -> None:
    fast = result(*({"ttft_p50_s": value} for value in (0.100, 0.101, 0.102)))
    slow = result(*({"ttft_p50_s": value} for value in (0.200, 0.203, 0.205)))
    assert only(compare.compare(fast, slow)).verdict == "worse"
    assert only(compare.compare(slow, fast)).verdict == "better"


def test_a_difference_within_the_spread_is_noise() -> None:
    row = only(compare.compare(throughputs(90, 100, 110), throughputs(104, 93, 112)))
    assert row.verdict == "noise"
    assert (row.low or 9) < 1 < (row.high or 0)


def test_a_run_compared_with_itself_is_noise() -> None:
    run = throughputs(90.0, 100.0, 110.0)
    for interleaved in (None, True, False):
        row = only(compare.compare(run, run, interleaved))
        assert (row.ratio, row.verdict) == (pytest.approx(1.0), "noise")


def test_one_repeat_leaves_the_verdict_open() -> None:
    row = only(compare.compare(throughputs(100.0), throughputs(200.0)))
    assert (row.ratio, row.low, row.high, row.verdict) == (2.0, None, None, "unknown")


def test_pairs_show_what_a_drift_that_both_share_would_hide() -> None:
    a, b = throughputs(100.0, 60.0, 140.0), throughputs(105.0, 63.1, 146.8)
    assert only(compare.compare(a, b)).verdict == "better"
    assert only(compare.compare(a, b, interleaved=True)).verdict == "better"
    assert only(compare.compare(a, b, interleaved=False)).verdict == "noise"


def test_other_numbers_of_repeats_are_not_paired() -> None:
    a, b = throughputs(100.0, 60.0, 140.0), throughputs(105.0, 63.1, 146.8, 90.0)
    assert only(compare.compare(a, b)).verdict == "noise"


def test_a_repeat_without_a_value_takes_its_partner_with_it() -> None:
    a, b = throughputs(100.0, 50.0, 101.0), throughputs(110.0, None, 111.0)
    row = only(compare.compare(a, b))
    assert (row.a, row.b) == (100.5, 110.5)
    assert compare.compare(throughputs(None, None), throughputs(1.0, 2.0)) == []


def test_zeros_have_no_ratio() -> None:
    none, batch = (result(*({"failed_share": value} for value in (x, x))) for x in (0.0, 0.1))
    assert compare.compare(none, batch) == []


@pytest.mark.parametrize("interleaved", [True, False])
def test_one_metric_of_equal_servers_differs_about_one_time_in_twenty(interleaved: bool) -> None:
    draw = random.Random(1)
    verdicts = [
        only(
            compare.compare(
                *(throughputs(*(draw.gauss(100, 3) for _ in range(3))) for _ in "ab"), interleaved
            )
        ).verdict
        for _ in range(300)
    ]
    assert 0.01 < 1 - verdicts.count("noise") / 300 < 0.09


@pytest.mark.parametrize("own", [0.005, 0.03])
def test_all_metrics_of_equal_servers_together_differ_about_one_time_in_twenty(own: float) -> None:
    """Of thirty metrics, each by itself, one or more would differ in most pairs."""
    draw = random.Random(2)
    pairs = [compare.compare(served(draw, own=own), served(draw, own=own)) for _ in range(200)]
    differ = [any(row.verdict != "noise" for row in rows) for rows in pairs]
    assert sum(differ) / 200 < 0.08
    alone = [any((row.p or 1) < 0.05 for row in rows) for rows in pairs]
    assert sum(alone) / 200 > 0.2


def test_a_server_that_is_slower_is_seen_to_be_in_most_metrics() -> None:
    draw = random.Random(3)
    rows = [
        row
        for _ in range(40)
        for row in compare.compare(served(draw, own=0.01), served(draw, 1.2, own=0.01))
    ]
    assert sum(row.verdict == "worse" for row in rows) / len(rows) > 0.7
    assert not [row for row in rows if row.verdict == "better"]


def test_a_row_differs_exactly_where_its_interval_excludes_1() -> None:
    draw = random.Random(4)
    for slower in (1.0, 1.05, 1.1):
        for row in compare.compare(served(draw), served(draw, slower)):
            assert row.low is not None
            assert row.high is not None
            assert (row.verdict == "noise") == (row.low <= 1 <= row.high)


def test_results_that_were_not_asked_the_same_are_refused() -> None:
    with pytest.raises(ResultError, match=r"cannot be compared: load differs: users=4 against"):
        compare.compare(throughputs(1.0, 1.0), throughputs(2.0, 2.1, load="users=8"))
    rows = compare.compare(
        throughputs(1.0, 1.1), throughputs(2.0, 2.1, load="users=8"), anyway=True
    )
    assert only(rows).verdict == "better"


def test_goodput_by_another_objective_is_no_row() -> None:
    a, b = (
        result({"goodput_per_s": 1.0}, {"goodput_per_s": 1.1}, slo={"ttft_s": limit_s})
        for limit_s in (0.5, 2.0)
    )
    assert compare.compare(a, b) == []
    assert len(compare.compare(a, a)) == 1


def test_what_measure_gives_can_be_compared() -> None:
    def repeat(took_s: float) -> Measures:
        records = [
            Record(index=n, planned_s=n, sent_s=n, chunk_s=[n + took_s], end_s=n + 2 * took_s)
            for n in range(40)
        ]
        return measure(records)

    def run(*took_s: float) -> Run:
        repeats = [repeat(each_s) for each_s in took_s]
        return Run(repeats=repeats, whole=repeats, summary={})

    a, b = run(0.10, 0.11, 0.10), run(0.05, 0.05, 0.051)
    rows = {row.metric: row for row in compare.compare(a, b)}
    assert rows["ttft_p50_s"].verdict == "better"
    assert rows["ttft_p50_s"].ratio == pytest.approx(0.487, abs=0.002)
    assert "ttft_p99_s" not in rows
    assert "lag_p50_s" not in rows


# --- matrices -------------------------------------------------------------------------------


def matrix(**cells: list[float]) -> Matrix:
    fields = [
        {
            "cell": dict(name=name, workload="", input_tokens=1, users=1, output_tokens=1),
            "repeats": [{"output_tokens_per_s": value} for value in values],
            "whole": [{"output_tokens_per_s": value} for value in values],
            "summary": {},
        }
        for name, values in cells.items()
    ]
    return made.typed(Matrix, {"cells": fields})


def test_the_cells_that_both_have_are_compared() -> None:
    rows = compare.compare(
        matrix(one=[10.0, 10.1], two=[50.0, 50.0], three=[1.0, 1.0]),
        matrix(two=[25.0, 25.1], one=[10.1, 10.0]),
    )
    assert [(row.cell, row.verdict) for row in rows] == [("one", "noise"), ("two", "worse")]


def test_results_without_anything_in_common_are_refused() -> None:
    with pytest.raises(ResultError, match=r"nothing in common: one against two"):
        compare.compare(matrix(one=[1.0]), matrix(two=[1.0]))
    with pytest.raises(ResultError, match=r"nothing in common: one against a run"):
        compare.compare(matrix(one=[1.0]), throughputs(1.0))


def test_a_result_of_another_kind_is_refused_by_name() -> None:
    sweep = SweepResult(users=None, tokens_per_s=None, resolved=False, reason="", points=[])
    with pytest.raises(ResultError, match=r"second result has neither .* 'sweep'"):
        compare.compare(throughputs(1.0), sweep)


# --- for people -----------------------------------------------------------------------------


def test_notes_say_what_else_differs() -> None:
    a = throughputs(1.0, doubts=["repeat 1: late"], machine={"cores": 2})
    b = throughputs(1.0, workload="other", machine={"cores": 2})
    assert compare.notes(a, b) == [
        "A is doubtful: repeat 1: late",
        "workload differs: w against other",
    ]


def test_failures_are_compared_though_0_has_no_ratio() -> None:
    a = result({"failed": 0, "requests": 300}, {"failed": 0, "requests": 300})
    b = result({"failed": 12, "requests": 300}, {"failed": 10, "requests": 300})
    assert compare.notes(a, b) == ["B fails more often: 22 of 600 requests against 0 of 600"]
    assert compare.notes(b, a) == ["B fails less often: 0 of 600 requests against 22 of 600"]
    few = result({"failed": 1, "requests": 300})
    assert compare.notes(few, result({"failed": 2, "requests": 300})) == []


def test_failures_outside_the_steady_state_count() -> None:
    a = result({"failed": 0, "requests": 100}, whole=[{"failed": 0, "requests": 400}])
    b = result({"failed": 0, "requests": 100}, whole=[{"failed": 40, "requests": 400}])
    assert compare.notes(a, b) == ["B fails more often: 40 of 400 requests against 0 of 400"]


def test_the_table_names_every_ratio_its_interval_and_verdict() -> None:
    rows = compare.compare(
        matrix(one=[10.0, 10.1], two=[50.0, 50.0]), matrix(one=[10.1, 10.0], two=[25.0, 25.1])
    )
    lines = compare.table(rows, ["workload differs"]).splitlines()
    assert lines[0].split() == ["A", "B", "B/A", "interval"]
    assert lines[1].split()[:5] == ["one:", "output_tokens_per_s", "10.05", "10.05", "1.000"]
    assert lines[2].endswith("worse")
    assert " to " in lines[2]
    assert lines[3:] == ["1 worse, 1 noise", "! workload differs"]


def test_the_number_of_load_actors_is_told_and_not_what_each_of_them_did() -> None:
    def sent(*cpu: float) -> dict[str, Any]:
        each = dict(enumerate(cpu))
        names = ("cpu", "cpu_peak", "clock_offset_s", "clock_error_s")
        return {"where": dict.fromkeys(each, "here")} | dict.fromkeys(names, each)

    one, other, two = (throughputs(1.0, actors=[sent(*cpu)]) for cpu in ([0.1], [0.2], [0.1, 0.2]))
    assert compare.notes(one, other) == []
    assert compare.notes(one, two) == ["actors differs: 1 against 2"]
