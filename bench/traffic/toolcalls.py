"""Prompts that offer tools: what agents send, and what constrains an answer to a schema.

    calls:tools=8,input=60,output=64,choice=required

Every prompt of a run offers the same `tools` functions, each with three arguments, before its own
words; with choice=required the answer must be a call. Needs --endpoint chat.
"""

import random
from typing import Any

from bench import spec
from bench.errors import WorkloadError
from bench.traffic import words
from bench.traffic.lengths import length
from bench.traffic.request import Request, Workload

OPTIONS = ("tools", "input", "output", "choice")
_CHOICES = ("auto", "required", "none")


def calls(options: spec.Options, seed: int, salted: str) -> Workload:
    """Endless prompts, each with the same tools."""
    count = options.whole("tools", 8, minimum=1, maximum=128)
    read, written = length(options, "input", default="60"), length(options, "output", default="64")
    choice = options.text("choice", "auto")
    if choice not in _CHOICES:
        raise WorkloadError.of("choice", choice, "not a choice", _CHOICES)
    extra = {"tools": [_tool(salted, number) for number in range(count)], "tool_choice": choice}

    def request(index: int) -> Request:
        rng = random.Random(f"{seed}/length/{index}")
        tokens = read.draw(rng)
        return Request(
            prompt=words.text(salted, "prompt", index, tokens),
            input_tokens=tokens,
            output_tokens=written.draw(rng),
            limit=True,  # A call ends when it is whole.
            extra=extra,
        )

    return Workload(options.name, request)


def _tool(salted: str, number: int) -> dict[str, Any]:
    name, *arguments = words.text(salted, "tool", number, 4).split()
    kinds = ({"type": "string"}, {"type": "integer"}, {"type": "string", "enum": ["a", "b"]})
    properties = {
        f"{argument}_{place}": kind
        for place, (argument, kind) in enumerate(zip(arguments, kinds, strict=True))
    }
    return {
        "type": "function",
        "function": {
            "name": f"{name}_{number}",
            "description": words.text(salted, "description", number, 12),
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
            },
        },
    }
