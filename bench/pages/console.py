"""The table for people at the end of every command.

It shows the last line of the command: the figures with their intervals, whether they can be
trusted and why not, and where the whole result is. Standard output stays one JSON object.
"""

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.pages import figures

_RUN = (
    "requests_per_s",
    "output_tokens_per_s",
    "total_tokens_per_s",
    "user_tokens_per_s",
    "goodput_per_s",
    "good_share",
    "failed_share",
    *(f"{of}_{what}_s" for of in ("ttft", "tpot", "itl", "e2e") for what in ("mean", "p50")),
    *(f"{of}_{what}_s" for of in ("ttft", "tpot", "e2e") for what in ("p95", "p99")),
)
_CELL = ("output_tokens_per_s", "user_tokens_per_s", "ttft_mean_s", "tpot_mean_s", "e2e_mean_s")
_SHOWN_OTHERWISE = {"benchmark", "name", "valid", "doubts", "out", "report", "page"}
_LONGEST = 100
_WIDTH = 100  # Of what is no terminal.


def show(result: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print what a command found."""
    stream = stream or sys.stderr
    width = None if stream.isatty() else _WIDTH
    console = Console(file=stream, width=width, highlight=False, soft_wrap=False)
    name = f"{result.get('benchmark', '')} {result.get('name', '')}".strip()
    console.print()
    console.print(Text(name, style="bold"))
    for table in _tables(result):
        if table.row_count:
            console.print(table)
    _judge(console, result)
    for key in ("out", "report", "page"):
        if result.get(key):
            console.print(Text(f"{key}: {result[key]}"), soft_wrap=True)


def _tables(result: Mapping[str, Any]) -> list[Table]:
    if isinstance(result.get("summary"), dict):
        rest = {key: value for key, value in result.items() if key != "summary"}
        return [_metrics(result["summary"]), *_everything(rest)]
    if isinstance(result.get("cells"), dict):
        return [_cells(result["cells"]), _others(result)]
    return _everything(result)


def _everything(result: Mapping[str, Any]) -> list[Table]:
    nested = {key: value for key, value in result.items() if _is_table(value)}
    return [_others(result), *(_rows(key, value) for key, value in nested.items())]


def _metrics(summary: Mapping[str, Any]) -> Table:
    table = _table("metric", "mean", "± 95%", "unit")
    # In the order of a reader, and whatever else was measured after that.
    for metric in dict.fromkeys((*(name for name in _RUN if name in summary), *summary)):
        mean, half = figures.with_interval(summary, metric)
        unit = figures.scale(metric)[0].replace("%", "")
        table.add_row(figures.title(metric), mean or "-", half or "-", unit)
    return table


def _cells(cells: Mapping[str, Any]) -> Table:
    table = _table("cell", *(f"{figures.title(m)} {figures.scale(m)[0]}".strip() for m in _CELL))
    for name, summary in cells.items():
        texts = [" ± ".join(filter(None, figures.with_interval(summary, m))) for m in _CELL]
        table.add_row(name, *(text or "-" for text in texts))
    return table


def _others(result: Mapping[str, Any]) -> Table:
    """Whatever a command says in a word or a number."""
    table = _table("", "")
    for key, value in result.items():
        if key not in _SHOWN_OTHERWISE and (text := _plain(value)):
            table.add_row(key.replace("_", " "), text)
    return table


def _rows(title: str, rows: Any) -> Table:
    """A list of objects, or an object of them, as a table: a column for each plain value."""
    named = [(str(key), row) for key, row in rows.items()] if isinstance(rows, dict) else []
    each = named or [(str(number), row) for number, row in enumerate(rows, 1)]
    keys = dict.fromkeys(
        key for _, row in each for key, value in row.items() if _cell_of(value) != "-"
    )
    table = _table(title.replace("_", " "), *(key.replace("_", " ") for key in keys))
    for name, row in each:
        table.add_row(name, *(_cell_of(row.get(key)) for key in keys))
    return table


def _is_table(value: Any) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else value
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _cell_of(value: Any) -> str:
    """As `_plain`; a long text is folded."""
    return value if isinstance(value, str) and value else _plain(value) or "-"


def _plain(value: Any) -> str:
    """A value in a word or a number; empty for what is neither."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else figures.number(value)
    return value if isinstance(value, str) and len(value) <= _LONGEST else ""


def _judge(console: Console, result: Mapping[str, Any]) -> None:
    if "valid" not in result:
        return
    doubts = result.get("doubts") or []
    if result["valid"]:
        console.print(Text("valid", style="bold green"))
    else:
        console.print(Text("NOT VALID: do not use these figures as they stand", style="bold red"))
    for doubt in doubts:
        console.print(Text(f"  doubt: {doubt}"), soft_wrap=True)


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=bool(first), pad_edge=False)
    table.add_column(first, overflow="fold")
    for other in others:
        table.add_column(other, justify="right", overflow="fold")
    return table
