"""The health port, asked over HTTP, and the log follower."""

from pathlib import Path

import httpx
import pytest

import head
import logs
from health import Health, answers
from tests.server import wait

PORT = 8876
URL = f"http://127.0.0.1:{PORT}/ping"


def status(path: str = "/ping") -> int:
    return httpx.get(f"http://127.0.0.1:{PORT}{path}").status_code


def test_it_says_what_is_so() -> None:
    well = [True]
    with Health(PORT, host="127.0.0.1") as health:
        assert status() == 204
        assert status("/") == 404
        health.ready(lambda: well[0])
        assert status() == 200
        assert httpx.head(URL).status_code == 200
        well[0] = False
        assert wait(lambda: status() == 503)
        well[0] = True
        assert wait(lambda: status() == 200)
        health.unavailable()
        assert status() == 503
        # The probe says that all is well, and is not asked any more.
        assert not wait(lambda: status() != 503, timeout_s=2.5)
        health.loading()
        assert status() == 204


def test_one_connection_may_ask_often() -> None:
    with Health(PORT, "/healthz", host="127.0.0.1") as health, httpx.Client() as client:
        url = f"http://127.0.0.1:{PORT}/healthz?x=1"
        assert [client.get(url).status_code for _ in range(3)] == [204] * 3
        health.unavailable()
        assert client.get(url).status_code == 503


def test_a_closed_port_is_no_answer() -> None:
    assert not answers(URL)


def test_appended_lines_are_shown_once_and_whole(tmp_path: Path) -> None:
    shown: list[str] = []
    follower = logs.Follower(lambda: [(tmp_path, ("raylet.*",))], shown.append)
    follower.start()
    (tmp_path / "raylet.out").write_text("one\ntw")
    (tmp_path / "worker.out").write_text("not followed\n")
    assert wait(lambda: shown == ["[raylet.out] one"])
    with open(tmp_path / "raylet.out", "a") as file:
        file.write("o\n[serve_app] shown by the launcher\n")
        file.write("[2026-11-24 16:03:47,415 I 28293 28293] (raylet) all is well\nand more\n")
        file.write("[2026-11-24 16:03:47,415 W 28293 28293] (raylet) \x1b[33mill\x1b[0m\nlast")
    assert wait(lambda: len(shown) == 3)
    (tmp_path / "raylet.err").write_text("late\n")
    follower.stop()
    assert sorted(shown) == sorted(
        [
            *(f"[raylet.out] {word}" for word in ("one", "two", "last")),
            "[raylet.out] [2026-11-24 16:03:47,415 W 28293 28293] (raylet) ill",
            "[raylet.err] late",
        ]
    )


@pytest.mark.parametrize(
    ("shm_mib", "store_mib"), [(64, 80), (1024, 256), (2048, 512), (65536, 512)]
)
def test_the_object_store_leaves_dev_shm_to_the_engines(shm_mib: int, store_mib: int) -> None:
    assert head.object_store_bytes(shm_mib * 2**20) == store_mib * 2**20
