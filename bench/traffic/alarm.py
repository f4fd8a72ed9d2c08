"""A timer of an event loop that is exact to a fraction of a millisecond.

Event loops round their timers to whole milliseconds (uvloop and epoll alike), which is as much as
a benchmark may be wrong by. Linux has timers that are files; an event loop waits for those as
exactly as the kernel can. Elsewhere the loop's own timer is used.
"""

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC, _TFD_TIMER_ABSTIME = 1, 1
_TFD_NONBLOCK, _TFD_CLOEXEC = os.O_NONBLOCK, getattr(os, "O_CLOEXEC", 0)


class _Spec(ctypes.Structure):
    """struct itimerspec: an interval (here none), then the instant."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns")]


def _library() -> ctypes.CDLL | None:
    """The C library, where its timers run on the clock that `time.perf_counter` reads."""
    clock = time.get_clock_info("perf_counter").implementation
    if sys.platform != "linux" or clock != "clock_gettime(CLOCK_MONOTONIC)":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    return library if hasattr(library, "timerfd_create") else None


_LIBRARY = _library()


class Alarm:
    """One timer, set again and again. `callback` runs in the loop, never before its time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop, self._callback = loop, callback
        self._handle: asyncio.TimerHandle | None = None
        self._at_s = 0.0
        self._file = -1
        if _LIBRARY:
            self._file = _LIBRARY.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self._file >= 0:
            loop.add_reader(self._file, self._rang)

    def set(self, at_s: float) -> None:
        """Ring at `at_s` of `time.perf_counter()`, or at once where that has passed."""
        if self._file < 0:
            self.stop()
            self._at_s = at_s
            delay_s = max(0.0, at_s - time.perf_counter())
            self._handle = self._loop.call_later(delay_s, self._due)
            return
        at_ns = max(1, round(at_s * 1e9))  # 0 would mean: never.
        self._settime(_Spec(0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000))

    def stop(self) -> None:
        """Do not ring; it can be set again."""
        if self._handle:
            self._handle.cancel()
        if self._file >= 0:
            self._settime(_Spec(0, 0, 0, 0))

    def close(self) -> None:
        self.stop()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _settime(self, spec: _Spec) -> None:
        assert _LIBRARY
        if _LIBRARY.timerfd_settime(self._file, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _rang(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:
            return  # It was set again after it rang.
        self._callback()

    def _due(self) -> None:
        """The loop's clock is coarse: it may call early."""
        if time.perf_counter() < self._at_s:
            self._handle = self._loop.call_later(0, self._due)
        else:
            self._callback()


async def sleep_until(at_s: float) -> None:
    """Return at `at_s` of `time.perf_counter()`, or at once where that has passed."""
    if at_s <= time.perf_counter():
        return
    rung = asyncio.Event()
    alarm = Alarm(asyncio.get_running_loop(), rung.set)
    try:
        alarm.set(at_s)
        await rung.wait()
    finally:
        alarm.close()
