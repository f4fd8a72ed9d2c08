"""How long weights stay, with real processes in place of those that hold a GPU's memory."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve_app.processes import start_ticks
from serve_app.replica import holder, weights
from serve_app.replica.holder import Linger
from serve_app.replica.weights import KeptWeights
from serve_app.settings import Settings
from tests.examples import examples
from tests.services.weights import ask, serve

MAPPED = {"load_format": "ipc_cache"}
# Weights that are to stay, and weights that are to end.
_LONG_S, _SHORT_S = 60.0, 0.5
# Longer than any test may wait for what is certain to happen.
_WITHIN_S = 60.0


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for weights, with a path that is short enough; whatever was held there is ended."""
    monkeypatch.setattr(holder, "_CHECK_S", 0.02)
    with _root() as folder:
        yield folder


@contextlib.contextmanager
def _root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="w"))
    try:
        yield folder
    finally:
        for path in folder.glob("*/holder"):
            holder.end(path.parent)
        shutil.rmtree(folder)


def start(folder: Path, devices: list[str], linger_s: float) -> None:
    """What a replica has its fork server do."""
    if (pid := os.fork()) == 0:
        try:
            holder.begin(folder, devices, partial(serve, folder), linger_s)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0) == (pid, 0)


def replica(
    root: Path,
    model: str = "a",
    gpus: str = "0",
    patience_s: float = _WITHIN_S,
    linger_s: float = _LONG_S,
) -> KeptWeights:
    folder, devices = root / model, gpus.split(",")
    starts = partial(start, folder, devices, linger_s)
    return KeptWeights(folder, devices, starts, lambda path: void(ask(path)), patience_s, MAPPED)


def void(_: object) -> None: ...


def pids(folder: Path) -> list[int]:
    """The daemons' pids, by rank."""
    return [ask(path) for path in sorted(folder.glob("*.sock"))]


def holder_of(folder: Path) -> psutil.Process:
    return psutil.Process(json.loads((folder / "holder").read_bytes())["pid"])


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _WITHIN_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@given(
    st.floats(0, 10),
    st.lists(st.tuples(st.booleans(), st.floats(0, 4)), min_size=1, max_size=20),
)
def test_weights_linger_from_their_last_use_on(
    after_s: float, looks: list[tuple[bool, float]]
) -> None:
    linger, now_s, unused_since_s = Linger(after_s), 0.0, None
    for used, passed_s in looks:
        now_s += passed_s
        unused_since_s = None if used else now_s if unused_since_s is None else unused_since_s
        expected = unused_since_s is not None and now_s - unused_since_s >= after_s
        assert linger.over(used, now_s) == expected


def test_the_next_engine_maps_what_the_first_one_loaded(root: Path) -> None:
    kept = replica(root, gpus="0,1")
    assert kept.load_arguments() == MAPPED
    daemons = pids(kept.folder)
    assert len(daemons) == 2
    assert kept.load_arguments() == MAPPED  # As after a restart in place.
    assert replica(root, gpus="0,1").load_arguments() == MAPPED
    assert pids(kept.folder) == daemons


def test_they_end_a_while_after_their_last_user(root: Path) -> None:
    first, second = replica(root, linger_s=_SHORT_S), replica(root)
    first.load_arguments()
    second.load_arguments()
    [daemon], process = pids(first.folder), holder_of(first.folder)
    first.close()
    time.sleep(2 * _SHORT_S)
    assert pids(second.folder) == [daemon]
    second.close()
    eventually(lambda: gone(daemon) and gone(process.pid))
    assert not holder.is_held(first.folder)


def test_a_replica_that_comes_in_time_finds_them(root: Path) -> None:
    first = replica(root)
    first.load_arguments()
    daemons = pids(first.folder)
    first.close()
    assert replica(root).load_arguments() == MAPPED
    assert pids(first.folder) == daemons


_REPLICA = """
import os, sys, time
from pathlib import Path
from serve_app.replica.supervisor import Reaper
from tests.replica.test_weights import replica
reaper = Reaper()
kept = replica(Path(sys.argv[1]), linger_s=5.0)
assert kept.load_arguments()
with reaper.following():
    time.sleep(0.5)
os.write(1, b"ready\\n")
time.sleep(300)
"""


def test_they_outlive_a_replica_that_is_killed_and_end_after_a_while(root: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _REPLICA, root], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert b"ready\n" in process.stdout
    [daemon], kept = pids(root / "a"), holder_of(root / "a")
    # Neither what ends with the replica's session nor what ends with its family.
    assert os.getsid(kept.pid) == os.getsid(daemon) != os.getsid(process.pid)
    assert psutil.Process(process.pid).children(recursive=True) == []
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()
    assert pids(root / "a") == [daemon]
    eventually(lambda: gone(daemon) and gone(kept.pid))


def test_a_holder_keeps_nothing_of_the_process_that_started_it(root: Path) -> None:
    reader, writer = os.pipe()
    kept = replica(root)
    kept.load_arguments()
    os.close(writer)
    assert os.read(reader, 1) == b""  # As of a fork server, which ends at the end of its pipe.
    os.close(reader)


def test_daemons_may_share_memory_with_each_other(root: Path) -> None:
    resource_tracker.ensure_running()  # It notes shared memory, and is this process's.
    kept = replica(root)
    (kept.folder / "behaviour").write_text("share")
    assert kept.load_arguments() == MAPPED, (kept.folder / "log").read_text()


@pytest.mark.parametrize("which", ["holder", "daemon"])
def test_if_one_is_killed_all_end_and_the_next_engine_starts_them_again(
    root: Path, which: str
) -> None:
    kept = replica(root, gpus="0,1")
    kept.load_arguments()
    daemons, process = pids(kept.folder), holder_of(kept.folder)
    os.kill(process.pid if which == "holder" else daemons[1], signal.SIGKILL)
    eventually(lambda: all(map(gone, [*daemons, process.pid])))
    assert kept.load_arguments() == MAPPED
    assert not set(pids(kept.folder)) & set(daemons)


@pytest.mark.parametrize("which", ["holder", "daemon"])
def test_what_hangs_is_replaced(root: Path, which: str) -> None:
    kept = replica(root)
    kept.load_arguments()
    [daemon], process = pids(kept.folder), holder_of(kept.folder)
    os.kill(daemon, signal.SIGSTOP)
    if which == "holder":
        process.suspend()
    assert kept.load_arguments() == MAPPED
    assert gone(daemon)
    assert gone(process.pid)
    assert pids(kept.folder) != [daemon]


@pytest.mark.parametrize(
    ("behaviour", "reason"), [("fail", "their process ended"), ("hang", "not loaded after 1 s")]
)
def test_an_engine_loads_itself_what_a_daemon_cannot(
    root: Path, behaviour: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = replica(root, patience_s=1.0)
    (kept.folder / "behaviour").write_text(behaviour)
    assert kept.load_arguments() == {}
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1
    assert reason in lines[0]
    assert not holder.is_held(kept.folder)  # Its memory is free.
    if behaviour == "fail":
        assert "no memory for the weights" in (kept.folder / "log").read_text()
    (kept.folder / "behaviour").unlink()
    assert kept.load_arguments() == MAPPED


def test_nothing_that_goes_wrong_stops_a_start(root: Path) -> None:
    def fails() -> None:
        raise EOFError("the fork server died")

    kept = KeptWeights(root / "a", ["0"], fails, lambda path: None, 1.0, MAPPED)
    assert kept.load_arguments() == {}


def test_replicas_that_start_together_share_one_holder(root: Path) -> None:
    script = _REPLICA.replace("time.sleep(300)", "sys.stdin.read()")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert b"ready\n" in process.stdout
    assert len(pids(root / "a")) == 1
    titles = [each.cmdline() for each in psutil.process_iter() if _is_of(each, root)]
    assert len(titles) == 2  # A holder and its daemon.
    for process in processes:
        process.communicate()


def _is_of(process: psutil.Process, root: Path) -> bool:
    """Whether it writes into a log of this folder."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{process.pid}/fd/1") == str(root / "a" / "log")
    return False


# --- other weights on the same GPU ----------------------------------------------------------------


def test_other_weights_that_nobody_uses_leave_the_gpu_at_once(root: Path) -> None:
    other, elsewhere, used = replica(root, "b", "1,0"), replica(root, "c", "2"), replica(root, "d")
    for each in (other, elsewhere, used):
        assert each.load_arguments() == MAPPED
    daemons = pids(other.folder)
    other.close()
    elsewhere.close()
    holder.clear(root, ["0"])
    assert all(map(gone, daemons))
    assert len(pids(elsewhere.folder)) == 1
    assert len(pids(used.folder)) == 1


def test_a_holder_that_hangs_is_ended_as_well(root: Path) -> None:
    other = replica(root, "b")
    other.load_arguments()
    process = holder_of(other.folder)
    process.suspend()
    other.close()
    holder.clear(root, ["0"], root / "a")
    assert gone(process.pid)


def test_the_weights_of_the_replica_itself_stay(root: Path) -> None:
    kept = replica(root)
    kept.load_arguments()
    daemons = pids(kept.folder)
    kept.close()
    holder.clear(root, ["0"], kept.folder)
    assert pids(kept.folder) == daemons


def test_a_process_that_has_the_pid_of_a_holder_is_spared(root: Path) -> None:
    kept = replica(root, linger_s=_SHORT_S)
    kept.load_arguments()
    process = holder_of(kept.folder)
    kept.close()
    sleeper = subprocess.Popen(["sleep", "300"])
    owner = {"pid": sleeper.pid, "started": start_ticks(process.pid), "devices": ["0"]}
    (kept.folder / "holder").write_text(json.dumps(owner))
    holder.end(kept.folder)  # It waits for the real one, which has nobody to wait for.
    assert gone(process.pid)
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()


def test_a_launcher_ends_its_own(root: Path) -> None:
    mine, other = replica(root), replica(root, "b", "1")
    mine.load_arguments()
    other.load_arguments()
    holder.end_below(root, {holder_of(mine.folder).pid})
    assert not holder.is_held(mine.folder)
    assert holder.is_held(other.folder)


def test_a_folder_that_others_can_enter_is_not_used(root: Path) -> None:
    (root / "a").mkdir()
    (root / "a").chmod(0o755)
    with pytest.raises(holder.Unavailable, match="not a folder of this user alone"):
        replica(root)
    (root / "b").symlink_to(root / "a")
    with pytest.raises(holder.Unavailable, match="not a folder of this user alone"):
        replica(root, "b")


def test_without_a_gpu_one_line_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert weights.of(Settings.parse({"keep_weights": True}), {}, 0) is None
    assert "no effect: this replica has no GPU" in capfd.readouterr().out
    assert weights.of(Settings.parse({}), {}, 0) is None
    assert capfd.readouterr().out == ""


def test_a_replica_that_keeps_none_clears_its_gpu(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "root", lambda: root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    other, elsewhere = replica(root, "b", "3"), replica(root, "c", "0")
    for each in (other, elsewhere):
        each.load_arguments()
        each.close()
    assert weights.of(Settings.parse({}), {}, 2) is None
    assert not holder.is_held(other.folder)
    assert holder.is_held(elsewhere.folder)


# --- any order ------------------------------------------------------------------------------------


class Lives(RuleBasedStateMachine):
    """Replicas of two models on one GPU come and go, and processes die and hang, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self._undo = contextlib.ExitStack()
        self.root = self._undo.enter_context(_root())
        self.replicas: list[KeptWeights] = []

    @rule()
    def comes(self) -> None:
        """A replica of a model comes, where no other model is used."""
        model = self.replicas[0].folder.name if self.replicas else "a"
        self._come(model)

    @precondition(lambda self: not self.replicas)
    @rule()
    def another_model_comes(self) -> None:
        self._come("b")

    def _come(self, model: str) -> None:
        new = replica(self.root, model, linger_s=_SHORT_S)
        holder.clear(self.root, ["0"], new.folder)
        for folder in self.root.iterdir():
            assert folder == new.folder or not holder.is_held(folder)
        assert new.load_arguments() == MAPPED
        self.replicas.append(new)

    @precondition(lambda self: self.replicas)
    @rule(first=st.booleans())
    def leaves(self, first: bool) -> None:
        self.replicas.pop(0 if first else -1).close()

    @precondition(lambda self: self.replicas)
    @rule(failure=st.sampled_from(["a holder dies", "a daemon dies", "a daemon hangs"]))
    def fails(self, failure: str) -> None:
        """A process fails, and the engine of the last replica is restarted."""
        kept = self.replicas[-1]
        pid = holder_of(kept.folder).pid if "holder" in failure else pids(kept.folder)[0]
        os.kill(pid, signal.SIGSTOP if "hangs" in failure else signal.SIGKILL)
        # One that dies just when it has answered is vLLM's to notice.
        eventually(lambda: "hangs" in failure or not holder.is_held(kept.folder))
        assert kept.load_arguments() == MAPPED

    @rule()
    def time_passes(self) -> None:
        time.sleep(_SHORT_S / 2)

    @precondition(lambda self: not self.replicas)
    @rule()
    def much_time_passes(self) -> None:
        eventually(lambda: not any(map(holder.is_held, self.root.iterdir())))

    @invariant()
    def weights_that_are_used_are_held(self) -> None:
        for kept in self.replicas:
            assert holder.is_held(kept.folder)

    def teardown(self) -> None:
        for kept in self.replicas:
            kept.close()
        eventually(lambda: not any(map(holder.is_held, self.root.iterdir())))
        self._undo.close()


@pytest.mark.server  # It takes half a minute, in which it mostly waits.
def test_in_any_order_used_weights_are_held_and_unused_ones_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holder, "_CHECK_S", 0.02)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Lives, settings=examples(15, stateful_step_count=8, deadline=None)
    )
