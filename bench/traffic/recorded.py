"""Recorded sessions: conversations of people, and agents at work.

sharegpt:PATH,think=5,turns=8     conversations with their real texts, see `chats`
copilot:PATH,scale=0.1            agents that call a model and tools in turn, see `agents`
otel:PATH,speed=2                 the same from spans of OpenTelemetry, see `spans`
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import msgspec

from bench import spec
from bench.errors import WorkloadError
from bench.traffic import agents, spans, textfile, words
from bench.traffic.agents import Call
from bench.traffic.request import Request, Workload

CHAT_OPTIONS = (spec.PATH, "turns", "think", "limit", "fresh")
AGENT_OPTIONS = (spec.PATH, "limit", "scale", "speed", "max_input", "max_output")
# Bytes of English text that a token of common vocabularies has.
_BYTES_PER_TOKEN = 4
_FRESH_WORDS = 8


# --- conversations --------------------------------------------------------------------------


class _Said(msgspec.Struct):
    """One message, as ShareGPT writes it (from, value) or as OpenAI does (role, content)."""

    source: str = msgspec.field(default="", name="from")
    value: str = ""
    role: str = ""
    content: str = ""


class _Chat(msgspec.Struct):
    conversations: list[_Said] = []
    messages: list[_Said] = []


def chats(options: spec.Options, seed: int, salted: str) -> Workload:
    """Conversations of a ShareGPT file: a JSON list, or a JSON object a line.

    What people said is sent; the answers are the server's own, at most as long as the recorded
    ones (a token for every four bytes, as no tokenizer is asked). Each conversation begins with a
    few words that no other run has; fresh=no leaves them out.
    """
    path, max_turns = options.file(), options.whole("turns", 1000, minimum=1)
    think_s, limit = options.number("think", 0.0), options.whole_or_none("limit")
    fresh = options.text("fresh", "yes")
    if fresh not in ("yes", "no"):
        raise WorkloadError.of("fresh", fresh, "not a choice", ("yes", "no"))
    conversations = [turns for chat in _chats(path) if (turns := _exchanges(chat)[:max_turns])][
        :limit
    ]
    if not conversations:
        raise WorkloadError.of("sharegpt", path, "holds no conversation that a person begins")

    def session(number: int) -> tuple[Request, ...]:
        rng = random.Random(f"{seed}/chat/{number}")
        opening = words.text(salted, "chat", number, _FRESH_WORDS) + "\n" if fresh == "yes" else ""
        requests: list[Request] = []
        for place, (question, answer) in enumerate(conversations[number]):
            requests.append(
                Request(
                    prompt=question if place else opening + question,
                    output_tokens=max(1, len(answer.encode()) // _BYTES_PER_TOKEN),
                    limit=True,
                    kind="user",
                    turn=place + 1,
                    after=(place - 1,) if place else (),
                    gap_s=rng.expovariate(1 / think_s) if place and think_s else 0.0,
                    context=place - 1 if place else None,
                )
            )
        return tuple(requests)

    return Workload(
        options.name,
        lambda number: session(number)[0],
        len(conversations),
        session=session,
        sessions=len(conversations),
    )


def _chats(path: Path) -> list[_Chat]:
    data = textfile.read(path)
    try:
        if data.lstrip().startswith(b"["):
            return msgspec.json.decode(data, type=list[_Chat])
    except ValueError as error:
        raise WorkloadError.of("sharegpt", path, str(error)) from error
    return list(textfile.parsed("sharegpt", path, msgspec.json.Decoder(_Chat).decode))


def _exchanges(chat: _Chat) -> list[tuple[str, str]]:
    """What a person said and what was answered, in turn; whatever comes before is left out."""
    messages = [
        (message.source or message.role, message.value or message.content)
        for message in chat.conversations or chat.messages
    ]
    pairs = []
    for (who, text), (other, answer) in pairwise(messages):
        if who in ("human", "user") and other in ("gpt", "assistant", "chatgpt") and text:
            pairs.append((text, answer))
    return pairs


# --- logs of agents -------------------------------------------------------------------------


class _Tokens(msgspec.Struct):
    prompt: int = 0
    completion: int = 0


class _Call(msgspec.Struct):
    timestamp: str
    duration_ms: float = 0.0
    initiator_type: str = ""
    tokens: _Tokens = msgspec.field(default_factory=_Tokens)


class _Turn(msgspec.Struct):
    llm_calls: list[_Call] = []


class _Session(msgspec.Struct):
    turns: list[_Turn]


def copilot(options: spec.Options, salted: str) -> Workload:
    """Sessions of the GitHub Copilot coding agent traces (2026): a JSON object a line."""
    path, limit = options.file(), options.whole_or_none("limit")
    logs = []
    for log in textfile.parsed("copilot", path, msgspec.json.Decoder(_Session).decode):
        calls = [call for turn in log.turns for call in turn.llm_calls if call.tokens.prompt > 0]
        if calls:
            logs.append(sorted(map(_call, calls), key=lambda call: call.begun_s))
        if limit is not None and len(logs) == limit:
            break
    if not logs:
        raise WorkloadError.of("copilot", path, "holds no session with a call")
    return _replayed(options, logs, salted)


def otel(options: spec.Options, salted: str) -> Workload:
    """Sessions of OpenTelemetry spans, see `spans`; they know when they started."""
    path, limit = options.file(), options.whole_or_none("limit")
    log = spans.read(path)
    sessions = log.sessions[:limit]
    start_s = sessions[0][0].begun_s
    at_s = [calls[0].begun_s - start_s for calls in sessions]
    return replace(_replayed(options, sessions, salted, at_s), timed=True, notes=log.notes)


def _replayed(
    options: spec.Options,
    sessions: Sequence[Sequence[Call]],
    salted: str,
    at_s: Sequence[float] | None = None,
) -> Workload:
    how = agents.Replay(
        scale=options.number("scale", 1.0, above=0.0, maximum=1e3),
        speed=options.number("speed", 1.0, above=0.0),
        max_input=options.whole_or_none("max_input"),
        max_output=options.whole_or_none("max_output"),
    )

    def session(number: int) -> tuple[Request, ...]:
        start_s = None if at_s is None else at_s[number] / how.speed
        return agents.session(sessions[number], number, salted, how, start_s)

    return Workload(
        options.name,
        lambda number: session(number)[0],
        len(sessions),
        session=session,
        sessions=len(sessions),
    )


def _call(call: _Call) -> Call:
    begun_s = _seconds(call.timestamp)
    return Call(
        begun_s=begun_s,
        ended_s=begun_s + call.duration_ms / 1e3,
        input_tokens=call.tokens.prompt,
        output_tokens=call.tokens.completion,
        kind=call.initiator_type or "agent",
    )


def _seconds(timestamp: str) -> float:
    try:
        at = datetime.fromisoformat(timestamp)
    except ValueError:
        raise WorkloadError(f"copilot: {timestamp!r} is not a date and time") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
