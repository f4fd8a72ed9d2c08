"""Every command of `python -m kuberay` is there, and asks for what it needs only."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from kuberay.__main__ import SUBCOMMANDS, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_command_has_its_module(name: str) -> None:
    module = importlib.import_module(SUBCOMMANDS[name])
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    assert callable(module.command)
    assert name in (importlib.import_module("kuberay.__main__").__doc__ or "")


def test_an_unknown_command_is_a_mistake() -> None:
    with pytest.raises(SystemExit) as left:
        main(["upp"])
    assert left.value.code == 2


def test_lint_needs_neither_aws_nor_ray() -> None:
    code = (
        "import sys; from kuberay.__main__ import main; "
        "status = main(['lint', 'kuberay/base/rayservice.yaml']); "
        "loaded = {'boto3', 'vllm', 'torch'} & set(sys.modules); "
        "sys.exit(f'{status} {loaded}' if status or loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
