"""A GPU that several models share: one of them is awake or starts, the others sleep.

The replicas need no common process for it, only two files that they lock (flock), so a replica that
has ended, in whatever way, holds nothing. Its guard keeps the lock until the engine has ended as
well (supervisor.py).

    GPU.awake   locked by the model that has the memory
    GPU.next    locked by the model that waits for it; others wait behind that one

A model that gives the GPU back cannot take it again before the one that waited.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path

from serve_app.planning import embedded
from serve_app.replica.sleep import Gpu

# How often a start looks whether the GPU is free.
_CHECK_S = 0.1


class SharedGpu(Gpu):
    """One of the models that share a GPU.

    Args:
        name: of the GPU on this machine, as in CUDA_VISIBLE_DEVICES.
        folder: of the files; all replicas of this machine use the same one.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        folder = folder or embedded.cache_dir() / "gpus"
        folder.mkdir(parents=True, exist_ok=True)
        self._awake, self._next = _Lock(folder / f"{name}.awake"), _Lock(folder / f"{name}.next")

    @property
    def wanted(self) -> bool:
        if not self._next.take():
            return True
        self._next.give_back()
        return False

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self._awake.descriptor,)

    def take(self) -> bool:
        if self._awake.held:
            return True
        if not self._next.take() or not self._awake.take():
            return False
        self._next.give_back()
        return True

    def wait(self) -> None:
        while not self.take():
            time.sleep(_CHECK_S)

    def leave_line(self) -> None:
        self._next.give_back()

    def give_back(self) -> None:
        self._awake.give_back()

    def close(self) -> None:
        """Share it no longer."""
        self._awake.close()
        self._next.close()


class _Lock:
    """An exclusive lock on a file, at most for as long as a process has its descriptor."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.held = False

    def take(self) -> bool:
        """Whether it is held now."""
        if not self.held:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.held = True
        return self.held

    def give_back(self) -> None:
        if self.held:
            self.held = False
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        self.held = False
        os.close(self.descriptor)
