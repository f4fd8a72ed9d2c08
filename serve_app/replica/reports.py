"""What an engine core's scheduler reports to its replica, and the socket that carries it.

vLLM sends the outputs of a request, and the statistics of a step, to one front end only. A replica
with two front ends must know of both, so its scheduler reports to it: once a step at most, and
never once a token. Nothing here imports vllm: the scheduler side is scheduler.py.
"""

import asyncio
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

# Environment variable with the path of the socket, read in the engine core's process.
VARIABLE = "SERVE_APP_ENGINE_REPORTS"
# Largest report that is read. A step ends at most as many requests as the engine batches.
_LARGEST_BYTES = 2**20


# What vllm-rs puts around a client's id to name a request in the engine.
_NAME = re.compile(r"(?:chatcmpl|cmpl)-(.*?)(-[0-9a-f]{8})?", re.DOTALL)
# Before a client's id where it is to be aborted because it took too long (scheduler.py).
LATE = "late:"
# In the place of an id: every request of the fast lane, since vllm-rs is gone.
GONE = "gone"


def client_ids(request_id: str) -> tuple[str, ...]:
    """The ids that a client may have sent with a request of this name, the likelier one first."""
    match = _NAME.fullmatch(request_id)
    if match is None:
        return (request_id,)
    return (match[1], match[1] + match[2]) if match[2] else (match[1],)


class Ended(msgspec.Struct, array_like=True, frozen=True):
    """A request of the fast lane that has ended.

    Attributes:
        request_id: the engine's, which begins with vllm-rs's prefix and has the client's in it.
        arrived_s: when the scheduler got it, on the machine's monotonic clock.
        first_s: when its first token was made, on the same clock; None: never.
        last_s: when it ended.
        reason: vLLM's name of how it ended: stop, length, abort, error, repetition.
        cached_tokens: of its prompt, those that were found in the prefix cache.
    """

    request_id: str
    prompt_tokens: int
    generated_tokens: int
    arrived_s: float
    first_s: float | None
    last_s: float
    reason: str
    cached_tokens: int = 0

    @property
    def gap_s(self) -> float:
        """The mean time between two of its tokens."""
        gaps = self.generated_tokens - 1
        return (self.last_s - self.first_s) / gaps if self.first_s is not None and gaps > 0 else 0.0


class Report(msgspec.Struct, array_like=True, frozen=True):
    """What happened in an engine core since its last report.

    Attributes:
        steps, busy_s: of the engine core, for all requests.
        running, waiting, kv_usage: the scheduler's state now, for all requests.
        unread_tokens: prompt tokens of the fast lane's requests that have no token yet.
        prompt_tokens: of the fast lane's requests that got their first token.
        first_s: for each of those, the time since the scheduler got it.
        generated_tokens: of the fast lane.
        gaps, gap_s: how many tokens of the fast lane followed another one, and the sum of the times
            between them.
        preempted: how often requests of the fast lane lost their place.
        ended: requests of the fast lane that ended.
        grammar_compiler: the class of the engine's backend of structured outputs; empty: none yet.
    """

    engine: int
    steps: int
    busy_s: float
    running: int
    waiting: int
    kv_usage: float
    unread_tokens: int
    prompt_tokens: int
    first_s: list[float]
    generated_tokens: int
    gaps: int
    gap_s: float
    preempted: int
    ended: list[Ended]
    grammar_compiler: str = ""


class Sender:
    """The engine core's end."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(path)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, report: Report) -> None:
        """Send a report. Waits only if the replica has not read for thousands of requests.

        Raises:
            OSError: the replica is gone.
        """
        self._socket.send(self._encoder.encode(report))


class Receiver:
    """The replica's end: accepts each engine core that is started, and passes on its reports.

    Args:
        receive: called in the event loop with each report.
    """

    def __init__(self, receive: Callable[[Report], None]) -> None:
        self._receive = receive
        self._decoder = msgspec.msgpack.Decoder(Report)
        # A folder that only this user can enter: whoever connects can report.
        self._folder = tempfile.TemporaryDirectory(prefix="serve_app.")
        self.path = str(Path(self._folder.name) / "reports")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.setblocking(False)
        self._connections: set[socket.socket] = set()
        os.environ[VARIABLE] = self.path

    def start(self) -> None:
        """Read from now on, in the running event loop."""
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Read no more."""
        for each in (self._listener, *self._connections):
            each.close()
        self._connections.clear()
        self._folder.cleanup()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._connections.add(connection)
        asyncio.get_running_loop().add_reader(connection, self._read, connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_LARGEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._receive(self._decoder.decode(data))
            return
        asyncio.get_running_loop().remove_reader(connection)  # The engine core ended.
        self._connections.discard(connection)
        connection.close()
