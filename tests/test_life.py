"""Life and death of a real server, split over two workers: killed, hung, stopped, not started."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server import Server, configuration, launched, wait

PORT = 8740
TOKENS = 4000
PROMPT = "The quick brown fox jumps over the lazy dog, and then it"
# From the death of an engine to an answer of the next: a start of the engine, several times over.
_BACK_S = 240.0


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of the tiny model, as `peft` would save it."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((tiny / "config.json").read_text())
    hidden, rank = config["hidden_size"], 8
    torch.manual_seed(1)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, hidden)
            tensors[f"{name}.lora_B.weight"] = torch.randn(hidden, rank)
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(tiny),
        "r": rank,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def server(tiny: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One replica, its engine split over two workers, with an adapter."""
    config = configuration(
        PORT,
        model=str(tiny),
        tensor_parallel_size=2,
        hang_timeout_s=5.0,
        drain_s=90.0,
        engine={
            "dtype": "float32",
            "max_model_len": 4096,
            "enable_lora": True,
            "max_lora_rank": 8,
            "lora_modules": [{"name": "tiny-lora", "path": str(adapter)}],
        },
    )
    with launched(config, tmp_path_factory.mktemp("life")) as running:
        assert running.ready(), running.output()
        yield running


class Stream(threading.Thread):
    """A stream in the background, and how it ended. More choices and more tokens take longer.

    Attributes:
        tokens: what its usage counted; None if it did not come to that.
        error: the error event, or what broke the connection.
    """

    def __init__(self, server: Server, choices: int = 8, max_tokens: int = TOKENS) -> None:
        super().__init__(daemon=True)
        self._choices, self._max_tokens = choices, max_tokens
        self._url = f"{server.url}/v1/completions"
        self.began = threading.Event()
        self.tokens: int | None = None
        self.error: str | None = None
        self.done = False
        self.start()
        assert self.began.wait(60), "no stream"

    def run(self) -> None:
        body = {
            "model": "tiny",
            "prompt": PROMPT,
            "max_tokens": self._max_tokens,
            "n": self._choices,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            with httpx.stream("POST", self._url, json=body, timeout=120) as response:
                for line in response.iter_lines():
                    self._take(line)
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, line: str) -> None:
        self.done = self.done or line == "data: [DONE]"
        if not line.startswith("data: {"):
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = json.dumps(event["error"])
        elif event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        else:
            self.began.set()

    def heard_of_the_end(self, within_s: float) -> bool:
        """Whether it ended in time and not as if it were whole."""
        self.join(within_s)
        whole = self.tokens is not None or (self.done and self.error is None)
        return not self.is_alive() and not whole


def engine(server: Server) -> list[psutil.Process]:
    """The engine of the only replica: its core first, then its workers."""
    (replica,) = replicas(server)
    inside = []
    for process in replica.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            # Its own children are what the engine is forked from, and what watches over it.
            helper = "resource_tracker" in " ".join(process.cmdline())
            if process.ppid() != replica.pid and not helper:
                inside.append(process)
    return sorted(inside, key=lambda process: process.create_time())


def replicas(server: Server) -> list[psutil.Process]:
    return server.named("ServeReplica")


def gone(processes: list[psutil.Process], within_s: float = 30.0) -> bool:
    return wait(lambda: not any(alive(process) for process in processes), within_s)


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def of(port: int) -> list[psutil.Process]:
    """Every process on this machine that was started for the server of `port`."""
    collected = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("RAY_TMPDIR") == f"/tmp/ray-{port}" and alive(process):
                collected.append(process)
    return collected


# --- its answers ---------------------------------------------------------------------------


def greedy(server: Server, model: str) -> list[int]:
    body = {
        "model": model,
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 16,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


def expected(tiny: Path, adapter: Path | None = None) -> list[int]:
    """What transformers answers on the whole weights, the adapter's added to them."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    if adapter is not None:
        tensors = load_file(str(adapter / "adapter_model.safetensors"))
        for name in [n for n in tensors if n.endswith("lora_A.weight")]:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            low, high = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            model.get_submodule(path).weight.data += high @ low * (16 / 8)
    prompt = AutoTokenizer.from_pretrained(tiny)(PROMPT, return_tensors="pt")["input_ids"]
    tokens = prompt
    with torch.inference_mode():
        for _ in range(16):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    answer: list[int] = tokens[0, prompt.shape[1] :].tolist()
    return answer


def test_two_workers_give_the_answer_of_one(server: Server, tiny: Path) -> None:
    core, *workers = engine(server)
    assert len(workers) == 2
    assert all(worker.ppid() == core.pid for worker in workers)
    assert greedy(server, "tiny") == expected(tiny)


def test_an_adapter_is_asked_for_by_its_name(server: Server, tiny: Path, adapter: Path) -> None:
    models = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    assert {model["id"] for model in models} == {"tiny", "tiny-lora"}
    adapted = greedy(server, "tiny-lora")
    assert adapted == expected(tiny, adapter)
    assert adapted != greedy(server, "tiny")


# --- four deaths, in this order ------------------------------------------------------------


def test_a_killed_engine_is_replaced_and_its_clients_get_an_error(server: Server) -> None:
    old, stream = engine(server), Stream(server)
    old[0].kill()
    assert stream.heard_of_the_end(within_s=30)
    assert gone(old)
    assert server.answers(_BACK_S)
    new = engine(server)
    assert len(new) == len(old)
    assert not {p.pid for p in new} & {p.pid for p in old}


def test_a_hung_engine_is_noticed_and_replaced(server: Server) -> None:
    old, stream = engine(server), Stream(server)
    old[0].suspend()
    try:
        # Silent for 5 s, then 3 s in which its requests are told.
        assert stream.heard_of_the_end(within_s=60)
        assert gone(old)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            old[0].resume()
    assert server.answers(_BACK_S)
    assert len(engine(server)) == len(old)


def test_a_killed_replica_leaves_no_engine_and_is_replaced(server: Server) -> None:
    (replica,) = replicas(server)
    old, core = replica.children(recursive=True), engine(server)[0]
    assert core in old
    stream = Stream(server)
    # An engine that runs notices at times by itself; one that cannot run must be gone all the same.
    core.suspend()
    replica.kill()
    try:
        assert stream.heard_of_the_end(within_s=60)
        assert gone(old)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            core.kill()
    assert server.answers(_BACK_S)
    assert len(replicas(server)) == 1


def test_sigterm_lets_a_stream_finish_and_leaves_nothing(server: Server) -> None:
    # A fraction of drain_s, however slow the machine is.
    family, stream = server.family(), Stream(server, choices=1, max_tokens=TOKENS // 10)
    assert server.stop() == 0
    stream.join(30)
    assert (stream.error, stream.done, stream.tokens) == (None, True, TOKENS // 10)
    assert gone(family)
    assert of(PORT) == []
    assert server.output().splitlines()[-1] == "stopped"


# --- forked from a template ---------------------------------------------------------------------


@pytest.mark.slow
def test_replicas_come_from_the_template_and_leave_nothing(tiny: Path, tmp_path: Path) -> None:
    config = configuration(PORT, model=str(tiny), hang_timeout_s=3.0, template=True)
    with launched(config, tmp_path) as server:
        assert server.ready(), server.output()
        (controller,) = server.named("ServeController")
        assert "serve_app.replica.template" in psutil.Process(controller.ppid()).cmdline()
        for _ in range(2):  # The second one replaces the first.
            (replica,) = replicas(server)
            parent = replica.parent()
            assert parent is not None
            assert "serve_app.replica.template" in parent.cmdline()
            assert any("fork server" in child.cmdline()[0] for child in replica.children())
            inside = engine(server)
            replica.kill()
            assert gone([replica, *inside])
            assert server.answers(_BACK_S)
        assert "imports vLLM itself" not in server.output()
        family = server.family()
        assert server.stop() == 0
        assert gone(family)
        assert of(PORT) == []


# --- starts in vain -------------------------------------------------------------------------


def fails(tmp_path: Path, port: int, timeout_s: float = 200, **args: Any) -> str:
    """The one message of a start that cannot succeed."""
    with launched(configuration(port, **args), tmp_path) as server:
        status = server.process.wait(timeout_s)
        output = server.output()
    assert status != 0, output
    assert "Traceback" not in output
    assert of(port) == []
    (message,) = [x for x in output.splitlines() if x.startswith(("error: ", "failed: "))]
    return message


def test_a_missing_model_is_reported(tmp_path: Path) -> None:
    message = fails(tmp_path, 8760, model="/no/such/folder")
    assert "model = '/no/such/folder': no such folder" in message


def test_a_taken_port_is_reported(tmp_path: Path, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 8760)):
        message = fails(tmp_path, 8760, model=str(tiny))
    assert "http_options.port = 8760: cannot listen on 127.0.0.1" in message


@pytest.mark.slow  # tests/launch/test_doctor.py has it without a server.
def test_an_unknown_engine_argument_is_reported_with_the_nearest(
    tmp_path: Path, tiny: Path
) -> None:
    message = fails(tmp_path, 8770, model=str(tiny), engine={"max_model_length": 10})
    assert "engine.max_model_length = 10" in message
    assert "did you mean 'max_model_len'?" in message


def test_weights_that_a_replica_cannot_fetch_are_reported(tmp_path: Path) -> None:
    message = fails(tmp_path, 8780, model="no/such-model")
    assert message.startswith("failed: ")
    assert "model = 'no/such-model': cannot be fetched" in message


@pytest.mark.slow  # As the test above, but after the replica's import of vLLM.
def test_an_impossible_engine_argument_is_reported(tmp_path: Path, tiny: Path) -> None:
    message = fails(tmp_path, 8780, model=str(tiny), engine={"max_model_len": 100_000_000})
    assert "max_model_len" in message
    assert "100000000" in message.replace("_", "").replace(",", "")
