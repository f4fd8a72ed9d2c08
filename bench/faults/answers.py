"""Whether an answer is right: the received answer, compared with the undisturbed one.

Pure. A stream that another replica continued can have special faults: a part is repeated or
missing, it continues with a different text, or the end is sent twice. `compare` distinguishes
these, by tokens if the server sends their ids, and otherwise by characters.

A greedy answer can also differ without a fault: two tokens are so similar in probability that the
batch size decides. `margins` detects this from the logprobs of the received answer: by how much
each token was less likely than the most likely one. If all margins are small, every token was a
greedy choice, and the difference is a tie. A repeated, missing or wrong part is no tie, because the
tokens after it are unlikely. Neither is an answer that ends too early: `may_tie` requires a proper
end.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from bench.traffic.transcript import Transcript

# What must agree after a jump for it to be one: fewer only where the answer ends before.
_SURE = {"tokens": 8, "characters": 24}
# Of an answer, from its middle on: repeated with a period up to this, a piece more or less cannot
# be seen in it.
_PERIOD = 16

Outcome = Literal["whole", "cut", "error", "refused", "unreached"]


class Right(msgspec.Struct, frozen=True, kw_only=True):
    """The undisturbed answer to a prompt."""

    text: str
    finish_reason: str
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None

    @classmethod
    def of(cls, transcript: Transcript) -> "Right":
        return cls(**{name: getattr(transcript, name) for name in cls.__struct_fields__})

    @property
    def loops(self) -> bool:
        """Whether its second half goes round, so that a piece more or less would not show."""
        units: Sequence[Any] = self.token_ids if self.token_ids is not None else self.text
        half = units[len(units) // 2 :]
        return any(
            half[period:] == half[:-period] for period in range(1, min(_PERIOD, len(half) // 2) + 1)
        )


class Alignment(msgspec.Struct, kw_only=True):
    """How one sequence lies on another.

    Attributes:
        parted_at: place of the first difference; None where there is none.
        doubled, missing: how many came again, and how many were left out.
        different_at: from where on nothing fits any more.
    """

    parted_at: int | None = None
    doubled: int = 0
    missing: int = 0
    different_at: int | None = None


class Verdict(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The verdict on one answer.

    Attributes:
        outcome: whole; cut after it began; ended by an error event; refused with an HTTP status; or
            not answered at all.
        unit: what is counted and where places are: tokens or characters.
        parted_at, doubled, missing, different_at: see `Alignment`. Of an answer that is not whole,
            what is left out at its end does not count.
        finish, usage, identity: what is wrong with how it ended, with its counts, and with what
            should be the same in all its events; empty where nothing is.
        margin: the greatest by which a token was less likely than the likeliest; None where it was
            not asked for or the server does not say.
        tie: the answer differs, and every token was a greedy choice within the margin allowed.
    """

    outcome: Outcome
    unit: str = "tokens"
    parted_at: int | None = None
    doubled: int = 0
    missing: int = 0
    different_at: int | None = None
    finish: str = ""
    usage: str = ""
    identity: str = ""
    margin: float | None = None
    tie: bool = False

    @property
    def faults(self) -> list[str]:
        """What is wrong, each kind once; a tie is not wrong."""
        content = {
            "doubled": self.doubled,
            "missing": self.missing,
            "different": self.different_at is not None,
        }
        faults = {
            "lost": self.outcome != "whole",
            **({} if self.tie else content),
            "finish": self.finish,
            "usage": self.usage,
            "identity": self.identity,
        }
        return [kind for kind, wrong in faults.items() if wrong]


FAULTS = ("lost", "doubled", "missing", "different", "finish", "usage", "identity")


def compare(transcript: Transcript, right: Right) -> Verdict:
    """The verdict on an answer, before anybody asked whether a difference is a tie."""
    outcome = _outcome(transcript)
    whole = outcome == "whole"
    unit = "characters"
    alignment = Alignment()
    if transcript.token_ids is not None and right.token_ids is not None:
        unit = "tokens"
        alignment = align(transcript.token_ids, right.token_ids, _SURE[unit], whole)
    if alignment.parted_at is None:
        # The right tokens can still make a wrong text: half of a character before the cut, and
        # half after it.
        in_text = align(transcript.text, right.text, _SURE["characters"], whole)
        if in_text.parted_at is not None or unit == "characters":
            unit, alignment = "characters", in_text
    equal = whole and alignment.parted_at is None
    return Verdict(
        outcome=outcome,
        unit=unit,
        parted_at=alignment.parted_at,
        doubled=alignment.doubled,
        missing=alignment.missing,
        different_at=alignment.different_at,
        finish=_finish(transcript, right, whole, equal),
        usage=_usage(transcript, right, whole, equal),
        identity=_identity(transcript),
    )


def align(received: Sequence[Any], right: Sequence[Any], sure: int, whole: bool) -> Alignment:
    """Lay what was received on what is right, with jumps where a piece is doubled or left out.

    At a difference, the shortest jump is taken after which `sure` elements agree, or all that are
    left. Whatever `received` lacks at its end is missing if it is `whole`.
    """
    alignment = Alignment()
    at = place = 0
    while True:
        while at < len(received) and place < len(right) and received[at] == right[place]:
            at, place = at + 1, place + 1
        if at == len(received):
            break
        if alignment.parted_at is None:
            alignment.parted_at = at
        jump = _jump(received[at : at + sure], right, place)
        if jump is None:
            alignment.different_at = at
            return alignment
        alignment.doubled += max(0, -jump)
        alignment.missing += max(0, jump)
        place += jump
    if whole and place < len(right):
        alignment.missing += len(right) - place
        if alignment.parted_at is None:
            alignment.parted_at = at
    return alignment


def _jump(following: Sequence[Any], right: Sequence[Any], place: int) -> int | None:
    """From `place` to where `right` goes on as `following` does: back below 0, or forward."""
    count = len(following)
    for distance in range(1, len(right) + 1):
        back, forward = place - distance, place + distance
        if back >= 0 and right[back : back + count] == following:
            return -distance
        if right[forward : forward + count] == following:
            return distance
    return None


def ends(rights: Sequence[Right]) -> frozenset[int]:
    """The tokens that end an answer, as far as the right ones show them."""
    stopped = (right.token_ids for right in rights if right.finish_reason == "stop")
    return frozenset(token_ids[-1] for token_ids in stopped if token_ids)


def may_tie(transcript: Transcript, verdict: Verdict, ends: frozenset[int]) -> bool:
    """Whether a tie can be what is different: a whole answer of other tokens, with a real end.

    That is as many tokens as were asked for, or one that ends answers.
    """
    if verdict.outcome != "whole" or verdict.parted_at is None or verdict.unit != "tokens":
        return False
    token_ids = transcript.token_ids or []
    if verdict.parted_at >= len(token_ids):
        return False  # Nothing else came, only less.
    if transcript.finish_reason == "length":
        return len(token_ids) == transcript.asked_output_tokens
    return transcript.finish_reason == "stop" and token_ids[-1] in ends


def margins(
    prompt_logprobs: Sequence[Mapping[str, Any] | None], token_ids: Sequence[int]
) -> list[float]:
    """By how much each token of an answer was less likely than the likeliest at its place.

    Args:
        prompt_logprobs: vLLM's, of a prompt that ends with the answer: at each place the logprobs
            of some tokens by their ids, among them the one that stands there and the likeliest.
        token_ids: of the answer.
    """
    logprob_margins = []
    for place, token in zip(prompt_logprobs[-len(token_ids) :], token_ids, strict=True):
        logprobs = {key: float(each["logprob"]) for key, each in (place or {}).items()}
        own = logprobs.get(str(token), -math.inf)
        logprob_margins.append(max(logprobs.values(), default=0.0) - own)
    return logprob_margins


# --- what is wrong with an answer, in words -------------------------------------------------


def _outcome(transcript: Transcript) -> Outcome:
    if not transcript.error:
        return "whole"
    if not transcript.status:
        return "unreached"
    if transcript.status != 200:
        return "refused"
    return "error" if transcript.error.startswith(("error event", "bad ")) else "cut"


def _finish(transcript: Transcript, right: Right, whole: bool, equal: bool) -> str:
    reasons = transcript.finish_reasons
    if len(reasons) > 1:
        return f"{len(reasons)} finish reasons: {', '.join(reasons)}"
    if whole and not reasons:
        return "no finish reason"
    if transcript.late:
        return f"{transcript.late} events with text after the finish reason"
    if equal and reasons != [right.finish_reason]:
        return f"ended with {reasons[0]!r} instead of {right.finish_reason!r}"
    return ""


def _usage(transcript: Transcript, right: Right, whole: bool, equal: bool) -> str:
    usages = transcript.usages
    if len(usages) > 1:
        return f"{len(usages)} usages"
    if not whole:
        return ""
    if not usages:
        return "no usage"
    read, written = usages[0]
    if right.input_tokens is not None and read != right.input_tokens:
        return f"{read} prompt tokens instead of {right.input_tokens}"
    if transcript.token_ids is not None and written != len(transcript.token_ids):
        return f"{written} completion tokens, and {len(transcript.token_ids)} came"
    if equal and right.output_tokens is not None and written != right.output_tokens:
        return f"{written} completion tokens instead of {right.output_tokens}"
    return ""


def _identity(transcript: Transcript) -> str:
    if len(transcript.names) > 1:
        return f"{len(transcript.names)} ids of one answer"
    if transcript.roles > 1:
        return f"{transcript.roles} events that name the role"
    if transcript.dones > 1:
        return f"[DONE] came {transcript.dones} times"
    return ""
