"""The gateway's deployment, and when it is ready; without a cluster."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.app import _behind_gateway
from serve_app.gateway import deployment as gateway
from serve_app.gateway.fleet import Fleet
from serve_app.planning.placement import place
from serve_app.planning.plan import Plan
from serve_app.settings import Settings

ENABLED: dict[str, Any] = {"gateway": {"enabled": True}}


def test_gateways_are_replaced_the_new_ones_first(tiny_config: Path) -> None:
    settings = Settings.parse({"model": str(tiny_config), **ENABLED})
    plan = Plan(str(tiny_config), "tiny", place(1, 1, 0, 1.0), cpu_threads=1)
    application = _behind_gateway(settings, [(settings, plan)])
    config = application._bound_deployment._deployment_config
    assert application._bound_deployment.name == "gateway"
    assert config.max_surge_percent == 100


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """What the gateways of a test know; they observe nothing, as there is no Ray to tell."""
    expected = Fleet()
    monkeypatch.setattr(
        gateway.Gateway, "_relay", lambda *_, **__: SimpleNamespace(replicas=expected)
    )
    observation = SimpleNamespace(gate=lambda app, *_: app, close=lambda: None)
    monkeypatch.setattr(gateway, "Observation", lambda *_: observation)
    return expected


def started() -> "asyncio.Task[Any]":
    settings = Settings.parse({"model": "m", "allow_unauthenticated_network": True, **ENABLED})
    there = gateway.Gateway(settings, {"m": None})  # type: ignore[dict-item]
    return asyncio.create_task(there.__serve_build_asgi_app__())


async def test_a_gateway_is_ready_when_it_knows_the_replicas(
    replicas: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "_LEARN_S", 60.0)
    ready = started()
    _, waiting = await asyncio.wait({ready}, timeout=0.5)
    assert waiting, "ready, though requests would find no replica"
    replicas.update([("a", {"address": "127.0.0.1:1", "token": "t"})])
    assert callable(await ready)


async def test_a_gateway_does_not_wait_for_ever(
    replicas: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a first start, or scaled to zero, there are no replicas yet."""
    monkeypatch.setattr(gateway, "_LEARN_S", 0.1)
    assert callable(await started())
