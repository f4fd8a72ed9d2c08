"""vLLM's own command line, read from the `engine:` section of serve_config.yaml.

Every value is read by the type that vLLM gives its argument, whatever YAML made of it: `"false"`,
0 and `off` are a false, `"32k"` is a length, a list is a list. What vLLM would refuse only after it
has loaded the model (a misspelt parser, a chat template that is not there) is refused here.

`python -m serve_app.replica.arguments` reads the section as JSON from stdin and prints what is
wrong with it. The doctor asks it in a process of its own, because a broken installation must not
break its diagnosis.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import (
    FrontendArgs,
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serve_app.errors import ConfigError, nearest

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


def parse(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """vLLM's parsed arguments, checked against vLLM's own definition.

    Raises:
        ConfigError: naming the argument, its value and the nearest valid choice.
    """
    parser = _parser()
    actions = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    for key, value in arguments.items():
        if key not in actions:
            raise ConfigError(f"engine.{key}", value, "unknown to vLLM", nearest(key, actions))
        argv += _words(key, value, actions[key])
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        for key, value in arguments.items():
            if value == [] and actions[key].nargs in ("+", "*"):
                setattr(args, key, [])  # No command line says that.
            if isinstance(value, float) and isinstance(getattr(args, key), str):
                setattr(args, key, str(value))  # A revision 1.0 is not a revision 1.
        validate_parsed_serve_args(args)
    except _Unparsable as error:
        key = error.argument.lstrip("-").replace("-", "_")
        raise ConfigError(f"engine.{key}", arguments.get(key), _plain(error.problem)) from None
    except Exception as error:  # vLLM's checks raise errors of many kinds.
        raise _refused(arguments, actions, error) from error
    for key, value in arguments.items():
        _check_kind(key, value, getattr(args, key, None))
    _check_plugins(arguments, args)
    return args


def loading(args: argparse.Namespace, load: Mapping[str, Any]) -> argparse.Namespace:
    """vLLM's parsed arguments, with others for how weights are loaded."""
    changed = copy.copy(args)
    for name, value in load.items():
        setattr(changed, name, value)
    return changed


class _Unparsable(Exception):
    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(problem)
        self.argument, self.problem = argument, problem


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    """vLLM's parser, raising where a command line would exit."""

    def error(self, message: str) -> NoReturn:
        # "argument --max-model-len: invalid value" or a sentence about the whole.
        subject, _, problem = message.removeprefix("argument ").partition(": ")
        raise _Unparsable(subject.split("/")[0], problem or message)


@functools.cache
def _parser() -> _Parser:
    """Built once: that takes a second."""
    parser: _Parser = make_arg_parser(_Parser(add_help=False))
    return parser


# --- from a value of YAML to words of a command line ----------------------------------------


def _words(key: str, value: Any, action: argparse.Action) -> list[str]:
    """The words of a command line that give `action` this value."""
    flag = "--" + key.replace("_", "-")
    if value is None:
        return []  # vLLM's default.
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"engine.{key}", value, "must be a number that is finite")
    if action.nargs == 0:
        return _switch(key, value, flag, action)
    if action.nargs == "?" and isinstance(value, bool):
        return [flag] if value else []
    _check_choice(key, value, action)
    if action.nargs in ("+", "*"):
        values = value if isinstance(value, list | tuple) else [value]
        return [flag, *map(_word, values)] if values else []
    if isinstance(action, argparse._AppendAction):
        values = value if isinstance(value, list | tuple) else [value]
        return [f"{flag}={_word(each)}" for each in values]
    if isinstance(value, list | tuple) and key == "device_ids":
        return [f"{flag}={','.join(map(_word, value))}"] if value else []
    if isinstance(value, list | tuple | Mapping):
        return [f"{flag}={json.dumps(value)}"]
    if action.type is json.loads:
        return [f"{flag}={_as_json(value, isinstance(action.default, list))}"]
    return [f"{flag}={_word(value)}"]


def _switch(key: str, value: Any, flag: str, action: argparse.Action) -> list[str]:
    """A switch, on or off. Off is not to be said where vLLM has no word for it."""
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ConfigError(f"engine.{key}", value, "must be true or false")
    if word in _TRUE:
        return [flag]
    off = "--no-" + flag.removeprefix("--")
    return [off] if off in action.option_strings else []


def _check_choice(key: str, value: Any, action: argparse.Action) -> None:
    """Name the nearest choice, which argparse does not."""
    if action.choices is None or not isinstance(value, str) or value in action.choices:
        return
    words = [str(choice) for choice in action.choices]
    try:
        # vLLM's own types may take other spellings of a choice.
        read = action.type(value) if callable(action.type) else value
    except ValueError:
        read = value
    if read not in action.choices:
        near = nearest(value, words)
        raise ConfigError(f"engine.{key}", value, f"not one of {', '.join(words)}", near)


def _word(value: Any) -> str:
    if isinstance(value, list | tuple | Mapping):
        return json.dumps(value)
    # YAML makes a float of 1.0e3, where vLLM wants a whole number.
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def _as_json(value: Any, is_list: bool) -> str:
    """JSON for an argument that is JSON; a plain text stands for a list of one."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        json.loads(value)
    except ValueError:
        return json.dumps([value] if is_list else value)
    return value


# --- what vLLM would refuse later -----------------------------------------------------------


def _check_kind(key: str, value: Any, read: Any) -> None:
    """Refuse what vLLM's parser reads as something of another kind than the argument is.

    Its parser takes any JSON for a mapping or a list, and its text for a text.

    Raises:
        ConfigError: naming the kind.
    """
    problem = None
    kinds = _kinds().get(key, frozenset())
    given = value if isinstance(value, list | tuple) else [value]
    texts = read if isinstance(read, list) else [read]
    if value is None or value == "":
        return
    if kinds == {dict} and not isinstance(read, Mapping):
        problem = "must be a mapping"
    elif kinds and kinds <= {list, set} and not isinstance(read, list | set):
        problem = "must be a list"
    elif isinstance(value, list | tuple | Mapping) and read == json.dumps(value):
        problem = "must be one value"
    elif any(isinstance(each, list | Mapping) and json.dumps(each) in texts for each in given):
        problem = "must be a list of texts"
    elif any(isinstance(each, bool) and str(each) in texts for each in given):
        problem = "must be a text: YAML reads yes, no, on and off without quotes as true or false"
    if problem is not None:
        raise ConfigError(f"engine.{key}", value, problem)


@functools.cache
def _kinds() -> Mapping[str, frozenset[Any]]:
    """By argument: the kinds of value that vLLM's own annotation names; `None` is none of them."""
    kinds = {}
    for holder in (AsyncEngineArgs, FrontendArgs):
        for field in dataclasses.fields(holder):
            members = typing.get_args(field.type)
            union = members if isinstance(field.type, types.UnionType) else (field.type,)
            names = {typing.get_origin(each) or each for each in union}
            kinds[field.name] = frozenset(names - {types.NoneType})
    return kinds


def _check_plugins(arguments: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Check names that vLLM or a plugin registers, because vLLM's parser accepts any text.

    Raises:
        ConfigError: nothing of that name is registered, or a plugin's file cannot be imported.
    """
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for key in ("tool_parser_plugin", "reasoning_parser_plugin"):
        if path := getattr(args, key):
            try:
                _import_plugin(path)
            except Exception as error:
                problem = f"cannot be imported: {first_sentence(error)}"
                raise ConfigError(f"engine.{key}", path, problem) from error
    for key, registered in _registered(ToolParserManager, ReasoningParserManager).items():
        value = getattr(args, key, None)
        if not isinstance(value, str) or not value or key not in arguments:
            continue
        names = registered()
        if value.casefold() not in {name.casefold() for name in names}:
            raise ConfigError(f"engine.{key}", value, "unknown to vLLM", nearest(value, names))


def _import_plugin(path: str) -> None:
    """Import a file or a module. vLLM's own import only logs what it raises."""
    if not path.endswith(".py"):
        importlib.import_module(path)
        return
    from vllm.utils.import_utils import import_from_path

    import_from_path(Path(path).stem, path)


def _registered(tools: Any, reasoning: Any) -> dict[str, Callable[[], list[str]]]:
    """By argument: the names that vLLM knows once it looks for one."""

    def quantizations() -> list[str]:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        return [*QUANTIZATION_METHODS]

    def load_formats() -> list[str]:
        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

        return [*_LOAD_FORMAT_TO_MODEL_LOADER]

    def tokenizers() -> list[str]:
        from vllm.tokenizers.registry import TokenizerRegistry

        return ["auto", *TokenizerRegistry.tokenizers]

    def attention_backends() -> list[str]:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        return [*AttentionBackendEnum.__members__]

    return {
        "attention_backend": attention_backends,
        "tool_call_parser": tools.list_registered,
        "reasoning_parser": reasoning.list_registered,
        "quantization": quantizations,
        "load_format": load_formats,
        "tokenizer_mode": tokenizers,
    }


# What argparse says of a type that it names by its function.
_TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "human_readable_int": "must be a whole number, such as 32768 or 32K",
    "human_readable_int_or_auto": "must be a whole number, such as 32768 or 32K, or auto",
    "loads": "must be JSON",
}


def _plain(problem: str) -> str:
    """One sentence of argparse or pydantic, without the names of vLLM's functions."""
    for pattern in (r"invalid (\w+) value: ", r"Value .* cannot be converted to <class '(\w+)'>"):
        if (invalid := re.match(pattern, problem)) and invalid[1] in _TYPES:
            return _TYPES[invalid[1]]
    return first_sentence(ValueError(problem))


def _refused(arguments: Mapping[str, Any], names: Iterable[str], error: Exception) -> ConfigError:
    """An error of vLLM as a ConfigError of the argument that its text mentions, if any."""
    problem = first_sentence(error)
    text = problem.replace("-", "_")
    mentioned = [key for key in arguments if key in names and key in text]
    mentioned += [key for key in ("chat_template",) if key in arguments and "template" in text]
    if not mentioned:
        return ConfigError("engine", dict(arguments), problem)
    key = max(mentioned, key=len)
    return ConfigError(f"engine.{key}", arguments[key], problem)


def first_sentence(error: Exception) -> str:
    """The sentence of vLLM's often long messages that states the mistake."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic: "1 validation error for ModelConfig", then "  Value error, what is wrong [type=..."
    for line in lines:
        if line.startswith("Value error, "):
            return line.removeprefix("Value error, ").split(" [type=")[0]
    if len(lines) > 1 and "validation error" in lines[0]:
        # The name of a field, where there is one, and then the mistake.
        field = [] if " [type=" in lines[1] else [lines[1]]
        mistake = next((line for line in lines if " [type=" in line), lines[-1])
        return ": ".join([*field, mistake.split(" [type=")[0]])
    return lines[0] if lines else type(error).__name__


def main() -> int:
    """Print one sentence about the arguments on stdin that cannot be served. Returns 1 then."""
    try:
        parse(json.load(sys.stdin))
    except ConfigError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
