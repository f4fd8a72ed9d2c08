"""HAProxy as Ray Serve starts and reloads it, with our configuration, before small real servers.

Ports 8660 to 8662.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import aiohttp
import pytest
from ray.serve._private import haproxy as serve_haproxy
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from serve_app.launch import launcher
from serve_app.launch.haproxy_rules import ORIGINS_VARIABLE

PORT = 8660
PAGE = "https://app.example"


class Upstream:
    """An HTTP server with connections that are kept alive: a replica, or Serve's own proxy.

    Attributes:
        paths: of the requests that came, health checks aside.
        delay_s: from a request to its answer.
        drops: so many requests lose their connection instead of an answer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.paths: list[str] = []
        self.delay_s = 0.0
        self.drops = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> "Upstream":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    @property
    def config(self) -> ServerConfig:
        return ServerConfig(self.name, "127.0.0.1", self.port)

    def stop(self) -> None:
        """Nothing listens, and every connection is closed."""
        self._server.close()
        for writer in list(self._writers):
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = head.split(" ", 2)[1]
                lengths = [line for line in head.lower().split("\r\n") if "content-length" in line]
                await reader.readexactly(int(lengths[0].split(":")[1]) if lengths else 0)
                if path != "/-/healthz":
                    self.paths.append(path)
                    await asyncio.sleep(self.delay_s)
                    if self.drops:
                        self.drops -= 1
                        break
                body = self.name.encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                await writer.drain()
        self._writers.discard(writer)
        writer.close()


class Proxy:
    """HAProxy, run by Ray Serve's own code, before the servers that it was last told of."""

    def __init__(
        self, folder: Path, fallback: Upstream | None, port: int = PORT, prefix: str = "/"
    ) -> None:
        config = HAProxyConfig(
            socket_path=str(folder / "admin.sock"),
            server_state_base=str(folder),
            server_state_file=str(folder / "server-state"),
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            stats_port=port + 1,
            metrics_port=port + 2,
            metrics_enabled=False,
            health_check_inter="1s",
            retry_on=launcher.ENVIRONMENT["RAY_SERVE_HAPROXY_RETRY_ON"],
            nbthread=2,
            is_head=True,
        )
        self.api = HAProxyApi(config, config_file_path=str(folder / "haproxy.cfg"))
        self._fallback = fallback
        self._prefix = prefix
        self.address = f"http://127.0.0.1:{port}"
        self.url = self.address + prefix.removesuffix("/")

    def know(self, *servers: Upstream, **others: tuple[str, list[Upstream]]) -> None:
        """
        Args:
            servers: of the application.
            others: by its name, the prefix and the servers of another application.
        """
        applications = {"llm": (self._prefix, list(servers)), **others}
        backends = {
            f"http-{name}": BackendConfig(
                name=f"http-{name}",
                path_prefix=prefix,
                app_name=name,
                servers=[server.config for server in upstreams],
                fallback_server=self._fallback.config if self._fallback else None,
            )
            for name, (prefix, upstreams) in applications.items()
        }
        self.api.set_backend_configs(backends)

    async def replace(self, old: Upstream, new: Upstream) -> None:
        """As Ray Serve does it: HAProxy is told, and the old replica ends two seconds later."""
        self.know(new)
        ends = asyncio.create_task(_later(2.0, old.stop))
        await self.api.reload()
        await ends


async def _later(delay_s: float, call: Callable[[], None]) -> None:
    await asyncio.sleep(delay_s)
    call()


@contextlib.asynccontextmanager
async def proxied(
    folder: Path, *servers: Upstream, fallback: Upstream | None = None
) -> AsyncIterator[Proxy]:
    for server in [*servers, *([fallback] if fallback else [])]:
        await server.start()
    proxy = Proxy(folder, fallback)
    proxy.know(*servers)
    await proxy.api.start()
    try:
        async with asyncio.timeout(20):
            while "UP" not in await _status(proxy) and servers:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        yield proxy
    finally:
        await proxy.api.stop()


async def _status(proxy: Proxy) -> list[str]:
    stats = await proxy.api.get_all_stats()
    return [server.status for backend in stats.values() for server in backend.values()]


@pytest.fixture(autouse=True)
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve starts HAProxy through our wrapper, with the environment of our launcher."""
    variables = launcher.haproxy()
    monkeypatch.setattr(
        serve_haproxy, "RAY_SERVE_HAPROXY_BINARY_PATH", variables["RAY_SERVE_HAPROXY_BINARY_PATH"]
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SERVE_APP_REPLICA_TIMEOUT_S", "3")


async def test_a_kept_alive_connection_outlives_every_change_of_replicas(tmp_path: Path) -> None:
    rng = random.Random(1)
    over = asyncio.Event()
    failed: list[str] = []
    request_count = 0

    async def use(proxy: Proxy) -> None:
        nonlocal request_count
        connector = aiohttp.TCPConnector(limit=1, keepalive_timeout=600)
        async with aiohttp.ClientSession(connector=connector) as session:
            while not over.is_set():
                request_count += 1
                try:
                    async with session.post(f"{proxy.url}/v1/completions", data=b"x") as answer:
                        if answer.status != 200:
                            failed.append(f"{answer.status} {await answer.text()}")
                        await answer.read()
                except aiohttp.ClientError as error:
                    failed.append(repr(error))
                await asyncio.sleep(rng.choice((0.0, 0.05, 0.5, 4.0)))

    current = Upstream("replica-0")
    async with proxied(tmp_path, current) as proxy:
        users = [asyncio.create_task(use(proxy)) for _ in range(50)]
        for turn in range(1, 7):
            await asyncio.sleep(1.0)
            new = await Upstream(f"replica-{turn}").start()
            await proxy.replace(current, new)
            current = new
        await asyncio.sleep(5.0)  # Those that idled through the last change ask once more.
        over.set()
        await asyncio.gather(*users)
        current.stop()
    assert not failed, (len(failed), request_count, failed[:3])
    assert request_count > 200


async def test_a_request_that_a_replica_dropped_before_it_answered_is_asked_elsewhere(
    tmp_path: Path,
) -> None:
    first, second = Upstream("a"), Upstream("b")
    async with proxied(tmp_path, first, second) as proxy, aiohttp.ClientSession() as session:
        first.drops = second.drops = 1
        names = []
        for _ in range(6):
            async with session.post(f"{proxy.url}/v1/completions", data=b"x") as answer:
                names.append((answer.status, await answer.text()))
    assert [status for status, _ in names] == [200] * 6
    assert first.drops == second.drops == 0


async def test_with_no_replica_a_request_waits_a_bounded_time_and_health_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ORIGINS_VARIABLE, f"https://other.example {PAGE}")
    async with proxied(tmp_path) as proxy, aiohttp.ClientSession() as session:
        waiting = asyncio.create_task(_get(session, proxy, "/v1/models"))
        await asyncio.sleep(0.5)
        answers = [await _get(session, proxy, path) for path in ("/health", "/ping")]
        assert not waiting.done()
        for status, text, headers in [*answers, await waiting]:
            assert status == 503
            assert json.loads(text)["error"]["code"] == "unavailable"
            assert headers["Retry-After"] == "1"
            assert "access-control-allow-origin" not in headers
        # A page in a browser can read it, if its origin is allowed.
        for origin, shown in ((PAGE, PAGE), ("https://evil.example", None)):
            async with session.get(f"{proxy.url}/health", headers={"origin": origin}) as answer:
                assert answer.headers.get("access-control-allow-origin") == shown


async def test_a_request_that_waits_for_a_replica_is_answered_by_the_next_one(
    tmp_path: Path,
) -> None:
    """The worker that holds it never learns of the new replica: its successor does."""
    only = Upstream("a")
    fallback = Upstream("proxy")
    fallback.delay_s = 60
    async with (
        proxied(tmp_path, only, fallback=fallback) as proxy,
        aiohttp.ClientSession() as session,
    ):
        only.stop()
        async with asyncio.timeout(20):
            while (await _get(session, proxy, "/health"))[0] == 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        waiting = asyncio.create_task(_post(session, proxy))
        await asyncio.sleep(0.5)
        new = await Upstream("b").start()
        proxy.know(new)
        await proxy.api.reload()
        assert await waiting == (200, "b")
        # Serve's own proxy was asked for a replica, once, by no client's request.
        assert fallback.paths == ["/health"]
        new.stop()
    fallback.stop()


async def test_an_application_that_sleeps_takes_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_APP_SCALES_TO_ZERO", "1")
    fallback = Upstream("proxy")
    async with (
        proxied(tmp_path, fallback=fallback) as proxy,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{proxy.url}/health") as answer:
            assert answer.status == 200
        assert not fallback.paths, "a health check woke it"
        async with session.get(f"{proxy.url}/-/healthz") as answer:
            assert answer.status == 200
    fallback.stop()


async def test_of_applications_below_each_other_each_answers_for_itself(tmp_path: Path) -> None:
    """`/` has no replica, `/team` has one: neither is taken for the other."""
    team = await Upstream("team").start()
    async with proxied(tmp_path) as proxy, aiohttp.ClientSession() as session:
        proxy.know(team=("/team", [team]))
        await proxy.api.reload()
        async with asyncio.timeout(20):
            while (await _get(session, proxy, "/team/health"))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (await _get(session, proxy, "/team/v1/models"))[:2] == (200, "team")
        assert (await _get(session, proxy, "/health"))[0] == 503
        assert (await _get(session, proxy, "/teams/health"))[0] == 503
    assert "/team/v1/models" in team.paths
    team.stop()


async def test_an_application_below_a_prefix_is_woken_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ORIGINS_VARIABLE, "*")
    fallback = await Upstream("proxy").start()
    fallback.delay_s = 60
    proxy = Proxy(tmp_path, fallback, prefix="/team")
    proxy.know()
    await proxy.api.start()
    try:
        async with aiohttp.ClientSession() as session:
            waiting = asyncio.create_task(_get(session, proxy, "/v1/models"))
            async with asyncio.timeout(20):
                while not fallback.paths:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            assert fallback.paths == ["/team/health"]
            page = {"origin": PAGE}
            async with session.get(f"{proxy.address}/v1/models", headers=page) as answer:
                assert answer.status == 404
                assert answer.headers["access-control-allow-origin"] == PAGE
                assert (await answer.json())["error"]["code"] == "not_found"
            await waiting
    finally:
        await proxy.api.stop()
        fallback.stop()


async def test_the_health_of_a_replica_that_hangs_is_known_within_its_second(
    tmp_path: Path,
) -> None:
    hangs = Upstream("a")
    async with proxied(tmp_path, hangs) as proxy, aiohttp.ClientSession() as session:
        hangs.delay_s = 3600
        status, text, _ = await _get(session, proxy, "/health")
        assert status == 504
        assert json.loads(text)["error"]["code"] == "timeout"
    hangs.stop()


async def _get(
    session: aiohttp.ClientSession, proxy: Proxy, path: str
) -> tuple[int, str, Mapping[str, str]]:
    async with session.get(proxy.url + path) as answer:
        return answer.status, await answer.text(), answer.headers


async def _post(session: aiohttp.ClientSession, proxy: Proxy) -> tuple[int, str]:
    async with session.post(f"{proxy.url}/v1/completions", data=b"x") as answer:
        return answer.status, await answer.text()
