"""YAML whose mappings and lists know on which line each entry is.

Everything else is as yaml.safe_load gives it. Anchors and merge keys work; an entry that came
through one has the line where it is written, because that is where it is to be mended.
"""

from typing import Any

import yaml


class Mapping(dict[str, Any]):
    """`lines`: the line of each key, from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.line = 0
        self.lines: dict[str, int] = {}


class Sequence(list[Any]):
    """`lines`: the line of each element, from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.line = 0
        self.lines: list[int] = []


class Text(str):
    """A block of lines. `first`: the line of its first one, where a text inside begins."""

    first: int


# Where PyYAML was built with libyaml its parser is ten times as fast.
PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(PARSER):  # type: ignore[misc]
    def construct_lined_mapping(self, node: yaml.MappingNode) -> Any:
        mapping = Mapping()
        yield mapping
        self.flatten_mapping(node)
        mapping.line = self._line(node)
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            mapping[str(key)] = self.construct_object(value_node, deep=True)
            mapping.lines[str(key)] = self._line(key_node)

    def construct_lined_sequence(self, node: yaml.SequenceNode) -> Any:
        sequence = Sequence()
        yield sequence
        sequence.line = self._line(node)
        for each in node.value:
            sequence.append(self.construct_object(each, deep=True))
            sequence.lines.append(self._line(each))

    def construct_lined_text(self, node: yaml.ScalarNode) -> str:
        value = str(self.construct_scalar(node))
        if node.style not in ("|", ">"):
            return value
        text = Text(value)
        text.first = self._line(node) + 1
        return text

    def _line(self, node: yaml.Node) -> int:
        return node.start_mark.line + 1 + self.offset

    offset = 0


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_lined_mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_lined_sequence)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_lined_text)


def load_all(text: str, offset: int = 0) -> list[Any]:
    """Every document that is not empty. `offset`: lines above, where it is part of a longer text.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    loader = _Loader(str(text))  # libyaml takes no subclass of str.
    loader.offset = offset
    documents = []
    try:
        while loader.check_data():
            document = loader.get_data()
            if document is not None:
                documents.append(document)
    finally:
        loader.dispose()
    return documents


def line_of(value: Any, *path: str | int) -> int:
    """The line of the entry at a path; of the nearest above it that is there."""
    line = value.line if isinstance(value, (Mapping, Sequence)) else 1
    for step in path:
        if isinstance(value, Mapping) and step in value:
            line, value = value.lines[str(step)], value[str(step)]
        elif isinstance(value, Sequence) and isinstance(step, int) and step < len(value):
            line, value = value.lines[step], value[step]
        else:
            break
    return int(line)


def at(value: Any, *path: str | int) -> Any:
    """The entry at a path, or None."""
    for step in path:
        if isinstance(value, dict) and step in value:
            value = value[str(step)]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value
