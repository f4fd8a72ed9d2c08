"""The arguments of `vllm serve` and their kinds, from engine_arguments.txt.

They are stored in a file, because asking vLLM would add ten seconds to every cold start. A test
compares the file with vLLM; `python runpod/engine_arguments.py` writes it.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_LIST = Path(__file__).with_name("engine_arguments.txt")

# Numbers of which 0 makes no sense, beside those of which vLLM's own definition says so.
_POSITIVE = frozenset(
    {"max_model_len", "max_cpu_loras", "max_lora_rank", "num_gpu_blocks_override"}
    | {"kv_cache_memory_bytes", "api_server_count", "max_num_queued_reqs", "max_num_queued_tokens"}
    | {"max_cudagraph_capture_size", "spec_tokens"}
)


def engine_arguments() -> dict[str, str]:
    """The arguments of `vllm serve` and their kinds.

    flag: true or false. switch: true, or unset. text: any text, unchanged. number. count: a
    positive number. json: an object or a list. either: an object, or another text. list: texts or
    objects.
    """
    lines = _LIST.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if line and not line.startswith("#"))
    return {name: kind for name, kind in pairs}


def ask_vllm() -> str:
    """The content of engine_arguments.txt for the installed vLLM."""
    # Only here: otherwise only serve_app/replica imports vLLM.
    arguments: Any = importlib.import_module("serve_app.replica.arguments")
    parser = arguments.make_arg_parser(arguments.FlexibleArgumentParser(add_help=False))
    positive = _POSITIVE | _positive_numbers(importlib.import_module("vllm.config"))
    lines = [f"{action.dest} {_kind(action, positive)}" for action in parser._actions]
    head = (
        "# The arguments of `vllm serve` 0.32.0. Written by `python runpod/engine_arguments.py`.\n"
    )
    return head + "\n".join(sorted(set(lines))) + "\n"


def _positive_numbers(config: Any) -> set[str]:
    """Fields of vLLM's configuration that are defined as positive."""
    numbers = set()
    for part in vars(config).values():
        for name, field in getattr(part, "__pydantic_fields__", {}).items():
            least = [getattr(limit, "ge", None) == 1 for limit in field.metadata]
            above = [getattr(limit, "gt", None) == 0 for limit in field.metadata]
            if any(least + above):
                numbers.add(name)
    return numbers


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    """The result of an argument's own parser; None if it refuses the text."""
    with contextlib.suppress(Exception):  # Each parser refuses in its own way.
        return parse(text)
    return None


def _kind(action: Any, positive: Iterable[str]) -> str:
    """The kind of an argument, from how vLLM parses it."""
    if action.nargs == 0:
        return (
            "flag" if any(word.startswith("--no-") for word in action.option_strings) else "switch"
        )
    if action.nargs in ("+", "*"):
        return "list"
    if action.type is None:
        return "text"
    if any(_parsed(action.type, text) not in (None, text) for text in ("{}", "[]", '{"a": 1}')):
        return "either" if _parsed(action.type, "text") == "text" else "json"
    if isinstance(_parsed(action.type, "7"), int | float):
        return "count" if action.dest in positive else "number"
    return "text"


if __name__ == "__main__":
    _LIST.write_text(ask_vllm(), encoding="utf-8")
