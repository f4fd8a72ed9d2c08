"""The engine that stands while settings are tried on it."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import run
from bench.engine import knobs
from bench.engine.knobs import Knob
from bench.engine.trial import Engine, EngineError

_START_GUESS_S = 90.0


class Stand:
    """The engine that stands, replaced where a setting needs another one.

    Attributes:
        starts: engines that were started; `start_s`: how long the last one took.
    """

    def __init__(self, model: str, fixed: Mapping[str, Any], space: Sequence[Knob], folder: Path):
        self._model, self._fixed, self._space, self._folder = model, dict(fixed), space, folder
        self._engine: Engine | None = None
        self._base: knobs.Settings = {}
        self._raised: dict[str, int] = {}
        self._defaults: dict[str, dict[str, int]] = {}
        self.starts, self.start_s = 0, _START_GUESS_S

    def would_start(self, settings: knobs.Settings) -> bool:
        """Whether a setting needs an engine other than the one that stands."""
        if self._engine is None or self._engine.ready is None:
            return True
        if knobs.started_with(settings, self._space) != self._base:
            return True
        limits = self._engine.ready.limits
        if any(value > limits.get(name, 0) for name, value in self._live(settings).items()):
            return True
        # A limit that was raised for another must be known to be lowered again.
        return any(name not in settings for name in self._raised) and not self._measured_tokens()

    @contextlib.contextmanager
    def engine(
        self, settings: knobs.Settings, start_s: float
    ) -> Iterator[tuple[Engine, dict[str, int]]]:
        """An engine for a setting, and the limits to give it.

        Raises:
            EngineError: it does not start, or ended in the block; the next one is a new one.
        """
        if self.would_start(settings):
            self.close()
            self._start(settings, start_s)
        assert self._engine is not None
        assert self._engine.ready is not None
        limits = dict(self._measured_tokens() or self._engine.ready.limits) | self._live(settings)
        limits["max_num_seqs"] = min(limits["max_num_seqs"], limits["max_num_batched_tokens"])
        try:
            yield self._engine, limits
        except EngineError:
            self.close()
            raise

    @property
    def limits(self) -> dict[str, int]:
        """vLLM's own limits, for the engine arguments that are fixed."""
        return self._defaults.get(knobs.key({}), {})

    @property
    def kv_tokens(self) -> int:
        ready = self._engine.ready if self._engine else None
        return ready.kv_blocks * ready.block_tokens if ready else 0

    def close(self) -> None:
        if self._engine is not None:
            self._engine.__exit__(None, None, None)
            self._engine = None

    def _live(self, settings: knobs.Settings) -> dict[str, int]:
        live = {knob.name for knob in self._space if knob.live}
        return {name: int(value) for name, value in settings.items() if name in live}

    def _measured_tokens(self) -> dict[str, int] | None:
        return self._defaults.get(knobs.key(self._base))

    def _start(self, settings: knobs.Settings, start_s: float) -> None:
        self._base = knobs.started_with(settings, self._space)
        tokens = self._measured_tokens()
        # Only what is above the defaults; less can be told to the engine later.
        self._raised = {
            name: value
            for name, value in self._live(settings).items()
            if tokens is None or value > tokens[name]
        }
        given = {**self._fixed, **self._base, **self._raised}
        run.say(f"starting an engine: {knobs.describe({**self._base, **self._raised})}")
        engine = Engine(self._model, given, self._folder, start_s)
        began_s = time.monotonic()
        self.starts += 1
        try:
            engine.__enter__()
        finally:
            self.start_s = time.monotonic() - began_s
        self._engine = engine
        if not self._raised and engine.ready is not None:
            self._defaults[knobs.key(self._base)] = engine.ready.limits
