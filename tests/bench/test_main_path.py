"""`bench` from its options to its page, with the load actor in this process and not in Ray."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import records, result, run
from bench.figures import Run
from bench.itself.known_server import Options, launched
from bench.progress import Progress
from bench.records import Record
from bench.traffic import load
from bench.traffic.load import Outcome
from bench.traffic.schedule import Plan
from bench.traffic.sender import Sender, decoder
from bench.traffic.target import Target
from tests.bench import commands

PORT = 8844
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with launched(PORT, Options(ttft_ms=10, itl_ms=2)):
        yield


async def in_this_process(
    plan: Plan,
    target: Target,
    actors: int,
    on_batch: Callable[[list[Record], Progress], None],
    *,
    repeat: int = 0,
) -> Outcome:
    """What `load.run` does, by one actor that is no Ray actor."""
    (share,) = load.deal(plan, 1, repeat)
    start_s = time.perf_counter() + 0.1
    collected: list[Record] = []
    async for data in Sender(share, target).send(start_s):
        batch = decoder.decode(data)
        collected += batch.records
        on_batch(batch.records, Progress(at_s=batch.at_s, done=len(collected)))
    collected.sort(key=lambda record: record.index)
    return Outcome(records=collected, start_s=start_s, duration_s=time.perf_counter() - start_s)


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "run", in_this_process)
    monkeypatch.setattr(load, "connect", lambda: None)


RUN = ["run", "--url", URL, "--no-metrics", "--repeats", "2", "--warm-up", "1"]


def test_a_run_is_shown_and_kept_and_can_be_sent_again(
    server: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*RUN, "--workload", "synthetic:input=8,output=6", "--load", "users=3"]
    words += ["--requests", "30", "--gpus", "1", "--gpu-hour", "2", "--slo", "ttft_ms=9000"]
    ran = commands.run(*words, "--out", str(tmp_path / "a"))
    assert ran.status in (0, 1), ran.shown
    assert ran.last["answer_tokens"] == 6
    assert ran.last["usd_per_million_output_tokens"] > 0
    assert "TTFT p50" in ran.shown
    assert "output tokens/s" in ran.shown
    output = result.read(tmp_path / "a", run=Run)
    assert output.salt == ran.last["salt"]
    assert output.whole[0].answers.given_output_share == 1.0
    assert len(list(records.read(tmp_path / "a" / "records.jsonl"))) == 60
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Tokens of a request" in page

    prompts: list[set[Any]] = []

    async def listen(plan: Plan, *rest: Any, **more: Any) -> Outcome:
        prompts[-1] |= {item.request.prompt for item in plan.planned}
        return await in_this_process(plan, *rest, **more)

    monkeypatch.setattr(load, "run", listen)
    for more in ([], ["--salt", ran.last["salt"]], ["--salt", ran.last["salt"]]):
        prompts.append(set())
        commands.run(*words, *more, "--out", str(tmp_path / "b"))
    fresh, again, once_more = prompts
    assert not fresh & again
    assert again == once_more
    assert [each.name for each in sorted((tmp_path / "b").glob("earlier-*"))] == [
        "earlier-1",
        "earlier-2",
    ]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--load", "users=4", "--requests", "9", "--model", "fale"], "did you mean 'fake'"),
        (["--load", "poison:rate=3"], "did you mean 'poisson'"),
        (["--load", "users=4", "--requests", "0"], "count = '0'"),
        (["--load", "poisson:rate=3"], "give a count or a duration"),
        (["--load", "users=4", "--slo", "mlperf-sever"], "mlperf-server"),
        (["--load", "trace"], "has no times of its own"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence_and_status_2(
    server: None, tmp_path: Path, words: list[str], names: str
) -> None:
    load = ["--workload", "synthetic:input=8,output=4", "--out", str(tmp_path / "out")]
    ran = commands.run(*RUN, *load, *words)
    assert ran.status == 2
    assert names in ran.shown
    assert ran.shown.startswith("bench: ")
    assert ran.shown.count("\n") == 1


def test_no_server_is_status_3(tmp_path: Path) -> None:
    words = ["--workload", "synthetic:input=8,output=4", "--load", "users=1", "--requests", "3"]
    nobody = ["run", "--url", "http://127.0.0.1:8845", "--no-metrics"]
    ran = commands.run(*nobody, *words, "--out", str(tmp_path))
    assert ran.status == 3
    assert "connection refused" in ran.shown


def test_sessions_are_measured_by_turn_and_by_task(server: None, tmp_path: Path) -> None:
    workload = "sessions:turns=3,system=6,input=4,output=3,think=0.01,agents=1,exact=yes"
    words = [*RUN, "--endpoint", "chat", "--workload", workload, "--load", "users=2"]
    ran = commands.run(*words, "--requests", "8", "--out", str(tmp_path))
    assert ran.status in (0, 1), ran.shown
    assert (ran.last["sessions_planned"], ran.last["sessions_done"]) == (8, 8)
    assert set(ran.last["turns"]) >= {"turn 1", "turn 2", "turn 3", "sub-agent", "user"}
    assert "turn 3" in ran.shown
    output = result.read(tmp_path, run=Run)
    assert output.sessions[0].task_mean_s > 0
    assert "Sessions: " in (tmp_path / "report.html").read_text()


def test_a_curve_is_measured_load_by_load(server: None, tmp_path: Path) -> None:
    words = ["pareto", *RUN[1:], "--workload", "synthetic:input=4,output=8,exact=yes"]
    words += ["--users", "1,4", "--per-user", "8", "--gpus", "2", "--out", str(tmp_path)]
    ran = commands.run(*words)
    assert ran.status in (0, 1), ran.shown
    assert set(ran.last["curve"]) == {"1 users", "4 users"}
    one, four = ran.last["curve"]["1 users"], ran.last["curve"]["4 users"]
    assert four["gpu_tokens_per_s"] > one["gpu_tokens_per_s"]
    assert (tmp_path / "pareto.svg").read_text().startswith("<svg")
    assert 'id="pareto"' in (tmp_path / "report.html").read_text()


def test_an_interrupted_run_says_so(
    server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken_off(plan: Plan, *rest: Any, **more: Any) -> Outcome:
        outcome = await in_this_process(plan, *rest, **more)
        outcome.interrupted = True
        return outcome

    monkeypatch.setattr(load, "run", broken_off)
    job = run.Job(
        target=Target(url=URL, model="fake"),
        workload="synthetic:input=4,output=2",
        load="users=1",
        count=4,
        repeats=3,
    )
    actual = asyncio.run(run.run(job, tmp_path))
    assert not actual.valid
    assert "1 of 3 repeats were run" in actual.doubts
    assert len(actual.repeats) == 1
