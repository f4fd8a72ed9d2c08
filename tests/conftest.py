"""What tests share: model folders, and which modules run at the same time."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from bench import tiny_model
from serve_app.planning import embedded

# No test asserts a time: a busy machine is slow to make an example, and slow to run it.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
# For `make test-fast`; tests/examples.py scales the numbers of single tests likewise.
hypothesis.settings.register_profile(
    "fast", hypothesis.settings.get_profile("busy"), max_examples=25
)

# Each starts whole servers. They run one after another, as Ray gives up a start after 30 s, and
# several engines can keep two cores busy for longer.
SERVERS = (
    "tests/test_life.py",
    "tests/gateway/test_gateway.py",
    "tests/observe/test_observed.py",
    "tests/test_overload.py",
    "tests/scaling/test_autoscaling.py",
    "tests/scaling/test_deploy.py",
    "tests/monitoring/test_faults.py",
    "tests/kuberay/test_deploy.py",
    "tests/replica/test_node_template.py",
    "tests/runpod/test_start.py",
)
# These modules share one server, and those one engine with both lanes.
SERVED = "tests/served/"
LANES = ("tests/lanes/test_contract.py", "tests/lanes/test_restart.py")
# They import vLLM, which takes 15 s of CPU time, so they run in one process: its tests and fixtures
# import it, never the modules themselves, as every worker loads all of them. In this order: those
# that compare vLLM's own names come before engines, which replace some, and before the plugin.
VLLM = (
    "tests/test_upstream.py",
    "tests/gates/test_reading.py",
    "tests/lanes/test_fastlane.py",
    "tests/lanes/test_scheduler.py",
    *LANES,
    "tests/test_continuation.py",
    "tests/replica/test_bounds.py",
    "tests/replica/test_arguments.py",
    "tests/replica/test_engine.py",
    "tests/replica/test_frontends.py",
    "tests/replica/test_hermes.py",
    "tests/replica/test_unreadable.py",
    "tests/replica/test_weightcache.py",
)
# Single tests of these import vLLM or torch; they are marked as server.
VLLM_IN_PART = (
    "tests/caches/test_key.py",
    "tests/planning/test_kernels.py",
    "tests/planning/test_sizing.py",
)
# Each starts an engine or a Ray cluster, or installs an environment.
ENGINES = (
    "tests/test_constraints.py",
    "tests/test_makefile.py",
    "tests/launch/test_doctor.py",
    "tests/launch/test_haproxy_reload.py",
    "tests/planning/test_placement.py",
    "tests/bench/test_chaos.py",
    "tests/bench/test_disturb.py",
    "tests/bench/test_load.py",
    "tests/bench/test_locustfile.py",
    "tests/bench/test_main_path.py",
    "tests/bench/test_run.py",
    "tests/bench/test_tune.py",
    "tests/runpod/test_deploy.py",
    "tests/runpod/test_install.py",
)
# AWS is moto, a server within the process: loading it, and the clients of its services, takes 10 s
# of CPU time once a process.
AWS = tuple(
    f"tests/kuberay/test_{name}.py"
    for name in ("down", "up", "sweep", "cluster", "preflight", "aws", "ttl", "weights")
)
# Each takes more than seven seconds of CPU time: plots, simulations, intervals on known processes.
LONG = (
    "tests/bench/test_interval.py",
    "tests/bench/test_report.py",
    "tests/bench/test_search.py",
    "tests/bench/test_sharing.py",
    "tests/bench/test_simulate.py",
    "tests/bench/test_story.py",
    "tests/bench/test_trials.py",
    "tests/scaling/test_policy.py",
)
# Fixtures that start a server, such as a simulated cloud, HAProxy or PostgreSQL.
SERVER_FIXTURES = {
    "application",
    "aws_server",
    "endpoint",
    "jobs",
    "postgresql",
    "proxy",
    "running",
    "server",
}
# What `make test-fast` leaves out, beside tests with one of the fixtures above.
NOT_FAST = (*SERVERS, SERVED, *VLLM, *ENGINES, *AWS, *LONG)
# The longest first, so that the workers end at about the same time.
FIRST = (
    *SERVERS,
    SERVED,
    *AWS,
    *VLLM,
    "tests/scaling/test_policy.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Load the tests without the garbage collector.

    They are millions of objects that stay. To scan them again and again takes a fifth of the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("fast" if _is_fast(config) else "busy")


def _is_fast(config: pytest.Config) -> bool:
    """Whether this is `make test-fast`."""
    return "not server" in config.option.markexpr


def _together(nodeid: str) -> str:
    """The group of a test: one worker runs all tests of a group."""
    if nodeid.startswith(SERVERS):
        return "servers"
    if nodeid.startswith((*VLLM, *VLLM_IN_PART)):
        return "vllm"
    if nodeid.startswith(AWS):
        return "aws"
    return SERVED if nodeid.startswith(SERVED) else nodeid.split("::")[0]


def _imports_much() -> str:
    """What takes 5 to 15 s of CPU time in each worker; empty if nothing does."""
    return next((f"imports {name}" for name in ("vllm", "torch") if name in sys.modules), "")


_reported = False


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """The first test of `make test-fast` that imports much fails."""
    global _reported
    if _is_fast(item.config) and _imports_much() and not _reported:
        _reported = True
        pytest.fail(f"it {_imports_much()}: mark it as server")


_begun = False


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lower the priority of a worker that starts no servers.

    Tests of servers mostly wait, so the other workers may use the cores meanwhile but must yield
    them. xdist decides which worker gets which tests; its first test shows which kind it is.
    """
    global _begun
    beside = "PYTEST_XDIST_WORKER" in os.environ
    if beside and not _begun and _together(item.nodeid) not in ("servers", SERVED):
        os.nice(4)
    _begun = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _imports_much():
        raise pytest.UsageError(f"a test module {_imports_much()}: import it in its tests")

    def place(item: pytest.Item) -> int:
        result = (at for at, name in enumerate(FIRST) if item.nodeid.startswith(name))
        return next(result, len(FIRST))

    items.sort(key=place)
    for item in items:
        fixtures = SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if fixtures or item.nodeid.startswith(NOT_FAST):
            item.add_marker(pytest.mark.server)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` does not even import the modules that it leaves out."""
    if not _is_fast(config):
        return None
    name = collection_path.relative_to(config.rootpath).as_posix()
    return True if name in NOT_FAST or f"{name}/" in NOT_FAST else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, a free worker takes the next group."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _together(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of two layers."""
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same model with its config.json alone: writing weights imports torch."""
    folder = tmp_path_factory.mktemp("config") / "tiny"
    folder.mkdir()
    names = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(names | tiny_model.architecture()))
    return folder


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct: real weights."""
    if not embedded.converted():  # In a process of its own, because it imports torch.
        code = "from serve_app.planning import embedded; embedded.path()"
        subprocess.run([sys.executable, "-c", code], check=True)
    return embedded.path()
