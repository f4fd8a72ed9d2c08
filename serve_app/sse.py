"""Server-sent events (WHATWG HTML, section 9.2): the one reader and the one writer.

serve_app/events.py knows what an event means. Standard library only.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

DATA, EVENT = b"data: ", b"event: "
DONE = b"[DONE]"  # The data of the last event of OpenAI's streams.
MEDIA_TYPE = b"text/event-stream"
# Clients of these routes dispatch on the name of an event.
_NAMED = ("/v1/messages", "/v1/responses")


class Event(NamedTuple):
    """An event: `name` is empty where the stream does not name it."""

    name: bytes
    data: bytes


class Reader:
    """Reads the events of one stream, whose bytes may be cut anywhere.

    Lines may end with LF, CR LF or CR, and comments are skipped. A character that takes several
    bytes is whole in its event.
    """

    __slots__ = ("_cr", "_data", "_line", "_name")

    def __init__(self) -> None:
        self._line = b""  # The beginning of a line whose end has not come.
        self._data: list[bytes] = []  # Data lines of an event whose end has not come.
        self._name = b""
        self._cr = False  # Whether a LF that comes next belongs to a CR that has come.

    @property
    def between_events(self) -> bool:
        """Whether all bytes so far belong to whole events."""
        return not (self._line or self._data or self._name)

    def feed(self, data: bytes) -> list[Event]:
        """The events that these bytes complete."""
        if self._cr and data.startswith(b"\n"):
            data = data[1:]
            if not data:
                self._cr = False
                return []
        self._cr = data.endswith(b"\r")
        lines = (self._line + data).splitlines(keepends=True)
        self._line = b""
        if lines and not lines[-1].endswith((b"\r", b"\n")):
            self._line = lines.pop()
        complete = []
        for line in lines:
            line = line.rstrip(b"\r\n")
            if line:
                self._field(line)
            elif self._data or self._name:
                complete.append(Event(self._name, b"\n".join(self._data)))
                self._data, self._name = [], b""
        return complete

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
        elif name == b"event":
            self._name = value.removeprefix(b" ")


def data_lines(events: bytes) -> Iterator[bytes]:
    """The data of whole events whose data is one line each, as all servers of models write it.

    Cheaper than a `Reader`, for the path of each token.
    """
    for line in events.split(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def is_stream(start: Mapping[str, Any]) -> bool:
    """Whether an ASGI response that starts with this message is a stream of events."""
    return any(
        name == b"content-type" and value.startswith(MEDIA_TYPE) for name, value in start["headers"]
    )


def error_event(path: str, body: bytes) -> bytes:
    """The event that ends a stream with an error.

    Args:
        path: of the request.
        body: of the error, as a response would have it.
    """
    name = EVENT + b"error\n" if path.startswith(_NAMED) else b""
    return name + DATA + body + b"\n\n"
