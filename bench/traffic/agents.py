"""Recorded agents as sessions: model calls with their lengths, and the pauses between them.

A recorded call has no text to send, so its prompt consists of words: as long as recorded, and
beginning with the agent's previous call and its answer. A prompt shorter than these is a new
prompt, because the agent has truncated its context. A call waits until the calls that ended before
it in the recording are answered, and then for the recorded pause of tools and people. Calls that
overlapped overlap again, except with the first call of their session, for which all others wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from bench.errors import WorkloadError
from bench.traffic import words
from bench.traffic.lengths import clipped
from bench.traffic.request import Request

_CALLS_PER_SESSION = 10_000
SUB_AGENT = "sub-agent"


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a model.

    Attributes:
        begun_s, ended_s: on the clock of its log.
        agent: whose conversation it continues.
        cached_tokens: of the prompt, what came from a prefix cache; None where the log has none.
    """

    begun_s: float
    ended_s: float
    input_tokens: int
    output_tokens: int
    kind: str = "agent"
    agent: str = ""
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Replay:
    """How recorded calls are sent again: lengths times `scale`, clipped; pauses over `speed`."""

    scale: float = 1.0
    speed: float = 1.0
    max_input: int | None = None
    max_output: int | None = None

    def input_tokens(self, call: Call) -> int:
        return clipped(call.input_tokens * self.scale, self.max_input)

    def output_tokens(self, call: Call) -> int:
        return clipped(call.output_tokens * self.scale, self.max_output)


def session(
    calls: Sequence[Call], number: int, salted: str, replay: Replay, at_s: float | None = None
) -> tuple[Request, ...]:
    """The requests of a session, in the order of their starts.

    Args:
        calls: in the order of their starts; those of the first call's agent are the main
            conversation, and other agents' are sub-agents.
        number: of the session among all; `salted`: the seed of their texts.
        at_s: when the session starts, where the log says.

    Raises WorkloadError for a session of more calls than can be told apart.
    """
    if len(calls) > _CALLS_PER_SESSION:
        raise WorkloadError(f"a session has {len(calls)} calls: at most {_CALLS_PER_SESSION}")
    requests: list[Request] = []
    turns: dict[str, int] = {}
    for place, call in enumerate(calls):
        turns[call.agent] = turns.get(call.agent, 0) + 1
        before = [at for at in range(place) if calls[at].ended_s <= call.begun_s]
        context, sent_before = _context(calls, call, before, replay)
        whole = replay.input_tokens(call)
        tokens = whole - sent_before
        after = _last(calls, before) or (0,)
        pause_s = max(0.0, call.begun_s - max(calls[at].ended_s for at in after))
        requests.append(
            Request(
                prompt=words.text(salted, "call", number * _CALLS_PER_SESSION + place, tokens),
                input_tokens=tokens,
                output_tokens=replay.output_tokens(call),
                kind=call.kind if call.agent == calls[0].agent else SUB_AGENT,
                turn=turns[call.agent],
                at_s=None if place else at_s,
                after=after if place else (),
                gap_s=pause_s / replay.speed if place else 0.0,
                context=context,
            )
        )
    return tuple(requests)


def _context(
    calls: Sequence[Call], call: Call, before: Sequence[int], replay: Replay
) -> tuple[int | None, int]:
    """The call that this one continues, and the tokens of its prompt and answer; None and 0 for a
    prompt that begins anew."""
    mine = [at for at in before if calls[at].agent == call.agent]
    if not mine:
        return None, 0
    latest = max(mine, key=lambda at: calls[at].ended_s)
    tokens = replay.input_tokens(calls[latest]) + replay.output_tokens(calls[latest])
    return (latest, tokens) if replay.input_tokens(call) > tokens else (None, 0)


def _last(calls: Sequence[Call], before: Sequence[int]) -> tuple[int, ...]:
    """Of the calls that ended before another began, those that no other of them waited for."""
    latest_s = calls[before[-1]].begun_s if before else 0.0
    return tuple(at for at in before if at == before[-1] or calls[at].ended_s > latest_s)
