"""What `make serve` starts before it needs it, and what a replica needs to be forked from it."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from serve_app import app
from serve_app.launch import run, zygotes
from serve_app.launch.zygote import COMMAND, FIRST_VARIABLE, SOCKET_VARIABLE, Request, check
from serve_app.planning import plan
from serve_app.settings import Settings

SETTINGS = Settings.parse({"replicas": {"min": 1, "max": 2}})


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygotes, "local_gpus", lambda: ())


def test_there_are_none_unless_they_are_asked_for() -> None:
    with zygotes.running({"A": "b"}, SETTINGS) as environment:
        assert environment == {}


def test_they_end_with_who_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygotes, "_RAY_MODULES", ("colorsys",))
    monkeypatch.setattr(zygotes, "_WORKER_MODULES", ())
    monkeypatch.setattr(zygotes, "_ENGINE_MODULES", ("sndhdr",))
    environ = {**os.environ, zygotes.SWITCH_VARIABLE: "1", "PYTHONPATH": os.getcwd()}
    with zygotes.running(environ, SETTINGS) as more:
        of = {SOCKET_VARIABLE: "colorsys", zygotes.ENGINE_SOCKET_VARIABLE: "sndhdr"}
        for variable, module in of.items():
            # An engine's zygote forks only for who has the environment of a replica.
            whole = {**environ, **more, SOCKET_VARIABLE: more[variable]}
            if module == "sndhdr":
                whole = zygotes.engine_environment(whole, SETTINGS)
            code = f"import sys; print({module!r} in sys.modules)"
            done = subprocess.run(
                [COMMAND, "-c", code], env=whole, capture_output=True, text=True, timeout=120
            )
            assert done.stdout == "True\n", done.stderr
        folder = Path(more[SOCKET_VARIABLE]).parent
    assert not folder.exists()


@pytest.mark.parametrize("threads", [None, 3])
def test_a_replica_has_the_environment_of_its_zygote(
    threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zygote starts before the application is built, and elsewhere; they must agree."""
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(zygotes, "cpu_threads", lambda settings: 3)
    if threads is None:
        monkeypatch.setattr(zygotes, "local_gpus", lambda: ("a GPU",))
    monkeypatch.setenv(zygotes.ENGINE_SOCKET_VARIABLE, "/there")
    at_imports = zygotes.engine_environment(os.environ, SETTINGS)
    found = zygotes.runtime_env(threads, SETTINGS)
    assert found["py_executable"] == str(COMMAND)
    assert found["env_vars"][SOCKET_VARIABLE] == "/there"
    of_worker = {**os.environ, **found["env_vars"]}
    check(Request(("x.py",), of_worker, "/", (), (), 1), at_imports)
    # Where it is forked, its fork server comes first.
    module, _, function = of_worker[FIRST_VARIABLE].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_what_a_replica_sets_itself_is_what_its_zygote_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = plan.cpu_threads(SETTINGS)
    assert plan.environment(threads).items() <= zygotes.engine_environment({}, SETTINGS).items()


def test_a_deployment_names_the_zygote_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(zygotes.ENGINE_SOCKET_VARIABLE, raising=False)
    decided = plan.decide_on(SETTINGS, [])
    assert "runtime_env" not in app._options(SETTINGS, decided)["ray_actor_options"]
    monkeypatch.setenv(zygotes.ENGINE_SOCKET_VARIABLE, "/there")
    options = app._options(SETTINGS, decided)["ray_actor_options"]
    assert options["runtime_env"]["py_executable"] == str(COMMAND)


# --- the dashboard --------------------------------------------------------------------------


def test_the_dashboard_starts_when_the_server_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        _webui_url: str | None = None

    started = threading.Event()
    asked: dict[str, Any] = {}

    def start(node: Node, **options: Any) -> None:
        asked.update(options)
        started.set()

    monkeypatch.setattr(run, "_start_api_server", start)
    dashboard = run.LateDashboard()
    node = Node()
    dashboard.start(node, include_dashboard=None, raise_on_failure=True)
    assert node._webui_url == ""  # What Ray passes on as text.
    assert not started.wait(0.2)
    dashboard.due.set()
    assert started.wait(30)
    # A dashboard that does not start must not end a server that serves.
    assert asked == {"include_dashboard": None, "raise_on_failure": False}


def test_a_start_that_hangs_has_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    monkeypatch.setattr(run, "_start_api_server", lambda node, **options: started.set())
    monkeypatch.setattr(run, "_DASHBOARD_S", 0.05)
    run.LateDashboard().start(type("Node", (), {})(), include_dashboard=True, raise_on_failure=True)
    assert started.wait(30)


def test_the_launchers_word_is_heard_before_ray_starts() -> None:
    """SIGUSR1 would end a process that does not wait for it."""
    code = (
        "import os, signal\n"
        "from serve_app.launch import run\n"
        "def cli():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    print('goes on')\n"
        "run.cli = cli\n"
        "run.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "goes on\n", done.stderr
