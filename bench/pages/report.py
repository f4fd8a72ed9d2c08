"""The report: reads result folders, and writes one self-contained HTML page.

    report([Path("results/run"), Path("results/locust")], Path("report.html"), against=None)

Any kinds of results may stand in one report: runs, matrices, searches, in-process baselines,
Locust; what is not about a load (hardware, profile, tuning, scaling) has a chapter (`story.py`).
What is shown was worked out by `measure`, `search` and `compare`; here it is only laid out.
Whatever is missing (no records, no server metrics, too few samples for a percentile) is said
with its reason, and never drawn as zero. Model output and error texts are escaped by the
template, which loads nothing from anywhere: the file can be mailed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import interval
from bench.errors import ResultError
from bench.figures import Run
from bench.machine import Machine
from bench.matrix import Matrix
from bench.pages import against as beside
from bench.pages import charts, figures, matrices, overtime, story, tables, templates
from bench.pages.loaded import Loaded, load, tell_apart
from bench.pages.locust_report import Example, Locust
from bench.result import Asked, EngineResult, Result
from bench.search import RateResult, SweepResult


def report(folders: Sequence[Path], out: Path, against: Path | None = None) -> None:
    """Write one page about all `folders`; with `against`, what changed since that result.

    A folder that cannot be read is named among the doubts.

    Raises:
        ResultError: none of them can be read, or `against` cannot.
    """
    loaded, unreadable = [], []
    for folder in folders:
        try:
            loaded.append(load(folder))
        except ResultError as error:
            unreadable.append(str(error))
    if not loaded:
        raise ResultError("; ".join(unreadable) or "no folders were given")
    base = load(against) if against else None
    tell_apart([*loaded, base] if base else loaded)
    page = _page(loaded, unreadable, base)
    html = templates.environment().get_template("report.html.j2").render(page)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8", errors="replace")


def tell_story(folders: Sequence[Path], out: Path) -> None:
    """Write one page of chapters: hardware, baseline, profile, tuned, more GPUs.

    Raises:
        ResultError: a folder cannot be read, or none of them has a chapter.
    """
    loaded = [load(folder) for folder in folders]
    results = [result.data for result in loaded]
    if not story.chapters(results):
        raise ResultError("none of these results has a chapter in a story")
    story.page(results, out, [machine.text for machine in _machines(loaded)])


def _page(
    loaded: Sequence[Loaded], unreadable: Sequence[str], against: Loaded | None
) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    everything = loaded
    loaded = [result for result in loaded if result.kind not in story.ONLY_CHAPTERS]
    served = list(enumerate(charts.served(loaded)))
    timelines = [overtime.timeline(result, place) for place, result in served]
    heats = [overtime.heat(result, place) for place, result in served]
    return {
        "title": _title(everything),
        "started": _span([result.data.started for result in everything]),
        "not_valid": [result.name for result in everything if not result.data.valid],
        "unreadable": len(unreadable),
        "ran": [_ran(result) for result in everything],
        "machines": _machines(everything),
        "doubts": _doubts(everything, unreadable),
        "chapters": story.chapters([result.data for result in everything]),
        "headline": tables.headline(loaded),
        "kinds": tables.kinds(loaded),
        "cdfs": charts.cdfs(loaded),
        "throughput": charts.throughput(loaded),
        "pareto": charts.users_and_gpus(loaded),
        "sessions": [table for result in loaded if (table := tables.sessions(result))],
        "searches": [
            charts.search(result.name, result.data)
            for result in loaded
            if isinstance(result.data, SweepResult | RateResult)
        ],
        "timelines": timelines,
        "timelines_absent": _absent(timelines),
        "heats": heats,
        "heats_absent": _absent(heats),
        "comparison": beside.comparison(loaded, against),
        "matrices": [
            matrices.matrix(result.name, result.data)
            for result in loaded
            if isinstance(result.data, Matrix)
        ],
        "locusts": [
            demo(result.name, result.data) for result in loaded if isinstance(result.data, Locust)
        ],
        "needed": {p: interval.samples_needed(p / 100) for p in (50, 90, 95, 99)},
    }


def _absent(drawn: Sequence[charts.Chart]) -> list[str]:
    """Why a section has no plot at all."""
    reasons = [f"{chart.name}: {why}" for chart in drawn for why in chart.absent]
    return reasons or ["no single run is in this report; those of a matrix have their own reports"]


def _title(loaded: Sequence[Loaded]) -> str:
    """The name of a single result; else the model, where it was the same in all."""
    if len(loaded) == 1:
        return loaded[0].name
    models = {model for result in loaded if (model := _model(result.data))}
    return (
        f"{models.pop()}, {len(loaded)} results" if len(models) == 1 else f"{len(loaded)} results"
    )


def _span(started: Iterable[str]) -> str:
    """When it was: the first start, and the last where that is another."""
    times = sorted(time.replace("T", " ").replace("+00:00", " UTC") for time in started if time)
    return " to ".join(dict.fromkeys([times[0], times[-1]])) if times else ""


def _model(data: Result) -> str:
    """The model that was measured; empty where the result does not say."""
    served = data.target.model if isinstance(data, Asked) else ""
    return served or (data.model if isinstance(data, EngineResult) else "")


class Ran(msgspec.Struct, kw_only=True):
    """What was run, in pairs of a term and its value; what is not known is left out."""

    name: str
    kind: str
    command: str
    pairs: dict[str, object]


def _ran(result: Loaded) -> Ran:
    data = result.data
    asked = data if isinstance(data, Asked) else Asked()
    slo = msgspec.structs.asdict(asked.slo) if asked.slo else {}
    repeats = len(result.repeats)
    pairs: dict[str, object] = {
        "target": asked.target.url,
        "model": _model(data),
        "endpoint": asked.target.endpoint,
        "workload": asked.workload,
        "about the workload": "; ".join(data.workload_notes) if isinstance(data, Run) else "",
        "load": asked.load,
        "SLO": ", ".join(f"{key} {value}" for key, value in slo.items() if value is not None),
        "repeats": repeats if repeats > 1 else None,
        "seed": asked.seed,
        "started": _span([data.started]),
        "commit": data.commit,
    }
    shown = {key: value for key, value in pairs.items() if value not in (None, "")}
    return Ran(name=result.name, kind=result.kind, command=data.command, pairs=shown)


class MachineOf(msgspec.Struct, kw_only=True):
    """A machine in words, and the results that were measured from it."""

    text: str
    names: list[str]


def _machines(loaded: Sequence[Loaded]) -> list[MachineOf]:
    """Each machine once."""
    machines: dict[str, MachineOf] = {}
    for result in loaded:
        text = _machine(result.data.machine)
        machines.setdefault(text, MachineOf(text=text, names=[])).names.append(result.name)
    return list(machines.values())


def _machine(machine: Machine | None) -> str:
    if machine is None:
        return "not known: the result does not say"
    parts = [
        f"{machine.processor}, {machine.cores or '?'} cores",
        f"{machine.memory_gib or '?'} GiB",
        ", ".join(f"{gpu.name} ({gpu.memory_gib:g} GiB)" for gpu in machine.gpus) or "no GPU",
        machine.system,
        ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
    ]
    return "; ".join(part for part in parts if part)


class Doubts(msgspec.Struct, kw_only=True):
    """The doubts about one result."""

    name: str
    doubts: list[str]


def _doubts(loaded: Sequence[Loaded], unreadable: Sequence[str]) -> list[Doubts]:
    doubts = [
        Doubts(name=result.name, doubts=result.data.doubts)
        for result in loaded
        if result.data.doubts or not result.data.valid
    ]
    if unreadable:
        doubts.append(Doubts(name="not in this report", doubts=list(unreadable)))
    return doubts


# --- Locust --------------------------------------------------------------------------------


class Demo(msgspec.Struct, kw_only=True):
    """The demo-day summary: tiles of a label and a figure, and examples with what they took."""

    name: str
    result: Locust
    failed: str
    tiles: list[tuple[str, tables.Cell]]
    examples: list[tuple[Example, str]]


def demo(name: str, result: Locust) -> Demo:
    ok = tables.fewest(result.repeats)
    tiles = [("requests/s", "requests_per_s"), ("output tokens/s", "output_tokens_per_s")]
    latencies = [
        (f"{title} {statistic}, {unit}", f"{latency}_{statistic}_s")
        for latency, title, unit in (("e2e", "whole answer", "s"), ("ttft", "first token", "ms"))
        for statistic in ("mean", "p50", "p95", "p99")
    ]
    has_counts = result.failed is not None and result.requests is not None
    return Demo(
        name=name,
        result=result,
        failed=f"{result.failed:,} of {result.requests:,}" if has_counts else "—",
        tiles=[
            (label, tables.plain(getattr(result, metric), metric, ok))
            for label, metric in (*tiles, *latencies)
        ],
        examples=[(example, _took(example)) for example in result.examples],
    )


def _took(example: Example) -> str:
    """How long an example took, as far as it is known."""
    whole = "failed after" if example.error else "whole answer"
    texts = []
    for label, metric, took_s in (
        ("first token", "ttft_s", example.ttft_s),
        (whole, "e2e_s", example.e2e_s),
    ):
        unit, scale = figures.scale(metric)
        if took_s is not None:
            texts.append(f"{label} {figures.number(took_s * scale)} {unit}")
    if example.output_tokens is not None:
        texts.append(f"{example.output_tokens} tokens")
    return ", ".join(texts)
