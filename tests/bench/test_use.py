"""What a person meets: mistakes, full disks, folders used twice, and the table at the end."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import __main__ as main
from bench import measure, records, result
from bench.errors import BenchError, TargetFailed
from bench.figures import Run
from bench.itself.known_server import ROOT
from bench.matrix import Matrix
from bench.pages import console
from bench.progress import Progress, describe, time_left_s
from bench.records import Journal, Record
from tests.bench import made

NOBODY = "http://127.0.0.1:8852"
FULL = Path("/dev/full")


# --- mistakes -------------------------------------------------------------------------------

RUN = ["run", "--url", NOBODY, "--workload", "synthetic:input=5,output=1", "--load", "users=1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "--repeats: 0: must be from 1"),
        (["--repeats", "many"], "invalid whole number value: 'many'"),
        (["--actors", "-1"], "--actors: -1: must be"),
        (["--warm-up", "-1"], "--warm-up: -1: must be"),
        (["--timeout", "0"], "--timeout: 0: must be above 0"),
        (["--timeout", "nan"], "--timeout: nan: must be above 0"),
        (["--extra", "[1]"], "is not a JSON object"),
        (["--extra", "{"], "is not JSON"),
        (["--out", "/dev/null/x"], "/dev/null is a file, not a folder"),
    ],
)
def test_a_wrong_argument_is_named_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    arguments = [*RUN, "--out", str(tmp_path / "out"), *words]
    with pytest.raises(SystemExit) as ended:
        main._parser().parse_args(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_unreachable_endpoint_is_status_3_and_one_sentence_and_loads_nothing_large(
    tmp_path: Path,
) -> None:
    program = (
        "import sys; from bench.__main__ import main; status = main(); "
        'sys.exit(f\'{status} {sorted({"ray", "matplotlib", "torch"} & set(sys.modules))}\')'
    )
    command = [sys.executable, "-c", program, *RUN, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [f"bench: url = '{NOBODY}': connection refused", "3 []"]


def test_a_mistake_is_status_2_and_a_failure_3() -> None:
    assert BenchError("x").status == 2
    assert TargetFailed("x").status == 3


def test_every_command_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main._parser().parse_args(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown and command.about in shown for name, command in main.COMMANDS.items())


def test_the_recorded_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", "--extra", '{"top_k": 1}', "--name", "before & after", "--load", "users=1"]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    from bench import machine

    echoed = machine.command().replace("python -m", "printf '%s\\n'", 1)
    shown = subprocess.run(["bash", "-c", echoed], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[1:] == words


# --- nothing is lost ------------------------------------------------------------------------


def answered(count: int) -> list[Record]:
    return [Record(index=index, planned_s=float(index)) for index in range(count)]


def seed_in(folder: Path) -> int | None:
    return result.read(folder, run=Run, matrix=Matrix).seed


def test_a_second_run_into_the_same_folder_keeps_the_first(tmp_path: Path) -> None:
    for number in range(3):
        path = result.prepare(tmp_path)
        records.append(path, answered(number + 1))
        result.write(tmp_path, Run(seed=number, **made.UNMEASURED))
    assert seed_in(tmp_path) == 2
    for number, folder in enumerate(("earlier-1", "earlier-2")):
        assert seed_in(tmp_path / folder) == number
        assert len(list(records.read(tmp_path / folder / result.RECORDS))) == number + 1


def test_a_result_without_records_is_kept_too(tmp_path: Path) -> None:
    """Such as a matrix, whose records are in the folders of its cells."""
    for number, started in enumerate(("10:00", "10:00", "11:00")):
        result.write(tmp_path, Matrix(started=started, seed=number, cells=[]))
    assert seed_in(tmp_path) == 2
    assert seed_in(tmp_path / "earlier-1") == 1
    assert not (tmp_path / "earlier-2").exists()


def test_an_empty_folder_has_nothing_to_keep(tmp_path: Path) -> None:
    result.prepare(tmp_path)
    result.prepare(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [result.RECORDS]


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_ends_no_run_and_loses_no_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.symlink_to(FULL)
    journal = Journal(path)
    journal.add(answered(3))
    assert journal.problem == "records.jsonl lacks the last 3 records: No space left on device"
    path.unlink()  # Somebody makes room.
    journal.add(answered(1))
    assert journal.problem == ""
    assert len(list(records.read(path))) == 4


def test_what_was_written_in_part_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    journal = Journal(path)
    journal.add(answered(2))
    with open(path, "ab") as file:
        file.write(b'{"index": 1')
    journal.add(answered(3))
    assert [record.index for record in records.read(path)] == [0, 1, 0, 1, 2]


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_result_that_cannot_be_written_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28), str(path))

    result.write(tmp_path, Run(seed=1, **made.UNMEASURED))
    monkeypatch.setattr(Path, "write_bytes", full)
    written = result.write(tmp_path, Run(seed=2, **made.UNMEASURED))
    assert not written.valid
    assert "No space left on device" in written.doubts[0]
    assert msgspec.json.decode(capsys.readouterr().err, type=Run) == written
    assert seed_in(tmp_path) == 1, "what was there is gone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_in_order(number: int) -> None:
    """Also where it was started with SIGINT ignored, as scripts start what is in the background."""
    program = (
        "import asyncio, bench.signals\n"
        "bench.signals.end_in_order()\n"
        "async def work():\n"
        "    print('ready', flush=True)\n"
        "    try:\n"
        "        await asyncio.sleep(60)\n"
        "    except asyncio.CancelledError:\n"
        "        print('in order', flush=True)\n"
        "asyncio.run(work())\n"
    )
    command = ["bash", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, program]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    started.send_signal(number)
    assert started.communicate(timeout=30)[0] == "in order\n"


# --- what is shown --------------------------------------------------------------------------


def shown(expected: dict[str, Any]) -> str:
    stream = io.StringIO()
    console.show(expected, stream)
    return stream.getvalue()


def test_the_table_of_a_run_has_its_figures_and_its_doubts(tmp_path: Path) -> None:
    outcome = made.run(tmp_path, "mine", [made.records(400, repeat=n) for n in range(3)])
    doubtful = result.doubted(outcome, "a sentence")
    text = shown(result.line(doubtful, Path("DIR"), "summary"))
    assert "TTFT p50" in text
    assert "output tokens/s" in text
    assert "NOT VALID" in text
    assert "doubt: a sentence" in text
    assert "out: DIR" in text
    assert "NOT VALID" not in shown(result.line(outcome, Path("DIR"), "summary"))


def test_the_table_of_a_matrix_has_no_blank_cell(tmp_path: Path) -> None:
    outcome = made.cells(tmp_path, "matrix", "mine", per_user=1)
    cells = {cell.name: cell.summary for cell in outcome.cells}
    text = shown(result.line(outcome, tmp_path, cells=cells))
    rows = [line for line in text.splitlines() if "in1000" in line]
    assert len(rows) == 6
    assert not any(" - " in f"{row} " for row in rows), rows


def test_whatever_a_command_says_is_shown() -> None:
    text = shown({"benchmark": "tune", "best": "a", "gain": 1.25, "trials": [{"score": 3.0}] * 2})
    assert "best" in text
    assert "1.25" in text
    assert text.count("3.00") == 2


def test_the_time_left_is_said_as_soon_as_it_is_known() -> None:
    assert time_left_s(Progress(at_s=2.0, planned=100)) is None
    assert time_left_s(Progress(at_s=2.0, planned=100, done=25)) == pytest.approx(6.0)
    assert time_left_s(Progress(at_s=2.0, end_s=30.0, planned=100, done=99)) == 28.0
    # The last request was sent, and answers are still to come.
    assert time_left_s(Progress(at_s=31.0, end_s=30.0, planned=100, done=50)) == 31.0
    assert "left 28 s" in describe(Progress(at_s=2.0, end_s=30.0), 0.0)
    assert "left ?" in describe(Progress(at_s=2.0), 0.0)


# --- bench's own lateness -------------------------------------------------------------------


def lag_doubts(late: int, of: int = 200) -> list[str]:
    every = [
        msgspec.structs.replace(record, sent_s=record.planned_s + (0.5 if place < late else 0.001))
        for place, record in enumerate(made.records(of))
    ]
    measures = measure.doubts(measure.measure(every), batch=True)
    return [doubt for doubt in measures if "sent late" in doubt]


def test_one_late_request_in_two_hundred_is_no_doubt() -> None:
    assert lag_doubts(0) == []
    assert lag_doubts(1) == []
    assert lag_doubts(6)
