"""vLLM's own command line, read from the `engine:` section of serve_config.yaml."""

import argparse
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from serve_app.errors import ConfigError, nearest


def parse(arguments: Mapping[str, Any]) -> argparse.Namespace:
    """vLLM's parsed arguments, checked against vLLM's own definition.

    Raises:
        ConfigError: naming the argument, its value and the nearest valid choice.
    """
    parser = make_arg_parser(_Parser(add_help=False))
    known = {action.dest: action for action in parser._actions}
    argv: list[str] = []
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"engine.{key}", value, "unknown to vLLM", nearest(key, known))
        choices = known[key].choices
        if choices is not None and isinstance(value, str) and value not in choices:
            words = [str(choice) for choice in choices]
            near = nearest(value, words)
            raise ConfigError(f"engine.{key}", value, f"not one of {', '.join(words)}", near)
        argv += _argv(key, value)
    try:
        args: argparse.Namespace = parser.parse_args(argv)
        validate_parsed_serve_args(args)
    except _Unparsable as error:
        key = error.argument.lstrip("-").replace("-", "_")
        raise ConfigError(f"engine.{key}", arguments.get(key), error.problem) from None
    except (TypeError, ValueError) as error:
        raise ConfigError("engine", dict(arguments), first_sentence(error)) from error
    return args


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


def _argv(key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *(json.dumps(v) if isinstance(v, Mapping) else str(v) for v in value)]
    return [flag, str(value)]


def first_sentence(error: Exception) -> str:
    """The part of vLLM's often many-lined messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # pydantic: "1 validation error for ModelConfig", then "  Value error, what is wrong [type=..."
    for line in lines:
        if line.startswith("Value error, "):
            return line.removeprefix("Value error, ").split(" [type=")[0]
    return lines[0] if lines else type(error).__name__
