"""Whose process is whose, where some are forked from a zygote.

A forked process is the zygote's child, and `./forked`, which asked for it, stands in its place
among the children of whoever wanted it (forked.py). Here the one counts as the child of the other.
"""

import contextlib
import re

import psutil

_STANDS_FOR = re.compile(r"forked (\d+)")


def below(root: psutil.Process) -> list[psutil.Process]:
    """The process and all that it started, directly or not."""
    found: dict[psutil.Process, None] = {}
    waiting = [root]
    while waiting:
        process = waiting.pop()
        if process in found:
            continue
        found[process] = None
        with contextlib.suppress(psutil.NoSuchProcess):
            waiting += process.children()
        if (forked := _stands_for(process)) is not None:
            waiting.append(forked)
    return list(found)


def above(process: psutil.Process) -> list[psutil.Process]:
    """Who started the process, who started that one, and so on."""
    standing = {
        forked: each for each in psutil.process_iter() if (forked := _stands_for(each)) is not None
    }
    found: list[psutil.Process] = []
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            starter = standing.get(process) or process.parent()
            if starter is not None and starter not in found:
                found.append(starter)
                process = starter
                continue
        return found


def _stands_for(process: psutil.Process) -> psutil.Process | None:
    """The process that this one stands for; None: it is none of those."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        if match := _STANDS_FOR.fullmatch(process.name()):
            return psutil.Process(int(match[1]))
    return None
