"""Every alert fires at a real fault of a real server, and clears when the fault is gone.

The rules are those of rules.yaml with shorter durations, so that it takes minutes and not hours;
the server, its engine, Ray, HAProxy and Prometheus are real, and so are the faults.
"""

import asyncio
import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.monitoring import prometheus as client
from tests.server import Server, apart, configuration, launched, wait

pytestmark = pytest.mark.slow

PORT, PROMETHEUS_PORT = 8810, 8819
# A tenth of each duration; of half an hour and more a thirtieth, which a test can wait for.
FASTER, MUCH_FASTER, LONG_S = 10, 30, 1800
# Also how long a scrape may take: on two busy cores Ray's agent needs more than a second, and a
# scrape that fails ends every series and every alert that is pending.
SCRAPE_S = 3


@dataclass
class Watched:
    server: Server
    prometheus: client.Prometheus

    def firing(self) -> set[str]:
        alerts = self.prometheus.alerts()
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def fires(self, *names: str, within_s: float = 150) -> set[str]:
        """Those of `names` that did not fire within the time."""
        seen: set[str] = set()

        def all_seen() -> bool:
            seen.update(self.firing())
            return set(names) <= seen

        wait(all_seen, within_s)
        return set(names) - seen

    def clears(self, *names: str, within_s: float = 200) -> bool:
        return wait(lambda: not self.firing() & set(names), within_s)

    def process(self, title: str) -> psutil.Process:
        return next(p for p in self.server.family() if title in " ".join(p.cmdline()))


def faster(rules: str) -> str:
    def shorter(expected: re.Match[str]) -> str:
        seconds = int(expected[1]) * {"s": 1, "m": 60, "h": 3600}[expected[2]]
        return f"{max(1, seconds // (FASTER if seconds < LONG_S else MUCH_FASTER))}s"

    rules = re.sub(r"(?<=[\[: ])(\d+)([smh])(?![\w.])", shorter, rules)
    return rules.replace("600 * deriv", f"{600 // FASTER} * deriv")


@pytest.fixture(scope="module")
def watched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not on PATH")
    folder = tmp_path_factory.mktemp("faults")
    config = configuration(
        PORT,
        model=str(tiny),
        served_model_name="m",
        replicas={"min": 0, "max": 1, "idle_s": 3600.0, "ttft_s": 1.0, "itl_s": None},
        cpus_per_replica=0.5,
        hang_timeout_s=300.0,
        limits={"queue_timeout_s": 20.0},
        # Room for 40 blocks: three sequences of 400 tokens, and the others lose their place.
        engine={
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 12,
            "block_size": 32,
            "num_gpu_blocks_override": 40,
        },
    )
    quick = {"RAY_metrics_report_interval_ms": "2000"}
    with launched(config, folder, **quick) as server:
        assert server.ready(), server.output()
        rules = folder / "rules.yaml"
        rules.write_text(faster(client.RULES.read_text()))
        base = Path(apart(PORT)["RAY_TMPDIR"]) / "ray" / "prom_metrics_service_discovery.json"
        haproxy = f"127.0.0.1:{apart(PORT)['RAY_SERVE_HAPROXY_METRICS_PORT']}"
        text = client.configuration(base, haproxy, interval_s=SCRAPE_S)
        (folder / "p.yml").write_text(text.replace(str(client.RULES), str(rules)))
        url = f"127.0.0.1:{PROMETHEUS_PORT}"
        command = [
            *(program, f"--config.file={folder / 'p.yml'}", f"--web.listen-address={url}"),
            *(f"--storage.tsdb.path={folder / 'data'}", "--log.level=error"),
        ]
        with subprocess.Popen(command) as process:
            try:
                result = Watched(server, client.Prometheus(f"http://{url}"))
                assert wait(lambda: _ready(url), 30)
                assert wait(lambda: bool(result.prometheus.instant("ray_gcs_actors_count")), 60)
                yield result
            finally:
                process.terminate()


def _ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://{url}/-/ready").is_success
    return False


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


class Load:
    """Clients that ask again and again; more of them with time."""

    def __init__(self, url: str, clients: int, every_s: float, tokens: int) -> None:
        self._url, self._clients, self._every_s, self._tokens = url, clients, every_s, tokens

    async def __aenter__(self) -> "Load":
        self._session = httpx.AsyncClient(timeout=120)
        self._tasks = [asyncio.create_task(self._ask(at)) for at in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.aclose()

    async def _ask(self, at: int) -> None:
        await asyncio.sleep(at * self._every_s)
        body = {"model": "m", "prompt": f"client {at}", "max_tokens": self._tokens}
        body |= {"ignore_eos": True, "stream": True}
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await self._session.post(f"{self._url}/v1/completions", json=body)
                if not answer.is_success:
                    await asyncio.sleep(0.5)


def test_nothing_fires_while_all_is_well(watched: Watched) -> None:
    assert watched.server.answers(30)
    assert watched.firing() == set()


async def test_overload(watched: Watched) -> None:
    expected = ("QueueGrowing", "AutoscalerAtMaximum", "KvCacheFull", "SloBurnFast", "SloBurnSlow")
    async with Load(watched.server.url, clients=60, every_s=2.5, tokens=400):
        assert not await asyncio.to_thread(watched.fires, *expected, within_s=240)
    # The budget's burn is over when its short window is.
    assert await asyncio.to_thread(watched.clears, *expected)


async def test_a_hung_engine(watched: Watched) -> None:
    expected = ("EngineHung",)
    async with Load(watched.server.url, clients=4, every_s=0.0, tokens=100):
        with stopped(watched.process("VLLM::EngineCore")):
            assert not await asyncio.to_thread(watched.fires, *expected)
        assert await asyncio.to_thread(watched.clears, *expected)


async def test_replicas_that_die(watched: Watched) -> None:
    async with Load(watched.server.url, clients=3, every_s=0.0, tokens=20):
        # Serve's count of starts must have been there for a while.
        await asyncio.sleep(5)
        expected = {"ReplicaRestarts", "NoReadyReplica"}
        missed: set[str] = set(expected)
        for _ in range(4):
            watched.process("ray::ServeReplica:llm:engine").kill()
            missed &= await asyncio.to_thread(watched.fires, *expected, within_s=25)
            assert await asyncio.to_thread(watched.server.answers, 120)
            if not missed:
                break
        assert not missed
        assert await asyncio.to_thread(watched.clears, *expected, within_s=240)


async def test_the_controller_is_silent(watched: Watched) -> None:
    with stopped(watched.process("ray::ServeController")):
        assert not await asyncio.to_thread(watched.fires, "ControllerSilent")
    assert await asyncio.to_thread(watched.clears, "ControllerSilent")


async def test_a_node_is_silent(watched: Watched) -> None:
    with stopped(watched.process("ray::DashboardAgent")):
        assert not await asyncio.to_thread(watched.fires, "NodeDown", "HeadDown")
    assert await asyncio.to_thread(watched.clears, "NodeDown", "HeadDown")


async def test_requests_that_take_too_long(watched: Watched) -> None:
    """An engine stands still for longer than requests may wait for room."""
    expected = ("ErrorRatio", "ProxyErrorRatio")
    async with Load(watched.server.url, clients=30, every_s=0.0, tokens=100):
        with stopped(watched.process("VLLM::EngineCore")):
            assert not await asyncio.to_thread(watched.fires, *expected, within_s=90)
    assert await asyncio.to_thread(watched.clears, *expected)
