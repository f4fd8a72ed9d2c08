"""One server with real weights, for all that only ask it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import Server, configuration, launched


# Of this folder alone: a server that nobody asks takes a quarter of a core.
@pytest.fixture(scope="package")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shipped configuration as it is, but for its port and the size of its caches."""
    # float32: in bfloat16 two right implementations round differently, and near ties differ.
    config = configuration(8700, engine={"scheduling_policy": "priority", "dtype": "float32"})
    folder = tmp_path_factory.mktemp("server")
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    with launched(config, folder, **compiled) as running:
        assert running.ready(), running.output()
        yield running
