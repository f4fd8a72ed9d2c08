"""The health port, asked over HTTP, and the log follower."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import head
import logs
from health import Answer, Health, ask
from tests.server import wait

PORT = 8876
URL = f"http://127.0.0.1:{PORT}/ping"


# One client: each new one reads the system's certificates, which takes 60 ms of CPU time.
CLIENT = httpx.Client(verify=False)


def status(path: str = "/ping") -> int:
    return CLIENT.get(f"http://127.0.0.1:{PORT}{path}").status_code


def test_it_says_what_is_so() -> None:
    answer = [Answer.YES]
    with Health(PORT, host="127.0.0.1") as health:
        assert status() == 204
        assert status("/") == 404
        health.ready(lambda: answer[0])
        assert status() == 200
        assert CLIENT.head(URL).status_code == 200
        for unwell in (Answer.NO, Answer.SILENCE):
            answer[0] = unwell
            assert wait(lambda: status() == 503)
            answer[0] = Answer.YES
            assert wait(lambda: status() == 200)
        answer[0] = Answer.YES
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


def test_one_silence_is_no_illness() -> None:
    """A busy server may be late once; a refusal or another silence says more."""
    answers = [Answer.SILENCE, Answer.YES, Answer.SILENCE]
    seen: list[int] = []
    with Health(PORT, host="127.0.0.1") as health:

        def probe() -> Answer:
            seen.append(health.status)
            return answers[len(seen) - 1] if len(seen) <= len(answers) else Answer.SILENCE

        health.ready(probe)
        assert wait(lambda: len(seen) == 5)
    assert seen == [200, 200, 200, 200, 503]


# --- the probe ----------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what `talk` does with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/health"


def hold(connection: socket.socket) -> None:
    """As a proxy that has no replica to send the request to."""
    connection.recv(1000)
    _HELD.append(connection)


def trickle(connection: socket.socket) -> None:
    """A byte now and then: each begins the time limit of the client's socket anew."""
    connection.recv(1000)
    with contextlib.suppress(OSError):
        for byte in b"HTTP/1.1 200 OK" + b" " * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)


def say(status: str) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode())
        connection.close()

    return talk


_HELD: list[socket.socket] = []


@pytest.mark.parametrize(
    ("talk", "answer"),
    [
        (say("200 OK"), Answer.YES),
        (say("503 Service Unavailable"), Answer.NO),
        (say("404 Not Found"), Answer.NO),
        (lambda connection: connection.close(), Answer.NO),
        (hold, Answer.SILENCE),
        (trickle, Answer.SILENCE),
    ],
)
def test_a_probe_is_over_in_time(talk: Callable[[socket.socket], None], answer: Answer) -> None:
    with answering(talk) as url:
        assert ask(url, timeout_s=0.5) is answer


def test_a_closed_port_is_a_no() -> None:
    assert ask(URL) is Answer.NO


def test_a_probe_that_is_held_with_the_requests_says_503() -> None:
    with answering(hold) as url, Health(PORT, host="127.0.0.1") as health:
        health.ready(lambda: ask(url, timeout_s=0.5))
        assert wait(lambda: status() == 503)


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
