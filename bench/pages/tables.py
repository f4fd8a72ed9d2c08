"""Figures of a report in tables: the headline, and classes of requests beside each other."""

from collections.abc import Mapping, Sequence

import msgspec

from bench import interval
from bench.figures import Load, Run
from bench.matrix import Matrix
from bench.measure import Kind, Mean, Measures, Sessions, Turn
from bench.pages import figures
from bench.pages.loaded import Loaded
from bench.pareto import Curve
from bench.search import RatePoint, RateResult, SweepResult, UsersPoint

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
    (
        "Tokens of a request",
        (
            ("input_tokens", "prompt"),
            ("output_tokens", "answer"),
            ("cached_share", "from prefix cache"),
        ),
    ),
    (
        "Cost",
        (
            ("joules_per_output_token", "J a token out"),
            ("usd_per_million_output_tokens", "$ a million out"),
        ),
    ),
)
# What only some results have: the column is left out where none of a report does.
_OPTIONAL = (
    "goodput_per_s",
    "cached_share",
    "joules_per_output_token",
    "usd_per_million_output_tokens",
)


class Cell(msgspec.Struct, kw_only=True):
    """One figure of a table.

    Attributes:
        value: None where it is absent; `why` then says why.
        range: half of its interval, or the reason of its absence in a word or two.
        shade: of a matrix, from 0 to 100; first: of a group of columns.
    """

    metric: str
    value: float | None = None
    text: str = "—"
    range: str = ""
    why: str = ""
    shade: int = 0
    first: bool = False


def cell(summary: Mapping[str, Mean], metric: str, ok: int | None) -> Cell:
    """One figure of a table: its text, its interval and, where it is absent, why.

    Args:
        ok: see `fewest`.
    """
    text, half = figures.with_interval(summary, metric)
    if not text:
        short, why = _why(metric, ok)
        return Cell(metric=metric, range=short, why=why)
    half = f"± {half}" if half else ""
    return Cell(metric=metric, value=summary[metric]["mean"], text=text, range=half)


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


def fewest(repeats: Sequence[Measures]) -> int | None:
    """Successes in the repeat that has the fewest; None where there are no repeats."""
    return min((repeat.ok for repeat in repeats), default=None)


class HeadlineRow(msgspec.Struct, kw_only=True):
    """A result in the headline table; `ok` as of `fewest`."""

    name: str
    notes: list[str]
    summary: dict[str, Mean]
    ok: int | None
    valid: bool
    cells: list[Cell] = []


class Headline(msgspec.Struct, kw_only=True):
    """The headline table; `groups` are of columns that some row has."""

    groups: list[tuple[str, list[tuple[str, str]]]]
    rows: list[HeadlineRow]


def headline(loaded: Sequence[Loaded]) -> Headline:
    rows = [row for result in loaded for row in _headline_rows(result)]
    groups = [
        (
            heading,
            [
                (metric, name)
                for metric, name in columns
                if metric not in _OPTIONAL or any(metric in row.summary for row in rows)
            ],
        )
        for heading, columns in HEADLINE
    ]
    groups = [(heading, columns) for heading, columns in groups if columns]
    metrics = [metric for _, columns in groups for metric, _ in columns]
    firsts = [columns[0][0] for _, columns in groups]
    for row in rows:
        row.cells = [cell(row.summary, metric, row.ok) for metric in metrics]
        for each in row.cells:
            each.first = each.metric in firsts
    return Headline(groups=groups, rows=rows)


def _headline_rows(result: Loaded) -> list[HeadlineRow]:
    """A row for a result; of a matrix, its fastest cell; of a search, the point it found."""
    match result.data:
        case Matrix(cells=cells):
            if not cells:
                return []
            best = max(cells, key=_throughput_of)
            return [_run_row(result, best, f"fastest of {len(cells)} cells: {best.name}")]
        case Curve():
            return []
        case SweepResult() | RateResult() as found:
            point, note = found_point(found)
            if point is None:
                return []
            return [_headline_row(result, note, point.measures, point.measures, point.summary)]
        case Load() as load:
            return [_run_row(result, load, "")]
        case _:
            return [_headline_row(result, "", [], [], {})]


def _run_row(result: Loaded, load: Load, note: str) -> HeadlineRow:
    summary = load.summary | _requests(load.repeats)
    if isinstance(load, Run):
        summary |= load.efficiency
    return _headline_row(result, note, load.repeats, load.whole, summary)


def _headline_row(
    result: Loaded,
    note: str,
    repeats: Sequence[Measures],
    whole: Sequence[Measures],
    summary: dict[str, Mean],
) -> HeadlineRow:
    counts = f"{sum(each.requests for each in whole or repeats):,} requests"
    if len(repeats) > 1:
        counts += f" in {len(repeats)} repeats"
    return HeadlineRow(
        name=result.name,
        notes=[part for part in (note, counts) if part],
        summary=summary | _requests(repeats),
        ok=fewest(repeats),
        valid=result.data.valid,
    )


def _requests(repeats: Sequence[Measures]) -> dict[str, Mean]:
    """How long requests were and what of them was cached: means over repeats, where known."""
    cells: dict[str, Mean] = {}
    for name in ("input_tokens", "output_tokens", "cached_share"):
        values = [getattr(repeat.answers, name) for repeat in repeats]
        present = [value for value in values if value is not None]
        if present:
            cells[name] = {"mean": sum(present) / len(present), "low": None, "high": None}
    return cells


def _throughput_of(load: Load) -> float:
    name = "output_tokens_per_s"
    return load.summary[name]["mean"] if name in load.summary else 0.0


class Class(msgspec.Struct, kw_only=True):
    """A class of requests: their kind, or their turn in a session."""

    name: str
    requests: int
    failed: int
    cells: list[Cell]


class Classes(msgspec.Struct, kw_only=True):
    """Classes of requests beside each other; of sessions also what became of them."""

    name: str
    rows: list[Class]
    fairness: float | None = None
    sessions: Sessions | None = None


def kinds(loaded: Sequence[Loaded]) -> list[Classes]:
    """Classes of requests that were served beside each other; of the first repeat."""
    shown = ("ttft_p50_s", "ttft_p95_s", "e2e_p50_s", "user_tokens_per_s")
    kinds_of = []
    for result in loaded:
        repeat = result.repeats[0] if result.repeats else Measures()
        kinds = {name: kind for name, kind in repeat.kinds.items() if name != "example"}
        if len(kinds) > 1:
            rows = [_class(name, kind, shown) for name, kind in kinds.items()]
            kinds_of.append(Classes(name=result.name, rows=rows, fairness=repeat.fairness))
    return kinds_of


def sessions(result: Loaded) -> Classes | None:
    """The sessions of a result, of its first repeat; None where it had none."""
    each = result.data.sessions if isinstance(result.data, Run) else []
    if not each or each[0] is None:
        return None
    shown = ["input_tokens", "output_tokens", "cached_share", "reusable_share"]
    shown += ["ttft_mean_s", "ttft_p50_s", "ttft_p95_s", "e2e_mean_s"]
    rows = [_class(turn.name, turn, shown) for turn in each[0].turns]
    return Classes(name=result.name, rows=rows, sessions=each[0])


def _class(name: str, figures_of: Kind | Turn, metrics: Sequence[str]) -> Class:
    requests, failed = figures_of.requests, figures_of.failed
    cells = [plain(getattr(figures_of, metric), metric, requests - failed) for metric in metrics]
    return Class(name=name, requests=requests, failed=failed, cells=cells)


def plain(value: float | None, metric: str, ok: int | None) -> Cell:
    """A figure without an interval."""
    summary: dict[str, Mean] = {}
    if value is not None:
        summary[metric] = {"mean": value, "low": None, "high": None}
    return cell(summary, metric, ok)


def found_point(
    result: SweepResult | RateResult,
) -> tuple[UsersPoint | RatePoint | None, str]:
    """The point that a search found, and what it is."""
    if isinstance(result, RateResult):
        by_rate = {point.rate: point for point in result.points}
        if result.rate in by_rate:
            return by_rate[result.rate], f"at {result.rate:.3g} requests/s"
        return None, ""
    by_users = {point.users: point for point in result.points}
    if result.users in by_users:
        return by_users[result.users], f"at {result.users} users, where it levels off"
    return None, ""
