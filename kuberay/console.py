"""What a command says, asks and ends with, the same for all of them.

Exit status: 0 good, 1 not (something is left, a check failed, a cluster outlived its hours), 2 a
mistake or a refusal, told in one sentence, 130 interrupted.
"""

import argparse
import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from kuberay.errors import EksError, Refused

Command = Callable[[argparse.Namespace], int]


def reports_errors(command: Command) -> Command:
    """A command whose troubles end it with one sentence and a status."""

    @functools.wraps(command)
    def run(options: argparse.Namespace) -> int:
        with _ended_like_ctrl_c():
            return _run(options)

    def _run(options: argparse.Namespace) -> int:
        try:
            return command(options)
        except EksError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: run the same command again, it goes on from here", file=sys.stderr)
            return 130

    return run


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, which a CI job or a timer sends, end a command as tidily as Ctrl-C."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    # stderr: what a command finds goes to stdout, alone where it is JSON.
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Announce a step, and its duration once it is over."""
    say(f"==> {name}")
    started_s = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"==> {name}: not finished")
        raise
    say(f"==> {name}: {time.monotonic() - started_s:.0f} s")


def confirm(question: str, answer: str, yes: bool) -> None:
    """Go on only if the person types `answer`, or has said --yes.

    Raises:
        Refused: they typed something else, or there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"{question} Nobody is there to ask: give --yes")
    print(f"{question} Type {answer} to go on: ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() != answer:
        raise Refused("nothing was changed")
