"""Replicas follow the load on a real server, and nothing is dropped when they come and go."""

import json
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.server import Server, configuration, launched, wait


def replicas(server: Server) -> int:
    return len(server.named("ServeReplica:llm:engine"))


def stream(url: str, tokens: int) -> str:
    """The finish reason of one stream that was read to its end."""
    body = {"model": "m", "prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    finish = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return finish
            if line.startswith("data: "):
                # vllm-rs leaves out what is null.
                finish = json.loads(line[6:])["choices"][0].get("finish_reason") or finish
    raise AssertionError("the stream was cut")


@pytest.mark.slow
def test_replicas_come_and_go_with_the_load_and_nothing_is_dropped(
    tiny: Path, tmp_path: Path
) -> None:
    config = configuration(
        8804,
        model=str(tiny),
        served_model_name="m",
        replicas={"min": 0, "max": 2, "start_s": 10.0, "ttft_s": 1.0, "idle_s": 10.0},
        cpus_per_replica=0.5,
        # Few at once: a load that two cores can make.
        limits={"max_running_requests": 2, "queue_timeout_s": 120.0},
        engine={"dtype": "float32"},
    )
    ends: list[str] = []
    failures: list[str] = []
    over = threading.Event()

    def once(url: str, tokens: int) -> None:
        try:
            ends.append(stream(url, tokens))
        except Exception as error:
            failures.append(repr(error))

    def user(url: str, tokens: int) -> None:
        while not over.is_set():
            once(url, tokens)

    with launched(config, tmp_path) as server:
        assert server.ready(), server.output()
        assert replicas(server) == 1
        users = [threading.Thread(target=user, args=(server.url, 400)) for _ in range(8)]
        for each in users:
            each.start()
        assert wait(lambda: replicas(server) == 2, 120), server.output()
        scaled_s = time.monotonic()
        assert wait(lambda: "replicas 1 -> 2: " in server.output(), 10), server.output()
        time.sleep(max(0.0, scaled_s + 20 - time.monotonic()))
        assert wait(lambda: len(ends) > 20 or bool(failures), 240)
        assert not failures
        over.set()
        for each in users:
            each.join()
        # Streams that may outlast the dismissal of their replica.
        long = [threading.Thread(target=once, args=(server.url, 1900)) for _ in range(2)]
        for each in long:
            each.start()
        assert wait(lambda: replicas(server) <= 1, 240), server.output()
        for each in long:
            each.join()
        # Nobody asks: the last one goes, and the next request waits for another.
        assert wait(lambda: replicas(server) == 0, 120), server.output()
        assert server.answers(1) or server.answers(120), server.output()
    assert not failures
    assert set(ends) == {"length"}
