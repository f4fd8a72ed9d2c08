"""One page that shows what was measured: result folders in, a self-contained HTML file out.

    report([Path("results/run"), Path("results/locust")], Path("report.html"), against=None)

Any kinds of results may stand in one report: runs, matrices, searches, in-process baselines,
Locust; what is not about a load (hardware, profile, tuning, scaling) has a chapter (`story.py`).
What is shown was worked out by `measure`, `search` and `compare`; here it is only laid out.
Whatever is missing (no records, no server metrics, too few samples for a percentile) is said
with its reason, and never drawn as zero. Model output and error texts are escaped by the
template, which loads nothing from anywhere: the file can be mailed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from bench import interval, measure, records, result
from bench.errors import ResultError
from bench.pages import compare, figures, plots, story
from bench.pages.plots import Curve, Panel, Ratio
from bench.records import Record

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_STEPS = 150  # Of a timeline.
_CELLS = ("matrix", "baseline")

# The headline table: a heading over columns, each a metric of `measure` and its short name.
HEADLINE: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("Throughput", (("requests_per_s", "requests/s"), ("output_tokens_per_s", "tokens/s out"))),
    (
        "Time to first token, ms",
        (("ttft_p50_s", "p50"), ("ttft_p95_s", "p95"), ("ttft_p99_s", "p99")),
    ),
    (
        "Time per output token, ms",
        (("tpot_p50_s", "p50"), ("tpot_p95_s", "p95"), ("tpot_p99_s", "p99")),
    ),
    ("End to end, s", (("e2e_p50_s", "p50"), ("e2e_p95_s", "p95"), ("e2e_p99_s", "p99"))),
    ("Outcome", (("goodput_per_s", "in SLO/s"), ("failed_share", "failed"))),
)
# What a matrix shows, a table each: metric, title, whether more is better.
_MATRIX = (
    ("output_tokens_per_s", "Output tokens/s", True),
    ("ttft_p50_s", "Time to first token, median, ms", False),
    ("tpot_p50_s", "Time per output token, median, ms", False),
)


# --- what is read ---------------------------------------------------------------------------


class Loaded(msgspec.Struct, kw_only=True):
    """A result folder.

    Attributes:
        data: result.json; made up from the records where there is none.
        records: all that can be read; `records_absent` says why there are no more.
        namesake: whether another result of the report has the same name.
    """

    folder: Path
    data: dict[str, Any]
    records: list[Record] = []
    records_absent: str = ""
    namesake: bool = False

    @property
    def kind(self) -> str:
        return str(self.data["benchmark"])

    @property
    def name(self) -> str:
        """Its own name, and its folder's where another result of the report has the same."""
        own = str(self.data.get("name") or self.folder.name)
        return f"{own} ({self.folder.name})" if self.namesake else own

    def of_repeat(self, repeat: int) -> list[Record]:
        return [record for record in self.records if record.repeat == repeat]

    def window(self, repeat: int) -> tuple[float, float] | None:
        """The steady state of a repeat; None where there was none."""
        repeats = self.data.get("repeats") or []
        if repeat >= len(repeats) or not repeats[repeat].get("steady"):
            return None
        return repeats[repeat]["from_s"], repeats[repeat]["to_s"]

    def measured(self) -> list[Record]:
        """The successes that the figures are of: in the steady state, where there was one."""
        found = []
        for repeat in {record.repeat for record in self.records}:
            from_s, to_s = self.window(repeat) or (-math.inf, math.inf)
            found += [r for r in self.of_repeat(repeat) if r.ok and from_s <= r.planned_s <= to_s]
        return found


def load(folder: Path) -> Loaded:
    """Read a folder; what survived of it where the run did not get as far as its result.

    Raises:
        ResultError: it holds neither a result nor a record.
    """
    found, absent = _records(folder)
    try:
        data = result.read(folder)
    except ResultError as error:
        if not found:
            raise
        data = _from_records(folder, found, str(error))
    return Loaded(folder=folder, data=data, records=found, records_absent=absent)


def _records(folder: Path) -> tuple[list[Record], str]:
    path = folder / result.RECORDS
    found: list[Record] = []
    try:
        for record in records.read(path):
            found.append(record)
    except OSError as error:
        return [], f"{path.name}: {error.strerror}"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return found, f"{path.name}: line {len(found) + 1} cannot be read: {error}"
    return found, "" if found else f"{path.name} is empty"


def _from_records(folder: Path, found: Sequence[Record], why: str) -> dict[str, Any]:
    """A run that left records and no result: its figures are of the whole."""
    whole = [
        measure.measure(record for record in found if record.repeat == repeat)
        for repeat in sorted({record.repeat for record in found})
    ]
    return {
        "benchmark": "run",
        "name": folder.name,
        "valid": False,
        "doubts": [f"the run left no result, so figures are of all its records: {why}"],
        "events": [],
        "repeats": msgspec.to_builtins(whole),
        "whole": msgspec.to_builtins(whole),
        "summary": measure.summary(whole),
    }


# --- the page -------------------------------------------------------------------------------


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
    _tell_apart([*loaded, base] if base else loaded)
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
    results = [one.data for one in loaded]
    if not story.chapters(results):
        raise ResultError("none of these results has a chapter in a story")
    story.page(results, out, [each["text"] for each in _machines(loaded)])


def _tell_apart(loaded: Sequence[Loaded]) -> None:
    names = [one.name for one in loaded]
    for one, name in zip(loaded, names, strict=True):
        one.namesake = names.count(name) > 1


def _page(
    loaded: Sequence[Loaded], unreadable: Sequence[str], against: Loaded | None
) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    everything = loaded
    loaded = [one for one in loaded if one.kind not in story.ONLY_CHAPTERS]
    locusts = [one for one in loaded if one.kind == "locust"]
    return {
        "title": _title(everything),
        "started": _span([str(one.data.get("started") or "") for one in everything]),
        "not_valid": [one.name for one in everything if not one.data.get("valid", True)],
        "unreadable": len(unreadable),
        "ran": [_ran(one) for one in everything],
        "machines": _machines(everything),
        "doubts": _doubts(everything, unreadable),
        "chapters": story.chapters([one.data for one in everything]),
        "headline": _headline(loaded),
        "kinds": _kinds(loaded),
        "cdfs": _cdfs(loaded),
        "throughput": _throughput(loaded),
        "searches": [_search(one) for one in loaded if "points" in one.data],
        "timelines": [_timeline(one, place) for place, one in enumerate(_served(loaded))],
        "heats": [_heat(one, place) for place, one in enumerate(_served(loaded))],
        "comparison": _comparison(loaded, against),
        "matrices": [_matrix(one) for one in loaded if one.kind in _CELLS],
        "locusts": [_locust(one) for one in locusts],
        "needed": {p: interval.samples_needed(p / 100) for p in (50, 90, 95, 99)},
    }


def _title(loaded: Sequence[Loaded]) -> str:
    """The name of a single result; else the model, where it was the same in all."""
    if len(loaded) == 1:
        return loaded[0].name
    of = ((one.data.get("target") or {}).get("model") or one.data.get("model") for one in loaded)
    models = {model for model in of if model}
    return (
        f"{models.pop()}, {len(loaded)} results" if len(models) == 1 else f"{len(loaded)} results"
    )


def _span(started: Iterable[str]) -> str:
    """When it was: the first start, and the last where that is another."""
    times = sorted(time.replace("T", " ").replace("+00:00", " UTC") for time in started if time)
    return " to ".join(dict.fromkeys([times[0], times[-1]])) if times else ""


def _ran(one: Loaded) -> dict[str, Any]:
    """What was run, in pairs of a term and what stands for it; what is not known is left out."""
    data, target = one.data, one.data.get("target") or {}
    repeats = len(data.get("repeats") or [])
    slo = data.get("slo") or {}
    pairs = {
        "target": target.get("url"),
        "model": target.get("model") or data.get("model"),
        "endpoint": target.get("endpoint"),
        "workload": data.get("workload"),
        "load": data.get("load"),
        "SLO": ", ".join(f"{key} {value}" for key, value in slo.items() if value is not None),
        "repeats": repeats if repeats > 1 else None,
        "seed": data.get("seed"),
        "started": _span([str(data.get("started") or "")]),
        "commit": data.get("commit"),
    }
    return {
        "name": one.name,
        "kind": one.kind,
        "command": str(data.get("command") or ""),
        "pairs": {key: value for key, value in pairs.items() if value not in (None, "")},
    }


def _machines(loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Each machine once, with the results that were measured from it."""
    found: dict[bytes, dict[str, Any]] = {}
    for one in loaded:
        machine = one.data.get("machine") or {}
        key = msgspec.json.encode(machine)
        found.setdefault(key, {"text": _machine(machine), "names": []})["names"].append(one.name)
    return list(found.values())


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
    found = [
        {"name": one.name, "doubts": one.data.get("doubts") or []}
        for one in loaded
        if one.data.get("doubts") or not one.data.get("valid", True)
    ]
    if unreadable:
        found.append({"name": "not in this report", "doubts": list(unreadable)})
    return found


# --- figures in tables ----------------------------------------------------------------------


def _cell(summary: Mapping[str, Any], metric: str, ok: int | None) -> dict[str, Any]:
    """One figure of a table: its text, its interval and, where it is absent, why.

    Args:
        ok: see `_fewest`.
    """
    text, half = figures.with_interval(summary, metric)
    if not text:
        short, why = _why(metric, ok)
        return {"metric": metric, "value": None, "text": "—", "range": short, "why": why}
    value, half = summary[metric]["mean"], f"± {half}" if half else ""
    return {"metric": metric, "value": value, "text": text, "range": half, "why": ""}


def _why(metric: str, ok: int | None) -> tuple[str, str]:
    """Why a metric is absent, in a word or two and in a sentence."""
    if ok is None:
        return "", "this result does not have it"
    if metric == "goodput_per_s":
        return "no SLO", "no SLO was given"
    if not ok:
        return "", "nothing succeeded"
    percent = metric.rpartition("_p")[2].removesuffix("_s")
    needed = interval.samples_needed(int(percent) / 100) if percent.isdigit() else 0
    if ok < needed:
        return f"{ok}/{needed}", f"needs {needed} samples in each repeat; there were {ok}"
    return "", "not measured"


def _fewest(repeats: Sequence[Mapping[str, Any]] | None) -> int | None:
    """Successes in the repeat that has the fewest; None where there are no repeats."""
    return min((int(repeat["ok"]) for repeat in repeats or []), default=None)


def _headline(loaded: Sequence[Loaded]) -> dict[str, Any]:
    rows = [row for one in loaded for row in _headline_rows(one)]
    # Where nobody gave an SLO there is no goodput to show.
    groups = [
        (
            heading,
            [
                (metric, name)
                for metric, name in columns
                if metric != "goodput_per_s" or any(metric in row["summary"] for row in rows)
            ],
        )
        for heading, columns in HEADLINE
    ]
    metrics = [metric for _, columns in groups for metric, _ in columns]
    firsts = [columns[0][0] for _, columns in groups]
    for row in rows:
        row["cells"] = [
            _cell(row["summary"], metric, row["ok"]) | {"first": metric in firsts}
            for metric in metrics
        ]
    return {"groups": groups, "rows": rows}


def _headline_rows(one: Loaded) -> list[dict[str, Any]]:
    """A row for a result; of a matrix, its fastest cell; of a search, the point it found."""
    if one.kind in _CELLS:
        cells = one.data.get("cells") or []
        best = max(cells, key=_throughput_of, default=None)
        if best is None:
            return []
        note = f"fastest of {len(cells)} cells: {best['name']}"
        return [_headline_row(one, best, note)]
    if "points" in one.data:
        point = _found_point(one)
        return [_headline_row(one, *point)] if point else []
    return [_headline_row(one, one.data, "")]


def _headline_row(one: Loaded, figures: Mapping[str, Any], note: str) -> dict[str, Any]:
    repeats = figures.get("repeats") or figures.get("measures") or []
    whole = figures.get("whole") or repeats
    counts = f"{sum(int(each['requests']) for each in whole):,} requests"
    if len(repeats) > 1:
        counts += f" in {len(repeats)} repeats"
    return {
        "name": one.name,
        "notes": [part for part in (note, counts) if part],
        "summary": figures.get("summary") or {},
        "ok": _fewest(repeats),
        "valid": one.data.get("valid", True),
    }


def _throughput_of(figures: Mapping[str, Any]) -> float:
    found = (figures.get("summary") or {}).get("output_tokens_per_s") or {}
    return float(found.get("mean") or 0.0)


def _kinds(loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
    """Classes of requests that were served beside each other; of the first repeat."""
    found = []
    for one in loaded:
        repeat = (one.data.get("repeats") or [{}])[0]
        kinds = {k: v for k, v in (repeat.get("kinds") or {}).items() if k != "example"}
        if len(kinds) < 2:
            continue
        rows = [
            {
                "name": name,
                "requests": kind["requests"],
                "failed": kind["failed"],
                "cells": [
                    _plain(kind.get(metric), metric, kind["requests"] - kind["failed"])
                    for metric in ("ttft_p50_s", "ttft_p95_s", "e2e_p50_s", "user_tokens_per_s")
                ],
            }
            for name, kind in kinds.items()
        ]
        found.append({"name": one.name, "rows": rows, "fairness": repeat.get("fairness")})
    return found


def _plain(value: float | None, metric: str, ok: int | None) -> dict[str, Any]:
    """A figure without an interval."""
    return _cell({} if value is None else {metric: {"mean": value}}, metric, ok)


# --- plots ----------------------------------------------------------------------------------


def _served(loaded: Sequence[Loaded]) -> list[Loaded]:
    """Results with one load, which have latencies to plot."""
    return [one for one in loaded if one.kind not in _CELLS and "points" not in one.data]


def _cdfs(loaded: Sequence[Loaded]) -> dict[str, Any]:
    """Latencies of single requests, one curve a result."""
    absent, curves = [], []
    for one in _served(loaded):
        measured = one.measured()
        if measured:
            curves.append((one.name, measured))
        if one.records_absent or not measured:
            absent.append(f"{one.name}: {one.records_absent or 'no request succeeded'}")
    panels = []
    for title, of in (
        ("Time to first token", measure.ttft_s),
        ("Time per output token", measure.tpot_s),
        ("End to end", measure.e2e_s),
    ):
        series = [
            (name, [value for record in measured if (value := of(record)) is not None])
            for name, measured in curves
        ]
        panels.append((title, series))
    drawn = [panel for panel in panels if any(values for _, values in panel[1])]
    if curves and len(drawn) < len(panels):
        absent += [f"{title}: no request has it" for title, _ in panels if (title, _) not in drawn]
    svg = plots.cdfs(drawn, "cdf") if drawn else ""
    return {
        "svg": Markup(svg),
        "absent": absent if curves or absent else ["no single run is in this report"],
    }


def _throughput(loaded: Sequence[Loaded]) -> dict[str, Any]:
    """Throughput against latency, of whatever was measured at several loads."""
    found = [("", [line for one in loaded for line in _of_search(one)])]
    found += [(one.name, _of_cells(one)) for one in loaded]
    figures = [
        {"name": name, "svg": Markup(svg)}
        for place, (name, lines) in enumerate(found)
        if (svg := _curves(lines, f"throughput{place}"))
    ]
    why = "nothing was measured at more than one load: that takes a sweep, a search or a matrix"
    return {"figures": figures, "absent": [] if figures else [why]}


def _curves(lines: Sequence[tuple[str, "_Points"]], prefix: str) -> str:
    """Both latencies over throughput; empty where no point has them."""
    panels = []
    for metric, title in (
        ("ttft_p50_s", "Time to first token, median"),
        ("tpot_p50_s", "Time per output token, median"),
    ):
        drawn = [_curve(name, points, metric) for name, points in lines]
        panels.append((title, "milliseconds (log)", [curve for curve in drawn if curve.x]))
    panels = [panel for panel in panels if panel[2]]
    return plots.curves(panels, "output tokens/s, all users together", prefix) if panels else ""


_Points = Sequence[tuple[str, Mapping[str, Any]]]  # (what the load was, summary)


def _of_search(one: Loaded) -> list[tuple[str, _Points]]:
    points = one.data.get("points") or []
    return [(one.name, [(_load_of(p), p.get("summary") or {}) for p in points])] if points else []


def _of_cells(one: Loaded) -> list[tuple[str, _Points]]:
    """A curve for each pair of lengths, over users."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for each in one.data.get("cells") or []:
        cell = each["cell"]
        name = f"{cell['input_tokens']} tokens in, {cell['output_tokens']} out"
        found.setdefault(name, []).append((f"{cell['users']}", each.get("summary") or {}))
    return list(found.items())


def _curve(name: str, points: _Points, metric: str) -> Curve:
    known = [
        (summary["output_tokens_per_s"]["mean"], summary[metric]["mean"] * 1e3, load)
        for load, summary in points
        if metric in summary and "output_tokens_per_s" in summary
    ]
    return Curve(
        label=name,
        x=[x for x, _, _ in known],
        y=[y for _, y, _ in known],
        notes=[load for _, _, load in known],
    )


def _load_of(point: Mapping[str, Any]) -> str:
    return f"{point['users']}" if "users" in point else f"{point.get('rate', 0):.3g}/s"


def _found_point(one: Loaded) -> tuple[Mapping[str, Any], str] | None:
    for key, what in (("users", "users, where it levels off"), ("rate", "requests/s")):
        at = one.data.get(key)
        for point in one.data["points"]:
            if at is not None and point.get(key) == at:
                return point, f"at {at:.3g} {what}"
    return None


def _search(one: Loaded) -> dict[str, Any]:
    """The points of a search, and what it found."""
    data = one.data
    rows = []
    for point in data["points"]:
        summary, ok = point.get("summary") or {}, _fewest(point.get("measures"))
        share = point.get("share") or {}
        verdict = point.get("verdict") or ("resolved" if point.get("resolved") else "unresolved")
        rows.append(
            {
                "load": _load_of(point),
                "verdict": verdict,
                "looks": point.get("looks"),
                "good": f"{share['good']} of {share['counted']}" if share.get("counted") else "",
                "cells": [
                    _cell(summary, metric, ok)
                    for metric in (
                        "output_tokens_per_s",
                        "requests_per_s",
                        "ttft_p50_s",
                        "ttft_p99_s",
                        "tpot_p50_s",
                        "tpot_p99_s",
                    )
                ],
            }
        )
    return {"name": one.name, "rows": rows, "by_rate": "rate" in data, **_verdict(data)}


def _verdict(data: Mapping[str, Any]) -> dict[str, Any]:
    resolved, reason = bool(data.get("resolved")), str(data.get("reason") or "")
    if "rate" in data:
        rate, fails = data["rate"], data.get("fails_at")
        text = "no rate passed" if rate is None else f"{rate:.3g} requests/s kept the objective"
        text += f"; {fails:.3g} did not" if fails is not None else ""
    else:
        users, tokens = data.get("users"), data.get("tokens_per_s")
        text = "nothing was answered"
        if users is not None and tokens:
            rate = f"{figures.number(tokens)} output tokens/s"
            text = f"throughput levels off at {users} users, at {rate}"
    return {"text": text, "resolved": resolved, "reason": reason}


# --- over time ------------------------------------------------------------------------------


def _timeline(one: Loaded, place: int) -> dict[str, Any]:
    """The first repeat, with what the server said of itself meanwhile."""
    shown: dict[str, Any] = {"name": one.name, "repeats": len(one.data.get("repeats") or [])}
    mine = one.of_repeat(0)
    if not mine:
        return shown | {"svg": "", "absent": [one.records_absent or "it has no first repeat"]}
    end_s = max(record.end_s or record.planned_s for record in mine)
    step_s = _step_s(end_s)
    line = measure.timeline(mine, step_s)
    panels = [
        Panel(
            title="Requests under way",
            y_title="requests",
            curves=[Curve(label="under way", x=line.t_s, y=line.running)],
            filled=(0,),
        ),
        Panel(
            title="Output",
            y_title="tokens/s",
            curves=[Curve(label="output tokens", x=line.t_s, y=line.output_tokens_per_s)],
            filled=(0,),
        ),
        Panel(
            title="Requests planned, and failed",
            y_title="requests/s",
            curves=[
                Curve(label="planned", x=line.t_s, y=line.planned_per_s),
                Curve(label="failed", x=line.t_s, y=line.failed_per_s),
            ],
            filled=(1,),
        ),
    ]
    server, absent = _server_panels(one)
    window = one.window(0)
    events = [
        (float(event["at_s"]), str(event["what"]))
        for event in one.data.get("events") or []
        if event.get("repeat", 0) == 0
    ]
    shaded = [window] if window else []
    svg = plots.timeline([*panels, *server], f"time{place}", shaded, events)
    return shown | {"svg": Markup(svg), "absent": absent, "step_s": step_s, "steady": bool(window)}


def _step_s(duration_s: float) -> float:
    """A round length for the steps of a timeline."""
    for step_s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0):
        if duration_s / step_s <= _STEPS:
            return step_s
    return duration_s / _STEPS


def _server_panels(one: Loaded) -> tuple[list[Panel], list[str]]:
    """What was scraped in the first repeat; what was not is named."""
    server = one.data.get("server") or []
    samples = server[0] if server and isinstance(server[0], list) else server
    if not samples:
        return [], ["the server's own metrics: none were scraped"]
    wanted = (
        ("Server: requests waiting and running", "requests", ("waiting", "running"), 1.0, None),
        ("Server: KV cache in use", "%", ("kv_usage",), 100.0, 100.0),
        (
            "Server: prompt tokens found in the prefix cache",
            "%",
            ("prefix_hit_rate",),
            100.0,
            100.0,
        ),
        (
            "Server: replicas",
            "replicas",
            ("replicas", "wanted", "starting", "stopping"),
            1.0,
            None,
        ),
    )
    panels, absent = [], []
    for title, unit, names, scale, top in wanted:
        curves = [_sampled(samples, name, scale) for name in names]
        known = [curve for curve in curves if curve.x]
        if known:
            low = len(known) == 1
            panels.append(Panel(title=title, y_title=unit, curves=known, top=top, low=low))
        else:
            absent.append(f"{title}: the server does not say")
    preemptions = _sampled(samples, "preemptions", 1.0)
    if any(preemptions.y):
        title = "Server: preemptions so far"
        panels.append(Panel(title=title, y_title="requests", curves=[preemptions], low=True))
    return panels, absent


def _sampled(samples: Sequence[Mapping[str, Any]], name: str, scale: float) -> Curve:
    known = [(s["t_s"], s[name] * scale) for s in samples if s.get(name) is not None]
    return Curve(label=name.replace("_", " "), x=[t for t, _ in known], y=[y for _, y in known])


def _heat(one: Loaded, place: int) -> dict[str, Any]:
    """Gaps between the tokens of the first repeat, over time."""
    at_s: list[float] = []
    gaps_s: list[float] = []
    for record in one.of_repeat(0):
        if record.ok:
            at_s += record.chunk_s[1:]
            gaps_s += measure.itl_s(record)
    if not gaps_s:
        why = one.records_absent or "no answer came in more than one piece"
        return {"name": one.name, "svg": "", "absent": [why]}
    svg = plots.heat(at_s, gaps_s, "seconds since the token before (log)", f"heat{place}")
    return {"name": one.name, "svg": Markup(svg), "absent": []}


# --- matrices -------------------------------------------------------------------------------


def _matrix(one: Loaded) -> dict[str, Any]:
    """Small heat tables: a row for each pair of lengths, a column for each number of users."""
    cells = one.data.get("cells") or []
    keys = [each["cell"] for each in cells]
    users = sorted({key["users"] for key in keys})
    lengths = sorted({(key["input_tokens"], key["output_tokens"]) for key in keys})
    by_place = {
        (each["cell"]["input_tokens"], each["cell"]["output_tokens"], each["cell"]["users"]): each
        for each in cells
    }
    tables = []
    for metric, title, more_is_better in _MATRIX:
        rows = [
            {
                "input": read,
                "output": written,
                "cells": [_matrix_cell(by_place.get((read, written, n)), metric) for n in users],
            }
            for read, written in lengths
        ]
        _shade([cell for row in rows for cell in row["cells"]])
        tables.append({"title": title, "rows": rows, "good": more_is_better})
    absent = [] if cells else [f"{one.name}: no cell was measured"]
    shown = {"name": one.name, "kind": one.kind, "users": users}
    return shown | {"tables": tables if cells else [], "absent": absent}


def _matrix_cell(each: Mapping[str, Any] | None, metric: str) -> dict[str, Any]:
    if each is None:
        absent = _plain(None, metric, 0)
        return absent | {"why": "this cell was not measured"}
    return _cell(each.get("summary") or {}, metric, _fewest(each.get("repeats")))


def _shade(cells: Iterable[dict[str, Any]]) -> None:
    """How dark each cell is, 0 to 100, evenly in the logarithm: cells differ by factors."""
    every = list(cells)
    logs = [math.log(cell["value"]) for cell in every if cell["value"]]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    for cell in every:
        share = (math.log(cell["value"]) - low) / (high - low or 1.0) if cell["value"] else 0.0
        cell["shade"] = round(8 + 47 * share) if cell["value"] else 0


# --- Locust ---------------------------------------------------------------------------------


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


def _locust(one: Loaded) -> dict[str, Any]:
    """The demo-day summary."""
    data = one.data
    ok = _fewest(data.get("repeats"))
    tiles = [("requests/s", "requests_per_s"), ("output tokens/s", "output_tokens_per_s")]
    latencies = [
        (f"{title} {statistic}, {unit}", f"{latency}_{statistic}_s")
        for latency, title, unit in (("e2e", "whole answer", "s"), ("ttft", "first token", "ms"))
        for statistic in ("mean", "p50", "p95", "p99")
    ]
    return {
        "name": one.name,
        "users": data.get("users"),
        "failed": _failed(data),
        "steady": bool(data.get("steady")),
        "tiles": [
            {"label": label, **_plain(data.get(metric), metric, ok)}
            for label, metric in (*tiles, *latencies)
        ],
        "errors": data.get("errors") or [],
        "examples": [{**example, "took": _took(example)} for example in data.get("examples") or []],
        "examples_absent": data.get("examples_absent") or "none were asked",
    }


# --- baseline against now -------------------------------------------------------------------


def _comparison(loaded: Sequence[Loaded], against: Loaded | None) -> dict[str, Any]:
    """Each result beside the one it is to be held against: `against`, or the engine alone."""
    pairs, absent = [], []
    for one in loaded:
        if against is not None and _comparable(against, one):
            pairs.append((against, one))
        elif against is not None:
            absent.append(f"{one.name}: a {one.kind} cannot be held against a {against.kind}")
    alone = [one for one in loaded if one.kind == "baseline"]
    if against is None:
        pairs = [(base, one) for base in alone for one in loaded if one.kind == "matrix"]
        absent = [] if pairs else ["no baseline was given: use --against FOLDER"]
    shown = []
    for place, (base, now) in enumerate(pairs):
        try:
            shown.append(_compared(base, now, place))
        except ResultError as error:
            absent.append(f"{now.name} against {base.name}: {error}")
    return {"pairs": shown, "absent": absent}


def _comparable(base: Loaded, now: Loaded) -> bool:
    return base.kind == now.kind or (base.kind in _CELLS and now.kind in _CELLS)


def _compared(base: Loaded, now: Loaded, place: int) -> dict[str, Any]:
    rows = compare.compare(base.data, now.data)
    if "baseline" in (base.kind, now.kind):
        # An engine in this process has no stream, hence no gaps between tokens.
        rows = [row for row in rows if not row.metric.startswith("itl_")]
    panels = _ratio_panels(rows)
    svg = plots.ratios(panels, "now / baseline (log)", f"ratio{place}") if panels else ""
    return {
        "base": base.name,
        "now": now.name,
        "svg": Markup(svg),
        "rows": [_compared_row(row) for row in rows],
        "notes": [
            note.replace("A is", f"{base.name} is", 1).replace("B is", f"{now.name} is", 1)
            for note in compare.notes(base.data, now.data)
        ],
    }


def _ratio_panels(rows: Sequence[compare.Row]) -> list[tuple[str, list[Ratio]]]:
    """One panel of all metrics for a run; for cells, one for each metric that a matrix shows."""
    if rows and not rows[0].cell:
        return [("", [_ratio(row, figures.title(row.metric)) for row in rows])]
    metrics = [metric for metric, _, _ in _MATRIX]
    by_cell: dict[str, dict[str, compare.Row]] = {}
    for row in rows:
        by_cell.setdefault(row.cell, {})[row.metric] = row
    whole = [found for found in by_cell.values() if all(metric in found for metric in metrics)]
    if not whole:
        return []
    return [
        (figures.title(metric), [_ratio(found[metric], found[metric].cell) for found in whole])
        for metric in metrics
    ]


def _ratio(row: compare.Row, label: str) -> Ratio:
    return Ratio(label=label, ratio=row.ratio, low=row.low, high=row.high, verdict=row.verdict)


def _compared_row(row: compare.Row) -> dict[str, Any]:
    unit, scale = figures.scale(row.metric)
    known = row.low is not None and row.high is not None
    return {
        "metric": row.metric,
        "title": figures.title(row.metric),
        "cell": row.cell,
        "unit": unit or "per s",
        "a": figures.number(row.a * scale),
        "b": figures.number(row.b * scale),
        "value": row.ratio,
        "ratio": f"{row.ratio:.3f}",
        "range": f"{row.low:.3f} to {row.high:.3f}" if known else "one repeat: none",
        "verdict": row.verdict,
    }
