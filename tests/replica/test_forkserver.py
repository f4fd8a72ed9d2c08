"""A function in a fork of the process that has imported everything."""

import multiprocessing.forkserver as stdlib
import os
from collections.abc import Iterator

import pytest

from serve_app.replica import forkserver


@pytest.fixture(autouse=True, scope="module")
def server() -> Iterator[None]:
    """A fork server without vLLM, unless another test of this process has one."""
    running = stdlib._forkserver._forkserver_pid is not None  # type: ignore[attr-defined]
    yield
    if not running:
        forkserver.stop()


def test_a_function_answers_from_a_process_of_its_own() -> None:
    pid, answer = forkserver.call(lambda: (os.getpid(), {"a": [1]}))
    assert pid != os.getpid()
    assert answer == {"a": [1]}


def test_what_a_function_raises_is_in_the_error() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        forkserver.call(lambda: 1 / 0)


def test_a_process_that_ends_without_an_answer_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="status 3"):
        forkserver.call(lambda: os._exit(3))
