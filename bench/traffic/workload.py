"""What to send: requests made from a spec and a seed, as many as are taken.

    synthetic:input=200,output=64           lengths: 200, uniform(50;300), lognormal(200;0.5), the
                                            last by median and sigma; max= clips what is drawn
    prefix:groups=8,depth=1,shared=1000,unique=50,output=64
    mixed:long=4000,longs=2,short=50,shorts=30,output=64
    file:PATH,output=64,repeat=1            .txt, a prompt a line; .jsonl, see `promptfile`;
                                            fresh=yes: each begins with words of its own
    sessions:turns=4,input=100,output=64    conversations whose history grows, see `sessions`
    sharegpt:PATH  copilot:PATH  otel:PATH  recorded ones, see `recorded`
    clients:count=50,rate=10,input=300,output=100
                                            few clients send most, in bursts, see `pools`
    calls:tools=8,input=60,output=64        prompts that offer tools, see `toolcalls`
    azure: burstgpt: mooncake: vllm: bailian:PATH
                                            traces, see `trace`; options start_s, duration_s, limit,
                                            scale, max_input, max_output, speed: see `trace.Cut`;
                                            those with hashes also block= (tokens a hash) and
                                            tick_s= (seconds a unit of time)

Output lengths are meant: a run whose answers stop well before them is doubted. With exact=yes they
have that length, whatever the model would rather say (`ignore_eos`, which vLLM knows and other
servers may refuse); with exact=no it is an upper limit.

Lengths are in words, each a token (`words.py`). What is not declared to be shared is not: prompts
of one seed differ from their first word on, or a prefix cache would answer part of the benchmark.
A salt makes the same of runs: two with different salts have no prompt in common, though lengths,
sharing and times are the same. Request N depends on the spec, the seed, the salt and N alone: not
on how many are taken, nor by whom.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import msgspec

from bench import spec
from bench.errors import WorkloadError
from bench.traffic import pools, promptfile, recorded, sessions, toolcalls, trace, words
from bench.traffic.lengths import MAX_TOKENS, length
from bench.traffic.request import Request, Workload

_CUT = ("start_s", "duration_s", "limit", "scale", "max_input", "max_output", "speed")
KINDS = {
    "synthetic": ("input", "output", "max", "exact"),
    "prefix": ("groups", "depth", "shared", "unique", "output", "exact"),
    "mixed": ("long", "longs", "short", "shorts", "output", "exact"),
    "file": (spec.PATH, "output", "repeat", "fresh", "exact"),
    "sessions": (*sessions.OPTIONS, "exact"),
    "clients": (*pools.OPTIONS, "exact"),
    "calls": (*toolcalls.OPTIONS, "exact"),
    "sharegpt": (*recorded.CHAT_OPTIONS, "exact"),
    "copilot": (*recorded.AGENT_OPTIONS, "exact"),
    "otel": (*recorded.AGENT_OPTIONS, "exact"),
    **{kind: (spec.PATH, *_CUT, "exact") for kind in trace.CSV_FORMATS},
    **{kind: (spec.PATH, *_CUT, "block", "tick_s", "exact") for kind in trace.BLOCK_TOKENS},
}


@dataclass(frozen=True)
class _Seed:
    """What a workload is drawn from.

    Attributes:
        number: decides lengths, groups and times.
        words: decides texts, together with the salt.
    """

    number: int
    words: str


def parse(text: str, seed: int, salt: str | None = None) -> Workload:
    """The workload of a spec.

    Args:
        seed: the same one gives the same lengths, and with the same salt the same texts.
        salt: of the texts; None for one that no other call has, so that no server has seen them.

    Raises WorkloadError, which names the key, its value and the nearest valid choice.
    """
    options = spec.parse(text, "workload", KINDS, WorkloadError)
    drawn = _Seed(seed, words.salted(seed, words.fresh_salt() if salt is None else salt))
    makers: dict[str, Callable[[spec.Options, _Seed], Workload]] = {
        "synthetic": _synthetic,
        "prefix": _prefix,
        "mixed": _mixed,
        "file": lambda options, drawn: promptfile.prompts(options, drawn.words),
        "sessions": lambda options, drawn: sessions.drawn(options, drawn.number, drawn.words),
        "clients": lambda options, drawn: pools.pool(options, drawn.number, drawn.words),
        "calls": lambda options, drawn: toolcalls.calls(options, drawn.number, drawn.words),
        "sharegpt": lambda options, drawn: recorded.chats(options, drawn.number, drawn.words),
        "copilot": lambda options, drawn: recorded.copilot(options, drawn.words),
        "otel": lambda options, drawn: recorded.otel(options, drawn.words),
    }
    made = replace(makers.get(options.name, _trace)(options, drawn), name=text.strip())
    if "exact" not in options.values:
        return made
    return _each(made, _exact if options.flag("exact") else _as_limit)


def _each(workload: Workload, change: Callable[[Request], Request]) -> Workload:
    """The workload with each of its requests changed."""
    session = workload.session
    return replace(
        workload,
        request=lambda index: change(workload.request(index)),
        session=session and (lambda number: tuple(map(change, session(number)))),
    )


def _exact(request: Request) -> Request:
    extra = {**request.extra, "ignore_eos": True}
    return msgspec.structs.replace(request, extra=extra, limit=False)


def _as_limit(request: Request) -> Request:
    return msgspec.structs.replace(request, limit=True)


# --- kinds ----------------------------------------------------------------------------------


# The text of what many prompts share: prefixes and blocks.
_shared = lru_cache(maxsize=512)(words.text)


def _synthetic(options: spec.Options, seed: _Seed) -> Workload:
    max_tokens = options.whole("max", MAX_TOKENS, minimum=1)
    read, written = length(options, "input", max_tokens), length(options, "output", max_tokens)

    def request(index: int) -> Request:
        rng = random.Random(f"{seed.number}/length/{index}")
        tokens = read.draw(rng)
        return Request(
            prompt=words.text(seed.words, "prompt", index, tokens),
            input_tokens=tokens,
            output_tokens=written.draw(rng),
        )

    return Workload(options.name, request)


def _prefix(options: spec.Options, seed: _Seed) -> Workload:
    """Groups that share a prefix. With a depth, groups share the beginning of it too.

    The prefixes are the leaves of a tree `depth` levels deep, with as many branches at each node,
    and each level has its part of the `shared` tokens: 8 groups at depth 3 are 2 beginnings, each
    with 2 continuations, each with 2 ends.
    """
    groups = options.whole("groups", minimum=1)
    depth = options.whole("depth", 1, minimum=1, maximum=20)
    shared = options.whole("shared", minimum=1)
    unique = options.whole("unique", minimum=1)
    output = options.whole("output", minimum=1)
    if shared < depth:
        raise WorkloadError.of("shared", shared, f"must be at least the depth, {depth}")
    branches = next(n for n in range(1, groups + 1) if n**depth >= groups)
    # Groups below a node of each level; the first level has what does not divide evenly.
    below = [branches ** (depth - level) for level in range(1, depth + 1)]
    sizes = [shared - shared // depth * (depth - 1)] + [shared // depth] * (depth - 1)

    def request(index: int) -> Request:
        group = random.Random(f"{seed.number}/group/{index}").randrange(groups)
        parts = [
            _shared(seed.words, f"prefix {level}", group // under, size)
            for level, (under, size) in enumerate(zip(below, sizes, strict=True))
        ]
        return Request(
            prompt=" ".join([*parts, words.text(seed.words, "prompt", index, unique)]),
            input_tokens=shared + unique,
            shared=shared / (shared + unique),
            output_tokens=output,
            kind=f"group {group}",
        )

    return Workload(options.name, request)


def _mixed(options: spec.Options, seed: _Seed) -> Workload:
    """Rounds of short prompts with a few long ones early among them.

    A tenth of a round's short ones, at least one, come before its long ones: they show the server
    at rest, and the others whether they must wait behind the long ones.
    """
    tokens = {kind: options.whole(kind, minimum=1) for kind in ("long", "short")}
    longs, shorts = options.whole("longs", minimum=0), options.whole("shorts", minimum=0)
    output = options.whole("output", minimum=1)
    if not longs + shorts:
        raise WorkloadError.of("longs", longs, "must not be 0 if shorts is 0 as well")
    before = min(shorts, max(1, shorts // 10))

    def request(index: int) -> Request:
        kind = "long" if before <= index % (longs + shorts) < before + longs else "short"
        return Request(
            prompt=words.text(seed.words, "prompt", index, tokens[kind]),
            input_tokens=tokens[kind],
            output_tokens=output,
            kind=kind,
        )

    return Workload(options.name, request)


def _trace(options: spec.Options, seed: _Seed) -> Workload:
    """Each row of a trace as a request; rows that wait for one another are a session."""
    kind = options.name
    cut = trace.Cut(
        start_s=options.number("start_s", 0.0, maximum=1e9),
        duration_s=options.number_or_none("duration_s", above=0.0, maximum=1e9),
        limit=options.whole_or_none("limit"),
        scale=options.number("scale", 1.0, above=0.0, maximum=1e3),
        max_input=options.whole_or_none("max_input"),
        max_output=options.whole_or_none("max_output"),
        speed=options.number("speed", 1.0, above=0.0),
    )
    path = options.file()
    everything = trace.read(kind, path, options.number_or_none("tick_s", above=0.0))
    block_option = options.whole_or_none("block")
    own = trace.block_tokens(kind, path, everything, block_option)
    rows = cut(everything)
    if not rows:
        part = f"start_s={cut.start_s:g}, duration_s={cut.duration_s}"
        raise WorkloadError.of(kind, options.path, f"no request in the part of {part}")
    block = own * cut.scale
    common = trace.shared_blocks(rows)

    def request(index: int) -> Request:
        row = rows[index]
        parts = [
            words.text(seed.words, "prompt", index, tokens)
            if prefix is None
            else _shared(seed.words, "block", prefix, tokens)
            for prefix, tokens in trace.blocks(row, block)
        ]
        return Request(
            prompt=" ".join(parts),
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            shared=min(1.0, common[index] * block / row.input_tokens),
            kind=row.kind,
            at_s=row.at_s,
        )

    notes = []
    if kind in trace.BLOCK_TOKENS and block_option is None and own != trace.BLOCK_TOKENS[kind]:
        notes.append(f"{kind}: the lengths say that a hash stands for {own} tokens")
    made = Workload(options.name, request, len(rows), timed=True, notes=tuple(notes))
    families = trace.families(rows)
    if len(families) == len(rows):
        return made
    family = partial(_family, request, rows, families)
    return replace(made, session=family, sessions=len(families))


def _family(
    request: Callable[[int], Request],
    rows: Sequence[trace.Row],
    families: Sequence[Sequence[int]],
    number: int,
) -> tuple[Request, ...]:
    """The requests of rows that wait for one another: each for its parent, and as long as there."""
    places = families[number]
    by_name = {rows[place].name: at for at, place in enumerate(places)}
    turns = []
    for at, place in enumerate(places):
        row = rows[place]
        before = by_name[row.parent] if at else None
        parent = rows[places[before]] if before is not None else row
        gap_s = max(0.0, row.at_s - parent.at_s - parent.busy_s)
        turns.append(
            msgspec.structs.replace(
                request(place),
                turn=at + 1,
                after=() if before is None else (before,),
                gap_s=gap_s,
            )
        )
    return tuple(turns)


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
