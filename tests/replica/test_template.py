"""The template forks what stand-ins ask for, or says why not; nothing is left of either."""

import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest

from serve_app.launch import template as launched
from serve_app.planning.placement import Placement
from serve_app.planning.plan import Plan
from serve_app.replica import template, worker
from serve_app.settings import Settings
from tests.server import ROOT, wait

# A module that nothing else imports, so that who has it was forked.
_MODULE = "antigravity_of_tests"
_TELLS = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv[1:], "folder": os.getcwd(), "pid": os.getpid(), "parent": os.getppid(),
    "imported": "antigravity_of_tests" in sys.modules,
    "environment": dict(os.environ), "name": __name__,
}), flush=True)
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
"""
_WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("told", flush=True), os._exit(5)))
print(os.getpid(), flush=True)
sys.stdin.read()
"""
# Starts its arguments as Ray's raylet starts a worker.
_RAYLET = """
import os, subprocess, sys
sys.exit(subprocess.call(sys.argv[1:], env={**os.environ, "RAY_RAYLET_PID": str(os.getpid())}))
"""


@dataclass
class Running:
    """A template with one cheap module, and the environment that its workers have."""

    process: subprocess.Popen[bytes]
    name: str
    environment: dict[str, str]
    folder: Path

    def stand_in(
        self, script: str, *arguments: str, raylet: bool = False, **variables: str
    ) -> subprocess.Popen[str]:
        """A stand-in, or a raylet that has started one."""
        path = self.folder / f"{secrets.token_hex(4)}.py"
        path.write_text(script)
        before = [sys.executable, "-c", _RAYLET] if raylet else []
        return subprocess.Popen(
            [*before, sys.executable, "-I", "-S", worker.__file__, str(path), *arguments],
            env={**self.environment, **variables},
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def told(self, *arguments: str, **variables: str) -> tuple[int, dict[str, Any], int]:
        """The pid of a stand-in, what its worker printed, and its exit status."""
        process = self.stand_in(_TELLS, *arguments, **variables)
        output, _ = process.communicate(timeout=60)
        return process.pid, json.loads(output), process.returncode

    def waiting(self, raylet: bool = False) -> tuple[subprocess.Popen[str], psutil.Process]:
        """A stand-in or a raylet, and its worker, which waits for the end of its input."""
        process = self.stand_in(_WAITS, raylet=raylet)
        assert process.stdout is not None
        return process, psutil.Process(int(process.stdout.readline()))


@contextlib.contextmanager
def started(folder: Path, *imports: str, owned: bool = True) -> Iterator[Running]:
    lines = [f"import {name}" for name in ("os", *imports)]
    (folder / f"{_MODULE}.py").write_text("\n".join([*lines, "os.environ['SET_BY_IMPORT'] = '1'"]))
    name = f"serve-app-test-{secrets.token_hex(8)}"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT}",
        worker.NAME_VARIABLE: name,
    }
    options = ["--ends-with-stdin"] if owned else []
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.replica.template", *options, name, _MODULE],
        env=environment,
        cwd=folder,
        stdin=subprocess.PIPE,
    )
    running = Running(process, name, environment, folder)
    try:
        assert wait(lambda: name in Path("/proc/net/unix").read_text())
        yield running
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("template")) as template:
        yield template


def gone(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_worker_is_forked_with_what_is_its_own(running: Running) -> None:
    pid, told, status = running.told("3", "x y", CUDA_VISIBLE_DEVICES="7")
    assert told["imported"]
    assert (told["parent"], told["name"]) == (running.process.pid, "__main__")
    assert told["pid"] != pid
    assert (told["argv"], told["folder"]) == (["3", "x y"], str(running.folder))
    assert told["environment"]["CUDA_VISIBLE_DEVICES"] == "7"
    assert told["environment"]["SET_BY_IMPORT"] == "1"
    assert worker.REFUSAL_VARIABLE not in told["environment"]
    assert status == 3


def test_a_worker_can_be_interrupted_as_any_python(running: Running) -> None:
    script = """
import signal
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    assert running.stand_in(script).communicate(timeout=60)[0] == "True\n"


def test_a_worker_may_open_as_many_files_as_its_stand_in(running: Running) -> None:
    script = """
import resource, sys
print("antigravity_of_tests" in sys.modules, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    before = soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, most))
    try:
        process = running.stand_in(script)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert process.communicate(timeout=60)[0].split() == ["True", str(soft - 1)]


def test_another_environment_imports_for_itself(running: Running) -> None:
    pid, told, status = running.told("4", VLLM_SOMETHING="1")
    assert (told["pid"], told["imported"], status) == (pid, False, 4)
    assert "VLLM_SOMETHING" in told["environment"][worker.REFUSAL_VARIABLE]


def test_without_a_template_it_imports_for_itself(running: Running) -> None:
    pid, told, status = running.told("5", **{worker.NAME_VARIABLE: "serve-app-nobody"})
    assert (told["pid"], told["imported"], status) == (pid, False, 5)
    assert told["environment"][worker.REFUSAL_VARIABLE]


def test_a_template_that_dies_while_it_imports_stops_no_start(tmp_path: Path) -> None:
    with started(tmp_path) as running:
        running.process.send_signal(signal.SIGSTOP)
        stand_in = running.stand_in(_TELLS)
        assert wait(lambda: len(psutil.Process(stand_in.pid).net_connections("unix")) == 1)
        running.process.kill()
        output, _ = stand_in.communicate(timeout=60)
    assert json.loads(output)["pid"] == stand_in.pid


def test_the_status_of_a_worker_may_come_with_its_pid() -> None:
    """A worker that ended at once: both messages were read as one, which is not JSON."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    name = f"serve-app-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()

        def template() -> None:
            connection, _ = listener.accept()
            with connection:
                (size,) = struct.unpack("!I", connection.recv(4))
                connection.recv(size, socket.MSG_WAITALL)
                pid = json.dumps({"pid": ended.pid})
                connection.sendall(f'{pid}\n{{"status": 3}}\n'.encode())

        thread = threading.Thread(target=template)
        thread.start()
        raylet = os.pidfd_open(os.getpid())
        try:
            assert worker.fork(name, []).wait(raylet) == 3
        finally:
            os.close(raylet)
            thread.join()


def test_a_killed_stand_in_takes_its_worker_along(running: Running) -> None:
    stand_in, forked = running.waiting()
    stand_in.kill()
    stand_in.wait()
    assert wait(lambda: gone(forked.pid))


def test_a_stand_in_is_called_after_its_worker(running: Running) -> None:
    process, forked = running.waiting()
    assert wait(lambda: psutil.Process(process.pid).name() == f"for {forked.pid}")
    process.communicate(timeout=60)


def test_signals_reach_the_worker_and_its_status_the_caller(running: Running) -> None:
    stand_in, _ = running.waiting()
    stand_in.terminate()
    assert stand_in.wait(60) == 5
    assert stand_in.communicate()[0] == "told\n"


def test_the_end_of_a_workers_process_group_ends_no_other(running: Running) -> None:
    """Ray kills the process group of a worker that has ended."""
    stand_in, forked = running.waiting()
    other_stand_in, other = running.waiting()
    assert os.getpgid(forked.pid) == forked.pid
    os.killpg(forked.pid, signal.SIGKILL)
    assert stand_in.wait(30) == 128 + signal.SIGKILL
    assert running.process.poll() is None
    assert not gone(other.pid)
    other_stand_in.kill()
    assert wait(lambda: gone(other.pid))
    # It forks still.
    assert running.told()[2] == 0


def test_a_killed_worker_ends_its_stand_in(running: Running) -> None:
    stand_in, forked = running.waiting()
    forked.kill()
    assert stand_in.wait(60) == 128 + signal.SIGKILL


@pytest.mark.parametrize("ending", ["its owner ends", "it is killed"])
def test_workers_outlive_the_template(tmp_path: Path, ending: str) -> None:
    with started(tmp_path) as running:
        stand_in, forked = running.waiting()
        if ending == "it is killed":
            running.process.kill()
        else:
            assert running.process.stdin is not None
            running.process.stdin.close()
        running.process.wait(60)
        assert forked.is_running()
        assert stand_in.poll() is None
        stand_in.communicate(timeout=60)
        assert wait(lambda: gone(forked.pid))


@pytest.mark.parametrize("template_lives", [True, False])
def test_the_end_of_the_raylet_ends_its_workers_and_no_others(
    tmp_path: Path, template_lives: bool
) -> None:
    with started(tmp_path) as running:
        raylet, forked = running.waiting(raylet=True)
        other_raylet, other = running.waiting(raylet=True)
        if not template_lives:
            running.process.kill()
            running.process.wait()
        raylet.kill()
        raylet.wait()
        assert wait(lambda: gone(forked.pid))
        assert not gone(other.pid)
        other_raylet.communicate(timeout=60)
        assert wait(lambda: gone(other.pid))


def test_a_template_without_a_launcher_ends_with_the_last_raylet(tmp_path: Path) -> None:
    with started(tmp_path, owned=False) as running:
        assert running.process.stdin is not None
        running.process.stdin.close()  # As in a container, which has no input.
        raylets = [running.waiting(raylet=True)[0] for _ in range(2)]
        raylets[0].kill()
        raylets[0].wait()
        # It forks still, also for a raylet that is soon gone.
        assert running.stand_in(_TELLS, raylet=True).wait(60) == 0
        assert running.told()[1]["imported"]
        raylets[1].kill()
        raylets[1].wait()
        assert running.process.wait(60) == 0


def test_a_node_has_one_template_of_each_user(running: Running) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "serve_app.replica.template", running.name, _MODULE],
        env=running.environment,
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("error: ")
    assert running.told()[1]["imported"]


def test_a_worker_of_any_job_is_forked(running: Running) -> None:
    for job in ("01000000", "07000000"):
        _, told, _ = running.told(RAY_JOB_ID=job)
        assert (told["imported"], told["environment"]["RAY_JOB_ID"]) == (True, job)


@pytest.mark.parametrize(
    ("pid", "uid", "why"),
    [(7, 0, None), (7, 1, "another user"), (0, 0, "another container"), (0, 1, "another user")],
)
def test_who_may_ask(pid: int, uid: int, why: str | None) -> None:
    class Connection:
        def getsockopt(self, *_: int) -> bytes:
            return struct.pack("3i", pid, os.getuid() + uid, 0)

    found = worker.distrust_reason(Connection())  # type: ignore[arg-type]
    assert found is None if why is None else why in str(found)
    assert worker.distrust_reason(socket.socketpair()[0]) is None


def test_an_engine_process_comes_from_a_fork_of_the_worker(running: Running) -> None:
    script = """
import os, sys
from multiprocessing import forkserver as stdlib
from serve_app.replica import forkserver
def tell():
    print(os.getppid(), "antigravity_of_tests" in sys.modules, os.environ["LATER"], flush=True)
if __name__ == "__main__":
    forkserver.start()
    os.environ["LATER"] = "1"
    process = forkserver.Context().Process(target=tell)
    process.start()
    process.join()
    print(stdlib._forkserver._forkserver_pid, flush=True)
    forkserver.stop()
"""
    environment = {worker.FORK_SERVER_VARIABLE: "1"}
    output, _ = running.stand_in(script, **environment).communicate(timeout=60)
    told, server = output.splitlines()
    assert told.split() == [server, "True", "1"]


def test_engine_processes_have_their_titles_although_ray_was_first(tmp_path: Path) -> None:
    script = """
import pathlib
import setproctitle
from serve_app.replica import forkserver
def tell():
    setproctitle.setproctitle("VLLM::EngineCore")
    print(pathlib.Path("/proc/self/cmdline").read_text().strip(chr(0)), flush=True)
if __name__ == "__main__":
    process = forkserver.Context().Process(target=tell)
    process.start()
    process.join()
    forkserver.stop()
"""
    with started(tmp_path, "ray") as with_ray:
        environment = {worker.FORK_SERVER_VARIABLE: "1"}
        output, _ = with_ray.stand_in(script, **environment).communicate(timeout=60)
    assert output.strip() == "VLLM::EngineCore"


def test_nothing_is_forked_beside_a_thread() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert "threads" in (template.unforkable() or "")
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("status", "why"), [(3, None), (0, "initialised CUDA"), (100, "initialised CUDA")]
)
def test_cuda_that_was_loaded_may_be_forked_and_cuda_that_was_initialised_may_not(
    status: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # Other tests leave some.
    assert template.unforkable() is None or template._cuda_driver() is not None
    library = SimpleNamespace(cuDeviceGetCount=lambda count: status)
    answer = template.unforkable(lambda: library)
    assert answer is None if why is None else why in (answer or "")


@pytest.mark.parametrize("opened", [0, 1, 3])
def test_nvml_is_closed_before_a_fork_however_often_it_was_opened(opened: int) -> None:
    counter = [opened]

    def shutdown() -> int:
        """NVML's: 0, and 1 where it is not open."""
        counter[0] -= 1
        return 0 if counter[0] >= 0 else 1

    template.close_nvml(lambda: SimpleNamespace(nvmlShutdown=shutdown))
    assert counter == [-1]
    template.close_nvml()  # Where it was never loaded.


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({"A": "1", "B": "2"}, []),
        ({"A": "1", "B": "2", "CUDA_VISIBLE_DEVICES": "1", "RAY_RAYLET_PID": "9"}, []),
        ({"A": "1", "B": "2", "IMPORTED": "x"}, []),
        ({"A": "1", "B": "2", "IMPORTED": "y"}, ["IMPORTED"]),
        ({"A": "1"}, ["B"]),
        ({"A": "2", "B": "2", "VLLM_X": ""}, ["A", "VLLM_X"]),
        ({"A": "1", "B": "2", "RAY_JOB_ID": "02000000", "OMP_NUM_THREADS": "3"}, []),
    ],
)
def test_what_differs_is_named(wanted: dict[str, str], names: list[str]) -> None:
    given = {"A": "1", "B": "2"}
    assert template.differing(given, {**given, "IMPORTED": "x"}, wanted) == names


def test_what_an_import_set_is_kept_unless_a_cache_decides() -> None:
    now = {"A": "1", "IMPORTED": "x", "TORCHINDUCTOR_CACHE_DIR": "/tmp/x"}
    assert template.environment({"A": "1"}, now, {"A": "1", "C": "3"}) == {
        "A": "1",
        "IMPORTED": "x",
        "C": "3",
    }


@pytest.mark.parametrize(
    ("asked", "application", "environ", "wanted"),
    [
        (False, {}, {}, False),
        (True, {}, {}, True),
        (True, {"runtime_env": {}}, {}, True),
        (True, {"runtime_env": {"pip": ["x"]}}, {}, False),
        (True, {}, {"RAY_ADDRESS": "auto"}, False),
        ("auto", {}, {}, True),
        ("auto", {"runtime_env": {"pip": ["x"]}}, {}, False),
        ("auto", {}, {"RAY_ADDRESS": "auto"}, False),
    ],
)
def test_when_the_launcher_starts_a_template(
    asked: bool | Literal["auto"],
    application: dict[str, Any],
    environ: dict[str, str],
    wanted: bool,
) -> None:
    assert launched.wanted(Settings(template=asked), application, environ) is wanted


def test_ray_learns_where_a_replica_comes_from(capfd: pytest.CaptureFixture[str]) -> None:
    plan = Plan("m", "m", Placement(1, 1), cpu_threads=3)
    assert launched.runtime_env(Settings(), plan, {}) == {}
    for beside in ({}, {"env_vars": {"A": "1"}, "_ray_commit": "x"}):
        env = launched.runtime_env(Settings(template=True), plan, beside)
        assert worker.__file__ in env["py_executable"]
        assert env["env_vars"] == {**plan.environment, worker.FORK_SERVER_VARIABLE: "1"}
    # As the launcher has it, for Ray Serve's own processes.
    assert launched.runtime_env(Settings(template=True), plan, env) == env
    other = {**env, "py_executable": "python3.13"}
    assert launched.runtime_env(Settings(template=True), plan, other) == {}
    assert launched.runtime_env(Settings(template=True), plan, {"pip": ["x"], "uv": []}) == {}
    assert "the runtime_env has pip, uv" in capfd.readouterr().out
    several = Plan("m", "m", Placement(8, 2, executor="ray"), cpu_threads=None)
    assert launched.runtime_env(Settings(template=True), several, {}) == {}


def test_by_default_replicas_come_from_the_template_of_the_launcher_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan("m", "m", Placement(1, 1), cpu_threads=3)
    monkeypatch.delenv(worker.NAME_VARIABLE, raising=False)
    assert launched.runtime_env(Settings(), plan, {}) == {}
    monkeypatch.setenv(worker.NAME_VARIABLE, "serve-app-template-1")
    assert launched.runtime_env(Settings(), plan, {}) != {}
    assert launched.runtime_env(Settings(template=False), plan, {}) == {}


def test_the_command_becomes_the_template_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: ran.append(arguments))
    launched.run([])
    ((program, command, environment),) = ran
    assert (program, command[1:]) == (
        sys.executable,
        ["-m", "serve_app.replica.template", worker.node_name()],
    )
    assert environment.items() >= worker.RAY_ENVIRONMENT.items()


def test_the_launchers_template_ends_with_it() -> None:
    waits = (sys.executable, "-c", "import sys; sys.stdin.read()")
    started = launched.Template({"PATH": os.environ["PATH"]}, Settings(), waits)
    assert started.environ[worker.NAME_VARIABLE] in started.process.args  # type: ignore[operator]
    started.end()
    assert started.process.returncode is not None
