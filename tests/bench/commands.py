"""Commands of bench in this process: one of its own takes two seconds to import bench."""

import contextlib
import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from bench import __main__ as main


@dataclass
class Ran:
    """What a command ended with.

    Attributes:
        last: the last line of standard output, as JSON.
        shown: what a person sees: standard error.
    """

    status: int
    last: dict[str, Any]
    shown: str


def run(*words: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["bench", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _signal_handlers(),
    ):
        status = main.main()
    lines = out.getvalue().splitlines()
    return Ran(status, json.loads(lines[-1]) if lines else {}, err.getvalue())


@contextlib.contextmanager
def _signal_handlers() -> Iterator[None]:
    """A command sets its own; pytest's are set again."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
