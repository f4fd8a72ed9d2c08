"""What Ray starts as the Python of a replica: a stand-in for a process that the template forks.

Ray knows its worker by the process that it started, which therefore stays: it passes signals on,
ends as the worker does, and ends the worker when the raylet ends. Where there is no template, or it
refuses, this process becomes the worker itself, which then imports everything. Started by its path
and without site-packages, so it imports the standard library only.
"""

import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence

# Names the template of a launcher, for the workers of its own Ray cluster only.
NAME_VARIABLE = "SERVE_APP_TEMPLATE_NAME"
# In the environment of a replica, whose engine is forked from a server of its own.
FORK_SERVER_VARIABLE = "SERVE_APP_FORK_SERVER"
# Why the template was not used; the replica logs it.
REFUSAL_VARIABLE = "SERVE_APP_TEMPLATE_REFUSAL"
# Ray reads these two only when it is imported, before the template knows either. With the nil job
# a worker takes the job of its first task, as workers do that Ray starts in advance. A worker ends
# when the process of this pid is gone, here never: the stand-in watches the raylet.
RAY_ENVIRONMENT = {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": "1"}
# Ray gives a worker up that has not registered after 60 s.
_PATIENCE_S = 30.0
_PASSED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def node_name() -> str:
    """The name of the template of this user on this node: a socket in Linux's abstract namespace.

    Containers that share the host's network share that namespace, but not that of processes.
    """
    return f"serve-app-template-{os.getuid()}-{os.stat('/proc/self/ns/pid').st_ino}"


class Refused(Exception):
    """The template forks no worker for this process."""


class Fork:
    """A worker that the template forked for this process.

    Args:
        pid: of the worker.
        connection: the template sends its exit status, and kills it when this end closes.
    """

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
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

    def wait(self, raylet: int) -> int:
        """Wait until it has ended, and end it if the raylet ends. Returns its exit status, as a
        shell gives it.

        Args:
            raylet: a descriptor of the raylet's process.
        """
        self._connection.settimeout(None)
        if raylet not in select.select([self._connection.fileno(), raylet], [], [])[0]:
            if line := _line(self._connection):
                status = int(json.loads(line)["status"])
                return 128 - status if status < 0 else status
            # The template is gone, and with it the status.
            if self._descriptor >= 0:
                select.select([self._descriptor, raylet], [], [])
        self.signal(signal.SIGKILL)
        return 1


def fork(name: str, argv: Sequence[str]) -> Fork:
    """Have the template fork a worker that runs this program.

    Raises:
        Refused, OSError: it does not.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_PATIENCE_S)
    try:
        connection.connect("\0" + name)
    except ConnectionRefusedError:
        raise Refused("none runs on this node (python -m serve_app template)") from None
    if (why := distrust_reason(connection)) is not None:
        raise Refused(why)
    request = {
        "argv": list(argv),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "max_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    payload = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("!I", len(payload))], [0, 1, 2])
    connection.sendall(payload)
    line = _line(connection)
    if not line:
        raise Refused("it ended")
    reply = json.loads(line)
    if "pid" not in reply:
        raise Refused(reply["refused"])
    return Fork(reply["pid"], connection)


def _line(connection: socket.socket) -> bytes:
    """The next message of the template, a line of JSON; empty if the template has ended.

    Nothing beyond the line is read. The status of a worker that ends at once follows its pid
    immediately, and `select` must see it.
    """
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            return b""
        line += byte
    return line


def distrust_reason(connection: socket.socket) -> str | None:
    """Why the process at the other end of a Unix socket is not to be trusted; None: it is."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        return "it belongs to another user"
    # The kernel has no number for a process of another container.
    return None if pid > 0 else "it runs in another container"


def name_this_process(pid: int) -> None:
    """Let `ps` and `bench chaos` see which worker this process stands in for."""
    try:
        with open("/proc/self/comm", "w") as name:
            name.write(f"for {pid}")
    except OSError:
        return  # Only its name.


def main(argv: Sequence[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED)  # Until somebody is there to get them.
    try:
        raylet = os.pidfd_open(os.getppid())
        forked = fork(os.environ.get(NAME_VARIABLE) or node_name(), argv)
    except (Refused, OSError, KeyError, ValueError) as error:
        os.environ[REFUSAL_VARIABLE] = str(error) or type(error).__name__
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
        os.execv(sys.executable, [sys.executable, *argv])
    name_this_process(forked.pid)
    for number in _PASSED:
        signal.signal(number, lambda number, _: forked.signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
    return forked.wait(raylet)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
