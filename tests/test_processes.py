"""Ending a child: with its consent, without, and with all that it has started."""

import signal
import subprocess

import psutil
import pytest

from serve_app import processes

DEAF = "trap '' TERM INT; echo up; while :; do sleep 0.05; done"


def started(script: str) -> "subprocess.Popen[bytes]":
    """A shell that has printed a line, and so has its traps."""
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_that_obeys_ends_with_the_signal_it_was_sent(number: int) -> None:
    script = f"trap 'exit {number}' {number}; echo up; while :; do sleep 0.05; done"
    with started(script) as process:
        assert processes.end(process, 60, number)
        assert process.returncode == number


def test_a_deaf_child_is_killed() -> None:
    with started(DEAF) as process:
        assert not processes.end(process, 0.1)
        assert process.returncode == -signal.SIGKILL


def test_an_interrupted_wait_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    with started(DEAF) as process:
        wait = process.wait

        def interrupted(timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            return wait()

        monkeypatch.setattr(process, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            processes.end(process, 60)
        assert process.returncode == -signal.SIGKILL


def test_a_child_that_has_ended_is_left_alone() -> None:
    with started("echo up; exit 3") as process:
        process.wait()
        assert processes.end(process, 0)
        processes.end_family(process, 0)
        assert process.returncode == 3


def test_a_family_ends_with_its_deaf_grandchildren() -> None:
    with started(f'sh -c "{DEAF}" & wait') as process:
        [child] = psutil.Process(process.pid).children()
        processes.end_family(process, 0.3)
        assert process.returncode is not None
        gone, _ = psutil.wait_procs([child], timeout=60)
        assert gone == [child]
