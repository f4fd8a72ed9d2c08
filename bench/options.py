"""Types of command-line options that several commands share.

argparse refuses an invalid value with the option's name and status 2, before anything starts.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def whole(minimum: int, maximum: int = 1_000_000) -> Callable[[str], int]:
    """A whole number from `minimum` to `maximum`."""

    def read(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text}: must be from {minimum} to {maximum}")
        return value

    read.__name__ = "whole number"  # What argparse calls it.
    return read


def number(minimum: float = 0.0, above: float | None = None) -> Callable[[str], float]:
    """A finite number from `minimum`, or above `above`."""

    def read(text: str) -> float:
        value = float(text)
        if above is not None and not above < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be above {above:g}")
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be {minimum:g} or more")
        return value

    read.__name__ = "number"
    return read


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, as in '{{\"top_k\": 1}}'")
    return value


def folder(text: str) -> Path:
    """A folder that is there, or can be made."""
    path = Path(text)
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {nearest} is a file, not a folder")
    return path
