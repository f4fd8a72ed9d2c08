"""`python runpod/start.py`, run for real: what is seen from outside, from its start to its end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bench.engine.systems import apart
from tests.runpod import hub, job_server, rest_server
from tests.runpod.conftest import FOLDER
from tests.runpod.rest_server import Rest
from tests.server import ROOT, wait

PORT = 8860
HUB, JOBS, REST = 8868, 8869, 8870
MODEL = "org/tiny"
TOKENS = 3000
PROMPT = "The quick brown fox jumps over the lazy dog, and then it"
# Two cores hold the engine, its front end, Ray and the test.
ENGINE = {
    "BLOCK_SIZE": "32",
    "KV_CACHE_MEMORY_BYTES": str(2**28),
    "MAX_MODEL_LEN": "4096",
    "MAX_NUM_SEQS": "8",
}
_START_S = 240.0


@dataclass
class Started:
    """A running start.py, with every status that its health port had."""

    process: "subprocess.Popen[bytes]"
    log: Path
    statuses: list[int] = field(default_factory=list)

    def output(self) -> str:
        return self.log.read_text()

    def watch(self) -> None:
        """Note each change of the health port until there is none any more."""
        seen = False
        while self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                status = httpx.get(f"http://127.0.0.1:{PORT + 1}/ping", timeout=5).status_code
                seen = True
                if self.statuses[-1:] != [status]:
                    self.statuses.append(status)
            if not seen and self.process.poll() is not None:
                return
            time.sleep(0.1)

    @property
    def status(self) -> int | None:
        return self.statuses[-1] if self.statuses else None

    def ready(self) -> bool:
        wait(lambda: self.status == 200 or self.process.poll() is not None, _START_S)
        return self.status == 200

    def stop(self, timeout_s: float = 120) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def started(
    folder: Path,
    command: Sequence[str] = (sys.executable, str(FOLDER / "start.py")),
    **environ: str,
) -> Iterator[Started]:
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RAY_", "RUNPOD_", "HF_", "API_", "TRANSFORMERS_"))
    }
    ports = {"PORT": str(PORT), "PORT_HEALTH": str(PORT + 1)}
    own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HOME": str(folder / "home")}
    # The application beside start.py, whichever is installed.
    own["PYTHONPATH"] = str(ROOT)
    log = folder / f"{len(list(folder.iterdir()))}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | own | ports | apart(PORT) | environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    running = Started(process, log)
    watcher = threading.Thread(target=running.watch, daemon=True)
    watcher.start()
    try:
        yield running
    finally:
        if process.poll() is None:
            try:
                running.stop()
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        watcher.join(10)


def family() -> list[psutil.Process]:
    """Every process on this machine that a start.py of these tests has left."""
    collected = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            mine = process.environ().get("RAY_TMPDIR") == f"/tmp/ray-{PORT}"
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                collected.append(process)
    return collected


class Stream(threading.Thread):
    """A stream in the background, and how it ended."""

    def __init__(self, tokens: int = TOKENS) -> None:
        super().__init__(daemon=True)
        self._body = {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self.began = threading.Event()
        self.tokens: int | None = None
        self.done = False
        self.error: str | None = None
        self.start()
        assert self.began.wait(60), "no stream"

    def run(self) -> None:
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        headers = {"x-api-key": "ours"}
        try:
            with httpx.stream("POST", url, json=self._body, headers=headers, timeout=120) as answer:
                for line in answer.iter_lines():
                    self.began.set()
                    self.done = self.done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        usage = json.loads(line.removeprefix("data: ")).get("usage")
                        self.tokens = usage["completion_tokens"] if usage else self.tokens
        except httpx.HTTPError as error:
            self.error = repr(error)


def status_of(headers: dict[str, str], path: str = "/v1/models") -> int:
    return httpx.get(f"http://127.0.0.1:{PORT}{path}", headers=headers, timeout=30).status_code


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network volume: empty at first, and warm for the second start."""
    return tmp_path_factory.mktemp("volume")


# --- a load balancer's worker, on an empty volume -------------------------------------------


@pytest.mark.slow
def test_a_worker_from_loading_to_the_end(tiny: Path, volume: Path, tmp_path: Path) -> None:
    with hub.serving(HUB, MODEL, tiny) as models:
        environ = {
            "SERVE_MODE": "load_balancer",
            "MODEL_NAME": MODEL,
            "BASE_PATH": str(volume),
            "HF_ENDPOINT": models.url,
            "API_KEYS": "ours,theirs",
            "SWAP_SPACE": "4",
            # On two busy cores the stream below takes longer than the default leaves it.
            "STOP_GRACE_S": "400",
            **ENGINE,
        }
        with started(tmp_path, **environ) as server:
            assert server.ready(), server.output()
            assert server.statuses == [204, 200]
            # To the volume, and each file once.
            assert "model.safetensors" in models.fetched
            assert len(models.fetched) == len(set(models.fetched))
            assert (volume / "huggingface-cache" / "hub" / "models--org--tiny").is_dir()
            _says_what_it_chose(server.output())
            _asks_for_keys()
            _says_when_no_replica_is_well(server)
            stream = Stream()
            server.process.send_signal(signal.SIGTERM)
            assert wait(lambda: server.status == 503)
            assert stream.is_alive(), "the stream was too short to tell"
            assert server.process.wait(480) == 0, server.output()
            stream.join(10)
            assert (stream.error, stream.done, stream.tokens) == (None, True, TOKENS)
    assert family() == []
    assert "killing process" not in server.output()
    # Ray's own files were shown.
    assert "[raylet.out]" in server.output() or "[gcs_server.out]" in server.output()


def _says_what_it_chose(output: str) -> None:
    assert "warning: SWAP_SPACE is ignored: use KV_OFFLOADING_SIZE" in output
    assert "load_balancer: org/tiny on no GPU: 1 replica(s), tensor_parallel_size 1" in output
    assert "/dev/shm: " in output
    assert "ready: an answer was generated" in output


def _asks_for_keys() -> None:
    runpod = {"Authorization": "Bearer rpa_runpods_own"}
    assert status_of({}) == 401
    assert status_of(runpod) == 401
    assert status_of({**runpod, "x-api-key": "ours"}) == 200
    assert status_of({"x-api-key": "theirs"}) == 200
    assert status_of({}, "/health") == 200


def _says_when_no_replica_is_well(server: Started) -> None:
    (replica,) = [p for p in family() if any("ServeReplica" in word for word in p.cmdline())]
    replica.kill()
    assert wait(lambda: server.status == 503), server.output()
    assert wait(lambda: server.status == 200, _START_S), server.output()
    assert server.statuses == [204, 200, 503, 200]


# --- a queue's worker, on the volume that is warm now ---------------------------------------


def metric(name: str) -> float:
    answer = httpx.get(f"http://127.0.0.1:{PORT}/metrics", timeout=30)
    lines = answer.raise_for_status().text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def completion(tokens: int, **more: Any) -> Any:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, **more}
    return {"openai_route": "/v1/completions", "openai_input": body}


@pytest.mark.slow
def test_a_queue_worker_without_the_hub(volume: Path, tmp_path: Path) -> None:
    pytest.importorskip("runpod.serverless", reason="Runpod's SDK is not installed")
    if not (volume / "huggingface-cache").is_dir():
        pytest.skip("the first start did not fill the volume")
    environ = {
        "SERVE_MODE": "queue",
        "MODEL_NAME": MODEL,
        "BASE_PATH": str(volume),
        # Nobody is there: a start that asks does not come up.
        "HF_ENDPOINT": f"http://127.0.0.1:{HUB}",
        **ENGINE,
    }
    with (
        job_server.serving(JOBS) as jobs,
        started(tmp_path, **environ, **jobs.environment()) as server,
    ):
        assert server.ready(), server.output()
        assert "org/tiny: in the cache, " in server.output()
        done = jobs.over(jobs.submit(completion(8)))
        assert done["output"][0]["usage"]["completion_tokens"] == 8
        assert jobs.over(jobs.submit({"openai_route": "/v1/models"}))["output"][0]["data"]

        unknown = {"openai_route": "/v1/completions", "openai_input": {"model": "x", "prompt": "y"}}
        assert json.loads(jobs.over(jobs.submit(unknown))["error"])["status"] == 404

        # One that is cancelled: its work is aborted, and nothing runs any more.
        job = jobs.submit(completion(TOKENS, stream=True, n=4))
        assert jobs.wait(lambda: len(job.stream) > 0)
        assert metric("vllm:num_requests_running") > 0
        jobs.cancel(job)
        assert wait(lambda: metric("vllm:num_requests_running") == 0)
        assert job.done is None

        # One in flight at the end is finished.
        job = jobs.submit(completion(1500, stream=True))
        assert jobs.wait(lambda: len(job.stream) > 0)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0, server.output()
        assert job.done is not None, server.output()
        assert job.text.endswith("data: [DONE]\n\n")
        assert server.statuses == [204, 200, 503]
    assert family() == []


@pytest.fixture
def rest() -> Iterator[Rest]:
    if not rest_server.SCHEMA.is_file():
        pytest.skip("Runpod's schema is not in ../shared")
    with rest_server.serving(REST) as server:
        yield server


# --- a pod, with the model that is installed ------------------------------------------------


@pytest.mark.slow
def test_a_pod_asks_for_keys_and_stops_itself_if_it_dies_again_and_again(
    rest: Rest, tmp_path: Path
) -> None:
    pod = rest.account.add("pods", name="mine")
    environ = {
        "API_KEYS": "ours,theirs",
        "MAX_START_FAILURES": "2",
        "BASE_PATH": str(tmp_path),
        "RUNPOD_POD_ID": pod,
        "RUNPOD_API_KEY": rest_server.KEY,
        "RUNPOD_API_URL": rest.url,
        **ENGINE,
    }
    with started(tmp_path, **environ) as server:
        assert server.ready(), server.output()
        assert status_of({}) == 401
        assert status_of({"Authorization": "Bearer another"}) == 401
        assert status_of({"Authorization": "Bearer ours"}) == 200
        assert status_of({"x-api-key": "theirs"}) == 200
        assert "Paris" in _capital_of_france()
        _kill_the_head_until(server, lambda: rest.account.things["pods"][pod]["status"] == "EXITED")
        # It answered, and was given one more chance, not for ever one more.
        assert server.output().count("ready: an answer was generated") <= 2
        assert wait(lambda: server.status == 503)
        assert "start 2 of 2 failed" in server.output()
        # Nothing works on while it waits for its end.
        assert [p.pid for p in family()] == [server.process.pid]
        assert server.stop() == 1
    assert family() == []


def _capital_of_france() -> str:
    headers = {"Authorization": "Bearer ours"}
    url = f"http://127.0.0.1:{PORT}/v1"
    model = httpx.get(f"{url}/models", headers=headers).json()["data"][0]["id"]
    message = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": model, "messages": [message], "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=120)
    return str(answer.raise_for_status().json()["choices"][0]["message"]["content"])


def _kill_the_head_until(server: Started, over: Callable[[], bool]) -> None:
    """Whenever it is ready; at most three times."""
    for _ in range(3):
        wait(lambda: over() or server.status == 200, _START_S)
        if over():
            return
        (head,) = [p for p in family() if any(word.endswith("/head.py") for word in p.cmdline())]
        head.kill()
        assert wait(lambda: server.status != 200), server.output()
    pytest.fail(server.output())


# --- what does not start --------------------------------------------------------------------


def test_a_pod_without_keys_stops_itself(rest: Rest, tmp_path: Path) -> None:
    pod = rest.account.add("pods", name="mine")
    environ = {
        "RUNPOD_POD_ID": pod,
        "RUNPOD_API_KEY": rest_server.KEY,
        "RUNPOD_API_URL": rest.url,
        "MODEL_NAME": MODEL,
    }
    with started(tmp_path, **environ) as server:
        assert wait(lambda: rest.account.things["pods"][pod]["status"] == "EXITED")
        assert "a pod's address is public" in server.output()
        # Until Runpod ends it, it says what it is: an end of its own would be a new start.
        assert wait(lambda: server.status == 503)
        assert server.stop() == 2
    assert rest.account.violations == []


def broken(what: str) -> list[str]:
    """start.py, in which a part fails as nobody expected."""
    code = f"import sys; import start; {what} = lambda *words: 1 / 0; sys.exit(start.main())"
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r}); {code}"]


@pytest.mark.parametrize("part", ["start.ports_of", "start.orphans.adopt", "start.Health"])
def test_no_exception_is_an_end_without_giving_up(part: str, rest: Rest, tmp_path: Path) -> None:
    pod = rest.account.add("pods", name="mine")
    environ = {
        "RUNPOD_POD_ID": pod,
        "RUNPOD_API_KEY": rest_server.KEY,
        "RUNPOD_API_URL": rest.url,
        "API_KEYS": "k",
    }
    with started(tmp_path, broken(part), **environ) as server:
        assert wait(lambda: rest.account.things["pods"][pod]["status"] == "EXITED"), server.output()
        assert "ZeroDivisionError" in server.output()
        assert server.stop() == 1


def test_an_exception_in_a_start_is_a_failed_start(tmp_path: Path) -> None:
    environ = {
        "RUNPOD_ENDPOINT_ID": "endpoint",
        "SERVE_MODE": "queue",
        "MAX_START_FAILURES": "2",
    }
    with started(tmp_path, broken("start.choose"), **environ) as server:
        assert server.process.wait(60) == 1, server.output()
    output = server.output()
    assert output.count("ZeroDivisionError") == 2
    assert "start 2 of 2 failed" in output
    assert "giving up" in output


_WITH_TEMPLATE = """
import sys, types
sys.path.insert(0, {folder!r})
import start
from serve_app.launch.template import Template
from serve_app.settings import Settings
made = []
def template(environ, settings):
    made.append(Template(environ, settings, (sys.executable, "-c", "import sys; sys.stdin.read()")))
    return made[0]
def head(environ, give_up):
    print("template:", environ["SERVE_APP_TEMPLATE_NAME"] in made[0].process.args, flush=True)
    print("runs:", made[0].process.poll() is None, flush=True)
    raise RuntimeError("no head")
settings = Settings(template=True)
start.Template, start.Head = template, head
start._choose = lambda: types.SimpleNamespace(settings=settings, offline=False)
status = start.main()
print("ended:", made[0].process.returncode is not None, flush=True)
sys.exit(status)
"""


def test_the_template_starts_before_the_head_and_ends_after_it(tmp_path: Path) -> None:
    code = _WITH_TEMPLATE.format(folder=str(FOLDER))
    environ = {"RUNPOD_ENDPOINT_ID": "e", "SERVE_MODE": "queue", "MAX_START_FAILURES": "1"}
    with started(tmp_path, [sys.executable, "-c", code], **environ) as server:
        assert server.process.wait(60) == 1, server.output()
    output = server.output()
    assert "failed: no head" in output
    for line in ("template: True", "runs: True", "ended: True"):
        assert line in output.splitlines()


def test_a_model_that_the_gpu_cannot_hold_is_not_fetched(tiny: Path, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\necho 0, GPU-1, Small, 256, 256, 8.0, 580\n")
    (programs / "nvidia-smi").chmod(0o755)
    with hub.serving(HUB, MODEL, tiny) as models:
        environ = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SERVE_MODE": "load_balancer",
            "MODEL_NAME": MODEL,
            "BASE_PATH": str(tmp_path),
            "HF_ENDPOINT": models.url,
            "TENSOR_PARALLEL_SIZE": "1",
            "RUNPOD_ENDPOINT_ID": "endpoint",
        }
        with started(tmp_path, **environ) as server:
            assert server.process.wait(60) == 2, server.output()
        assert "needs 2.0 GiB on each of 1 GPU(s), and Small gives 0.2" in server.output()
        assert models.fetched == ["config.json"]


def test_a_worker_that_cannot_start_tries_so_often_and_ends(tmp_path: Path) -> None:
    environ = {
        "SERVE_MODE": "load_balancer",
        "MODEL_NAME": MODEL,
        "BASE_PATH": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{HUB}",
        "MAX_START_FAILURES": "2",
        "RUNPOD_ENDPOINT_ID": "endpoint",
        "RUNPOD_POD_ID": "worker",
    }
    with started(tmp_path, **environ) as server:
        assert server.process.wait(120) == 1, server.output()
    output = server.output()
    assert output.count("failed: org/tiny cannot be fetched") == 2
    assert "start 2 of 2 failed" in output
    assert "Traceback" not in output
    assert family() == []


def test_a_worker_that_still_fetches_ends_at_once(tmp_path: Path) -> None:
    environ = {
        "SERVE_MODE": "load_balancer",
        "MODEL_NAME": MODEL,
        "BASE_PATH": str(tmp_path),
        "HF_ENDPOINT": f"http://127.0.0.1:{HUB}",
    }
    # It takes the connection, and never answers.
    with socket.create_server(("127.0.0.1", HUB)), started(tmp_path, **environ) as server:
        assert wait(lambda: "asking the hub" in server.output())
        assert wait(lambda: server.status == 204)
        assert server.stop(10) == 0
    assert family() == []


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("ENFORCE_EAGER", "perhaps", "must be true or false"),
        ("MAX_START_FAILURES", "often", "must be a number of starts"),
        ("MAX_START_FAILURES", "0", "must be a number of starts"),
    ],
)
def test_a_value_to_mend_is_not_tried_again(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    environ = {"API_KEYS": "k", name: text, "RUNPOD_ENDPOINT_ID": "endpoint"}
    with started(tmp_path, **environ) as server:
        assert server.process.wait(60) == 2
    assert f"error: {name} = '{text}': {sentence}" in server.output()
    assert "failed" not in server.output()
