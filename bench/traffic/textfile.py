"""Text files as people have them: with a byte order mark, or packed by gzip."""

import gzip
import io
from pathlib import Path
from typing import TextIO

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


def text(path: Path) -> TextIO:
    """The file to read line by line; bytes that are not UTF-8 become U+FFFD."""
    return io.TextIOWrapper(io.BytesIO(read(path)), "utf-8", errors="replace", newline="")
