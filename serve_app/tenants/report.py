"""What tenants used: the report of a month as HTML, and rows of the ledger as CSV or Parquet."""

import csv
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from serve_app.document import document
from serve_app.errors import ConfigError
from serve_app.tenants.ledger import COLUMNS, Ledger, Total

_DAY_S = 86_400.0
_TEXTS = frozenset({"id", "request_id", "tenant", "model", "adapter", "lane", "route", "outcome"})
_TIMES = frozenset({"began_s", "first_s", "ended_s", "gpu_s", "dollars"})


@dataclass(frozen=True)
class Month:
    """A month of UTC."""

    year: int
    month: int

    @classmethod
    def parse(cls, text: str) -> "Month":
        """Of "2026-11".

        Raises:
            ConfigError: it is none.
        """
        try:
            first = datetime.strptime(text, "%Y-%m")
        except ValueError:
            raise ConfigError("--month", text, "is not a month, such as 2026-11") from None
        return cls(first.year, first.month)

    @property
    def days_s(self) -> list[float]:
        """When its days begin, and the next month's first."""
        day = datetime(self.year, self.month, 1, tzinfo=UTC)
        starts_s = [day.timestamp()]
        while True:
            day += timedelta(days=1)
            starts_s.append(day.timestamp())
            if day.month != self.month:
                return starts_s

    def __str__(self) -> str:
        return f"{self.year}-{self.month:02}"


def rows_of(ledger: Ledger, month: Month, tenant: str | None) -> Iterator[tuple[Any, ...]]:
    """The rows of a month, read day by day."""
    days_s = month.days_s
    for from_s, to_s in pairwise(days_s):
        yield from ledger.rows(from_s, to_s, tenant)


def write_csv(rows: Iterable[Sequence[Any]], file: TextIO) -> None:
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    writer.writerows(rows)


def write_parquet(rows: Iterable[Sequence[Any]], path: Path) -> None:
    """Write rows as Parquet.

    Raises:
        ConfigError: DuckDB, which writes it, is not installed.
    """
    try:
        import duckdb
    except ImportError:
        problem = "Parquet needs duckdb: pip install 'qwen-ray-serve[tenants]'"
        raise ConfigError("--out", str(path), problem) from None
    types = {name: _type_of(name) for name in COLUMNS}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            write_csv(rows, file)
        with duckdb.connect() as connection:
            relation = connection.read_csv(str(table), header=True, dtype=types)
            relation.write_parquet(str(path))


def _type_of(name: str) -> str:
    if name in _TEXTS:
        return "VARCHAR"
    return "DOUBLE" if name in _TIMES else "BIGINT"


def html(ledger: Ledger, month: Month, tenant: str | None) -> str:
    """The report of a month: a table of tenants and models, and tokens and dollars by day."""
    days_s = month.days_s
    by_day: list[dict[str, Total]] = []
    whole: defaultdict[tuple[str, str], Total] = defaultdict(Total)
    for from_s, to_s in pairwise(days_s):
        of_day: defaultdict[str, Total] = defaultdict(Total)
        for (name, model), total in ledger.totals(from_s, to_s, tenant).items():
            of_day[name] += total
            whole[name, model] += total
        by_day.append(of_day)
    names = sorted({name for name, _ in whole}, key=lambda name: -_sum(whole, name).tokens)
    lines = [_line(name, model, whole[name, model]) for name, model in sorted(whole)]
    every = sum(whole.values(), Total())
    parts = [
        "<div><table><tr><th>tenant<th>model<th>requests<th>errors<th>prompt tokens<th>cached"
        "<th>output tokens<th>mean TTFT, s<th>GPU hours<th>dollars</tr>",
        *lines,
        _line("all", "", every),
        "</table></div>",
        _plot("Tokens by day", names, [[day[n].tokens for n in names] for day in by_day]),
        _plot("Dollars by day", names, [[day[n].dollars for n in names] for day in by_day]),
        "<p>Dollars are seconds of GPUs in which a tenant's sequences ran, times the price of a "
        "GPU. Idle time is charged to nobody. Times are UTC.</p>",
    ]
    return document(f"Tenants, {month}", "\n".join(parts), _STYLE)


def page(name: str, facts: Sequence[tuple[str, str]]) -> str:
    """A page of facts about one tenant."""
    rows = "".join(f"<tr><th>{escape(label)}<td>{escape(value)}</tr>" for label, value in facts)
    return document(name, f"<div><table>{rows}</table></div>", _STYLE)


def _sum(whole: dict[tuple[str, str], Total], name: str) -> Total:
    return sum((total for (of, _), total in whole.items() if of == name), Total())


def _line(name: str, model: str, total: Total) -> str:
    cells = (
        f"{total.requests:,}",
        f"{total.errors:,}",
        f"{total.prompt_tokens:,}",
        f"{total.cached_tokens:,}",
        f"{total.output_tokens:,}",
        "" if total.ttft_s is None else f"{total.ttft_s:.3f}",
        f"{total.gpu_s / 3600:,.3f}",
        f"{total.dollars:,.2f}",
    )
    numbers = "".join(f"<td class=n>{cell}" for cell in cells)
    return f"<tr><td>{escape(name)}<td>{escape(model)}{numbers}</tr>"


def _plot(title: str, names: Sequence[str], days: Sequence[Sequence[float]]) -> str:
    """Bars by day, stacked by tenant; the tenants beyond the first few are one."""
    shown = list(names[: len(_COLOURS) - 1])
    stacks = [[*day[: len(shown)], sum(day[len(shown) :])] for day in days]
    legend = [*shown, *(["others"] if len(names) > len(shown) else [])]
    highest = max((sum(stack) for stack in stacks), default=0) or 1
    bars = []
    for place, stack in enumerate(stacks):
        top = 200.0
        for colour, value in zip(_COLOURS, stack, strict=False):
            height = 190 * value / highest
            top -= height
            if height:
                bars.append(
                    f'<rect x="{place * 20 + 2}" y="{top:.1f}" width="16" height="{height:.1f}" '
                    f'fill="{colour}"><title>{place + 1}: {value:,.2f}</title></rect>'
                )
        bars.append(f'<text x="{place * 20 + 10}" y="214">{place + 1}</text>')
    keys = " ".join(
        f'<span style="color:{colour}">■</span> {escape(name)}'
        for colour, name in zip(_COLOURS, legend, strict=False)
    )
    width = 20 * len(days)
    return (
        f"<h2>{title}</h2><p>{keys}; the highest day has {highest:,.2f}</p>"
        f'<svg viewBox="0 0 {width} 220" role="img" aria-label="{title}">{"".join(bars)}</svg>'
    )


_COLOURS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#0099c6", "#888888")
_STYLE = """\
.n { text-align: right; }
svg { width: 100%; max-width: 50rem; }
text { font-size: 9px; text-anchor: middle; fill: currentColor; }
"""
