"""vLLM's part of kept weights, as far as it goes without a GPU."""

import contextlib
import multiprocessing.forkserver as stdlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.planning.plan import CPU_DEFAULTS


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a path that is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="w"))
    yield path
    shutil.rmtree(path)


def test_an_engine_maps_weights_and_its_arguments_stay_as_they_are(
    tiny_config: Path, folder: Path
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.usage.usage_lib import UsageContext

    from serve_app.replica import weightcache
    from serve_app.replica.arguments import loading, parse

    args = parse({"model": str(tiny_config), "load_format": "dummy", **CPU_DEFAULTS})
    changed = loading(args, weightcache.load_arguments(folder))
    assert (args.load_format, args.model_loader_extra_config) == ("dummy", {})
    assert loading(args, {}) == args
    engine_args = AsyncEngineArgs.from_cli_args(changed)
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    loader: Any = get_model_loader(config.load_config)
    assert type(loader).__name__ == "IpcModelLoader"
    assert (loader.socket_dir, loader.fallback) == (str(folder), True)


@pytest.mark.parametrize("answer", ["ok", "error", "hang", "end"])
def test_a_daemon_is_asked_in_vllms_words(
    answer: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader.weight_cache import protocol

    from serve_app.replica import weightcache

    monkeypatch.setattr(weightcache, "_ANSWER_S", 0.5)
    asked, over = [], threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            asked.append(protocol.recv_msg(connection))
            if answer == "hang":
                over.wait(60)
            elif answer != "end":
                protocol.send_msg(connection, {"status": answer, "memory_bytes": 1})

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        daemon = threading.Thread(target=serve)
        daemon.start()
        expected: Any = {"hang": TimeoutError, "ok": ()}.get(answer, ConnectionError)
        with pytest.raises(expected) if expected else contextlib.nullcontext():
            weightcache.ask(folder / "socket")
        over.set()
        daemon.join()
    assert asked == [{"cmd": "get_memory"}]
    with pytest.raises((ConnectionError, FileNotFoundError)):
        weightcache.ask(folder / "socket")


def test_where_vllm_cannot_share_memory_an_engine_loads_its_weights_itself(
    tiny_config: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All of it with vLLM's own daemon, which refuses a CPU once it has read its arguments."""
    from serve_app.replica import forkserver, holder, weights
    from serve_app.settings import Settings

    monkeypatch.setattr(holder, "root", lambda: folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    running = stdlib._forkserver._forkserver_pid is not None  # type: ignore[attr-defined]
    arguments = {"model": str(tiny_config), "load_format": "dummy", **CPU_DEFAULTS}
    kept = weights.of(Settings.parse({"keep_weights": True}), arguments, 1)
    try:
        assert kept is not None
        assert kept.load_arguments() == {}
        log = (kept.folder / "log").read_text()
        assert "does not support CUDA IPC" in log, log
        assert "their process ended" in capfd.readouterr().out
        assert not holder.is_held(kept.folder)
        kept.close()
    finally:
        if not running:
            forkserver.stop()


def test_a_path_that_is_too_long_for_a_socket_is_said(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from serve_app.replica import holder, weights
    from serve_app.settings import Settings

    long = tmp_path / ("x" * 60)
    long.mkdir(mode=0o700)
    monkeypatch.setattr(holder, "root", lambda: long)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = {"model": str(tiny_config)}
    assert weights.of(Settings.parse({"keep_weights": True}), arguments, 1) is None
    assert "set TMPDIR to a shorter one" in capfd.readouterr().out
