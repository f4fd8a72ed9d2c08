"""The searches against simulated servers whose capacity is known."""

import heapq
import json
import math
import random
from statistics import NormalDist

import pytest

from bench import search
from bench.measure import Slo
from bench.records import Record
from bench.search import RateResult, RateSearch, Sweep, SweepResult


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
        self.draw, self.asked = random.Random(seed), 0
        self.probes: list[tuple[float, int]] = []

    async def probe(self, x: float, count: int) -> list[Record]:
        self.asked += count
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


class Queue(Server):
    """M/M/c: one queue, c servers, each 1 request a second; neighbours wait for the same."""

    def __init__(self, servers: int, seed: int = 0) -> None:
        super().__init__(seed)
        self.servers = servers

    def limit(self, slo: Slo) -> float:
        """By Erlang's C: P(wait > t) = C exp(-(servers - rate) t)."""

        def missed(rate: float) -> float:
            blocked = 1.0
            for k in range(1, self.servers + 1):
                blocked = rate * blocked / (k + rate * blocked)
            waits = blocked / (1 - rate / self.servers * (1 - blocked))
            return waits * math.exp(-(self.servers - rate) * (slo.ttft_s or 0))

        low, high = 0.0, float(self.servers)
        for _ in range(60):
            middle = (low + high) / 2
            good = missed(middle) < 1 - slo.percentile / 100
            low, high = (middle, high) if good else (low, middle)
        return low

    def serve(self, rate: float, count: int) -> list[Record]:
        free_s, records = [0.0] * self.servers, []
        for index, at_s in enumerate(self.arrivals(rate, count)):
            begin_s = max(at_s, heapq.heappop(free_s))
            end_s = begin_s + self.draw.expovariate(1.0)
            heapq.heappush(free_s, end_s)
            records.append(answered(index, at_s, begin_s, end_s, None))
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


def wrong(result: RateResult, limit: float, slack: float = 1.0) -> list[tuple[float, str]]:
    """The verdicts that contradict the true limit by more than `slack`, and where."""
    return [
        (point.rate / limit, point.verdict)
        for point in result.points
        if (point.verdict == "pass" and point.rate > limit * slack)
        or (point.verdict == "fail" and point.rate < limit / slack)
    ]


# --- the highest rate under an objective ----------------------------------------------------


@pytest.mark.parametrize("capacity", [3.0, 20.0])
@pytest.mark.parametrize("percentile", [90.0, 99.0])
async def test_the_limit_is_found_and_bracketed(capacity: float, percentile: float) -> None:
    slo = Slo(ttft_s=1.0, percentile=percentile)
    for seed in range(2):
        server = Knee(capacity, seed)
        result = await search.run(RateSearch(slo), server.probe)
        assert result.resolved, result.reason
        assert result.rate is not None
        assert result.fails_at is not None
        assert result.rate <= server.limit(slo) <= result.fails_at
        assert result.fails_at / result.rate <= 1.0501
        assert wrong(result, server.limit(slo)) == []
        assert result.goodput_per_s == pytest.approx(result.rate, rel=0.15)


async def test_a_slow_server_gets_the_time_to_fill_up() -> None:
    """Answers take 20 s: 64 requests at 4 a second would all be sent before the first ended."""

    class Slow(Server):
        def serve(self, x: float, count: int) -> list[Record]:
            times = self.arrivals(x, count)
            return [answered(n, at_s, at_s + 1, at_s + 20, None) for n, at_s in enumerate(times)]

    server = Slow()
    await search.run(RateSearch(Slo(ttft_s=2.0, percentile=90.0), most=4.0, looks=3), server.probe)
    first = {rate: count for rate, count in reversed(server.probes)}
    assert first[1.0] == 64
    assert first[4.0] >= 12 * 4 * 20 * 0.9


async def test_from_above_the_rate_is_halved() -> None:
    slo = Slo(ttft_s=1.0, percentile=90.0)
    server = Knee(2.0)
    result = await search.run(RateSearch(slo, start=16.0), server.probe)
    assert result.resolved
    assert (result.rate or 0) <= server.limit(slo) <= (result.fails_at or 0)
    assert [rate for rate, _ in server.probes[:4]] == [16.0, 8.0, 4.0, 2.0]


@pytest.mark.parametrize(("servers", "limit_s", "seeds"), [(8, 0.5, 4), (32, 0.2, 2)])
async def test_nothing_is_called_resolved_that_is_not_where_requests_queue(
    servers: int, limit_s: float, seeds: int
) -> None:
    """Neighbours in a queue are not independent: what cannot be told is left open."""
    slo = Slo(ttft_s=limit_s, percentile=90.0)
    results = []
    for seed in range(seeds):
        server = Queue(servers, seed)
        result = await search.run(RateSearch(slo), server.probe)
        limit = server.limit(slo)
        assert wrong(result, limit, slack=1.15) == []
        assert (result.rate or 0) > limit / 1.5
        assert (result.fails_at or math.inf) < limit * 1.5
        results.append(result)
    assert any(not result.resolved for result in results)
    assert all(result.reason for result in results if not result.resolved)


async def test_few_requests_that_are_all_good_pass_nothing() -> None:
    """99% cannot be shown by fewer than some five hundred, shared out over four looks."""
    controller = RateSearch(Slo(ttft_s=1.0))
    server = Knee(1000.0)
    asked = controller.ask()
    assert asked is not None
    controller.tell(await server.probe(*asked))
    point = controller.result.points[0]
    assert (point.share.good, point.verdict) == (point.share.counted, "unresolved")
    assert point.share.low < 0.99
    assert controller.ask() == (1.0, pytest.approx(3 * asked[1]))
    while point.verdict == "unresolved":
        asked = controller.ask()
        assert asked is not None
        controller.tell(await server.probe(*asked))
        point = controller.result.points[0]
    assert point.verdict == "pass"
    assert point.share.counted > 505


async def test_a_failing_rate_is_told_early() -> None:
    server = Knee(1.0)
    result = await search.run(RateSearch(Slo(ttft_s=1.0), start=4.0, least=4.0), server.probe)
    assert len(server.probes) == 1
    assert [point.verdict for point in result.points] == ["fail"]
    assert result.points[0].share.high < 0.99
    assert (result.rate, result.fails_at, result.resolved) == (None, 4.0, False)
    assert "lowest rate" in result.reason


async def test_a_share_that_equals_the_target_stays_open() -> None:
    """Each request is late with probability 0.1, whatever the rate, and 90% are asked for."""

    class Even(Server):
        def serve(self, x: float, count: int) -> list[Record]:
            return [
                answered(n, at_s, at_s + (2.0 if self.draw.random() < 0.1 else 0.2), at_s + 2, None)
                for n, at_s in enumerate(self.arrivals(x, count))
            ]

    verdicts = []
    for seed in range(12):
        controller = RateSearch(Slo(ttft_s=1.0, percentile=90.0), start=9.0, least=9.0, most=9.0)
        result = await search.run(controller, Even(seed).probe)
        assert not result.resolved
        verdicts += [point.verdict for point in result.points]
    assert len(verdicts) == 12
    assert verdicts.count("unresolved") >= 11


async def test_an_overload_too_short_to_hurt_does_not_pass() -> None:
    """Twice its capacity, but the queue has no time to reach the limit."""

    class Filling(Server):
        def serve(self, x: float, count: int) -> list[Record]:
            return [
                answered(n, at_s, at_s + 0.01, 2 * at_s + 0.1, None)
                for n, at_s in enumerate(self.arrivals(x, count))
            ]

    controller = RateSearch(Slo(ttft_s=1.0, percentile=90.0), start=50.0, least=50.0, most=50.0)
    result = await search.run(controller, Filling().probe)
    assert [point.verdict for point in result.points] == ["unresolved"]
    assert any("fell behind" in doubt or "steady" in doubt for doubt in result.points[0].doubts)


async def test_a_server_that_only_fails_ends_the_search_at_once() -> None:
    server = Broken()
    result = await search.run(RateSearch(Slo(ttft_s=1.0)), server.probe)
    assert len(server.probes) == 1
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
        asked = controller.ask()
        assert asked is not None
        controller.tell(await server.probe(*asked))
    assert not controller.result.resolved
    assert controller.result.reason == "the search is not over"


async def test_what_is_over_takes_no_more() -> None:
    controller = RateSearch(Slo(ttft_s=1.0))
    await search.run(controller, Broken().probe)
    assert controller.ask() is None
    with pytest.raises(ValueError, match="over"):
        controller.tell([])


def test_rates_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="rates must be"):
        RateSearch(Slo(ttft_s=1.0), start=1.0, least=2.0)


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
    with pytest.raises(ValueError, match="users must be"):
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
    found = json.loads(json.dumps(search.as_json(result)))
    assert found["rate"] == result.rate
    point = found["points"][0]
    assert (point["rate"], point["resolved"], point["verdict"]) == (1.0, True, "pass")
    assert point["summary"]["ttft_p50_s"]["mean"] == pytest.approx(0.15, rel=0.1)


async def test_a_sweep_is_json() -> None:
    result: SweepResult = await search.run(Sweep(most=2), Slots(8, noise=0.05).probe)
    found = json.loads(json.dumps(search.as_json(result)))
    assert [point["users"] for point in found["points"]] == [1, 2]
    assert found["points"][1]["resolved"] is True
    assert found["points"][1]["summary"]["output_tokens_per_s"]["mean"] > 0
