"""Tool calls in the text of a model that writes them as Hermes does (Qwen2.5). Pure.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

`Reader` is fed the text in pieces of any size and gives the same calls for any of them, so a
streamed answer equals one in one piece. A call is a JSON object after the tag, found by reading
JSON: a tag inside a string is text, the keys stand in any order, and arguments that are left out
are an empty object. What follows the tag and is no such object stays what it was: text. Text after
the first call is dropped, as vLLM does.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

START, END = "<tool_call>", "</tool_call>"
# The beginning of a call whose arguments may be passed on before they are complete.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# Models write line breaks into strings. That is no JSON, and what is passed on must be.
_LENIENT = json.JSONDecoder(strict=False, parse_constant=_refuse)
_STRICT = json.JSONDecoder(parse_constant=_refuse)


@dataclass(frozen=True)
class Text:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins: the function's name."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next part of the arguments of the call that began last, as JSON."""

    index: int
    text: str


Event = Text | Call | Arguments


@dataclass
class _Scan:
    """Where in a JSON text a value ends, found piece by piece.

    Attributes:
        at: characters read.
        depth: braces and brackets that are open.
    """

    at: int = 0
    depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def to(self, text: str, depth: int) -> bool:
        """Read on until as few as `depth` are open; whether that was reached."""
        while self.at < len(text):
            character = text[self.at]
            self.at += 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= depth:
                    return True
        return False


@dataclass
class Reader:
    """Reads one answer.

    Args:
        eager: pass arguments on before the call is complete. Only where a grammar guarantees that
            they will be JSON: what was passed on cannot be taken back.
    """

    eager: bool = False
    _rest: str = ""
    _calls: int = 0
    _body: bool = False  # `_rest` is what follows a tag.
    _scan: _Scan = field(default_factory=_Scan)
    _passed: int | None = None  # How much of `_rest` was passed on as arguments.
    _arguments_end: int | None = None

    def feed(self, text: str) -> list[Event]:
        """The events that are certain from the text so far and that were not returned before."""
        self._rest += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """The rest, when the answer is over: a call that never ended is text."""
        events: list[Event] = []
        while self._body and self._passed is None:
            self._give_up(events)
            while self._step(events):
                pass
        if not self._body:
            self._say(self._rest, events)
        self._rest = ""
        return events

    def _step(self, events: list[Event]) -> bool:
        """Take one thing from the beginning of the rest; False where more text is needed."""
        return self._inside(events) if self._body else self._outside(events)

    def _outside(self, events: list[Event]) -> bool:
        at = self._rest.find(START)
        if at < 0:
            sure = len(self._rest) - _overlap(self._rest, START)
            self._say(self._rest[:sure], events)
            self._rest = self._rest[sure:]
            return False
        self._say(self._rest[:at], events)
        self._rest = self._rest[at + len(START) :]
        self._body, self._scan = True, _Scan()
        self._passed = self._arguments_end = None
        return True

    def _inside(self, events: list[Event]) -> bool:
        bare = self._rest.lstrip()
        if not bare:
            return False
        if bare[0] != "{":
            self._give_up(events)
            return True
        if self.eager and self._pass_on(events):
            return False
        if not self._scan.to(self._rest, 0):
            return False
        body, self._rest = self._rest[: self._scan.at], self._rest[self._scan.at :]
        if self._passed is None:
            call = read_call(body)
            if call is None:
                self._rest = body + self._rest
                self._give_up(events)
                return True
            name, arguments = call
            events += [Call(self._calls, name), Arguments(self._calls, arguments)]
        self._calls += 1
        self._body = False
        return True

    def _pass_on(self, events: list[Event]) -> bool:
        """Pass on the arguments so far. Returns whether more may follow."""
        if self._passed is None:
            head = _HEAD.match(self._rest)
            if head is None or (name := _text(head[1])) is None:
                return False
            events.append(Call(self._calls, name))
            self._passed = head.end()
            # To the brace that opens the arguments; both it and the call's are open then.
            self._scan = _Scan()
            self._scan.to(self._rest[: head.end()], -1)
        if self._arguments_end is not None:
            return False
        if ended := self._scan.to(self._rest, 1):
            self._arguments_end = self._scan.at
        if self._scan.at > self._passed:
            events.append(Arguments(self._calls, self._rest[self._passed : self._scan.at]))
            self._passed = self._scan.at
        return not ended

    def _give_up(self, events: list[Event]) -> None:
        """What follows the tag is no call: the tag was text."""
        self._say(START, events)
        self._body = False

    def _say(self, text: str, events: list[Event]) -> None:
        if text and not self._calls:
            events.append(Text(text))


def read_call(body: str) -> tuple[str, str] | None:
    """Name and arguments, as JSON, of a call; None where `body` is none."""
    try:
        members = _members(body)
    except (ValueError, RecursionError):
        return None
    name = members.get("name", (None, ""))[0]
    if not isinstance(name, str) or not _printable(name):
        return None
    value, raw = members.get("arguments", ({}, "{}"))
    if value is None:
        return name, "{}"
    if isinstance(value, str) and isinstance(_value(value), dict):
        return name, value  # The object was written as a text.
    if not isinstance(value, dict):
        return None
    return name, raw if isinstance(_value(raw), dict) else json.dumps(value)


def _members(body: str) -> dict[str, tuple[Any, str]]:
    """By key of a JSON object: the value, and its own text."""
    members: dict[str, tuple[Any, str]] = {}
    at = _skip(body, _skip(body, 0) + 1)
    if body[at : at + 1] == "}":
        return members
    while True:
        key, at = _LENIENT.raw_decode(body, at)
        at = _skip(body, at)
        if not isinstance(key, str) or body[at : at + 1] != ":":
            raise ValueError("a key and a colon were expected")
        begin = _skip(body, at + 1)
        value, end = _LENIENT.raw_decode(body, begin)
        members[key] = value, body[begin:end]
        at = _skip(body, end)
        if body[at : at + 1] == "}":
            return members
        if body[at : at + 1] != ",":
            raise ValueError("a comma or a brace was expected")
        at = _skip(body, at + 1)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _value(text: str) -> Any:
    """The value of a JSON text; None where it is none, or is null."""
    try:
        return _STRICT.decode(text)
    except (ValueError, RecursionError):
        return None


def _text(quoted: str) -> str | None:
    value = _value(quoted)
    return value if isinstance(value, str) and _printable(value) else None


def _printable(name: str) -> bool:
    """Whether it can be sent: half a surrogate pair cannot."""
    return bool(name) and not any("\ud800" <= character <= "\udfff" for character in name)


def _overlap(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
