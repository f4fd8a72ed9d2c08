"""The fair queue by itself: whose turn it is, and what is counted for whom."""

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.tenants.fair import MOST_PASSED, UNREAD_TOKENS, Entry, FairQueue, Share

A, B, C = Share("a"), Share("b", weight=2.0), Share("c", weight=0.5)


def served(queue: FairQueue[str], slots: int, requests: int, ask: Any) -> Counter[str]:
    """The work that `requests` requests were, `slots` at a time, of tenants that never stop."""
    done: Counter[str] = Counter()
    running: list[Entry[str]] = []
    for _ in range(requests):
        ask()
        entry = queue.first()
        assert entry is not None
        queue.begin(entry, 1)
        running.append(entry)
        if len(running) == slots:
            ended = running.pop(0)
            work = float(ended.item)
            done[ended.share.name] += work
            queue.end(ended, work)
    return done


@pytest.mark.parametrize("known", [True, False])
def test_work_is_shared_by_weight_however_long_requests_are(known: bool) -> None:
    """One tenant's requests are ten times as long; and the queue may not know that before."""
    queue: FairQueue[str] = FairQueue()
    lengths = {A: 1000, B: 100, C: 300}
    waiting: Counter[str] = Counter()

    def ask() -> None:
        for share, length in lengths.items():
            while waiting[share.name] < 3:
                waiting[share.name] += 1
                queue.push(share, 1, length if known else 256, str(length))
        first = queue.first()
        assert first is not None
        waiting[first.share.name] -= 1

    done = served(queue, 8, 4000, ask)
    parts = [done["a"] / A.weight, done["b"] / B.weight, done["c"] / C.weight]
    assert max(parts) <= 1.05 * min(parts)


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue: FairQueue[int] = FairQueue()
    rng = random.Random(0)
    for number in range(50):
        queue.push(A, 1, rng.randrange(1000), number)
    order = []
    while (entry := queue.first()) is not None:
        queue.begin(entry, 1)
        order.append(entry.item)
    assert order == list(range(50))


def test_a_tenant_that_comes_back_does_not_make_up_for_its_absence() -> None:
    """It may have saved up one batch of work, and not an hour."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(1000):
        queue.push(A, 1, 100, "100")
    running = []
    for _ in range(800):
        entry = queue.first()
        assert entry is not None
        queue.begin(entry, 1)
        running.append(entry)
        if len(running) == 4:
            queue.end(running.pop(0), 100)
    for _ in range(100):
        queue.push(Share("late"), 1, 100, "100")
    turns = []
    for _ in range(40):
        entry = queue.first()
        assert entry is not None
        queue.begin(entry, 1)
        turns.append(entry.share.name)
        queue.end(entry, 100)
    # First what it may have saved up, then in turns.
    assert turns[:3] == ["late"] * 3
    assert 18 <= turns.count("a") <= 20


def test_a_long_prompt_of_one_does_not_hold_a_short_one_of_another() -> None:
    queue: FairQueue[str] = FairQueue()
    running = queue.begin_at_once(A, 1, 50_000, "long")
    for _ in range(3):
        queue.push(A, 1, 50_000, "long")
    queue.push(C, 1, 100, "short")
    first = queue.first()
    assert first is not None
    assert first.item == "short"
    queue.end(running, 50_000)


def test_a_class_is_never_passed_over_for_long() -> None:
    queue: FairQueue[int] = FairQueue()
    shares = [Share("high", rank=0), Share("normal", rank=1), Share("low", rank=2)]
    for share in shares:
        for number in range(500):
            queue.push(share, 1, 1000 if share.rank else 1, number)
    order = []
    for _ in range(300):
        entry = queue.first()
        assert entry is not None
        queue.begin(entry, 1)
        order.append(entry.share.name)
    assert order[:MOST_PASSED] == ["high"] * MOST_PASSED
    for name in ("normal", "low"):
        places = [-1] + [place for place, each in enumerate(order) if each == name]
        gaps = [after - before for before, after in pairwise(places)]
        # Two lower classes may become late at once, and one of them goes first.
        assert max(gaps) <= MOST_PASSED + 2


def test_who_is_turned_away_where_the_queue_is_full() -> None:
    queue: FairQueue[int] = FairQueue()
    assert queue.victim(A) is None
    for number in range(6):
        queue.push(A, 1, 1, number)
    assert queue.victim(A) is None  # Its own flood does not make room for itself.
    victim = queue.victim(C)
    assert victim is not None
    assert (victim.share, victim.item) == (A, 5)
    for number in range(4):
        queue.push(C, 1, 1, number)  # Four for a weight of 0.5: more than six for 1.
    victim = queue.victim(B)
    assert victim is not None
    assert victim.share == C
    # A lower class never pushes a higher one out, whatever that has there.
    assert queue.victim(Share("low", rank=2)) is None
    high = queue.victim(Share("high", rank=0))
    assert high is not None


def test_a_part_of_the_batch_is_kept_for_who_was_served_less() -> None:
    queue: FairQueue[int] = FairQueue()

    def fits(share: Share, running: int, batch: int = 64) -> bool:
        return queue.fits(share, 1, 0, running, batch)

    assert fits(A, 63)
    assert not fits(A, 64)
    running = [queue.begin_at_once(A, 1, 10, 0) for _ in range(40)]
    assert fits(A, 63)  # There is nobody else.
    other = queue.begin_at_once(B, 1, 1, 0)
    assert fits(A, 59)
    assert not fits(A, 60)
    assert fits(B, 63)
    assert fits(Share("new"), 63)
    assert not fits(B, 64)
    assert fits(A, 7, batch=8)  # A small batch is all for everybody.
    queue.end(other, 1)
    assert fits(A, 63)
    low = queue.begin_at_once(Share("low", rank=2), 1, 1, 0)
    assert fits(A, 63)  # Nothing is kept for a lower class.
    for entry in (*running, low):
        queue.end(entry, 1)


def test_prompts_above_the_share_wait_for_those_that_the_engine_reads() -> None:
    queue: FairQueue[int] = FairQueue()
    small, large = UNREAD_TOKENS // 4, 10 * UNREAD_TOKENS
    first = queue.begin_at_once(A, 2, 10, 0, 3 * small)
    assert queue.fits(A, 1, large, 40, 64)  # There is nobody else.
    other = queue.begin_at_once(B, 1, 1, 0, small)
    assert not queue.fits(A, 1, 1, 40, 64)
    assert queue.fits(A, 1, large, 31, 64)  # Half a batch is always filled.
    assert queue.fits(B, 1, large, 40, 64)  # Its own share.
    queue.read(1)
    assert not queue.fits(A, 1, 1, 40, 64)  # One of two sequences.
    queue.read(1)
    assert queue.fits(A, 1, 3 * small, 40, 64)
    assert not queue.fits(A, 1, 3 * small + 1, 40, 64)
    queue.end(other, 1)  # It ended without a token: nothing of it is left to be read.
    third = queue.begin_at_once(B, 1, 1, 0, 0)
    queue.read(9)
    assert queue.fits(A, 1, large, 40, 64)  # A long prompt goes alone.
    for entry in (first, third):
        queue.end(entry, 1)


@pytest.mark.parametrize("bound", [1, 300, 5000])
def test_how_many_prompt_tokens_may_be_unread_is_a_setting(bound: int) -> None:
    queue: FairQueue[int] = FairQueue(bound)
    queue.begin_at_once(A, 1, 10, 0, 1)
    queue.begin_at_once(B, 1, 1, 0, 0)
    assert queue.fits(A, 1, bound - 1, 40, 64)
    assert not queue.fits(A, 1, bound, 40, 64)


def test_a_tenant_whose_share_changes_while_it_waits() -> None:
    queue: FairQueue[int] = FairQueue()
    queue.push(A, 1, 1, 0)
    queue.push(Share("a", weight=5, rank=0), 1, 1, 1)
    queue.push(B, 1, 1, 2)
    order = []
    while (entry := queue.first()) is not None:
        queue.begin(entry, 1)
        order.append(entry.item)
        queue.end(entry, 1)
    assert order == [0, 1, 2]


SHARES = [A, B, C, Share("d", rank=0), Share("e", weight=3, rank=2), Share("a", weight=4, rank=2)]
steps = st.lists(
    st.tuples(
        st.sampled_from(["push", "begin", "at_once", "leave", "end", "read"]),
        st.integers(0, 5),
        st.integers(0, 9),
        st.floats(0, 1e6),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=200)
@given(steps)
def test_nothing_is_left_of_what_is_over(steps: list[tuple[str, int, int, float]]) -> None:
    """Whatever happens in whatever order, the queue is what the test counts beside it."""
    queue: FairQueue[int] = FairQueue()
    waiting: list[Entry[int]] = []
    running: list[Entry[int]] = []
    for number, (step, which, place, work) in enumerate(steps):
        if step == "push":
            waiting.append(queue.push(SHARES[which], 1, work, number, number))
        elif step == "at_once":
            entry = queue.begin_at_once(SHARES[which], 1 + place, work, number, number)
            running.append(entry)
        elif step == "begin" and (entry := queue.first()) is not None:
            queue.begin(entry, 1)
            waiting.remove(entry)
            running.append(entry)
        elif step == "leave" and waiting:
            queue.leave(waiting.pop(place % len(waiting)))
        elif step == "end" and running:
            queue.end(running.pop(place % len(running)), work)
        elif step == "read":
            queue.read(place)
        assert queue._unread.keys() <= set(running)
        assert queue._unread_tokens == sum(each.prompt_tokens for each in queue._unread)
        assert len(queue) == len(waiting)
        first = queue.first()
        assert (first is not None) == bool(waiting)
        assert first is None or first in waiting
        tenants = {each.share.name for each in waiting + running}
        accounts = queue._accounts
        assert tenants <= accounts.keys()
        for name, account in accounts.items():
            mine = [each for each in running if each.share.name == name]
            assert account.running == len(mine)
            assert account.sequences == sum(each.sequences for each in mine)
        assert {n for each in queue._active.values() for n in each} == {
            each.share.name for each in waiting
        }
    for entry in waiting:
        queue.leave(entry)
    for entry in running:
        queue.end(entry, 1.0)
    if waiting or running:
        assert not queue._accounts
    assert not queue._active
    assert not queue._unread
    assert not queue._passed
    assert queue._running_work == pytest.approx(0, abs=1e-3)


def test_ten_thousand_tenants_that_come_and_go_take_no_memory() -> None:
    queue: FairQueue[int] = FairQueue()
    steady = queue.begin_at_once(Share("steady"), 1, 1e9, 0)
    for number in range(10_000):
        queue.end(queue.begin_at_once(Share(f"t{number}"), 1, 1, 0), 1)
        queue.end(steady, 1e9)
        steady = queue.begin_at_once(Share("steady"), 1, 1e9, 0)
    assert len(queue._accounts) < 200
