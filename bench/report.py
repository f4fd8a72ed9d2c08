"""One page that shows what was measured: result folders in, a self-contained HTML file out.

    report([Path("results/run"), Path("results/locust")], Path("report.html"), against=None)

Any kinds of results may stand in one report: runs, matrices, searches, in-process baselines,
Locust. What is shown was worked out by `measure`, `search` and `compare`; here it is only laid out.
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

from bench import interval, measure, plots, records, result
from bench.errors import ResultError
from bench.plots import Curve, Panel
from bench.records import Record

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_STEPS = 150  # Of a timeline.
_CELLS = ("matrix", "baseline")
_UNIT = {"ttft": ("ms", 1e3), "tpot": ("ms", 1e3), "itl": ("ms", 1e3), "e2e": ("s", 1.0)}

# The headline table: a heading over columns, each a metric of `measure` and its short name.
HEADLINE: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("Throughput", (("requests_per_s", "requests/s"), ("output_tokens_per_s", "output tokens/s"))),
    (
        "Time to first token, ms",
        (("ttft_p50_s", "p50"), ("ttft_p95_s", "p95"), ("ttft_p99_s", "p99")),
    ),
    (
        "Time per output token, ms",
        (("tpot_p50_s", "p50"), ("tpot_p95_s", "p95"), ("tpot_p99_s", "p99")),
    ),
    ("End to end, s", (("e2e_p50_s", "p50"), ("e2e_p95_s", "p95"), ("e2e_p99_s", "p99"))),
    ("Good", (("goodput_per_s", "within SLO/s"), ("failed_share", "failed"))),
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
        records: all that can be read; `records_absent` says why there are none.
    """

    folder: Path
    data: dict[str, Any]
    records: list[Record] = []
    records_absent: str = ""

    @property
    def kind(self) -> str:
        return str(self.data["benchmark"])

    @property
    def name(self) -> str:
        return str(self.data.get("name") or self.folder.name)

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
    page = _page(loaded, unreadable, load(against) if against else None)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8", errors="replace")


def _page(
    loaded: Sequence[Loaded], unreadable: Sequence[str], against: Loaded | None
) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    locusts = [one for one in loaded if one.kind == "locust"]
    return {
        "title": loaded[0].name if len(loaded) == 1 else f"{len(loaded)} results",
        "started": _span([str(one.data.get("started") or "") for one in loaded]),
        "valid": not unreadable and all(one.data.get("valid", True) for one in loaded),
        "ran": [_ran(one) for one in loaded],
        "machines": _machines(loaded),
        "doubts": _doubts(loaded, unreadable),
        "headline": _headline(loaded),
        "kinds": _kinds(loaded),
        "cdfs": _cdfs(loaded),
        "throughput": _throughput(loaded),
        "searches": [_search(one) for one in loaded if "points" in one.data],
        "timelines": [_timeline(one, place) for place, one in enumerate(_timed(loaded))],
        "heats": [_heat(one, place) for place, one in enumerate(_timed(loaded))],
        "comparison": _comparison(loaded, against),
        "matrices": [_matrix(one) for one in loaded if one.kind in _CELLS],
        "locusts": [_locust(one) for one in locusts],
        "needed": {p: interval.samples_needed(p / 100) for p in (50, 90, 95, 99)},
    }
