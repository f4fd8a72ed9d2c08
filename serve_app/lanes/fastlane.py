"""The fast lane of one replica: its door, and the engine's reports on admitted requests."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from serve_app.lanes import capability
from serve_app.lanes.door import Door, Ends, Frontend, Grant, Request
from serve_app.replica.reports import Receiver, Report
from serve_app.scaling.signals import Signals
from serve_app.settings import Limits

if TYPE_CHECKING:  # It imports vllm.
    from serve_app.replica.engine import Engine


# The backend of structured outputs that the full lane asks for, but for a grammar that it cannot
# compile. An engine with another one gets all grammars from the full lane.
_GRAMMAR_COMPILER = "XgrammarBackend"


class FastLane:
    """Joins door, engine and signals.

    Attributes:
        unread_tokens: prompt tokens of its requests that have no token yet.
    """

    def __init__(self, model: str, secret: str, signals: Signals) -> None:
        self._model, self._secret, self._signals = model, secret, signals
        self._ends = Ends()
        # Before the engine starts: its scheduler connects as it begins.
        self._receiver = Receiver(self._receive)
        self._engine: Engine | None = None
        self._door: Door | None = None
        self.unread_tokens = 0
        # By the last report, and of which front end's engine.
        self._grammar_compiler: tuple[Frontend | None, str] = (None, "")

    def grant(self, engine: "Engine", timeout_s: Callable[[], float]) -> Grant:
        """The application behind the gates."""
        self._engine = engine

        def frontend() -> Frontend:
            assert engine.fast is not None
            return engine.fast

        abort, alive = engine.abort, lambda: not engine.dead
        return Grant(frontend, self._ends, self._model, abort, timeout_s, alive)

    async def open(
        self,
        app: ASGIApp,
        host: str,
        limits: Callable[[], Limits],
        failure: Callable[[], str | None],
    ) -> Door:
        """Let requests in, through the gates of `app`.

        Args:
            failure: why vllm-rs cannot be asked now; None: it can.
        """
        assert self._engine is not None
        served = capability.Served(
            frozenset({self._model}), self._engine.max_model_len, self._engine.vocabulary
        )

        def obstacle(request: Request) -> str | None:
            if request.method != "POST":
                return "the method"
            if (why := failure()) is not None:
                return why
            headers = dict(request.headers)
            return capability.obstacle(
                request.path, headers, request.body, served, limits(), self._compiles_grammars()
            )

        self._receiver.start()
        self._door = Door(app, self._secret, obstacle, lambda: limits().queue_timeout_s)
        await self._door.start(host)
        return self._door

    async def drain(self, timeout_s: float) -> None:
        """Admit no further request, and return when all admitted requests have ended."""
        if self._door is not None:
            await self._door.drain(timeout_s)

    def close(self) -> None:
        self._receiver.close()

    def _compiles_grammars(self) -> bool:
        """Whether the engine that runs now compiles grammars as it does for the full lane."""
        frontend, compiler = self._grammar_compiler
        assert self._engine is not None
        return frontend is self._engine.fast and compiler == _GRAMMAR_COMPILER

    def _receive(self, report: Report) -> None:
        self.unread_tokens = report.unread_tokens
        if self._engine is not None:
            self._grammar_compiler = (self._engine.fast, report.grammar_compiler)
        self._signals.steps(
            report.engine,
            report.steps,
            report.busy_s,
            report.running,
            report.waiting,
            report.kv_usage,
        )
        gap_s = report.gap_s / report.gaps if report.gaps else 0.0
        self._signals.step(
            report.prompt_tokens,
            report.generated_tokens,
            report.preempted,
            report.first_s,
            [gap_s] * report.gaps,
            [
                (each.first_s - each.arrived_s, each.gap_s)
                for each in report.ended
                if each.first_s is not None
            ],
        )
        for each in report.ended:
            self._ends.tell(each)
        if self._engine is not None:
            self._engine.count(report)
            self._engine.last_sign_s = time.monotonic()
