"""A spec: a workload or a load in one word, NAME:KEY=VALUE,KEY=VALUE.

One grammar for both, so that both refuse the same way: whatever is unknown, double, missing or
out of range is an error that names key, value and the nearest valid choice. Nothing is ignored: a
benchmark that runs with a misspelt option measures something else than what its report says.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError, nearest

# Among the keys of a kind: this kind begins with a path, NAME:PATH,KEY=VALUE.
PATH = "PATH"

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_COMMA = re.compile(r",(?![^()]*\))")  # Not one inside parentheses.
_PATH_AND_OPTIONS = re.compile(r"(?P<path>.*?)(?P<options>(,\w+=[^,]*)*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Options:
    """The options of one spec. Every method raises `error` for a value it cannot take."""

    name: str
    path: str
    values: Mapping[str, str]
    error: type[BenchError]

    def text(self, key: str, default: str | None = None) -> str:
        """The value as it stands; without a default it must be given."""
        value = self.values.get(key, default)
        if value is None:
            raise self.error.of(key, "", f"{self.name!r} needs it, as in {key}=VALUE")
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        minimum: float = 0.0,
        above: float | None = None,
        maximum: float = 1e6,
    ) -> float:
        """A finite number from `minimum` (or above `above`) to `maximum`, both included."""
        text = self.text(key, None if default is None else str(default))
        if not _NUMBER.fullmatch(text):
            raise self.error.of(key, text, "not a number")
        value = float(text)
        if above is not None and value <= above:
            raise self.error.of(key, text, f"must be above {above:g}")
        if not minimum <= value <= maximum:
            raise self.error.of(key, text, f"must be from {minimum:g} to {maximum:g}")
        return value

    def number_or_none(self, key: str, **limits: float) -> float | None:
        return self.number(key, **limits) if key in self.values else None

    def whole(
        self, key: str, default: int | None = None, *, minimum: int = 0, maximum: int = 1_000_000
    ) -> int:
        """A whole number from `minimum` to `maximum`, both included."""
        text = self.text(key, None if default is None else str(default))
        if not _WHOLE.fullmatch(text):
            raise self.error.of(key, text, "not a whole number")
        # Compared as a float first: int() refuses numbers of thousands of digits.
        if not minimum <= float(text) <= maximum:
            raise self.error.of(key, text, f"must be from {minimum} to {maximum}")
        return int(text)

    def whole_or_none(self, key: str, *, least: int = 1) -> int | None:
        return self.whole(key, minimum=least) if key in self.values else None

    def flag(self, key: str) -> bool:
        """yes or no; no unless given."""
        text = self.text(key, "no")
        if text not in ("yes", "no"):
            raise self.error.of(key, text, "not a choice", ("yes", "no"))
        return text == "yes"

    def file(self) -> Path:
        """The path, which is that of a file that can be opened."""
        path = Path(self.path)
        try:
            path.open("rb").close()
        except (OSError, ValueError) as error:  # ValueError: a byte that no path has.
            problem = getattr(error, "strerror", None) or str(error)
            hint = _beside(path) if isinstance(error, FileNotFoundError) else ""
            raise self.error.of(self.name, self.path, problem + hint) from error
        return path


def _beside(path: Path) -> str:
    """The file of the same folder that was likely meant, as a hint; empty where none is near."""
    if not path.parent.is_dir():
        return ""
    near = nearest(path.name, (each.name for each in path.parent.iterdir() if each.is_file()))
    return f"; did you mean {str(path.parent / near)!r}?" if near else ""


def parse(
    text: str,
    noun: str,
    kinds: Mapping[str, Sequence[str]],
    error: type[BenchError],
    unnamed: str | None = None,
) -> Options:
    """Read `text` as one of `kinds`, which maps each name to the keys it knows.

    `unnamed` is the kind of a spec without a name ("users=8"). `noun` is what the spec is of, for
    messages. Raises `error` for an unknown name or key, a double key, and a piece without "=".
    """
    name, colon, rest = text.strip().partition(":")
    if not colon and unnamed is not None and "=" in name:
        name, rest = unnamed, name
    if name not in kinds:
        raise error.of(noun, name, f"no such {noun}", kinds)
    path, keys = "", [key for key in kinds[name] if key != PATH]
    if PATH in kinds[name]:
        match = _PATH_AND_OPTIONS.fullmatch(rest)
        path = match["path"] if match else ""
        if not path:
            raise error.of(name, rest, f"needs a file, as in {name}:PATH")
        rest = rest[len(path) + 1 :]
    return Options(name, path, _pairs(name, rest, keys, error), error)


def _pairs(name: str, text: str, keys: Sequence[str], error: type[BenchError]) -> dict[str, str]:
    values: dict[str, str] = {}
    for piece in _COMMA.split(text) if text else []:
        key, equals, value = (part.strip() for part in piece.partition("="))
        if key not in keys:
            near = nearest(key, keys)
            hint = f"; did you mean {near!r}?" if near else ""
            listed = f" (valid: {', '.join(keys)})" if keys else ""
            raise error.of(key, value, f"{name!r} has no such option{hint}{listed}")
        if not equals or not value:
            raise error.of(key, value, f"has no value, as in {key}=VALUE")
        if key in values:
            raise error.of(key, value, f"given twice, before as {values[key]!r}")
        values[key] = value
    return values
