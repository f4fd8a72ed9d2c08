"""Prompts of a file: a line of a .txt each, or a JSON object of a .jsonl each."""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bench import spec
from bench.errors import WorkloadError
from bench.traffic import textfile, words
from bench.traffic.request import Request, Workload

_Tokens = Annotated[int, msgspec.Meta(ge=1)]
_FRESH_WORDS = 8


class _Line(msgspec.Struct):
    """A line of a .jsonl file of prompts: `prompt` (text or token ids) or `messages`.

    Other fields than these are not sent: data sets carry many that a server would refuse.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    max_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    kind: str = ""
    extra: dict[str, Any] = {}


def prompts(options: spec.Options, seed: str) -> Workload:
    """The prompts of the option's file, `repeat` times over.

    They are sent as they are, so that a second run sends what the first one sent. With
    `fresh=yes` each begins with a few words that no other run has.
    """
    output, repeat = options.whole("output", 64, minimum=1), options.whole("repeat", 1, minimum=1)
    fresh = options.flag("fresh")
    path = options.file()
    if path.suffix not in (".txt", ".jsonl"):
        raise WorkloadError.of("file", path, "must end in .txt or .jsonl")
    requests = list(textfile.parsed("file", path, lambda line: _request(line, path, output)))
    if not requests:
        raise WorkloadError.of("file", path, "holds no prompt")
    if fresh:
        for each in requests:
            _freshened(each, "")  # So that what cannot be freshened is refused now.
    requests = _with_shares(requests) if repeat == 1 or fresh else _repeated(requests)

    def request(index: int) -> Request:
        line = requests[index % len(requests)]
        return _freshened(line, words.text(seed, "fresh", index, _FRESH_WORDS)) if fresh else line

    return Workload(options.name, request, len(requests) * repeat)


def _request(raw: bytes, path: Path, output: int) -> Request:
    if path.suffix == ".txt":
        return Request(prompt=raw.decode().rstrip("\r"), output_tokens=output, limit=True)
    line = msgspec.json.decode(raw, type=_Line)
    prompt = line.messages or line.prompt
    if not prompt or (line.messages and line.prompt):
        raise ValueError("must have either a prompt or messages")
    max_tokens = line.max_tokens or line.output_tokens or output
    return Request(
        prompt=prompt, output_tokens=max_tokens, limit=True, kind=line.kind, extra=line.extra
    )


def _with_shares(requests: list[Request]) -> list[Request]:
    """The requests, each with the share of its prompt that another one begins with.

    Sorted, the prompt that shares most with another stands beside it.
    """
    texts = [msgspec.json.encode(request.prompt) for request in requests]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    common = [0] * len(texts)
    for previous, other in pairwise(order):
        length = _common(texts[previous], texts[other])
        common[previous], common[other] = max(common[previous], length), max(common[other], length)
    return [
        msgspec.structs.replace(request, shared=min(1.0, length / max(1, len(text))))
        for request, length, text in zip(requests, common, texts, strict=True)
    ]


def _common(first: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    pairs = enumerate(zip(first, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(other)))


def _repeated(requests: list[Request]) -> list[Request]:
    return [msgspec.structs.replace(request, shared=1.0) for request in requests]


def _freshened(request: Request, text: str) -> Request:
    """The request with a beginning that no other has."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return msgspec.structs.replace(request, prompt=f"{text}\n{prompt}", shared=0.0)
    first = prompt[0]
    if isinstance(first, dict) and isinstance(first.get("content"), str):
        message = {**first, "content": f"{text}\n{first['content']}"}
        return msgspec.structs.replace(request, prompt=[message, *prompt[1:]], shared=0.0)
    raise WorkloadError.of("fresh", "yes", "the file's prompts are not text")
