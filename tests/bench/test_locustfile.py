"""Locust is run for real, as a process, on a real server whose times and failures are known."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import measure
from bench.itself.known_server import Options, Process, launched
from bench.pages import locust_report, report
from bench.records import Record, read
from tests.bench import made

ROOT = Path(__file__).parents[2]
# Tokens far apart: a client without a processor for a while sees several at once.
TTFT_S, ITL_S, TOKENS = 0.1, 0.06, 12
WORKLOAD = f"synthetic:input=20,output={TOKENS}"


def locust(url: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "locust", "-f", "bench/locustfile.py", "--headless"]
    command += ["--host", url, "--only-summary", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", timeout_s: float = 60.0) -> tuple[int, str]:
    """Its exit status and what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, output


def outcome(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result, list(read(folder / "records.jsonl"))


# --- a server that works --------------------------------------------------------------------


class Ran:
    """A run of 3 s by 4 users, and what came of it."""

    def __init__(self, folder: Path, status: int, output: str) -> None:
        self.folder, self.status, self.output = folder, status, output
        self.result, self.records = outcome(folder)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Locust's own statistics at the end, by request type."""
        rows = json.loads((self.folder / "locust.json").read_text())
        return {row["method"]: row for row in rows}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("locust")
    prompts = folder / "prompts.txt"
    prompts.write_text("What is a black hole?\n\nName a river.\n")
    options = Options(ttft_ms=TTFT_S * 1e3, itl_ms=ITL_S * 1e3, word=" <b>word</b>")
    with launched(8900, options) as server:
        process = locust(
            server.url,
            *("-u", "4", "-r", "4", "-t", "3s", "--json-file", str(folder / "locust")),
            *("--bench-workload", WORKLOAD, "--bench-examples", str(prompts)),
            *("--bench-api-key", "sk-a-secret", "--bench-header", "x-api-key: sk-a-secret-too"),
            # By Locust's convention every argument is a variable too.
            LOCUST_BENCH_OUT=str(folder),
        )
        yield Ran(folder, *finish(process))


def test_good_run_ends_well_and_says_what_it_was(ran: Ran) -> None:
    assert ran.status == 0, ran.output
    result = ran.result
    assert result["benchmark"] == "locust"
    assert result["users"] == 4
    assert result["target"] == {"url": "http://127.0.0.1:8900", "model": "fake", "endpoint": "chat"}
    assert result["workload"] == WORKLOAD
    assert "-u 4 -r 4 -t 3s" in result["command"]
    assert json.loads(ran.output.strip().splitlines()[-1])["requests"] == result["requests"]


def test_key_is_written_nowhere(ran: Ran) -> None:
    assert "sk-a-secret" not in ran.output
    assert not [p for p in ran.folder.iterdir() if "sk-a-secret" in p.read_text(errors="replace")]


def test_records_have_the_times_of_the_server(ran: Ran) -> None:
    assert len(ran.records) > 8
    for record in ran.records:
        request = record.asked_output_tokens
        assert record.error == ""
        assert request is not None
        assert record.sent_s is not None
        assert record.end_s is not None
        assert record.planned_s <= record.sent_s
        assert record.output_tokens == request
        assert len(record.chunk_s) == request
        # The server does not send early; and a client that buffered would see them all at the end.
        assert record.chunk_s[0] - record.sent_s > TTFT_S - 0.002
        assert record.chunk_s[-1] - record.chunk_s[0] > ITL_S * (request - 1) / 2
        assert record.chunk_s[-1] <= record.end_s
    assert {record.user for record in ran.records} == {0, 1, 2, 3}
    assert len({record.index for record in ran.records}) == len(ran.records)


def test_users_wait_for_their_answers(ran: Ran) -> None:
    for user in range(4):
        mine = sorted((r for r in ran.records if r.user == user), key=lambda r: r.planned_s)
        for before, after in itertools.pairwise(mine):
            assert before.end_s is not None
            assert before.end_s <= after.planned_s


def test_first_tokens_are_a_metric_of_locust(ran: Ran) -> None:
    rows = ran.rows()
    assert rows["POST"]["name"] == rows["TTFT"]["name"] == "/v1/chat/completions"
    assert rows["TTFT"]["num_requests"] == rows["POST"]["num_requests"] == len(ran.records)
    assert rows["POST"]["num_failures"] == 0
    first_ms = [(measure.ttft_s(record) or 0) * 1e3 for record in ran.records]
    assert rows["TTFT"]["min_response_time"] == pytest.approx(min(first_ms), abs=0.1)
    whole_ms = [(measure.e2e_s(record) or 0) * 1e3 for record in ran.records]
    assert rows["POST"]["max_response_time"] == pytest.approx(max(whole_ms), abs=0.1)


def test_result_is_what_measure_says_of_the_records(ran: Ran) -> None:
    window = measure.window(ran.records, 4)
    measures = measure.measure(ran.records, window=window)
    for name in ("requests_per_s", "output_tokens_per_s", "e2e_mean_s", "e2e_p50_s", "ttft_p50_s"):
        assert ran.result[name] == pytest.approx(getattr(measures, name)), name
    assert ran.result["steady"] == (window is not None)
    assert ran.result["requests"] == len(ran.records)
    assert ran.result["errors"] == []
    # Far too few for a p99.
    assert ran.result["e2e_p99_s"] is None


def test_examples_were_asked_during_the_load_and_answered(ran: Ran) -> None:
    examples = ran.result["examples"]
    assert [each["prompt"] for each in examples] == ["What is a black hole?", "Name a river."]
    of = sorted((r for r in ran.records if r.kind == "example"), key=lambda r: r.planned_s)
    for example, record in zip(examples, of, strict=True):
        assert example["answer"].startswith(" <b>word</b>")
        assert example["ttft_s"] == pytest.approx(measure.ttft_s(record))
        assert example["e2e_s"] == pytest.approx(measure.e2e_s(record))
    # Texts of the others are not kept.
    assert not any(record.text for record in ran.records if record.kind != "example")


def test_report_reads_it(ran: Ran, tmp_path: Path) -> None:
    report.report([ran.folder], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "Name a river." in html
    assert "&lt;b&gt;word&lt;/b&gt;" in html
    assert "<b>word</b>" not in html


# --- servers that do not --------------------------------------------------------------------


def faulty(options: Options, folder: Path, port: int) -> tuple[int, str, dict[str, int]]:
    """A run on a faulty server; also what the server says it answered."""
    with launched(port, options) as server:
        process = locust(
            server.url,
            *("-u", "4", "-r", "4", "-t", "3s", "--bench-out", str(folder)),
            *("--bench-workload", WORKLOAD),
        )
        status, output = finish(process)
        return status, output, _answers(server)


def _answers(server: Process) -> dict[str, int]:
    return server.stats().answers


def test_failures_are_counted_with_their_texts(tmp_path: Path) -> None:
    options = Options(
        ttft_ms=40, itl_ms=2, error_rate=0.25, event_error_rate=0.25, cut_rate=0.25, crlf=True
    )
    status, output, answers = faulty(options, tmp_path, 8901)
    result, records = outcome(tmp_path)

    assert status == 1
    errors = {each["reason"]: each for each in result["errors"]}
    assert set(errors) == {"http 500", "error event", "cut"}
    assert errors["http 500"]["text"] == "http 500: the engine is dead"
    assert errors["error event"]["text"] == "error event: the engine fell over"
    assert "POST /v1/chat/completions: RequestFailed('http 500: the engine is dead')" in output
    # No request is lost and none is counted twice.
    assert errors["http 500"]["count"] == answers["500"]
    assert len(records) == answers["500"] + answers["200"]
    assert result["failed"] == sum(not record.ok for record in records)
    # What was cut had begun: its first token is in the statistics of TTFT, the answer a failure.
    cut = [record for record in records if record.error.startswith("cut")]
    assert all(record.chunk_s and record.status == 200 for record in cut)
    assert result["valid"] is False


def test_endpoint_without_an_answer_fails_the_run(tmp_path: Path) -> None:
    # The model is named, so that nothing is asked before the load.
    arguments = ("-u", "2", "-r", "2", "-t", "2s", "--bench-model", "m")
    process = locust("http://127.0.0.1:8909", *arguments, "--bench-out", str(tmp_path))
    status, _ = finish(process)
    result, records = outcome(tmp_path)

    assert status == 1
    # A user's last one may be under way when the time is over.
    errors = [record.error for record in records]
    stopped = errors.count("interrupted: the run was stopped")
    assert stopped <= 2
    assert errors.count("connection refused") == len(errors) - stopped >= 1
    # Refused users wait: without that, thousands.
    assert len(records) <= 6
    assert result["e2e_p50_s"] is None
    assert result["examples"][0]["answer"] == ""
    assert result["examples"][0]["error"] == "connection refused"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bench-workload", "synthetik:input=5,output=5"], "did you mean 'synthetic'"),
        (["--bench-examples", "/no/such/file"], "bench-examples = '/no/such/file'"),
        ([], "127.0.0.1:8909 cannot be reached"),
    ],
)
def test_mistakes_are_said_before_the_load(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    older = tmp_path / "records.jsonl"
    older.write_text("{}")
    always = ("-u", "1", "-t", "2s", "--bench-out", str(tmp_path))
    status, output = finish(locust("http://127.0.0.1:8909", *always, *arguments))
    assert older.read_text() == "{}"
    assert status == 1
    assert message in output
    assert "Traceback" not in output


def test_interrupted_run_leaves_what_came_so_far(tmp_path: Path) -> None:
    with launched(8902, Options(ttft_ms=20, itl_ms=2)) as server:
        process = locust(
            server.url,
            *("-u", "4", "-r", "4", "-t", "60s", "--bench-out", str(tmp_path)),
            *("--bench-workload", WORKLOAD),
        )
        path = tmp_path / "records.jsonl"
        _wait_for_records(path, process)
        process.send_signal(signal.SIGINT)
        status, _ = finish(process)
    result, records = outcome(tmp_path)

    assert status == 1
    assert result["valid"] is False
    assert any("interrupted: stopped after" in doubt for doubt in result["doubts"])
    assert result["requests"] == len(records)
    assert any(record.ok for record in records)


def _wait_for_records(path: Path, process: "subprocess.Popen[str]") -> None:
    """Records come to the disk while the run goes on."""
    for _ in range(300):
        if path.exists() and path.stat().st_size:
            return
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
    raise AssertionError("no record within 30 s")


@pytest.mark.parametrize("ttft_ms", [50, 2500], ids=["short answers", "longer than Locust waits"])
def test_workers_hand_their_records_to_the_master(tmp_path: Path, ttft_ms: float) -> None:
    with launched(8903, Options(ttft_ms=ttft_ms, itl_ms=2)) as server:
        process = locust(
            server.url,
            *("-u", "4", "-r", "4", "-t", "3s", "--processes", "2"),
            *("--bench-out", str(tmp_path), "--bench-workload", WORKLOAD),
        )
        status, output = finish(process)
        answers = _answers(server)
    result, records = outcome(tmp_path)

    assert status == 0, output
    assert {record.actor for record in records} == {0, 1}
    assert len({record.user for record in records}) == 4
    assert len(records) == answers["200"]
    assert set(result["cpu"]) == {"worker 0", "worker 1"}
    # On the master's clock: none before its start, none long after the end.
    assert all(-1 < record.planned_s < 30 for record in records)
    # A user asks an example in place of a request that it sends once all are there. Where answers
    # take as long as the run, there may be no such request, and the result says so.
    asked = [record for record in records if record.kind == "example"]
    assert asked or ttft_ms > 1000
    assert len(result["examples"]) == len(asked)
    assert bool(result.get("examples_absent")) is not bool(asked)


# --- the summary, without Locust ------------------------------------------------------------


def test_summary_is_of_the_time_when_all_users_were_there() -> None:
    heard = made.records(200, users=10)
    result = locust_report.result(heard, {}, 10, {"locust": 0.1}, {})
    window = measure.window(heard, 10)
    assert window is not None
    assert result.requests_per_s == measure.measure(heard, window=window).requests_per_s
    assert result.requests == 200
    assert result.valid is True


def test_summary_doubts_a_client_that_was_busy() -> None:
    result = locust_report.result(made.records(200, users=10), {}, 10, {"locust": 0.97}, {})
    assert result.valid is False
    assert "locust used 97% of a CPU core" in result.doubts[0]


def test_summary_says_why_there_are_no_examples() -> None:
    result = locust_report.result(made.records(20, users=2), {}, 2, {}, {})
    assert result.examples == []
    assert "ended before all users were there" in result.examples_absent
    late = locust_report.result(
        made.records(20, users=2), {}, 2, {}, {}, all_there_s=1.5, ended_s=3.0
    )
    assert "were there after 1.5 s" in late.examples_absent
    assert "before the end after 3.0 s" in late.examples_absent


def test_example_that_failed_has_no_answer_and_no_latency() -> None:
    record = Record(index=3, planned_s=1.0, kind="example", error="http 503: full", status=503)
    result = locust_report.examples([record], {3: "Why?"})
    assert result[0].prompt == "Why?"
    assert result[0].error == "http 503: full"
    assert result[0].ttft_s is None
    assert result[0].answer == ""


def test_other_workers_have_the_same_numbers_and_no_examples() -> None:
    other = Record(index=3, actor=1, planned_s=0.5, text="not asked as an example")
    request = Record(index=3, actor=0, planned_s=1.0, kind="example", text="Because.")
    result = locust_report.examples([other, request], {3: "Why?"})
    assert [each.answer for each in result] == ["Because."]
