"""A request, and a workload: requests by number, alone or as the turns of sessions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request, apart from when it is sent.

    Attributes:
        prompt: a text, token ids, or the messages of a chat.
        output_tokens: how many tokens the answer is to have, or at most may have.
        limit: whether `output_tokens` is only an upper limit, so that a shorter answer is as
            planned.
        input_tokens: how long the prompt was meant to be; None where it is not known.
        shared: the share of the prompt with which other prompts of the workload begin as well,
            at most: a prefix cache may answer that much, and no more.
        kind: its class, for fairness between classes.
        at_s: of a trace: when it came, seconds from the start, the trace's speed-up applied.
        extra: more fields of the request's body.
        turn: which turn of its session it is, from 1; 0 outside of sessions.
        after: the requests of its session that must be over before it is sent, by their place.
        gap_s: seconds between the end of those and this one: someone thinks, or a tool works.
        context: the request of its session whose conversation this one continues: its messages
            and the answer to them come before `prompt`. None: `prompt` is complete.
    """

    prompt: str | list[int] | list[dict[str, Any]]
    output_tokens: int
    limit: bool = False
    input_tokens: int | None = None
    shared: float = 0.0
    kind: str = ""
    at_s: float | None = None
    extra: dict[str, Any] = {}
    turn: int = 0
    after: tuple[int, ...] = ()
    gap_s: float = 0.0
    context: int | None = None


@dataclass(frozen=True)
class Workload:
    """Requests by number.

    Attributes:
        name: the spec.
        request: the request of a number from 0, below `length`; the same each time.
        length: how many there are; None for endless.
        timed: each request has its own time, in ascending order.
        session: all requests of a session of a number from 0, below `sessions`, in the order in
            which they can be sent; None for a workload whose requests stand alone.
        sessions: how many there are; None for endless.
        notes: what a reader of the result should know about how the workload was read.
    """

    name: str
    request: Callable[[int], Request]
    length: int | None = None
    timed: bool = False
    session: Callable[[int], tuple[Request, ...]] | None = None
    sessions: int | None = None
    notes: tuple[str, ...] = ()

    def take(self, count: int) -> list[Request]:
        """The first `count` requests, or all where there are fewer."""
        if self.length is not None:
            count = min(count, self.length)
        return [self.request(index) for index in range(count)]

    @property
    def count(self) -> int | None:
        """How many sessions there are, or requests that stand alone; None for endless."""
        return self.sessions if self.session else self.length

    def turns(self, number: int) -> tuple[Request, ...]:
        """The requests of a session; a request that stands alone is a session of one."""
        return self.session(number) if self.session else (self.request(number),)
