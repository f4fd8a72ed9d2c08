"""Nothing is lost or counted twice, wherever a process is killed."""

import asyncio
import itertools
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.tenants import book as book_module
from serve_app.tenants import journal as journal_module
from serve_app.tenants.book import Book, Reservation
from serve_app.tenants.database import Database
from serve_app.tenants.journal import OPEN, Journal, legacies
from serve_app.tenants.ledger import COLUMNS, Claim, Ledger, Row
from serve_app.tenants.quota import Kind
from serve_app.tenants.tenant import Quota, Tenant
from tests.tenants.test_quota import NOON_S
from tests.tenants.test_quota import row as made

ANN = Tenant("ann", quota=Quota(tokens_per_month=10**9))


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


@pytest.mark.parametrize("ended", [0, 1, 5])
def test_a_request_that_is_lost_took_gpus_as_those_did_that_ended(
    tmp_path: Path, ended: int
) -> None:
    """Until the last line was written; a process that has ended no request knows nothing."""
    journal = Journal(tmp_path)
    for number in range(ended):
        over = msgspec.structs.replace(
            request(number, "ok", 7), began_s=100.0, ended_s=102.0 + number, gpu_s=1.0 + number / 2
        )
        journal.end(msgspec.structs.replace(over, dollars=over.gpu_s / 1000))
    journal.begin(msgspec.structs.replace(request(9, OPEN, 7), began_s=104.0, ended_s=104.0))
    later = msgspec.structs.replace(request(10, OPEN, 7), began_s=999.0)  # The clock went back.
    journal.begin(later)
    die(journal)
    os.utime(journal._file[0], (110.0, 110.0))
    (legacy,) = legacies(tmp_path)
    rows = {each.id: each for each in legacy.rows()}
    lost = rows[request(9, OPEN, 7).id]
    gpu_s = 6.0 / 2 if ended else 0.0
    assert (lost.outcome, lost.ended_s) == ("lost", 110.0)
    assert lost.gpu_s == pytest.approx(gpu_s)
    assert lost.dollars == pytest.approx(gpu_s / 1000)
    assert rows[later.id].gpu_s == 0.0
    legacy.remove()


def test_a_full_disk_loses_no_request_that_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of a line may be on the disk when it is full."""
    journal = Journal(tmp_path)
    reservation = Reservation([])
    write, room = os.write, [10**6]

    def bounded(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(journal_module.os, "write", bounded)
    journal.begin(made("before", 7, reservation, OPEN))
    room[0] = 20
    for name in ("half", "none", "none either"):
        journal.begin(made(name, 7, reservation, OPEN))  # The request goes on.
    room[0] = 10**6
    journal.begin(made("after", 7, reservation, OPEN))
    monkeypatch.undo()
    assert sum("not in the journal" in record.message for record in caplog.records) == 1
    die(journal)
    (legacy,) = legacies(tmp_path)
    assert {each.id for each in legacy.rows()} == {"before", "after"}
    legacy.remove()


def serve_until_killed(folder: Path, life: int, acknowledgements: int) -> None:
    """The child: requests begin and end, and each is acknowledged once the book has it."""

    async def serve() -> None:
        book = Book(str(folder / "t.sqlite3"), folder / "journal", lambda: NOON_S)
        running: list[tuple[Row, Reservation]] = []
        for number in itertools.count():
            reservation = await book.reserve(ANN, 7)
            opened = made(f"{life}.{number}", 7, reservation, OPEN)
            book.journal.begin(opened)
            os.write(acknowledgements, b"began %d.%d\n" % (life, number))
            running.append((opened, reservation))
            if len(running) > 4:
                opened, reservation = running.pop(number % 4)
                over = msgspec.structs.replace(opened, outcome="ok", prompt_tokens=100)
                book.settle(reservation, over)
                os.write(acknowledgements, b"ended %s\n" % opened.id.encode())
            await asyncio.sleep(0)  # The ledger is written meanwhile, by a thread.

    # Often, so that some of the kills come in an exchange, and some in a new file.
    book_module._EVERY_S, journal_module._LARGEST_BYTES = 0.002, 20_000
    asyncio.run(serve())


def killed(folder: Path, life: int, rng: random.Random) -> list[str]:
    """What a process acknowledged until it was killed, by SIGKILL at a random moment."""
    readable, writable = os.pipe()
    if not (child := os.fork()):
        try:
            os.close(readable)
            serve_until_killed(folder, life, writable)
        finally:
            os._exit(1)
    os.close(writable)
    with open(readable) as lines:
        acknowledged = [lines.readline().strip() for _ in range(rng.randrange(1, 300))]
        time.sleep(rng.uniform(0, 0.003))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return acknowledged + lines.read().split("\n")[:-1]


def test_what_was_acknowledged_is_in_the_ledger_once_after_real_kills(tmp_path: Path) -> None:
    rng = random.Random(25)
    ledger = Ledger(Database(str(tmp_path / "t.sqlite3")), "heir")
    ledger.prepare()
    began, ended = set[str](), set[str]()
    for life in range(10):
        for line in killed(tmp_path, life, rng):
            what, name = line.split()
            (began if what == "began" else ended).add(name)
        heirs(tmp_path / "journal", ledger, deaths=rng.randrange(2))
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in ledger.rows(0, 1e12)]
    found = {each["id"]: each for each in rows}
    assert len(found) == len(rows)
    assert began <= found.keys()
    for name in ended:
        assert (found[name]["outcome"], found[name]["prompt_tokens"]) == ("ok", 100)
    # A request may be over whose end the kill kept from being acknowledged: one a life at most.
    others = [each for each in rows if each["id"] not in ended]
    assert sum(each["outcome"] == "ok" for each in others) <= 10
    for each in others:
        assert (each["outcome"], each["prompt_tokens"]) in (("lost", 7), ("ok", 100))
    start, _ = Kind.TOKENS_PER_MONTH.window(NOON_S)
    tokens = sum(each["prompt_tokens"] + each["output_tokens"] for each in rows)
    assert ledger.used("ann", {"tokens_per_month": start}) == {"tokens_per_month": tokens}
    assert list((tmp_path / "journal").glob("*.jsonl")) == []
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
    monkeypatch.setattr(journal_module, "_LARGEST_BYTES", 1000)
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
