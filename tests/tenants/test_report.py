"""The ledger as a report, CSV and Parquet."""

import csv
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from serve_app.errors import ConfigError
from serve_app.tenants.commands import main
from serve_app.tenants.database import Database
from serve_app.tenants.ledger import Ledger, Row
from serve_app.tenants.report import Month
from tests.tenants.test_journal import request

NAMES = ("ann", "bob", "<script>")


def at(*date: int) -> float:
    return datetime(*date, tzinfo=UTC).timestamp()  # type: ignore[misc, arg-type]


def used(number: int, tenant: str, ended_s: float) -> Row:
    row = request(number, "ok", 100)
    return msgspec.structs.replace(
        row,
        tenant=tenant,
        output_tokens=10,
        cached_tokens=40,
        began_s=ended_s - 2,
        first_s=ended_s - 1.5,
        ended_s=ended_s,
        gpu_s=1.8,
        dollars=0.25,
    )


@pytest.fixture
def filled(address: str) -> str:
    """Three tenants, each two requests in November; and one before and one after."""
    ledger = Ledger(Database(address), "p")
    ledger.prepare()
    times = (at(2026, 11, 1), at(2026, 11, 30, 23, 59, 59))
    rows = [used(10 * n + i, name, t) for n, name in enumerate(NAMES) for i, t in enumerate(times)]
    rows.append(used(98, "ann", at(2026, 10, 31, 23, 59, 59)))
    rows.append(used(99, "ann", at(2026, 12, 1)))
    ledger.add(rows)
    ledger.database.close()
    return address


def run(address: str, *words: str) -> None:
    assert main([*words, "--database", address]) == 0


def test_a_table(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(filled, "report", "--month", "2026-11")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "2 requests" in lines[1]
    assert "200 prompt" in lines[1]
    assert "20 output" in lines[1]
    assert lines[1].endswith("$0.50")


def test_html(filled: str, tmp_path: Path) -> None:
    run(filled, "report", "--month", "2026-11", "--out", str(tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<rect") == 2 * 2 * 3  # Two plots, two days, three tenants.
    assert "<td class=n>600" in text  # All prompt tokens of the month.
    assert text.count("<div><table>") == text.count("<table") == 1  # On a phone only it scrolls.
    assert "$" not in text
    assert "1.50" in text
    run(filled, "report", "--month", "2026-02", "--out", str(tmp_path / "empty.html"))
    assert "<rect" not in (tmp_path / "empty.html").read_text()


def test_csv_and_parquet_have_the_same_rows(filled: str, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    for name in ("r.csv", "r.parquet"):
        words = ("--month", "2026-11", "--tenant", "ann", "--out", str(tmp_path / name))
        run(filled, "report", *words)
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt_tokens"] for row in rows] == ["100", "100"]
    with duckdb.connect() as connection:
        relation = connection.read_parquet(str(tmp_path / "r.parquet"))
        kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
        table = relation.fetchall()
    assert kinds["id"] == "VARCHAR"
    assert kinds["prompt_tokens"] == "BIGINT"
    assert kinds["ended_s"] == "DOUBLE"
    assert [str(row[0]) for row in table] == [row["id"] for row in rows]


def test_old_rows_are_forgotten(filled: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(filled, "forget", "--older-than", "36500d")
    assert capsys.readouterr().out.strip() == "0"
    with pytest.raises(SystemExit):
        main(["forget", "--database", filled])


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="is not a month"):
        Month.parse("2026-13")
    assert len(Month.parse("2028-02").days_s) == 30
