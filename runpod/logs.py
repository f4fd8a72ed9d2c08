"""Ray writes its logs to files; Runpod shows what reaches stdout. This follows the files.

Only what nobody else prints: Ray's system processes, the log of requests, and the output of `serve
run`, to which Ray forwards what replicas, controller and proxies say. Lines that the launcher shows
itself are left out, and what Ray's processes say at the level of information.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from serve_app.progress import MARK

RAY_FILES = ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err", "dashboard.err")
SERVE_FILES = ("serve_app.*.log",)
REQUEST_FILES = ("*.log",)  # A line of JSON for each request.
_PERIOD_S = 0.5
# How Ray's system processes begin a line: "[date time I pid tid]". Their lines of information are
# hundreds a start, and what follows without such a beginning belongs to the line before.
_LEVEL = re.compile(r"\[[\d-]+ [\d:,.]+ ([A-Z]) \d")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
# A line is not cut by the moment at which it is read, unless it never ends.
_LINE_BYTES = 64 * 2**10


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Follower(threading.Thread):
    """Prints what is appended to files, those included that appear later.

    Args:
        places: asked again every round; pairs of a folder and the patterns to follow in it.
    """

    def __init__(
        self,
        places: Callable[[], Iterable[tuple[Path, Sequence[str]]]],
        show: Callable[[str], None] = show,
    ) -> None:
        super().__init__(daemon=True)
        self._places = places
        self._show = show
        self._read: dict[Path, int] = {}
        self._level: dict[Path, str] = {}
        self._over = threading.Event()

    def run(self) -> None:
        last = False
        while not last:
            last = self._over.wait(_PERIOD_S)
            for folder, patterns in self._places():
                for pattern in patterns:
                    for path in sorted(folder.glob(pattern)):
                        self._follow(path, last)

    def stop(self) -> None:
        """Print what is left, and end."""
        self._over.set()
        if self.is_alive():
            self.join(10)

    def _follow(self, path: Path, last: bool) -> None:
        try:
            # Ray links session_latest to the session: one file, whichever way it was found.
            path = path.resolve()
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read(8 * 2**20)
        except OSError:
            return
        end = data.rfind(b"\n") + 1
        if last or (end == 0 and len(data) > _LINE_BYTES):
            end = len(data)
        self._read[path] = self._read.get(path, 0) + end
        for line in data[:end].decode("utf-8", "replace").splitlines():
            if match := _LEVEL.match(line):
                self._level[path] = match[1]
            if line.strip() and MARK not in line and self._level.get(path) != "I":
                self._show(f"[{path.name}] {_COLOUR.sub('', line)}")
