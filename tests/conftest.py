"""What tests share: model folders, and which of them run beside each other."""

from pathlib import Path
from typing import Any

import pytest

from bench import tiny_model
from serve_app import embedded

# What takes longest, in this order, so that no worker ends up waiting for another.
FIRST = [
    "tests/test_life.py",
    "tests/served",
    "tests/test_gateway.py",
    "tests/test_observed.py",
    "tests/test_overload.py",
    "tests/test_continuation.py",
    "tests/bench/test_tune.py",
]


def _together(nodeid: str) -> str:
    """What one worker runs as a whole: a module, or a folder of modules that share a server."""
    module = nodeid.split("::")[0]
    return "tests/served" if module.startswith("tests/served/") else module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(_together(item.nodeid), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest --numprocesses 2`: whoever is free takes the next."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _together(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers."""
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct: real weights."""
    return embedded.path()
