"""Requests on disk before the ledger has them: nothing of them is lost if this process is killed.

A file for each process, in a folder of this machine, with one JSON line for each request that
begins and one for each that ends. A written line survives a SIGKILL, because the kernel has it. The
process holds a lock on its file for as long as it lives: whoever gets the lock of a file is the
heir of a process that ended, and hands over what it left.
"""

import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

from serve_app.tenants.ledger import Row

logger = logging.getLogger("serve_app")

# After so much, what is still under way is written to a new file.
_LARGEST_BYTES = 4 * 2**20
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Row)
# A row whose request has not ended: what it is charged if it never does.
OPEN = "open"
# A row whose request was refused: the ledger does not get it.
REFUSED = "refused"
# The last line of a file whose open requests are in the next one.
_ROLLED = b'"rolled"'


class Journal:
    """The file of this process, rolled from time to time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._open: dict[str, Row] = {}
        self._file = _create(folder)
        self._bytes = 0
        self._failing = False

    def begin(self, row: Row) -> None:
        """A request begins; `row` is what to charge for it if it is lost."""
        self._open[row.id] = row
        self._write(row)

    def end(self, row: Row) -> None:
        """A request is over."""
        self._open.pop(row.id, None)
        self._write(row)

    def roll(self) -> "Rolled | None":
        """Begin a new file if the old one is large, with the requests in flight."""
        if self._bytes < _LARGEST_BYTES:
            return None
        path, descriptor = self._file
        self._file, self._bytes = _create(self._folder), 0
        for row in self._open.values():
            self._write(row)
        os.write(descriptor, _ROLLED + b"\n")
        return Rolled(path, descriptor)

    def close(self) -> None:
        """The end of this process: a file without a request under way goes."""
        path, descriptor = self._file
        if not self._open:
            path.unlink(missing_ok=True)
        os.close(descriptor)

    def _write(self, row: Row) -> None:
        line = _encoder.encode(row) + b"\n"
        self._bytes += len(line)
        try:
            # After half of a line, which a full disk leaves, the next one begins anew.
            whole = os.write(self._file[1], b"\n" * self._failing + line) >= len(line)
            problem = None if whole else "the disk is full"
        except OSError as error:
            problem = str(error)
        if problem is not None and not self._failing:
            logger.error(
                "requests are not in the journal %s, and lost if this process is killed: %s",
                self._folder,
                problem,
            )
        self._failing = problem is not None


class Rolled:
    """A full file, to be removed once the ledger has all rows that ended before it was rolled."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


class Legacy:
    """The file of a process that ended."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def rows(self) -> list[Row]:
        """The rows that a process left: requests that had ended, and those lost with it."""
        lines = self._path.read_bytes().split(b"\n")
        latest: dict[str, Row] = {}
        for row in _rows(lines):
            if row.outcome != OPEN or row.id not in latest:
                latest[row.id] = row
        rows = [row for row in latest.values() if row.outcome != REFUSED]
        if _ROLLED in lines:
            return [row for row in rows if row.outcome != OPEN]
        return _closed(rows, os.fstat(self._descriptor).st_mtime)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _closed(rows: list[Row], until_s: float) -> list[Row]:
    """The rows, where those under way were lost with their process.

    Each took a share of the GPUs until about `until_s`, the time of the last line: estimated to be
    what the requests that had ended took in the same time.
    """
    ended = [row for row in rows if row.outcome != OPEN]
    lasted_s = sum(max(0.0, row.ended_s - row.began_s) for row in ended)

    def lost(row: Row) -> Row:
        part = max(0.0, until_s - row.began_s) / lasted_s if lasted_s else 0.0
        return msgspec.structs.replace(
            row,
            outcome="lost",
            ended_s=max(row.began_s, until_s),
            gpu_s=part * sum(each.gpu_s for each in ended),
            dollars=part * sum(each.dollars for each in ended),
        )

    return [lost(row) if row.outcome == OPEN else row for row in rows]


def legacies(folder: Path) -> Iterator[Legacy]:
    """The files of processes that ended, each locked for this process."""
    for path in sorted(folder.glob("*.jsonl")):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # It lives, or another heir has it.
            os.close(descriptor)
            continue
        if path.exists():
            yield Legacy(path, descriptor)
        else:
            os.close(descriptor)


def _create(folder: Path) -> tuple[Path, int]:
    # Locked before it has its name, so that no heir finds it unlocked.
    name = uuid.uuid4().hex
    hidden, path = folder / f".{name}", folder / f"{name}.jsonl"
    descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    hidden.rename(path)
    return path, descriptor


def _rows(lines: list[bytes]) -> Iterator[Row]:
    for line in lines:
        try:
            yield _decoder.decode(line)
        except ValueError:
            continue  # The last line, which the kill cut off, or the end of a full file.
