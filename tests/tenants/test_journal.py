"""Nothing is lost or counted twice, wherever a process is killed."""

import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.tenants import journal as module
from serve_app.tenants.book import Reservation
from serve_app.tenants.database import Database
from serve_app.tenants.journal import OPEN, Journal, legacies
from serve_app.tenants.ledger import COLUMNS, Claim, Ledger, Row
from tests.tenants.test_quota import row as made


class Killed(BaseException):
    """The process ends here."""


def request(number: int, outcome: str, tokens: int) -> Row:
    row = made(number, tokens, Reservation([]), outcome)
    return msgspec.structs.replace(row, windows={"tokens_per_day": 0})


def die(journal: Journal) -> None:
    """What a kill leaves: the file as it is, without its lock."""
    os.close(journal._file[1])


def heirs(folder: Path, ledger: Ledger, deaths: int = 0) -> None:
    """A new process takes over; it may die between the ledger and the removal of the file."""
    for legacy in legacies(folder):
        ledger.add(legacy.rows())
        if deaths:
            os.close(legacy._descriptor)
            heirs(folder, ledger, deaths - 1)
            return
        legacy.remove()


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["begin", "end", "hand", "fail", "roll"]), st.integers(0, 5)),
        max_size=25,
    ),
    torn=st.integers(0, 40),
    deaths=st.integers(0, 2),
)
def test_every_request_is_in_the_ledger_once(
    steps: list[tuple[str, int]], torn: int, deaths: int
) -> None:
    """A process is killed after any step, as a line is half written, and its heir as well."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = Ledger(Database(str(folder / "t.sqlite3")), "p")
        ledger.prepare()
        journal = Journal(folder / "journal")
        under_way: list[Row] = []
        ended: list[Row] = []
        pending: list[Row] = []
        number = 0
        for step, which in steps:
            if step == "begin":
                number += 1
                under_way.append(request(number, OPEN, 7))
                journal.begin(under_way[-1])
            elif step == "end" and under_way:
                opened = under_way.pop(which % len(under_way))
                over = msgspec.structs.replace(opened, outcome="ok", prompt_tokens=100)
                journal.end(over)
                ended.append(over)
                pending.append(over)
            elif step == "hand":
                ledger.exchange(pending, [], 0.0)
                pending.clear()
            elif step == "fail":  # It was done, and nobody heard of it: the same rows come again.
                ledger.exchange(pending, [], 0.0)
            elif step == "roll":
                journal._bytes = 10**9
                rolled = journal.roll()
                assert rolled is not None
                ledger.exchange(pending, [], 0.0)
                pending.clear()
                rolled.remove()
        if torn:
            os.write(journal._file[1], b'{"id":"torn","request_id":"' + b"x" * torn)
        die(journal)
        heirs(folder / "journal", ledger, deaths)
        found = {
            values[0]: dict(zip(COLUMNS, values, strict=True)) for values in ledger.rows(0, 1e12)
        }
        assert found.keys() == {each.id for each in ended + under_way}
        for each in ended:
            assert (found[each.id]["outcome"], found[each.id]["prompt_tokens"]) == ("ok", 100)
        for each in under_way:
            assert (found[each.id]["outcome"], found[each.id]["prompt_tokens"]) == ("lost", 7)
        tokens = 100 * len(ended) + 7 * len(under_way)
        assert ledger.used("ann", {"tokens_per_day": 0}) == {"tokens_per_day": tokens}
        assert list((folder / "journal").glob("*")) == []
        ledger.database.close()


def test_a_process_that_lives_has_no_heir(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(request(1, OPEN, 7))
    assert list(legacies(tmp_path)) == []
    die(journal)
    assert len(list(legacies(tmp_path))) == 1


def test_a_transaction_that_fails_half_way_did_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(Database(str(tmp_path / "t.sqlite3")), "p")
    ledger.prepare()

    def fail(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_lend", fail)
        with pytest.raises(Killed):
            ledger.exchange([request(1, "ok", 5)], [Claim("a", "k", 0, 5, 0, 1)], 0.0)
    assert list(ledger.rows(0, 1e12)) == []
    assert ledger.used("ann", {"tokens_per_day": 0}) == {"tokens_per_day": 0}
    ledger.database.close()


def test_both_databases_keep_the_ledger(address: str) -> None:
    ledger = Ledger(Database(address), "p")
    ledger.prepare()
    ledger.prepare()
    for _ in range(2):
        ledger.exchange([request(n, "ok", 5) for n in range(10)], [], 0.0)
    assert len(list(ledger.rows(0, 1e12))) == 10
    assert len(list(ledger.rows(0, 1e12, "nobody"))) == 0
    assert ledger.used("ann", {"tokens_per_day": 0}) == {"tokens_per_day": 50}
    assert ledger.forget(1e12) == 10
    ledger.database.close()


def test_a_large_journal_is_rolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGEST_BYTES", 1000)
    journal = Journal(tmp_path)
    assert journal.roll() is None
    for number in range(20):
        journal.begin(request(number, OPEN, 7))
        journal.end(request(number, "ok", 7))
    rolled = journal.roll()
    assert rolled is not None
    rolled.remove()
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    journal.close()
    assert list(tmp_path.glob("*")) == []
