"""Stands for a Python process that is forked from a zygote instead of started.

Ray starts `./forked ARGUMENTS` where it would start `python ARGUMENTS`. This asks the zygote of
`$SERVE_APP_ZYGOTE` for a process with the same arguments, environment, working directory and open
files, passes signals on to it, and ends as it ends. Where the zygote is gone or refuses, it becomes
plain Python: what it costs then is the time of the imports.

Standard library only, and little of it: every process of Ray waits for this program.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys

# What cannot be passed on, or must not end the program that it was forked for.
_UNFORWARDED = {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGPIPE,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGWINCH,
}


def main(words: list[str]) -> None:
    """Run `python WORDS` in a forked process, or as this one."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGCHLD})
    conversation = _ask(words, blocked)
    if conversation is None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        python = os.environ.get("SERVE_APP_PYTHON", sys.executable)
        os.execv(python, [python, *words])
    connection, pid = conversation
    _say_for(pid)
    for number in signal.valid_signals() - _UNFORWARDED:
        signal.signal(number, lambda number, frame: _pass_on(number, pid))
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _end_as(_status(connection, pid))


def _ask(words: list[str], blocked: set[int | signal.Signals]) -> tuple[socket.socket, int] | None:
    """The zygote's connection and the forked process; None: there is to be none."""
    path = os.environ.get("SERVE_APP_ZYGOTE")
    if not path:
        return None
    files = _open_files()
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        asked = {
            "words": words,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "files": files,
            "blocked": [int(number) for number in blocked],
            "group": os.getpgrp(),
        }
        body = json.dumps(asked).encode()
        socket.send_fds(connection, [len(body).to_bytes(4, "big")], files)
        connection.sendall(body)
        pid = int.from_bytes(_exactly(connection, 4), "big")
    except (OSError, EOFError, ValueError):
        connection.close()
        return None
    for file in files:
        if file > 2:
            os.close(file)
    return (connection, pid) if pid else None


def _open_files() -> list[int]:
    """The descriptors that this process was given, its own excepted."""
    with os.scandir("/proc/self/fd") as entries:
        numbers = [int(entry.name) for entry in entries]
    return [number for number in sorted(numbers) if _is_open(number)]


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:  # It was the listing's own.
        return False
    return True


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _say_for(pid: int) -> None:
    """Tell who looks at this process which one it stands for (family.py)."""
    with open("/proc/self/comm", "w") as name:
        name.write(f"forked {pid}")


def _pass_on(number: int, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # It has ended; the zygote is about to say so.
        os.kill(pid, number)


def _status(connection: socket.socket, pid: int) -> int:
    """The status with which the forked process ended, as `os.waitpid` gives it."""
    try:
        return int.from_bytes(_exactly(connection, 4), "big")
    except (OSError, EOFError):
        # The zygote has gone; what it forked has not.
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(pid)], [], [])
        return 1 << 8


def _end_as(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1:])
