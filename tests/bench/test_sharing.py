"""The simulated tenants: what the queue of serve_app is worth beside FCFS, on a small engine."""

from dataclasses import replace

import pytest

from bench.simulation.enginemodel import roofline
from bench.simulation.sharing import Case, Lengths, compare, jain

SHORT = Lengths(prompt_median=200, output_median=30, most_prompt=2000, most_output=200)


def test_jain() -> None:
    assert jain([1, 1, 1, 1]) == 1
    assert jain([1, 0, 0, 0]) == 0.25


@pytest.mark.parametrize("flood", [SHORT, replace(SHORT, prompt_median=1500)])
def test_a_tenant_within_its_share_beside_one_that_floods(flood: Lengths) -> None:
    engine = replace(roofline("H100", "Qwen2.5-0.5B"), max_num_seqs=32)
    found = compare(Case(engine, SHORT, flood, 0.8, 10.0, 64, 2.0, 10.0), seeds=[0])
    fcfs, ours = found["fcfs"], found["ours"]
    assert fcfs["served"] < 0.5
    assert ours["served"] == 1
    assert ours["ttft_p99_s"] < 0.5 * fcfs["ttft_p99_s"]
    assert ours["ttft_p99_s"] <= found["round_robin"]["ttft_p99_s"]
    assert ours["jain"] > 0.95
    # Of the same requests: where prompts differ, another mix is served, and tokens with it.
    if flood is SHORT:
        assert ours["tokens_to_fcfs"] > 0.95
