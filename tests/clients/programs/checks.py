"""What the programs of clients share: the server to ask, and one line of JSON for each check."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator

URL = os.environ["SERVER_URL"]
MODEL = os.environ["SERVER_MODEL"]
_CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Register a check: it fails by raising."""
    _CHECKS.append(function)
    return function


@contextlib.contextmanager
def raises(kind: type[Exception], words: str = "") -> Iterator[None]:
    """The block must raise `kind`, with these words in its message."""
    try:
        yield
    except kind as error:
        if words not in str(error):
            raise AssertionError(f"{words!r} is not in {error}") from error
    else:
        raise AssertionError(f"no {kind.__name__}")


def report(name: str, error: str | None) -> None:
    """Print the result of a check; `error` is None where it passed."""
    print(json.dumps({"check": name, "error": error}), flush=True)


def run() -> None:
    """Run every registered check and report it."""
    for function in _CHECKS:
        try:
            function()
        except Exception as error:
            report(function.__name__, f"{type(error).__name__}: {error}"[:1000])
        else:
            report(function.__name__, None)
