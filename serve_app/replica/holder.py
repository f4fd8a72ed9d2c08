"""The process that holds weights on GPUs for engines that come and go.

For each GPU of an engine a *daemon* loads the weights, and the engine maps them (weightcache.py).
A *holder* starts the daemons and ends them: it belongs to no replica, never touches a GPU, and its
daemons end with it, whatever they are doing. Replicas and holders share a folder that is named by
the weights' content, and locks (flock) in it, which end with the processes that have them:

    users    locked, shared, by every replica that uses the weights
    holder   locked by the holder and its daemons; says who the holder is
    *.sock   one for each GPU, once its weights are loaded
    log      output of the holder and its daemons

A holder ends a while after its last user, or when a daemon ends.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import setproctitle

from serve_app.processes import start_ticks
from serve_app.progress import say

# How often a holder looks for users, and how often a lock is tried.
_CHECK_S, _POLL_S = 0.5, 0.05
# A lock that is only looked at is free again within this time.
_GLANCE_S = 1.0
# How long processes that were killed may take to end. A GPU's memory is freed meanwhile.
END_S = 30.0
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Unavailable(Exception):
    """Why weights are not held."""


@dataclass
class Linger:
    """For how long nobody has used the weights. Pure."""

    after_s: float
    _unused_since_s: float | None = None

    def over(self, used: bool, now_s: float) -> bool:
        """Note whether they are used now. Returns whether nobody has used them for long enough."""
        if used:
            self._unused_since_s = None
            return False
        if self._unused_since_s is None:
            self._unused_since_s = now_s
        return now_s - self._unused_since_s >= self.after_s


def begin(
    folder: Path, devices: Sequence[str], serve: Callable[[int], None], linger_s: float
) -> None:
    """Leave a holder behind that is nobody's child, and end this process, which has one thread.

    Args:
        serve: loads the weights of a rank and serves them, in a process of its own.
    """
    holder = open_file(folder / "holder")
    if not lock(holder, fcntl.LOCK_EX, _GLANCE_S):
        os._exit(0)  # There is another one.
    # First: what a replica's reaper, a terminal or Ray ends is in another session.
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        _detach(folder, holder)
        hold(folder, holder, devices, serve, Linger(linger_s))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _detach(folder: Path, holder: int) -> None:
    """Close what belongs to others: who waits for its end would otherwise wait for this process."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    # What shares memory starts one of its own, and must not write to this one's number.
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor not in (0, 1, 2, holder):
            with contextlib.suppress(OSError):  # The one of this listing.
                os.close(descriptor)


def hold(
    folder: Path,
    holder: int,
    devices: Sequence[str],
    serve: Callable[[int], None],
    linger: Linger,
) -> None:
    """Run the daemons until nobody has used them for long enough, or one has ended."""
    setproctitle.setproctitle("serve_app weights")
    pid = os.getpid()
    owner = {"pid": pid, "started": start_ticks(pid), "devices": list(devices)}
    os.ftruncate(holder, 0)
    os.pwrite(holder, json.dumps(owner).encode(), 0)
    for left in folder.glob("*.sock"):
        left.unlink()
    daemons = [_daemon(serve, rank) for rank in range(len(devices))]
    users = open_file(folder / "users")
    while all(os.waitpid(daemon, os.WNOHANG) == (0, 0) for daemon in daemons):
        unused = lock(users, fcntl.LOCK_EX)
        if linger.over(not unused, time.monotonic()):
            return  # Locked: a replica that comes now waits, and starts another one.
        if unused:
            fcntl.flock(users, fcntl.LOCK_UN)
        time.sleep(_CHECK_S)


def _daemon(serve: Callable[[int], None], rank: int) -> int:
    """Fork the daemon of a rank. It ends with this process."""
    holder = os.getpid()
    if pid := os.fork():
        return pid
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == holder:
            setproctitle.setproctitle(f"serve_app weights, rank {rank}")
            serve(rank)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


# --- what replicas do with holders --------------------------------------------------------------


def root() -> Path:
    """The folder of all held weights of this user. In ~/.cache, paths of sockets would be too long,
    and several machines or containers might share it.

    Raises:
        Unavailable: it is not this user's alone.
    """
    folder = Path(tempfile.gettempdir()) / f"serve_app_{os.getuid()}"
    make_private(folder)
    return folder


def clear(root: Path, devices: Collection[str], but: Path | None = None) -> None:
    """End the holders on these GPUs whose weights nobody uses, except for that of `but`."""
    for path in root.glob("*/holder"):
        folder = path.parent
        if folder == but or not is_held(folder):
            continue
        if not set(devices) & set(_owner(folder).get("devices", ())):
            continue
        users = open_file(folder / "users")
        try:
            if lock(users, fcntl.LOCK_EX, _GLANCE_S):
                end(folder)
                say("other weights that nobody used left the GPU")
        finally:
            os.close(users)


def end_below(root: Path, pids: Collection[int]) -> None:
    """End the holders that are among these processes, whoever uses their weights."""
    for path in root.glob("*/holder"):
        if is_held(path.parent) and _owner(path.parent).get("pid") in pids:
            end(path.parent)


def is_held(folder: Path) -> bool:
    """Whether a holder or one of its daemons lives."""
    holder = open_file(folder / "holder")
    try:
        return not lock(holder, fcntl.LOCK_SH)
    finally:
        os.close(holder)


def end(folder: Path) -> None:
    """Kill the holder, if there is one, and return once its daemons have ended.

    Raises:
        Unavailable: they do not end.
    """
    owner = _owner(folder)
    with contextlib.suppress(ProcessLookupError, KeyError):
        process = os.pidfd_open(owner["pid"])
        try:
            # Another process may have had the pid since. Not any more from here on.
            if is_held(folder) and start_ticks(owner["pid"]) == owner["started"]:
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)
    holder = open_file(folder / "holder")
    try:
        if not lock(holder, fcntl.LOCK_SH, END_S):
            raise Unavailable(f"a process of {folder} does not end")
    finally:
        os.close(holder)


def _owner(folder: Path) -> dict[str, Any]:
    """What a holder has written down about itself; nothing while it starts."""
    try:
        owner = json.loads((folder / "holder").read_bytes())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise Unavailable(f"{folder} is not a folder of this user alone")


def open_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def lock(descriptor: int, operation: int, within_s: float = 0.0) -> bool:
    """Whether it is locked, at the latest after `within_s`."""
    deadline_s = time.monotonic() + within_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_POLL_S)
