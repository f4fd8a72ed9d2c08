"""What is disturbed: the plan, whom it meets in a tree of processes, and whom it never does."""

import asyncio
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest

from bench.errors import LoadError
from bench.faults import disturb, gaps
from bench.faults.disturb import Due, parse, planned
from bench.faults.disturber import Disturber
from bench.faults.gaps import Span
from bench.faults.victims import Cluster, ClusterError, Replica, family, of_url, title
from bench.traffic.transcript import Transcript
from tests.server import wait
from tests.services import fleet

SESSION = "session_of_test_disturb"
QUICK = "up=process,settle=0,wait=20"


# --- the plan -------------------------------------------------------------------------------


def test_the_plan_is_in_order_and_of_the_seed_alone() -> None:
    each = [parse("kill-replica:every=10"), parse("command:true,every=3,first=1,count=4")]
    plan = list(islice(planned(each, 7), 40))
    assert plan == sorted(plan)
    assert plan == list(islice(planned(each, 7), 40))
    assert plan != list(islice(planned(each, 8), 40))
    assert [due.turn for due in plan if due.number == 1] == [0, 1, 2, 3]
    kills_s = [due.at_s for due in plan if due.number == 0]
    assert all(abs(at_s - 10 * turn) <= 2 for turn, at_s in enumerate(kills_s, 1))


def test_without_jitter_times_are_exact() -> None:
    result = planned([parse("command:true,every=3,first=1,count=3,jitter=0")], 0)
    assert list(result) == [Due(1.0, 0, 0), Due(4.0, 0, 1), Due(7.0, 0, 2)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("kill-replicas:every=1", "did you mean 'kill-replica'"),
        ("kill-replica", "every=VALUE"),
        ("kill-replica:every=0", "must be above 0"),
        ("kill-replica:every=1,part=core", "no such option"),
        ("kill-engine:every=1,part=cores", "did you mean 'core'"),
        ("kill-raylet:every=1", "nodes=VALUE"),
        ("command:every=3", "every=VALUE"),
        ("kill-replica:every=1,up=htpp", "did you mean 'http'"),
    ],
)
def test_a_spec_that_cannot_be_understood_says_so(text: str, names: str) -> None:
    with pytest.raises(LoadError, match=names):
        parse(text)


def test_a_command_may_hold_anything_but_an_option() -> None:
    first = parse("command:serve deploy 'a b.yaml' --x 1; true,every=60,count=2")
    assert first.command == "serve deploy 'a b.yaml' --x 1; true"
    assert (first.every_s, first.first_s, first.count, first.min_up) == (60, 60, 2, 0)
    assert parse("restart-gateway:every=5").deployment == "llm:gateway"
    assert parse("stop-engine:every=5,for=2.5").for_s == 2.5


# --- whom -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> Iterator[psutil.Process]:
    with fleet.running(3, session=SESSION) as running:
        assert wait(lambda: len(engines(Cluster(session=SESSION))) == 3)
        yield running


@pytest.fixture(scope="module")
def theirs() -> Iterator[psutil.Process]:
    """The same titles, in another cluster."""
    with fleet.running(2, session="session_of_others") as running:
        assert wait(lambda: len(engines(Cluster(session="session_of_others"))) == 2)
        yield running


def engines(cluster: Cluster, deployment: str = "llm:engine") -> list[psutil.Process]:
    return [p for replica in cluster.replicas(deployment) for p in replica.part("core")]


def below(process: psutil.Process) -> set[int]:
    return {child.pid for child in process.children(recursive=True)}


def test_only_what_is_below_the_raylets_of_a_session_is_found(
    ours: psutil.Process, theirs: psutil.Process
) -> None:
    cluster = Cluster(session=SESSION)
    replicas = cluster.replicas("llm:engine")
    assert len(replicas) == 3
    assert {replica.process.pid for replica in replicas} <= below(ours)
    assert all(title(replica.process) == fleet.REPLICA for replica in replicas)
    assert len(engines(cluster)) == 3
    assert {process.pid for process in engines(cluster)} <= below(ours)
    assert not {process.pid for process in engines(cluster)} & below(theirs)
    assert [raylet.process.pid for raylet in cluster.raylets()] == [ours.pid]
    assert cluster.raylets()[0].is_("one")
    assert cluster.raylets()[0].is_("0123456")
    assert not cluster.raylets()[0].is_("0")
    assert cluster.replicas("llm:eng") == cluster.replicas("llm:gateway") == []


def test_only_what_is_below_a_process_is_found(
    ours: psutil.Process, theirs: psutil.Process
) -> None:
    cluster = Cluster(pids=[theirs.pid])
    assert {process.pid for process in engines(cluster)} <= below(theirs)
    first = Cluster(pids=[cluster.replicas("llm:engine")[0].process.pid])
    assert len(first.replicas("llm:engine")) == len(engines(first)) == 1
    assert Cluster(session="session_of_test").replicas("llm:engine") == []


def test_whose_processes_must_be_said() -> None:
    with pytest.raises(ClusterError, match="one of them must say"):
        Cluster()
    with pytest.raises(ClusterError, match="bench itself"):
        Cluster(pids=[psutil.Process().pid])
    with pytest.raises(ClusterError, match="no such process"):
        Cluster(pids=[2**22 + 1])
    with pytest.raises(ClusterError, match="say whose with --pid"):
        of_url("http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="not this machine"):
        of_url("http://192.0.2.77:80")


def test_the_cluster_of_a_url_is_that_of_who_listens_there(ours: psutil.Process) -> None:
    replica = Cluster(session=SESSION).replicas("llm:engine")[0].process

    def ports() -> list[int]:
        return [each.laddr.port for each in replica.net_connections("tcp")]

    assert wait(lambda: bool(ports()))
    assert of_url(f"http://127.0.0.1:{ports()[0]}").session == SESSION


def test_workers_that_a_template_forked_belong_to_the_raylet_of_their_stand_in(
    ours: psutil.Process,
) -> None:
    """`of_url` found no cluster, and --session no replica, of an application with a template."""
    with fleet.running(2, session="session_of_forks", forked=True) as raylet:
        cluster = Cluster(session="session_of_forks")
        assert wait(lambda: len(engines(cluster)) == 2)
        replica = cluster.replicas("llm:engine")[0].process
        assert replica.pid not in below(raylet)
        assert replica in family(raylet)
        assert not {process.pid for process in engines(cluster)} & below(ours)
        assert wait(lambda: bool(replica.net_connections("tcp")))
        port = replica.net_connections("tcp")[0].laddr.port
        assert of_url(f"http://127.0.0.1:{port}").session == "session_of_forks"


def test_a_replica_is_ready_once_it_answers_and_not_while_it_is_stopped() -> None:
    with fleet.running(1, start_s=6.0) as running:
        cluster = Cluster(pids=[running.pid])
        assert wait(lambda: len(engines(cluster)) == 1)
        result = cluster.replicas("llm:engine")
        assert cluster.ready(result, "http", 0.0) == []
        assert cluster.ready(result, "process", 0.0) == result
        assert cluster.ready(result, "process", 60.0) == []
        assert wait(lambda: cluster.ready(result, "http", 0.0) == result)
        assert cluster.ready(result, "http", 60.0) == []
        result[0].engine[0].suspend()
        assert wait(lambda: cluster.ready(result, "http", 0.0) == [])
        result[0].engine[0].resume()
        assert wait(lambda: cluster.ready(result, "http", 0.0) == result)


def test_a_replica_that_answers_on_another_port_than_before_is_ready() -> None:
    """A killed vllm-rs listens on another one, and its replica was never disturbed again."""
    with fleet.running(1, restart=True) as running:
        cluster = Cluster(pids=[running.pid])

        def ready() -> list[Replica]:
            return cluster.ready(cluster.replicas("llm:engine"), "http", 0.0)

        def port() -> int:
            return int(replica.process.net_connections("tcp")[0].laddr.port)

        assert wait(lambda: len(ready()) == len(engines(cluster)) == 1)
        (replica,) = ready()
        before = port()
        replica.engine[0].kill()
        assert wait(lambda: port() != before)
        assert wait(lambda: ready() != [] and ready()[0].process == replica.process)


def test_a_replica_that_was_struck_is_not_ready_though_it_answers_yet() -> None:
    with fleet.running(2) as running:
        cluster = Cluster(pids=[running.pid])

        def ready() -> set[int]:
            result = cluster.ready(cluster.replicas("llm:engine"), "http", 0.0)
            return {replica.process.pid for replica in result}

        assert wait(lambda: len(ready()) == len(engines(cluster)) == 2)
        first, other = cluster.replicas("llm:engine")
        cluster.strike(first.process)
        assert ready() == {other.process.pid}
        # One that lost its engine, whoever killed it, is not ready until it is replaced.
        other.process.suspend()
        other.engine[0].kill()
        assert wait(lambda: not cluster.replicas("llm:engine")[1].engine)
        other.process.resume()
        assert other.process.pid not in ready()
        assert wait(lambda: len(ready()) == 1)


# --- doing it -------------------------------------------------------------------------------


def disturber(tmp_path: Path, cluster: Cluster | None, *specs: str) -> Disturber:
    start_s = time.perf_counter()
    return Disturber(
        [parse(text) for text in specs],
        cluster,
        0,
        lambda: time.perf_counter() - start_s,
        tmp_path / "log",
    )


async def test_kills_meet_only_the_fleet_and_leave_enough(
    tmp_path: Path, theirs: psutil.Process
) -> None:
    others = below(theirs)
    with fleet.running(2, start_s=0.5) as running:
        cluster = Cluster(pids=[running.pid])
        first = disturber(
            tmp_path,
            cluster,
            "kill-replica:every=0.2,count=2,settle=0,wait=30",
            "kill-engine:every=0.3,count=2,settle=0,wait=30",
        )
        assert wait(lambda: len(engines(cluster)) == 2)
        first.check()
        assert not first.counted
        await asyncio.wait_for(first.run(), 60)
    assert first.counted
    assert [done.error for done in first.done] == [""] * 4
    assert sorted(done.kind for done in first.done) == ["kill-engine"] * 2 + ["kill-replica"] * 2
    # Each but the first found one replica gone, and waited until two were ready.
    assert all(done.waited_s > 0.3 for done in first.done[1:])
    assert len({done.what for done in first.done}) == 4
    assert all(fleet.REPLICA in done.what for done in first.done)
    assert below(theirs) == others


async def test_disturbances_lie_apart(tmp_path: Path) -> None:
    with fleet.running(3) as running:
        cluster = Cluster(pids=[running.pid])
        assert wait(lambda: len(engines(cluster)) == 3)
        single = disturber(
            tmp_path,
            cluster,
            f"kill-replica:every=0.1,count=1,apart=1.5,{QUICK}",
            f"kill-engine:every=0.2,count=1,apart=1.5,{QUICK}",
        )
        await asyncio.wait_for(single.run(), 60)
    first, second = single.done
    assert (first.error, second.error) == ("", "")
    assert second.at_s - first.until_s >= 1.5


async def test_who_was_struck_a_short_time_ago_rests(tmp_path: Path) -> None:
    with fleet.running(3, restart=True) as running:
        cluster = Cluster(pids=[running.pid])
        assert wait(lambda: len(engines(cluster)) == 3)
        kill = "kill-engine:every=0.1,min_up=3,up=process,settle=0"
        first = disturber(tmp_path, cluster, f"{kill},count=4,rest=60,wait=5")
        await asyncio.wait_for(first.run(), 60)
        assert [done.error for done in first.done] == [""] * 3 + ["there is nothing to kill-engine"]
        assert len(engines(cluster)) == 3
        first = disturber(tmp_path, cluster, f"{kill},count=1,rest=0.1,wait=20")
        await asyncio.wait_for(first.run(), 60)
        assert first.done[0].error == ""


async def test_who_is_alone_is_spared(tmp_path: Path) -> None:
    with fleet.running(1) as running:
        cluster = Cluster(pids=[running.pid])
        assert wait(lambda: len(engines(cluster)) == 1)
        before = below(running)
        spec = "kill-replica:every=0.1,count=1,up=process,settle=0,wait=0.6"
        first = disturber(tmp_path, cluster, spec)
        await first.run()
        assert below(running) == before
    assert first.done[0].error == "1 of llm:engine ready, and 2 needed"
    assert first.done[0].waited_s >= 0.6


async def test_a_stopped_engine_continues(tmp_path: Path) -> None:
    with fleet.running(2) as running:
        cluster = Cluster(pids=[running.pid])
        assert wait(lambda: len(engines(cluster)) == 2)
        single = disturber(
            tmp_path,
            cluster,
            f"stop-engine:every=0.1,count=1,for=0.7,{QUICK}",
            f"stop-engine:every=2,count=1,{QUICK}",
        )
        stopping = asyncio.create_task(single.run())

        def stopped() -> int:
            return sum(p.status() == psutil.STATUS_STOPPED for p in engines(cluster))

        assert await asyncio.to_thread(wait, lambda: stopped() == 1)
        assert await asyncio.to_thread(wait, lambda: stopped() == 0)
        # The second is not to go on, and does at the end of the run.
        assert await asyncio.to_thread(wait, lambda: stopped() == 1 or stopping.done())
        await stopping
        assert await asyncio.to_thread(wait, lambda: stopped() == 0)
    first, second = single.done
    assert first.until_s - first.at_s >= 0.7
    assert second.until_s == second.at_s


async def test_a_run_that_is_broken_off_leaves_nothing_stopped(tmp_path: Path) -> None:
    with fleet.running(2) as running:
        cluster = Cluster(pids=[running.pid])
        assert wait(lambda: len(engines(cluster)) == 2)
        first = disturber(tmp_path, cluster, f"stop-engine:every=0.1,for=60,{QUICK}")
        stopping = asyncio.create_task(first.run())
        assert await asyncio.to_thread(wait, lambda: bool(first.done))
        stopping.cancel()
        await asyncio.wait({stopping})
        assert all(p.status() != psutil.STATUS_STOPPED for p in engines(cluster))
    assert len(first.done) == 1


async def test_a_node_dies_only_if_it_is_named_and_others_have_replicas(
    tmp_path: Path, ours: psutil.Process
) -> None:
    cluster = Cluster(session=SESSION)
    with pytest.raises(LoadError, match=r"nodes = 'two': no such node"):
        disturber(tmp_path, cluster, "kill-raylet:every=1,nodes=two").check()
    # All its replicas are on the one node.
    first = disturber(tmp_path, cluster, "kill-raylet:every=0.1,count=1,nodes=one," + QUICK)
    first.check()
    first.disturbances = [parse("kill-raylet:every=0.1,count=1,nodes=one,up=process,wait=0")]
    await first.run()
    assert first.done[0].error == "0 of llm:engine ready on other nodes"
    assert ours.is_running()
    with fleet.running(1, session="session_of_a_node") as node:
        lonely = Cluster(session="session_of_a_node")
        assert wait(lambda: len(engines(lonely)) == 1)
        spec = "kill-raylet:every=0.1,count=1,nodes=one,min_up=1,up=process,settle=0"
        first = disturber(tmp_path, lonely, spec)
        await first.run()
        assert first.done[0].error == ""
        assert wait(lambda: node.status() == psutil.STATUS_ZOMBIE)


async def test_a_command_is_waited_for_and_its_status_counts(tmp_path: Path) -> None:
    first = disturber(
        tmp_path,
        None,
        "command:sleep 0.4 && echo said,every=0.1,count=1",
        "command:exit 3,every=0.2,count=1",
        "command:sleep 60,every=0.3,count=1,wait=0.3",
    )
    first.check()
    await asyncio.wait_for(first.run(), 20)
    assert [done.error for done in first.done] == ["", "exit status 3", "not over after 0.3 s"]
    assert first.done[0].until_s - first.done[0].at_s >= 0.4
    assert (tmp_path / "log").read_text() == "said\n"


def test_that_nobody_is_there_is_said_before_the_run(
    tmp_path: Path, theirs: psutil.Process
) -> None:
    cluster = Cluster(pids=[theirs.pid])
    with pytest.raises(LoadError, match="titled ray::ServeReplica:llm:gateway"):
        disturber(tmp_path, cluster, "restart-gateway:every=1").check()


# --- silences -------------------------------------------------------------------------------


def stream(*times_s: float, **more: object) -> Transcript:
    sent_s, *chunk_s, end_s = times_s
    fields = {"index": 0, "planned_s": 0.0, "status": 200, **more}
    return Transcript(sent_s=sent_s, chunk_s=chunk_s, end_s=end_s, **fields)  # type: ignore[arg-type]


def test_the_longest_silence_may_come_before_the_first_event() -> None:
    assert gaps.longest(stream(1.0, 1.1, 1.2, 3.0, 3.1)) == Span(1.2, 3.0)
    assert gaps.longest(stream(1.0, 4.0, 4.1)) == Span(1.0, 4.0)
    assert gaps.longest(stream(1.0, 1.1, 9.0, error="cut: x")) == Span(1.1, 9.0)
    assert gaps.longest(stream(1.0, 4.0, 4.1, whole=True)) is None
    assert gaps.longest(stream(1.0, 4.0, status=503)) is None


def test_a_silence_belongs_to_the_nearest_disturbance_that_it_lies_over() -> None:
    kills = [Span(10, 10), Span(20, 25), Span(24, 24)]
    assert gaps.cause(Span(9.9, 11.0), kills) == 0
    assert gaps.cause(Span(10.5, 12.0), kills) == 0  # It was noticed a little later.
    assert gaps.cause(Span(14.0, 15.0), kills) is None
    assert gaps.cause(Span(23.9, 26.0), kills) == 2
    assert gaps.cause(Span(19.9, 26.0), kills) == 1


def test_met_is_what_was_under_way() -> None:
    assert gaps.met(stream(1, 2, 3), Span(2.5, 2.5))
    assert not gaps.met(stream(1, 2, 3), Span(3.5, 3.5))


def test_percentiles_are_left_out_where_there_are_too_few() -> None:
    nothing = gaps.Lengths(count=0, p50_s=None, p99_s=None, max_s=None)
    assert gaps.statistics([]) == nothing
    result = gaps.statistics(n / 100 for n in range(400))
    assert (result.count, result.max_s) == (400, 3.99)
    assert result.p50_s == pytest.approx(1.995)
    assert result.p99_s == pytest.approx(3.95, abs=0.01)


def test_kinds_are_documented() -> None:
    assert disturb.__doc__
    assert all(f"    {kind}:" in disturb.__doc__ for kind in disturb.KINDS)
