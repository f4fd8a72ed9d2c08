"""The kind of an event of a stream: the last event, an error, or another one.

An event is the text between two empty lines of a `text/event-stream`. Three APIs are streamed, and
each ends its streams differently; `is_last` and `error_code` know all of them:

    OpenAI chat and completions   data: [DONE]             data: {"error": {...}}
    OpenAI Responses              event: response.completed  event: response.failed, event: error
    Anthropic messages            event: message_stop      event: error
"""

from typing import Any

import msgspec

from serve_app import sse
from serve_app.sse import DATA, EVENT

_DONE = DATA + sse.DONE
_LAST = frozenset((b"response.completed", b"response.incomplete", b"message_stop"))
# Their names say what they are, whatever their data is.
_FAILURES = frozenset((b"error", b"response.failed"))
# Of an error event whose error has no code, or cannot be read.
_UNNAMED = "stream_error"


def is_event(event: bytes) -> bool:
    """Whether it has the form of an event that an engine writes."""
    return event.startswith((DATA, EVENT))


def is_last(event: bytes) -> bool:
    """Whether the answer is complete with this event."""
    if event.startswith(EVENT):
        return _name(event) in _LAST
    return event == _DONE


def error_code(event: bytes) -> str | None:
    """The code of an event that is an error; None for any other event."""
    failed = event.startswith(EVENT) and _name(event) in _FAILURES
    # In a text these quotes are escaped, so that other events are not parsed for it.
    if not failed and b'"error"' not in event:
        return None
    try:
        data = msgspec.json.decode(next(sse.data_lines(event), b""))
    except (ValueError, RecursionError):  # No JSON, or no UTF-8.
        data = None
    code = _code(data) if isinstance(data, dict) else None
    return _UNNAMED if failed and code is None else code


def _name(event: bytes) -> bytes:
    return event[len(EVENT) :].partition(b"\n")[0]


def error_in(body: bytes) -> str | None:
    """The code of the first error among the events of a piece of a stream; None: there is none."""
    if b"error" not in body and b"response.failed" not in body:
        return None
    codes = (error_code(event) for event in body.split(b"\n\n"))
    return next((code for code in codes if code is not None), None)


def _code(data: dict[str, Any]) -> str | None:
    error = data.get("error")
    if error is None and data.get("type") == "response.failed":
        response = data.get("response")
        error = response.get("error") if isinstance(response, dict) else None
    if error is None and data.get("type") == "error":
        error = data
    if error is None:
        return None
    fields = error if isinstance(error, dict) else {}
    # vLLM's codes are HTTP statuses, and its types are names.
    words = (fields.get("code"), fields.get("type"))
    return next((word for word in words if isinstance(word, str) and word), _UNNAMED)
