"""What a replica reports: rates and percentiles of the last seconds, and what waits."""

import random
import tracemalloc

import pytest

from serve_app.scaling.signals import WINDOW_S, Signals


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.25

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signals(clock: Clock) -> Signals:
    return Signals(95.0, clock)


def test_before_the_first_request_there_is_nothing_to_report(signals: Signals) -> None:
    load = signals.load(max_running=8, in_engine=0)
    assert (load.running, load.waiting, load.queued_tokens, load.max_running) == (0, 0, 0, 8)
    assert (load.ttft_s, load.itl_s) == (None, None)
    assert (load.arrivals_per_s, load.decode_tokens_per_s) == (0, 0)


def test_rates_are_those_of_the_window(clock: Clock, signals: Signals) -> None:
    for _ in range(300):
        clock.now_s += 0.1
        signals.arrived()
        signals.step(50, 4, 1, [], [])
    load = signals.load(8, 4)
    assert load.arrivals_per_s == pytest.approx(10, rel=0.02)
    assert load.prefill_tokens_per_s == pytest.approx(500, rel=0.02)
    assert load.decode_tokens_per_s == pytest.approx(40, rel=0.02)
    assert load.preemptions_per_s == pytest.approx(10, rel=0.02)


def test_rates_of_a_replica_that_just_began_are_of_its_own_time(
    clock: Clock, signals: Signals
) -> None:
    for _ in range(40):
        clock.now_s += 0.05
        signals.arrived()
    assert signals.load(8, 0).arrivals_per_s == pytest.approx(20, rel=0.05)


def test_requests_that_ended_beyond_a_limit_are_counted(clock: Clock) -> None:
    signals = Signals(95.0, clock, ttft_s=1.0, itl_s=0.1)
    signals.admitted(0.5, 100)  # What waited before the engine counts to the first token.
    clock.now_s += 5
    signals.step(0, 4, 0, [], [], [(0.4, 0.05), (0.6, 0.05), (0.4, 0.2), (9.0, 9.0)])
    load = signals.load(8, 4)
    assert load.finished_per_s == pytest.approx(4 / 5)
    assert load.missed_per_s == pytest.approx(3 / 5)
    clock.now_s += 2 * WINDOW_S
    assert signals.load(8, 4).finished_per_s == 0
    free = Signals(95.0, clock)
    free.step(0, 1, 0, [], [], [(1e3, 1e3)])
    assert (free.load(8, 1).finished_per_s, free.load(8, 1).missed_per_s) == (1.0, 0.0)


@pytest.mark.parametrize("gap_s", [1.0, WINDOW_S - 1.0])
def test_what_is_recent_is_kept(clock: Clock, signals: Signals, gap_s: float) -> None:
    signals.step(100, 1, 0, [0.5], [0.02])
    clock.now_s += gap_s
    load = signals.load(8, 0)
    assert load.ttft_s is not None
    assert load.itl_s == pytest.approx(0.02)
    assert load.prefill_tokens_per_s > 0


@pytest.mark.parametrize("gap_s", [WINDOW_S + 1.0, WINDOW_S + 1.7, 2 * WINDOW_S + 2, 1e6])
def test_what_is_old_is_forgotten(clock: Clock, signals: Signals, gap_s: float) -> None:
    signals.arrived()
    signals.step(100, 1, 2, [0.5], [0.02])
    clock.now_s += gap_s
    load = signals.load(8, 0)
    assert (load.ttft_s, load.itl_s) == (None, None)
    assert load.prefill_tokens_per_s == load.decode_tokens_per_s == load.arrivals_per_s == 0
    assert load.preemptions_per_s == 0


@pytest.mark.parametrize("percentile", [50.0, 95.0, 99.0, 100.0])
def test_percentiles_are_within_a_bucket_of_the_exact_ones(clock: Clock, percentile: float) -> None:
    signals, draw = Signals(percentile, clock), random.Random(1)
    values = [draw.lognormvariate(-3, 1.5) for _ in range(5000)]
    for value in values:
        clock.now_s += 0.001
        signals.step(0, 1, 0, [value], [])
    exact = sorted(values)[max(0, int(len(values) * percentile / 100) - 1)]
    assert signals.load(8, 0).ttft_s == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    ("latency_s", "range_s"), [(-1.0, (0, 2e-4)), (0.0, (0, 2e-4)), (1e9, (900, 1100))]
)
def test_latencies_beyond_the_range_are_held_to_it(
    signals: Signals, latency_s: float, range_s: tuple[float, float]
) -> None:
    signals.step(0, 1, 0, [latency_s], [])
    ttft_s = signals.load(8, 0).ttft_s
    assert ttft_s is not None
    assert range_s[0] < ttft_s < range_s[1]


def test_the_time_between_tokens_is_that_of_a_bad_second(clock: Clock) -> None:
    """One long step among many is no bad second; a second of slow steps is one."""
    signals = Signals(95.0, clock)
    for _ in range(9):
        for gap_s in [0.01] * 90 + [0.1]:
            signals.step(0, 8, 0, [], [gap_s] * 8)
        clock.now_s += 1
    mean_s = (90 * 0.01 + 0.1) / 91
    assert signals.load(8, 8).itl_s == pytest.approx(mean_s)
    for _ in range(10):
        signals.step(0, 8, 0, [], [0.1] * 80)
    assert signals.load(8, 8).itl_s == pytest.approx(0.1)


# --- how busy the engine is -----------------------------------------------------------------


def test_steps_and_the_time_in_them_are_counted(clock: Clock, signals: Signals) -> None:
    """Half a second of steps, half a second with nobody there."""
    for _ in range(12):
        signals.admitted(0.0, 10)
        for running in [1] * 9 + [0]:
            clock.now_s += 0.05
            signals.state(0, running, 0, 0.1)
        clock.now_s += 0.5
    load = signals.load(8, 0)
    assert load.busy == pytest.approx(0.5, rel=0.05)
    assert load.steps_per_s == pytest.approx(10, rel=0.05)


def test_a_client_that_left_keeps_no_engine_busy(clock: Clock, signals: Signals) -> None:
    signals.admitted(0.0, 10)
    clock.now_s += 0.1
    signals.state(0, 1, 0, 0.1)
    signals.load(8, in_engine=0)  # It left, and the engine takes no step that would say so.
    clock.now_s += 5
    signals.admitted(0.0, 10)
    clock.now_s += 0.1
    signals.state(0, 1, 0, 0.1)
    assert signals.load(8, 1).busy == pytest.approx(0.2 / 5.2, rel=0.1)


def test_the_first_of_two_that_wake_an_engine_begins_its_step(
    clock: Clock, signals: Signals
) -> None:
    signals.admitted(0.0, 10)
    clock.now_s += 0.3
    signals.admitted(0.0, 10)
    clock.now_s += 0.1
    signals.state(0, 2, 0, 0.1)
    assert signals.load(8, 2).busy == pytest.approx(0.4)


def test_two_cores_are_one_replica(clock: Clock, signals: Signals) -> None:
    for _ in range(100):
        clock.now_s += 0.1
        signals.state(0, 1, 0, 0.1)
        signals.state(1, 1, 0, 0.3)
    load = signals.load(8, 2)
    assert load.busy == pytest.approx(1.0, rel=0.02)
    assert load.steps_per_s == pytest.approx(10, rel=0.02)


# --- what waits -----------------------------------------------------------------------------


def test_the_time_to_a_first_token_includes_the_wait_for_room(signals: Signals) -> None:
    signals.admitted(3.0, 100)
    signals.step(10, 1, 0, [0.2], [])
    assert signals.load(8, 1).ttft_s == pytest.approx(3.2, rel=0.03)


def test_the_queue_learns_of_first_tokens(signals: Signals) -> None:
    told: list[int] = []
    signals.first_tokens = told.append
    signals.step(30, 3, 0, [0.1, 0.2], [0.01])
    signals.step(0, 5, 0, [], [0.01])
    signals.step(10, 1, 0, [0.3], [])
    assert told == [2, 1]


def test_what_waits_before_the_engine_counts(signals: Signals) -> None:
    signals.state(0, running=4, waiting=2, kv_usage=0.5)
    signals.state(1, running=3, waiting=0, kv_usage=0.7)
    load = signals.load(8, in_engine=9, queued=5, queued_bytes=4000, unread_tokens=70)
    assert (load.running, load.waiting, load.kv_usage) == (7, 7, 0.7)
    assert load.queued_tokens == 1070


def test_an_engine_that_was_left_alone_runs_nothing(signals: Signals) -> None:
    signals.state(0, running=4, waiting=2, kv_usage=0.5)
    load = signals.load(8, in_engine=0)
    assert (load.running, load.waiting, load.kv_usage) == (0, 0, 0.0)
    assert signals.load(8, in_engine=5).waiting == 1


def test_tokens_of_a_body_are_learnt_from_those_that_were_read(signals: Signals) -> None:
    for _ in range(3000):
        signals.admitted(0.0, 9000)
        signals.step(1000, 1, 0, [0.1], [])
    assert signals.load(8, 0, queued=1, queued_bytes=90_000).queued_tokens == pytest.approx(
        10_000, rel=0.05
    )


def test_memory_does_not_grow_with_the_load(clock: Clock, signals: Signals) -> None:
    def spell() -> None:
        for _ in range(3000):
            clock.now_s += 0.01
            signals.arrived()
            signals.admitted(0.1, 1000)
            signals.step(100, 64, 1, [0.2], [0.01] * 64)
            signals.state(0, 64, 0, 0.4)

    spell()
    tracemalloc.start()
    try:
        spell()
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 200_000
