"""Sessions that are drawn: conversations of people, tools and sub-agents, whose history grows.

    sessions:turns=4,system=500,input=100,output=64,think=5
             tools=0.5,tool=1,result=300    half of the turns are a tool's result, a second later
             agents=2,agent_turns=3         sub-agents, which the first turn starts side by side

A turn is sent when the one before was answered, and someone has thought or a tool has worked
since; its prompt is the conversation so far with the answers that came. A turn that fails ends its
session.
"""

import random
from dataclasses import dataclass
from typing import Any

from bench import spec
from bench.traffic import words
from bench.traffic.lengths import Length, length
from bench.traffic.request import Request, Workload


@dataclass(frozen=True)
class _Shape:
    """What the sessions of a generated workload are like.

    Attributes:
        turns: of the main agent. first, later: tokens of what a person says first, and then.
        result, written: tokens of a tool's result, and of an answer.
        system: tokens that every session begins with.
        think_s, tool_s: means of the exponential times that people and tools take.
        tools: the share of the later turns that are a tool's result.
        agents, agent_turns: sub-agents of a session, and their turns.
    """

    turns: Length
    first: Length
    later: Length
    result: Length
    written: Length
    system: int
    think_s: float
    tool_s: float
    tools: float
    agents: int
    agent_turns: int


def drawn(options: spec.Options, seed: int, salted: str) -> Workload:
    """Endless sessions of the options' shape; `salted` is the seed of their texts."""
    lengths = options.values.get("input", "100")
    shape = _Shape(
        turns=length(options, "turns", default="4"),
        first=length(options, "first", default=lengths),
        later=length(options, "input", default="100"),
        result=length(options, "result", default="300"),
        written=length(options, "output", default="64"),
        system=options.whole("system", 0),
        think_s=options.number("think", 0.0),
        tool_s=options.number("tool", 1.0),
        tools=options.number("tools", 0.0, maximum=1.0),
        agents=options.whole("agents", 0, maximum=64),
        agent_turns=options.whole("agent_turns", 2, minimum=1, maximum=64),
    )
    opening = words.text(salted, "system", 0, shape.system)

    def session(number: int) -> tuple[Request, ...]:
        return tuple(_Writer(shape, seed, salted, number, opening).requests())

    return Workload(options.name, lambda number: session(number)[0], session=session)


class _Writer:
    """Writes the requests of one session, in the order in which they can be sent."""

    def __init__(self, shape: _Shape, seed: int, salted: str, number: int, opening: str) -> None:
        self._shape, self._salted, self._number = shape, salted, number
        self._rng = random.Random(f"{seed}/session/{number}")
        self._opening = opening
        self._texts = 0
        self._written: list[Request] = []

    def requests(self) -> list[Request]:
        shape, before = self._shape, None
        for turn in range(1, shape.turns.draw(self._rng) + 1):
            if turn == 1:
                self._write(turn, "user", shape.first, system=True)
            elif turn == 2 and shape.agents:
                ends = [self._sub_agent() for _ in range(shape.agents)]
                self._write(turn, "agents", shape.result, after=tuple(ends), context=before)
            elif self._rng.random() < shape.tools:
                self._write(turn, "tool", shape.result, shape.tool_s, context=before)
            else:
                self._write(turn, "user", shape.later, shape.think_s, context=before)
            before = len(self._written) - 1
        return self._written

    def _sub_agent(self) -> int:
        """A conversation of its own, which the first turn starts; returns its last request."""
        shape, context = self._shape, None
        for turn in range(1, shape.agent_turns + 1):
            if context is None:
                self._write(turn, "sub-agent", shape.first, after=(0,))
            else:
                self._write(turn, "sub-agent", shape.result, shape.tool_s, context=context)
            context = len(self._written) - 1
        return len(self._written) - 1

    def _write(
        self,
        turn: int,
        kind: str,
        length: Length,
        gap_s: float = 0.0,
        *,
        after: tuple[int, ...] = (),
        context: int | None = None,
        system: bool = False,
    ) -> None:
        tokens = length.draw(self._rng)
        number = self._number * 1000 + self._texts
        self._texts += 1
        messages = [{"role": "user", "content": words.text(self._salted, "said", number, tokens)}]
        opening = self._shape.system if system else 0
        if opening:
            messages.insert(0, {"role": "system", "content": self._opening})
        self._written.append(
            Request(
                prompt=list[dict[str, Any]](messages),
                input_tokens=tokens + opening,
                output_tokens=self._shape.written.draw(self._rng),
                shared=opening / (tokens + opening),
                kind=kind,
                turn=turn,
                after=after or (() if context is None else (context,)),
                gap_s=self._rng.expovariate(1 / gap_s) if gap_s else 0.0,
                context=context,
            )
        )


OPTIONS = (
    "turns",
    "first",
    "input",
    "output",
    "system",
    "think",
    "tools",
    "tool",
    "result",
    "agents",
    "agent_turns",
)
