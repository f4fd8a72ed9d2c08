"""A digest of a model's folder by content: equal digests mean equal weights.

The content of 15 GB takes longer to read than a start may take, so the digest of each file is
remembered with what the file system says about it. A file of the Hugging Face cache is named by its
content.
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve_app.caches.cache import digest, write
from serve_app.planning import embedded

# How the Hugging Face cache names a file: by its SHA-256, or as git does.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_THREADS = 8


def digest_of(model: Path, notes: Path | None = None) -> str:
    """One digest of the names and contents of all files of a model.

    Args:
        notes: the file with the remembered digests; None: the one of this user.

    Raises:
        OSError: a file cannot be read.
    """
    notes = notes or embedded.cache_dir() / "digests.json"
    remembered = _read(notes)
    files = sorted(path for path in model.iterdir() if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda path: _note(path, remembered), files))
    fresh = {str(path.resolve()): note for path, note in zip(files, found, strict=True)}
    if not fresh.items() <= remembered.items():
        kept = {path: note for path, note in remembered.items() if Path(path).exists()}
        notes.parent.mkdir(parents=True, exist_ok=True)
        write(notes, kept | fresh)
    named = [[path.name, note[-1]] for path, note in zip(files, found, strict=True)]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _note(path: Path, remembered: dict[str, list[object]]) -> list[object]:
    """What the file system says about a file, and the digest of its content."""
    info, real = path.stat(), path.resolve()
    # Before it is read: a change meanwhile is then found by the next start. The change time cannot
    # be set back.
    state: list[object] = [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
    if path.is_symlink() and real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
        return [*state, real.name]
    note = remembered.get(str(real))
    if isinstance(note, list) and note[:-1] == state:
        return note
    return [*state, digest(path)]


def _read(notes: Path) -> dict[str, list[object]]:
    try:
        remembered = json.loads(notes.read_bytes())
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}
