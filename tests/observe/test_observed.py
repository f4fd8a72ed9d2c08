"""A real server under the eyes of a real Prometheus, a real collector and a real browser."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.monitoring.prometheus import RULES, Prometheus
from serve_app.monitoring.rows import ROWS
from serve_app.monitoring.status import COLUMNS, FIGURES, STARTS
from tests.server import ROOT, Server, apart, configuration, launched, wait
from tests.services.collector import Collector, collecting

PORT, PROMETHEUS_PORT, STATUS_PORT = 8830, 8831, 8832
KEY, PROMPT = "sk-planted-key-5f1c", "planted prompt words"
ASKED = 6
# Ray's agents tell every 10 s what they were told every 5; Prometheus looks every 5.
_SEEN_S = 180.0


@dataclass
class Watched:
    """The server, who watches it, and what its client counted."""

    server: Server
    collector: Collector
    logs: Path
    observing: "subprocess.Popen[bytes] | None" = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    request_id: str = ""

    @property
    def prometheus(self) -> Prometheus:
        return Prometheus(f"http://127.0.0.1:{PROMETHEUS_PORT}")

    def value(self, expression: str) -> float:
        result = self.prometheus.instant(expression)
        return sum(sample.value for sample in result)


@pytest.fixture(scope="module")
def watched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("observed")
    (folder / "keys").write_text(f"team-a {KEY}\n")
    with collecting() as collector:
        config = configuration(
            PORT,
            model=str(tiny),
            served_model_name="m",
            template=True,
            cpus_per_replica=0.5,
            replicas={"min": 1, "max": 2},
            gateway={"enabled": True, "cpus": 0.1},
            api_keys={"file": str(folder / "keys")},
            observe={"traces_endpoint": collector.url, "price_per_gpu_hour": 2.0},
            engine={"dtype": "float32", "max_model_len": 512},
        )
        with launched(config, folder) as server:
            assert server.ready(), server.output()
            logs = Path(f"/tmp/ray-{PORT}/ray/session_latest/logs")
            here = Watched(server, collector, logs)
            here.observing = _observe(folder) if shutil.which("prometheus") else None
            try:
                # The page is there once Prometheus is.
                assert here.observing is None or wait(_page), (folder / "observe.log").read_text()
                _ask(here)
                yield here
            finally:
                if here.observing is not None and here.observing.poll() is None:
                    here.observing.send_signal(signal.SIGTERM)
                    here.observing.wait(30)


def _observe(folder: Path) -> "subprocess.Popen[bytes]":
    with open(folder / "observe.log", "wb") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "serve_app", "observe"),
                *("--prometheus-port", str(PROMETHEUS_PORT), "--status-port", str(STATUS_PORT)),
            ],
            cwd=ROOT,
            env={**os.environ, **apart(PORT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _page() -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{STATUS_PORT}/").status_code == 200
    return False


def _ask(here: Watched) -> None:
    with httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        for at in range(ASKED):
            body = {"model": "m", "prompt": f"{PROMPT} {at}", "max_tokens": 5 + at}
            body |= {"ignore_eos": True, "stream": at % 2 == 0}
            if body["stream"]:
                body["stream_options"] = {"include_usage": True}
            answer = client.post(f"{here.server.url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            text = answer.text
            if body["stream"]:
                text = text.split("\n\n")[-3].removeprefix("data: ")
            usage = json.loads(text)["usage"]
            here.prompt_tokens += usage["prompt_tokens"]
            here.generated_tokens += usage["completion_tokens"]
            here.request_id = answer.headers["x-request-id"]
        assert client.post(f"{here.server.url}/v1/completions", json={"n": 99}).status_code == 400
        stranger = {"authorization": "Bearer wrong"}
        assert client.get(f"{here.server.url}/v1/models", headers=stranger).status_code == 401


@pytest.fixture
def prometheus(watched: Watched) -> Prometheus:
    if watched.observing is None:
        pytest.skip("prometheus is not on PATH")
    return watched.prometheus


def test_prometheus_counts_what_the_client_counted(
    watched: Watched, prometheus: Prometheus
) -> None:
    request = 'ray_serve_app_requests_total{route="/v1/completions", tenant="team-a", model="m"'
    expected = {
        f'{request}, status="200"}}': ASKED,
        f'{request}, status="400"}}': 1,
        'ray_serve_app_requests_total{status="401", tenant="anonymous"}': 1,
        "ray_serve_app_prompt_tokens_total": watched.prompt_tokens,
        "ray_serve_app_generated_tokens_total": watched.generated_tokens,
        "ray_serve_app_time_to_first_token_seconds_count": ASKED // 2,
        "ray_serve_app_queue_duration_seconds_count": ASKED,
        "ray_serve_app_replica_price_dollars_per_hour": 2.0,
        # vLLM's own, beside ours; the engine's warm-up asked twice.
        "ray_vllm_request_success_total": ASKED + 2,
        'up{job="haproxy"}': 1,
    }

    def seen() -> dict[str, float]:
        return {expression: watched.value(expression) for expression in expected}

    # Each process tells in its own time.
    assert wait(lambda: seen() == expected, _SEEN_S), seen()


def test_every_figure_of_the_page_has_data(watched: Watched, prometheus: Prometheus) -> None:
    def empty() -> list[str]:
        rates = {figure.name: figure.expression for figure in FIGURES} | dict(COLUMNS)
        rates["starts"] = STARTS
        return [name for name, text in rates.items() if not prometheus.instant(text)]

    assert wait(lambda: not empty(), _SEEN_S), empty()
    status = httpx.get(f"http://127.0.0.1:{STATUS_PORT}/status.json", timeout=30).json()
    figures = {figure["name"]: figure for figure in status["figures"]}
    assert figures["replicas"]["value"] == 1
    assert not figures["replicas"]["bad"]
    # 15 minutes, of which the server was there for the last.
    assert {len(figure["past"]) for figure in status["figures"]} == {91}
    assert figures["under way"]["past"][0] is None
    assert any(value is not None for value in figures["under way"]["past"])
    assert {row["replica"].split()[0] for row in status["replicas"]} >= {"engine"}
    (start,) = (row for row in status["starts"] if row["starts"] == "start")
    assert start["whole"] > start["weights"] > 0


def test_every_panel_has_data(watched: Watched, prometheus: Prometheus) -> None:
    """Every expression of the dashboard, after some load, but for what needs a GPU."""
    expressions = {
        f"{panel.title}: {legend}": expression.replace("$model", ".*").replace(
            "$__rate_interval", "5m"
        )
        for row in ROWS
        for panel in row.panels
        for legend, expression in panel.queries.items()
        if panel.title not in {"GPUs", "GPU memory", "Power of the GPUs"}
    }
    assert len(expressions) > 50

    def empty() -> list[str]:
        # What came before the first look at a counter has no rate.
        _ask(watched)
        return [name for name, text in expressions.items() if not prometheus.instant(text)]

    # The objective is looked at once a minute.
    assert wait(lambda: not empty(), 3 * _SEEN_S), "\n".join(empty())


def test_every_metric_of_an_alert_is_there(watched: Watched, prometheus: Prometheus) -> None:
    rules = yaml.safe_load(RULES.read_text())
    text = " ".join(rule["expr"] for group in rules["groups"] for rule in group["rules"])
    metrics = set(re.findall(r"(?<![:\w])(?:ray|haproxy)_\w+", text))
    assert len(metrics) > 20

    def absent() -> list[str]:
        return [name for name in metrics if not prometheus.instant(name)]

    assert wait(lambda: not absent(), _SEEN_S), absent()


def test_the_page_in_a_browser(watched: Watched, prometheus: Prometheus) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
        *("--virtual-time-budget=8000", "--dump-dom", f"http://127.0.0.1:{STATUS_PORT}/"),
    ]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "the last 15 minutes" in page
    for figure in FIGURES:
        assert figure.name in page
    assert "<td>engine " in page


def test_a_request_is_one_trace_from_gateway_to_engine(watched: Watched) -> None:
    def chain() -> list[str]:
        spans = {span.id: span for span in watched.collector.spans}
        leaves = [span for span in spans.values() if span.name == "llm_request"]
        if len(leaves) < ASKED:
            return []
        result, span = [], leaves[-1]
        while True:
            result.append(span.service)
            if span.parent not in spans:
                return result
            assert spans[span.parent].trace == span.trace
            span = spans[span.parent]

    assert wait(lambda: len(chain()) == 3, 60), [
        (s.service, s.name) for s in watched.collector.spans
    ]
    assert chain()[1:] == ["engine", "gateway"]
    assert PROMPT not in str(watched.collector.spans)
    assert KEY not in str(watched.collector.spans)


def test_the_clients_id_finds_its_request_in_every_log(watched: Watched) -> None:
    def lines() -> dict[str, dict[str, Any]]:
        every = (watched.logs / "serve_app").glob("*.log")
        parsed = [json.loads(line) for path in every for line in path.read_text().splitlines()]
        return {
            line["deployment"]: line
            for line in parsed
            if line.get("request_id") == watched.request_id and line["event"] == "request"
        }

    assert wait(lambda: set(lines()) == {"gateway", "engine"}, 60), lines()
    for line in lines().values():
        assert (line["tenant"], line["status"], line["model"]) == ("team-a", 200, "m")


def test_no_log_holds_a_prompt_or_a_key(watched: Watched) -> None:
    """In none of the files of Ray's session, ours among them, nor in what is printed."""
    files = [path for path in watched.logs.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in [*files, watched.server.log]:
        content = path.read_bytes()
        assert KEY.encode() not in content, path
        assert PROMPT.encode() not in content, path


def test_observe_ends_what_it_started(watched: Watched, prometheus: Prometheus) -> None:
    assert watched.observing is not None
    watched.observing.send_signal(signal.SIGTERM)
    assert watched.observing.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{PROMETHEUS_PORT}/-/ready")
