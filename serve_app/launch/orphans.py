"""Processes whose own parent ended: this one becomes their parent, so that none can escape its end.

Ray's workers, an engine's processes and whatever those start end up here when what started them is
killed. One that is over is reaped; else every replica that dies would leave its row in the system's
table of processes for as long as this one runs.
"""

import contextlib
import ctypes
import logging
import os
import threading
import time

import psutil

logger = logging.getLogger("serve_app")

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_PERIOD_S = 5.0

# Processes that this one started itself, and waits for itself.
own: set[int] = set()


def adopt() -> None:
    """Become the parent of every descendant whose own parent ends, and reap them as they end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    threading.Thread(target=_reap_for_ever, name="orphans", daemon=True).start()


def _reap_for_ever() -> None:
    while True:
        time.sleep(_PERIOD_S)
        reap()


def reap() -> None:
    """Reap the adopted ones that have ended."""
    for child in psutil.Process().children():
        if child.pid not in own:
            with contextlib.suppress(ChildProcessError):  # Another one reaped it just now.
                os.waitpid(child.pid, os.WNOHANG)


def wait(timeout_s: float) -> list[psutil.Process]:
    """Wait for all to end. Returns those that are alive after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while alive := psutil.Process().children(recursive=True):
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return []
        if time.monotonic() > deadline_s:
            return [process for process in alive if process.is_running()]
        time.sleep(0.05)
    return []


def end_weights() -> None:
    """End adopted processes that keep weights for another replica (replica/holder.py)."""
    from serve_app.replica import holder

    try:
        holder.end_below(holder.root(), {each.pid for each in psutil.Process().children()})
    except (holder.Unavailable, OSError) as why:
        logger.warning("kept weights may stay for a while: %s", why)
