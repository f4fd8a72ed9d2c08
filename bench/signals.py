"""Signals that end a command."""

import signal


def end_in_order() -> None:
    """End on SIGTERM and SIGHUP as on Ctrl-C, and write the measurements so far.

    A command that a script starts in the background ignores Ctrl-C, unless it is told not to.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
