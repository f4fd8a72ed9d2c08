"""What to send: requests made from a spec and a seed, as many as are taken.

    synthetic:input=200,output=64           lengths: 200, uniform(50;300), lognormal(200;0.5), the
                                            last by median and sigma; max= clips what is drawn
    prefix:groups=8,depth=1,shared=1000,unique=50,output=64
    mixed:long=4000,longs=2,short=50,shorts=30,output=64
    file:PATH,output=64,repeat=1            .txt, a prompt a line; .jsonl, see `_Line`
    azure:PATH  mooncake:PATH  vllm:PATH    traces; options start_s, duration_s, limit, scale,
                                            max_input, max_output, speed: see `trace.Cut`;
                                            mooncake and vllm also block= (tokens a hash) and
                                            tick_s= (seconds a unit of time)

Every kind takes exact=yes: the answer has the length that was asked for, whatever the model would
rather say (`ignore_eos`, which vLLM knows and other servers may refuse).

Lengths are in words, each a token (`words.py`). What is not declared to be shared is not: prompts
of one seed differ from their first word on, or a prefix cache would answer part of the benchmark.
Request N depends on the spec, the seed and N alone: not on how many are taken, nor by whom.
"""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bench import spec
from bench.errors import WorkloadError
from bench.traffic import trace, words

MAX_TOKENS = 1_000_000
_CUT = ("start_s", "duration_s", "limit", "scale", "max_input", "max_output", "speed")
KINDS = {
    "synthetic": ("input", "output", "max", "exact"),
    "prefix": ("groups", "depth", "shared", "unique", "output", "exact"),
    "mixed": ("long", "longs", "short", "shorts", "output", "exact"),
    "file": (spec.PATH, "output", "repeat", "exact"),
    "azure": (spec.PATH, *_CUT, "exact"),
    "mooncake": (spec.PATH, *_CUT, "block", "tick_s", "exact"),
    "vllm": (spec.PATH, *_CUT, "block", "tick_s", "exact"),
}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request, apart from when it is sent.

    Attributes:
        prompt: a text, token ids, or the messages of a chat.
        output_tokens: the most tokens the answer may have.
        input_tokens: how long the prompt was meant to be; None where nobody said.
        kind: its class, for fairness between classes.
        at_s: of a trace: when it came, seconds from the start, the trace's speed-up applied.
        extra: more fields of the request's body.
    """

    prompt: str | list[int] | list[dict[str, Any]]
    output_tokens: int
    input_tokens: int | None = None
    kind: str = ""
    at_s: float | None = None
    extra: dict[str, Any] = {}


@dataclass(frozen=True)
class Workload:
    """Requests by number.

    Attributes:
        name: the spec.
        request: the request of a number from 0, below `length`; the same each time.
        length: how many there are; None for endless.
        timed: each request has its own time, in ascending order.
    """

    name: str
    request: Callable[[int], Request]
    length: int | None = None
    timed: bool = False

    def take(self, count: int) -> list[Request]:
        """The first `count` requests, or all where there are fewer."""
        if self.length is not None:
            count = min(count, self.length)
        return [self.request(index) for index in range(count)]


def parse(text: str, seed: int) -> Workload:
    """The workload of a spec.

    Raises WorkloadError, which names the key, its value and the nearest valid choice.
    """
    options = spec.parse(text, "workload", KINDS, WorkloadError)
    if options.name == "synthetic":
        made = _synthetic(options, seed)
    elif options.name == "prefix":
        made = _prefix(options, seed)
    elif options.name == "mixed":
        made = _mixed(options, seed)
    elif options.name == "file":
        made = _file(options)
    else:
        made = _trace(options, seed)
    made = replace(made, name=text.strip())
    return _exact(made) if options.flag("exact") else made


def _exact(workload: Workload) -> Workload:
    def request(index: int) -> Request:
        loose = workload.request(index)
        return msgspec.structs.replace(loose, extra={**loose.extra, "ignore_eos": True})

    return replace(workload, request=request)


# --- lengths --------------------------------------------------------------------------------


_LENGTHS = ("200", "uniform(50;300)", "lognormal(200;0.5)")
_DRAWN = re.compile(r"(?P<name>uniform|lognormal)\((?P<first>[^;,]*)[;,](?P<second>[^;,]*)\)")


@dataclass(frozen=True)
class Length:
    """A number of tokens: one (`low`), one from a range, or one around a median with a long tail.

    Attributes:
        low, high: both included; equal for a fixed length.
        sigma: of the logarithm; 0 unless lognormal, whose median is `low`.
        most: longer ones are clipped to it.
    """

    low: int
    high: int
    sigma: float = 0.0
    most: int = MAX_TOKENS

    def draw(self, rng: random.Random) -> int:
        if self.sigma:
            drawn = round(rng.lognormvariate(math.log(self.low), self.sigma))
        else:
            drawn = rng.randint(self.low, self.high)
        return min(max(1, drawn), self.most)


def _length(options: spec.Options, key: str, most: int) -> Length:
    value = options.text(key)
    found = _DRAWN.fullmatch(value)
    if found is None:
        if value[:1].isalpha():
            raise WorkloadError.of(key, value, "not a length", _LENGTHS)
        tokens = options.whole(key, least=1, most=MAX_TOKENS)
        return Length(tokens, tokens, most=most)
    # The two are read as options are, and named in errors as parts of this one.
    lognormal = found["name"] == "lognormal"
    first, second = ("median", "sigma") if lognormal else ("low", "high")
    names = f"{key}: {first} of {value}", f"{key}: {second} of {value}"
    values = {names[0]: found["first"].strip(), names[1]: found["second"].strip()}
    parts = replace(options, values=values)
    low = parts.whole(names[0], least=1, most=MAX_TOKENS)
    if lognormal:
        return Length(low, low, parts.number(names[1], above=0.0, most=5.0), most)
    return Length(low, parts.whole(names[1], least=low, most=MAX_TOKENS), most=most)


# --- kinds ----------------------------------------------------------------------------------


# The text of what many prompts share: prefixes and blocks.
_shared = lru_cache(maxsize=512)(words.text)


def _synthetic(options: spec.Options, seed: int) -> Workload:
    most = options.whole("max", MAX_TOKENS, least=1)
    read, written = _length(options, "input", most), _length(options, "output", most)

    def request(index: int) -> Request:
        rng = random.Random(f"{seed}/length/{index}")
        tokens = read.draw(rng)
        return Request(
            prompt=words.text(seed, "prompt", index, tokens),
            input_tokens=tokens,
            output_tokens=written.draw(rng),
        )

    return Workload(options.name, request)


def _prefix(options: spec.Options, seed: int) -> Workload:
    """Groups that share a prefix. With a depth, groups share the beginning of it too.

    The prefixes are the leaves of a tree `depth` levels deep, with as many branches at each node,
    and each level has its part of the `shared` tokens: 8 groups at depth 3 are 2 beginnings, each
    with 2 continuations, each with 2 ends.
    """
    groups = options.whole("groups", least=1)
    depth = options.whole("depth", 1, least=1, most=20)
    shared = options.whole("shared", least=1)
    unique = options.whole("unique", least=1)
    output = options.whole("output", least=1)
    if shared < depth:
        raise WorkloadError.of("shared", shared, f"must be at least the depth, {depth}")
    branches = next(n for n in range(1, groups + 1) if n**depth >= groups)
    # Groups below a node of each level; the first level has what does not divide evenly.
    below = [branches ** (depth - level) for level in range(1, depth + 1)]
    sizes = [shared - shared // depth * (depth - 1)] + [shared // depth] * (depth - 1)

    def request(index: int) -> Request:
        group = random.Random(f"{seed}/group/{index}").randrange(groups)
        nodes = enumerate(zip(below, sizes, strict=True))
        parts = [_shared(seed, f"prefix {level}", group // n, size) for level, (n, size) in nodes]
        return Request(
            prompt=" ".join([*parts, words.text(seed, "prompt", index, unique)]),
            input_tokens=shared + unique,
            output_tokens=output,
            kind=f"group {group}",
        )

    return Workload(options.name, request)


def _mixed(options: spec.Options, seed: int) -> Workload:
    """Rounds of short prompts with a few long ones early among them.

    A tenth of a round's short ones, at least one, come before its long ones: they show the server
    at rest, and the others whether they must wait behind the long ones.
    """
    tokens = {kind: options.whole(kind, least=1) for kind in ("long", "short")}
    longs, shorts = options.whole("longs", least=0), options.whole("shorts", least=0)
    output = options.whole("output", least=1)
    if not longs + shorts:
        raise WorkloadError.of("longs", longs, "a round of no long and no short ones is empty")
    before = min(shorts, max(1, shorts // 10))

    def request(index: int) -> Request:
        kind = "long" if before <= index % (longs + shorts) < before + longs else "short"
        return Request(
            prompt=words.text(seed, "prompt", index, tokens[kind]),
            input_tokens=tokens[kind],
            output_tokens=output,
            kind=kind,
        )

    return Workload(options.name, request)


_Tokens = Annotated[int, msgspec.Meta(ge=1)]


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


def _file(options: spec.Options) -> Workload:
    output, repeat = options.whole("output", 64, least=1), options.whole("repeat", 1, least=1)
    path = options.file()
    if path.suffix not in (".txt", ".jsonl"):
        raise WorkloadError.of("file", path, "must end in .txt or .jsonl")
    requests = []
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            requests.append(_line(raw, path, output))
        except ValueError as error:  # msgspec's errors are such, and UnicodeDecodeError.
            raise WorkloadError.of("file", f"{path}:{number}", str(error)) from error
    if not requests:
        raise WorkloadError.of("file", path, "holds no prompt")

    def request(index: int) -> Request:
        return requests[index % len(requests)]

    return Workload(options.name, request, len(requests) * repeat)


def _line(raw: bytes, path: Path, output: int) -> Request:
    if path.suffix == ".txt":
        return Request(prompt=raw.decode().rstrip("\r"), output_tokens=output)
    line = msgspec.json.decode(raw, type=_Line)
    prompt = line.messages or line.prompt
    if not prompt or (line.messages and line.prompt):
        raise ValueError("must have either a prompt or messages")
    asked = line.max_tokens or line.output_tokens or output
    return Request(prompt=prompt, output_tokens=asked, kind=line.kind, extra=line.extra)


def _trace(options: spec.Options, seed: int) -> Workload:
    kind = options.name
    cut = trace.Cut(
        start_s=options.number("start_s", 0.0, most=1e9),
        duration_s=options.number_or_none("duration_s", above=0.0, most=1e9),
        limit=options.whole_or_none("limit"),
        scale=options.number("scale", 1.0, above=0.0, most=1e3),
        max_input=options.whole_or_none("max_input"),
        max_output=options.whole_or_none("max_output"),
        speed=options.number("speed", 1.0, above=0.0),
    )
    block = options.whole("block", trace.BLOCK_TOKENS.get(kind, 1), least=1) * cut.scale
    tick_s = options.number_or_none("tick_s", above=0.0)
    rows = cut(trace.read(kind, options.file(), tick_s))
    if not rows:
        part = f"start_s={cut.start_s:g}, duration_s={cut.duration_s}"
        raise WorkloadError.of(kind, options.path, f"no request in the part of {part}")

    def request(index: int) -> Request:
        row = rows[index]
        parts = [
            words.text(seed, "prompt", index, tokens)
            if known is None
            else _shared(seed, "block", known, tokens)
            for known, tokens in trace.blocks(row, block)
        ]
        return Request(
            prompt=" ".join(parts),
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            at_s=row.at_s,
        )

    return Workload(kind, request, len(rows), timed=True)


# --- the baseline matrix --------------------------------------------------------------------


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of the matrix: a workload under so many users in a closed loop."""

    name: str
    workload: str
    input_tokens: int
    users: int
    output_tokens: int


def matrix(exact: bool = True) -> list[Cell]:
    """The baseline: prompts of 5, 200 and 1000 tokens, 1, 4 and 8 users, 50 and 200 tokens out.

    `exact` asks for answers of just that length; without it a model may stop before.
    """
    return [
        Cell(
            name=f"in{read}-out{written}-users{users}",
            workload=f"synthetic:input={read},output={written}" + (",exact=yes" if exact else ""),
            input_tokens=read,
            users=users,
            output_tokens=written,
        )
        for read in (5, 200, 1000)
        for written in (50, 200)
        for users in (1, 4, 8)
    ]
