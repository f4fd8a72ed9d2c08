"""Quotas: right over several processes, restarts and kills, and what happens without a database."""

import asyncio
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import BudgetUnknown, BudgetUsedUp, RateLimited, RequestError
from serve_app.tenants import book as module
from serve_app.tenants.book import Book, Reservation
from serve_app.tenants.journal import REFUSED
from serve_app.tenants.ledger import Row
from serve_app.tenants.quota import Allowance, Kind
from serve_app.tenants.tenant import Quota, Tenant

NOON_S = datetime(2026, 11, 30, 12, 0, 5, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def row(number: object, tokens: int, reservation: Reservation, outcome: str = "ok") -> Row:
    return Row(
        id=str(number),
        request_id="",
        tenant="ann",
        model="m",
        adapter="",
        lane="python",
        route="/v1/completions",
        outcome=outcome,
        status=200,
        prompt_tokens=tokens,
        cached_tokens=0,
        output_tokens=0,
        estimated=False,
        began_s=NOON_S,
        first_s=None,
        ended_s=NOON_S,
        gpu_s=0.0,
        dollars=0.0,
        windows=reservation.windows,
    )


def books(address: str, folder: Path, count: int, clock: Clock) -> list[Book]:
    return [Book(address, folder / "journal", clock) for _ in range(count)]


def ann(**quota: int) -> Tenant:
    return Tenant("ann", quota=Quota(**quota))


# --- windows ---


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [
        (Kind.TOKENS_PER_MINUTE, (2026, 12, 31, 23, 59), (2027, 1, 1, 0, 0)),
        (Kind.TOKENS_PER_DAY, (2026, 12, 31), (2027, 1, 1)),
        (Kind.TOKENS_PER_MONTH, (2026, 12, 1), (2027, 1, 1)),
    ],
)
def test_windows_are_those_of_utc(kind: Kind, start: tuple[int, ...], end: tuple[int, ...]) -> None:
    now = datetime(2026, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)
    both = [datetime(*each, tzinfo=UTC).timestamp() for each in (start, end)]  # type: ignore[misc, arg-type]
    assert list(kind.window(now.timestamp())) == both


@given(
    st.lists(st.tuples(st.sampled_from(["take", "end", "sync"]), st.integers(0, 50)), max_size=60)
)
def test_a_process_never_has_less_than_its_requests_reserved(
    steps: list[tuple[str, int]],
) -> None:
    """What the database lends is what is free, what is reserved and what is not counted yet."""
    part = Allowance(Kind.TOKENS_PER_DAY, 1000, 0)
    pool, reserved = 1000.0, []
    for step, amount in steps:
        if step == "take" and part.free >= amount:
            part.reserve(amount)
            reserved.append(amount)
        elif step == "end" and reserved:
            part.settle(taken := reserved.pop(0), min(taken, amount))
        elif step == "sync":
            before, spent = part.lease, part.spent
            part.give_back()
            pool += before - part.lease
            grant = min(part.wish(), pool)
            pool -= grant
            part.counted(spent)
            part.granted(grant, pool)
        assert part.reserved == pytest.approx(sum(reserved))
        assert part.free >= -1e-9
        # Used, lent or left: the whole limit, always.
        assert part.lease + pool + (part.used - part.spent) == pytest.approx(1000)


# --- several processes ---


@pytest.mark.parametrize("quota", ["tokens_per_minute", "tokens_per_month"])
async def test_a_quota_holds_over_processes_restarts_and_kills(
    quota: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one percent, whoever is asked; one is stopped, one is killed, one comes new."""
    clock, limit, address = Clock(), 100_000, str(tmp_path / "t.sqlite3")
    tenant = ann(**{quota: limit})
    all_books = books(address, tmp_path, 4, clock)
    rng = random.Random(0)
    used, refused, number = 0, 0, 0
    while refused < 50:
        number += 1
        clock.now_s += 0.001
        if number == 300:
            await all_books.pop().close()
        if number == 500:
            killed = all_books.pop()
            assert killed._task is not None
            killed._task.cancel()
        if number == 700:
            all_books += books(address, tmp_path, 1, clock)
        asked = rng.choice(all_books)
        try:
            reservation = await asked.reserve(tenant, rng.randrange(20, 300))
        except RequestError:
            refused += 1
            await asyncio.sleep(0.02)
            clock.now_s += 0.3  # The others give back what they do not use.
            continue
        tokens = rng.randrange(20, 300)
        used += tokens
        asked.settle(reservation, row(number, tokens, reservation))
    for each in all_books:
        await each.close()
    await asyncio.sleep(0)
    assert abs(used - limit) <= 0.01 * limit


async def test_both_databases_count_alike(address: str, tmp_path: Path) -> None:
    clock = Clock()
    first, second = books(address, tmp_path, 2, clock)
    tenant = ann(requests_per_minute=10)
    admitted = 0
    for number in range(40):
        asked = (first, second)[number % 2]
        try:
            reservation = await asked.reserve(tenant, 1)
        except RateLimited:
            clock.now_s += 0.3
            continue
        asked.settle(reservation, row(number, 1, reservation))
        admitted += 1
    assert admitted == 10
    clock.now_s += 60  # A new minute.
    second.settle(await second.reserve(tenant, 1), row("n", 1, Reservation([])))
    await first.close()
    await second.close()


async def test_running_requests(tmp_path: Path) -> None:
    clock = Clock()
    first, second = books(str(tmp_path / "t.sqlite3"), tmp_path, 2, clock)
    tenant = ann(running_requests=3)
    held = [await first.reserve(tenant, 1), await second.reserve(tenant, 1)]
    held.append(await first.reserve(tenant, 1))
    with pytest.raises(RateLimited) as error:
        await second.reserve(tenant, 1)
    assert error.value.retry_after_s == 1
    first.settle(held[0], row(1, 5, held[0]))
    clock.now_s += 0.3
    await asyncio.sleep(0.05)
    await first._exchange()
    await second.reserve(tenant, 1)
    await first.close()
    await second.close()


async def test_a_small_limit_is_free_again_while_more_of_another_is_borrowed(
    tmp_path: Path,
) -> None:
    """One after the other: there is room for each, whatever else must be borrowed for it."""
    book = Book(str(tmp_path / "t.sqlite3"), tmp_path / "journal", Clock())
    quota = Quota(running_requests=1, requests_per_minute=100, tokens_per_day=100_000)
    for number in range(20):
        reservation = await book.reserve(Tenant("ann", quota=quota), 120.0)
        book.settle(reservation, row(number, 13, reservation))
    await book.close()


async def test_what_a_limit_says(tmp_path: Path) -> None:
    clock = Clock()
    (book,) = books(str(tmp_path / "t.sqlite3"), tmp_path, 1, clock)
    tenant = ann(requests_per_minute=5, tokens_per_minute=1000, tokens_per_day=5000)
    reservation = await book.reserve(tenant, 400)
    said = {
        name.decode(): value.decode()
        for name, value in module.headers_of([part for part, _ in reservation.parts], clock())
    }
    assert said["x-ratelimit-limit-requests"] == "5"
    assert said["x-ratelimit-remaining-requests"] == "4"
    assert said["x-ratelimit-limit-tokens"] == "1000"
    assert said["x-ratelimit-remaining-tokens"] == "600"
    assert said["x-ratelimit-reset-tokens"] == "55s"
    with pytest.raises(RateLimited) as error:
        await book.reserve(tenant, 900)
    assert error.value.retry_after_s == 55
    assert (b"x-ratelimit-limit-tokens", b"1000") in error.value.headers
    book.settle(reservation, row(1, 4900, reservation))
    clock.now_s += 120
    with pytest.raises(BudgetUsedUp):
        await book.reserve(tenant, 400)
    clock.now_s += 86_400
    await book.reserve(tenant, 400)
    await book.close()


async def test_another_limit_is_in_force_with_the_next_request(tmp_path: Path) -> None:
    (book,) = books(str(tmp_path / "t.sqlite3"), tmp_path, 1, clock := Clock())
    first = await book.reserve(ann(tokens_per_minute=1000), 400)
    for limit in (300, 500):  # Less than is reserved, and less than that and the next one.
        with pytest.raises(RateLimited):
            await book.reserve(ann(tokens_per_minute=limit), 200)
    clock.now_s += 0.3  # A limit that was reached is not asked for again at once.
    again = await book.reserve(ann(tokens_per_minute=2000, requests_per_minute=2), 1500)
    assert again.windows.keys() == {"tokens_per_minute", "requests_per_minute"}
    assert (await book.reserve(ann(), 1e9)).windows == {}
    book.settle(again, row(1, 1500, again))
    book.settle(first, row(2, 400, first))
    with pytest.raises(RateLimited):
        await book.reserve(ann(tokens_per_minute=2000, requests_per_minute=2), 200)
    await book.close()


async def test_a_refused_request_uses_nothing(tmp_path: Path) -> None:
    (book,) = books(str(tmp_path / "t.sqlite3"), tmp_path, 1, Clock())
    tenant = ann(tokens_per_day=1000)
    for number in range(20):
        reservation = await book.reserve(tenant, 900)
        book.settle(reservation, row(number, 900, reservation, REFUSED))
    await book.reserve(tenant, 900)
    await book.close()
    assert list(book._ledger.rows(0, 1e12)) == []


async def test_a_clock_that_steps_back_gives_nothing_twice(tmp_path: Path) -> None:
    clock = Clock()
    (book,) = books(str(tmp_path / "t.sqlite3"), tmp_path, 1, clock)
    tenant = ann(tokens_per_minute=1000)
    for step_s in (0, 3600, -3600):  # Forward to a new minute, and back to the first one.
        clock.now_s += step_s
        if step_s < 0:
            with pytest.raises(RateLimited):
                await book.reserve(tenant, 900)
            continue
        reservation = await book.reserve(tenant, 900)
        book.settle(reservation, row(step_s, 900, reservation))
        await book._exchange()
    await book.close()


async def test_without_a_database_rates_are_open_and_budgets_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    clock, path = Clock(), tmp_path / "t.sqlite3"
    (book,) = books(str(path), tmp_path, 1, clock)
    rate, budget = ann(requests_per_minute=5), Tenant("bob", quota=Quota(tokens_per_day=1000))
    reservation = await book.reserve(rate, 1)
    book.settle(reservation, row("before", 1, reservation))
    await book._exchange()

    def away(*_: Any) -> None:
        raise module.DatabaseError("no route to host")

    with monkeypatch.context() as patched:
        patched.setattr(book._ledger, "exchange", away)
        admitted = []
        for number in range(8):
            try:
                reservation = await book.reserve(rate, 1)
            except RateLimited:
                continue
            admitted.append(number)
            book.settle(reservation, row(number, 1, reservation))
        assert len(admitted) == 4  # Held by this process alone.
        with pytest.raises(BudgetUnknown) as error:
            await book.reserve(budget, 1)
        assert error.value.status == 503
        assert book.away
    await asyncio.sleep(0.1)
    assert not book.away
    await book.reserve(budget, 1)
    await book.close()
    # Nothing of the ledger was lost.
    assert len(list(book._ledger.rows(0, 1e12))) == 5


def move(source: Path, destination: Path) -> None:
    """Move a SQLite database: what was written last is in a file beside it."""
    for each in source.glob("t.sqlite3*"):
        each.rename(destination / each.name)


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_database_file_that_is_taken_away_is_a_database_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """Rows that went to a file without a name would be lost, and so would what is spent."""
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    path, moved = tmp_path / "t.sqlite3", tmp_path / "moved"
    moved.mkdir()
    (book,) = books(str(path), tmp_path, 1, Clock())
    budget = Tenant("ann", quota=Quota(tokens_per_day=1000))
    reservation = await book.reserve(budget, 900)
    book.settle(reservation, row("before", 900, reservation))
    await book._exchange()
    move(tmp_path, moved)
    if replaced:
        path.touch()
    await book._exchange()
    with pytest.raises(BudgetUnknown):
        await book.reserve(budget, 90)
    assert book.away
    # Nobody asks, and it is away all the same.
    await book._exchange()
    assert book.away
    path.unlink(missing_ok=True)
    move(moved, tmp_path)
    while book.away:
        await book._exchange()
    with pytest.raises(BudgetUsedUp):
        await book.reserve(budget, 500)
    await book.close()
    assert {each[0] for each in book._ledger.rows(0, 1e12)} >= {"before"}


async def test_an_exchange_that_fails_in_any_way_closes_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.01)
    (book,) = books(str(tmp_path / "t.sqlite3"), tmp_path, 1, Clock())
    budget = Tenant("ann", quota=Quota(tokens_per_day=1000))

    def fails(*_: Any) -> None:
        raise OverflowError("int too large to convert to float")

    with monkeypatch.context() as patched:
        patched.setattr(book._ledger, "exchange", fails)
        with pytest.raises(BudgetUnknown):
            await book.reserve(budget, 1)
    while book.away:
        await book._exchange()
    await book.reserve(budget, 1)
    await book.close()


async def test_ten_thousand_tenants_that_come_and_go_take_no_memory(tmp_path: Path) -> None:
    clock = Clock()
    (book,) = books(str(tmp_path / "t.sqlite3"), tmp_path, 1, clock)
    for number in range(300):
        tenant = Tenant(f"t{number}", quota=Quota(tokens_per_month=1000))
        reservation = await book.reserve(tenant, 1)
        done = row(number, 1, reservation)
        book.settle(reservation, msgspec.structs.replace(done, tenant=tenant.name))
    for _ in range(4):
        await book._exchange()
    assert not book._allowances
    assert not book._accounts
    assert not book._rows
    await book.close()
