"""Text files as people have them: with a byte order mark, or packed by gzip."""

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from bench.errors import WorkloadError

T = TypeVar("T")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"


def read(path: Path) -> bytes:
    """What is in the file, unpacked and without the mark that some editors put in front."""
    data = path.read_bytes()
    if data.startswith(_GZIP):
        data = gzip.decompress(data)
    return data.removeprefix(_BYTE_ORDER_MARK)


def lines(path: Path) -> list[bytes]:
    return read(path).split(b"\n")


def parsed(
    workload: str, path: Path, parse: Callable[[bytes], T], problem: str = ""
) -> Iterator[T]:
    """The results of `parse` for the lines that are not blank.

    Raises:
        WorkloadError: `parse` raised ValueError, as msgspec does; it names the line.
    """
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            try:
                item = parse(line)
            except ValueError as error:
                place = f"{path}:{number}"
                raise WorkloadError.of(workload, place, f"{problem}{error}") from error
            yield item


def text(path: Path) -> TextIO:
    """The file to read line by line; bytes that are not UTF-8 become U+FFFD."""
    return io.TextIOWrapper(io.BytesIO(read(path)), "utf-8", errors="replace", newline="")
