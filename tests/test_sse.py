"""The reader and the writer of server-sent events."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import sse
from serve_app.errors import Unavailable
from serve_app.sse import Event, Reader

FIELDS = st.lists(
    st.tuples(st.sampled_from(["data", "event", ":", "id"]), st.sampled_from(["", "a", "é", "[1"])),
    min_size=1,
    max_size=4,
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


def expected(events: list[list[tuple[str, str]]]) -> list[Event]:
    """What the standard says of these fields (an event without data may only have a name)."""
    read = []
    for fields in events:
        data = [value.encode() for name, value in fields if name == "data"]
        names = [value.encode() for name, value in fields if name == "event"]
        if data or (names and names[-1]):
            read.append(Event(names[-1] if names else b"", b"\n".join(data)))
    return read


@given(st.lists(FIELDS, max_size=5), ENDS, st.lists(st.integers(0, 120), max_size=8), st.booleans())
def test_events_are_the_same_wherever_the_bytes_are_cut(
    events: list[list[tuple[str, str]]], end: bytes, cuts: list[int], space: bool
) -> None:
    colon = ": " if space else ":"
    body = b"".join(
        b"".join(f"{name}{colon}{value}".encode() + end for name, value in fields) + end
        for fields in events
    )
    places = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    reader, read = Reader(), []
    for begin, until in itertools.pairwise(places):
        read += reader.feed(body[begin:until])
    assert read == expected(events)
    assert reader.between_events


def test_an_event_without_its_blank_line_is_not_given_out() -> None:
    reader = Reader()
    assert reader.feed(b"data: 1\n") == []
    assert not reader.between_events
    assert reader.feed(b"\n") == [Event(b"", b"1")]


def test_lines_of_data_are_read_from_whole_events() -> None:
    body = b'event: x\ndata: {"a":1}\n\n: ping\n\ndata:2\r\n\r\ndata: [DONE]\n\n'
    assert list(sse.data_lines(body)) == [b'{"a":1}', b"2", b"[DONE]"]


@pytest.mark.parametrize("kind", [b"text/event-stream", b"text/event-stream; charset=utf-8"])
def test_a_stream_is_known_by_its_media_type(kind: bytes) -> None:
    assert sse.is_stream({"headers": [(b"x", b"y"), (b"content-type", kind)]})
    assert not sse.is_stream({"headers": [(b"accept", kind), (b"content-type", b"text/html")]})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", b""),
        ("/v1/completions", b""),
        ("/v1/messages", b"error"),
        ("/v1/responses", b"error"),
    ],
)
def test_an_error_is_one_event_with_the_name_that_clients_of_the_route_expect(
    path: str, name: bytes
) -> None:
    event = sse.error_event(path, Unavailable("no\nreplica").body())
    [(read, data)] = Reader().feed(event)
    assert (read, json.loads(data)["error"]["code"]) == (name, "unavailable")
    assert len(re.findall(rb"\n\n", event)) == 1
