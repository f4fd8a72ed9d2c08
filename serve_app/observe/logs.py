"""Structured logs: a JSON object a line, in a file of each replica beside Ray's own logs.

    <session of Ray>/logs/serve_app/<deployment>_<replica>.log, and .log.1 to .log.3 before it

What collects Ray's logs collects them. Prompts, answers and keys never get here: callers pass
fields one by one, and none of them is text of a request.
"""

import contextlib
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Of one replica, and files of all replicas of a node together.
_FILE_BYTES, _FILES, _FOLDER_FILES = 64 * 2**20, 4, 100


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Start an engine within this: Ray Serve's own log goes on.

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
    """Where a replica's lines go. `handler` None: to nobody.

    Args:
        fields: of every line.
    """

    def __init__(self, handler: logging.Handler | None = None, **fields: str) -> None:
        self._handler = handler
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
        handler = logging.handlers.RotatingFileHandler(
            folder / f"{deployment}_{replica}.log", maxBytes=_FILE_BYTES, backupCount=_FILES - 1
        )
        log = cls(handler, deployment=deployment, replica=replica)
        own = logging.getLogger("serve_app")
        own.addHandler(_Forward(log))
        own.setLevel(logging.INFO)
        return log

    def write(self, level: str, event: str, **fields: Any) -> None:
        """One line. A field that is None is left out."""
        if self._handler is None:
            return
        stamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        line = {"time": stamp, "level": level, "event": event, **self._fields}
        line |= {name: value for name, value in fields.items() if value is not None}
        # A record whose message is the line: rotation is the handler's, the format is ours.
        self._handler.handle(
            logging.LogRecord("serve_app", logging.INFO, "", 0, json.dumps(line), None, None)
        )


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
    return Log(logging.StreamHandler(sys.stderr), process=str(os.getpid()))
