"""vLLM's plugin: plain and streamed answers have the same calls, through vLLM's own pipeline."""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.replica.toolcalls import END, START

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("now", "run")
]
CASES = {
    "no arguments": f'{START}\n{{"name": "now", "arguments": {{}}}}\n{END}',
    "no key": f'{START}\n{{"name": "now"}}\n{END}',
    "an end inside": f'{START}\n{{"name": "run", "arguments": {{"c": "echo {END} done"}}}}\n{END}',
    "two": f'{START}{{"name": "now"}}{END}\n{START}{{"arguments": {{"c": 1}}, "name": "run"}}{END}',
    "text": "Hello <tool",
    "no call": f"{START} nothing",
    "text before": f'So: {START}{{"name": "now"}}{END}',
}


@pytest.fixture(scope="module")
def parser_class() -> Any:
    """As vLLM makes it for a request, with the plugin that a replica loads."""
    from vllm.parser.parser_manager import ParserManager

    from serve_app.replica.arguments import parse

    parse({"model": "m", "tool_call_parser": "hermes", "enable_auto_tool_choice": True} | PLUGIN)
    return ParserManager.get_parser(
        tool_parser_name="hermes", reasoning_parser_name=None, enable_auto_tools=True
    )


PLUGIN = {"tool_parser_plugin": "serve_app.replica.hermes"}


def request(**more: Any) -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    body = {"model": "m", "messages": [{"role": "user", "content": "go"}], "tools": TOOLS, **more}
    return ChatCompletionRequest.model_validate(body)


def parser(parser_class: Any) -> Any:
    tokenizer = SimpleNamespace(get_vocab=dict)
    return parser_class(tokenizer, request().tools)


def streamed(parser: Any, requested: Any, size: int, text: str) -> Any:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    content, calls = "", {}
    for place, piece in enumerate(pieces):
        delta = parser.parse_delta(
            piece, [place], requested, prompt_token_ids=[0], finished=place == len(pieces) - 1
        )
        if delta is None:
            continue
        content += delta.content or ""
        for call in delta.tool_calls:
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (
                name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            )
    return content or None, [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_plain_and_streamed_are_alike(parser_class: Any, case: str, size: int) -> None:
    text, requested = CASES[case], request()
    _, content, calls = parser(parser_class).parse(text, requested, enable_auto_tools=True)
    plain = content, [(call.name, call.arguments) for call in calls or []]
    assert streamed(parser(parser_class), requested, size, text) == plain


def test_where_no_call_may_be_made_the_text_stays(parser_class: Any) -> None:
    requested, text = request(tool_choice="none"), CASES["two"]
    assert parser(parser_class).parse(text, requested, enable_auto_tools=True)[1:] == (text, [])
    assert streamed(parser(parser_class), requested, 5, text) == (text, [])


def test_the_plugin_is_what_vllm_finds_by_the_name(parser_class: Any) -> None:
    from vllm.tool_parsers.abstract_tool_parser import ToolParserManager

    result = ToolParserManager.get_tool_parser("hermes")
    assert result.__module__ == "serve_app.replica.hermes"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "run"}}])
def test_a_forced_call_is_held_to_its_schema(parser_class: Any, choice: Any) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}}
    tools = [{"type": "function", "function": {"name": "run", "parameters": schema}}]
    requested = parser(parser_class).adjust_request(request(tools=tools, tool_choice=choice))
    assert '"maxLength": 20' in requested.structured_outputs.structural_tag
    free = parser(parser_class).adjust_request(request(tools=tools, tool_choice="auto"))
    assert free.structured_outputs is None
