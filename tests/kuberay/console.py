"""`python -m kuberay` in this process: its imports are made once."""

import contextlib
import io
import sys
from typing import NamedTuple

import pytest

from kuberay.__main__ import main


class Done(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


def run(*argv: str, stdin: str = "") -> Done:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
    return Done(status, out.getvalue(), err.getvalue())
