"""Ray Serve's own log outlives the import of vllm."""

import json
import logging
import logging.config
import logging.handlers
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.observe import logs


@pytest.fixture
def serve_log(tmp_path: Path) -> Iterator[logging.handlers.MemoryHandler]:
    """A logger as Ray Serve makes it in a replica: a file behind a buffer."""
    logger = logging.getLogger("ray.serve")
    file = logging.handlers.RotatingFileHandler(tmp_path / "replica.log")
    handler = logging.handlers.MemoryHandler(1, target=file)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    handler.close()
    file.close()


def configured_by_somebody_else() -> None:
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})


def test_who_configures_logging_closes_the_handlers_of_others(
    serve_log: logging.handlers.MemoryHandler,
) -> None:
    configured_by_somebody_else()
    assert serve_log.target is None  # Where this is no longer so, `kept` has no purpose.


def test_the_log_of_ray_serve_keeps_working(
    serve_log: logging.handlers.MemoryHandler, tmp_path: Path
) -> None:
    logger = logging.getLogger("ray.serve")
    logger.error("before")
    with logs.preserved():
        configured_by_somebody_else()
    assert isinstance(serve_log.target, logging.FileHandler)
    assert serve_log.target.baseFilename == str(tmp_path / "replica.log")
    logger.error("after")
    assert (tmp_path / "replica.log").read_text() == "before\nafter\n"


def test_files_of_replicas_that_are_gone_do_not_pile_up(tmp_path: Path) -> None:
    for age in range(30):
        file = tmp_path / f"engine_{age}.log"
        file.write_text("{}")
        os.utime(file, (1e9 - age, 1e9 - age))
    (tmp_path / "other.txt").write_text("not a log")
    logs.prune(tmp_path, max_files=10)
    remaining = {file.name for file in tmp_path.iterdir()}
    assert remaining == {"other.txt", *(f"engine_{age}.log" for age in range(10))}


def test_a_log_that_is_full_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "replica.log"
    log = logs.Log(logs.RotatedFile(path, max_bytes=2000, files=3).write)
    for number in range(100):
        log.write("info", "request", number=number)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["replica.log", "replica.log.1", "replica.log.2"]
    assert all(file.stat().st_size <= 2000 for file in files)
    lines = [json.loads(line) for file in reversed(files) for line in file.open()]
    # None is lost at a turn, and they are in their order.
    assert [line["number"] for line in lines] == list(range(100 - len(lines), 100))


def test_a_log_continued_after_a_restart_is_as_full_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "replica.log"
    for number in range(100):
        logs.Log(logs.RotatedFile(path, max_bytes=2000, files=3).write).write("info", str(number))
    assert all(file.stat().st_size <= 2000 for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3


def test_requests_continue_where_the_log_cannot_be_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logs.Log(logs.RotatedFile(Path("/dev/full"), max_bytes=10**9).write)
    for _ in range(3):
        log.write("info", "request")
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_line_is_json_whatever_is_in_it() -> None:
    lines: list[str] = []
    log = logs.Log(lines.append, replica="r")
    log.write("info", "request", tenant='a"\n\u20ac', first_s=float("nan"), reason=None)
    log.write("info", "request", tenant="half \ud800", reason={1: object()})
    assert json.loads(lines.pop())["tenant"] == "half \ud800"
    (line,) = lines
    assert line.endswith("\n")
    assert line.count("\n") == 1
    parsed = json.loads(line)
    assert parsed["tenant"] == 'a"\n\u20ac'
    assert parsed["time"].endswith("Z")
    assert "reason" not in parsed
