"""`bench quality`: whether faster answers are still the same answers.

    python -m bench quality --url REFERENCE --write reference.jsonl       the reference engine
    python -m bench quality --url OTHER --reference reference.jsonl --out DIR

Fixed prompts are sent greedily to the reference and to the engine under test: a quantized model, a
speculative setting, another kernel. Two figures measure their agreement: the share of equal
answers, with its interval, and the mean length of the common prefix as a share of the reference
answer, which distinguishes a late difference from a different answer. With batched kernels even one
engine sometimes differs from itself, so compare the reference engine with itself too.

With --answers FILE, one JSON object per line with `prompt` and `answer`, answers are scored: an
answer that contains the expected text is correct.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import interval, result
from bench.errors import ResultError, TargetFailed
from bench.records import Record
from bench.result import Asked, TargetName
from bench.traffic import textfile
from bench.traffic.client import Client
from bench.traffic.request import Request
from bench.traffic.target import Target

_AT_ONCE = 4  # Some, so that it does not take long; few, so that answers seldom share a batch.
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "List the first ten prime numbers.",
    "Translate into German: The train to Paris leaves at noon.",
    "What is 17 times 23?",
    "Write a haiku about the sea.",
    "Summarise in one sentence: Water boils at 100 degrees Celsius at sea level, and at a lower "
    "temperature on a mountain, because the pressure of the air is lower there.",
    "Name three rivers of South America.",
    "Write a Python function that reverses a list.",
    "Who wrote Romeo and Juliet?",
    "What comes next: 2, 4, 8, 16?",
    "Give a synonym of quick.",
    "Is a whale a fish? Answer with a reason.",
    "Convert 5 kilometres to miles.",
    "Put into alphabetical order: pear, apple, fig, plum.",
    "What does HTTP stand for?",
    "Write one polite sentence that declines an invitation.",
    "Which planet is the largest?",
    "Correct the grammar: She go to school every days.",
    "Give three uses of a paper clip.",
    "What is the past tense of swim?",
    "Write a JSON object with the keys name and age.",
    "How many minutes are in a day?",
    "Describe a cat to someone who has never seen one.",
)


class Reference(msgspec.Struct, kw_only=True):
    """A prompt, with the reference's answer or the right one."""

    prompt: str
    answer: str


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, its reference and the answer that was judged."""

    prompt: str
    reference: str
    answer: str


class Quality(Asked, frozen=True, kw_only=True):
    """The result of `bench quality`; figures are None that were not asked for.

    Attributes:
        tokens: at most, of an answer.
        asked: how many prompts.
        equal, ...: how far answers agree with references, as in `Agreement`.
        correct, correct_share, correct_low, correct_high: how many are right, with a 95 % interval.
    """

    benchmark: str = "quality"
    tokens: int
    asked: int
    equal: int | None = None
    equal_share: float | None = None
    equal_low: float | None = None
    equal_high: float | None = None
    common_share: float | None = None
    first_words: int | None = None
    correct: int | None = None
    correct_share: float | None = None
    correct_low: float | None = None
    correct_high: float | None = None
    answers: list[Answered] = []


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How far answers agree with those of a reference.

    Attributes:
        asked, equal: how many.
        equal_share, equal_low, equal_high: with its 95% interval.
        common_share: of a reference answer, the mean share that the other begins with.
        first_words: of the answers that differ, in how many the first word does.
    """

    asked: int
    equal: int
    equal_share: float
    equal_low: float
    equal_high: float
    common_share: float
    first_words: int


def agreement(references: Sequence[str], answers: Sequence[str]) -> Agreement:
    """How far two lists of answers to the same prompts agree; neither may be empty."""
    pairs = list(zip(references, answers, strict=True))
    equal = sum(answer == other for answer, other in pairs)
    low, high = interval.of_share_exact(equal, len(pairs))
    return Agreement(
        asked=len(pairs),
        equal=equal,
        equal_share=equal / len(pairs),
        equal_low=low,
        equal_high=high,
        common_share=sum(common_share(answer, other) for answer, other in pairs) / len(pairs),
        first_words=sum(answer.split()[:1] != other.split()[:1] for answer, other in pairs),
    )


def common_share(reference: str, answer: str) -> float:
    """The share of the reference's words that the answer begins with; 1 for an empty one."""
    words, others = reference.split(), answer.split()
    same = 0
    for word, other in zip(words, others, strict=False):
        if word != other:
            break
        same += 1
    return same / len(words) if words else 1.0


def correct(answers: Sequence[str], right: Sequence[str]) -> list[bool]:
    """Whether each answer contains what is right, whatever the case and the spaces."""
    return [
        " ".join(want.lower().split()) in " ".join(answer.lower().split())
        for answer, want in zip(answers, right, strict=True)
    ]


# --- asking ---------------------------------------------------------------------------------


async def ask(target: Target, prompts: Sequence[str], tokens: int) -> list[str]:
    """The greedy answers of a target, in the order of the prompts.

    Raises:
        TargetFailed: one of them fails.
    """
    extra = {"temperature": 0, "seed": 0, **target.extra}
    greedy = msgspec.structs.replace(target, extra=extra, keep_text=True)
    slots = asyncio.Semaphore(_AT_ONCE)
    with contextlib.closing(Client(greedy, time.perf_counter)) as client:

        async def answer(place: int, prompt: str) -> str:
            async with slots:
                record = Record(index=place, planned_s=time.perf_counter())
                request = Request(prompt=prompt, output_tokens=tokens, limit=True)
                record = await client.ask(request, record)
            if record.error:
                raise TargetFailed(f"url = {target.url!r}: {prompt!r}: {record.error}")
            return record.text

        return list(await asyncio.gather(*(answer(n, p) for n, p in enumerate(prompts))))


def read(path: Path) -> list[Reference]:
    """The references of a file.

    Raises:
        ResultError: it cannot be read, or holds none.
    """
    prompts = []
    try:
        for line in textfile.lines(path):
            if line.strip():
                prompts.append(msgspec.json.decode(line, type=Reference))
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{path}: line {len(prompts) + 1}: {error}") from None
    if not prompts:
        raise ResultError(f"{path}: holds no reference")
    return prompts


def write(path: Path, prompts: Sequence[str], answers: Sequence[str]) -> None:
    """Keep answers as references."""
    pairs = zip(prompts, answers, strict=True)
    lines = [msgspec.json.encode(Reference(prompt=p, answer=a)) + b"\n" for p, a in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))


async def judge(
    target: Target, references: Sequence[Reference], tokens: int, scored: bool, folder: Path
) -> Quality:
    """Ask what the references were asked, and say how far the answers agree or are right."""
    head = result.header(f"{target.model} at {target.url}")
    answers = await ask(target, [reference.prompt for reference in references], tokens)
    wanted = [reference.answer for reference in references]
    figures: dict[str, Any]
    if scored:
        right = sum(correct(answers, wanted))
        low, high = interval.of_share_exact(right, len(answers))
        figures = {"asked": len(answers), "correct": right, "correct_share": right / len(answers)}
        figures |= {"correct_low": low, "correct_high": high}
    else:
        figures = msgspec.structs.asdict(agreement(wanted, answers))
    output = Quality(
        **head,
        **figures,
        target=TargetName(url=target.url, model=target.model, endpoint=target.endpoint),
        tokens=tokens,
        answers=[
            Answered(prompt=each.prompt, reference=each.answer, answer=answer)
            for each, answer in zip(references, answers, strict=True)
        ],
    )
    return result.write(folder, output)
