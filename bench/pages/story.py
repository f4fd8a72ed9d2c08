"""The chapters of a report that are not about one load: hardware, profile, tuning, scaling.

    chapters([loaded.load(folder).data, ..])   one for each result of such a kind
    steps(chapters)                            the story in short: each step, gain and command

`bench report` puts them behind its own sections; `bench report --story` is a page of them alone, in
the order in which the work was done: what the hardware allows, where it began, where the time went,
what was tuned, what more GPUs bring. A chapter only lays out what its result says. Figures that a
result does not have are left out by name, not drawn as zero.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from markupsafe import Markup

from bench import plots
from bench.engine import knobs
from bench.engine.confirm import Confirmed
from bench.engine.effects import Effect
from bench.engine.gain import Gain
from bench.engine.kvcache import KvCache, View
from bench.engine.profile import Profile
from bench.engine.scaled import ALONE, OfWorkload, Point, Scaled
from bench.engine.scheduler import Schedules
from bench.engine.tuned import Tuned
from bench.figures import Run
from bench.hardware.roofline import Roofline, Verdict
from bench.matrix import Matrix
from bench.pages import templates
from bench.plots import Curve, Panel, Ratio
from bench.result import Result

# In the order of the story.
KINDS = ("roofline", "baseline", "profile", "kv", "scheduler", "tune", "confirm", "scale")
# Those that `bench report` has no other section for.
ONLY_CHAPTERS = tuple(kind for kind in KINDS if kind != "baseline")


class Table(msgspec.Struct, kw_only=True):
    """Rows of texts; a cell may be (text, shade from 0 to 100)."""

    caption: str = ""
    head: list[str]
    rows: list[list[Any]]


class Chapter(msgspec.Struct, kw_only=True):
    """One result, laid out.

    Attributes:
        read: what to look at; sentences: what follows.
        gain: what this step brought, for the story in short; empty where it brought none.
    """

    kind: str
    name: str
    title: str
    read: str
    command: str
    sentences: list[str] = []
    gain: str = ""
    tables: list[Table] = []
    figures: list[Any] = []
    doubts: list[str] = []


def chapters(results: Sequence[Result]) -> list[Chapter]:
    """A chapter for each result that has one, in the order of the story."""
    made = [chapter for place, data in enumerate(results) if (chapter := _made(data, place))]
    order = {kind: index for index, kind in enumerate(KINDS)}
    return sorted(made, key=lambda each: order.get(each.kind, order["profile"]))


def _made(data: Result, place: int) -> Chapter | None:
    match data:
        case Roofline():
            return _roofline(data)
        case Profile():
            return _profile(data)
        case KvCache():
            return _kv(data, place)
        case Schedules():
            return _scheduler(data)
        case Tuned():
            return _tune(data, place)
        case Confirmed():
            return _confirm(data)
        case Scaled():
            return _scale(data, place)
        case Run() | Matrix():
            return _against_hardware(data)
    return None


def page(results: Sequence[Result], out: Path, machines: Sequence[str]) -> None:
    """Write the story: one page that loads nothing from anywhere."""
    story = chapters(results)
    style = (templates.FOLDER / "report.html.j2").read_text(encoding="utf-8")
    style = style[style.index("<style>") : style.index("</style>") + len("</style>")]
    html = (
        templates.environment()
        .get_template("story.html.j2")
        .render(style=Markup(style), chapters=story, steps=steps(story), machines=machines)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8", errors="replace")


def steps(story: Sequence[Chapter]) -> list[dict[str, str]]:
    """Each step that brought or showed something, with its command."""
    return [
        {"title": each.title, "gain": each.gain, "command": each.command}
        for each in story
        if each.gain
    ]


# --- the kinds ------------------------------------------------------------------------------


def _chapter(data: Result, title: str, read: str) -> Chapter:
    return Chapter(
        kind=data.benchmark,
        name=data.name,
        title=title,
        read=read,
        command=data.command,
        doubts=data.doubts,
    )


def _roofline(data: Roofline) -> Chapter:
    chapter = _chapter(
        data,
        "What the hardware allows",
        "No step can take less. Decode reads all weights once a step, whoever is in it, so a "
        "larger batch is nearly free until the KV cache weighs as much as the weights.",
    )
    limits = data.ceilings
    chapter.sentences = [
        f"{limits.bytes_per_s / 1e9:,.0f} GB/s and {limits.flops_per_s / 1e12:,.3g} TFLOP/s, "
        f"{limits.source}.",
        f"Weights of {data.weights_bytes / 1e9:.1f} GB, and "
        f"{data.kv_bytes_a_token / 1024:.0f} KiB of KV cache a token.",
    ]
    rows = [
        [row.seqs, f"{row.context:,}", _ms(row.least_s), f"{row.tokens_per_s:,.0f}", row.bound]
        for row in data.least.decode
    ]
    head = ["sequences", "tokens of each", "least, ms", "tokens/s", "bound"]
    prompts = [
        [f"{row.prompt:,}", _ms(row.least_s), f"{row.tokens_per_s:,.0f}", row.bound]
        for row in data.least.prefill
    ]
    chapter.tables = [
        Table(caption="A step of decode", head=head, rows=rows),
        Table(
            caption="Reading a prompt",
            head=["tokens", "least, ms", "tokens/s", "bound"],
            rows=prompts,
        ),
    ]
    first = data.least.decode[0]
    chapter.gain = f"at most {first.tokens_per_s:,.0f} tokens/s for one stream"
    return chapter


def _against_hardware(data: Run | Matrix) -> Chapter | None:
    """A run, a matrix or a baseline beside what the hardware allows; None if that is not known."""
    loads: Sequence[Run] = data.cells if isinstance(data, Matrix) else [data]
    allowed = [(load.name, load.roofline) for load in loads if load.roofline is not None]
    rows = [
        [name, of, *_verdict(verdict)]
        for name, each in allowed
        for of, verdict in (("decode", each.decode), ("prefill", each.prefill), ("step", each.step))
        if verdict is not None
    ]
    if not rows:
        return None
    chapter = _chapter(
        data,
        "Measured against the hardware",
        "MBU is the share of the memory bandwidth that decode used, MFU the share of the compute "
        "that prefill used. Host-bound means that neither explains the time.",
    )
    head = ["load", "of", "took, ms", "least, ms", "MBU", "MFU", "bound"]
    chapter.tables = [Table(head=head, rows=rows)]
    if data.roofline and data.roofline.ceilings:
        chapter.sentences = [f"Ceilings: {data.roofline.ceilings.source}."]
    best = max((each.decode.mbu for _, each in allowed if each.decode), default=None)
    if best is not None:
        chapter.gain = f"decode MBU {best:.2f} at best"
        full = max((each.prefill.mfu for _, each in allowed if each.prefill), default=None)
        chapter.gain += f", prefill MFU {full:.2f}" if full is not None else ""
    return chapter


def _verdict(verdict: Verdict) -> list[Any]:
    return [
        _ms(verdict.took_s),
        _ms(verdict.least_s),
        _share(verdict.mbu),
        _share(verdict.mfu),
        f"{verdict.bound}, {min(verdict.times, 999):.1f}x",
    ]


def _profile(data: Profile) -> Chapter:
    chapter = _chapter(
        data,
        "Where the time goes",
        "Shares of all time in which the GPU ran something. What it did not run is the host's: "
        "a step is launch-bound where the GPU waits for what to do next.",
    )
    families = sorted({each.family for case in data.cases for each in case.summary.families})
    rows, bounds = [], []
    for case in data.cases:
        shares = {each.family: each.share for each in case.summary.families}
        busy = "—" if case.busy_share is None else f"{case.busy_share:.0%}"
        cells = [_share(shares.get(family, 0.0)) for family in families]
        rows.append([case.name, _ms(case.took_s), busy, *cells])
        chapter.sentences.append(f"{case.name}: {case.summary.text}.")
        if case.verdict:
            chapter.sentences.append(f"{case.name}: {case.verdict.text}.")
            bounds.append(f"{case.name} is {case.verdict.bound}")
    chapter.tables = [Table(head=["case", "step, ms", "GPU busy", *families], rows=rows)]
    chapter.gain = ", ".join(bounds)
    return chapter


def _kv(data: KvCache, place: int) -> Chapter:
    chapter = _chapter(
        data,
        "The KV cache",
        "A cache that is full before the engine is busy limits throughput; preemptions say that "
        "more was let in than fits.",
    )
    view = data.kv
    chapter.sentences = [
        f"{view.blocks:,} blocks of {view.block_tokens} tokens hold {view.tokens:,} "
        f"tokens; {view.used_peak:.0%} were in use at most.",
        f"{view.waste_share:.1%} of the blocks in use was empty; "
        f"{view.preempted} sequences were preempted.",
    ]
    rows = [[f"{length:,}", f"{count:,}"] for length, count in view.fits.items()]
    chapter.tables = [Table(caption="How many fit", head=["tokens", "sequences"], rows=rows)]
    if data.samples:
        chapter.figures = [Markup(plots.timeline(_kv_panels(view, data.samples), f"kv{place}"))]
    return chapter


def _kv_panels(view: View, samples: Sequence[Mapping[str, float]]) -> list[Panel]:
    at_s = [sample["t_s"] for sample in samples]

    def curve(label: str, values: Sequence[float]) -> Curve:
        return Curve(label=label, x=at_s, y=values)

    size = view.block_tokens
    allocated = curve("allocated", [sample["blocks"] * size for sample in samples])
    filled = curve("written", [sample["tokens"] for sample in samples])
    running = curve("running", [sample["running"] for sample in samples])
    waiting = curve("waiting", [sample["waiting"] for sample in samples])
    return [
        Panel(title="KV cache", y_title="tokens", curves=[allocated, filled], filled=(1,)),
        Panel(title="Requests", y_title="requests", curves=[running, waiting], filled=(0,)),
    ]


def _scheduler(data: Schedules) -> Chapter:
    chapter = _chapter(
        data,
        "Who waits for whom",
        "Short prompts behind long ones: how long each waits for its first token, and how often a "
        "short one that came later was answered first.",
    )
    chapter.sentences = [f"{text}." for text in data.advice]
    rows = [
        [
            case.policy,
            "on" if case.chunked else "off",
            *(_ms(case.ttft_p50_s.get(kind)) for kind in ("short", "long")),
            *(_ms(case.ttft_max_s.get(kind)) for kind in ("short", "long")),
            _share(case.jumped),
            _share(case.overtaken),
            f"{case.tokens_per_s:,.0f}",
        ]
        for case in data.cases
    ]
    head = ["policy", "chunks", "short p50, ms", "long p50, ms", "short max, ms", "long max, ms"]
    head += ["short answered first", "long overtaken", "tokens/s"]
    chapter.tables = [Table(head=head, rows=rows)]
    return chapter


def _tune(data: Tuned, place: int) -> Chapter:
    chapter = _chapter(
        data,
        "Tuned",
        "What each value multiplies the score by, beside vLLM's default; an interval that crosses "
        "1 is no difference.",
    )
    best = data.best
    if best:
        chapter.sentences.append(
            f"Best of {len(data.trials)} settings: {best.described}, "
            f"{best.score:,.4g} {data.score}."
        )
    if data.gain and best and data.default:
        chapter.gain = _gained(data.gain, f"{data.score} by {best.described}")
        chapter.sentences.append(f"{chapter.gain}.")
    if data.effects:
        rows = [
            Ratio(
                label=f"{effect.knob} {knobs.describe({'': effect.value}).strip()}",
                ratio=effect.ratio,
                low=effect.low,
                high=effect.high,
                verdict=_better(effect),
            )
            for effect in data.effects
        ]
        svg = plots.ratios([("", rows)], "times the default (log)", f"effects{place}")
        chapter.figures = [Markup(svg)]
    trials = [
        [each.described, each.rung, each.failure[:120] or f"{each.score:,.4g}"]
        for each in sorted(data.trials, key=lambda each: (-each.rung, -each.score))
    ]
    chapter.tables = [Table(head=["setting", "rung", data.score], rows=trials)]
    pruned = [[name, why] for name, why in data.pruned.items()]
    if pruned:
        caption = "Not measured"
        chapter.tables.append(Table(caption=caption, head=["setting", "because"], rows=pruned))
    return chapter


def _better(effect: Effect) -> str:
    low, high = effect.low, effect.high
    if low is None or high is None or low <= 1 <= high:
        return "noise"
    return "better" if low > 1 else "worse"


def _gained(gain: Gain, what: str) -> str:
    text, low, high = f"{gain['ratio']:.2f} times the {what}", gain["low"], gain["high"]
    return text if low is None or high is None else f"{text} ({low:.2f} to {high:.2f})"


def _confirm(data: Confirmed) -> Chapter:
    chapter = _chapter(
        data,
        f"Confirmed ({data.system})",
        "The defaults and the tuned setting once more, each started afresh with its arguments.",
    )
    if data.gain:
        chapter.gain = _gained(data.gain, f"defaults' score, as {data.system}")
        chapter.sentences = [f"{chapter.gain}."]
    rows = [
        [name, ", ".join(f"{value:,.4g}" for value in values)]
        for name, values in data.scores.items()
    ]
    chapter.tables = [Table(head=["setting", "scores"], rows=rows)]
    return chapter


def _scale(data: Scaled, place: int) -> Chapter:
    chapter = _chapter(
        data,
        "More GPUs",
        "Tensor parallelism shortens a step, replicas add up: compare the time per token of one "
        "request and the tokens/s of all.",
    )
    chapter.gain = "; ".join(data.advice)
    for each in data.workloads or [OfWorkload(table=data.table, advice=data.advice)]:
        what = each.workload
        chapter.sentences += [f"{what}, {text}." if what else f"{text}." for text in each.advice]
        chapter.tables.append(_scale_table(what, each.table))
        panels = _scale_panels(each.table)
        if panels:
            name = f"scale{place}-{len(chapter.figures)}"
            chapter.figures.append(Markup(plots.curves(panels, "GPUs", name)))
    return chapter


def _scale_table(what: str, points: Sequence[Point]) -> Table:
    """A line for each load; a column that no line has a value for is left out."""
    columns: list[tuple[str, Callable[[Point], Any]]] = [
        ("system", lambda point: point.system),
        ("load", lambda point: point.load or point.failure[:160]),
        ("TTFT, ms", lambda point: _ms(point.ttft_s)),
        ("TPOT, ms", lambda point: _ms(point.tpot_s)),
        ("tokens/s", lambda point: _number(point.tokens_per_s)),
        ("of linear", lambda point: _share(point.efficiency)),
        ("of the hardware", lambda point: _share(point.roofline)),
        ("joules a token", lambda point: _figure(point.joules_per_token)),
        ("HAProxy, µs a request", lambda point: _number(_times(point.haproxy_s, 1e6))),
        ("door, µs a request", lambda point: _number(_times(point.door_s, 1e6))),
        ("TPOT, to the strongest peer", lambda point: _peer(point, "tpot_s")),
        ("tokens/s, to the strongest peer", lambda point: _peer(point, "tokens_per_s")),
    ]
    used = [
        (head, of) for head, of in columns if any(of(point) not in ("", "—") for point in points)
    ]
    rows = [[point.layout, *(of(point) for _, of in used)] for point in points]
    return Table(caption=what, head=["layout", *(head for head, _ in used)], rows=rows)


def _peer(point: Point, metric: str) -> str:
    peer = point.peers.get(metric)
    return peer.in_words if peer else "—"


def _scale_panels(points: Sequence[Point]) -> list[tuple[str, str, Sequence[Curve]]]:
    loads = [point.load for point in points if point.load not in ("", ALONE)]
    panels: list[tuple[str, str, Sequence[Curve]]] = []
    for load, metric, title, unit, times in (
        (ALONE, "tpot_s", "Time per token of one request", "ms", 1e3),
        (loads[-1] if loads else "", "tokens_per_s", "Throughput at saturation", "tokens/s", 1.0),
    ):
        mine = [point for point in points if point.load == load and getattr(point, metric)]
        lines = []
        for system in dict.fromkeys(point.system for point in mine):
            # One GPU is where both lines begin.
            for label, other in (("TP", "replicas"), ("replicas", "tensor_parallel")):
                line = sorted(
                    (float(point.gpus), getattr(point, metric) * times)
                    for point in mine
                    if point.system == system
                    and getattr(point, other) == 1
                    and point.layout in (f"TP={point.gpus}", f"{point.gpus} replicas")
                )
                if len({gpus for gpus, _ in line}) > 1:
                    x, y = [gpus for gpus, _ in line], [value for _, value in line]
                    lines.append(Curve(label=f"{label} of {system}", x=x, y=y))
        if lines:
            panels.append((title, unit, lines))
    return panels


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:,.3g}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _ms(value: float | None) -> str:
    if value is None:
        return "—"
    ms = value * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3g}"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> Any:
    """A share with its shade; a dash where it is not known."""
    return "—" if value is None else (f"{value:.1%}", min(60, round(55 * min(value, 1.0))))
