"""API keys: who gets in, through which header, and what a rotated or lost file does."""

from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serve_app.gates import keys
from serve_app.gates.keys import KeyGate, KeyRing
from serve_app.settings import ApiKeys


def client(ring: KeyRing) -> httpx.AsyncClient:
    async def answer(request: object) -> PlainTextResponse:
        return PlainTextResponse("in")

    paths = ("/health", "/v1/models", "/tokenize", "/metrics", "/docs")
    app = Starlette(routes=[Route(path, answer) for path in paths])
    transport = httpx.ASGITransport(app=KeyGate(app, ring))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def status(ring: KeyRing, path: str = "/v1/models", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client(ring) as http:
        return (await http.get(path, headers=named)).status_code


async def test_without_a_source_everyone_gets_in() -> None:
    assert await status(KeyRing(ApiKeys())) == 200


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/metrics", "/docs"])
async def test_every_route_but_health_asks(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "one,two")
    ring = KeyRing(ApiKeys(env="KEYS"))
    assert await status(ring, path) == 401
    assert await status(ring, path, authorization="Bearer three") == 401
    assert await status(ring, path, authorization="Bearer two") == 200
    assert await status(ring, path, x_api_key="one") == 200
    assert await status(ring, "/health") == 200


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "鍵", "plain"])
async def test_a_key_in_any_script_is_accepted_as_clients_send_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYS", f"tenant {key}")
    ring = KeyRing(ApiKeys(env="KEYS"))
    assert ring.holder(key.encode().decode("latin-1")) == "tenant"
    assert ring.holder(key) == "tenant"
    assert ring.holder(key + "x") is None
    async with client(ring) as http:
        bearer = b"Bearer " + key.encode()
        answer = await http.get("/v1/models", headers=[(b"authorization", bearer)])
    assert answer.status_code == 200


async def test_a_refusal_has_the_shape_of_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "one")
    async with client(KeyRing(ApiKeys(env="KEYS"))) as http:
        response = await http.get("/v1/models")
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("value", ["", " , ", None])
async def test_an_empty_source_fails_closed(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("KEYS", value)
    ring = KeyRing(ApiKeys(env="KEYS"))
    assert len(ring) == 0
    for key in ("", " ", "x"):
        assert await status(ring, authorization=f"Bearer {key}") == 401


async def test_a_file_is_read_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: clock[0])
    file = tmp_path / "keys"
    file.write_text("# the team\nold\n\n")
    ring = KeyRing(ApiKeys(file=str(file)))
    assert ring.holder("old")
    assert not ring.holder("# the team")
    file.write_text("new\n")
    clock[0] += 2
    assert ring.holder("new")
    assert not ring.holder("old")
    file.unlink()
    clock[0] += 2
    assert not ring.holder("new")


async def test_both_sources_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "from-env")
    (tmp_path / "keys").write_text("from-file")
    ring = KeyRing(ApiKeys(env="KEYS", file=str(tmp_path / "keys")))
    assert ring.holder("from-env")
    assert ring.holder("from-file")


@pytest.mark.parametrize("key", ["schlüssel", "鍵-1", "ключ"])
async def test_a_key_in_any_script_is_known(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", f"team {key}")
    ring = KeyRing(ApiKeys(env="KEYS"))
    # As a server reads the header that a client sends in UTF-8.
    assert ring.holder(key.encode().decode("latin-1")) == "team"
    if key.isascii() or key == "schlüssel":
        assert ring.holder(key) == "team"  # Sent in Latin-1.
    assert ring.holder(key + "x") is None
