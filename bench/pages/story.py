"""The chapters of a report that are not about one load: hardware, profile, tuning, scaling.

    chapters([report.load(folder), ..])      one for each result of such a kind
    steps(chapters)                          the story in short: each step, its gain, its command

`bench report` puts them behind its own sections; `bench report --story` is a page of them alone, in
the order in which the work was done: what the hardware allows, where it began, where the time went,
what was tuned, what more GPUs bring. A chapter only lays out what its result says. Figures that a
result does not have are left out by name, not drawn as zero.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from bench.engine import knobs
from bench.pages import plots
from bench.pages.plots import Curve, Panel, Ratio

_FOLDER = Path(__file__).parent
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
        read: what to look at; `said`: what follows, in sentences.
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


def chapters(results: Sequence[Mapping[str, Any]]) -> list[Chapter]:
    """A chapter for each result that has one, in the order of the story."""
    made = []
    for place, data in enumerate(results):
        kind = str(data.get("benchmark"))
        if kind in _MAKERS:
            chapter = _MAKERS[kind](data, place)
        elif data.get("roofline"):
            chapter = _against_hardware(data, place)
        else:
            continue
        if chapter is not None:
            chapter.doubts = [str(doubt) for doubt in data.get("doubts") or []]
            made.append(chapter)
    order = {kind: index for index, kind in enumerate(KINDS)}
    return sorted(made, key=lambda each: order.get(each.kind, order["profile"]))


def page(results: Sequence[Mapping[str, Any]], out: Path, machines: Sequence[str]) -> None:
    """Write the story: one page that loads nothing from anywhere."""
    story = chapters(results)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(_FOLDER),
    )
    style = (_FOLDER / "report.html.j2").read_text(encoding="utf-8")
    style = style[style.index("<style>") : style.index("</style>") + len("</style>")]
    html = environment.get_template("story.html.j2").render(
        style=Markup(style), chapters=story, steps=steps(story), machines=machines
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


def _chapter(data: Mapping[str, Any], title: str, read: str) -> Chapter:
    return Chapter(
        kind=str(data["benchmark"]),
        name=str(data.get("name") or ""),
        title=title,
        read=read,
        command=str(data.get("command") or ""),
    )


def _roofline(data: Mapping[str, Any], place: int) -> Chapter:
    chapter = _chapter(
        data,
        "What the hardware allows",
        "No step can take less. Decode reads all weights once a step, whoever is in it, so a "
        "larger batch is nearly free until the KV cache weighs as much as the weights.",
    )
    limits = data["ceilings"]
    chapter.sentences = [
        f"{limits['bytes_per_s'] / 1e9:,.0f} GB/s and {limits['flops_per_s'] / 1e12:,.3g} TFLOP/s, "
        f"{limits['source']}.",
        f"Weights of {data['weights_bytes'] / 1e9:.1f} GB, and "
        f"{data['kv_bytes_a_token'] / 1024:.0f} KiB of KV cache a token.",
    ]
    rows = [
        [
            row["seqs"],
            f"{row['context']:,}",
            _ms(row["least_s"]),
            f"{row['tokens_per_s']:,.0f}",
            row["bound"],
        ]
        for row in data["least"]["decode"]
    ]
    head = ["sequences", "tokens of each", "least, ms", "tokens/s", "bound"]
    prompts = [
        [
            f"{row['prompt']:,}",
            _ms(row["least_s"]),
            f"{row['tokens_per_s']:,.0f}",
            row["bound"],
        ]
        for row in data["least"]["prefill"]
    ]
    chapter.tables = [
        Table(caption="A step of decode", head=head, rows=rows),
        Table(
            caption="Reading a prompt",
            head=["tokens", "least, ms", "tokens/s", "bound"],
            rows=prompts,
        ),
    ]
    first = data["least"]["decode"][0]
    chapter.gain = f"at most {first['tokens_per_s']:,.0f} tokens/s for one stream"
    return chapter


def _against_hardware(data: Mapping[str, Any], place: int) -> Chapter | None:
    """A run, a matrix or a baseline beside what the hardware allows."""
    chapter = _chapter(
        data,
        "Measured against the hardware",
        "MBU is the share of the memory bandwidth that decode used, MFU the share of the compute "
        "that prefill used. Host-bound means that neither explains the time.",
    )
    cells = data.get("cells")
    source_of = (
        [(str(each["name"]), each.get("roofline") or {}) for each in cells]
        if cells
        else [(str(data.get("name") or ""), data.get("roofline") or {})]
    )
    rows = []
    for name, verdicts in source_of:
        for what in ("decode", "prefill", "step"):
            if verdict := verdicts.get(what):
                rows.append([name, what, *_verdict(verdict)])
    if not rows:
        return None
    head = ["load", "of", "took, ms", "least, ms", "MBU", "MFU", "bound"]
    chapter.tables = [Table(head=head, rows=rows)]
    source = (data.get("roofline") or {}).get("ceilings", {}).get("source")
    chapter.sentences = [f"Ceilings: {source}."] if source else []
    best = max((v["decode"]["mbu"] for _, v in source_of if v.get("decode")), default=None)
    if best is not None:
        chapter.gain = f"decode MBU {best:.2f} at best"
        full = max((v["prefill"]["mfu"] for _, v in source_of if v.get("prefill")), default=None)
        chapter.gain += f", prefill MFU {full:.2f}" if full is not None else ""
    return chapter


def _verdict(verdict: Mapping[str, Any]) -> list[Any]:
    return [
        _ms(verdict["took_s"]),
        _ms(verdict["least_s"]),
        _share(verdict["mbu"]),
        _share(verdict["mfu"]),
        f"{verdict['bound']}, {min(verdict['times'], 999):.1f}x",
    ]


def _profile(data: Mapping[str, Any], place: int) -> Chapter:
    chapter = _chapter(
        data,
        "Where the time goes",
        "Shares of all time in which the GPU ran something. What it did not run is the host's: "
        "a step is launch-bound where the GPU waits for what to do next.",
    )
    families = sorted({each["family"] for case in data["cases"] for each in _families(case)})
    rows = []
    for case in data["cases"]:
        shares = {each["family"]: each["share"] for each in _families(case)}
        busy = case.get("busy_share")
        rows.append(
            [
                case["name"],
                _ms(case["took_s"]),
                "—" if busy is None else f"{busy:.0%}",
                *(_share(shares.get(family, 0.0)) for family in families),
            ]
        )
        chapter.sentences.append(f"{case['name']}: {case['summary']['text']}.")
        if case.get("verdict"):
            chapter.sentences.append(f"{case['name']}: {case['verdict']['text']}.")
    chapter.tables = [Table(head=["case", "step, ms", "GPU busy", *families], rows=rows)]
    bounds = {case["name"]: case["verdict"]["bound"] for case in data["cases"] if case["verdict"]}
    chapter.gain = ", ".join(f"{name} is {bound}" for name, bound in bounds.items())
    return chapter


def _families(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    families: list[dict[str, Any]] = case["summary"]["families"]
    return families


def _kv(data: Mapping[str, Any], place: int) -> Chapter:
    chapter = _chapter(
        data,
        "The KV cache",
        "A cache that is full before the engine is busy limits throughput; preemptions say that "
        "more was let in than fits.",
    )
    view, samples = data["kv"], data.get("samples") or []
    chapter.sentences = [
        f"{view['blocks']:,} blocks of {view['block_tokens']} tokens hold {view['tokens']:,} "
        f"tokens; {view['used_peak']:.0%} were in use at most.",
        f"{view['waste_share']:.1%} of the blocks in use was empty; "
        f"{view['preempted']} sequences were preempted.",
    ]
    rows = [[f"{int(length):,}", f"{count:,}"] for length, count in view["fits"].items()]
    chapter.tables = [Table(caption="How many fit", head=["tokens", "sequences"], rows=rows)]
    if samples:
        chapter.figures = [Markup(plots.timeline(_kv_panels(view, samples), f"kv{place}"))]
    return chapter


def _kv_panels(view: Mapping[str, Any], samples: Sequence[Mapping[str, float]]) -> list[Panel]:
    at_s = [sample["t_s"] for sample in samples]

    def curve(label: str, values: Sequence[float]) -> Curve:
        return Curve(label=label, x=at_s, y=values)

    size = view["block_tokens"]
    allocated = curve("allocated", [sample["blocks"] * size for sample in samples])
    filled = curve("written", [sample["tokens"] for sample in samples])
    running = curve("running", [sample["running"] for sample in samples])
    waiting = curve("waiting", [sample["waiting"] for sample in samples])
    return [
        Panel(title="KV cache", y_title="tokens", curves=[allocated, filled], filled=(1,)),
        Panel(title="Requests", y_title="requests", curves=[running, waiting], filled=(0,)),
    ]


def _scheduler(data: Mapping[str, Any], place: int) -> Chapter:
    chapter = _chapter(
        data,
        "Who waits for whom",
        "Short prompts behind long ones: how long each waits for its first token, and how often a "
        "short one that came later was answered first.",
    )
    chapter.sentences = [f"{text}." for text in data.get("advice") or []]
    rows = []
    for case in data["cases"]:
        rows.append(
            [
                case["policy"],
                "on" if case["chunked"] else "off",
                *(_ms(case["ttft_p50_s"].get(kind)) for kind in ("short", "long")),
                *(_ms(case["ttft_max_s"].get(kind)) for kind in ("short", "long")),
                _share(case["jumped"]),
                _share(case["overtaken"]),
                f"{case['tokens_per_s']:,.0f}",
            ]
        )
    head = ["policy", "chunks", "short p50, ms", "long p50, ms", "short max, ms", "long max, ms"]
    head += ["short answered first", "long overtaken", "tokens/s"]
    chapter.tables = [Table(head=head, rows=rows)]
    return chapter


def _tune(data: Mapping[str, Any], place: int) -> Chapter:
    chapter = _chapter(
        data,
        "Tuned",
        "What each value multiplies the score by, beside vLLM's default; an interval that crosses "
        "1 is no difference.",
    )
    best, default, gain = data.get("best"), data.get("default"), data.get("gain")
    if best:
        chapter.sentences.append(
            f"Best of {len(data['trials'])} settings: {best['described']}, "
            f"{best['score']:,.4g} {data['score']}."
        )
    if gain and gain.get("ratio") and best and default:
        chapter.gain = _gained(gain, f"{data['score']} by {best['described']}")
        chapter.sentences.append(f"{chapter.gain}.")
    effects = data.get("effects") or []
    if effects:
        rows = [
            Ratio(
                label=f"{each['knob']} {knobs.describe({'': each['value']}).strip()}",
                ratio=each["ratio"],
                low=each["low"],
                high=each["high"],
                verdict=_better(each),
            )
            for each in effects
        ]
        svg = plots.ratios([("", rows)], "times the default (log)", f"effects{place}")
        chapter.figures = [Markup(svg)]
    trials = [
        [
            each["described"],
            each["rung"],
            each["failure"][:120] if each["failure"] else f"{each['score']:,.4g}",
        ]
        for each in sorted(
            data.get("trials") or [], key=lambda each: (-each["rung"], -each["score"])
        )
    ]
    chapter.tables = [Table(head=["setting", "rung", str(data["score"])], rows=trials)]
    pruned = [[name, why] for name, why in (data.get("pruned") or {}).items()]
    if pruned:
        caption = "Not measured"
        chapter.tables.append(Table(caption=caption, head=["setting", "because"], rows=pruned))
    return chapter


def _better(effect: Mapping[str, Any]) -> str:
    low, high = effect.get("low"), effect.get("high")
    if low is None or high is None or low <= 1 <= high:
        return "noise"
    return "better" if low > 1 else "worse"


def _gained(gain: Mapping[str, Any], what: str) -> str:
    text = f"{gain['ratio']:.2f} times the {what}"
    low, high = gain.get("low"), gain.get("high")
    return text + (f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else "")


def _confirm(data: Mapping[str, Any], place: int) -> Chapter:
    chapter = _chapter(
        data,
        f"Confirmed ({data['system']})",
        "The defaults and the tuned setting once more, each started afresh with its arguments.",
    )
    gain = data.get("gain")
    if gain and gain.get("ratio"):
        chapter.gain = _gained(gain, f"defaults' score, as {data['system']}")
        chapter.sentences = [f"{chapter.gain}."]
    rows = [
        [name, ", ".join(f"{value:,.4g}" for value in values)]
        for name, values in data["scores"].items()
    ]
    chapter.tables = [Table(head=["setting", "scores"], rows=rows)]
    return chapter


def _scale(data: Mapping[str, Any], place: int) -> Chapter:
    chapter = _chapter(
        data,
        "More GPUs",
        "Tensor parallelism shortens a step, replicas add up: compare the time per token of one "
        "request and the tokens/s of all.",
    )
    chapter.gain = "; ".join(data.get("advice") or [])
    chapter.tables, chapter.sentences, chapter.figures = [], [], []
    for each in data.get("workloads") or [{"workload": "", **data}]:
        what = each["workload"]
        chapter.sentences += [f"{what}, {text}." if what else f"{text}." for text in each["advice"]]
        chapter.tables.append(_scale_table(what, each["table"]))
        panels = _scale_panels([row for row in each["table"] if not row["failure"]])
        if panels:
            name = f"scale{place}-{len(chapter.figures)}"
            chapter.figures.append(Markup(plots.curves(panels, "GPUs", name)))
    return chapter


def _scale_table(what: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    head = ["layout", "GPUs", "TTFT alone, ms", "TPOT alone, ms", "tokens/s at 100"]
    head += ["tokens/s saturated", "of linear"]
    table = Table(caption=what, head=head, rows=[])
    for each in rows:
        if each["failure"] and not each["saturated"]:
            table.rows.append([each["name"], each["gpus"], each["failure"][:160], "", "", "", ""])
            continue
        table.rows.append(
            [
                each["name"],
                each["gpus"],
                _ms(each["ttft_s"]),
                _ms(each["tpot_s"]),
                _number(each["tokens_per_s"]),
                _number(each["saturated"]),
                _share(each["saturated_efficiency"]),
            ]
        )
    return table


def _scale_panels(
    table: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str, Sequence[Curve]]]:
    panels: list[tuple[str, str, Sequence[Curve]]] = []
    for metric, title, unit, times in (
        ("tpot_s", "Time per token of one request", "ms", 1e3),
        ("saturated", "Throughput at saturation", "tokens/s", 1.0),
    ):
        lines = []
        # One GPU is where both lines begin.
        for label, other in (("tensor parallelism", "replicas"), ("replicas", "tensor_parallel")):
            mine = [each for each in table if each[other] == 1 and each[metric]]
            if len(mine) > 1:
                x = [float(each["gpus"]) for each in mine]
                lines.append(Curve(label=label, x=x, y=[each[metric] * times for each in mine]))
        if lines:
            panels.append((title, unit, lines))
    return panels


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


_MAKERS: Mapping[str, Any] = {
    "roofline": _roofline,
    "profile": _profile,
    "kv": _kv,
    "scheduler": _scheduler,
    "tune": _tune,
    "confirm": _confirm,
    "scale": _scale,
}
