"""A cache as one file, for other machines: KEY.tar, with its size and digest in KEY.json.

KEY.json is written last and read first. It also has the description of the engine. An archive that
does not agree with it is not unpacked.
"""

import hashlib
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.caches.source import Source

# A fetch that takes longer costs more than it saves.
FETCH_S = 120.0
_SCHEMA = 1


class ForeignArchive(Exception):
    """An archive that does not match its description, or belongs to another engine."""


def publish(folder: Path, key: str, description: Mapping[str, Any], to: Source) -> int:
    """Write the folder as the archive of this key. Returns its size in bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / f"{key}.tar"
        with tarfile.open(packed, "w") as tar:
            tar.add(folder, arcname=".")
        size = packed.stat().st_size
        about = {
            "schema": _SCHEMA,
            "key": key,
            "engine": description,
            "bytes": size,
            "sha256": _digest(packed),
        }
        to.put(f"{key}.tar", packed)
        described = Path(scratch) / f"{key}.json"
        described.write_text(json.dumps(about, indent=1, sort_keys=True, default=str))
        to.put(f"{key}.json", described)
    return size


def fetch(source: Source, key: str, into: Path, within_s: float = FETCH_S) -> None:
    """Make the folder `into`, whole or not at all.

    Raises:
        FileNotFoundError: the source has none for this key.
        ForeignArchive: it is damaged, or for another engine.
        OSError, tarfile.TarError, TimeoutError: it cannot be read, or not in time.
    """
    deadline_s = time.monotonic() + within_s
    with tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.") as scratch:
        described = Path(scratch) / "about"
        source.get(f"{key}.json", described, deadline_s)
        try:
            about = json.loads(described.read_bytes())
            same = about["schema"] == _SCHEMA and about["key"] == key
            size, digest = about["bytes"], about["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise ForeignArchive(f"its description cannot be read: {error!r}") from None
        if not same:
            raise ForeignArchive("it is for another engine")
        packed = Path(scratch) / "archive"
        source.get(f"{key}.tar", packed, deadline_s)
        if packed.stat().st_size != size or _digest(packed) != digest:
            raise ForeignArchive("it is damaged, or was not written to its end")
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(packed) as tar:
            tar.extractall(unpacked, filter="data")
        shutil.rmtree(into, ignore_errors=True)
        unpacked.rename(into)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
