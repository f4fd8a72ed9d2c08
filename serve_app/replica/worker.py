"""What Ray starts as the Python of a replica: a stand-in for a process that the template forks.

Ray knows its worker by the process that it started, which therefore stays: it passes signals on
and ends as the worker does. Where there is no template, or it refuses, this process becomes the
worker itself, which then imports everything. Started by its path and without site-packages, so it
imports the standard library only.
"""

import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence

# Of a socket in Linux's abstract namespace, which vanishes with the template.
NAME_VARIABLE = "SERVE_APP_TEMPLATE"
# Why the template was not used; the replica says so.
REFUSAL_VARIABLE = "SERVE_APP_TEMPLATE_REFUSAL"
# Ray reads these two once, when it is imported, and needs them in every worker. The job is the
# first of a cluster, `serve run`. A worker ends when the raylet's process is gone; one that is
# forked looks at the launcher's in its place, and learns of the raylet's end by its connection.
_JOB_ID = "01000000"
# Ray gives a worker up that has not registered after 60 s.
_PATIENCE_S = 30.0
_PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def ray_environment(launcher_pid: int) -> dict[str, str]:
    """What Ray must find in the environment of a template when it is imported."""
    return {"RAY_JOB_ID": _JOB_ID, "RAY_RAYLET_PID": str(launcher_pid)}


class Refused(Exception):
    """The template forks no worker for this process."""


class Fork:
    """A worker that the template forked for this process.

    Args:
        pid: of the worker.
        connection: the template sends its exit status, and kills it when this end closes.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self._connection = connection
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:  # It has ended already: the status is on its way.
            self._descriptor = -1

    def signal(self, number: int) -> None:
        if self._descriptor >= 0:
            try:
                signal.pidfd_send_signal(self._descriptor, number)
            except ProcessLookupError:
                return  # It ends by itself.

    def wait(self) -> int:
        """Wait until it has ended; its exit status, as a shell gives it."""
        self._connection.settimeout(None)
        if answer := self._connection.recv(64):
            status = int(json.loads(answer)["status"])
            return 128 - status if status < 0 else status
        # The template is gone, and with it the status.
        if self._descriptor >= 0:
            select.select([self._descriptor], [], [])
        return 1


def fork(name: str, argv: Sequence[str]) -> Fork:
    """Have the template fork a worker that runs this program.

    Raises:
        Refused, OSError: it does not.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_PATIENCE_S)
    connection.connect("\0" + name)
    if peer_uid(connection) != os.getuid():
        raise Refused("it belongs to somebody else")
    request = {"argv": list(argv), "folder": os.getcwd(), "environment": dict(os.environ)}
    payload = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("!I", len(payload))], [0, 1, 2])
    connection.sendall(payload)
    answer = connection.recv(4096)
    if not answer:
        raise Refused("it ended")
    told = json.loads(answer)
    if "pid" not in told:
        raise Refused(told["refused"])
    return Fork(told["pid"], connection)


def peer_uid(connection: socket.socket) -> int:
    """Who is at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[1])


def main(argv: Sequence[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED)  # Until somebody is there to get them.
    try:
        forked = fork(os.environ[NAME_VARIABLE], argv)
    except (Refused, OSError, KeyError, ValueError) as error:
        os.environ[REFUSAL_VARIABLE] = str(error) or type(error).__name__
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
        os.execv(sys.executable, [sys.executable, *argv])
    for number in _PASSED:
        signal.signal(number, lambda number, _: forked.signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
    return forked.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
