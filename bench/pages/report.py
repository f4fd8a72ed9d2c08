"""One page that shows what was measured: result folders in, a self-contained HTML file out.

    report([Path("results/run"), Path("results/locust")], Path("report.html"), against=None)

Any kinds of results may stand in one report: runs, matrices, searches, in-process baselines,
Locust; what is not about a load (hardware, profile, tuning, scaling) has a chapter (`story.py`).
What is shown was worked out by `measure`, `search` and `compare`; here it is only laid out.
Whatever is missing (no records, no server metrics, too few samples for a percentile) is said
with its reason, and never drawn as zero. Model output and error texts are escaped by the
template, which loads nothing from anywhere: the file can be mailed.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from bench import interval
from bench.errors import ResultError
from bench.pages import against as beside
from bench.pages import charts, figures, matrices, overtime, story, tables
from bench.pages.loaded import CELLS, Loaded, load, tell_apart

_TEMPLATE = Path(__file__).with_name("report.html.j2")


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
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
    )
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page)
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
    story.page(results, out, [each["text"] for each in _machines(loaded)])


def _page(
    loaded: Sequence[Loaded], unreadable: Sequence[str], against: Loaded | None
) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    everything = loaded
    loaded = [result for result in loaded if result.kind not in story.ONLY_CHAPTERS]
    locusts = [result for result in loaded if result.kind == "locust"]
    return {
        "title": _title(everything),
        "started": _span([str(result.data.get("started") or "") for result in everything]),
        "not_valid": [result.name for result in everything if not result.data.get("valid", True)],
        "unreadable": len(unreadable),
        "ran": [_ran(result) for result in everything],
        "machines": _machines(everything),
        "doubts": _doubts(everything, unreadable),
        "chapters": story.chapters([result.data for result in everything]),
        "headline": tables.headline(loaded),
        "kinds": tables.kinds(loaded),
        "cdfs": charts.cdfs(loaded),
        "throughput": charts.throughput(loaded),
        "pareto": charts.pareto(loaded),
        "sessions": [table for result in loaded if (table := tables.sessions(result))],
        "searches": [charts.search(result) for result in loaded if "points" in result.data],
        "timelines": [
            overtime.timeline(result, place) for place, result in enumerate(charts.served(loaded))
        ],
        "heats": [
            overtime.heat(result, place) for place, result in enumerate(charts.served(loaded))
        ],
        "comparison": beside.comparison(loaded, against),
        "matrices": [matrices.matrix(result) for result in loaded if result.kind in CELLS],
        "locusts": [locust(result) for result in locusts],
        "needed": {p: interval.samples_needed(p / 100) for p in (50, 90, 95, 99)},
    }


def _title(loaded: Sequence[Loaded]) -> str:
    """The name of a single result; else the model, where it was the same in all."""
    if len(loaded) == 1:
        return loaded[0].name
    of = (
        (result.data.get("target") or {}).get("model") or result.data.get("model")
        for result in loaded
    )
    models = {model for model in of if model}
    return (
        f"{models.pop()}, {len(loaded)} results" if len(models) == 1 else f"{len(loaded)} results"
    )


def _span(started: Iterable[str]) -> str:
    """When it was: the first start, and the last where that is another."""
    times = sorted(time.replace("T", " ").replace("+00:00", " UTC") for time in started if time)
    return " to ".join(dict.fromkeys([times[0], times[-1]])) if times else ""


def _ran(result: Loaded) -> dict[str, Any]:
    """What was run, in pairs of a term and what stands for it; what is not known is left out."""
    data, target = result.data, result.data.get("target") or {}
    repeats = len(data.get("repeats") or [])
    slo = data.get("slo") or {}
    pairs = {
        "target": target.get("url"),
        "model": target.get("model") or data.get("model"),
        "endpoint": target.get("endpoint"),
        "workload": data.get("workload"),
        "about the workload": "; ".join(data.get("workload_notes") or []),
        "load": data.get("load"),
        "SLO": ", ".join(f"{key} {value}" for key, value in slo.items() if value is not None),
        "repeats": repeats if repeats > 1 else None,
        "seed": data.get("seed"),
        "started": _span([str(data.get("started") or "")]),
        "commit": data.get("commit"),
    }
    return {
        "name": result.name,
        "kind": result.kind,
        "command": str(data.get("command") or ""),
        "pairs": {key: value for key, value in pairs.items() if value not in (None, "")},
    }


def _machines(loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Each machine once, with the results that were measured from it."""
    machines: dict[bytes, dict[str, Any]] = {}
    for result in loaded:
        machine = result.data.get("machine") or {}
        key = msgspec.json.encode(machine)
        machines.setdefault(key, {"text": _machine(machine), "names": []})["names"].append(
            result.name
        )
    return list(machines.values())


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return "not known: the result does not say"
    gpus = [f"{gpu['name']} ({gpu['memory_gib']:g} GiB)" for gpu in machine.get("gpus") or []]
    versions = (machine.get("versions") or {}).items()
    parts = [
        f"{machine.get('processor', 'unknown processor')}, {machine.get('cores', '?')} cores",
        f"{machine.get('memory_gib', '?')} GiB",
        ", ".join(gpus) or "no GPU",
        str(machine.get("system", "")),
        ", ".join(f"{name} {version}" for name, version in versions),
    ]
    return "; ".join(part for part in parts if part)


def _doubts(loaded: Sequence[Loaded], unreadable: Sequence[str]) -> list[dict[str, Any]]:
    doubts = [
        {"name": result.name, "doubts": result.data.get("doubts") or []}
        for result in loaded
        if result.data.get("doubts") or not result.data.get("valid", True)
    ]
    if unreadable:
        doubts.append({"name": "not in this report", "doubts": list(unreadable)})
    return doubts


# --- Locust --------------------------------------------------------------------------------


def _took(example: Mapping[str, Any]) -> str:
    """How long an example took, as far as it is known."""
    whole = "failed after" if example.get("error") else "whole answer"
    texts = []
    for label, metric in (("first token", "ttft_s"), (whole, "e2e_s")):
        unit, scale = figures.scale(metric)
        if example.get(metric) is not None:
            texts.append(f"{label} {figures.number(example[metric] * scale)} {unit}")
    if example.get("output_tokens") is not None:
        texts.append(f"{example['output_tokens']} tokens")
    return ", ".join(texts)


def _failed(data: Mapping[str, Any]) -> str:
    failed, requests = data.get("failed"), data.get("requests")
    return "—" if failed is None or requests is None else f"{failed:,} of {requests:,}"


def locust(result: Loaded) -> dict[str, Any]:
    """The demo-day summary."""
    data = result.data
    ok = tables.fewest(data.get("repeats"))
    tiles = [("requests/s", "requests_per_s"), ("output tokens/s", "output_tokens_per_s")]
    latencies = [
        (f"{title} {statistic}, {unit}", f"{latency}_{statistic}_s")
        for latency, title, unit in (("e2e", "whole answer", "s"), ("ttft", "first token", "ms"))
        for statistic in ("mean", "p50", "p95", "p99")
    ]
    return {
        "name": result.name,
        "users": data.get("users"),
        "failed": _failed(data),
        "steady": bool(data.get("steady")),
        "tiles": [
            {"label": label, **tables.plain(data.get(metric), metric, ok)}
            for label, metric in (*tiles, *latencies)
        ],
        "errors": data.get("errors") or [],
        "examples": [{**example, "took": _took(example)} for example in data.get("examples") or []],
        "examples_absent": data.get("examples_absent") or "none were asked",
    }
