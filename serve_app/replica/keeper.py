"""Notices that `vllm-rs` died or hangs, and restarts it; the engine and the full lane are not
affected.

The requests that it had are lost, as those of an engine that dies are. Until it answers again the
door sends everybody to the full lane (lanes/fastlane.py). Where it cannot be started anew the
replica keeps the full lane only.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

logger = logging.getLogger("serve_app")

# How often it is asked, and the longest that it may take to answer for the first time.
_CHECK_S = 0.5
_START_S = 60.0


class Frontend(Protocol):
    """What the keeper needs of a Rust front end."""

    @property
    def alive(self) -> bool: ...
    @property
    def may_restart(self) -> bool: ...
    async def probe(self) -> None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...


class Keeper:
    """Watches the Rust front end of one replica from its event loop.

    Args:
        frontend: of the engine that runs now; None: the engine has failed, and both are replaced.
        hang_timeout_s: silence after which it counts as hung.
        restart: starts it anew once it was killed.

    Attributes:
        failure: why it does not serve; None: it does.
    """

    def __init__(
        self,
        frontend: Callable[[], Frontend | None],
        hang_timeout_s: float,
        restart: Callable[[], Awaitable[None]],
    ) -> None:
        self._frontend, self._restart = frontend, restart
        self._hang_timeout_s = hang_timeout_s
        self.failure: str | None = None

    async def watch(self) -> None:
        """Run until a restart fails."""
        while True:
            frontend = self._frontend()
            if frontend is None:
                await asyncio.sleep(_CHECK_S)
                continue
            failure = await self._look(frontend)
            if self._frontend() is not frontend:
                continue  # It was replaced together with its engine.
            if failure is None:
                self.failure = None
                await asyncio.sleep(_CHECK_S)
                continue
            self.failure = failure
            frontend.kill()
            if not frontend.may_restart:
                frontend.stop()  # Connections that wait for it are refused, too.
                logger.error("%s too often; Python answers every request from now on", failure)
                return
            logger.error("%s; restarting it, and Python answers every request meanwhile", failure)
            await self._try_restart()

    async def _look(self, frontend: Frontend) -> str | None:
        """What is wrong with it, or None."""
        probe: asyncio.Future[None] | None = None
        # Counted in rounds and not by the clock: this process may itself have been stopped.
        silent_s = 0.0
        try:
            while silent_s < self._hang_timeout_s:
                if not frontend.alive:
                    return "vllm-rs died"
                probe = probe or asyncio.ensure_future(frontend.probe())
                await asyncio.wait({probe}, timeout=_CHECK_S)
                if probe.done():
                    if probe.exception() is None:
                        return None
                    probe = None  # This process may have no room for another connection.
                    await asyncio.sleep(_CHECK_S)
                silent_s += _CHECK_S
            return f"vllm-rs has been silent for {silent_s:.0f} s"
        finally:
            if probe is not None and not probe.done():
                probe.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await probe

    async def _try_restart(self) -> None:
        try:
            async with asyncio.timeout(_START_S):
                await self._restart()
        except Exception as error:
            # It is looked at again: it may yet answer, or is killed and started once more.
            logger.exception("vllm-rs could not be restarted: %s", error)
        else:
            logger.warning("vllm-rs was restarted")
