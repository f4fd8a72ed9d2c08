"""How a broken answer continues at another replica: what is recorded of it, and what is sent again.

An engine's replica marks each event of a stream with its tokens, in comment lines before the event.
The gateway removes these lines and keeps their content:

    : how resume          once: the method by which this answer could continue
    : t 12 13             tokens, as the engine generated them; one line for each group
    : l [[[12, -0.5], ..  the last group's logprobs, if they were requested
    : end stop null       with the last group: the finish reason
    data: {...}

When the stream breaks, the gateway sends the same request to another replica with a `Progress`: the
groups so far. The engine there puts them through vLLM's own output processing, so that text, stop
strings, tool calls, logprobs and usage are in the same state. The client already has the resulting
events, so the gateway drops as many as it has sent.

Tokens whose text was still held back (half of a character, the beginning of a stop string) were
never marked: they are generated again, because no client saw them.
"""

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from serve_app import events

_COMMENT = b":"
_HOW, _TOKENS, _LOGPROBS, _END = b": how ", b": t ", b": l ", b": end "
_MARKS = (_HOW, _TOKENS, _LOGPROBS, _END)
# What the Responses API sends before there is a token to mark.
_PREAMBLE = (b"event: response.created", b"event: response.in_progress")

# Of each token: its (id, logprob) and those of the likeliest others; and its rank. None stands for
# minus infinity, the logprob of a token that a grammar forbids: JSON has no number for it.
Logprobs = list[tuple[list[tuple[int, float | None]], int]]


class Method(enum.StrEnum):
    """How an answer continues. The engine decides it from the request.

    RESUME: from prompt and tokens so far. REPEAT: from the start, where the same tokens must come
    again, each compared. NEVER: neither would be exact.
    """

    RESUME = "resume"
    REPEAT = "repeat"
    NEVER = "never"


class Progress(msgspec.Struct):
    """What an engine needs to continue an answer.

    Attributes:
        groups: token ids, as they were given out.
        logprobs: of the last group, whose events the client may have only in part.
        finish, stop: why the last group was the last (vLLM's words); None if it was not.
        repeat: generate all again and compare, instead of going on from the last token; None: the
            engine decides, as the answer began in the fast lane, where nobody said it.
    """

    groups: list[list[int]] = msgspec.field(default_factory=list)
    logprobs: Logprobs | None = None
    finish: str | None = None
    stop: int | str | None = None
    repeat: bool | None = False

    @property
    def tokens(self) -> list[int]:
        return [token for group in self.groups for token in group]


@dataclass
class Marks:
    """The engine's side of one stream: what to note before its next event."""

    _lines: list[bytes] = field(default_factory=list)
    _announced: Method | None = None

    def how(self, method: Method) -> None:
        """Said once, and again if it gets worse: another sequence joined the same stream."""
        if method is not self._announced:
            self._announced = method
            self._lines.append(_HOW + method.value.encode() + b"\n")

    def group(self, tokens: Sequence[int], logprobs: Logprobs | None = None) -> None:
        self._lines.append(_TOKENS + b" ".join(b"%d" % token for token in tokens) + b"\n")
        if logprobs is not None:
            self._lines.append(_LOGPROBS + msgspec.json.encode(logprobs) + b"\n")

    def end(self, finish: str, stop: int | str | None) -> None:
        self._lines.append(_END + finish.encode() + b" " + msgspec.json.encode(stop) + b"\n")

    def take(self) -> bytes:
        """The lines for the next event; empty where there is nothing new."""
        if not self._lines:
            return b""
        lines = b"".join(self._lines)
        self._lines.clear()
        return lines


class Malformed(Exception):
    """A replica's stream is not what an engine writes, or stops before its end."""


class EngineReportedDead(Malformed):
    """The stream of a replica reports that its engine failed."""


class Stream:
    """The gateway's side of one stream: splits it into events and keeps what the marks say.

    Attributes:
        progress: what another replica would need.
        method: as the engine said; None before its first event.
        sent: events that were given out, of all replicas together.
        ended: the last event was given out, or an error: nothing may follow.
    """

    def __init__(self) -> None:
        self.progress = Progress()
        self.method: Method | None = None
        self.sent = 0
        self.ended = False
        self._rest = b""
        self._fresh = self.progress
        self._skip = 0
        self._unmarked = self._complete = False
        self._names = Names()

    def restart(self) -> None:
        """Prepare for the same stream from another replica, which sends it from its first event."""
        self._rest = b""
        self._fresh = Progress()
        if not self.sent:
            # The client has seen nothing: the next answer need not be the same.
            self.progress, self.method, self._unmarked = self._fresh, None, False
        self._skip = self.sent
        self._names.restart()

    def events(self, data: bytes) -> list[bytes]:
        """The events that are complete now and not given out before, without their marks.

        A comment between two events is passed on, and counts as none: `sse_keep_alive_interval` has
        vLLM write one into a silent stream, so that no proxy closes its connection.

        Raises:
            Malformed: what comes is no event.
        """
        if self._rest:
            data = self._rest + data
        *whole, self._rest = data.split(b"\n\n")
        complete: list[bytes] = []
        comments = 0
        try:
            for event in whole:
                if event.startswith(_COMMENT):
                    event = self._without_marks(event)
                    if not event:
                        continue
                if event.startswith(_COMMENT):
                    if not self.ended:
                        complete.append(event)
                        comments += 1
                elif (new := self._new(event)) is not None:
                    complete.append(new)
        except Malformed:
            # It is met again with the next data; what came before it is not lost.
            if not complete:
                raise
            self._rest = event + b"\n\n" + self._rest
        self.sent += len(complete) - comments
        return complete

    def _new(self, event: bytes) -> bytes | None:
        """What the client is to be sent of an event; None: nothing.

        Raises:
            Malformed: it is no event of an engine.
        """
        return None if self._repeated(event) else self._names.with_first_names(event)

    def _repeated(self, event: bytes) -> bool:
        """Whether the client has this event already, or its end; notes where the answer ends."""
        last = events.is_last(event)
        if self.ended:
            # Nothing follows the end. An error may be followed by `[DONE]`, once.
            dropped, self._complete = self._complete or not last, self._complete or last
            return dropped
        if not events.is_event(event):
            raise Malformed("not an event")
        if events.error_code(event) is not None:
            # Never a repetition: nothing continues after the client has been sent an error.
            self._skip, self.ended = 0, True
        elif self._skip and last:
            raise Malformed("it ends before the client's own events do")
        elif self._skip:
            self._skip -= 1
            self._names.learn(event)
            return True
        elif last:
            if self.method is not None and self._fresh.finish is None:
                raise Malformed("it ends without a finish reason")
            self.ended = self._complete = True
        elif self.method is None and not event.startswith(_PREAMBLE):
            self._unmarked = True
        return False

    @property
    def continuable(self) -> bool:
        """Whether another replica can continue exactly where this stream is.

        Not where tokens came without marks, or with marks that cannot be read: the client can have
        such an answer, but no other replica can continue it.
        """
        if self.sent and self._unmarked:
            return False
        return not self.progress.groups or self.method is not Method.NEVER

    def finish(self) -> None:
        """The replica has closed its stream.

        Raises:
            Malformed: it stopped before its end.
        """
        if not self.ended:
            raise Malformed("it stops within an event" if self._rest else "it stops before its end")

    def _without_marks(self, event: bytes) -> bytes:
        """The event without the comments before it, which are noted where they are marks; of
        comments alone, one that is none."""
        comment = b""
        while event.startswith(_COMMENT):
            line, _, event = event.partition(b"\n")
            if not line.startswith(_MARKS):
                comment = line
                continue
            try:
                self._note(line)
            except (ValueError, RecursionError):
                self._unmarked = True
        return event or comment

    def _note(self, line: bytes) -> None:
        fresh = self._fresh
        if line.startswith(_TOKENS):
            fresh.groups.append([int(token) for token in line[len(_TOKENS) :].split()])
            # An answer that goes on begins with the groups that are known: they count as lost
            # again only once as many have come.
            if len(fresh.groups) >= len(self.progress.groups):
                self.progress = fresh
        elif line.startswith(_LOGPROBS):
            fresh.logprobs = msgspec.json.decode(line[len(_LOGPROBS) :], type=Logprobs)
        elif line.startswith(_END):
            finish, _, stop = line[len(_END) :].partition(b" ")
            fresh.finish, fresh.stop = finish.decode(), msgspec.json.decode(stop)
        elif line.startswith(_HOW):
            self.method = Method(line[len(_HOW) :].decode())


class Names:
    """Ids and times that each replica creates for itself. The client always sees the first ones.

    They are in the first events of a stream and of each part of an answer that has its own id. When
    another replica repeats such an event, its ids and times are mapped to the first ones, and
    replaced in all later events.
    """

    def __init__(self) -> None:
        self._first_events: dict[int, bytes] = {}
        self._at = 0
        self._renamed: dict[bytes, bytes] = {}

    def restart(self) -> None:
        self._at = 0
        self._renamed.clear()

    def with_first_names(self, event: bytes) -> bytes:
        """The event, with the ids and times that the client saw first."""
        for new, old in self._renamed.items():
            event = event.replace(new, old)
        if self._at < _HEAD or any(word in event for word in _NAMING):
            self._first_events[self._at] = event
        self._at += 1
        return event

    def learn(self, event: bytes) -> None:
        """Map the ids and times of a repeated event to the first ones."""
        if (first := self._first_events.get(self._at)) is not None:
            self._renamed.update(
                (new, old)
                for new, old in zip(_NAME.findall(event), _NAME.findall(first), strict=False)
                if new != old
            )
        self._at += 1


# The first events, and those of later parts, carry names.
_HEAD = 4
_NAMING = (b"output_item.added", b"content_part.added", b"content_block_start", b"-tool-")
_NAME = re.compile(rb'"(?:\w*id|created|created_at)": ?(?:"[^"]*"|\d+)')
