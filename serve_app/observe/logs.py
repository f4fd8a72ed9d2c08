"""Structured logs: one JSON object per line, in a file for each replica in Ray's log folder.

    <session of Ray>/logs/serve_app/<deployment>_<replica>.log, and .log.1 to .log.3 before it

Tools that collect Ray's logs collect these too. They contain no prompts, answers or keys: callers
pass single fields, and none of them is text of a request.
"""

import contextlib
import json
import logging
import logging.handlers
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

# Of one replica, and files of all replicas of a node together.
_FILE_BYTES, _FILES, _FOLDER_FILES = 64 * 2**20, 4, 100


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Start an engine inside this block: Ray Serve's own log keeps working.

    vllm configures logging when it is imported and when an engine is made, and Python then closes
    every handler there is: that of Serve loses the file that it writes to. Besides the lines, a
    replica without it fails what Serve's controller asks of it when it was started again, and is
    stopped for that.
    """
    targets = [
        (handler, handler.target)
        for handler in logging.getLogger("ray.serve").handlers
        if isinstance(handler, logging.handlers.MemoryHandler)
    ]
    try:
        yield
    finally:
        for handler, target in targets:
            handler.setTarget(target)  # Closed as well, it opens its file again.


def prune(folder: Path, max_files: int = _FOLDER_FILES) -> None:
    """Delete the files that were written to least recently, down to `max_files`.

    Each replica has files of its own, and replicas come and go.
    """
    files = sorted(folder.glob("*.log*"), key=_written_s, reverse=True)
    for file in files[max_files:]:
        file.unlink(missing_ok=True)


def _written_s(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # Another replica deletes as well.
        return 0.0


class Log:
    """Where a replica's lines go.

    Args:
        write: gets each line; None: lines are dropped.
        fields: of every line.
    """

    def __init__(self, write: Callable[[str], object] | None = None, **fields: str) -> None:
        self._write = write
        self._fields = fields

    @classmethod
    def of_replica(cls) -> "Log":
        """The log of the replica of Ray Serve that this process is."""
        import ray._private.worker
        from ray import serve

        context = serve.get_replica_context()
        deployment, replica = context.deployment, context.replica_tag
        folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve_app"
        folder.mkdir(exist_ok=True)
        prune(folder)
        file = RotatedFile(folder / f"{deployment}_{replica}.log")
        log = cls(file.write, deployment=deployment, replica=replica)
        own = logging.getLogger("serve_app")
        own.addHandler(_Forward(log))
        own.setLevel(logging.INFO)
        return log

    def write(self, level: str, event: str, **fields: Any) -> None:
        """Write one line, without the fields that are None."""
        if self._write is None:
            return
        line = {"time": datetime.now(UTC), "level": level, "event": event, **self._fields}
        line |= {name: value for name, value in fields.items() if value is not None}
        try:
            text = msgspec.json.encode(line).decode()
        except (UnicodeEncodeError, TypeError):  # Half of a character; a value that is no JSON.
            text = json.dumps(line, default=str)
        self._write(text + "\n")


class RotatedFile:
    """A log file that is rotated when it is full. A few full files are kept.

    One write of the system for each line: logging's handler formats a line three times and asks
    twice for the file's state, which took a sixth of the door's time.
    """

    def __init__(self, path: Path, max_bytes: int = _FILE_BYTES, files: int = _FILES) -> None:
        self._path, self._max_bytes, self._files = path, max_bytes, files
        self._lock = threading.Lock()
        self._failing = False
        self._open()

    def write(self, line: str) -> None:
        """Append a line. If that fails, requests continue, and stderr reports it once."""
        data = line.encode()
        try:
            with self._lock:
                if self._bytes + len(data) > self._max_bytes:
                    self._rotate()
                os.write(self._descriptor, data)
                self._bytes += len(data)
            self._failing = False
        except OSError as error:
            if not self._failing:
                print(f"the log {self._path} cannot be written: {error}", file=sys.stderr)
            self._failing = True

    def _open(self) -> None:
        flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
        self._descriptor = os.open(self._path, flags, 0o644)
        self._bytes = os.fstat(self._descriptor).st_size

    def _rotate(self) -> None:
        os.close(self._descriptor)
        names = [self._path, *(Path(f"{self._path}.{n}") for n in range(1, self._files))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.replace(older)
        self._open()


class _Forward(logging.Handler):
    """What modules log by Python's logging, as lines."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.write(
            record.levelname.lower(),
            getattr(record, "event", record.module),
            message=record.getMessage(),
            request_id=getattr(record, "request_id", None),
        )


def to_stderr() -> Log:
    """For tests and tools."""
    return Log(sys.stderr.write, process=str(os.getpid()))
