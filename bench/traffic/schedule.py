"""When to send: loads, and the plan that joins a load to a workload before the run.

    users=8   users=8,think=0.5             closed loop: each user sends when its last is answered
    constant:rate=5                         open loops, in requests per second
    poisson:rate=5                          independent arrivals
    gamma:rate=5,cv=2                       gaps with a coefficient of variation; 1 is Poisson
    ramp:from=1,to=20,duration=60           Poisson arrivals whose rate grows in a straight line
    burst:size=20,every=10                  so many at once, so often (seconds)
    trace   trace:speed=2                   each request at its own time (of a trace)

Times are fixed before the run and do not depend on the answers: a server that stalls finds the
requests that came meanwhile waiting, as it would with real users. A closed loop cannot show that,
since it sends less to a server that is slow.
"""

import abc
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from bench import spec
from bench.errors import LoadError
from bench.traffic.request import Request, Workload

MAX_PLANNED = 1_000_000
KINDS = {
    "closed": ("users", "think"),
    "constant": ("rate",),
    "poisson": ("rate",),
    "gamma": ("rate", "cv"),
    "ramp": ("from", "to", "duration"),
    "burst": ("size", "every"),
    "trace": ("speed",),
}
# How many requests to prepare for a closed loop that has only a duration: as if an answer took no
# longer than this, which no server of a real model does; and no more text than fits in memory.
_FASTEST_S, _FASTEST_TOKEN_S = 0.01, 0.001
_MAX_PREPARED_TOKENS = 50_000_000


# --- loads ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Closed:
    """`users` users, each of whom waits `think_s` seconds after an answer and then sends again."""

    users: int
    think_s: float = 0.0

    def __str__(self) -> str:
        return f"users={self.users}" + (f",think={_short(self.think_s)}" if self.think_s else "")


@dataclass(frozen=True)
class TraceTimes:
    """Each request at its own time, `speed` times as fast (on top of the workload's speed-up)."""

    speed: float = 1.0

    def __str__(self) -> str:
        return f"trace:speed={_short(self.speed)}"


@dataclass(frozen=True)
class Open(abc.ABC):
    """Arrivals that do not wait for answers. `str(load)` is its spec."""

    @abc.abstractmethod
    def arrivals(self, rng: random.Random) -> Iterator[float]:
        """Ascending times from the start, seconds; without end unless the rate falls to 0."""

    @property
    def own_duration_s(self) -> float | None:
        """How long it lasts where neither a count nor a duration is given; None for endless."""
        return None

    def times_s(self, count: int | None, duration_s: float | None, seed: int) -> list[float]:
        """The first `count` times, those before `duration_s`, or the first `count` of those.

        Raises LoadError where neither bounds the load, where it ends before `count`, and where
        it has more than MAX_PLANNED.
        """
        end_s = self.own_duration_s if count is None and duration_s is None else duration_s
        if count is None and end_s is None:
            raise LoadError.of("count", "", f"{self} has no end: give a count or a duration")
        max_count = MAX_PLANNED + 1 if count is None else count
        until_s = math.inf if end_s is None else end_s
        arrivals = itertools.islice(self.arrivals(random.Random(f"{seed}/times")), max_count)
        times = list(itertools.takewhile(lambda at_s: at_s < until_s, arrivals))
        if len(times) > MAX_PLANNED:
            raise LoadError.of("load", self, f"has more than {MAX_PLANNED} requests")
        if count is not None and end_s is None and len(times) < count:
            raise LoadError.of("count", count, f"{self} ends after {len(times)} requests")
        return times


@dataclass(frozen=True)
class Constant(Open):
    """One request every 1/rate seconds, the first at 0."""

    rate: float

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        return (index / self.rate for index in itertools.count())

    def __str__(self) -> str:
        return f"constant:rate={_short(self.rate)}"


@dataclass(frozen=True)
class Gamma(Open):
    """Gaps from a gamma distribution of mean 1/rate and coefficient of variation `cv`.

    At 1 they are exponential: a Poisson process. Above 1 requests come in clusters, below 1 they
    are more even than by chance.
    """

    rate: float
    cv: float = 1.0

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        shape, scale_s = self.cv**-2, self.cv**2 / self.rate
        return itertools.accumulate(rng.gammavariate(shape, scale_s) for _ in itertools.count())

    def __str__(self) -> str:
        if self.cv == 1.0:
            return f"poisson:rate={_short(self.rate)}"
        return f"gamma:rate={_short(self.rate)},cv={_short(self.cv)}"


@dataclass(frozen=True)
class Ramp(Open):
    """Poisson arrivals whose rate goes from `first` to `last` over `duration_s`, then stays.

    With R(t) the integral of the rate, arrivals of a process of rate 1 at u are arrivals of this
    one at the t where R(t) = u. Nothing is drawn and thrown away, as thinning would.
    """

    first: float
    last: float
    duration_s: float

    @property
    def own_duration_s(self) -> float:
        return self.duration_s

    def expected(self, at_s: float) -> float:
        """R(t): how many requests are expected before `at_s`."""
        ramped_s = min(at_s, self.duration_s)
        slope = (self.last - self.first) / self.duration_s
        ramped = ramped_s * (self.first + slope * ramped_s / 2)
        return ramped + (at_s - ramped_s) * self.last

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        slope = (self.last - self.first) / self.duration_s
        whole = self.expected(self.duration_s)
        for u in itertools.accumulate(rng.expovariate(1.0) for _ in itertools.count()):
            if u <= whole:
                # The root of the quadratic in the form that is exact for a small slope as well.
                root = math.sqrt(max(0.0, self.first**2 + 2 * slope * u))
                yield 2 * u / (self.first + root)
            elif self.last:
                yield self.duration_s + (u - whole) / self.last
            else:
                return

    def __str__(self) -> str:
        rates = f"from={_short(self.first)},to={_short(self.last)}"
        return f"ramp:{rates},duration={_short(self.duration_s)}"


@dataclass(frozen=True)
class Burst(Open):
    """`size` requests at once, at 0 and every `every_s` seconds."""

    size: int
    every_s: float

    def arrivals(self, rng: random.Random) -> Iterator[float]:
        return (index // self.size * self.every_s for index in itertools.count())

    def __str__(self) -> str:
        return f"burst:size={self.size},every={_short(self.every_s)}"


Load = Closed | Open | TraceTimes


def _short(number: float) -> str:
    """The shortest text that reads back as the same number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def parse(text: str) -> Load:
    """The load of a spec.

    Raises LoadError, which names the key, its value and the nearest valid choice.
    """
    options = spec.parse(text, "load", KINDS, LoadError, unnamed="closed")
    makers: dict[str, Callable[[spec.Options], Load]] = {
        "closed": lambda o: Closed(
            o.whole("users", minimum=1, maximum=100_000), o.number("think", 0.0)
        ),
        "constant": lambda o: Constant(_rate(o)),
        "poisson": lambda o: Gamma(_rate(o)),
        "gamma": lambda o: Gamma(_rate(o), o.number("cv", minimum=0.01, maximum=100)),
        "ramp": _ramp,
        "burst": lambda o: Burst(o.whole("size", minimum=1), o.number("every", above=0.0)),
        "trace": lambda o: TraceTimes(o.number("speed", 1.0, above=0.0)),
    }
    return makers[options.name](options)


def _rate(options: spec.Options) -> float:
    return options.number("rate", above=0.0)


def _ramp(options: spec.Options) -> Ramp:
    first, last = options.number("from"), options.number("to")
    if not first + last:
        raise LoadError.of("to", last, "must be above 0 where from is 0")
    return Ramp(first, last, options.number("duration", above=0.0))


# --- the plan -------------------------------------------------------------------------------


class Planned(msgspec.Struct):
    """A request and when it is to be sent.

    Attributes:
        index: its place in the plan, from 0.
        request: what to send.
        at_s: seconds from the start; None in a closed loop, and for what waits for an answer.
        session: which session it is of; None where it stands alone.
        after: the requests of the plan that must be over before it is sent, by their indexes;
            `request.context` is one of them, as an index of the plan too.
    """

    index: int
    request: Request
    at_s: float | None = None
    session: int | None = None
    after: tuple[int, ...] = ()

    @property
    def unit(self) -> int:
        """What is sent by one actor, and by one user: a session, or a request that stands alone."""
        return self.index if self.session is None else self.session


class Plan(msgspec.Struct):
    """All that is to be sent in a run.

    Attributes:
        planned: in the order of their times or, in a closed loop, in the order to be taken.
        closed: the users of a closed loop, who take what is next; None in an open loop.
        duration_s: when they stop taking; None for: when nothing is left. An open loop's times
            are all before its duration, so that there it is only said again.
    """

    planned: list[Planned]
    closed: Closed | None = None
    duration_s: float | None = None

    @property
    def session_sizes(self) -> dict[int, int]:
        """How many requests each session has; empty for a plan without sessions."""
        return dict(Counter(each.session for each in self.planned if each.session is not None))


def plan(
    workload: Workload, load: Load, count: int | None, duration_s: float | None, seed: int
) -> Plan:
    """Join what to send to when to send it. The same arguments give the same plan.

    Neither a count nor a duration: as many as the workload has, for as long as the load lasts. A
    closed loop that has only a duration gets more requests than a real model answers in that time.

    Raises LoadError where a count or duration is missing, asks for more than the workload has, or
    leaves nothing to send.
    """
    if count is not None and not 1 <= count <= MAX_PLANNED:
        raise LoadError.of("count", count, f"must be from 1 to {MAX_PLANNED}")
    if duration_s is not None and not 0 < duration_s < math.inf:
        raise LoadError.of("duration", duration_s, "must be above 0 and finite")
    if isinstance(load, Closed):
        units = _closed_count(workload, load, count, duration_s)
        return Plan(_planned(workload, [None] * units), load, duration_s)
    if isinstance(load, TraceTimes):
        planned = _replayed(workload, load, count, duration_s)
    else:
        planned = _arriving(workload, load, count, duration_s, seed)
    if not planned:
        raise LoadError.of("duration", duration_s, f"no request of {load} comes before that")
    return Plan(planned, None, duration_s)


def _planned(workload: Workload, times_s: Sequence[float | None]) -> list[Planned]:
    """A request, or a whole session, for each of the times, at which its first one is sent."""
    planned: list[Planned] = []
    for unit, at_s in enumerate(times_s):
        planned += session(workload, unit, len(planned), at_s)
    return planned


def session(workload: Workload, unit: int, first: int, at_s: float | None) -> list[Planned]:
    """A session whose requests have the indexes of a plan from `first` on."""
    number = None if workload.session is None else unit
    return [
        Planned(
            first + place,
            request
            if request.context is None
            else msgspec.structs.replace(request, context=first + request.context),
            None if request.after else at_s,
            number,
            tuple(first + before for before in request.after),
        )
        for place, request in enumerate(workload.turns(unit))
    ]


def _enough(workload: Workload, key: str, value: float, count: int) -> int:
    """`count`, which the workload must have."""
    if workload.count is not None and count > workload.count:
        what = "sessions" if workload.session else "requests"
        problem = f"needs {count} {what}, and {workload.name} has {workload.count}"
        raise LoadError.of(key, value, problem)
    return count


def _closed_count(
    workload: Workload, load: Closed, count: int | None, duration_s: float | None
) -> int:
    if count is not None:
        return _enough(workload, "count", count, count)
    if duration_s is None:
        if workload.count is None:
            problem = f"{workload.name} has no end: give a count or a duration"
            raise LoadError.of("count", "", problem)
        return workload.count
    sample = [workload.turns(unit) for unit in range(min(64, workload.count or 64))]
    turns = [request for each in sample for request in each]
    fastest_s = load.think_s + sum(
        _FASTEST_S + _FASTEST_TOKEN_S * request.output_tokens + request.gap_s for request in turns
    ) / len(sample)
    enough = load.users * math.ceil(duration_s / fastest_s)
    if workload.count is not None:
        return min(enough, workload.count)
    input_tokens = sum(request.input_tokens or 0 for request in turns) / len(sample)
    if enough * input_tokens > _MAX_PREPARED_TOKENS or enough > MAX_PLANNED:
        problem = f"{load} could send {enough} requests in that time: say with a count how many"
        raise LoadError.of("duration", duration_s, problem)
    return enough


def _replayed(
    workload: Workload, load: TraceTimes, count: int | None, duration_s: float | None
) -> list[Planned]:
    if not workload.timed or workload.length is None:
        problem = f"{workload.name} has no times of its own: use a trace as workload"
        raise LoadError.of("load", load, problem)
    if count is not None:
        _enough(workload, "count", count, count)
    until_s = math.inf if duration_s is None else duration_s
    planned: list[Planned] = []
    for unit in range((workload.count or 0) if count is None else count):
        turns = session(workload, unit, len(planned), None)
        for turn in turns:  # Each has a time of its own, before which it is not sent.
            turn.at_s = (turn.request.at_s or 0.0) / load.speed
        if (turns[0].at_s or 0.0) >= until_s:
            break
        planned += turns
    return planned


def _arriving(
    workload: Workload, load: Open, count: int | None, duration_s: float | None, seed: int
) -> list[Planned]:
    if count is None and duration_s is None and load.own_duration_s is None:
        count = workload.count
    times = load.times_s(count, duration_s, seed)
    bound = ("duration", duration_s) if count is None else ("count", count)
    _enough(workload, bound[0], bound[1] or load.own_duration_s or 0.0, len(times))
    return _planned(workload, times)
