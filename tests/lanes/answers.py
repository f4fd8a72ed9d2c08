"""An answer in a form in which those of both lanes can be compared field by field.

The events of a stream are joined to one answer: texts and lists are put together, other fields keep
their last value. Fields that are null are dropped, as if they were absent.
"""

import json
import struct
from collections.abc import Iterator
from typing import Any

# Texts that come in pieces.
_TEXTS = frozenset({"text", "content", "reasoning", "reasoning_content", "arguments"})
# Lists whose elements say which one of the joined list they belong to.
_INDEXED = frozenset({"choices", "tool_calls"})


def whole(text: str) -> Any:
    """An answer in one piece."""
    return _without_nulls(json.loads(text))


def joined(text: str) -> Any:
    """A stream, with its end in the place of `done`."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    answer: dict[str, Any] = {"done": events.count("[DONE]"), "last": events[-1] == "[DONE]"}
    for event in events:
        if event != "[DONE]":
            _merge(answer, json.loads(event))
    return _without_nulls(answer)


def _merge(answer: dict[str, Any], event: dict[str, Any]) -> None:
    for name, value in event.items():
        if value is None:
            continue
        if name in _INDEXED:
            places = answer.setdefault(name, {})
            for each in value:
                _merge(places.setdefault(each["index"], {}), each)
        elif name in _TEXTS and isinstance(value, str):
            answer[name] = answer.get(name, "") + value
        elif isinstance(value, dict):
            _merge(answer.setdefault(name, {}), value)
        elif isinstance(value, list):
            answer.setdefault(name, []).extend(value)
        else:
            answer[name] = value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two answers differ: path, and the value of each.

    Elements of lists, and choices, have no place of their own in a path.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            here = f"{path}.{key}".removeprefix(".") if not str(key).isdigit() else path
            yield from differences(one.get(key), other.get(key), here)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for left, right in zip(one, other, strict=True):
            yield from differences(left, right, path)
    elif isinstance(one, float) and isinstance(other, float):
        # vLLM's numbers are float32: one lane writes their shortest form, the other float64's.
        if struct.pack("f", one) != struct.pack("f", other):
            yield path, one, other
    elif one != other or type(one) is not type(other):
        yield path, one, other
