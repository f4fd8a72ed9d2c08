"""The plan of disturbances, fixed before the run; disturber.py carries it out.

    kill-replica:every=10                    SIGKILL of a replica, in turn with the others below
    kill-engine:every=10,part=core           SIGKILL of an engine's process: core, worker,
                                             frontend (vllm-rs) or any
    stop-engine:every=30,for=5               SIGSTOP, and SIGCONT after 5 s; without `for` never
    kill-raylet:every=60,nodes=w1;w2         SIGKILL of a node's raylet: only of those named
    restart-gateway:every=20,min_up=2        SIGKILL of a replica of the gateway
    restart-controller:every=60              SIGKILL of Ray Serve's controller
    command:serve deploy b.yaml,every=60     any command, which must end with status 0

Options of all kinds, with their defaults:

    every         seconds between two disturbances
    first         seconds until the first one (`every`)
    count         number of disturbances (until the load ends)
    jitter        share of `every` by which each time varies (0.2)
    deployment    whose processes (llm:engine, or llm:gateway)
    min_up        ready replicas of the deployment that a disturbance needs (2; 0 for a command)
    wait          seconds to wait for them at most (300)
    up            http: a ready replica has answered HTTP for `settle` (1) seconds; process: it is
                  that old
    apart         least seconds since the previous disturbance of any kind (0)
    rest          seconds in which a victim is not chosen again (0)

Times are absolute and depend on the seed alone. Disturbances do not overlap, so a fleet that
recovers slowly is disturbed later than planned, and the delay is recorded. Victims are chosen at
random, by the seed, from the processes that are ready.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from bench import spec
from bench.errors import LoadError
from bench.faults import victims

_COMMON = (
    "every",
    "first",
    "count",
    "jitter",
    "min_up",
    "wait",
    "up",
    "settle",
    "apart",
    "rest",
    "deployment",
)
KINDS = {
    "kill-replica": _COMMON,
    "kill-engine": (*_COMMON, "part"),
    "stop-engine": (*_COMMON, "part", "for"),
    "kill-raylet": (*_COMMON, "nodes"),
    "restart-gateway": _COMMON,
    "restart-controller": _COMMON,
    "command": (spec.PATH, *_COMMON),
}


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Something that is done again and again; see the top of this file."""

    kind: str
    every_s: float
    first_s: float
    count: int | None = None
    jitter: float = 0.2
    deployment: str = "llm:engine"
    min_up: int = 2
    wait_s: float = 300.0
    up: str = "http"
    settle_s: float = 1.0
    apart_s: float = 0.0
    rest_s: float = 0.0
    part: str = "core"
    for_s: float | None = None
    nodes: tuple[str, ...] = ()
    command: str = ""

    def times_s(self, seed: str) -> Iterator[float]:
        """Ascending, seconds from the start; without end unless it has a count."""
        rng, number = random.Random(f"{seed}/times"), 0
        while self.count is None or number < self.count:
            moved = rng.uniform(-self.jitter, self.jitter) * self.every_s
            yield max(0.0, self.first_s + number * self.every_s + moved)
            number += 1


class Due(msgspec.Struct, frozen=True, order=True):
    """One time of a disturbance.

    Attributes:
        at_s: seconds from the start of the load.
        number: which of the disturbances, from 0.
        turn: which time of it, from 0.
    """

    at_s: float
    number: int
    turn: int


def parse(text: str) -> Disturbance:
    """The disturbance of a spec.

    Raises LoadError, which names the key, its value and the nearest valid choice.
    """
    options = spec.parse(text, "disturbance", KINDS, LoadError)
    every_s = options.number("every", above=0.0)
    gateway, command = options.name == "restart-gateway", options.name == "command"
    nodes = tuple(options.text("nodes").split(";")) if options.name == "kill-raylet" else ()
    return Disturbance(
        kind=options.name,
        every_s=every_s,
        first_s=options.number("first", every_s),
        count=options.whole_or_none("count"),
        jitter=options.number("jitter", 0.2, maximum=0.5),
        deployment=options.text("deployment", "llm:gateway" if gateway else "llm:engine"),
        min_up=options.whole("min_up", 0 if command else 2),
        wait_s=options.number("wait", 300.0),
        up=_choice(options, "up", "http", ("http", "process")),
        settle_s=options.number("settle", 1.0),
        apart_s=options.number("apart", 0.0),
        rest_s=options.number("rest", 0.0),
        part=_choice(options, "part", "core", tuple(victims.PARTS)),
        for_s=options.number_or_none("for", above=0.0),
        nodes=nodes,
        command=options.path,
    )


def _choice(options: spec.Options, key: str, default: str, choices: Sequence[str]) -> str:
    value = options.text(key, default)
    if value not in choices:
        raise LoadError.of(key, value, "not a choice", choices)
    return value


def planned(disturbances: Sequence[Disturbance], seed: int) -> Iterator[Due]:
    """All times of all disturbances, in order. The same arguments give the same plan."""

    def of(number: int, disturbance: Disturbance) -> Iterator[Due]:
        for turn, at_s in enumerate(disturbance.times_s(f"{seed}/{number}")):
            yield Due(at_s, number, turn)

    return heapq.merge(*(of(number, each) for number, each in enumerate(disturbances)))
