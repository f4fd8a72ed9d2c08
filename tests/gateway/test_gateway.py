"""Behind the gateway: real engines, killed under real clients. Ports 8790 to 8799.

The tests of `fleet` run in this order: the last one leaves it without a replica for a while.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from serve_app.launch import rust
from tests.server import Server, configuration, launched, wait

NAME = "SmolLM2-135M-Instruct"
ASK = {"prompt": "Once upon a time there was", "max_tokens": 160, "temperature": 0}


@pytest.fixture(scope="module")
def fleet(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines behind one gateway, which answers most of these requests in the fast lane."""
    config = configuration(
        8790,
        model=str(tiny),
        served_model_name="m",
        replicas=2,
        template=True,  # Four replicas start here, each in half of the time.
        cpus_per_replica=0.5,
        lane="auto",
        gateway={"enabled": True, "cpus": 0.1},
        engine={"dtype": "float32", "max_model_len": 4096},
    )
    with launched(config, tmp_path_factory.mktemp("gateway")) as running:
        assert running.ready(), running.output()
        yield running


def engines(server: Server) -> list[psutil.Process]:
    """The replicas' processes, the engines in them."""
    return server.named("ServeReplica:llm:engine")


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_each_interface_answers(fleet: Server) -> None:
    there = client(fleet)
    assert [model.id for model in there.models.list().data] == ["m"]
    whole = there.completions.create(model="m", **ASK)
    parts = list(there.completions.create(model="m", stream=True, **ASK))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    answer = there.responses.create(model="m", input="hello", max_output_tokens=4)
    assert answer.usage is not None
    assert answer.usage.output_tokens == 4
    with pytest.raises(openai.NotFoundError):
        there.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        there.completions.create(model="m", prompt="x", max_tokens=-1)
    assert httpx.get(f"{fleet.url}/health").status_code == 200


def cores(server: Server) -> list[psutil.Process]:
    """The engines' own processes."""
    return server.named("VLLM::EngineCore")


def through(server: Server, disturb: Callable[[], None]) -> None:
    """Eight streams, disturbed once all have begun, are to the end what they would have been."""
    there = client(server)
    ask = {**ASK, "max_tokens": 900}
    right = there.completions.create(model="m", **ask)
    assert right.usage is not None
    texts: list[str] = []
    begun = threading.Barrier(9)

    def read() -> None:
        events = there.completions.create(
            model="m", stream=True, stream_options={"include_usage": True}, **ask
        )
        text, ends, usages = "", [], []
        for place, event in enumerate(events):
            if place == 3:
                begun.wait(60)
            text += "".join(choice.text for choice in event.choices)
            ends += [choice.finish_reason for choice in event.choices if choice.finish_reason]
            usages += [event.usage.completion_tokens] if event.usage else []
        assert ends == ["length"]
        assert usages == [900]
        texts.append(text)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    begun.wait(60)
    disturb()
    for reader in readers:
        reader.join(120)
    assert texts == [right.choices[0].text] * 8


def test_streams_outlive_their_engine_which_restarts_in_its_replica(fleet: Server) -> None:
    assert wait(lambda: len(engines(fleet)) == len(cores(fleet)) == 2, 240)
    before, dying = engines(fleet), cores(fleet)[0]
    through(fleet, dying.kill)
    assert wait(lambda: "the engine was started anew" in fleet.output(), 240)
    assert engines(fleet) == before
    new = [core for core in cores(fleet) if core.create_time() > dying.create_time()][-1]
    assert new.parents()[1] in before  # Between them is the fork server.
    through(fleet, new.kill)
    assert wait(lambda: new not in cores(fleet) and len(cores(fleet)) == 2, 240)


def test_streams_outlive_their_rust_front_end(fleet: Server) -> None:
    if (binary := rust.destination()) is None or not binary.exists():
        pytest.skip("vllm-rs is not installed")
    assert wait(lambda: len(fleet.named("vllm-rs")) == len(cores(fleet)) == 2, 240)
    body = {"model": "m", "prompt": "x", "max_tokens": 2}
    assert wait(lambda: lane(fleet, body) == "fast", 60)
    assert lane(fleet, body | {"n": 2}) == "python"
    dying = fleet.named("vllm-rs")[0]
    through(fleet, dying.kill)
    assert wait(lambda: len(fleet.named("vllm-rs")) == 2, 240)


def lane(server: Server, body: dict[str, object]) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-serve-lane"]


def test_streams_outlive_a_replica_and_service_resumes_after_the_last_one(fleet: Server) -> None:
    assert wait(lambda: len(engines(fleet)) == 2, 240)
    first, last = engines(fleet)
    through(fleet, first.kill)
    last.kill()
    began_s = time.monotonic()
    answer = httpx.post(f"{fleet.url}/v1/completions", json={"model": "m", **ASK}, timeout=120)
    # It waits for a replica: either one came in time, or it says that none did.
    assert answer.status_code in (200, 503)
    assert time.monotonic() - began_s < 90
    assert fleet.answers(240)
    assert wait(lambda: len(engines(fleet)) == 2, 240)


@pytest.mark.slow
def test_it_scales_to_zero_and_the_next_request_is_answered(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = configuration(
        8792,
        model=str(tiny),
        served_model_name="m",
        replicas={"min": 0, "max": 2, "idle_s": 3.0, "start_s": 20.0},
        cpus_per_replica=0.5,
        gateway={"enabled": True, "cpus": 0.1, "replica_timeout_s": 120.0},
        engine={"dtype": "float32"},
    )
    with launched(config, tmp_path_factory.mktemp("zero")) as running:
        assert running.ready(), running.output()
        assert running.answers(60)
        assert wait(lambda: not engines(running), 120), running.output()
        there = client(running)
        assert there.completions.create(model="m", **ASK).choices[0].text
        assert len(engines(running)) == 1


@pytest.mark.slow
def test_several_models_by_name(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = configuration(
        8794,
        model=str(tiny),
        served_model_name="first",
        cpus_per_replica=0.5,
        gateway={"enabled": True, "cpus": 0.1},
        models=[{"served_model_name": "second", "engine": {"max_model_len": 64}}],
        engine={"dtype": "float32"},
    )
    with launched(config, tmp_path_factory.mktemp("models")) as running:
        assert running.ready(), running.output()
        there = client(running)
        assert [model.id for model in there.models.list().data] == ["first", "second"]
        for name in ("first", "second"):
            assert there.completions.create(model=name, prompt="x", max_tokens=2).model == name
        with pytest.raises(openai.NotFoundError, match="first, second"):
            there.completions.create(model="third", prompt="x")
        long = "word " * 80
        there.completions.create(model="first", prompt=long, max_tokens=2)
        with pytest.raises(openai.BadRequestError):
            there.completions.create(model="second", prompt=long, max_tokens=2)
