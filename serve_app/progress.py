"""The progress of a start: one line for each stage, with its duration in seconds.

Lines go to stdout, which Ray forwards from a replica to the terminal of `serve run`; the launcher
finds them by their mark.
"""

import contextlib
import os
import time
from collections.abc import Iterator

MARK = "[serve_app]"
READY = "ready"
FAILED = "failed"


def say(text: str) -> None:
    # Not print: Ray Serve sends a replica's sys.stdout to a file of its own.
    os.write(1, f"{MARK} {text}\n".encode())


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Announce a stage, and its duration once it is over."""
    say(f"{name} ...")
    started_s = time.monotonic()
    yield
    say(f"{name}: {time.monotonic() - started_s:.1f} s")


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Say in one line why a start failed, before Ray wraps it in a traceback."""
    try:
        yield
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        say(f"{FAILED}: {what}: {lines[0] if lines else type(error).__name__}")
        raise
