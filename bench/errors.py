"""The errors that bench raises on purpose, each a sentence for the person at the console.

    BenchError             a mistake in what was asked for: status 2
    ├── WorkloadError      what to send cannot be understood, or its file cannot be read
    ├── LoadError          when to send cannot be understood, or does not fit the workload
    ├── TargetError        the endpoint does not serve the model, or its URL is none
    │   └── TargetFailed   the endpoint cannot be reached, or fails: status 3
    └── ResultError        a result cannot be read

A request that fails is not an error of bench: it is a record.
"""

import difflib
from collections.abc import Iterable
from typing import Self


class BenchError(Exception):
    """Base of the tree; `str(error)` is the whole message, and `status` that of the command."""

    status = 2

    @classmethod
    def of(cls, key: str, value: object, problem: str, choices: Iterable[str] = ()) -> Self:
        """An error about one setting: names its key, its value and, of `choices`, the nearest."""
        valid = list(choices)
        near = nearest(str(value), valid)
        hint = f"; did you mean {near!r}?" if near is not None else ""
        listed = f" (valid: {', '.join(valid)})" if valid else ""
        return cls(f"{key} = {str(value)!r}: {problem}{hint}{listed}")


class WorkloadError(BenchError):
    """What to send: a spec, a prompt file or a trace."""


class LoadError(BenchError):
    """When to send: a spec, or a count and a duration that do not fit it."""


class TargetError(BenchError):
    """The endpoint: not one, or without the model that was asked for."""


class TargetFailed(TargetError):
    """The endpoint: unreachable, or it fails where it should answer."""

    status = 3


class ResultError(BenchError):
    """A folder of results: absent, cut off, or of another kind."""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most likely meant; None where nothing is near."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None
