"""vLLM's tool parser `hermes`, with calls read by toolcalls.py.

A plugin of vLLM (`tool_parser_plugin: serve_app.replica.hermes`, which a replica sets by itself).
vLLM 0.32's own parser cuts arguments at a tag inside a string, loses a call whose arguments are
left out, and streams other calls than it gives in one piece.
"""

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers.abstract_tool_parser import ToolParserManager
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

from serve_app.replica.toolcalls import Arguments, Call, Event, Reader, Text


class HermesToolParser(Hermes2ProToolParser):  # type: ignore[misc]
    """For one answer; vLLM makes one for each."""

    # Has vLLM call `finish_streaming` at the end of a stream.
    engine_based_streaming = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader: Reader | None = None

    def get_structural_tag(
        self,
        request: Any,
        *,
        reasoning: bool = False,
        strict_level: ToolStrictLevel = ToolStrictLevel.AUTO,
    ) -> Any:
        """The grammar of the calls.

        A forced call is held to its tool's schema, also where the tool does not say "strict": it
        has a grammar anyway, which without the schema allows arguments that are no object.
        """
        if request.tool_choice not in (None, "auto", "none"):
            strict_level = ToolStrictLevel.PARAMETER
        return super().get_structural_tag(request, reasoning=reasoning, strict_level=strict_level)

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        if request.tool_choice == "none":
            return _information(model_output, [])
        reader = Reader(eager=_constrained(request))
        events = [*reader.feed(model_output), *reader.finish()]
        names = [event.name for event in events if isinstance(event, Call)]
        arguments = [""] * len(names)
        for event in events:
            if isinstance(event, Arguments):
                arguments[event.index] += event.text
        calls = [
            ToolCall(type="function", function=FunctionCall(name=name, arguments=text))
            for name, text in zip(names, arguments, strict=True)
        ]
        content = "".join(event.text for event in events if isinstance(event, Text))
        return _information(content, calls)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        if request.tool_choice == "none":
            return DeltaMessage(content=delta_text) if delta_text else None
        if self._reader is None:
            self._reader = Reader(eager=_constrained(request))
        return _delta(self._reader.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        """Called by vLLM once a stream is over."""
        return None if self._reader is None else _delta(self._reader.finish())

    def get_remaining_unstreamed_args(self) -> str:
        """Nothing: `finish_streaming` gives the rest."""
        return ""


def _constrained(request: Any) -> bool:
    """Whether a grammar holds the calls of this request to their schemas."""
    outputs = getattr(request, "structured_outputs", None)
    return outputs is not None and outputs.structural_tag is not None


def _information(content: str, calls: list[ToolCall]) -> ExtractedToolCallInformation:
    return ExtractedToolCallInformation(
        tools_called=bool(calls), tool_calls=calls, content=content or None
    )


def _delta(events: list[Event]) -> DeltaMessage | None:
    if not events:
        return None
    content = "".join(event.text for event in events if isinstance(event, Text))
    calls = []
    for event in events:
        if isinstance(event, Call):
            function = DeltaFunctionCall(name=event.name).model_dump(exclude_none=True)
            calls.append(
                DeltaToolCall(
                    index=event.index, type="function", id=make_tool_call_id(), function=function
                )
            )
        elif isinstance(event, Arguments):
            function = DeltaFunctionCall(arguments=event.text).model_dump(exclude_none=True)
            calls.append(DeltaToolCall(index=event.index, function=function))
    return DeltaMessage(content=content or None, tool_calls=calls)


ToolParserManager.register_module(name="hermes", module=HermesToolParser)
