"""The machine's own stalls are seen, and taken out of silences."""

import signal
import time

import psutil

from bench.faults import stalls
from bench.faults.gaps import Span
from tests.server import wait


def test_what_stops_the_watcher_is_a_stall() -> None:
    before = set(psutil.Process().children())
    with stalls.watching() as watched:
        (watcher,) = set(psutil.Process().children()) - before
        assert wait(lambda: watcher.cpu_times().user > 0 and watcher.status() == "sleeping")
        time.sleep(0.2)
        start_s = time.monotonic()
        watcher.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        watcher.send_signal(signal.SIGCONT)
        assert wait(lambda: any(span.lasted_s > 0.4 for span in watched.since(start_s)))
    longest = max(watched.since(start_s), key=lambda span: span.lasted_s)
    assert longest.from_s < 0.1
    assert longest.to_s >= 0.5
    assert not watcher.is_running()


def test_of_a_silence_only_what_lies_in_a_stall_is_taken() -> None:
    stalled = [Span(1.0, 2.0), Span(4.0, 9.0)]
    assert stalls.overlap_s(Span(0.0, 1.0), stalled) == 0
    assert stalls.overlap_s(Span(1.5, 5.0), stalled) == 1.5
    assert stalls.overlap_s(Span(0.0, 10.0), stalled) == 6
