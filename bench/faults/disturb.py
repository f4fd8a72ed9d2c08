"""What is disturbed and when: the plan, fixed before the run; disturber.py carries it out.

    kill-replica:every=10                    SIGKILL of a replica, in turn with the others below
    kill-engine:every=10,part=core           SIGKILL of an engine's process: core, worker,
                                             frontend (vllm-rs) or any
    stop-engine:every=30,for=5               SIGSTOP, and SIGCONT after 5 s; without `for` never
    kill-raylet:every=60,nodes=w1;w2         SIGKILL of a node's raylet: only of those named
    restart-gateway:every=20,min_up=2        SIGKILL of a replica of the gateway
    restart-controller:every=60              SIGKILL of Ray Serve's controller
    command:serve deploy b.yaml,every=60     anything else, waited for; a status other than 0 counts

Options of all: `every` seconds, `first` (the same as `every`), `count` (without it: until the load
is over), `jitter` (0.2: each time moved by up to that share of `every`); `deployment` (llm:engine,
or llm:gateway), `min_up` (2; 0 for a command): a process is only disturbed while so many replicas
of that deployment are ready, and for at most `wait` (300) seconds it is waited for. `up=http`: what
is ready answers HTTP, for `settle` (1) seconds now; `up=process`: it is that old. `apart` (0): so
many seconds lie at least between the disturbance before, of any kind, and this one. `rest` (0): who
was struck so many seconds ago or less is not picked again yet.

Times are absolute and depend on the seed alone. Disturbances come one after the other, each when
the one before is over, so a fleet that recovers slowly is disturbed later than planned, and how
much later is noted. Victims are picked at random from the seed and from what is ready then.
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
