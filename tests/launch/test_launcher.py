"""What tells the launcher to stop."""

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

_WAITS = """
import time
from serve_app.launch import launcher
with launcher._signals() as stop:
    print("waits", flush=True)
    while not stop.is_set():
        time.sleep(0.01)
    print("told to stop", flush=True)
"""


def waiting(prepare: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITS], stdout=subprocess.PIPE, text=True, preexec_fn=prepare
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_of_these_stops_in_order(number: signal.Signals) -> None:
    process = waiting(lambda: signal.signal(number, signal.default_int_handler))
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("told to stop\n", None)
    assert process.returncode == 0


def test_under_nohup_it_outlives_its_terminal() -> None:
    process = waiting(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("told to stop\n", None)
