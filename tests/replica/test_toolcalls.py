"""Tool calls read from text: the same in every chunking, and arguments that are JSON."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.replica.toolcalls import END, START, Arguments, Call, Event, Reader, Text, read_call
from tests.examples import examples


def result(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """Text, and name and arguments of each call."""
    text = "".join(event.text for event in events if isinstance(event, Text))
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, Call):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, Arguments):
            assert event.index == len(calls) - 1
            calls[event.index][1] += event.text
    return text, [(name, arguments) for name, arguments in calls]


def read(*pieces: str, eager: bool = False) -> tuple[str, list[tuple[str, str]]]:
    reader = Reader(eager=eager)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return result([*events, *reader.finish()])


def call(name: str, arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{START}\n{body}\n{END}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (call("now", {}), ("", [("now", "{}")])),
        (
            call("now", {}) + "\n" + call("run", {"command": "ls"}),
            ("", [("now", "{}"), ("run", '{"command": "ls"}')]),
        ),
        ("Well. " + call("a", {"x": 1}), ("Well. ", [("a", '{"x": 1}')])),
        (call("run", {"c": "größe 日本 😀"}), ("", [("run", '{"c": "größe 日本 😀"}')])),
        (f'{START}{{"name":"run","arguments":{{"c":"ls"}}}}{END}', ("", [("run", '{"c":"ls"}')])),
        (
            call("run", {"c": f"echo {END} {START} done"}),
            ("", [("run", json.dumps({"c": f"echo {END} {START} done"}))]),
        ),
        (f'{START}\n{{"name": "now"}}\n{END}', ("", [("now", "{}")])),
        (f'{START}\n{{"name": "now", "arguments": null}}\n{END}', ("", [("now", "{}")])),
        (f'{START}{{"arguments": {{"x": 1}}, "name": "f"}}{END}', ("", [("f", '{"x": 1}')])),
        (f'{START}{{"name": "f", "arguments": "{{\\"x\\": 1}}"}}{END}', ("", [("f", '{"x": 1}')])),
        # The closing tag is missing: the answer ended there.
        (f'{START}{{"name": "f", "arguments": {{}}}}', ("", [("f", "{}")])),
        # A line break in a string is no JSON; what is passed on is.
        (f'{START}{{"name": "f", "arguments": {{"x": "a\nb"}}}}', ("", [("f", '{"x": "a\\nb"}')])),
        # No calls: text.
        ("a < b <tool", ("a < b <tool", [])),
        (f"{START} hello {END}", (f"{START} hello {END}", [])),
        (f'{START}{{"name": }}{END}', (f'{START}{{"name": }}{END}', [])),
        (f'{START}{{"nome": "f"}}{END}', (f'{START}{{"nome": "f"}}{END}', [])),
        (f'{START}{{"name": "f", "argum', (f'{START}{{"name": "f", "argum', [])),
        (
            f'{START}{{"name": "f", "arguments": NaN}}',
            (f'{START}{{"name": "f", "arguments": NaN}}', []),
        ),
        # Arguments are an object: no client could read these.
        (
            f'{START}{{"name": "f", "arguments": "x"}}',
            (f'{START}{{"name": "f", "arguments": "x"}}', []),
        ),
        (
            f'{START}{{"name": "f", "arguments": [1]}}',
            (f'{START}{{"name": "f", "arguments": [1]}}', []),
        ),
        # One that is broken hides no other.
        (f"{START}{{]}} " + call("f", {}), (f"{START}{{]}} ", [("f", "{}")])),
        (f"{START}{{ " + call("f", {}), (f"{START}{{ ", [("f", "{}")])),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_and_text(text: str, expected: tuple[str, list[tuple[str, str]]], size: int) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(*pieces) == expected


_WORDS = '< <tool _call> { } [ ] " \\ "name" : , "arguments" "}} f é 😀 null 1 \\u00e9'
pieces_of_text = st.sampled_from(
    [START, END, *_WORDS.split(), " ", "\n", '{"name": "f", "arguments": {"x": "']
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.just(END) | st.just(START),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def cuts(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@examples(400)
@given(
    parts=st.lists(pieces_of_text, max_size=30),
    places=st.lists(st.integers(0, 500), max_size=20),
    eager=st.booleans(),
)
def test_any_text_is_read_alike_in_any_chunking(
    parts: list[str], places: list[int], eager: bool
) -> None:
    text = "".join(parts)
    whole = read(text, eager=eager)
    assert read(*cuts(text, places), eager=eager) == whole
    assert read(*text, eager=eager) == whole
    if not eager:
        for _, arguments in whole[1]:
            assert isinstance(json.loads(arguments), dict)
    if not whole[1]:
        assert whole[0] == text  # Nothing is lost.


@examples(200)
@given(
    calls=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
            st.dictionaries(st.text(max_size=4), json_values, max_size=4),
            st.booleans(),
            st.sampled_from([None, 1]),
        ),
        min_size=1,
        max_size=3,
    ),
    before=st.sampled_from(["", "Let me see. ", "<", "{"]),
    places=st.lists(st.integers(0, 2000), max_size=20),
    eager=st.booleans(),
    ascii_only=st.booleans(),
)
def test_calls_are_what_was_written(
    calls: list[tuple[str, dict[str, Any], bool, int | None]],
    before: str,
    places: list[int],
    eager: bool,
    ascii_only: bool,
) -> None:
    text = before
    for name, arguments, name_last, indent in calls:
        members = {"name": name, "arguments": arguments}
        if name_last:
            members = dict(reversed(members.items()))
        body = json.dumps(members, ensure_ascii=ascii_only, indent=indent)
        text += f"{START}\n{body}\n{END}\n"
    output, outcome = read(*cuts(text, places), eager=eager)
    assert output == before
    assert [name for name, _ in outcome] == [name for name, *_ in calls]
    assert [json.loads(arguments) for _, arguments in outcome] == [call[1] for call in calls]


def test_arguments_are_passed_on_as_they_come_where_a_grammar_holds_them() -> None:
    reader = Reader(eager=True)
    assert reader.feed(f'{START}\n{{"name": "run", "arguments": {{"a": "x') == [
        Call(0, "run"),
        Arguments(0, '{"a": "x'),
    ]
    assert reader.feed(' y"') == [Arguments(0, ' y"')]
    assert reader.feed("}}\n</tool") == [Arguments(0, "}")]
    assert reader.feed(f"_call>\n{START}") == []
    assert reader.finish() == []
    # An answer that ends at max_tokens: what came of the arguments, streamed or not.
    assert read(f'{START}{{"name": "f", "arguments": {{"a": [1', eager=True) == (
        "",
        [("f", '{"a": [1')],
    )


def test_deep_nesting_is_no_crash() -> None:
    deep = '{"name": "f", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert read_call(deep) is None
