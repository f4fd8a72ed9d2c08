"""The text of an environment variable as a value: flags, numbers, lists and JSON."""

import json
import math
import re
from decimal import Decimal
from typing import Any

import yaml

from serve_app.errors import ConfigError

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
UNSET = ("none", "null")
# As vLLM reads numbers: 32k is 32,000 and 32K is 32,768.
_WHOLE = re.compile(r"([+-]?\d+)()")
_SUFFIXED = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])")
_SUFFIXES = {letter: 1000**power for power, letter in enumerate("kmgt", 1)}
_SUFFIXES |= {letter: 1024**power for power, letter in enumerate("KMGT", 1)} | {"": 1}
FLAGS = ("flag", "switch")
_BETWEEN = re.compile(r"[\s,]+")


def value_of(name: str, text: str, kind: str) -> Any:
    """The value of a variable's text; None if the text means "unset"."""
    if text.lower() in UNSET:
        return None
    if kind in FLAGS:
        word = text.lower()
        if word not in _TRUE + _FALSE:
            raise ConfigError(name, text, "must be true or false")
        return word in _TRUE or (None if kind == "switch" else False)
    if kind == "list":
        return _lora_modules(text) if name == "LORA_MODULES" else _list(name, text)
    if kind == "name":
        if len(values := _list(name, text)) != 1:
            raise ConfigError(name, text, "must be one name: a model is served under one")
        return values[0]
    if kind == "json":
        value = _pairs(text) or _json(name, text)
        return value if isinstance(value, dict | list) else text
    if kind == "either":
        return _json(name, text) if text.startswith("{") else text
    if kind in ("number", "count", "seconds"):
        number = _number(name, text, suffixed=kind != "seconds")
        return None if number == 0 and kind != "number" else number
    return text


def _pairs(text: str) -> dict[str, int] | None:
    """`image=1,video=0`, as in templates of worker-vllm 1 and 2; None for any other text."""
    pairs = [re.fullmatch(r"\s*(\w+)\s*=\s*(\d+)\s*", each) for each in text.split(",")]
    return {pair[1]: int(pair[2]) for pair in pairs if pair} if all(pairs) else None


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(name, text, f"is not JSON: {error}") from None


def _list(name: str, text: str) -> list[Any]:
    """A JSON list; or words and JSON objects, with spaces or commas between them.

    So LORA_MODULES can be `[{...}, {...}]`, `{...} {...}`, or pairs: `a=org/a b=org/b`.
    """
    if text.startswith("["):
        value = _json(name, text)
        return value if isinstance(value, list) else [value]
    values: list[Any] = []
    decoder = json.JSONDecoder()
    while text:
        if text.startswith("{"):
            try:
                value, end = decoder.raw_decode(text)
            except ValueError as error:
                raise ConfigError(name, text, f"is not JSON: {error}") from None
            values.append(value)
        else:
            end = match.start() if (match := _BETWEEN.search(text)) else len(text)
            values.append(text[:end])
        text = text[end:].lstrip(", \t\r\n")
    return values


def _number(name: str, text: str, suffixed: bool) -> Any:
    """A number, also as 32k or 32K; `auto` is left to the reader of the argument."""
    if match := _WHOLE.fullmatch(text) or (_SUFFIXED.fullmatch(text) if suffixed else None):
        return int(Decimal(match[1]) * _SUFFIXES[match[2]])
    if text.lower() == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(name, text, "must be a number")
    return int(value) if value.is_integer() else value


def _lora_modules(text: str) -> list[Any]:
    """Adapters, as vLLM reads them.

    Raises:
        ConfigError: one without a name or a path.
    """
    modules = _list("LORA_MODULES", text)
    for module in modules:
        if not _is_adapter(module):
            problem = 'must be name=path, or {"name": ..., "path": ...}'
            raise ConfigError("LORA_MODULES", module, problem)
    return modules


def _is_adapter(module: Any) -> bool:
    if isinstance(module, dict):
        return bool(module.get("name") and module.get("path"))
    name, _, path = str(module).partition("=")
    return bool(name and path)


def mapping(name: str, text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(name, text, f"is neither YAML nor JSON: {problem}") from None
    if not isinstance(value, dict):
        raise ConfigError(name, text, "must be a mapping, as `args` of serve_config.yaml is")
    return value
