"""/metrics: whose figures a key shows."""

import asyncio
from contextvars import copy_context

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from serve_app.gates.keys import KeyGate, KeyRing
from serve_app.observe import metrics
from serve_app.observe.exposition import Exposition
from serve_app.settings import ApiKeys


async def shown(key: str | None, by_tenant: bool = True) -> dict[str, set[str]]:
    """By metric: the tenants whose series there are."""
    ring = KeyRing(ApiKeys(env="KEYS") if key else ApiKeys())
    app = KeyGate(Exposition(Starlette(), by_tenant), ring)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        headers = {"x-api-key": key} if key else {}
        answer = await client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    collected: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            collected.setdefault(sample.name, set()).add(sample.labels.get("tenant", ""))
    return collected


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "team-a one,team-b two")
    for who in ("team-a", "team-b"):
        metrics.requests.labels("exposed", "/v1/completions", "200", who).inc()
        metrics.generated_tokens.labels("exposed", who).inc(5)
    metrics.queued.labels("exposed").set(1)


@pytest.mark.parametrize(("key", "who"), [("one", "team-a"), ("two", "team-b")])
def test_a_key_shows_the_series_of_its_tenant(key: str, who: str) -> None:
    result = copy_context().run(asyncio.run, shown(key))
    assert result["serve_app_requests_total"] == {who}
    assert result["serve_app_generated_tokens_total"] == {who}
    assert result["serve_app_requests_queued"] == {""}
    everybodys = {name for tenants in result.values() for name in tenants}
    assert everybodys == {who, ""}


def test_a_tenant_that_is_counted_with_others_is_not_shown_their_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_tenants", {"team-a": "team-a"})
    monkeypatch.setattr(metrics, "_MOST_TENANTS", 1)
    for who in ("team-b", "team-c", "other"):
        label = metrics.tenant_label(who)
        metrics.requests.labels("exposed", "/v1/completions", "200", label).inc()
    monkeypatch.setenv("KEYS", "team-b two,other three")
    for key in ("two", "three"):
        result = copy_context().run(asyncio.run, shown(key))
        assert {name for tenants in result.values() for name in tenants} == {""}


async def test_without_keys_nothing_is_hidden() -> None:
    result = await shown(None, by_tenant=False)
    assert {"team-a", "team-b"} <= result["serve_app_requests_total"]
