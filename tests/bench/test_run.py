"""`python -m bench` as a user runs it, on a real server with known times and known faults."""

import asyncio
import csv
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import machine, matrix, measure, result, run, scrape
from bench.errors import TargetError
from bench.figures import Event, Repeat, Run, figures
from bench.itself.known_server import ROOT, Options, launched
from bench.records import Record, read
from bench.run import Job
from bench.search import RateResult
from bench.traffic import workload
from bench.traffic.load import Happening, Outcome
from bench.traffic.target import Target
from tests.bench import commands, made

PORT = 8880
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One small Ray cluster for all commands, as starting one takes longer than a run."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    settings = {"RAY_TMPDIR": "/tmp/ray-bench", "RAY_AUTH_MODE": "disabled"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    start = ["start", "--head", "--port=8881", "--num-cpus=2", "--include-dashboard=false"]
    start += ["--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    node = subprocess.Popen(
        [*ray, *start], env=inherited | settings, stdout=subprocess.PIPE, text=True
    )
    try:
        assert node.stdout is not None
        for line in node.stdout:
            if "runtime started" in line:
                break
        # Read on: a full pipe would stop it.
        threading.Thread(target=node.stdout.read, daemon=True).start()
        yield inherited | settings | {"RAY_ADDRESS": "127.0.0.1:8881"}
    finally:
        node.terminate()
        node.wait(60)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "bench", *words]


def bench(environment: dict[str, str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the last line and what was said on the way."""
    done = subprocess.run(
        command(*words), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def load(folder: Path, *more: str, workload: str = "synthetic:input=8,output=4") -> list[str]:
    words = ["run", "--url", URL, "--workload", workload, "--out", str(folder), "--no-metrics"]
    return [*words, *more]


def test_a_run_leaves_a_result_with_every_request(
    environment: dict[str, str], tmp_path: Path
) -> None:
    words = load(tmp_path, "--load", "users=4", "--requests", "60", "--slo", "ttft_ms=5000")
    with launched(PORT, Options(ttft_ms=20, itl_ms=5)):
        status, last, output = bench(environment, *words, "--actors", "2")
    assert last, output
    assert status == (0 if last["valid"] else 1), output
    # A machine that is late makes a run doubtful, and so do few requests; nothing else may.
    allowed = ("late", "CPU", "independent")
    assert all(any(word in doubt for word in allowed) for doubt in last["doubts"]), last
    saved = result.read(tmp_path, run=Run)
    by_vllm = json.loads((tmp_path / result.RESULT).read_text())
    records = list(read(tmp_path / "records.jsonl"))
    assert sorted((record.repeat, record.index) for record in records) == [
        (repeat, index) for repeat in range(3) for index in range(60)
    ]
    assert {record.actor for record in records} == {0, 1}
    assert all(record.ok and record.output_tokens == 4 for record in records)
    # Each repeat asks for other texts: none is served from what another left in a cache.
    assert [repeat.requests for repeat in saved.whole] == [60, 60, 60]
    assert by_vllm["total_output_tokens"] == 3 * 60 * 4
    assert by_vllm["max_concurrency"] == 4
    assert by_vllm["completed"] == 180
    assert saved.repeats[0].good_share == 1.0
    assert saved.command.startswith("python -m bench run --url")
    with open(tmp_path / "records.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 180
    ttfts_s = {(str(r.repeat), str(r.index)): measure.ttft_s(r) for r in records}
    assert {(row["repeat"], row["index"]): float(row["ttft_s"]) for row in rows} == ttfts_s
    assert "<html" in (tmp_path / "report.html").read_text()


def test_half_of_the_streams_cut_is_counted_and_makes_the_run_invalid(
    environment: dict[str, str], tmp_path: Path
) -> None:
    words = ["--load", "poisson:rate=100", "--requests", "40", "--repeats", "1", "--warm-up", "0"]
    with launched(PORT, Options(itl_ms=5, cut_rate=0.5)):
        status, last, _ = bench(environment, *load(tmp_path, *words))
    assert status == 1
    assert not last["valid"]
    whole = result.read(tmp_path, run=Run).whole[0]
    assert (whole.ok, whole.failed, whole.failures) == (20, 20, {"cut": 20})
    assert any("20 of 40 requests failed: 20 cut" in doubt for doubt in last["doubts"])


def test_a_server_that_dies_leaves_what_was_measured(
    environment: dict[str, str], tmp_path: Path
) -> None:
    words = ["--load", "constant:rate=40", "--duration", "4", "--repeats", "1"]
    with launched(PORT, Options(ttft_ms=10, itl_ms=5)) as server:
        path = tmp_path / "records.jsonl"
        started = subprocess.Popen(
            command(*load(tmp_path, *words)),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        while started.poll() is None and not (path.exists() and path.stat().st_size):
            threading.Event().wait(0.05)
        server.process.kill()
        output, _ = started.communicate(timeout=60)
    assert started.returncode == 1
    assert not json.loads(output.splitlines()[-1])["valid"]
    records = list(read(path))
    assert len(records) == 160
    assert any(record.ok for record in records)
    assert {record.error for record in records if not record.ok} >= {"connection refused"}


def test_ctrl_c_writes_what_came_so_far(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["--load", "users=2", "--duration", "60"]
    with launched(PORT, Options(ttft_ms=10, itl_ms=5)):
        started = subprocess.Popen(
            command(*load(tmp_path, *words)),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        path = tmp_path / "records.jsonl"
        while started.poll() is None and not (path.exists() and path.stat().st_size):
            threading.Event().wait(0.05)
        started.send_signal(signal.SIGINT)
        output, _ = started.communicate(timeout=60)
    assert started.returncode == 1
    last = json.loads(output.splitlines()[-1])
    assert any("interrupted" in doubt for doubt in last["doubts"])
    assert "1 of 3 repeats were run" in last["doubts"]
    assert list(read(path))
    assert result.read(tmp_path, run=Run).events[0].what == "the run was interrupted"


def test_a_search_that_finds_nothing_says_why(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["search", "--url", URL, "--workload", "synthetic:input=4,output=1", "--no-metrics"]
    words += ["--slo", "ttft_ms=60000,percentile=80", "--start", "200", "--warm-up", "0"]
    with launched(PORT, Options(error_rate=0.5)):
        status, last, output = bench(environment, *words, "--out", str(tmp_path))
    assert status == 1, output
    assert not last["resolved"]
    assert last["rate"] is None
    assert "missed by a server that is idle" in last["doubts"][-1]
    points = result.read(tmp_path, search=RateResult).points
    assert {point.verdict for point in points} == {"fail"}
    probed = list(read(tmp_path / "records.jsonl"))
    # Of each probe the steady part counts.
    assert len(probed) >= sum(point.share.counted for point in points) > 24


def test_a_comparison_reads_two_results(tmp_path: Path) -> None:
    for name, gap_s in (("a", 0.01), ("b", 0.02)):
        repeats = [
            Repeat(outcome=Outcome(records=[stream(i, gap_s + r * 1e-4) for i in range(50)]))
            for r in range(3)
        ]
        result.write(tmp_path / name, figures(repeats, None, None))
    ran = commands.run("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert ran.status == 0
    rows = {row["metric"]: row for row in ran.last["rows"]}
    assert rows["tpot_p50_s"]["verdict"] == "worse"
    assert rows["tpot_p50_s"]["ratio"] == pytest.approx(2.0, abs=0.02)
    assert rows["ttft_p50_s"]["verdict"] == "noise"
    assert "tpot_p50_s" in ran.shown


async def test_no_cell_of_the_matrix_asks_what_another_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requested: list[str] = []

    async def measured(job: Job, folder: Path) -> Run:
        requested.extend(
            str(request.prompt)
            for repeat in range(job.repeats)
            for request in workload.parse(job.workload, job.seed + repeat).take(job.count or 0)
        )
        return Run(name=job.name, **made.UNMEASURED)

    monkeypatch.setattr(run, "run", measured)
    cells = [cell for cell in workload.matrix() if cell.input_tokens == 200]
    job = Job(target=Target(url=URL, model="fake"), workload="", load="", repeats=3)
    outcome = await matrix.served(job, 2, tmp_path, cells)
    assert outcome.valid
    assert len(requested) == 2 * 3 * (1 + 4 + 8) * 2
    # A cache holds blocks of 16 tokens or more.
    beginnings = {" ".join(prompt.split()[:16]) for prompt in requested}
    assert len(beginnings) == len(requested)


# --- the parts ------------------------------------------------------------------------------


def stream(index: int, gap_s: float) -> Record:
    """A request every tenth of a second, answered with ten tokens."""
    at_s = index / 10
    chunk_s = [at_s + 0.05 + gap_s * number for number in range(10)]
    return Record(
        index=index,
        planned_s=at_s,
        sent_s=at_s,
        chunk_s=chunk_s,
        end_s=chunk_s[-1],
        status=200,
        output_tokens=10,
    )


def test_metrics_are_summed_over_servers_and_counted_from_the_first_scrape() -> None:
    texts = [
        "# TYPE vllm:num_requests_running gauge\n"
        f'vllm:num_requests_running{{engine="0"}} {running}\n'
        "# TYPE vllm:kv_cache_usage_perc gauge\n"
        f'vllm:kv_cache_usage_perc{{engine="0"}} {usage}\n'
        "# TYPE vllm:generation_tokens counter\n"
        f'vllm:generation_tokens_total{{engine="0"}} {tokens}\n'
        for running, usage, tokens in ((2, 0.25, 100), (3, 0.75, 50))
    ]
    first = scrape.totals(texts)
    assert first == {"running": 5, "kv_usage": 0.5, "generation_tokens": 150}
    later = {**first, "generation_tokens": 180.0}
    series = scrape.samples([(10.0, first), (11.0, {}), (12.0, later)], start_s=9.0)
    assert [sample.t_s for sample in series] == [1.0, 2.0, 3.0]
    assert [sample.generation_tokens for sample in series] == [0, None, 30]
    assert [sample.running for sample in series] == [5, None, 5]
    assert series[0].waiting is None
    assert series[0].prefix_hit_rate is None


def details(*states: str, target: int = 3) -> bytes:
    """As Ray Serve's REST API answers, with what is not read left out."""
    engine = {
        "target_num_replicas": target,
        "replicas": [{"replica_id": str(n), "state": state} for n, state in enumerate(states)],
    }
    other = {"target_num_replicas": 1, "replicas": [{"replica_id": "x", "state": "RUNNING"}]}
    deployments = {"engine": engine, "gateway": other}
    return json.dumps({"applications": {"llm": {"deployments": deployments}}}).encode()


def test_replicas_are_counted_by_their_state() -> None:
    outcome = scrape.counts(details("RUNNING", "STARTING", "STARTING", "STOPPING"), "engine")
    assert outcome == {"wanted": 3, "replicas": 1, "starting": 2, "stopping": 1}
    assert scrape.counts(details(), "gateway")["replicas"] == 1
    with pytest.raises(ValueError, match="no deployment 'engin'"):
        scrape.counts(details(), "engin")
    for wrong in (b"<html>", b"[]", b'{"applications": {"llm": {}}}'):
        with pytest.raises(ValueError, match="not Ray Serve's details"):
            scrape.counts(wrong, "engine")


async def test_a_dashboard_is_asked_beside_metrics_that_do_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("a-token\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    enough, answered = asyncio.Event(), [0]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        expected = request.startswith(b"GET /api/serve/applications/ ")
        expected = expected and b"Authorization: Bearer a-token\r\n" in request
        head = b"HTTP/1.0 200 OK\r\n\r\n" if expected else b"HTTP/1.0 404 Not Found\r\n\r\n"
        writer.write(head + details("RUNNING", "STARTING", target=2))
        writer.close()
        answered[0] += expected
        if answered[0] > 3:
            enough.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        scraper = scrape.Scraper([url + "/metrics"], 0.01, dashboard=url + "/")
        async with scraper.running():
            await enough.wait()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        with pytest.raises(TargetError, match="404"):
            await scraper.check()
    assert scraper.failed >= 3
    series = scrape.samples(scraper.scrapes, scraper.scrapes[0][0])
    assert (series[0].wanted, series[0].replicas, series[0].starting) == (2, 1, 1)
    assert series[0].running is None


def test_replicas_are_watched_after_the_last_answer(
    environment: dict[str, str], tmp_path: Path
) -> None:
    class Says(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(details("RUNNING", target=1))

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Says) as dashboard,
        launched(PORT, Options(ttft_ms=5, itl_ms=5)),
    ):
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        words = load(tmp_path, "--load", "users=2", "--requests", "4", "--repeats", "1")
        words += ["--dashboard", f"http://127.0.0.1:{dashboard.server_port}", "--linger", "2.5"]
        _, last, output = bench(environment, *words)
        dashboard.shutdown()
    assert last, output
    (samples,) = result.read(tmp_path, run=Run).server
    ended_s = max(record.end_s or 0.0 for record in read(tmp_path / "records.jsonl"))
    assert samples[-1].t_s > ended_s + 1.0
    assert samples[-1].replicas == 1


def test_a_lost_actor_makes_a_result_invalid() -> None:
    records = [stream(i, 0.01) for i in range(100)]
    whole = figures([Repeat(outcome=Outcome(records=records))], None, None)
    assert whole.valid, whole.doubts
    lost = Outcome(
        records=records, lost_actors=["actor 1 died"], events=[Happening(1.0, "actor 1 died")]
    )
    outcome = figures([Repeat(outcome=lost)], None, None)
    assert not outcome.valid
    assert outcome.doubts == ["repeat 1: actor 1 died"]
    assert outcome.events == [Event(repeat=0, at_s=1.0, what="actor 1 died")]


def test_a_target_with_one_model_needs_no_name() -> None:
    with launched(PORT, Options()):
        assert run.with_model(Target(url=URL, model="")).model == "fake"


def test_a_result_says_where_it_was_measured() -> None:
    outcome = machine.machine()
    assert outcome.cores == len(os.sched_getaffinity(0))
    assert outcome.versions["ray"]
    assert outcome.memory_gib > 0
