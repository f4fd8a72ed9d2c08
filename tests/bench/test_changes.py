"""Changes to a running application: what an operator edits, and when a change is there."""

import argparse
import copy
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.experiments import changes


class Dashboard(http.server.ThreadingHTTPServer):
    """What Ray's dashboard says of one application, as a test sets it; None: it does not answer."""

    details: Any = None


class _Said(http.server.BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        if self.server.details is None or self.path != "/api/serve/applications/":
            self.send_error(503)
            return
        body = json.dumps(self.server.details).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard(("127.0.0.1", 0), _Said) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def options(dashboard: Dashboard, step: str = "engine") -> argparse.Namespace:
    host, port = dashboard.server_address[:2]
    return argparse.Namespace(dashboard=f"http://{host}:{port}", step=step, port=9, out=Path())


def application(*ids: str, target: int | None = None, **other: str) -> dict[str, Any]:
    replicas = [{"replica_id": name, "state": "RUNNING"} for name in ids]
    deployment = {
        "status": "HEALTHY",
        "target_num_replicas": len(ids) if target is None else target,
        "replicas": replicas,
    }
    app = {"status": "RUNNING", "deployments": {"engine": deployment}} | other
    return {"applications": {"llm": app}}


def test_at_rest_is_when_all_run_that_are_to(dashboard: Dashboard) -> None:
    request = options(dashboard)
    assert changes._settled(request) is None  # It does not answer.
    dashboard.details = application("a", "b")
    assert changes._settled(request) == {"a", "b"}
    dashboard.details = application("a", "b", target=3)
    assert changes._settled(request) is None
    dashboard.details = application("a", "b", status="DEPLOYING")
    assert changes._settled(request) is None
    leaving = application("a", "b")
    leaving["applications"]["llm"]["deployments"]["engine"]["replicas"][1]["state"] = "STOPPING"
    dashboard.details = leaving
    assert changes._settled(request) is None
    dashboard.details = {"applications": {}}
    assert changes._settled(request) is None


CONFIG = {
    "applications": [
        {
            "args": {
                "replicas": 3,
                "stream_gap_ms": 50.0,
                "engine": {"max_model_len": 4096},
                "gateway": {"enabled": False},
            }
        }
    ]
}


def test_a_new_version_is_there_when_nobody_of_the_old_one_is(dashboard: Dashboard) -> None:
    for step in ("engine", "version"):
        there = changes._is_applied(options(dashboard, step), CONFIG, {"a", "b", "c"})
        dashboard.details = application("d", "b", "c")
        assert not there()
        dashboard.details = application("d", "e")
        assert not there()
        dashboard.details = application("d", "e", "f")
        assert there()


def test_another_size_is_there_when_so_many_run_and_nobody_was_replaced(
    dashboard: Dashboard,
) -> None:
    there = changes._is_applied(options(dashboard, "up"), CONFIG, {"a", "b"})
    dashboard.details = application("a", "b")
    assert not there()
    dashboard.details = application("a", "c", "d")
    assert not there()
    dashboard.details = application("a", "b", "c")
    assert there()
    fewer: dict[str, Any] = copy.deepcopy(CONFIG)
    changes._changed(fewer, "down")
    there = changes._is_applied(options(dashboard, "down"), fewer, {"a", "b", "c"})
    dashboard.details = application("d", "e")
    assert not there()
    dashboard.details = application("c", "a")
    assert there()


def test_each_change_is_what_an_operator_would_edit() -> None:
    def changed(step: str, gateway: bool = False) -> dict[str, Any]:
        config: dict[str, Any] = copy.deepcopy(CONFIG)
        config["applications"][0]["args"]["gateway"]["enabled"] = gateway
        changes._changed(config, step)
        result: dict[str, Any] = config["applications"][0]
        return result

    assert changed("engine")["args"]["engine"]["max_num_seqs"] == 48
    assert changed("version")["args"]["stream_gap_ms"] != 50.0
    # Neither size nor limits are in args, of which a change would replace every replica.
    for step, wanted in (("down", 2), ("up", 4)):
        resized = changed(step)
        assert resized["args"] == CONFIG["applications"][0]["args"]
        assert resized["deployments"] == [{"name": "engine", "num_replicas": wanted}]
    limits = changed("limits")
    assert limits["args"] == CONFIG["applications"][0]["args"]
    assert limits["deployments"] == [
        {"name": "engine", "user_config": {"limits": {"max_tokens": 3096}}}
    ]
    again = {"applications": [limits]}
    changes._changed(again, "down")
    changes._changed(again, "up")
    assert limits["deployments"] == [
        {
            "name": "engine",
            "user_config": {"limits": {"max_tokens": 3096}},
            "num_replicas": 3,
        }
    ]
    both = changed("limits", gateway=True)["deployments"]
    assert [deployment["name"] for deployment in both] == ["engine", "gateway"]


def test_a_change_of_what_is_not_at_rest_is_refused(
    dashboard: Dashboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = options(dashboard)
    request.out = tmp_path
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(CONFIG))
    dashboard.details = application("a", status="DEPLOYING")
    assert changes.apply(request) == 1
    assert "not at rest" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "serve_config.yaml").read_text()) == CONFIG
