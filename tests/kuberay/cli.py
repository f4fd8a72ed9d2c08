"""The commands as a person runs them."""

import argparse
import contextlib
import functools
import importlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from kuberay.aws import Account

ROOT = Path(__file__).parent.parent.parent


_account = functools.lru_cache(Account)


@dataclass
class Ran:
    returncode: int
    stdout: str
    stderr: str


def run(module: str, *argv: str, **environment: str) -> Ran:
    """A command in this process, as kuberay/__main__.py runs it: AWS's SDK is slow to load."""
    out, err = io.StringIO(), io.StringIO()
    result = importlib.import_module(f"kuberay.{module}")
    parser = argparse.ArgumentParser()
    result.arguments(parser)
    # A new account where the environment is another one; else that of the test before, whose
    # clients know nothing of it.
    account = Account if environment else _account
    with (
        mock.patch("kuberay.target.Account", account),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "stdin", io.StringIO()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = result.command(parser.parse_args(argv))
    return Ran(status, out.getvalue(), err.getvalue())


def start(module: str, *argv: str) -> "subprocess.Popen[str]":
    """A command in a process of its own, which can be interrupted."""
    code = (
        "import argparse, importlib, sys; "
        "module = importlib.import_module('kuberay.' + sys.argv[1]); "
        "parser = argparse.ArgumentParser(); module.arguments(parser); "
        "sys.exit(module.command(parser.parse_args(sys.argv[2:])))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, module, *argv],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would what the tests start in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
