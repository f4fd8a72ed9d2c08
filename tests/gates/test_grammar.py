"""The size of a grammar: what a short text stands for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.gates.grammar import of_tools, size


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": schema}, "required": ["a"]}
    return schema


def field(**bounds: Any) -> dict[str, Any]:
    return {"type": "string", **bounds}


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        ({"choice": [f"word number {i}" for i in range(100_000)]}, 1_000_000),
        ({"json": nested(15)}, 500_000),
        ({"json": '{"enum": ["' + "x" * 100_000 + '"]}'}, 100_000),
        ({"grammar": "root ::= " + " | ".join(f'"{i}"' for i in range(20_000))}, 100_000),
        ({"anyOf": [field(minLength=1, maxLength=200 + 37 * i) for i in range(100)]}, 200_000),
        ({"anyOf": [field(pattern=f"[a-z]{{{i},{i + 300}}}") for i in range(100)]}, 200_000),
        ({"regex": "".join(f"[a-z]{{{i}}}" for i in range(200, 300))}, 100_000),
        ({"format": {"type": "json_schema", "schema": field(maxLength=1e300)}}, 2000),
    ],
)
def test_what_takes_long_to_compile_is_large(spec: Any, least: int) -> None:
    assert size(spec) >= least


@pytest.mark.parametrize(
    "spec",
    [
        {"json": {"type": "array", "items": field(maxLength=500), "maxItems": 300}},
        {"json": field(maxLength=100_000)},
        {"anyOf": [field(maxLength=255) for _ in range(300)]},
        {"regex": "[a-z]{50000}"},
        {"regex": "((a{1,300}b{1,300}){1,300}c{1,300}){1,300}"},
    ],
)
def test_what_is_compressed_is_not_counted_in_full(spec: Any) -> None:
    assert size(spec) < 16_000


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
    assert size(value) >= 0


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
