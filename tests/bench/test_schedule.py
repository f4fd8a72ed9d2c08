"""When it is sent: rates, their spread, and plans that are the same each time."""

import itertools
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import LoadError
from bench.traffic.request import Workload
from bench.traffic.schedule import (
    KINDS,
    MAX_PLANNED,
    Burst,
    Closed,
    Constant,
    Gamma,
    Open,
    Ramp,
    TraceTimes,
    parse,
    plan,
)
from bench.traffic.workload import parse as workload_of
from tests.bench.specs import specs
from tests.examples import examples

OPEN = [
    "constant:rate=5",
    "poisson:rate=5",
    "gamma:rate=5,cv=2.5",
    "gamma:rate=5,cv=0.3",
    "ramp:from=1,to=20,duration=60",
    "ramp:from=20,to=1,duration=60",
    "burst:size=20,every=10",
]


def open_load(text: str) -> Open:
    load = parse(text)
    assert isinstance(load, Open)
    return load


def gaps(times: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise([0.0, *times])]


def spread(values: list[float]) -> float:
    """Coefficient of variation."""
    return statistics.stdev(values) / statistics.fmean(values)


# --- specs ----------------------------------------------------------------------------------


def test_each_spec_is_its_load() -> None:
    assert parse("users=8") == Closed(8)
    assert parse("users=8,think=0.5") == parse("closed:users=8,think=0.5") == Closed(8, 0.5)
    assert parse("constant:rate=5") == Constant(5.0)
    assert parse("poisson:rate=5") == parse("gamma:rate=5,cv=1") == Gamma(5.0, 1.0)
    assert parse("gamma:rate=5,cv=2") == Gamma(5.0, 2.0)
    assert parse("ramp:from=1,to=20,duration=60") == Ramp(1.0, 20.0, 60.0)
    assert parse("burst:size=20,every=10") == Burst(20, 10.0)
    assert parse("trace") == TraceTimes(1.0)
    assert parse("trace:speed=2") == TraceTimes(2.0)


@pytest.mark.parametrize("text", [*OPEN, "users=8", "users=8,think=0.5", "trace:speed=0.5"])
def test_a_load_prints_as_its_spec(text: str) -> None:
    assert str(parse(text)) == text


@given(st.floats(1e-5, 1e5))
@examples(100)
def test_a_printed_rate_reads_back_exactly(rate: float) -> None:
    assert parse(str(Constant(rate))) == Constant(rate)
    assert parse(str(Ramp(rate, 1.0, rate))) == Ramp(rate, 1.0, rate)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "load = '': no such load"),
        ("posson:rate=5", "load = 'posson': .*did you mean 'poisson'.*closed, constant, poisson"),
        ("poisson:rat=5", r"rat = '5': .*did you mean 'rate'.*\(valid: rate\)"),
        ("poisson:rate=5,cv=2", "cv = '2': 'poisson' has no such option"),
        ("poisson", "rate = '': 'poisson' needs it"),
        ("poisson:rate=0", "rate = '0': must be above 0"),
        ("poisson:rate=-1", "rate = '-1': must be above 0"),
        ("poisson:rate=inf", "rate = 'inf': not a number"),
        ("poisson:rate=nan", "rate = 'nan': not a number"),
        ("poisson:rate=٣", "rate = '٣': not a number"),
        ("poisson:rate=five", "rate = 'five': not a number"),
        ("poisson:rate=1e400", "rate = '1e400': must be from 0 to"),
        ("poisson:rate=5,rate=6", "rate = '6': given twice, before as '5'"),
        ("gamma:rate=5", "cv = '': 'gamma' needs it"),
        ("gamma:rate=5,cv=0", "cv = '0': must be from 0.01 to 100"),
        ("user=8", "user = '8': .*did you mean 'users'"),
        ("users=0", "users = '0': must be from 1 to"),
        ("users=1.5", "users = '1.5': not a whole number"),
        ("users=8,think=-1", "think = '-1': must be from 0 to"),
        ("users", "load = 'users': no such load"),
        ("ramp:from=0,to=0,duration=5", "to = '0.0': must be above 0 where from is 0"),
        ("ramp:from=1,to=2,duration=0", "duration = '0': must be above 0"),
        ("ramp:from=1,too=2,duration=5", "too = '2': .*did you mean 'to'"),
        ("burst:size=0,every=1", "size = '0': must be from 1"),
        ("burst:size=1", "every = ''"),
        ("trace:sped=2", "sped = '2': .*did you mean 'speed'"),
        ("trace:speed=0", "speed = '0': must be above 0"),
    ],
)
def test_a_bad_spec_is_refused_by_name_value_and_nearest_choice(text: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        parse(text)


VALUES = st.one_of(st.floats().map(str), st.integers().map(str), st.text(max_size=9))


@given(specs(KINDS, VALUES, most_pairs=3))
@examples(300)
def test_any_text_is_a_load_or_a_sentence(text: str) -> None:
    try:
        load = parse(text)
    except LoadError:
        return
    assert parse(str(load)) == load


# --- times ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", OPEN)
def test_times_are_bounded_by_count_by_duration_or_by_both(text: str) -> None:
    load = open_load(text)
    by_count = load.times_s(100, None, 3)
    assert len(by_count) == 100
    by_duration = load.times_s(None, 30.0, 3)
    assert by_duration == [at_s for at_s in by_duration if 0 <= at_s < 30]
    assert len(by_duration) > 20
    shorter = min(by_count, by_duration, key=len)
    assert load.times_s(100, 30.0, 3) == shorter
    assert max(by_count, by_duration, key=len)[: len(shorter)] == shorter


@pytest.mark.parametrize("text", OPEN)
def test_times_ascend_and_depend_on_the_seed_alone(text: str) -> None:
    load = open_load(text)
    times = load.times_s(200, None, 3)
    assert times == sorted(times)
    assert load.times_s(200, None, 3) == times
    random_times = not isinstance(load, Constant | Burst)
    assert (load.times_s(200, None, 4) != times) == random_times


def test_constant_times_are_exact_however_many() -> None:
    times = Constant(3.0).times_s(100_000, None, 0)
    assert times[0] == 0.0
    assert times[99_999] == 99_999 / 3
    assert len(Constant(5.0).times_s(None, 60.0, 0)) == 300


def test_poisson_times_have_exponential_gaps() -> None:
    times = Gamma(50.0).times_s(20_000, None, 1)
    result = gaps(times)
    # The standard errors are 1/sqrt(20000) = 0.7% and about 1%.
    assert statistics.fmean(result) == pytest.approx(1 / 50, rel=0.03)
    assert spread(result) == pytest.approx(1.0, abs=0.04)
    # The distribution, by Kolmogorov and Smirnov: above 1.63 / sqrt(n) in one of a hundred seeds.
    ranked = [1 - math.exp(-gap * 50) for gap in sorted(result)]
    distance = max(abs(share - rank / 20_000) for rank, share in enumerate(ranked))
    assert distance < 1.63 / math.sqrt(20_000)


def test_poisson_counts_vary_as_much_as_they_average() -> None:
    times = Gamma(20.0).times_s(None, 1000.0, 1)
    counts = [0] * 1000
    for at_s in times:
        counts[int(at_s)] += 1
    assert statistics.fmean(counts) == pytest.approx(20, rel=0.03)
    assert statistics.variance(counts) / statistics.fmean(counts) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("cv", [0.25, 0.5, 2.0, 4.0])
def test_gamma_times_have_their_rate_and_spread(cv: float) -> None:
    result = gaps(Gamma(10.0, cv).times_s(50_000, None, 2))
    assert statistics.fmean(result) == pytest.approx(1 / 10, rel=max(0.01, cv * 0.02))
    assert spread(result) == pytest.approx(cv, rel=0.06)


@pytest.mark.parametrize(
    "load",
    [Ramp(1, 50, 400), Ramp(50, 1, 400), Ramp(0, 50, 400), Ramp(50, 0, 400), Ramp(25, 25, 1)],
)
def test_a_ramp_is_a_poisson_process_in_the_time_of_its_integral(load: Ramp) -> None:
    times = load.times_s(None, 400.0, 5)
    assert len(times) == pytest.approx(load.expected(400.0), rel=0.04)
    result = gaps([load.expected(at_s) for at_s in times])
    assert statistics.fmean(result) == pytest.approx(1.0, rel=0.04)
    assert spread(result) == pytest.approx(1.0, abs=0.05)


def test_a_ramp_has_the_rate_it_says_at_each_moment() -> None:
    # Many seeds together: 40 runs from 1 to 21 in 100 s.
    pooled = [at_s for seed in range(40) for at_s in Ramp(1, 21, 100).times_s(None, None, seed)]
    for start_s in range(0, 100, 20):
        count = sum(1 for at_s in pooled if start_s <= at_s < start_s + 20)
        expected = 40 * 20 * (1 + 0.2 * (start_s + 10))
        assert abs(count - expected) < 4 * math.sqrt(expected)


def test_a_ramp_lasts_its_duration_and_then_stays_where_it_is() -> None:
    load = Ramp(1, 20, 60)
    assert load.expected(60) == pytest.approx(630)
    assert load.expected(70) == pytest.approx(830)
    assert max(load.times_s(None, None, 0)) < 60
    after = [at_s for at_s in load.times_s(None, 660.0, 0) if at_s >= 60]
    assert len(after) == pytest.approx(600 * 20, rel=0.04)


def test_a_ramp_to_nothing_ends() -> None:
    load = Ramp(10, 0, 60)
    assert max(load.times_s(None, 1000.0, 0)) <= 60
    with pytest.raises(LoadError, match=r"count = '5000': ramp:.* ends after \d+ requests"):
        load.times_s(5000, None, 0)


def test_bursts_come_at_once_and_at_their_time() -> None:
    times = Burst(3, 10.0).times_s(None, 21.0, 0)
    assert times == [0.0] * 3 + [10.0] * 3 + [20.0] * 3
    assert Burst(3, 10.0).times_s(4, None, 0) == [0.0, 0.0, 0.0, 10.0]


@pytest.mark.parametrize("text", ["constant:rate=5", "poisson:rate=5", "burst:size=2,every=1"])
def test_a_load_without_end_is_refused(text: str) -> None:
    with pytest.raises(LoadError, match="has no end: give a count or a duration"):
        open_load(text).times_s(None, None, 0)


def test_a_load_too_large_to_plan_is_refused() -> None:
    with pytest.raises(LoadError, match="has more than 1000000 requests"):
        Burst(1_000_000, 1e-3).times_s(None, 1e6, 0)


# --- plans ----------------------------------------------------------------------------------

SHORT = "synthetic:input=5,output=50"


@pytest.fixture
def replay(tmp_path: Path) -> Workload:
    """Ten requests, one every 2 s."""
    path = tmp_path / "trace.jsonl"
    line = '{{"timestamp": {}, "input_length": 6, "output_length": 1}}\n'
    path.write_text("".join(line.format(2000 * n) for n in range(10)))
    return workload_of(f"mooncake:{path}", 0)


@pytest.mark.parametrize("text", [*OPEN, "users=4"])
def test_a_plan_is_the_same_for_the_same_seed_and_another_for_another(text: str) -> None:
    load = parse(text)
    plans = [plan(workload_of(SHORT, seed, ""), load, 50, None, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    prompts = [{str(each.request.prompt) for each in item.planned} for item in plans]
    assert len(prompts[0]) == 50
    assert prompts[0].isdisjoint(prompts[2])


def test_an_open_plan_pairs_requests_with_times() -> None:
    workload, load = workload_of(SHORT, 1, ""), open_load("poisson:rate=5")
    made = plan(workload, load, 50, None, 7)
    assert made.closed is None
    assert [each.at_s for each in made.planned] == load.times_s(50, None, 7)
    assert [each.request for each in made.planned] == workload.take(50)
    assert [each.index for each in made.planned] == list(range(50))
    assert {each.session for each in made.planned} == {None}


def test_a_closed_plan_is_a_queue_for_its_users() -> None:
    workload = workload_of(SHORT, 1, "")
    made = plan(workload, Closed(8, 0.5), 50, None, 7)
    assert made.closed == Closed(8, 0.5)
    assert [each.request for each in made.planned] == workload.take(50)
    assert [each.index for each in made.planned] == list(range(50))
    assert {each.at_s for each in made.planned} == {None}
    assert made.duration_s is None


def test_a_closed_plan_with_only_a_duration_has_more_than_can_be_sent() -> None:
    made = plan(workload_of(SHORT, 1, ""), Closed(8), None, 10.0, 7)
    assert made.duration_s == 10.0
    # 50 tokens in 60 ms, at the least.
    assert len(made.planned) == 8 * 167
    waiting = plan(workload_of(SHORT, 1, ""), Closed(8, think_s=0.94), None, 10.0, 7)
    assert len(waiting.planned) == 8 * 10
    bounded = plan(workload_of(SHORT, 1, ""), Closed(8), 20, 10.0, 7)
    assert (len(bounded.planned), bounded.duration_s) == (20, 10.0)


def test_a_closed_plan_too_large_for_memory_is_refused() -> None:
    workload = workload_of("synthetic:input=4000,output=1", 1)
    with pytest.raises(LoadError, match=r"duration = '600\.0': users=100 could send \d+ requests"):
        plan(workload, Closed(100), None, 600.0, 7)


def test_a_finite_workload_is_sent_whole_unless_bounded(replay: Workload) -> None:
    assert len(plan(replay, Closed(2), None, None, 0).planned) == 10
    assert len(plan(replay, Closed(2), None, 60.0, 0).planned) == 10
    assert len(plan(replay, Constant(5.0), None, None, 0).planned) == 10
    assert len(plan(replay, Constant(5.0), None, 1.0, 0).planned) == 5
    assert len(plan(replay, Burst(4, 1.0), 6, 60.0, 0).planned) == 6


@pytest.mark.parametrize(
    ("text", "count", "duration_s", "message"),
    [
        ("users=2", 11, None, "count = '11': needs 11 requests, and mooncake:.* has 10"),
        ("trace", 11, None, "count = '11': needs 11 requests, and mooncake:.* has 10"),
        ("constant:rate=5", 11, None, "count = '11': needs 11"),
        ("constant:rate=5", None, 3.0, r"duration = '3\.0': needs 15"),
        ("ramp:from=9,to=9,duration=50", None, None, r"duration = '50\.0': needs 4\d\d"),
        ("trace", 0, None, "count = '0': must be from 1 to"),
        ("trace", None, 0.0, r"duration = '0\.0': must be above 0"),
        ("trace", None, math.inf, "duration = 'inf': must be above 0 and finite"),
        ("trace", None, math.nan, "duration = 'nan': must be above 0"),
        ("users=2", MAX_PLANNED + 1, None, "count = '1000001': must be from 1 to 1000000"),
        ("poisson:rate=0.001", None, 0.1, r"duration = '0\.1': no request of poisson:rate=0\.001"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    replay: Workload, text: str, count: int | None, duration_s: float | None, message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        plan(replay, parse(text), count, duration_s, 0)


def test_an_endless_workload_needs_a_bound_and_has_no_times() -> None:
    workload = workload_of(SHORT, 0, "")
    for load in (Closed(2), Constant(5.0)):
        with pytest.raises(LoadError, match="no end: give a count or a duration"):
            plan(workload, load, None, None, 0)
    with pytest.raises(LoadError, match=r"load = 'trace:speed=1': synthetic.* no times of its own"):
        plan(workload, TraceTimes(), 5, None, 0)


def test_a_file_of_prompts_has_no_times(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(LoadError, match="no times of its own"):
        plan(workload_of(f"file:{path}", 0), TraceTimes(), None, None, 0)


def test_a_trace_is_replayed_at_its_times(replay: Workload) -> None:
    times = [each.at_s for each in plan(replay, TraceTimes(), None, None, 0).planned]
    assert times == pytest.approx([2.0 * n for n in range(10)])
    made = plan(replay, TraceTimes(speed=4.0), None, 2.0, 0)
    assert [each.at_s for each in made.planned] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert [each.request for each in made.planned] == replay.take(4)
    assert len(plan(replay, TraceTimes(), 3, None, 0).planned) == 3
