"""A serve_config.yaml with the best engine arguments, each with its explanation.

    write(Path("tuned.yaml"), model="/models/7b", engine={"max_num_seqs": 128}, tuned={...})

The shipped configuration is the template and stays as it is but for the lines that change, so that
every other value keeps its comment. What is written is read back, and must say what was meant.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.engine.knobs import BY_NAME
from bench.errors import BenchError

TEMPLATE = Path(__file__).parents[2] / "serve_config.yaml"
# Arguments of vLLM that have a key of their own in the application's settings.
OWN = ("tensor_parallel_size", "pipeline_parallel_size")
_INDENT = " " * 8


def text(*, model: str, engine: Mapping[str, Any], tuned: Mapping[str, Any], why: str) -> str:
    """The configuration.

    Args:
        engine: arguments that are set whatever was found; `tuned` those that were found.
        why: how they were found, a line of comment.

    Raises:
        BenchError: the template is not what this module knows.
    """
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()
    _set(lines, "model", model)
    everything = {**engine, **tuned}
    for name in OWN:
        if name in everything:
            _set(lines, name, everything.pop(name))
    place = _place(lines, r"      engine:") + 1
    keys = {line.strip().partition(":")[0] for line in lines[place : place + 2]}
    added = [f"{_INDENT}# {why}"]
    for name, value in everything.items():
        if name in keys:
            continue
        knob = BY_NAME.get(name)
        if knob is not None and name in tuned:
            added += [f"{_INDENT}# {line}" for line in _wrapped(knob.meaning)]
        added.append(f"{_INDENT}{name}: {json.dumps(value)}")
    lines[place:place] = added
    written = "\n".join(lines) + "\n"
    _check(written, model, everything)
    return written


def write(path: Path, **given: Any) -> Path:
    """Write what `text` returns; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(**given), encoding="utf-8")
    return path


def _set(lines: list[str], key: str, value: Any) -> None:
    """Replace the value of an argument of the application, and keep its comment."""
    place = _place(lines, rf"      {key}: ")
    _, comment_mark, comment = lines[place].partition(" # ")
    lines[place] = f"      {key}: {json.dumps(value)}{comment_mark}{comment}"


def _place(lines: list[str], pattern: str) -> int:
    for place, line in enumerate(lines):
        if re.match(pattern, line):
            return place
    raise BenchError(f"{TEMPLATE.name} has no line like {pattern.strip()!r}")


def _wrapped(words: str, width: int = 88) -> list[str]:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _check(written: str, model: str, engine: Mapping[str, Any]) -> None:
    """Read the written file back.

    Raises:
        BenchError: it does not say what was meant.
    """
    args = yaml.safe_load(written)["applications"][0]["args"]
    differs = [name for name, value in engine.items() if args["engine"].get(name) != value]
    if args["model"] != model or differs:
        raise BenchError(f"the configuration would not say what was found: {differs or 'model'}")
