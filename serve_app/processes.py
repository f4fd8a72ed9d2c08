"""Ends a child process: by a signal first, and by a kill if it has not ended in time. Tells
processes of one pid apart.

To end a single process the standard library is enough; psutil finds the children of a process.
"""

import contextlib
import signal
import subprocess
from pathlib import Path
from typing import Any


def end(process: "subprocess.Popen[Any]", timeout_s: float, number: int = signal.SIGTERM) -> bool:
    """Send the signal, wait, and kill the process if it has not ended. Returns whether it ended by
    itself.

    It has ended afterwards, whatever interrupts the wait.
    """
    if process.poll() is not None:
        return True
    try:
        process.send_signal(number)
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return True


def end_family(
    process: "subprocess.Popen[Any]", timeout_s: float, number: int = signal.SIGINT
) -> None:
    """Send the signal to the process, then kill it and its descendants that have not ended."""
    import psutil

    if process.poll() is not None:
        return
    family: list[Any] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    process.send_signal(number)
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def start_ticks(pid: int) -> str | None:
    """When a process started, in the clock ticks of /proc; None: it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field is the program's name in parentheses, and may hold anything.
    return stat.rpartition(")")[2].split()[19]
