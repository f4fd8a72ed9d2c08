"""Two results side by side: what differs, by how much, and whether that is more than noise.

Pure; `compare` refuses two results of which different things were asked: a difference would be that
of the loads.

There are thirty metrics, and as many for each cell of a matrix. If each were tested by itself, two
equal servers would differ in some of them nearly always. So the rows are tested together by
Benjamini and Hochberg's procedure: of equal servers one pair in twenty differs anywhere, and of the
rows that are said to differ one in twenty is wrong on average. All intervals are as wide as that
takes (Benjamini and Yekutieli), so a row differs exactly where its interval excludes 1.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal, get_args

import msgspec

from bench import interval
from bench.errors import ResultError
from bench.figures import Load, Run
from bench.matrix import Matrix
from bench.measure import METRICS, Measures
from bench.result import Result

# Where nothing can be said, as of a single repeat, the verdict is "unknown".
Verdict = Literal["better", "worse", "noise", "unknown"]

_ROUNDING = 1e-9
# What was asked: where it differs, a difference is not that of the servers.
_ASKED = ("workload", "load", "count", "duration_s")
# What may differ with the servers, and is told.
_SETTING = ("benchmark", "actors", "slo", "machine")
_BY_SLO = ("goodput_per_s", "good_share")


class Row(msgspec.Struct, kw_only=True, frozen=True):
    """One metric of both results.

    Attributes:
        cell: of a matrix; empty for a run.
        better: which way is better, "higher" or "lower".
        a, b: means over repeats.
        ratio: b / a, of pairs the geometric mean over them; low and high are its interval at the
            level of all rows together, None where there is none.
        p: how likely a ratio as far from 1 is of equal servers, by this row alone; None likewise.
        verdict: of b.
    """

    metric: str
    cell: str = ""
    better: str
    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    p: float | None
    verdict: Verdict


def compare(
    a: Result,
    b: Result,
    interleaved: bool | None = None,
    confidence: float = interval.CONFIDENCE,
    anyway: bool = False,
) -> list[Row]:
    """Each metric that both have, as the ratio of b to a.

    Args:
        a, b: results with repeats (a run, Locust), or with cells (a matrix, an offline baseline),
            of which those are compared that both have.
        interleaved: whether repeats were taken in turn, a, b, a, b. If so, and also if nobody
            knows (None), the first is compared with the first and so on: that is right in either
            case, and what both share, as a colder first repeat, cancels. False: Welch's interval,
            which is narrower where the repeats have nothing in common. That is also taken where
            the numbers of repeats differ.
        confidence: that equal servers differ nowhere.
        anyway: also where the results were not asked the same.

    Raises:
        ResultError: one has neither repeats nor cells, they have nothing in common, or they were
            not asked the same.
    """
    ours, theirs = _repeats(a, "first"), _repeats(b, "second")
    cells = [cell for cell in ours if cell in theirs]
    if not cells:
        raise ResultError(
            "the results have nothing in common: "
            f"{', '.join(map(_named, ours))} against {', '.join(map(_named, theirs))}"
        )
    if not anyway and (other := _asked_otherwise(a, b)):
        raise ResultError(f"the results cannot be compared: {'; '.join(other)}")
    same_slo = _value(a, "slo") == _value(b, "slo")
    metrics = [name for name in METRICS if same_slo or name not in _BY_SLO]
    pairs = [
        pair
        for cell in cells
        for metric in metrics
        if (pair := _pair(cell, metric, ours[cell], theirs[cell], interleaved))
    ]
    level = _level([ratio.p() for pair in pairs if (ratio := pair.ratio)], 1 - confidence)
    return [pair.row(1 - level) for pair in pairs]


def _asked_otherwise(a: Result, b: Result) -> list[str]:
    """What was asked of one only. Cells of a matrix are told apart by their names."""
    if isinstance(a, Matrix) and isinstance(b, Matrix):
        return []
    return _differences(_ASKED, a, b)


def _differences(names: Iterable[str], a: Result, b: Result) -> list[str]:
    pairs = ((name, _value(a, name), _value(b, name)) for name in names)
    return [f"{name} differs: {_short(x)} against {_short(y)}" for name, x, y in pairs if x != y]


def _value(result: Result, name: str) -> object:
    """None where this kind of result has no such field. Of load actors, how many there were."""
    if name == "actors" and isinstance(result, Run):
        return max((len(actor.where) for actor in result.actors), default=None)
    return getattr(result, name, None)


def _level(p_values: Sequence[float], error: float) -> float:
    """Benjamini and Hochberg: the greatest p that is a discovery among these, or what one must be
    below where there is none."""
    count = len(p_values)
    limits = [error * place / count for place in range(1, count + 1)]
    passing = [limit for p, limit in zip(sorted(p_values), limits, strict=True) if p <= limit]
    return max(passing, default=error / max(1, count))


def notes(a: Result, b: Result) -> list[str]:
    """What a reader should know before the ratios: doubts, other settings, failures."""
    lines = [
        f"{name} is doubtful: {doubt}"
        for name, result in (("A", a), ("B", b))
        for doubt in result.doubts
    ]
    lines += _differences((*_ASKED, *_SETTING), a, b)
    ours, theirs = _wholes(a), _wholes(b)
    lines += [
        note
        for cell in ours
        if cell in theirs and (note := _failures(cell, ours[cell], theirs[cell]))
    ]
    return lines


def table(rows: Sequence[Row], notes: Iterable[str] = ()) -> str:
    """Text for a console: a line for each row, then how many differ, then the notes."""
    lines = [("", "A", "B", "B/A", "interval", "")]
    for row in rows:
        between = "" if row.low is None else f"{row.low:.3f} to {row.high:.3f}"
        name = f"{row.cell}: {row.metric}" if row.cell else row.metric
        lines.append(
            (name, f"{row.a:.4g}", f"{row.b:.4g}", f"{row.ratio:.3f}", between, row.verdict)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    text = [
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(
            f"{value:>{width}}" for value, width in zip(line[1:5], widths[1:5], strict=True)
        )
        + f"  {line[5]}"
        for line in lines
    ]
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in get_args(Verdict)}
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return "\n".join(
        [*(line.rstrip() for line in text), verdicts, *(f"! {note}" for note in notes)]
    )


def _loads(result: Result) -> dict[str, Load]:
    """The loads of a matrix by the name of their cell; a single one is under ""."""
    if isinstance(result, Matrix):
        return {cell.cell.name: cell for cell in result.cells}
    return {"": result} if isinstance(result, Load) else {}


def _repeats(result: Result, which: str) -> dict[str, list[Measures]]:
    """The measures of the repeats of each cell."""
    repeats = {name: load.repeats for name, load in _loads(result).items() if load.repeats}
    if not repeats:
        kind = result.benchmark
        raise ResultError(f"the {which} result has neither repeats nor cells: benchmark = {kind!r}")
    return repeats


def _wholes(result: Result) -> dict[str, list[Measures]]:
    return {name: load.whole for name, load in _loads(result).items()}


def _named(cell: str) -> str:
    return cell or "a run"


class _Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of both results, repeat by repeat."""

    cell: str
    metric: str
    under: list[float]
    over: list[float]
    paired: bool

    @property
    def ratio(self) -> interval.Ratio | None:
        of = interval.paired_ratio if self.paired else interval.ratio
        return of(self.over, self.under)

    def row(self, confidence: float) -> Row:
        interval_of = self.ratio
        bounds = None if interval_of is None else interval_of.bounds(confidence)
        low, high = bounds or (None, None)
        ratio = fmean(self.over) / fmean(self.under)
        return Row(
            metric=self.metric,
            cell=self.cell,
            better=METRICS[self.metric],
            a=fmean(self.under),
            b=fmean(self.over),
            ratio=math.exp(interval_of.log) if interval_of and self.paired else ratio,
            low=low,
            high=high,
            p=None if interval_of is None else interval_of.p(),
            verdict=_verdict(bounds, METRICS[self.metric]),
        )


def _pair(
    cell: str,
    metric: str,
    a: Sequence[Measures],
    b: Sequence[Measures],
    interleaved: bool | None,
) -> _Pair | None:
    """None where one side has no value, or a mean of 0, which has no ratio."""
    ours, theirs = [getattr(each, metric) for each in a], [getattr(each, metric) for each in b]
    paired = interleaved is not False and len(ours) == len(theirs)
    if paired:  # A repeat without a value takes its partner with it.
        pairs = [(x, y) for x, y in zip(ours, theirs, strict=True) if None not in (x, y)]
        ours, theirs = [x for x, _ in pairs], [y for _, y in pairs]
    over = [float(value) for value in theirs if value is not None]
    under = [float(value) for value in ours if value is not None]
    if not over or not under or not (fmean(over) and fmean(under)):
        return None
    return _Pair(cell=cell, metric=metric, under=under, over=over, paired=paired)


def _verdict(bounds: interval.Bounds | None, better: str) -> Verdict:
    if bounds is None:
        return "unknown"
    if bounds[0] <= 1 + _ROUNDING and bounds[1] >= 1 - _ROUNDING:
        return "noise"
    return "better" if (bounds[0] > 1) == (better == "higher") else "worse"


def _failures(cell: str, a: Sequence[Measures], b: Sequence[Measures]) -> str | None:
    """Said apart, as 0 failures have no ratio; None where the difference may be chance."""
    ours, theirs = _failed(a), _failed(b)
    bounds = interval.of_share_difference(*theirs, *ours)
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return None
    more = "more" if bounds[0] > 0 else "less"
    where = f" in {cell}" if cell else ""
    return (
        f"B fails {more} often{where}: {theirs[0]} of {theirs[1]} requests "
        f"against {ours[0]} of {ours[1]}"
    )


def _failed(repeats: Sequence[Measures]) -> tuple[int, int]:
    return sum(repeat.failed for repeat in repeats), sum(repeat.requests for repeat in repeats)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
