"""A forked process is what plain Python would have been, only sooner."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serve_app.launch import family
from serve_app.launch.zygote import COMMAND, FIRST_VARIABLE, SOCKET_VARIABLE, Unforkable, program

ROOT = Path(__file__).parent.parent.parent


class Zygote:
    """One that has imported two modules, and whoever asks it."""

    def __init__(self, folder: Path, *modules: str, **environment: str) -> None:
        self.path = folder / "zygote"
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != SOCKET_VARIABLE},
            "SERVE_APP_PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        self.log = folder / "log"
        with socket.socket(socket.AF_UNIX) as listening, self.log.open("wb") as log:
            listening.bind(str(self.path))
            listening.listen(64)
            words = [sys.executable, "-m", "serve_app.launch.zygote", str(listening.fileno())]
            self.process = subprocess.Popen(
                [*words, *modules],
                env=self.environment,
                stdout=log,
                stderr=log,
                pass_fds=[listening.fileno()],
            )

    def start(self, *words: str, **named: Any) -> "subprocess.Popen[str]":
        environment = {
            **self.environment,
            SOCKET_VARIABLE: str(self.path),
            **named.pop("environment", {}),
        }
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
        return subprocess.Popen(
            [str(COMMAND), *words], env=environment, text=True, **{**streams, **named}
        )

    def run(self, *words: str, **named: Any) -> tuple[int, str]:
        """Status and output."""
        process = self.start(*words, **named)
        out, errors = process.communicate(timeout=60)
        assert not errors or process.returncode, errors
        return process.returncode, out

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with tempfile.TemporaryDirectory() as folder:
        # Modules that nothing else imports.
        found = Zygote(Path(folder), "colorsys", "sndhdr")
        yield found
        found.end()


FORKED = "import sys; print('colorsys' in sys.modules)"


def test_modules_are_imported_already(zygote: Zygote) -> None:
    assert zygote.run("-c", FORKED) == (0, "True\n")


def test_arguments_environment_and_folder_are_its_own(zygote: Zygote, tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv, os.environ['MINE'], 'AWAY' in os.environ, os.getcwd())"
    found = zygote.run("-u", "-c", code, "a", "b c", environment={"MINE": "x"}, cwd=tmp_path)
    assert found == (0, f"['-c', 'a', 'b c'] x False {tmp_path}\n")


def test_a_script_is_the_main_module(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 17\n")
    (tmp_path / "script.py").write_text(
        "import sys, beside\n"
        "import __main__\n"
        "print(__name__, __file__, sys.argv, beside.VALUE, __main__.__dict__ is globals())\n"
    )
    path = str(tmp_path / "script.py")
    assert zygote.run(path, "x") == (0, f"__main__ {path} {[path, 'x']} 17 True\n")


def test_a_module_is_the_main_module(zygote: Zygote) -> None:
    assert zygote.run("-m", "calendar", "2026", "1")[1].startswith("    January 2026")


def test_input_and_other_files_are_passed(zygote: Zygote) -> None:
    reading, writing = os.pipe()
    code = f"import os, sys; os.write({writing}, sys.stdin.read().encode())"
    process = zygote.start("-c", code, pass_fds=[writing])
    os.close(writing)
    process.communicate("hello", timeout=60)
    assert os.read(reading, 100) == b"hello"
    # Nobody else holds it: its reader sees the end.
    assert os.read(reading, 100) == b""
    os.close(reading)


@pytest.mark.parametrize("status", [0, 3, 255])
def test_it_ends_with_the_same_status(zygote: Zygote, status: int) -> None:
    assert zygote.run("-c", f"import sys; sys.exit({status})")[0] == status


def test_an_error_is_shown(zygote: Zygote) -> None:
    process = zygote.start("-c", "raise KeyError('mine')")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "KeyError: 'mine'" in errors


WAITING = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def test_signals_reach_it(zygote: Zygote) -> None:
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(7))\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    process = zygote.start("-c", code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "heard\n"
    process.terminate()
    assert process.wait(60) == 7


def test_it_dies_with_who_wanted_it(zygote: Zygote) -> None:
    process = zygote.start("-c", WAITING)
    assert process.stdout is not None
    forked = psutil.Process(int(process.stdout.readline()))
    process.kill()
    psutil.wait_procs([forked], 30)
    assert not forked.is_running()


def test_who_wanted_it_dies_of_the_same_signal(zygote: Zygote) -> None:
    process = zygote.start("-c", WAITING)
    assert process.stdout is not None
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


def test_blocked_signals_stay_blocked(zygote: Zygote) -> None:
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"

    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    assert zygote.run("-c", code, preexec_fn=block) == (0, "True\n")
    assert zygote.run("-c", code) == (0, "False\n")


def test_it_is_in_the_process_group_of_who_wanted_it(zygote: Zygote) -> None:
    process = zygote.start("-c", "import os; print(os.getpgrp())", process_group=0)
    assert process.communicate(timeout=60)[0] == f"{process.pid}\n"


def test_each_draws_other_random_numbers(zygote: Zygote) -> None:
    code = "import random, os; print(random.random(), os.urandom(4))"
    assert len({zygote.run("-c", code) for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("OMP_NUM_THREADS", "77"), ("VLLM_MINE", "1"), ("TORCH_LOGS", "+all")]
)
def test_what_libraries_read_at_import_must_be_the_same(
    zygote: Zygote, name: str, value: str
) -> None:
    code = f"import os, sys; print('colorsys' in sys.modules, os.environ['{name}'])"
    assert zygote.run("-c", code, environment={name: value}) == (0, f"False {value}\n")


def test_options_of_the_interpreter_start_another_one(zygote: Zygote) -> None:
    assert zygote.run("-O", "-c", "import sys; print(sys.flags.optimize)") == (0, "1\n")
    for words in (["-O", "x.py"], ["-m"], [], ["-"]):
        with pytest.raises(Unforkable):
            program(words)


def test_what_imports_set_is_set_in_a_fork(tmp_path: Path) -> None:
    """cv2 sets LD_LIBRARY_PATH, and vLLM variables of torch."""
    (tmp_path / "setting.py").write_text(
        "import os\n"
        "os.environ['LD_LIBRARY_PATH'] = '/mine'\n"
        "os.environ['TORCH_THREADS_OF_OURS'] = '1'\n"
    )
    zygote = Zygote(tmp_path, "setting", "colorsys", PYTHONPATH=f"{ROOT}:{tmp_path}")
    code = (
        "import os, sys\n"
        "print('colorsys' in sys.modules, os.environ['LD_LIBRARY_PATH'])\n"
        "print(os.environ['TORCH_THREADS_OF_OURS'], os.environ['MINE'])\n"
    )
    assert zygote.run("-c", code, environment={"MINE": "2"}) == (0, "True /mine\n1 2\n")
    zygote.end()


def test_without_a_zygote_it_is_plain_python(tmp_path: Path) -> None:
    zygote = Zygote(tmp_path, "colorsys")
    assert zygote.run("-c", FORKED) == (0, "True\n")
    zygote.end()
    assert zygote.run("-c", FORKED) == (0, "False\n")


def test_imports_that_fail_start_plain_python(tmp_path: Path) -> None:
    zygote = Zygote(tmp_path, "no_such_module_of_ours")
    assert zygote.run("-c", FORKED) == (0, "False\n")
    assert zygote.process.wait(30) == 1
    assert "no_such_module_of_ours" in zygote.log.read_text()


def test_what_starts_threads_is_not_forked(tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    zygote = Zygote(tmp_path, "threaded", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert zygote.run("-c", FORKED) == (0, "False\n")
    assert zygote.process.wait(30) != 0


def test_its_end_is_reported_though_the_zygote_was_killed(tmp_path: Path) -> None:
    zygote = Zygote(tmp_path)
    process = zygote.start("-c", WAITING)
    assert process.stdout is not None
    forked = int(process.stdout.readline())
    zygote.process.kill()
    zygote.process.wait()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    os.kill(forked, signal.SIGTERM)
    assert process.wait(60) == 1


def test_what_comes_first_runs_before_the_program(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("def call():\n    print('first', flush=True)\n")
    code = "import sys; print('then')"
    # What is asked for is imported by the fork, from where that finds it.
    environment = {FIRST_VARIABLE: "no_such_module_of_ours:call"}
    process = zygote.start("-c", code, environment=environment)
    _, errors = process.communicate(timeout=60)
    assert "no_such_module_of_ours" in errors
    other = Zygote(tmp_path, "first", PYTHONPATH=f"{ROOT}:{tmp_path}")
    found = other.run("-c", code, environment={FIRST_VARIABLE: "first:call"})
    assert found == (0, "first\nthen\n")
    other.end()


@pytest.mark.parametrize("seed", range(2))
def test_many_at_once(zygote: Zygote, seed: int) -> None:
    """Whoever ends, by itself or killed from either side, has its own status, and none stays."""
    rng = random.Random(seed)
    running: list[tuple[subprocess.Popen[str], str, int]] = []
    for status in range(12):
        how = rng.choice(["ends", "killed", "left"])
        wait_s = 600 if how != "ends" else rng.random()
        code = f"import os, sys, time; print(os.getpid(), flush=True); time.sleep({wait_s})"
        running.append((zygote.start("-c", f"{code}; sys.exit({status})"), how, status))
    rng.shuffle(running)
    pids = []
    for process, how, status in running:
        assert process.stdout is not None
        pids.append(pid := int(process.stdout.readline()))
        if how == "killed":
            os.kill(pid, signal.SIGKILL)
        elif how == "left":
            process.kill()
        expected = status if how == "ends" else -signal.SIGKILL
        assert process.wait(60) == expected, how
    deadline_s = time.monotonic() + 30
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


# --- whose is whose -------------------------------------------------------------------------


def test_a_forked_process_is_below_who_wanted_it(zygote: Zygote) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "below = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), below.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = zygote.start("-c", code)
    assert process.stdout is not None
    forked, below = map(int, process.stdout.readline().split())
    try:
        stub, me = psutil.Process(process.pid), psutil.Process()
        found = [each.pid for each in family.below(stub)]
        assert found == [process.pid, forked, below]
        assert {process.pid, forked, below} <= {each.pid for each in family.below(me)}
        above = [each.pid for each in family.above(psutil.Process(below))]
        assert above[:3] == [forked, process.pid, me.pid]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(below, signal.SIGKILL)
        process.kill()
        process.wait()
