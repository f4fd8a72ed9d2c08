"""The metrics against values worked out by hand, and against vLLM's own code where it is there."""

import ast
import heapq
import importlib.util
import json
import math
import random
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from bench import interval, measure
from bench.errors import BenchError
from bench.itself import batching, processes
from bench.measure import Measures, Slo
from bench.measure.steady import Settling, averaged, settling
from bench.records import Record


def answered(index: int = 0, at_s: float = 0.0, **changes: Any) -> Record:
    """5 tokens in 3 chunks: TTFT 1 s, 2 s from the first to the last chunk, 3.5 s in all."""
    record = Record(
        index=index,
        planned_s=at_s,
        sent_s=at_s + 0.25,
        headers_s=at_s + 0.5,
        chunk_s=[at_s + 1, at_s + 2.5, at_s + 3],
        end_s=at_s + 3.5,
        status=200,
        input_tokens=10,
        output_tokens=5,
        finish_reason="stop",
    )
    return msgspec.structs.replace(record, **changes)


def failed(index: int = 0, at_s: float = 0.0, **changes: Any) -> Record:
    record = Record(
        index=index,
        planned_s=at_s,
        sent_s=at_s,
        end_s=at_s + 0.001,
        status=503,
        error="http 503: overloaded",
        asked_input_tokens=7,
    )
    return msgspec.structs.replace(record, **changes)


def many(count: int, **changes: Any) -> list[Record]:
    return [answered(index, float(index), **changes) for index in range(count)]


# --- one request ----------------------------------------------------------------------------


def test_the_latencies_of_a_request_count_from_its_planned_time() -> None:
    record = answered(at_s=100.0)
    assert measure.ttft_s(record) == 1.0
    assert measure.e2e_s(record) == 3.5
    assert measure.lag_s(record) == 0.25
    assert measure.itl_s(record) == [1.5, 0.5]


def test_tpot_divides_by_the_tokens_of_the_usage_and_not_by_chunks() -> None:
    assert measure.tpot_s(answered()) == pytest.approx(2 / 4)
    assert measure.tpot_s(answered(output_tokens=3)) == 1.0
    assert measure.tpot_s(answered(output_tokens=None)) is None
    assert measure.tpot_s(answered(output_tokens=1)) is None


def test_what_did_not_happen_has_no_latency() -> None:
    never = Record(index=0, planned_s=1.0, error="lost: load actor died")
    latencies = (measure.ttft_s, measure.tpot_s, measure.e2e_s, measure.lag_s)
    assert [latency(never) for latency in latencies] == [None] * 4
    assert measure.itl_s(never) == []


# --- objectives -----------------------------------------------------------------------------


def test_an_objective_is_met_only_within_all_its_limits() -> None:
    assert Slo(ttft_s=1.0, tpot_s=0.5).met_by(answered())
    assert not Slo(ttft_s=0.99, tpot_s=0.5).met_by(answered())
    assert not Slo(ttft_s=1.0, tpot_s=0.49).met_by(answered())
    assert not Slo(e2e_s=3.4).met_by(answered())
    assert Slo(ttft_s=2.0, tpot_s=0.4).used(answered()) == pytest.approx(1.25)


def test_a_failure_and_an_unknown_speed_do_not_meet_an_objective() -> None:
    assert not Slo(ttft_s=9.0).met_by(failed())
    assert not Slo(ttft_s=9.0).met_by(answered(error="cut: the response ended early"))
    assert not Slo(tpot_s=9.0).met_by(answered(output_tokens=None))
    assert Slo(tpot_s=0.1).met_by(answered(output_tokens=1))


def test_objectives_are_parsed() -> None:
    assert measure.parse_slo("mlperf-server") == Slo(ttft_s=2.0, tpot_s=0.1, percentile=99)
    assert measure.parse_slo("mlperf-interactive") == Slo(ttft_s=0.5, tpot_s=0.03)
    own = measure.parse_slo("ttft_ms=250,percentile=95")
    assert own == Slo(ttft_s=0.25, percentile=95)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlperf-servr", "did you mean 'mlperf-server'"),
        ("tttf_ms=5", "did you mean 'ttft_ms'"),
        ("ttft_ms=0", "above 0"),
        ("percentile=95", "limits nothing"),
        ("ttft_ms=1,percentile=100", "99.99"),
    ],
)
def test_a_wrong_objective_is_named(text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        measure.parse_slo(text)


# --- a whole run ----------------------------------------------------------------------------


def test_a_run_by_hand() -> None:
    records = [
        answered(0, 0.0, cached_tokens=4),
        answered(1, 2.0, output_tokens=9, finish_reason="length"),
        failed(2, 3.0),
        Record(index=3, planned_s=4.0, end_s=10.0, error="lost: load actor died"),
    ]
    measures = measure.measure(records, Slo(ttft_s=1.5, tpot_s=0.3))
    assert (measures.steady, measures.from_s, measures.to_s, measures.duration_s) == (
        False,
        0.0,
        10.0,
        10.0,
    )
    assert (measures.requests, measures.sent, measures.ok, measures.failed) == (4, 3, 2, 2)
    assert measures.failures == {"http 503": 1, "lost": 1}
    assert measures.failure_texts["lost"] == "lost: load actor died"
    assert measures.statuses == {"200": 2, "503": 1, "0": 1}
    assert measures.finish_reasons == {"stop": 1, "length": 1}
    assert (measures.input_tokens, measures.output_tokens, measures.cached_tokens) == (20, 14, 4)
    assert measures.planned_per_s == 0.4
    assert measures.requests_per_s == 0.2
    assert measures.output_tokens_per_s == pytest.approx(1.4)
    assert measures.total_tokens_per_s == pytest.approx(3.4)
    assert measures.user_tokens_per_s == pytest.approx(14 / 7)
    # The first needs 0.5 s a token, the second 0.25.
    assert measures.goodput_per_s == pytest.approx(0.1)
    assert (measures.good_share, measures.failed_share) == (0.25, 0.5)
    assert measures.max_running == 3
    assert measures.mean_running == pytest.approx((3.25 + 3.25 + 0.001) / 10)
    assert (measures.ttft_mean_s, measures.ttft_std_s) == (1.0, 0.0)
    assert measures.tpot_mean_s == pytest.approx((0.5 + 0.25) / 2)
    assert measures.tpot_std_s == pytest.approx(0.125)
    assert (measures.itl_mean_s, measures.e2e_mean_s) == (1.0, 3.5)
    assert measures.lag_max_s == 0.25


def test_a_failure_has_no_latency_and_is_not_a_zero() -> None:
    with_failures = measure.measure([*many(400), *(failed(400 + n, 1.0) for n in range(400))])
    without = measure.measure(many(400))
    for latency in ("ttft", "tpot", "itl", "e2e"):
        for statistic in ("mean", "p50", "p99"):
            name = f"{latency}_{statistic}_s"
            assert getattr(with_failures, name) == getattr(without, name) is not None
    assert with_failures.failed_share == 0.5


def test_a_cut_answer_is_no_success_though_tokens_came() -> None:
    measures = measure.measure([answered(0, error="cut: the response ended early"), answered(1)])
    assert (measures.ok, measures.failures, measures.output_tokens) == (1, {"cut": 1}, 5)
    assert measures.output_tokens_per_s == pytest.approx(5 / 3.5)
    assert measures.e2e_mean_s == 3.5


def test_tokens_are_those_of_the_usage_and_never_chunks() -> None:
    silent = measure.measure([answered(0, output_tokens=None, input_tokens=None)])
    assert silent.output_tokens is None
    assert silent.output_tokens_per_s is None
    assert silent.total_tokens_per_s is None
    assert silent.user_tokens_per_s is None
    assert silent.without_usage == 1
    one_silent = measure.measure([answered(0, output_tokens=None), answered(1, output_tokens=40)])
    assert (one_silent.output_tokens, one_silent.without_usage) == (40, 1)


def test_nothing_at_all_is_measured_without_numbers() -> None:
    measures = measure.measure([])
    assert (measures.requests, measures.requests_per_s, measures.failed_share) == (0, None, None)
    assert measures.ttft_mean_s is None


def test_a_run_that_failed_at_once_has_no_rates() -> None:
    measures = measure.measure(
        [Record(index=0, planned_s=0.0, end_s=0.0, error="connection refused")]
    )
    assert (measures.failed, measures.requests_per_s, measures.mean_running) == (1, None, None)


@pytest.mark.parametrize(("percent", "needed"), [(50, 6), (90, 36), (95, 72), (99, 368)])
def test_no_percentile_from_too_few_requests(percent: int, needed: int) -> None:
    name = f"ttft_p{percent}_s"
    few, enough = measure.measure(many(needed - 1)), measure.measure(many(needed))
    assert getattr(few, name) is None
    assert getattr(enough, name) == pytest.approx(1.0)
    assert name not in few.intervals


def test_failures_do_not_help_to_a_percentile() -> None:
    records = [*many(367), *(failed(367 + n) for n in range(100))]
    assert measure.measure(records).ttft_p99_s is None
    assert measure.vllm_names(records)["p99_ttft_ms"] is None


def shuffled(count: int) -> list[Record]:
    """TTFTs of 1 to `count` hundredths of a second, in no order."""
    places = np.random.default_rng(1).permutation(count) + 1
    return [answered(n, float(n), chunk_s=[n + places[n] / 100]) for n in range(count)]


def test_percentiles_and_their_intervals() -> None:
    measures = measure.measure(shuffled(100))
    assert measures.ttft_p50_s == pytest.approx(0.505)
    assert measures.ttft_p95_s == pytest.approx(np.percentile(np.arange(1, 101) / 100, 95))
    assert measures.intervals["ttft_p50_s"] == (
        pytest.approx(0.40, abs=0.02),
        pytest.approx(0.61, abs=0.02),
    )
    low, high = measures.intervals["ttft_mean_s"]
    assert low < 0.505 < high


def test_latencies_that_hang_together_have_no_interval() -> None:
    """The same hundred latencies, but each like the one before."""
    rising = [answered(n, float(n), chunk_s=[n + (n + 1) / 100]) for n in range(100)]
    measures = measure.measure(rising)
    assert not [name for name in measures.intervals if name.startswith("ttft")]
    assert not measures.settling["ttft"].settled
    assert measure.measure(shuffled(100)).settling["ttft"].settled
    # The order of the records does not matter, only that of their times.
    assert measure.measure(rising[::-1]).settling == measures.settling


def test_kinds_and_fairness() -> None:
    fast = [answered(n, kind="short") for n in range(6)]
    slow = [answered(n, kind="long", end_s=7.0) for n in range(6, 12)]
    measures = measure.measure([*fast, *slow, failed(12, kind="long")])
    assert list(measures.kinds) == ["long", "short"]
    assert (measures.kinds["long"].requests, measures.kinds["long"].failed) == (7, 1)
    assert measures.kinds["short"].user_tokens_per_s == pytest.approx(5 / 3.5)
    assert measures.kinds["long"].user_tokens_per_s == pytest.approx(5 / 7)
    assert measures.kinds["long"].e2e_p50_s == 7.0
    assert measures.fairness == pytest.approx((2 + 1) ** 2 / (2 * (4 + 1)))
    assert measure.measure(fast).fairness is None
    assert measure.measure(many(3)).kinds == {}


def test_the_summary_over_repeats_has_an_interval() -> None:
    repeats = [
        measure.measure([answered(0, output_tokens=tokens, end_s=4.0)]) for tokens in (4, 8, 12)
    ]
    result = measure.summary(repeats)["output_tokens_per_s"]
    assert result["mean"] == pytest.approx(2.0)
    assert (result["low"], result["high"]) == interval.of_repeats([1.0, 2.0, 3.0])
    assert measure.summary(repeats[:1])["output_tokens_per_s"]["low"] is None
    assert "ttft_p99_s" not in measure.summary(repeats)
    assert measure.summary([]) == {}


def test_a_tail_of_repeats_that_saw_too_little_has_no_interval() -> None:
    """Three repeats of a queue agree on a p99 that is too low in each of them."""
    rng = np.random.default_rng(5)
    slow, apart = processes.queue(0.9), processes.exponential()

    def repeats(process: processes.Process) -> list[Measures]:
        return [
            measure.measure(
                [answered(n, float(n), chunk_s=[n + ttft_s]) for n, ttft_s in enumerate(series)]
            )
            for series in process.sample(rng, 3, 400)
        ]

    queued, free = (measure.summary(repeats(process)) for process in (slow, apart))
    assert queued["ttft_p99_s"]["mean"] is not None
    assert [queued[f"ttft_{name}_s"]["low"] for name in ("mean", "p50", "p95", "p99")] == [None] * 4
    assert None not in [free[f"ttft_{name}_s"]["low"] for name in ("mean", "p50", "p95", "p99")]


def test_a_result_survives_json() -> None:
    measures = measure.measure([*many(40), failed(40, kind="x")], Slo(ttft_s=1.0))
    text = json.dumps(msgspec.to_builtins(measures))
    assert msgspec.json.decode(text, type=Measures) == measures


# --- the steady state -----------------------------------------------------------------------


def closed_loop(users: int, turns: int, first_s: float = 0.1) -> list[Record]:
    """User u starts u/10 s late; each answer takes 1 s, its first of 20 tokens `first_s`."""
    return [
        Record(
            index=turn * users + user,
            user=user,
            planned_s=user / 10 + turn,
            sent_s=user / 10 + turn,
            chunk_s=list(user / 10 + turn + np.linspace(first_s, 1, 20)),
            end_s=user / 10 + turn + 1,
            output_tokens=20,
            status=200,
        )
        for turn in range(turns)
        for user in range(users)
    ]


def test_a_closed_loop_is_steady_from_its_second_turn_until_users_run_out_of_work() -> None:
    records = closed_loop(users=4, turns=9)
    # Four have ended at 1.3 s; the first user is idle at 9 s, and the others are no faster by it.
    assert measure.window(records, users=4) == (pytest.approx(1.3), pytest.approx(9.0))


def test_requests_that_end_together_are_all_counted() -> None:
    records = closed_loop(users=4, turns=5)
    for record in records:
        record.planned_s = record.sent_s = float(record.index // 4)
        record.end_s = record.planned_s + 1.0
    assert measure.window(records, users=4) == (pytest.approx(1.0), pytest.approx(5.0))


def test_a_user_who_stops_early_ends_the_steady_state() -> None:
    records = [r for r in closed_loop(4, 9) if not (r.user == 2 and r.planned_s > 6)]
    from_s, to_s = measure.window(records, 4) or (0.0, 0.0)
    assert from_s == pytest.approx(1.3)
    assert 5.2 <= to_s <= 6.2


def test_a_closed_loop_too_short_is_not_steady() -> None:
    assert measure.window(closed_loop(4, 1), 4) is None
    assert measure.window(closed_loop(4, 5), 5) is None
    assert measure.window([], 1) is None
    silent = [r for r in closed_loop(2, 5) if r.user == 0]
    silent += [failed(9, 0.0, user=1, end_s=5.0)]
    assert measure.window(silent, 2) is None


def test_a_request_that_never_ended_does_not_break_the_rule() -> None:
    records = closed_loop(2, 8)
    records[-1].end_s = None
    records[-1].error = "interrupted"
    assert measure.window(records, 2) == (pytest.approx(1.1), pytest.approx(8.0))
    lost = Record(index=99, planned_s=2.0, end_s=2.0, error="lost: load actor died")
    assert measure.window([*records, lost], 2) == (pytest.approx(1.1), pytest.approx(8.0))


def open_loop(count: int, took_s: float) -> list[Record]:
    """One request a second."""
    return [
        answered(n, float(n), sent_s=float(n), chunk_s=[n + took_s], end_s=n + took_s)
        for n in range(count)
    ]


def test_an_open_loop_is_steady_once_as_many_ended_as_are_under_way() -> None:
    # 4.5 s each: at 8.5 s five have ended and four are under way; at 7.5 s four and four.
    assert measure.window(open_loop(20, 4.5), None) == (7.5, 19.0)
    assert measure.window(open_loop(20, 0.5), None) == (0.5, 19.0)


def test_the_planned_ramp_is_left_out() -> None:
    assert measure.window(open_loop(20, 0.5), None, ramp_s=10.0) == (10.0, 19.0)
    assert measure.window(open_loop(20, 0.5), None, ramp_s=30.0) is None


def test_an_open_loop_too_short_is_not_steady() -> None:
    assert measure.window(open_loop(5, 60.0), None) is None
    assert measure.window(open_loop(12, 5.5), None) is None
    assert measure.window([], None) is None
    never = [Record(index=n, planned_s=float(n), error="lost: x") for n in range(9)]
    assert measure.window(never, None) is None


def test_a_window_counts_what_was_planned_in_it_however_late_it_ended() -> None:
    records = open_loop(20, 4.5)
    measures = measure.measure(records, window=(7.5, 19.0))
    # Planned at 8, .., 19; ended at 8.5, .., 18.5, as that at 7.5 is what begins the window.
    assert (measures.steady, measures.requests, measures.backlog) == (True, 12, 1)
    assert measures.e2e_mean_s == 4.5
    assert measures.planned_per_s == pytest.approx(12 / 11.5)
    # Each comes in one piece at its end.
    assert measures.requests_per_s == pytest.approx(11 / 11.5)
    assert measures.max_running == 5
    assert measures.mean_running == pytest.approx(4.5, rel=0.02)


def test_a_request_counts_by_the_share_of_its_output_inside_a_window() -> None:
    record = answered(output_tokens=36)  # in three pieces, at 1, 2.5 and 3 s
    measures = measure.measure([record], Slo(ttft_s=9.0), window=(1.0, 3.0))
    assert measures.requests_per_s == pytest.approx(2 / 3 / 2)
    assert measures.goodput_per_s == measures.requests_per_s
    assert measures.output_tokens_per_s == pytest.approx(24 / 2)
    assert measures.total_tokens_per_s == pytest.approx((24 + 10 * 2 / 3) / 2)
    outside = measure.measure([record], window=(3.0, 9.0))
    assert (outside.requests_per_s, outside.output_tokens_per_s) == (0.0, 0.0)


@pytest.mark.parametrize("offered", [1.25, 1.5, 2.0, 4.0, 10.0])
def test_above_capacity_the_rate_is_the_servers(offered: float) -> None:
    """One request a second, ten tokens each, however many are offered."""
    records, end_s = [], 0.0
    for n in range(160):
        at_s = n / offered
        begin_s = max(at_s, end_s)
        end_s = begin_s + 1.0
        chunk_s = [begin_s + 0.1 * (part + 1) for part in range(10)]
        records.append(
            Record(
                index=n, planned_s=at_s, sent_s=at_s, chunk_s=chunk_s, end_s=end_s, output_tokens=10
            )
        )
    window = measure.window(records, None)
    measures = measure.measure(records, None, window)
    assert measures.requests_per_s == pytest.approx(1.0, rel=0.003)
    assert measures.output_tokens_per_s == pytest.approx(10.0, rel=0.003)
    doubts = measure.doubts(measures, whole=measure.measure(records))
    doubts += measure.unsettled(measure.settling_of_all([(records, window)] * 3 if window else []))
    assert doubts != []


@pytest.mark.parametrize(("spread", "users", "turns"), [(0.05, 8, 5), (0.5, 8, 8), (1.0, 8, 16)])
def test_lengths_that_vary_do_not_inflate_a_closed_loop(
    spread: float, users: int, turns: int
) -> None:
    """Each user gets 100 tokens/s; requests take a second on average."""
    rng = np.random.default_rng(2)
    sigma = float(np.sqrt(np.log(1 + spread**2)))
    requests, tokens = [], []
    for _ in range(60):
        free = [(0.0, user) for user in range(users)]
        records = []
        for n in range(users * turns):
            at_s, user = heapq.heappop(free)
            end_s = at_s + float(rng.lognormal(-(sigma**2) / 2, sigma))
            heapq.heappush(free, (end_s, user))
            records.append(
                Record(
                    index=n,
                    user=user,
                    planned_s=at_s,
                    sent_s=at_s,
                    chunk_s=[at_s + 1e-3, max(end_s, at_s + 1e-3)],
                    end_s=end_s,
                    output_tokens=max(2, round(100 * (end_s - at_s))),
                )
            )
        window = measure.window(records, users)
        if window is None:
            continue
        measures = measure.measure(records, None, window)
        requests.append((measures.requests_per_s or 0) / users)
        tokens.append((measures.output_tokens_per_s or 0) / users)
    assert len(requests) > 30
    assert np.mean(requests) == pytest.approx(1.0, abs=0.03)
    assert np.mean(tokens) == pytest.approx(100.0, rel=0.01)


@pytest.mark.parametrize("first_s", [0.01, 0.5, 0.95])
@pytest.mark.parametrize("turns", [5, 10])
def test_the_throughput_of_a_steady_state_is_that_of_the_server(first_s: float, turns: int) -> None:
    """4 users who get 20 tokens a second each, however short the run and late the first token."""
    records = closed_loop(4, turns, first_s)
    inside = measure.measure(records, window=measure.window(records, 4))
    assert inside.steady
    assert inside.output_tokens_per_s == pytest.approx(80.0)
    assert inside.requests_per_s == pytest.approx(4.0)
    assert inside.mean_running == pytest.approx(4.0)
    whole = measure.measure(records)
    assert whole.output_tokens_per_s == pytest.approx(80 * turns / (turns + 0.3))


@pytest.mark.parametrize("lengths", batching.LENGTHS)
@pytest.mark.parametrize(("users", "turns"), [(8, 4), (8, 8), (64, 4), (64, 6), (64, 14)])
def test_a_closed_loop_on_a_batching_server_is_measured_right_or_doubted(
    lengths: str, users: int, turns: int
) -> None:
    """128 users with geometric lengths had 1.18 of the true tokens/s after four turns."""
    seen = batching.throughput(lengths, users, turns, trials=5)
    if seen.steady > 0.5:  # Of fewer runs the mean is that of one or two.
        assert seen.ratio == pytest.approx(1.0, abs=0.02)
    assert seen.worst is None or seen.worst == pytest.approx(1.0, abs=0.05)
    if turns == 14 or lengths == "equal":
        assert seen.steady == 1.0


def test_users_who_stay_in_step_settle_once_their_turns_agree() -> None:
    """Requests of equal length wait for each other's prompts in waves: 512 were worth 4."""
    rng = np.random.default_rng(4)
    wave = np.linspace(0.1, 0.7, 64)
    alike = np.concatenate([wave * rng.normal(1, 0.01) for _ in range(8)])
    alone, together = steady_of(alike), steady_of(alike, 64)
    assert alone.error_share > 0.1
    assert (alone.settled, together.settled) == (False, True)
    drifting = np.concatenate([wave * (1 + 0.1 * turn) for turn in range(8)])
    assert not steady_of(drifting, 64).settled
    assert not steady_of(alike[:128], 64).settled


def test_repeats_settle_together() -> None:
    """Three repeats, none of which settles alone: their mean is within a twentieth of the truth."""
    rng, truth = np.random.default_rng(8), 10.0
    errors = [
        abs(np.mean(repeats) - truth)
        for repeats in (correlated(rng, truth, 3) for _ in range(300))
        if not any(steady_of(repeat).settled for repeat in repeats)
        and steady_of(averaged(repeats)).settled
    ]
    assert len(errors) >= 50
    assert np.mean(np.array(errors) <= 0.05 * truth) >= 0.92


def test_what_every_repeat_has_does_not_settle_by_repeating() -> None:
    """A queue that grows, in each of 30 repeats."""
    rng = np.random.default_rng(9)
    growing = [np.linspace(1, 3, count) * rng.normal(1, 0.1, count) for count in range(300, 330)]
    assert not steady_of(growing[0]).settled
    assert not steady_of(averaged(growing)).settled
    records = [
        [answered(n, n / 50, chunk_s=[n / 50 + took]) for n, took in enumerate(values)]
        for values in growing
    ]
    whole = [(repeat, (0.0, 7.0)) for repeat in records]
    assert "TTFT did not settle" in measure.unsettled(measure.settling_of_all(whole))[0]
    assert measure.unsettled(measure.settling_of_all([])) == []


def correlated(rng: np.random.Generator, mean: float, count: int) -> list[NDArray[np.float64]]:
    """AR(1) processes of 1,000 samples that are worth about 40 independent ones each."""
    noise = rng.normal(0, 2.0 * math.sqrt(1 - 0.92**2), (count, 1200))
    values = np.zeros((count, 1200))
    for place in range(1, 1200):
        values[:, place] = 0.92 * values[:, place - 1] + noise[:, place]
    return list(mean + values[:, 200:])


def steady_of(values: NDArray[np.float64], users: int | None = None) -> Settling:
    settled = settling(values, users)
    assert settled
    return settled


# --- over time ------------------------------------------------------------------------------


def test_a_timeline_by_hand() -> None:
    result = measure.timeline([answered(0, 0.0, output_tokens=6), failed(1, 1.5)], step_s=2.0)
    assert result.t_s == [0.0, 2.0]
    assert result.planned_per_s == [1.0, 0.0]
    assert result.failed_per_s == [0.5, 0.0]
    assert result.output_tokens_per_s == [1.0, 2.0]  # 2 at 1 s; 2 at 2.5 s and 2 at 3 s
    assert result.running == [pytest.approx((1.75 + 0.001) / 2), pytest.approx(0.75)]


def test_a_timeline_of_nothing_is_empty_and_no_error() -> None:
    assert measure.timeline([]).output_tokens_per_s == [0.0]


def test_slices_of_a_window() -> None:
    record = answered(output_tokens=6)
    assert measure.output_tokens_by_slice([record], (0.0, 4.0), 4) == [0.0, 2.0, 2.0, 2.0]


# --- doubts ---------------------------------------------------------------------------------


def steady(count: int = 400, **changes: Any) -> Measures:
    records = [
        answered(n, float(n), sent_s=n + 0.001, chunk_s=[n + 1.0], end_s=n + 1.5, **changes)
        for n in range(count)
    ]
    return measure.measure(records, window=measure.window(records, None))


def test_a_clean_run_is_not_doubted() -> None:
    assert measure.doubts(steady(), {0: 0.5, 1: 0.89}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steady": False}, "no steady state"),
        ({"lag_p99_s": 0.051}, "lag p99 51.0 ms"),
        ({"ttft_p50_s": None, "lag_p99_s": 0.0051}, "lag p99 5.1 ms"),
        ({"failed_share": 0.02, "failed": 8, "failures": {"cut": 8}}, "failed: 8 cut"),
        ({"ok": 0, "failures": {"connection refused": 400}}, "nothing succeeded: 400 connection"),
        ({"without_usage": 5}, "usage is missing for 5"),
        ({"backlog": 150}, "fell behind"),
    ],
)
def test_each_doubt_is_said(changes: dict[str, Any], message: str) -> None:
    result = measure.doubts(msgspec.structs.replace(steady(), **changes))
    assert [message in doubt for doubt in result] == [True]


@pytest.mark.parametrize(
    "changes",
    [
        {"lag_p99_s": 0.049},
        {"lag_p99_s": 0.001, "lag_max_s": 3.0},
        {"failed_share": 0.01, "failed": 4},
        {"backlog": 39},
    ],
)
def test_what_is_within_bounds_is_not_doubted(changes: dict[str, Any]) -> None:
    assert measure.doubts(msgspec.structs.replace(steady(), **changes)) == []


def test_a_busy_actor_is_named() -> None:
    assert "load actor 1 used 95%" in measure.doubts(steady(), {0: 0.2, 1: 0.95})[0]


def test_failures_outside_the_window_count_too() -> None:
    whole = msgspec.structs.replace(steady(), failed=40, failed_share=0.1, failures={"cut": 40})
    assert "40 of 398 requests failed: 40 cut" in measure.doubts(steady(), whole=whole)[0]


def test_an_overloaded_server_falls_behind() -> None:
    records = [
        answered(n, n / 10, sent_s=n / 10, chunk_s=[n / 5 + 0.1], end_s=n / 5 + 0.1)
        for n in range(400)
    ]
    measures = measure.measure(records, window=measure.window(records, None))
    assert measure.falls_behind(measures)
    assert "fell behind" in " ".join(measure.doubts(measures))


# --- vLLM -----------------------------------------------------------------------------------


def vllm_serve() -> ast.Module:
    """The source of `vllm bench serve`; not imported, as that takes as long as all tests here."""
    result = importlib.util.find_spec("vllm")
    if result is None or not result.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    path = Path(result.submodule_search_locations[0]) / "benchmarks" / "serve.py"
    return ast.parse(path.read_text())


def functions(module: ast.Module) -> dict[str, ast.stmt]:
    wanted = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name: node for node in module.body if isinstance(node, wanted)}


def vllm_calculate(module: ast.Module) -> Any:
    """vLLM's own `calculate_metrics`."""
    names = ("BenchmarkMetrics", "calculate_metrics")
    body: list[ast.stmt] = [
        ast.ImportFrom("__future__", [ast.alias("annotations")], 0),
        *(functions(module)[name] for name in names),
    ]
    code = compile(ast.fix_missing_locations(ast.Module(body, type_ignores=[])), "serve.py", "exec")
    scope: dict[str, Any] = {
        "__name__": __name__,
        "np": np,
        "dataclass": dataclass,
        "warnings": warnings,
        "TERM_PLOTLIB_AVAILABLE": False,
        "MILLISECONDS_TO_SECONDS_CONVERSION": 1000,
    }
    exec(code, scope)
    return scope["calculate_metrics"]


def as_vllm_sees_it(record: Record) -> Any:
    """What its request function returns for the same events."""
    sent_s, chunk_s = record.sent_s or 0.0, record.chunk_s
    return types.SimpleNamespace(
        success=record.ok,
        error=record.error,
        start_time=sent_s,
        ttft=chunk_s[0] - sent_s if chunk_s else 0.0,
        itl=[float(gap) for gap in np.diff(chunk_s)],
        latency=chunk_s[-1] - sent_s if record.ok else 0.0,
        output_tokens=record.output_tokens or 0,
        prompt_len=record.input_tokens or record.asked_input_tokens,
        generated_text="",
        input_audio_duration=0.0,
    )


def some_load(seed: int, count: int) -> list[Record]:
    """An open loop with lag, chunks of several tokens, answers of one token, and failures."""
    draw = random.Random(seed)
    records, at_s = [], 0.0
    for index in range(count):
        at_s += draw.expovariate(20)
        sent_s = at_s + draw.random() / 50
        if draw.random() < 0.05:
            records.append(failed(index, at_s, sent_s=sent_s))
            continue
        chunk_s = [sent_s + draw.random() / 2]
        for _ in range(draw.randrange(60)):
            chunk_s.append(chunk_s[-1] + draw.expovariate(30))
        records.append(
            Record(
                index=index,
                planned_s=at_s,
                sent_s=sent_s,
                chunk_s=chunk_s,
                end_s=chunk_s[-1] + 0.004,
                status=200,
                input_tokens=draw.randrange(1, 500),
                output_tokens=len(chunk_s) * draw.choice([1, 1, 2]),
            )
        )
    return records


@pytest.mark.parametrize("seed", [1, 2])
def test_vllm_itself_computes_the_same_from_the_same_requests(
    seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    records = some_load(seed, 600)
    ours = measure.vllm_names(records, slo=Slo(ttft_s=0.4, tpot_s=0.04, e2e_s=2.0), detailed=True)
    theirs, lens = vllm_calculate(vllm_serve())(
        input_requests=[],
        outputs=[as_vllm_sees_it(record) for record in records],
        dur_s=ours["duration"],
        tokenizer=None,
        selected_percentiles=[50, 90, 95, 99],
        goodput_config_dict={"ttft": 400, "tpot": 40, "e2el": 2000},
    )
    capsys.readouterr()
    assert ours["output_lens"] == lens
    for latency in ("ttft", "tpot", "itl", "e2el"):
        for statistic in ("mean", "median", "std"):
            name = f"{statistic}_{latency}_ms"
            assert ours[name] == pytest.approx(getattr(theirs, name)), name
        for percent, value in getattr(theirs, f"percentiles_{latency}_ms"):
            assert ours[f"p{percent}_{latency}_ms"] == pytest.approx(value)
    same = {
        "completed": "completed",
        "failed": "failed",
        "total_input_tokens": "total_input",
        "total_output_tokens": "total_output",
        "request_throughput": "request_throughput",
        "request_goodput": "request_goodput",
        "output_throughput": "output_throughput",
        "total_token_throughput": "total_token_throughput",
        "max_output_tokens_per_s": "max_output_tokens_per_s",
        "max_concurrent_requests": "max_concurrent_requests",
    }
    for name, theirs_name in same.items():
        assert ours[name] == pytest.approx(getattr(theirs, theirs_name)), name
    assert 0 < ours["request_goodput"] < ours["request_throughput"]


def test_every_name_of_vllms_result_is_there() -> None:
    module = functions(vllm_serve())
    named = {
        key.value
        for node in ast.walk(module["benchmark"])
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }
    assert {"duration", "completed", "itls", "queue_times", "rtfx"} <= named
    # Of other kinds of requests, of optional extras, or not of the result.
    other = ("probe_", "rps", "timestamp", "num_drafts", "draft_tokens", "accepted", "acceptance")
    other += ("per_position", "denoising", "canvas", "committed", "steps_per", "input_sequence")
    other += ("total_input_sequences",)
    named = {name for name in named if not name.startswith(other)}
    setup = {
        node.slice.value
        for node in ast.walk(module["main_async"])
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "result_json"
        and isinstance(node.slice, ast.Constant)
    } - {"ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"}
    assert "max_concurrency" in setup
    ours = measure.vllm_names(many(3), detailed=True, max_concurrency=4)
    assert named | setup <= set(ours)
    for latency in ("ttft", "tpot", "itl", "e2el", "client_queue_time"):
        for statistic in ("mean", "median", "std", "p99"):
            assert f"{statistic}_{latency}_ms" in ours


def test_vllms_names_by_hand() -> None:
    """Its times run from when a request was sent to its last chunk."""
    records = [answered(0, 0.0), failed(1, 1.0, text="")]
    result = measure.vllm_names(records, model="m", request_rate=2.0, date="20260101-000000")
    assert result["duration"] == 3.5
    assert result["mean_ttft_ms"] == 750.0
    assert result["mean_e2el_ms"] == 2750.0
    assert result["mean_tpot_ms"] == 500.0
    assert result["median_itl_ms"] == 1000.0
    assert (result["completed"], result["failed"], result["num_prompts"]) == (1, 1, 2)
    assert result["latencies"] == [2.75, 0.0]
    assert (result["request_rate"], result["model_id"]) == (2.0, "m")
    assert result["p99_ttft_ms"] is None
    assert "ttfts" not in result
    assert json.loads(json.dumps(result)) == result


def test_vllms_goodput_is_by_its_own_times() -> None:
    records, slo = [answered()], Slo(ttft_s=0.75, e2e_s=2.75)
    assert measure.vllm_names(records, slo=slo)["request_goodput"] == pytest.approx(1 / 3.5)
    assert measure.measure(records, slo).goodput_per_s == 0.0
    assert measure.vllm_names(records)["request_goodput"] is None


def test_vllms_details_say_which_request_failed() -> None:
    result = measure.vllm_names([failed(1), answered(0, text="hello")], detailed=True)
    assert result["errors"] == ["", "http 503: overloaded"]
    assert result["ttfts"] == [0.75, 0.0]
    assert result["itls"] == [[1.5, 0.5], []]
    assert (result["input_lens"], result["output_lens"]) == ([10, 7], [5, 0])
    assert result["start_times"] == [0.25, 0.0]
    assert result["generated_texts"] == ["hello", ""]


def test_the_durations_of_repeats_add_up() -> None:
    records = [answered(0, 0.0), answered(0, 0.0, repeat=1)]
    result = measure.vllm_names(records)
    assert (result["duration"], result["request_throughput"]) == (7.0, pytest.approx(2 / 7))
    assert result["max_concurrent_requests"] == 1


def test_nothing_answered_has_no_statistics_in_vllms_names_either() -> None:
    result = measure.vllm_names([failed(0)])
    assert (result["completed"], result["mean_ttft_ms"], result["max_output_tokens_per_s"]) == (
        0,
        None,
        0.0,
    )
