"""The searches against simulated servers whose capacity is known."""

import heapq
import json
import math
import random
from statistics import NormalDist

import msgspec
import numpy as np
import pytest

from bench import search
from bench.errors import BenchError
from bench.itself import power
from bench.measure import Slo
from bench.records import Record
from bench.search import RateResult, RateSearch, Sweep, SweepResult
from bench.search.seen import Seen


def answered(index: int, at_s: float, first_s: float, end_s: float, user: int | None) -> Record:
    parts = 8 if user is not None else 2
    chunk_s = [first_s + (end_s - first_s) * part / (parts - 1) for part in range(parts)]
    return Record(
        index=index,
        user=user,
        planned_s=at_s,
        sent_s=at_s,
        chunk_s=chunk_s,
        end_s=end_s,
        status=200,
        input_tokens=10,
        output_tokens=16,
    )


class Server:
    """Asked as a probe asks; counts what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        self.draw, self.sent = random.Random(seed), 0
        self.probes: list[tuple[float, int]] = []

    async def probe(self, x: float, count: int) -> list[Record]:
        self.sent += count
        self.probes.append((x, count))
        assert len(self.probes) < 200, "the search does not end"
        return self.serve(x, count)

    def serve(self, x: float, count: int) -> list[Record]:
        raise NotImplementedError

    def arrivals(self, rate: float, count: int) -> list[float]:
        at_s, times = 0.0, []
        for _ in range(count):
            at_s += self.draw.expovariate(rate)
            times.append(at_s)
        return times


class Knee(Server):
    """Latency base / (1 - load), times lognormal noise that is independent; above, a queue."""

    BASE_S, NOISE = 0.1, 0.1

    def __init__(self, capacity: float, seed: int = 0) -> None:
        super().__init__(seed)
        self.capacity = capacity

    def limit(self, slo: Slo) -> float:
        """The rate at which just the percentile is within the limit."""
        z = NormalDist().inv_cdf(slo.percentile / 100)
        return self.capacity * (1 - self.BASE_S * math.exp(z * self.NOISE) / (slo.ttft_s or 0))

    def serve(self, rate: float, count: int) -> list[Record]:
        load, records = rate / self.capacity, []
        for index, at_s in enumerate(self.arrivals(rate, count)):
            took_s = self.BASE_S / (1 - load) if load < 1 else 5 + at_s * (load - 1)
            took_s *= self.draw.lognormvariate(0, self.NOISE)
            records.append(answered(index, at_s, at_s + took_s, at_s + took_s + 0.5, None))
        return records


class Slots(Server):
    """A closed loop over c slots; an answer of 16 tokens takes about a second in one."""

    def __init__(self, slots: int, noise: float, seed: int = 0, broken_from: int = 10**9) -> None:
        super().__init__(seed)
        self.slots, self.noise, self.broken_from = slots, noise, broken_from

    def serve(self, x: float, count: int) -> list[Record]:
        users, records = int(x), []
        if users >= self.broken_from:
            return [failed(index, index / users, user=index % users) for index in range(count)]
        free_s = [0.0] * self.slots
        ready = [(0.0, user) for user in range(users)]
        for index in range(count):
            at_s, user = heapq.heappop(ready)
            begin_s = max(at_s, heapq.heappop(free_s))
            end_s = begin_s + self.draw.lognormvariate(0, self.noise)
            heapq.heappush(free_s, end_s)
            heapq.heappush(ready, (end_s, user))
            records.append(answered(index, at_s, begin_s + 0.1 * (end_s - begin_s), end_s, user))
        return records


class Broken(Server):
    def serve(self, x: float, count: int) -> list[Record]:
        return [failed(index, at_s) for index, at_s in enumerate(self.arrivals(x, count))]


def failed(index: int, at_s: float, user: int | None = None) -> Record:
    return Record(
        index=index,
        user=user,
        planned_s=at_s,
        sent_s=at_s,
        end_s=at_s + 0.001,
        status=503,
        error="http 503: overloaded",
    )


# --- the highest rate under an objective ----------------------------------------------------


def test_within_ten_minutes_the_interval_is_narrow_and_holds_the_truth() -> None:
    """A server of 16 requests/s. More seeds: `python -m bench.itself --searches 100`."""
    truth = power.LIMIT
    results = [power.searched(seed, budget_s=600.0) for seed in range(6)]
    waiting = [(r.rate or 0) <= truth <= (r.fails_at or 0) for r, _ in results]
    widths = [(r.fails_at or math.inf) / (r.rate or 1) - 1 for r, _ in results]
    assert sum(waiting) >= 5
    assert np.median(widths) <= 0.15
    assert max(widths) < 0.35
    assert all(took_s < 620 for _, took_s in results)
    assert all(
        r.resolved == (width <= 0.15 + 1e-9) for (r, _), width in zip(results, widths, strict=True)
    )
    assert all(r.reason for r, _ in results if not r.resolved)


def test_without_a_limit_of_time_the_precision_is_reached() -> None:
    for seed in range(3):
        result, _ = power.searched(seed, budget_s=None)
        assert result.resolved, result.reason
        assert result.rate is not None
        assert result.fails_at is not None
        assert result.fails_at / result.rate <= 1.15 + 1e-9
        assert result.forecast is None


def test_a_search_that_is_cut_says_how_long_the_rest_would_take() -> None:
    result, _ = power.searched(0, budget_s=300.0, precision=0.03)
    assert not result.resolved
    assert "300 s was over" in result.reason
    assert result.forecast is not None
    assert result.forecast.seconds > 300
    assert (result.rate or 0) < (result.estimate or 0) < (result.fails_at or 0)


@pytest.mark.parametrize("capacity", [3.0, 20.0])
async def test_the_limit_is_found_and_bracketed(capacity: float) -> None:
    slo = Slo(ttft_s=1.0, percentile=90.0)
    for seed in range(2):
        server = Knee(capacity, seed)
        result = await search.run(RateSearch(slo), server.probe)
        assert result.resolved, result.reason
        assert (result.rate or 0) <= server.limit(slo) <= (result.fails_at or 0)
        assert result.goodput_per_s == pytest.approx(result.rate, rel=0.3)
        for point in result.points:
            below, above = point.rate < (result.rate or 0), point.rate > (result.fails_at or 0)
            assert point.verdict == ("pass" if below else "fail" if above else "unresolved")


async def test_a_slow_server_gets_the_time_to_fill_up() -> None:
    """Answers take 20 s: 16 requests at 4 a second would all be sent before the first ended."""

    class Slow(Server):
        def serve(self, x: float, count: int) -> list[Record]:
            times = self.arrivals(x, count)
            return [answered(n, at_s, at_s + 1, at_s + 20, None) for n, at_s in enumerate(times)]

    server = Slow()
    await search.run(RateSearch(Slo(ttft_s=2.0, percentile=90.0), most=4.0), server.probe)
    first = {rate: count for rate, count in reversed(server.probes)}
    assert first[1.0] == 16
    assert first[4.0] >= 4 * 20 * 2


async def test_from_above_the_rate_is_halved() -> None:
    slo = Slo(ttft_s=1.0, percentile=90.0)
    server = Knee(2.0)
    result = await search.run(RateSearch(slo, start=16.0), server.probe)
    assert (result.rate or 0) <= server.limit(slo) <= (result.fails_at or 0)
    assert [rate for rate, _ in server.probes[:4]] == [16.0, 8.0, 4.0, 2.0]


def seen(rate: float, count: int, missed: int, served_per_s: float) -> Seen:
    misses = np.zeros(count, dtype=bool)
    misses[np.linspace(0, count - 1, missed).astype(int)] = True
    return Seen(
        missed=misses,
        unknown=0,
        failed=0,
        running=rate * 0.3,
        served_per_s=served_per_s,
        took_s=count / rate,
    )


def test_a_bad_moment_of_a_short_probe_does_not_bound_the_search() -> None:
    """At 8/s, 8 of 64 requests missed in one run of misses, though the limit is 10/s."""
    search = RateSearch(Slo(ttft_s=1.0, percentile=95.0), start=4.0)
    probed = []
    for count, missed in ((32, 0), (64, 8), (128, 40), (256, 230)):
        rate, _ = search.ask() or (0.0, 0)
        probed.append(rate)
        search.take(seen(rate, count, missed, min(rate, 16.0)))
    # Only a server that is full ends the climb.
    assert probed == [4.0, 8.0, 16.0, 32.0]
    rates = []
    for _ in range(8):
        rate, count = search.ask() or (0.0, 0)
        rates.append(rate)
        share = min(0.9, 0.05 * (rate / 10) ** 4)
        search.take(seen(rate, count, round(count * share), rate))
    assert max(rates) > 10
    assert search.result.rate is not None
    assert search.result.rate < 10 < (search.result.fails_at or 0)


class Late(Server):
    """A perfect server, and a bench that sends three of twenty requests a second late above 6/s."""

    def serve(self, x: float, count: int) -> list[Record]:
        records = []
        for n, at_s in enumerate(self.arrivals(x, count)):
            sent_s = at_s + (1.0 if x > 6 and n % 20 < 3 else 0.0)
            record = answered(n, at_s, sent_s + 0.02, sent_s + 0.1, None)
            record.sent_s = sent_s
            records.append(record)
        return records


async def test_a_rate_that_only_bench_missed_does_not_fail_and_is_doubted() -> None:
    result = await search.run(RateSearch(Slo(ttft_s=0.5, percentile=90.0), most=64.0), Late().probe)
    assert (result.rate, result.fails_at) == (64.0, None)
    late = [point.rate for point in result.points if point.doubts]
    assert late == [point.rate for point in result.points if point.rate > 6]
    assert len(result.doubts) >= len(late)
    assert all("sent late" in doubt for doubt in result.doubts)
    assert result.points[-1].share.unknown > 0


async def test_what_is_doubtful_about_any_probe_reaches_the_result() -> None:
    result = await search.run(
        RateSearch(Slo(ttft_s=1.0, percentile=90.0), most=4.0),
        Knee(1e9).probe,
        doubts=lambda: ["load actor 0 died"],
    )
    assert [doubt for doubt in result.doubts if "1 requests/s" in doubt]
    assert [doubt for doubt in result.doubts if "4 requests/s" in doubt]


async def test_a_server_that_only_fails_ends_the_search() -> None:
    server = Broken()
    result = await search.run(RateSearch(Slo(ttft_s=1.0)), server.probe)
    assert {rate for rate, _ in server.probes} == {1.0}
    assert (result.rate, result.resolved) == (None, False)
    assert "nothing succeeded" in result.reason


async def test_an_objective_that_an_idle_server_misses_ends_the_search() -> None:
    server = Knee(1000.0)
    result = await search.run(RateSearch(Slo(ttft_s=0.05, percentile=90.0)), server.probe)
    assert result.rate is None
    assert "idle" in result.reason
    assert min(rate for rate, _ in server.probes) >= 0.25


async def test_a_server_without_limit_ends_at_the_highest_rate() -> None:
    server = Knee(1e9)
    result = await search.run(
        RateSearch(Slo(ttft_s=1.0, percentile=90.0), start=1.0, most=30.0), server.probe
    )
    assert (result.rate, result.fails_at, result.resolved) == (30.0, None, False)
    assert "highest rate" in result.reason


async def test_a_search_that_was_broken_off_says_so() -> None:
    controller, server = RateSearch(Slo(ttft_s=1.0, percentile=90.0)), Knee(20.0)
    assert controller.result.reason == "nothing was probed"
    for _ in range(3):
        request = controller.ask()
        assert request is not None
        controller.tell(await server.probe(*request))
    assert not controller.result.resolved
    assert controller.result.reason == "the search is not over"


async def test_what_is_over_takes_no_more() -> None:
    controller = RateSearch(Slo(ttft_s=1.0))
    await search.run(controller, Broken().probe)
    assert controller.ask() is None
    with pytest.raises(ValueError, match="over"):
        controller.tell([])


def test_rates_must_be_in_order() -> None:
    with pytest.raises(BenchError, match=r"start = .1.0.: must be from 2 to 10000"):
        RateSearch(Slo(ttft_s=1.0), start=1.0, lowest=2.0)


# --- where throughput saturates -------------------------------------------------------------


@pytest.mark.parametrize(("slots", "users"), [(1, 1), (8, 8), (24, 32)])
async def test_saturation_is_found(slots: int, users: int) -> None:
    for seed in range(2):
        server = Slots(slots, noise=0.05, seed=seed)
        result = await search.run(Sweep(), server.probe)
        assert result.resolved, result.reason
        assert result.users == users
        assert result.tokens_per_s == pytest.approx(16 * slots, rel=0.03)
        for point in result.points:
            if point.looks == 1:
                assert point.tokens_per_s == pytest.approx(point.measures[0].output_tokens_per_s)
        # Two points after the last that grew, and no more.
        assert [point.users for point in result.points][-1] == users * 4


async def test_noise_is_not_taken_for_growth_nor_for_its_end() -> None:
    """Answers that vary a lot: what is resolved is right, and the rest says that it is not."""
    resolved = 0
    for seed in range(6):
        result = await search.run(Sweep(), Slots(8, noise=0.35, seed=seed).probe)
        if result.resolved:
            resolved += 1
            assert result.users == 8
        else:
            assert "varies too much" in result.reason
        for point in result.points:
            if point.resolved and point.users <= 8:
                assert (point.gain_low or 0) > 1.05
            elif point.resolved:
                assert (point.gain_high or 0) < 1.05
    assert resolved >= 2


async def test_growth_that_equals_the_gain_stays_open() -> None:
    """Two users get 1.05 times what one gets: neither growth nor the end of it."""

    class Creeping(Server):
        def serve(self, x: float, count: int) -> list[Record]:
            users, records = int(x), []
            free_s = [0.0] * users
            for index in range(count):
                user = min(range(users), key=free_s.__getitem__)
                at_s = free_s[user]
                took_s = self.draw.lognormvariate(0, 0.2) * (1 if users == 1 else 2 / 1.05)
                free_s[user] = at_s + took_s
                records.append(answered(index, at_s, at_s + took_s / 9, free_s[user], user))
            return records

    points = [(await search.run(Sweep(most=2), Creeping(n).probe)).points for n in range(12)]
    assert sum(two.resolved for _, two in points) <= 1
    assert all(1 <= (two.gain or 0) <= 1.1 for _, two in points)


async def test_the_sweep_ends_at_the_most_users() -> None:
    result = await search.run(Sweep(most=6), Slots(100, noise=0.05).probe)
    assert [point.users for point in result.points] == [1, 2, 4, 6]
    assert not result.resolved
    assert "up to 6 users" in result.reason


async def test_the_sweep_ends_where_the_server_breaks() -> None:
    result = await search.run(Sweep(), Slots(100, noise=0.05, broken_from=8).probe)
    assert [point.users for point in result.points] == [1, 2, 4, 8]
    assert (result.users, result.resolved) == (4, False)
    assert "nothing was answered with 8 users" in result.reason


async def test_a_dead_server_has_no_saturation() -> None:
    result = await search.run(Sweep(), Broken().probe)
    assert (result.users, result.tokens_per_s, len(result.points)) == (None, None, 1)


def test_users_must_be_in_order() -> None:
    with pytest.raises(BenchError, match=r"start = .8.: must be from 1 to 4"):
        Sweep(start=8, most=4)


# --- for result.json ------------------------------------------------------------------------


async def test_each_probe_is_told_of_and_all_is_json() -> None:
    seen: list[int] = []

    def look(result: RateResult) -> None:
        seen.append(len(result.points))

    slo = Slo(ttft_s=1.0, percentile=90.0)
    server = Knee(3.0)
    result = await search.run(RateSearch(slo), server.probe, look)
    assert len(seen) == len(server.probes)
    assert seen == sorted(seen)
    search.summarise(result)
    body = json.loads(msgspec.json.encode(result))
    assert body["rate"] == result.rate
    point = body["points"][0]
    assert (point["rate"], point["verdict"]) == (1.0, "pass")
    assert point["summary"]["ttft_p50_s"]["mean"] == pytest.approx(0.15, rel=0.1)


async def test_a_sweep_is_json() -> None:
    result: SweepResult = await search.run(Sweep(most=2), Slots(8, noise=0.05).probe)
    search.summarise(result)
    body = json.loads(msgspec.json.encode(result))
    assert [point["users"] for point in body["points"]] == [1, 2]
    assert body["points"][1]["resolved"] is True
    assert body["points"][1]["summary"]["output_tokens_per_s"]["mean"] > 0
