"""A request that cannot be read is the client's mistake; an engine that fails is not."""

from types import SimpleNamespace
from typing import Any

import fastapi
import pytest
from fastapi.testclient import TestClient

from serve_app.gates.work import Work, work

SHAPE = [IndexError("list index out of range"), KeyError("role"), AttributeError("no text")]
ROUTES = ["/v1/any", "/v1/messages"]
BODY = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> tuple[TestClient, SimpleNamespace]:
    """vLLM's handlers and one of its routes around something that raises `error`."""
    import vllm.entrypoints.anthropic.api_router as anthropic
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    from serve_app.replica import unreadable

    monkeypatch.setattr(anthropic, "create_error_response", anthropic.create_error_response)
    now = SimpleNamespace(error=None, begun=None)

    async def fail() -> None:
        if now.begun is not None:
            work.set(Work(begun=now.begun))
        raise now.error

    app = fastapi.FastAPI()
    init_exception_handler(app)
    unreadable.answer_400(app)
    app.add_api_route("/v1/any", fail, methods=["GET", "POST"])
    app.include_router(anthropic.router)
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.engine_client = SimpleNamespace(errored=False, is_running=True)
    app.state.server = SimpleNamespace(should_exit=False)
    app.state.enable_server_load_tracking = False
    app.state.anthropic_serving_messages = SimpleNamespace(create_messages=lambda *_: fail())
    return TestClient(app, raise_server_exceptions=False), now


@pytest.mark.parametrize("error", SHAPE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("begun", [None, False])
def test_a_request_that_cannot_be_read_is_400(
    failing: Any, error: Exception, path: str, begun: bool | None
) -> None:
    client, now = failing
    now.error, now.begun = error, begun
    answer = client.post(path, json=BODY)
    assert answer.status_code == 400, answer.text
    assert type(error).__name__ in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ROUTES)
def test_an_error_after_the_engine_was_asked_is_500(failing: Any, path: str) -> None:
    client, now = failing
    now.error, now.begun = SHAPE[0], True
    assert client.post(path, json=BODY).status_code == 500


def test_an_error_of_a_request_without_a_body_is_500(failing: Any) -> None:
    client, now = failing
    now.error = SHAPE[0]
    assert client.get("/v1/any").status_code == 500


@pytest.mark.parametrize("path", ROUTES)
def test_an_error_of_another_kind_is_500(failing: Any, path: str) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    client, now = failing
    for now.error in (EngineDeadError(), RuntimeError("CUDA"), OSError("disk")):
        assert client.post(path, json=BODY).status_code == 500, now.error


@pytest.mark.parametrize("path", ROUTES)
def test_what_vllm_refuses_stays_as_it_is(failing: Any, path: str) -> None:
    client, now = failing
    now.error = ValueError("temperature must be positive")
    answer = client.post(path, json=BODY)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "temperature must be positive"
