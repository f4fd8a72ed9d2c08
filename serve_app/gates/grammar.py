"""The size of a grammar that the engine must compile before it can constrain an answer.

A replica has one compiling thread for every two cores; while all are busy, other grammars wait. The
cost of a compilation was measured with xgrammar 0.2.8 on one slow core: about 7 us for each byte of
a schema or a list of choices, and for each *different* pair of bounds of a text (`minLength`,
`maxLength`, `{m,n}`) 20 ms per character, up to some 200 characters. Longer bounds are compressed,
as are repetitions of anything else (`maxItems`). So the size is the length of the text, plus
`_CHARACTER` for each character of a bounded length.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

# Bytes that a character of a bounded length counts as, and the length from which on it is the same.
_CHARACTER, _LONGEST = 8, 256
# Fields whose text is a regular expression, or a grammar with repetitions like one.
_PATTERNS = frozenset({"regex", "pattern", "grammar", "whitespace_pattern"})
# Fields of `structured_outputs` that may hold JSON as text.
_JSON_TEXTS = frozenset({"json", "structural_tag"})
_REPETITION = re.compile(r"\{(\d*)(?:,(\d*))?\}")

# Bounds of a length, as (least, most).
_Bounds = tuple[int, int]


def size(spec: Any) -> int:
    """The size of a constraint, in bytes.

    Args:
        spec: decoded JSON: `structured_outputs`, `response_format`, a schema, a list of tools.
    """
    total = 0
    lengths: set[_Bounds] = set()
    # No recursion: a schema may be nested as deep as its body allows.
    waiting = [spec]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            lengths.add((_integer(node.get("minLength")), _integer(node.get("maxLength"))))
            for key, value in node.items():
                total += len(key)
                if isinstance(value, str) and key in _PATTERNS:
                    lengths.update(_repetitions(value))
                elif isinstance(value, str) and key in _JSON_TEXTS:
                    value = _json(value)
                waiting.append(value)
        elif isinstance(node, list):
            waiting.extend(node)
        else:
            total += len(node.encode()) if isinstance(node, str) else 1
    return total + sum(_CHARACTER * min(max(bounds), _LONGEST) for bounds in lengths)


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


def _integer(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0


def _repetitions(pattern: str) -> set[_Bounds]:
    """The counted repetitions of a regular expression."""
    return {
        (min(int(match[1] or 0), _LONGEST), min(int(match[2] or 0), _LONGEST))
        for match in _REPETITION.finditer(pattern)
        if len(match[0]) < 40
    }


def _json(text: str) -> Any:
    """The JSON in a text; the text, if there is none: the engine will say so."""
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return text
