"""What tests share: model folders, and one server with real weights for all that only ask it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import tiny_model
from serve_app import embedded
from tests.server import Server, configuration, launched


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers."""
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct: real weights."""
    return embedded.path()


@pytest.fixture(scope="session")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped configuration as it is, but for its port and the size of its caches."""
    # float32: in bfloat16 two right implementations round differently, and near ties differ.
    config = configuration(8700, engine={"scheduling_policy": "priority", "dtype": "float32"})
    folder = tmp_path_factory.mktemp("server")
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    with launched(config, folder, **compiled) as running:
        assert running.ready(), running.output()
        yield running
