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


# What `python -m kuberay` may import besides the standard library: all of it is small, and has a
# wheel for macOS.
_LIGHT = (
    "boto3", "botocore", "s3transfer", "jmespath", "dateutil", "urllib3", "six", "yaml", "pydantic",
    "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "psutil",
    "starlette", "anyio", "certifi", "cython_runtime", "kuberay", "serve_app",
)  # fmt: skip


def test_a_light_environment_is_enough_also_where_linux_calls_are_not() -> None:
    code = f"""
import importlib.abc, os, sys
# What macOS has not.
for name in ("sched_getaffinity", "sched_setaffinity", "pidfd_open", "eventfd", "memfd_create"):
    if hasattr(os, name):
        delattr(os, name)
light = {_LIGHT!r}

class Heavy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if path is None and first not in light and first not in sys.stdlib_module_names:
            if not first.startswith("_"):
                raise ModuleNotFoundError(f"not of a light environment: {{name}}")

sys.meta_path.insert(0, Heavy())
from kuberay.__main__ import SUBCOMMANDS, main
for module in [*SUBCOMMANDS.values(), "kuberay.sweep"]:
    importlib.import_module(module)
sys.exit(main(["lint", "kuberay/base/rayservice.yaml"]) or main(["render", "--check"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
