"""Ray Serve's own log outlives the import of vllm."""

import logging
import logging.config
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.observe import logs


@pytest.fixture
def serve_log(tmp_path: Path) -> Iterator[logging.handlers.MemoryHandler]:
    """A logger as Ray Serve makes it in a replica: a file behind a buffer."""
    logger = logging.getLogger("ray.serve")
    file = logging.handlers.RotatingFileHandler(tmp_path / "replica.log")
    handler = logging.handlers.MemoryHandler(1, target=file)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    handler.close()
    file.close()


def configured_by_somebody_else() -> None:
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})


def test_who_configures_logging_closes_the_handlers_of_others(
    serve_log: logging.handlers.MemoryHandler,
) -> None:
    configured_by_somebody_else()
    assert serve_log.target is None  # Where this is no longer so, `kept` has no purpose.


def test_the_log_of_ray_serve_goes_on(
    serve_log: logging.handlers.MemoryHandler, tmp_path: Path
) -> None:
    logger = logging.getLogger("ray.serve")
    logger.error("before")
    with logs.kept():
        configured_by_somebody_else()
    assert isinstance(serve_log.target, logging.FileHandler)
    assert serve_log.target.baseFilename == str(tmp_path / "replica.log")
    logger.error("after")
    assert (tmp_path / "replica.log").read_text() == "before\nafter\n"
