"""Several client processes, so that the client is not the limit.

One Python process can read some ten thousand events a second, which several GPUs exceed. All
processes use the machine's monotonic clock.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Self, TypeVar

Answer = TypeVar("Answer")


class Crowd:
    """The processes. Use it as a context manager.

    Args:
        size: how many; each has started and imported when this returns.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ProcessPoolExecutor(size, mp_context=get_context("spawn"))
        list(self._pool.map(abs, range(size)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def shares(self, users: int) -> list[int]:
        """So many users for each, none without one."""
        size = min(self.size, users)
        return [users // size + (place < users % size) for place in range(size)]

    def each(self, work: Callable[..., Answer], shares: Iterable[tuple[Any, ...]]) -> list[Answer]:
        """Have `work` done with the arguments of each share, all at once."""
        futures = [self._pool.submit(work, *share) for share in shares]
        return [future.result() for future in futures]
