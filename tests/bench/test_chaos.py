"""`python -m bench chaos` as it is run: on a server that answers rightly, wrongly, and dies."""

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from bench import result
from bench.faults.damage import Chaos, Judged
from tests.bench import commands
from tests.server import wait
from tests.services import fleet

ROOT = Path(__file__).parents[2]
PORT = 8930
URL = f"http://127.0.0.1:{PORT}"
TOKENS, DISTINCT = 24, 6
WORKLOAD = f"synthetic:input=8,output={TOKENS}"


@contextlib.contextmanager
def serving(*words: str, again: bool = False) -> Iterator[psutil.Process]:
    """The server, below a shell that is called as a raylet is; `again`: it comes back if killed."""
    first = " ".join(
        [sys.executable, "-m", "tests.services.greedy_server", f"--port={PORT}", *words]
    )
    script = f"while :; do {first}; sleep 0.3; done" if again else f"{first}; :"
    shell = ["raylet", "-c", script, "--session-name=session_of_test_chaos"]
    process = subprocess.Popen(shell, executable="/bin/sh", cwd=ROOT, stderr=subprocess.DEVNULL)
    below = psutil.Process(process.pid)
    try:
        assert wait(answers)
        yield below
    finally:
        members = [below, *below.children(recursive=True)]
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(10)


def answers() -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def options(folder: Path, *words: str, requests: int = 60) -> list[str]:
    command = ["chaos", "--url", URL, "--workload", WORKLOAD, "--requests", str(requests)]
    return [*command, "--users", "4", "--distinct", str(DISTINCT), "--out", str(folder), *words]


def chaos(folder: Path, *words: str, requests: int = 60) -> tuple[int, dict[str, Any], str]:
    """Exit status, the last line and what was said on the way."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *options(folder, *words, requests=requests)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def records(folder: Path) -> list[Judged]:
    lines = (folder / result.RECORDS).read_bytes().splitlines()
    return [msgspec.json.decode(line, type=Judged) for line in lines]


def test_what_is_right_is_valid_and_others_are_killed_meanwhile(tmp_path: Path) -> None:
    kills = "every=0.5,jitter=0,settle=0,up=process,count=2"
    with serving("--itl-s=0.01"), fleet.running(2) as running:
        assert wait(lambda: sum(p.name() != "" for p in running.children(recursive=True)) >= 4)
        status, last, output = chaos(
            tmp_path,
            f"--disturb=kill-replica:{kills}",
            f"--disturb=kill-engine:{kills}",
            "--disturb=command:echo hello,every=0.4,count=1",
            f"--pid={running.pid}",
            "--whole=0.2",
        )
    assert status == 0, output
    assert last["valid"] is True
    request = last["answers"]["asked"]
    assert request >= 60
    assert last["answers"]["equal"] == request
    assert last["answers"]["outcomes"] == {"whole": request}
    assert last["answers"]["streamed"] == pytest.approx(0.8 * request, abs=1)
    assert not any(last["faults"].values())
    assert {kind: row["done"] for kind, row in last["disturbances"].items()} == {
        "kill-replica": 2,
        "kill-engine": 2,
        "command": 1,
    }
    assert (tmp_path / "commands.log").read_text() == "hello\n"
    saved = result.read(tmp_path, chaos=Chaos)
    assert saved.benchmark == "chaos"
    assert len(saved.done) == 5
    transcripts = records(tmp_path)
    assert [record.index for record in transcripts] == list(range(request))
    assert {record.prompt for record in transcripts} == set(range(DISTINCT))
    assert all(len(record.token_ids or []) == TOKENS for record in transcripts)
    page = (tmp_path / "report.html").read_text()
    assert "Nothing was lost, doubled, missing or different." in page
    assert "kill-replica" in page


def test_each_fault_is_found_and_counted(tmp_path: Path) -> None:
    dealt = "double,skip,short,wrong,finish,usage,name,cut,error,refuse"
    with serving(f"--faults={dealt}", "--every=2", f"--after={DISTINCT}"):
        status, last, output = chaos(tmp_path, requests=80)
    assert status == 1, output
    assert last["valid"] is False
    assert last["answers"]["asked"] == 80
    assert last["faults"] == {
        "lost": 12,
        "doubled": 4,
        "missing": 8,
        "different": 4,
        "finish": 4,
        "usage": 4,
        "identity": 4,
    }
    assert last["answers"]["outcomes"] == {"whole": 68, "cut": 4, "error": 4, "refused": 4}
    # What is wrong only with its end, its counts or its name is still the right text.
    assert last["answers"]["equal"] == 40 + 12
    assert last["answers"]["ties"] == 0
    assert last["doubled"] == {"tokens": 4 * 3, "characters": 0}
    assert last["missing"] == {"tokens": 4 * 3 + 4 * (TOKENS - 9), "characters": 0}
    faulty = result.read(tmp_path, chaos=Chaos).faulty
    assert len(faulty) == 40
    assert all(len(each.faults) == 1 for each in faulty)
    assert "Wrong answers: 12 lost, 4 doubled" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("margin", "ties"), [("0.01", 4), ("0.0001", 0)])
def test_a_tie_is_shown_to_be_one_within_the_margin(tmp_path: Path, margin: str, ties: int) -> None:
    with serving("--faults=tie,pause", "--every=5", f"--after={DISTINCT}"):
        status, last, output = chaos(tmp_path, f"--tie-margin={margin}", requests=40)
    assert status == (0 if ties else 1), output
    assert (last["answers"]["equal"], last["answers"]["ties"]) == (36, ties)
    assert last["faults"]["different"] == 4 - ties
    margins = [r.verdict.margin for r in records(tmp_path) if r.verdict and r.verdict.margin]
    assert margins == [pytest.approx(0.001)] * 4
    # Half a second of silence is a pause, and those that have none are not.
    assert last["silences"]["paused"]["count"] >= 4


def test_without_ids_texts_are_compared_and_no_tie_is_shown(tmp_path: Path) -> None:
    with serving("--no-ids", "--faults=double,tie", "--every=5", f"--after={DISTINCT}"):
        status, last, _ = chaos(tmp_path, requests=40)
    assert status == 1
    assert (last["faults"]["doubled"], last["faults"]["different"]) == (4, 4)
    assert last["doubled"]["tokens"] == 0
    assert last["doubled"]["characters"] > 0
    assert any("no token ids" in doubt for doubt in last["doubts"])


def test_a_killed_server_costs_its_streams_and_the_cluster_is_found_by_its_url(
    tmp_path: Path,
) -> None:
    words = ("--itl-s=0.03", "--title=ray::ServeReplica:llm:engine")
    spec = "kill-replica:every=2,first=0.5,jitter=0,count=2,min_up=1,settle=0.5"
    with serving(*words, again=True):
        # As many as outlast a slow return of the server: those that it refuses are over at once.
        status, last, output = chaos(tmp_path, f"--disturb={spec}", requests=60)
    assert status == 1, output
    row = last["disturbances"]["kill-replica"]
    assert (row["done"], row["not_done"]) == (2, {})
    assert row["lost"] >= 2
    assert last["faults"]["lost"] >= 2
    assert last["faults"]["different"] == last["faults"]["doubled"] == 0
    assert last["answers"]["outcomes"]["cut"] >= 2
    # Those that were cut came as they should until then.
    cut = [record for record in records(tmp_path) if record.error.startswith("cut")]
    assert cut
    assert all(record.verdict and record.verdict.parted_at is None for record in cut)
    # It came back, and the load went on.
    first_s = result.read(tmp_path, chaos=Chaos).done[0].at_s
    assert any(record.ok and (record.sent_s or 0) > first_s for record in records(tmp_path))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--disturb=kill-replicas:every=1"], "did you mean 'kill-replica'"),
        (["--disturb=kill-replica:every=1"], "titled ray::ServeReplica:llm:engine"),
        (["--disturb=kill-replica:every=1", "--session=none"], "titled ray::ServeReplica"),
        (["--model=gredy"], "did you mean 'greedy'"),
        (["--whole=2"], "must be from 0 to 1"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence_and_status_2(
    tmp_path: Path, words: list[str], names: str
) -> None:
    with serving():
        ran = commands.run(*options(tmp_path, *words))
    assert ran.status == 2, ran.shown
    assert names in ran.shown


def test_what_never_happened_makes_a_run_invalid(tmp_path: Path) -> None:
    with serving():
        status, last, _ = chaos(tmp_path, "--disturb=command:true,every=1000", requests=10)
    assert status == 1
    assert last["doubts"] == ["command:true,every=1000: never happened"]
