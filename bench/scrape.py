"""The server's Prometheus metrics during a run, sampled on the run's clock.

vLLM's names, summed over everything that is scraped; counters count from the first sample. A
series that the server does not have stays None, and a scrape that failed leaves a gap: neither
is a zero.

Metrics say late which replicas there are. Where Ray's dashboard is given, its REST API says at once
how many of a deployment are wanted, start, serve and leave.
"""

import asyncio
import contextlib
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bench.errors import TargetError
from bench.traffic import access
from bench.traffic.target import Target

_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "ray_serve_deployment_replica_healthy": "replicas",
}
_COUNTERS = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:spec_decode_num_draft_tokens_total": "drafted",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}


# Of Ray Serve's states of a replica.
_STATES = {"STARTING": "starting", "RUNNING": "replicas", "STOPPING": "stopping"}
_API = "/api/serve/applications/"


class Sample(msgspec.Struct, kw_only=True):
    """One scrape.

    Attributes:
        t_s: when, seconds since the start of the run.
        running, waiting: requests in the engines.
        kv_usage: share of the KV cache in use, 0 to 1, the mean over engines.
        replicas: healthy replicas.
        wanted, starting, stopping: replicas that Ray Serve aims at, that do not serve yet, and that
            end their requests; only where its dashboard was asked.
        prompt_tokens, generation_tokens, preemptions: since the first sample.
        prefix_hit_rate: share of prompt tokens found in the prefix cache since the first sample.
        acceptance_rate: share of the tokens that speculation drafted since then that were right;
            None where nothing is speculated.
    """

    t_s: float
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    replicas: float | None = None
    wanted: float | None = None
    starting: float | None = None
    stopping: float | None = None
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    preemptions: float | None = None
    prefix_hit_rate: float | None = None
    acceptance_rate: float | None = None


def totals(texts: Iterable[str]) -> dict[str, float]:
    """The series this module knows, over the expositions of several servers.

    Sums, but for the KV cache's use, which is the mean over engines.
    """
    values: dict[str, list[float]] = {}
    names = _GAUGES | _COUNTERS
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in names:
                    values.setdefault(names[sample.name], []).append(sample.value)
    totals_of = {name: sum(each) for name, each in values.items()}
    if "kv_usage" in totals_of:
        totals_of["kv_usage"] /= len(values["kv_usage"])
    return totals_of


def counts(details: bytes, deployment: str) -> dict[str, float]:
    """Replicas of a deployment by state, from the answer of Ray Serve's REST API.

    Raises:
        ValueError: that is not such an answer, or it has no deployment of that name.
    """
    try:
        applications = msgspec.json.decode(details)["applications"].values()
        replicas = [
            app
            for application in applications
            for name, app in application["deployments"].items()
            if name == deployment
        ]
        result = dict.fromkeys(("wanted", *_STATES.values()), 0.0)
        for app in replicas:
            result["wanted"] += app["target_num_replicas"]
            for replica in app["replicas"]:
                if (state := _STATES.get(replica["state"])) is not None:
                    result[state] += 1
    except (msgspec.DecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"not Ray Serve's details: {error!r}") from None
    if not replicas:
        raise ValueError(f"Ray Serve has no deployment {deployment!r}")
    return result


def samples(scrapes: Iterable[tuple[float, Mapping[str, float]]], start_s: float) -> list[Sample]:
    """Samples on the run's clock, from (time, totals) pairs on the clock of `start_s`."""
    result: list[Sample] = []
    first: dict[str, float] = {}
    for at_s, values in scrapes:
        for name in _COUNTERS.values():
            if name in values:
                first.setdefault(name, values[name])
        since = {name: values[name] - first[name] for name in _COUNTERS.values() if name in values}
        queries = since.pop("prefix_queries", 0.0)
        hits = since.pop("prefix_hits", 0.0)
        drafted, accepted = since.pop("drafted", 0.0), since.pop("accepted", 0.0)
        acceptance = accepted / drafted if drafted else None
        names = {*_GAUGES.values(), "wanted", *_STATES.values()}
        gauges = {name: values[name] for name in names if name in values}
        rate = hits / queries if queries else None
        result.append(
            Sample(
                t_s=at_s - start_s,
                prefix_hit_rate=rate,
                acceptance_rate=acceptance,
                **gauges,
                **since,
            )
        )
    return result


class Scraper:
    """Scrapes while it runs. `scrapes` holds (unix time, totals); `failed` counts what did not.

    Args:
        urls: of metrics.
        dashboard: of Ray, http://host:port, and which `deployment`'s replicas are counted there.
        target: what is measured; its headers and its certificate authority are used for those
            `urls` that are on the same server, and on no other.
    """

    def __init__(
        self,
        urls: Iterable[str],
        period_s: float = 1.0,
        dashboard: str = "",
        deployment: str = "engine",
        target: Target | None = None,
    ) -> None:
        self.urls = list(urls)
        self._target = target
        self.dashboard, self.deployment = dashboard.rstrip("/"), deployment
        self.period_s = period_s
        self.scrapes: list[tuple[float, dict[str, float]]] = []
        self.failed = 0

    async def check(self) -> None:
        """Ask the dashboard once. Metrics may be missing; what was asked for by name may not.

        Raises:
            TargetError: it does not answer, or knows no such deployment.
        """
        try:
            await self._replicas()
        except (OSError, ValueError) as error:
            raise TargetError(f"dashboard = {self.dashboard!r}: {error}") from None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Scraper"]:
        task = asyncio.create_task(self._run()) if self.urls or self.dashboard else None
        try:
            yield self
        finally:
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _run(self) -> None:
        while True:
            began_s = time.time()
            # Each by itself: what one could not say, the other may.
            parts = await asyncio.gather(self._metrics(), self._replicas(), return_exceptions=True)
            values: dict[str, float] = {}
            for part in parts:
                if isinstance(part, dict):
                    values |= part
                elif isinstance(part, OSError | ValueError):
                    self.failed += 1
                else:
                    raise part
            if values:
                self.scrapes.append(((began_s + time.time()) / 2, values))
            await asyncio.sleep(max(0.0, began_s + self.period_s - time.time()))

    async def _metrics(self) -> dict[str, float]:
        texts = await asyncio.gather(*(asyncio.to_thread(self._scrape, url) for url in self.urls))
        return await asyncio.to_thread(totals, texts)

    def _scrape(self, url: str) -> str:
        target = self._target
        if target is None or not access.same_server(url, target.url):
            return _get(url)
        tls = access.tls(target.ca_file) if url.startswith("https:") else None
        return _get(url, target.headers, tls)

    async def _replicas(self) -> dict[str, float]:
        if not self.dashboard:
            return {}
        details = await asyncio.to_thread(serve_details, self.dashboard)
        return counts(details.encode(), self.deployment)


def serve_details(dashboard: str) -> str:
    """Ray Serve's details of its applications, as JSON, from Ray's dashboard.

    Raises OSError where that does not answer.
    """
    token = _ray_token()
    return _get(dashboard + _API, {"authorization": f"Bearer {token}"} if token else {})


def _ray_token() -> str:
    """What Ray's dashboard asks for where its cluster has authentication; from where Ray has it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _get(url: str, headers: Mapping[str, str] = {}, tls: ssl.SSLContext | None = None) -> str:
    request = urllib.request.Request(url, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=5, context=tls) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        raise OSError(f"{url}: {error}") from error
