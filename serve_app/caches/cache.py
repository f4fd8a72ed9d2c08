"""The folder of everything that an engine compiles and measures when it starts.

    cache = Cache.prepare(root, key, source)     before the engine: fetched, checked, locked
    os.environ.update(cache.environment(...))    vLLM, Triton, FlashInfer and the driver write there
    cache.seal()                                 once an engine is ready, and when it stops

A seal lists every file with its digest. A cache that does not match its seal is deleted before the
engine uses it, because some compilers crash on a truncated file. A cache without a seal, whose
start did not end, is deleted too. A failure here costs the time of compiling, never the start.
Small files that Inductor writes again while an engine runs are not listed; they are kept if they
can be read.

Replicas of one machine share the folder, and a lock while they start. A replica that starts alone
may delete the folder. A replica that starts at the same time as another uses the folder unchecked,
as the compilers expect. The last of them to be ready seals it.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.caches import archive
from serve_app.caches.source import Source

logger = logging.getLogger("serve_app")


# How Inductor tuned a kernel. It is written again, whole, each time that the kernel is loaded.
_REWRITTEN = ".best_config"


class Broken(Exception):
    """A cache that must not be used, and why."""


@dataclass
class Cache:
    """The cache of one key on this machine.

    Attributes:
        folder: where it is.
        origin: where its content came from: "here", "fetched" or "nothing".
    """

    folder: Path
    origin: str
    _lock: int | None

    @classmethod
    def prepare(cls, root: Path, key: str, source: Source | None = None) -> "Cache":
        """The cache of this key, checked, or fetched from `source`, or empty.

        Raises:
            OSError: there is no place for one.
        """
        root.mkdir(parents=True, exist_ok=True)
        folder = root / key
        lock = _open_lock(folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Another replica prepares or uses it. It is checked once this lock is held with it.
            fcntl.flock(lock, fcntl.LOCK_SH)
            return cls(folder, "here" if folder.is_dir() else "nothing", lock)
        try:
            origin = _make_ready(folder, key, source)
            folder.mkdir(exist_ok=True)
            fcntl.flock(lock, fcntl.LOCK_SH)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, origin, lock)

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Variables that have the engine's libraries keep their things here; none that is set."""
        places = {
            "VLLM_CACHE_ROOT": "vllm",  # torch.compile, Inductor, DeepGEMM, autotuning, plans.
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "FLASHINFER_WORKSPACE_BASE": "flashinfer",
            "CUDA_CACHE_PATH": "cuda",  # What the driver compiles from PTX.
        }
        wanted = {name: str(self.folder / place) for name, place in places.items()}
        # vLLM then writes down how much memory it measured for the KV cache, and measures again
        # where less is free than then.
        wanted["VLLM_ENABLE_STARTUP_PLAN"] = "1"
        return {name: value for name, value in wanted.items() if name not in environ}

    def close(self) -> None:
        """This process does not start an engine any more, and nothing is noted."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def seal(self) -> bool:
        """Note every file, so that the next start can rely on them. Whether that was done: not
        while another replica starts, which may be writing."""
        lock = _open_lock(self.folder) if self._lock is None else self._lock
        self._lock = None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(_seal_of(self.folder), files(self.folder))
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            logger.warning(
                "compiled kernels in %s could not be sealed for the next start: %s",
                self.folder,
                error,
            )
            return False
        finally:
            os.close(lock)


def _open_lock(folder: Path) -> int:
    return os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)


def _make_ready(folder: Path, key: str, source: Source | None) -> str:
    if folder.exists():
        try:
            check(folder)
            return "here"
        except Broken as broken:
            logger.warning("deleting the compiled kernels in %s: %s", folder, broken)
            discard(folder)
    if source is not None:
        try:
            archive.fetch(source, key, folder)
            write(_seal_of(folder), files(folder))
            return "fetched"
        except FileNotFoundError:
            logger.info("there are no compiled kernels for this engine in %s", source)
        except Exception as error:
            # Of the network, of the archive, of the disk: the engine compiles instead.
            logger.warning("compiled kernels could not be fetched from %s: %s", source, error)
            discard(folder)
    return "nothing"


def check(folder: Path) -> None:
    """Remove files that the seal does not list, because nothing vouches for them.

    Raises:
        Broken: there is no seal, or a file is not the one that it lists.
    """
    try:
        listed: dict[str, list[Any]] = json.loads(_seal_of(folder).read_bytes())
    except (OSError, ValueError):
        raise Broken("its start did not end") from None
    if not isinstance(listed, dict):
        raise Broken("its seal is not one")
    for path in _walk(folder):
        name = str(path.relative_to(folder))
        if name not in listed and not _is_tuning(path):
            path.unlink()
    for name, expected in listed.items():
        path = folder / name
        try:
            same = path.is_file() and [path.stat().st_size, digest(path)] == expected
        except (OSError, ValueError):  # A name that no file can have.
            same = False
        if not same:
            raise Broken(f"{name} is damaged")


def files(folder: Path) -> dict[str, list[Any]]:
    """Size and digest of each file that must not change."""
    return {
        str(path.relative_to(folder)): [path.stat().st_size, digest(path)]
        for path in sorted(_walk(folder))
        if path.suffix != _REWRITTEN
    }


def _is_tuning(path: Path) -> bool:
    """Whether a file says how Inductor tuned a kernel, and can be read."""
    if path.suffix != _REWRITTEN:
        return False
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def discard(folder: Path) -> None:
    """Remove a cache; first its name, so that half of it is never found."""
    with contextlib.suppress(OSError):
        _seal_of(folder).unlink(missing_ok=True)
        if folder.exists():
            aside = folder.with_name(f".{folder.name}.{os.getpid()}")
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _seal_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def write(path: Path, content: Any) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(content))
    fresh.replace(path)
