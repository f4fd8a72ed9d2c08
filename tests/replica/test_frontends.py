"""Which engine arguments leave a replica without vllm-rs: what the real binary says of them."""

from typing import Any

import pytest


def obstacle(**engine: Any) -> str | None:
    from serve_app.replica import frontends
    from serve_app.replica.arguments import parse

    if frontends.binary() is None:
        pytest.skip("vllm-rs is not installed")
    model = {"model": "org/name"}
    return frontends.obstacle(parse({**model, **engine}), parse(model))


def test_usual_arguments_are_no_obstacle() -> None:
    assert obstacle(max_model_len=2048, max_num_seqs=64, block_size=32, dtype="float32") is None


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        # vllm-rs ends at its start with this one, and would take the replica's start with it.
        ({"otlp_traces_endpoint": "http://127.0.0.1:1/v1/traces"}, "otlp_traces_endpoint"),
        ({"response_role": "robot"}, "response_role"),
        # It takes this one and ignores it: /load would leave out the requests of the fast lane.
        ({"enable_server_load_tracking": True}, "enable_server_load_tracking"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
    ],
)
def test_what_vllm_rs_does_not_take_leaves_the_full_lane(engine: dict[str, Any], name: str) -> None:
    why = obstacle(**engine)
    assert why is not None
    assert name in why
