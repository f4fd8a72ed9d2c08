"""The size of a grammar: what a short text stands for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gates.grammar import of_tools, regex_size, size


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    ("pattern", "least", "most"),
    [
        ("abc", 3, 3),
        ("[a-z]{50000}", 50_000 * 5, 50_000 * 5),
        ("(a{1,300}b{1,300}){1,300}", 300 * 600, 300 * 620),
        ("((a{9}){9}){9}", 729, 900),
        (r"a\{9\}[{9}]", 5, 20),
        ("(" * 50 + "a" + "){99}" * 50, 2**50, 2**50),
        ("a{,}", 1, 4),
        ("(ab", 2, 3),
        (")){3}", 0, 9),
    ],
)
def test_a_regular_expression(pattern: str, least: int, most: int) -> None:
    assert least <= regex_size(pattern) <= most


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        ({"choice": [f"word number {i}" for i in range(100_000)]}, 1_000_000),
        ({"json": nested(15)}, 500_000),
        ({"json": {"type": "array", "items": {"maxLength": 500}, "maxItems": 300}}, 150_000),
        ({"json": '{"type": "array", "items": {"maxLength": 500}, "maxItems": 300}'}, 150_000),
        ({"json": {"type": "string", "pattern": "[a-z]{50000}"}}, 200_000),
        ({"json": {"type": "string", "maxLength": 1e6}}, 1_000_000),
        ({"grammar": 'root ::= ("ab" | "c"){90000}'}, 90_000),
        ({"format": {"type": "json_schema", "schema": {"minLength": 10**9}}}, 10**9),
    ],
)
def test_what_is_large_is_seen(spec: Any, least: int) -> None:
    assert size(spec) >= least


def test_schemas_of_every_day_are_small() -> None:
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 200},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 20},
            "email": {"type": "string", "pattern": r"^[\w.]{1,64}@[\w.]{1,255}$"},
        },
        "required": ["name"],
    }
    assert size({"type": "json_schema", "json_schema": {"name": "p", "schema": person}}) < 5_000
    assert size({"type": "json_object"}) < 50
    assert size(None) <= 1


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=5), st.sampled_from(["maxItems", "pattern", "json"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=30,
)


@given(json_values)
def test_any_json_has_a_size(value: Any) -> None:
    assert 0 <= size(value) <= 2**50


def test_tools_are_a_grammar_only_where_a_call_is_held_to_them() -> None:
    plain = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    strict = [{"type": "function", "function": {"name": "f", "strict": True}}]
    flat = [{"type": "function", "name": "f", "strict": True}]
    for choice in (None, "auto", "none", {"type": "auto"}):
        assert not of_tools(choice, plain)
        assert of_tools(choice, strict)
        assert of_tools(choice, flat)
    for choice in ("required", {"type": "function", "function": {"name": "f"}}, {"type": "any"}):
        assert of_tools(choice, plain)
