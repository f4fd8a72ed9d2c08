"""What tells the launcher to stop, and what it sets in Ray's environment."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bench.engine.systems import apart
from serve_app.errors import ConfigError
from serve_app.launch import launcher
from serve_app.launch.haproxy_rules import SECRET_VARIABLE
from serve_app.settings import Settings
from tests.server import ROOT, configuration

_WAITS = """
import time
from serve_app.launch import launcher
with launcher._signals() as stop:
    print("waits", flush=True)
    while not stop.is_set():
        time.sleep(0.01)
    print("told to stop", flush=True)
"""


def waiting(prepare: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITS], stdout=subprocess.PIPE, text=True, preexec_fn=prepare
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_of_these_stops_in_order(number: signal.Signals) -> None:
    process = waiting(lambda: signal.signal(number, signal.default_int_handler))
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("told to stop\n", None)
    assert process.returncode == 0


def test_under_nohup_it_outlives_its_terminal() -> None:
    process = waiting(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("told to stop\n", None)


@pytest.mark.parametrize(
    "variable", ["RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"]
)
def test_a_taken_port_of_haproxy_is_named_with_what_sets_it(
    variable: str, tmp_path: Path, tiny_config: Path
) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(configuration(8827, model=str(tiny_config))))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "serve_app", "serve", "--config", str(path)],
            env={**os.environ, **apart(8827), variable: str(number)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 2
    (line,) = (ended.stdout + ended.stderr).strip().splitlines()
    assert f"{variable} = {number}: cannot listen" in line
    assert f"set {variable} to another port" in line


def config_with(tmp_path: Path, **application: object) -> Path:
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"name": "llm", "args": {}, **application}]}))
    return path


@pytest.mark.parametrize(
    ("application", "prefix"),
    [
        ({}, ""),
        ({"route_prefix": "/"}, ""),
        ({"route_prefix": "/team"}, "/team"),
        ({"route_prefix": "/team/a-1.b_c~"}, "/team/a-1.b_c~"),
    ],
)
def test_the_api_is_below_the_prefix(
    application: dict[str, object], prefix: str, tmp_path: Path
) -> None:
    config = launcher.load(config_with(tmp_path, **application))
    assert launcher.prefix_of(config) == prefix


@pytest.mark.parametrize("prefix", [None, "", "team", "/team/", "//", "/a b", "/{a}", "/ä", 5])
def test_a_prefix_that_nothing_reaches_is_one_sentence(prefix: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be / or a path as /team"):
        launcher.load(config_with(tmp_path, route_prefix=prefix))


ASLEEP = {"replicas": {"min": 0, "max": 1}, "limits": {"request_timeout_s": 900.0}}


@pytest.mark.parametrize(
    ("args", "environment", "named"),
    [
        ({}, {}, ()),  # HAProxy's defaults are those of the settings.
        ({}, {"SERVE_APP_REPLICA_TIMEOUT_S": "30"}, ()),
        ({}, {"SERVE_APP_REPLICA_TIMEOUT_S": "5"}, ("SERVE_APP_REPLICA_TIMEOUT_S=30",)),
        (ASLEEP, {}, ("SERVE_APP_REPLICA_TIMEOUT_S=900", "SERVE_APP_SCALES_TO_ZERO=1")),
        (ASLEEP, {"SERVE_APP_REPLICA_TIMEOUT_S": "900"}, ("SERVE_APP_SCALES_TO_ZERO=1",)),
        ({"limits": {"body_timeout_s": 5.0}}, {}, ("SERVE_APP_BODY_TIMEOUT_S=5",)),
        ({"api_keys": {"env": "KEYS"}}, {}, ("SERVE_APP_KEYS_REQUIRED=1",)),
        ({"tenants": {"file": "tenants.yaml"}}, {}, ("SERVE_APP_KEYS_REQUIRED=1",)),
        ({"engine": {"allowed_origins": ["*"]}}, {}, ("SERVE_APP_ALLOWED_ORIGINS=*",)),
        ({"gateway": {"replica_timeout_s": 5.0}}, {}, ("SERVE_APP_REPLICA_TIMEOUT_S=5",)),
    ],
)
def test_what_rays_environment_lacks_is_named(
    args: dict[str, object], environment: dict[str, str], named: tuple[str, ...]
) -> None:
    problem = launcher.unmet(Settings.parse(args), environment)
    assert (problem is None) == (not named)
    assert all(each in str(problem) for each in named)
    settings = Settings.parse(args)
    assert launcher.unmet(settings, launcher.environment_for(settings)) is None


def test_each_start_has_a_secret_of_its_own_where_there_is_a_fast_lane() -> None:
    auto, python = Settings.parse({"lane": "auto"}), Settings.parse({"lane": "python"})
    first, second = (launcher.environment_for(auto)[SECRET_VARIABLE] for _ in range(2))
    assert first != second
    assert len(first) > 30
    assert SECRET_VARIABLE not in launcher.environment_for(python)
