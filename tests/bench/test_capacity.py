"""How the capacity of a client is read from its events, and searched for."""

import pytest

from bench.itself.capacity import Capacity, Reading, Spread, Stream, read, search, summarise, table


def steady(lag_s: float, count: int = 100, every_s: float = 0.1) -> Stream:
    sent = [10.0 + at * every_s for at in range(count)]
    return Stream(sent, [at_s + lag_s for at_s in sent])


def test_the_lag_of_events_and_how_many_arrived() -> None:
    streams = [steady(0.001)] * 99 + [steady(0.5)]
    reading = read(streams, Reading(streams=100, offered_per_s=1000.0))
    assert reading.failed == 0
    assert reading.lag_p50_s == pytest.approx(0.001)
    assert reading.arrived_per_s == pytest.approx(1000, rel=0.02)
    assert reading.lag_p99_s == pytest.approx(0.001)
    assert reading.absorbed
    late = read([*streams, steady(0.5)], Reading(streams=101, offered_per_s=1010.0))
    assert late.lag_p99_s == pytest.approx(0.5)
    assert not late.absorbed


def test_the_beginning_and_the_end_do_not_count() -> None:
    stream = steady(0.001)
    stream.arrived_s[0] += 60.0  # Before all streams have begun and settled.
    later = Stream([at_s + 2 for at_s in stream.sent_s], [at_s + 2.001 for at_s in stream.sent_s])
    later.arrived_s[-1] += 60.0  # After the first has ended.
    reading = read([stream, later], Reading(streams=2, offered_per_s=20.0))
    assert reading.lag_p99_s == pytest.approx(0.001)


def test_a_stream_with_events_missing_has_failed() -> None:
    short = steady(0.001)
    short.arrived_s.pop()
    reading = read([steady(0.001), short], Reading(streams=2, offered_per_s=10.0))
    assert reading.failed == 1
    assert not reading.absorbed
    assert read([], Reading(streams=2, offered_per_s=20.0)).failed == 2


def test_what_does_not_arrive_in_time_is_not_absorbed() -> None:
    """The server offers more than it sends: it is the one that is late."""
    reading = read([steady(0.001)], Reading(streams=1, offered_per_s=20.0, server_late_s=1.0))
    assert not reading.absorbed
    assert reading.server_is_late


def reading(streams: int, lag_s: float, late_s: float = 0.0) -> Reading:
    return Reading(
        streams=streams,
        offered_per_s=streams * 50.0,
        arrived_per_s=streams * 50.0,
        lag_p99_s=lag_s,
        server_late_s=late_s,
    )


@pytest.mark.parametrize("first", [1, 10, 100, 300, 5000])
def test_the_search_comes_near_the_limit(first: int) -> None:
    tried = []

    def try_rate(streams: int) -> Reading:
        tried.append(streams)
        return reading(streams, 0.001 if streams <= 317 else 0.02)

    result = search(try_rate, first, steps=12)
    assert 310 <= result.best.streams <= 317
    assert not result.at_least
    # What was too high was tried twice, what was not once.
    assert all(tried.count(streams) == (1 if streams <= 317 else 2) for streams in tried)


def test_a_rate_that_was_too_high_by_chance_is_tried_again() -> None:
    lags = iter([0.001, 0.3, 0.002, 0.3, 0.3, 0.3, 0.3])
    result = search(lambda streams: reading(streams, next(lags)), 100, steps=2)
    assert result.best.streams == 200


def test_a_server_that_is_late_bounds_the_capacity_from_below() -> None:
    def try_rate(streams: int) -> Reading:
        late = streams > 150
        return reading(streams, 0.02 if late else 0.001, 0.5 if late else 0.0)

    assert search(try_rate, 100, steps=3).at_least


def test_nothing_is_absorbed() -> None:
    result = search(lambda streams: reading(streams, 1.0), 8, steps=9)
    assert (result.best.streams, result.at_least) == (0, False)


def test_ratios_are_of_the_same_round() -> None:
    def capacity(streams: int) -> Capacity:
        return Capacity(best=reading(streams, 0.001), at_least=streams == 400)

    values = {"ours": [capacity(200), capacity(400)], "vllm": [capacity(100), capacity(80)]}
    ours, vllm = summarise(values)
    assert ours.ratio_to == {"vllm": Spread(3.5, 2.0, 5.0)}
    assert vllm.events_per_s == Spread(4500.0, 4000.0, 5000.0)
    assert (ours.at_least, vllm.at_least) == (True, False)
    assert ">=15000 (10000-20000)" in table([ours, vllm])
