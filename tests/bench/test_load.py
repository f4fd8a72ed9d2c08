"""Load actors on a Ray cluster of three raylets, against a server in another process."""

import asyncio
import io
import itertools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from bench.errors import LoadError, TargetError
from bench.itself.known_server import Options, launched, serving
from bench.progress import Line, Progress
from bench.records import Record
from bench.traffic import load, sender
from bench.traffic.load import LOST, Outcome
from bench.traffic.request import Request
from bench.traffic.schedule import Closed, Plan, Planned
from bench.traffic.target import Target

PORT = 8855
NODES = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes on this machine, with a folder of their own."""
    folder = tempfile.mkdtemp(prefix="rb", dir="/tmp")  # Sockets lie in it: a short path.
    before = dict(os.environ)
    os.environ |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    node = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(NODES - 1):
            made.add_node(**node)
        load.connect(made.address)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def planned(times: Sequence[float | None], tokens: int = 3) -> list[Planned]:
    """Requests at these times; None in a closed loop."""
    return [
        Planned(index, Request(prompt="a b", output_tokens=tokens, kind=f"k{index % 2}"), at_s)
        for index, at_s in enumerate(times)
    ]


class Run:
    """A run and what its driver heard of it."""

    def __init__(self, plan: Plan, actors: int = 2, port: int = PORT, **settings: Any) -> None:
        self.batches: list[list[Record]] = []
        self.progress: list[Progress] = []
        self.where: dict[int, str] = {}
        self._plan, self._actors = plan, actors
        self._target = Target(url=f"http://127.0.0.1:{port}", model="fake", **settings)

    def heard(self, records: list[Record], progress: Progress) -> None:
        self.batches.append(records)
        self.progress.append(progress)

    def started(self, start_s: float, where: dict[int, str]) -> None:
        self.start_s, self.where = start_s, where

    async def go(self) -> Outcome:
        return await load.run(
            self._plan, self._target, self._actors, self.heard, repeat=1, on_start=self.started
        )

    def process(self, actor: int) -> int:
        match = re.search(r"process (\d+)", self.where[actor])
        assert match
        return int(match[1])


def by_error(records: list[Record]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for record in records:
        counts[record.error] = counts.get(record.error, 0) + 1
    return counts


# --- dealing --------------------------------------------------------------------------------


def test_an_open_plan_is_dealt_in_turn() -> None:
    shares = load.deal(Plan(planned([0.1 * at for at in range(7)])), actors=3, repeat=2)
    dealt = [[item.index for item in share.planned] for share in shares]
    assert dealt == [[0, 3, 6], [1, 4], [2, 5]]
    assert [(share.actor, share.repeat, share.users) for share in shares] == [
        (0, 2, None),
        (1, 2, None),
        (2, 2, None),
    ]


def test_users_are_dealt_and_each_has_as_many_requests() -> None:
    plan = Plan(planned([None] * 50), Closed(5, think_s=0.5), duration_s=9.0)
    shares = load.deal(plan, actors=2)
    assert [share.users for share in shares] == [[0, 2, 4], [1, 3]]
    assert [len(share.planned) for share in shares] == [30, 20]
    assert sorted(item.index for share in shares for item in share.planned) == list(range(50))
    assert [(share.think_s, share.duration_s) for share in shares] == [(0.5, 9.0)] * 2


def test_no_actor_is_without_work() -> None:
    assert len(load.deal(Plan(planned([0.0, 1.0])), actors=5)) == 2
    assert len(load.deal(Plan(planned([None] * 9), Closed(3)), actors=5)) == 3


# --- runs -----------------------------------------------------------------------------------


async def test_an_open_loop_from_actors_on_every_node(cluster: Cluster) -> None:
    times = [0.02 * at for at in range(60)]
    run = Run(Plan(planned(times)), actors=NODES, keep_text=True)
    with launched(PORT, Options(ttft_ms=50, itl_ms=5)):
        outcome = await run.go()
    assert by_error(outcome.records) == {"": 60}
    assert [record.index for record in outcome.records] == list(range(60))
    assert [record.planned_s for record in outcome.records] == times
    for record in outcome.records:
        assert record.actor == record.index % NODES
        assert (record.repeat, record.kind, record.user) == (1, f"k{record.index % 2}", None)
        assert (record.output_tokens, record.text) == (3, " word" * 3)
        assert record.sent_s is not None
        assert record.sent_s >= record.planned_s
        assert record.chunk_s[0] >= record.planned_s + 0.05
    # SPREAD: each actor has a node of its own.
    nodes = {re.findall(r"node (\w+)", where)[0] for where in outcome.actors.values()}
    assert len(nodes) == NODES
    assert run.where == outcome.actors
    # One machine, one clock.
    assert all(
        abs(outcome.clock_offset_s[actor]) <= outcome.clock_error_s[actor] < 0.1
        for actor in range(NODES)
    )
    assert set(outcome.cpu) == set(outcome.cpu_peak) == set(range(NODES))
    assert all(0 < cpu <= outcome.cpu_peak[actor] for actor, cpu in outcome.cpu.items())
    assert (outcome.lost_actors, outcome.events, outcome.interrupted) == ([], [], False)
    # Everything was handed over on the way, and the last count is the whole.
    assert sorted(r.index for batch in run.batches for r in batch) == list(range(60))
    assert len([batch for batch in run.batches if batch]) > NODES
    last = run.progress[-1]
    assert (last.planned, last.sent, last.running, last.done, last.failed) == (60, 60, 0, 60, 0)
    assert last.tokens == 180
    assert last.lag_p99_s is not None
    assert outcome.start_s == run.start_s


async def test_users_wait_for_their_answer_and_think(cluster: Cluster) -> None:
    run = Run(Plan(planned([None] * 12), Closed(3, think_s=0.1)))
    with launched(PORT, Options(ttft_ms=30)):
        outcome = await run.go()
    assert by_error(outcome.records) == {"": 12}
    assert {record.user: record.actor for record in outcome.records} == {0: 0, 1: 1, 2: 0}
    for user in range(3):
        mine = [record for record in outcome.records if record.user == user]
        mine.sort(key=lambda record: record.planned_s)
        assert len(mine) >= 3
        assert mine[0].planned_s == 0.0
        for earlier, later in itertools.pairwise(mine):
            assert earlier.end_s is not None
            assert later.planned_s == earlier.end_s + 0.1
            assert later.sent_s is not None
            assert later.sent_s >= later.planned_s


async def test_a_duration_ends_a_closed_loop(cluster: Cluster) -> None:
    plan = Plan(planned([None] * 1000), Closed(2), duration_s=0.6)
    with launched(PORT, Options(ttft_ms=50)):
        run = Run(plan)
        outcome = await run.go()
    assert by_error(outcome.records) == {"": len(outcome.records)}
    assert 2 <= len(outcome.records) <= 2 * 12
    assert all(record.planned_s < 0.6 for record in outcome.records)
    assert run.progress[-1].planned is None


async def test_a_stall_shows_in_an_open_loop_and_hides_in_a_closed_one(cluster: Cluster) -> None:
    """All stands still from 0.3 s to 4.3 s after the first request."""
    options = Options(ttft_ms=20, stall_at=0.3, stall_s=4.0)
    with launched(PORT, options):
        plan = Plan(planned([0.1 * at for at in range(50)]))
        opened = (await Run(plan).go()).records
    with launched(PORT, options):
        closed = (await Run(Plan(planned([None] * 60), Closed(2))).go()).records

    def waited(records: list[Record], least_s: float) -> int:
        assert by_error(records) == {"": len(records)}
        return sum(record.chunk_s[0] - record.planned_s > least_s for record in records)

    # Those planned for the first 2 s of the stall waited for what was left of it, 20 or so.
    assert waited(opened, 2.0) >= 18
    # They were sent while the server stood still: nothing waits for an answer.
    during = [r for r in opened if 0.5 < r.planned_s < 2.1]
    assert all(r.sent_s is not None and r.sent_s < 4.3 for r in during)
    # Of the users each had one request under way.
    assert waited(closed, 2.0) == 2


async def test_a_dead_actor_loses_its_own_share_only(cluster: Cluster) -> None:
    run = Run(Plan(planned([0.05 * at for at in range(50)])))
    killed: list[int] = []

    def heard(records: list[Record], progress: Progress) -> None:
        run.heard(records, progress)
        if progress.done >= 10 and not killed:
            killed.append(run.process(1))
            os.kill(killed[0], signal.SIGKILL)

    with launched(PORT, Options(ttft_ms=20)):
        outcome = await load.run(run._plan, run._target, 2, heard, on_start=run.started)
    assert [record.index for record in outcome.records] == list(range(50))
    mine = [record for record in outcome.records if record.actor == 0]
    lost = [record for record in outcome.records if record.error]
    assert by_error(mine) == {"": 25}
    assert {record.error for record in lost} == {LOST}
    assert {record.actor for record in lost} == {1}
    assert 10 < len(lost) < 25
    assert all(r.planned_s == 0.05 * r.index and r.sent_s is None for r in lost)
    assert len(outcome.lost_actors) == 1
    assert outcome.lost_actors[0].startswith("actor 1 (node")
    assert f"died with {len(lost)} requests" in outcome.lost_actors[0]
    assert len(outcome.events) == 1
    assert run.progress[-1].failed == len(lost)
    assert not outcome.interrupted


async def test_a_dead_actor_of_a_timed_closed_loop_loses_what_was_under_way(
    cluster: Cluster,
) -> None:
    """What it would still have taken nobody knows."""
    run = Run(Plan(planned([None] * 500, tokens=40), Closed(4), duration_s=1.5))
    killed: list[int] = []

    def heard(records: list[Record], progress: Progress) -> None:
        run.heard(records, progress)
        if progress.sent >= 4 and not killed:
            killed.append(run.process(1))
            os.kill(killed[0], signal.SIGKILL)

    with launched(PORT, Options(ttft_ms=20, itl_ms=20)):
        outcome = await load.run(run._plan, run._target, 2, heard, on_start=run.started)
    lost = [record for record in outcome.records if record.error]
    assert by_error(lost) == {LOST: 2}
    assert all(record.actor == 1 for record in lost)
    assert by_error([r for r in outcome.records if r.actor == 0]).keys() == {""}
    assert run.progress[-1].running == 0


async def test_the_server_dies(cluster: Cluster) -> None:
    run = Run(Plan(planned([0.03 * at for at in range(60)], tokens=10)))
    with launched(PORT, Options(ttft_ms=20, itl_ms=20)) as server:

        def heard(records: list[Record], progress: Progress) -> None:
            if progress.done >= 5:
                server.process.kill()

        outcome = await load.run(run._plan, run._target, 2, heard)
    errors = by_error(outcome.records)
    assert [record.index for record in outcome.records] == list(range(60))
    assert errors[""] >= 5
    assert errors["connection refused"] >= 5
    cut = [r for r in outcome.records if r.error.startswith("cut: connection")]
    assert cut
    assert all(record.status == 200 for record in cut)
    assert outcome.lost_actors == []


async def test_an_interrupted_run_keeps_what_came(cluster: Cluster) -> None:
    run = Run(Plan(planned([0.05 * at for at in range(2000)], tokens=20)))
    with launched(PORT, Options(ttft_ms=20, itl_ms=20)):
        task = asyncio.create_task(run.go())
        while not any(run.batches):
            await asyncio.wait({task}, timeout=0.05)
        task.cancel()
        outcome = await task
    assert outcome.interrupted
    assert task.cancelling() == 0
    assert [event.what for event in outcome.events] == ["the run was interrupted"]
    errors = by_error(outcome.records)
    assert set(errors) == {"", "interrupted: the run was stopped"}
    assert errors[""] >= 1
    assert 0 < len(outcome.records) < 500
    # What was under way has its times until then.
    broken = [record for record in outcome.records if record.error]
    assert any(record.chunk_s for record in broken)
    assert sum(len(batch) for batch in run.batches) == len(outcome.records)


async def test_what_cannot_write_ends_the_run(cluster: Cluster) -> None:
    def heard(records: list[Record], progress: Progress) -> None:
        if any(record.actor == 0 for record in records):
            raise OSError("no space left on device")

    with launched(PORT, Options()):
        plan = Plan(planned([0.05 * at for at in range(2000)]))
        target = Target(url=f"http://127.0.0.1:{PORT}", model="fake")
        with pytest.raises(OSError, match="no space"):
            await load.run(plan, target, 2, heard)


async def test_what_cannot_start_says_so(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(planned([0.0]))
    with pytest.raises(TargetError, match="is not http"):
        await load.run(plan, Target(url="nowhere", model="fake"), 1, lambda *_: None)
    monkeypatch.setattr(load, "_READY_S", 0.0)
    with pytest.raises(LoadError, match="actors = '1': not all of them run"):
        await Run(plan, actors=1).go()


# --- one actor, without Ray ---------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process does to be a good instrument is not for the process of the tests."""
    monkeypatch.setattr(sender, "_settle", lambda: None)


async def collect(sending: sender.Sender, pause_s: float = 0.0) -> AsyncIterator[list[Record]]:
    async for data in sending.send(time.perf_counter()):
        yield sender.decoder.decode(data).records
        await asyncio.sleep(pause_s)


async def test_nothing_is_forgotten_while_a_batch_is_handed_over(settled: None) -> None:
    share = sender.Share(actor=0, repeat=0, planned=planned([0.03 * at for at in range(20)]))
    async with serving(Options(), PORT):
        sending = sender.Sender(share, Target(url=f"http://127.0.0.1:{PORT}", model="fake"))
        records = [each for batch in [b async for b in collect(sending, 0.4)] for each in batch]
    assert sorted(record.index for record in records) == list(range(20))


async def test_all_that_is_broken_off_is_decoded_and_handed_over(settled: None) -> None:
    users = 200
    plan = planned([None] * users, tokens=500)
    share = sender.Share(actor=0, repeat=0, planned=plan, users=list(range(users)))
    async with serving(Options(itl_ms=10), PORT) as server:
        sending = sender.Sender(share, Target(url=f"http://127.0.0.1:{PORT}", model="fake"))
        records: list[Record] = []
        enough = float("inf")
        async for encoded in sending.send(time.perf_counter()):
            batch = sender.decoder.decode(encoded)
            records += batch.records
            if enough == float("inf") and server.answers.get("200") == users:
                # They are served in turn: then each has had some more events.
                enough = server.events + 20 * users
            if server.events > enough:
                await sending.stop()
    assert by_error(records) == {"interrupted: the run was stopped": users}
    assert all(record.chunk_s and record.end_s for record in records)


async def test_stopped_before_it_began(settled: None) -> None:
    share = sender.Share(actor=0, repeat=0, planned=planned([0.0]))
    sending = sender.Sender(share, Target(url=f"http://127.0.0.1:{PORT}", model="fake"))
    await sending.stop()
    assert [batch async for batch in collect(sending)] == [[]]


# --- progress -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_is_rewritten_on_a_terminal() -> None:
    stream = Terminal()
    line = Line(stream)
    line(Progress(at_s=1.0, planned=9, sent=3, running=1, done=2, failed=1, tokens=40))
    line(Progress(at_s=3.0, planned=9, sent=9, done=9, failed=1, tokens=140, lag_p99_s=0.0021))
    line.close()
    first, second = stream.getvalue().removesuffix("\n").split("\x1b[K")[:2]
    assert first.startswith("\r")
    output = "1.0 s  left 4 s  sent 3/9  running 1  done 2  failed 1  40 tokens/s  lag p99 -"
    assert first.removeprefix("\r").strip() == output
    assert "50 tokens/s  lag p99 2.1 ms" in second
    assert stream.getvalue().count("\n") == 1


def test_elsewhere_a_line_is_printed_every_five_seconds() -> None:
    stream, now = io.StringIO(), [100.0]
    line = Line(stream, clock=lambda: now[0], label="warm-up: ")
    for _ in range(48):
        now[0] += 0.25
        line(Progress(at_s=now[0] - 100, done=4))
    line.close()
    lines = stream.getvalue().splitlines()
    assert [text.split()[1] for text in lines] == ["5.0", "10.0", "12.0"]
    assert all(text.startswith("warm-up: ") and "sent 0  " in text for text in lines)
