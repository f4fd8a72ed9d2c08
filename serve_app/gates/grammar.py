"""How large a grammar is that the engine must compile before it can constrain an answer.

A compiler's time follows the size of the grammar, and while it works on one, every other grammar of
the replica waits. A short text can stand for a large grammar: `[a-z]{50000}` is 50,000 states. So
the size is that of the text with its repetitions written out: `{m,n}` of a regular expression, and
`maxLength`, `maxItems` and their like of a JSON schema.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

# Larger is all the same: the size of nested repetitions grows exponentially.
_ENOUGH = 2**50

# Of a JSON schema: how often something comes again, as far as that is bounded.
_REPEATS = (
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
)
_LENGTHS = ("minLength", "maxLength")
# Fields whose text is a regular expression, or a grammar with repetitions like one.
_PATTERNS = frozenset({"regex", "pattern", "grammar", "whitespace_pattern"})
# Fields of `structured_outputs` that may hold JSON as text.
_JSON_TEXTS = frozenset({"json", "structural_tag"})


def size(spec: Any) -> int:
    """Bytes of a constraint as a request gives it, its repetitions written out.

    Args:
        spec: decoded JSON: `structured_outputs`, `response_format`, a schema, a list of tools.
    """
    total = 0
    # No recursion: a schema may be nested as deep as its body allows.
    waiting: list[tuple[Any, int]] = [(spec, 1)]
    while waiting and total < _ENOUGH:
        node, times = waiting.pop()
        if isinstance(node, Mapping):
            own = times * _whole_max(node, _REPEATS)
            total += times * _whole_max(node, _LENGTHS)
            for key, value in node.items():
                total += times * len(key)
                if not isinstance(value, str):
                    waiting.append((value, min(own, _ENOUGH)))
                elif (inner := _json(value) if key in _JSON_TEXTS else None) is not None:
                    waiting.append((inner, times))
                elif key in _PATTERNS:
                    total += times * regex_size(value)
                else:
                    total += times * len(value.encode())
        elif isinstance(node, list):
            waiting.extend((each, times) for each in node)
        else:
            total += times * (len(node.encode()) if isinstance(node, str) else 1)
    return min(total, _ENOUGH)


def of_tools(tool_choice: Any, tools: Any) -> bool:
    """Whether tools become a grammar: a call is forced, or a tool is strict about arguments."""
    if tool_choice not in (None, "auto", "none") and tool_choice != {"type": "auto"}:
        return True
    if not isinstance(tools, list):
        return False
    return any(_strict(tool) for tool in tools)


def _strict(tool: Any) -> bool:
    if not isinstance(tool, Mapping):
        return False
    function = tool.get("function")
    return bool(tool.get("strict") or (isinstance(function, Mapping) and function.get("strict")))


def _whole_max(node: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The largest of some bounds; 1 where there is none."""
    return max([1, *(int(v) for key in keys if isinstance(v := node.get(key), int | float))])


def _json(text: str) -> Any:
    """The JSON in a text, or None: it is none, and the engine will say so."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d*),?(\d*)\}|[()|]|.", re.DOTALL)


def regex_size(pattern: str) -> int:
    """Characters of a regular expression with its counted repetitions written out."""
    # Of each open group: its size so far, and that of the last thing in it.
    groups: list[tuple[int, int]] = []
    total, last = 0, 0
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if text == "(":
            groups.append((total, last))
            total, last = 0, 0
        elif text == ")" and groups:
            inner = total
            total, last = groups.pop()
            total, last = total + inner, inner
        elif text.startswith("{") and len(text) > 2:
            times = max(int(token[1] or 0), int(token[2] or 0), 1)
            total, last = total + last * (times - 1), last * times
        else:
            size = len(text.encode())
            total, last = total + size, size
        total, last = min(total, _ENOUGH), min(last, _ENOUGH)
    return total + sum(outer for outer, _ in groups)
