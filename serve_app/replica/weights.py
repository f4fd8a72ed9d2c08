"""The weights of a replica's engine, which stay on the GPUs when the engine ends (holder.py).

Whatever goes wrong with that, the engine loads its weights itself.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from serve_app.caches import content
from serve_app.caches import key as keys
from serve_app.progress import say
from serve_app.replica import forkserver, holder
from serve_app.replica.holder import Unavailable
from serve_app.settings import Settings

logger = logging.getLogger("serve_app")

# How long weights stay that nobody uses.
_LINGER_S = 60.0
# The slowest loading that is waited for, and how often sockets are looked for.
_LEAST_LOAD_S, _LEAST_BYTES_PER_S = 120.0, 100e6
_POLL_S = 0.05
# The longest path of a Unix socket.
_SOCKET_PATH_BYTES = 107


class KeptWeights:
    """The weights of one replica's engine. They are used from the first `load_arguments` on, for as
    long as this process lives.

    Args:
        devices: the names of the GPUs, in the order of the engine's ranks.
        start: runs `holder.begin` in a process of its own, and returns once that has ended.
        ask: returns once the daemon of a socket has answered.
        patience_s: how long the weights may take to load.
        arguments: of an engine that maps the weights.

    Attributes:
        folder: of the weights.

    Raises:
        Unavailable: the folder is not this user's alone.
    """

    def __init__(
        self,
        folder: Path,
        devices: Sequence[str],
        start: Callable[[], None],
        ask: Callable[[Path], None],
        patience_s: float,
        arguments: dict[str, Any],
    ) -> None:
        holder.make_private(folder)
        self.folder, self._devices = folder, devices
        self._start, self._ask, self._patience_s = start, ask, patience_s
        self._arguments = arguments
        self._users = holder.open_file(folder / "users")

    def load_arguments(self) -> dict[str, Any]:
        """Arguments for the engine that starts next; none if it has to load its weights itself."""
        try:
            self._ensure()
        except Exception as why:  # Whatever it is, the engine can do without.
            say(f"the engine loads its weights itself, they are not kept: {why}")
            return {}
        return self._arguments

    def close(self) -> None:
        """Use them no longer."""
        os.close(self._users)

    def _ensure(self) -> None:
        """Return once every daemon answers.

        Raises:
            Unavailable: they were started, and one ended, hangs or is late.
        """
        if not holder.lock(self._users, fcntl.LOCK_SH, holder.END_S):
            raise Unavailable(f"{self.folder / 'users'} is locked")
        if holder.is_held(self.folder):
            try:
                self._await()
                say("the weights are on the GPU already, and the engine maps them")
                return
            except Exception as why:
                logger.warning("the weights in %s are loaded again: %s", self.folder, why)
        holder.end(self.folder)
        try:
            self._start()
            self._await()
            say("the weights were loaded to stay, and the engine maps them")
        except BaseException:
            holder.end(self.folder)  # The engine needs the memory.
            raise

    def _await(self) -> None:
        deadline_s = time.monotonic() + self._patience_s
        while holder.is_held(self.folder):
            sockets = sorted(self.folder.glob("*.sock"))
            if len(sockets) == len(self._devices):
                try:
                    for path in sockets:
                        self._ask(path)
                    return
                except TimeoutError:
                    raise Unavailable("a daemon does not answer") from None
                except (ConnectionError, FileNotFoundError):
                    pass  # It begins to listen, or it has just ended.
            if time.monotonic() >= deadline_s:
                raise Unavailable(f"they were not loaded after {self._patience_s:.0f} s")
            time.sleep(_POLL_S)
        raise Unavailable(f"their process ended; {self.folder / 'log'} says why")


def of(settings: Settings, arguments: dict[str, Any], count: int) -> KeptWeights | None:
    """The kept weights of a replica on `count` GPUs of this machine; None: it keeps none.

    Other weights that nobody uses leave these GPUs, whether it keeps any or not.
    """
    if not count:
        if settings.keep_weights:
            say("keep_weights has no effect: this replica has no GPU")
        return None
    devices = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if len(devices) < count or not all(devices):
        devices = list(map(str, range(count)))
    kept = None
    try:
        kept = _kept(arguments, devices[:count]) if settings.keep_weights else None
    except Exception as why:
        say(f"the engine loads its weights itself, they are not kept: {why}")
    try:
        holder.clear(holder.root(), devices[:count], None if kept is None else kept.folder)
    except (Unavailable, OSError) as why:
        say(f"other weights may still be on the GPU: {why}")
    return kept


def _kept(arguments: dict[str, Any], devices: Sequence[str]) -> KeptWeights:
    from serve_app.replica import weightcache
    from serve_app.replica.arguments import parse

    model = Path(arguments["model"])
    described = keys.describe_weights(content.digest_of(model), arguments, devices, os.environ)
    folder = holder.root() / keys.key(described)[:16]
    longest = len(os.fsencode(folder / weightcache.SOCKET_NAME))
    if longest > _SOCKET_PATH_BYTES:
        raise Unavailable(
            f"the path {folder} is too long for a socket; set TMPDIR to a shorter one"
        )

    def start() -> None:
        serve = partial(weightcache.serve, parse(arguments), str(folder), weightcache.rendezvous())
        process = forkserver.Context().Process(
            target=holder.begin, args=(folder, devices, serve, _LINGER_S)
        )
        forkserver.start()
        process.start()
        process.join()
        if process.exitcode:
            raise Unavailable(f"their process could not be started (status {process.exitcode})")

    size = sum(path.stat().st_size for path in model.iterdir() if path.is_file())
    patience_s = _LEAST_LOAD_S + size / _LEAST_BYTES_PER_S
    mapped = weightcache.load_arguments(folder)
    return KeptWeights(folder, devices, start, weightcache.ask, patience_s, mapped)
