"""What the policy has learned, stored outside the Serve controller.

Ray Serve makes a new policy object whenever the controller restarts or the deployment's
configuration changes. Without this memory, each would begin without a start time, without costs of
a step and without a history to forecast from. It is stored in the internal key-value store of Ray's
GCS, where Serve stores its own checkpoints, so it lasts as long as they do: as long as the cluster,
and longer if the GCS uses Redis. One small JSON value for each deployment.
"""

import logging
import threading
from dataclasses import dataclass
from typing import Protocol

import msgspec

from serve_app.scaling.state import State

logger = logging.getLogger("ray.serve")

_NAMESPACE = b"serve_app"


@dataclass(frozen=True)
class Memory:
    """The state that one policy object passes to the next.

    Attributes:
        release: which model on which hardware it was learned from (`Plan.release`).
        saved_unix_s: when, on the wall clock: a monotonic one ends with its machine.
        started: whether a replica of it has run.
        target: replicas that were wanted.
        took_s: how long the last starts took.
        parts_s: of each of them what its replica reported (starts.py).
        state: of the policy, on the clock of the process that saved it.
    """

    release: str
    saved_unix_s: float
    started: bool
    target: int
    took_s: tuple[float, ...]
    state: State
    parts_s: tuple[dict[str, float], ...] = ()

    @property
    def learned(self) -> tuple[object, ...]:
        """What is saved at once when it changes, since a deploy may be next. The rest changes with
        each look."""
        return self.target, self.took_s, self.parts_s


class Store(Protocol):
    """The store of memories. `save` must return at once, because the controller waits for it."""

    def load(self, key: str) -> Memory | None: ...

    def save(self, key: str, memory: Memory) -> None: ...


class ClusterStore:
    """Memories in the key-value store of the Ray cluster."""

    def __init__(self) -> None:
        self._saving: threading.Thread | None = None

    def load(self, key: str) -> Memory | None:
        """What was saved under `key`; None for nothing, or for what another version wrote."""
        from ray.experimental.internal_kv import _internal_kv_get

        try:
            value = _internal_kv_get(key, namespace=_NAMESPACE)
            return None if value is None else msgspec.json.decode(value, type=Memory)
        except Exception as error:
            logger.warning(
                f"The scaling policy starts without its memory, which cannot be read: {error}"
            )
            return None

    def save(self, key: str, memory: Memory) -> None:
        """Save in the background; skipped while the last save has not ended."""
        if self._saving is not None and self._saving.is_alive():
            return
        self._saving = threading.Thread(
            target=self._put, args=(key, msgspec.json.encode(memory)), daemon=True
        )
        self._saving.start()

    @staticmethod
    def _put(key: str, value: bytes) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        try:
            _internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)
        except Exception as error:
            # The next save follows in seconds.
            logger.warning(f"The scaling policy's memory was not saved: {error}")
