"""Notices an engine that died or hangs, and sees to it that no process outlives its replica.

An engine that is past help is killed and its requests are told. Where others can answer meanwhile
(behind a gateway) it is started anew in the replica that has all of it imported; otherwise, and if
that does not last, the replica exits: Ray Serve replaces it within one health check. vLLM's own
check sees a dead engine and not a hung one; the probe here is a round trip through the engine core
and every worker, and silence is what counts: no answer to a probe and no output of a step. Every
process has a part in a step, so an engine that writes is not asked.
"""

import asyncio
import contextlib
import fcntl
import logging
import math
import os
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol

import psutil

from serve_app.processes import start_ticks

logger = logging.getLogger("serve_app")

# How often the engine is checked, and how long its requests may take to end with an error.
_CHECK_S = 0.5
_ERRORS_S = 3.0
# An engine that dies again so soon after a restart is not restarted again.
_LASTING_S = 10.0
# How often it is asked while nobody waits for it. vLLM's workers spin for a second after each
# message, so a probe a second would keep a core of each busy for ever.
_IDLE_PROBE_S = 10.0
# An engine whose processes use at least this share of a core works, and only its step is long.
_AT_WORK = 0.1


class Supervised(Protocol):
    """What the supervisor needs of an engine."""

    @property
    def dead(self) -> bool: ...
    @property
    def last_sign_s(self) -> float: ...
    @property
    def cpu_s(self) -> float: ...
    async def probe(self) -> None: ...
    def kill(self) -> None: ...


class Supervisor:
    """Watches one engine from the replica's event loop.

    Args:
        hang_timeout_s: silence after which the engine counts as hung.
        in_flight: number of requests that have not been answered.
        leave: ends this process; `os._exit`, since an orderly exit waits for what hangs.
        restart: starts the engine anew; None: the replica ends instead.
        restart_within_s: a restart that takes longer has failed.

    Attributes:
        failure: what is wrong with the engine; None: nothing.
        restarting: it is being started anew.
        silent_s: for how long it has answered nothing and written nothing, while it was asked.
        stalled_s: the same, if its processes have used no CPU in that time either. 0 in a long
            step, which ends by itself.
    """

    def __init__(
        self,
        engine: Supervised,
        hang_timeout_s: float,
        in_flight: Callable[[], int],
        leave: Callable[[int], None] = os._exit,
        restart: Callable[[], Awaitable[None]] | None = None,
        restart_within_s: float = 600.0,
    ) -> None:
        self._engine = engine
        self._hang_timeout_s = hang_timeout_s
        self._in_flight = in_flight
        self._leave = leave
        self._restart, self._restart_within_s = restart, restart_within_s
        self._restarted_s = -_LASTING_S
        self._sign_s = -math.inf  # The engine's last sign when it was last looked at.
        self.failure: str | None = None
        self.restarting = False
        self.silent_s = self.stalled_s = 0.0

    @property
    def healthy(self) -> bool:
        return self.failure is None and not self._engine.dead

    async def watch(self) -> None:
        """Run until the engine has failed for good, then end the replica."""
        while True:
            while (failure := await self._look()) is None:
                await self._rest()
            self.failure = failure
            self.restarting = self._may_restart()
            what = "it is started anew" if self.restarting else "this replica ends and is replaced"
            logger.error("%s; %s", failure, what)
            # A hung engine's requests wait for ever; a dead one's fail, each with its own error.
            self._engine.kill()
            deadline_s = time.monotonic() + _ERRORS_S
            while self._in_flight() and time.monotonic() < deadline_s:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            if not (self.restarting and await self._restarted()):
                self._leave(1)
                return
            self.failure, self.restarting = None, False
            self._answered()

    def _may_restart(self) -> bool:
        lasted_s = time.monotonic() - self._restarted_s
        return self._restart is not None and lasted_s >= _LASTING_S

    async def _restarted(self) -> bool:
        """Restart the engine. Returns whether that succeeded."""
        assert self._restart is not None
        try:
            async with asyncio.timeout(self._restart_within_s):
                await self._restart()
        except Exception as error:
            # Whatever it is, another replica has better chances.
            logger.exception("the engine could not be restarted: %s", error)
            return False
        self._restarted_s = time.monotonic()
        return True

    async def _rest(self) -> None:
        """Until the next look: soon while requests are in flight, later while none are."""
        rested_s = 0.0
        while rested_s < _IDLE_PROBE_S and not self._engine.dead:
            await asyncio.sleep(_CHECK_S)
            rested_s += _CHECK_S
            if self._in_flight():
                return

    async def _look(self) -> str | None:
        """What is wrong with the engine, or None."""
        if self._engine.dead:
            return "the engine died"
        if self._in_flight() and self._engine.last_sign_s > self._sign_s:
            # A probe is answered between steps: with tensor parallelism every GPU would stand still
            # for it, as no step is prepared meanwhile.
            self._answered()
            return None
        probe = asyncio.ensure_future(self._engine.probe())
        sign_s, used_s = self._engine.last_sign_s, self._engine.cpu_s
        try:
            # A long step answers late, so each round waits for the probe and for outputs alike.
            while not (await asyncio.wait({probe}, timeout=_CHECK_S))[0]:
                if self._engine.dead:
                    return "the engine died"
                # Counted in rounds and not by the clock: when this process was itself stopped, or
                # the machine was, the engine had no time to answer either.
                if sign_s == self._engine.last_sign_s:
                    self.silent_s += _CHECK_S
                    works = self._engine.cpu_s - used_s >= _AT_WORK * self.silent_s
                    self.stalled_s = 0.0 if works else self.silent_s
                else:
                    sign_s, used_s = self._engine.last_sign_s, self._engine.cpu_s
                    self.silent_s = self.stalled_s = 0.0
                if self.silent_s >= self._hang_timeout_s:
                    return f"the engine has been silent for {self.silent_s:.0f} s"
            if (error := probe.exception()) is not None:
                return f"the engine failed its probe: {type(error).__name__}"
            self._answered()
            return None
        finally:
            probe.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await probe

    def _answered(self) -> None:
        self._sign_s = self._engine.last_sign_s
        self.silent_s = self.stalled_s = 0.0


class Reaper:
    """A tiny process that kills the engine's processes if the replica is gone without a word.

    A replica that receives SIGKILL cannot stop its engine, and the engine does not always notice.
    The reaper waits at the end of a pipe: each line names a process to kill at end-of-file by its
    pid and its start time, as another process may have the pid by then; the line `done` says that
    all ended in order.

    It is nobody's child: where its raylet fails, Ray's worker kills its own children before it ends
    itself, and what those had started, as an engine's processes, would stay for ever.

    Args:
        held_open: descriptors that it keeps open until the processes that it kills have ended, so
            that their locks are held for as long.
    """

    _SCRIPT = (
        "lives() { read -r s </proc/${1%:*}/stat && set -- $1 ${s##*) } "
        '&& [ "${21}" = "${1#*:}" ] && [ $2 != Z ]; }; '
        'exec 3<&0; { while read -r l; do [ "$l" = done ] && exit 0; p="$p $l"; done; '
        'for l in $p; do lives $l && kill -9 "${l%:*}"; done; '
        "for l in $p; do while lives $l; do sleep 0.1; done; done; } <&3 2>/dev/null & echo $!"
    )

    def __init__(self, held_open: Iterable[int] = ()) -> None:
        # The script has numbers below 10 for itself.
        copies = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in held_open]
        # In a process group of its own: a Ctrl-C in the terminal must not end it before its time.
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
            pass_fds=copies,
        )
        for copy in copies:
            os.close(copy)
        assert self._process.stdout is not None
        self.pid = int(self._process.stdout.readline())
        self._process.wait()

    def guard(self, pids: Iterable[int]) -> None:
        """Kill these processes, too, should this one vanish."""
        assert self._process.stdin is not None
        lines = (f"{pid}:{started}\n" for pid in pids if (started := start_ticks(pid)))
        self._process.stdin.write("".join(lines).encode())
        self._process.stdin.flush()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Guard every process that this one starts in the meantime, as soon as it is there."""
        over = threading.Event()
        guarded = set[psutil.Process]()

        def follow() -> None:
            last = False
            while not last:
                last = over.wait(0.2)
                # Compared by pid and start time.
                new = set(psutil.Process().children(recursive=True)) - guarded
                self.guard(process.pid for process in new if process.pid != self.pid)
                guarded.update(new)

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()

    def dismiss(self) -> None:
        """The guarded processes have ended: nothing has to be killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"done\n")
            self._process.stdin.close()
        self._process.stdout.read()  # Ends when it does.
        self._process.stdout.close()
