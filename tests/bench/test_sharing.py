"""The simulated tenants: what the queue of serve_app is worth beside FCFS, on a small engine."""

import random
from dataclasses import replace

import pytest

from bench.simulation.batch import serve
from bench.simulation.enginemodel import roofline
from bench.simulation.job import clone
from bench.simulation.sharing import (
    FLOOD,
    GOOD,
    Case,
    Lengths,
    Ours,
    compare,
    jain,
    poisson,
    run,
    table,
)

SHORT = Lengths(prompt_median=200, output_median=30, most_prompt=2000, most_output=200)


def test_jain() -> None:
    assert jain([1, 1, 1, 1]) == 1
    assert jain([1, 0, 0, 0]) == 0.25


@pytest.mark.parametrize("ahead", [False, True])
def test_a_queue_with_room_delays_nobody(ahead: bool) -> None:
    """A request that comes during a step does not wait for its end before it goes to the engine."""
    engine = replace(roofline("H100", "Qwen2.5-7B"), max_num_seqs=32, schedules_ahead=ahead)
    arrivals = poisson(GOOD, 2.0, 20.0, SHORT, random.Random(1))
    records = serve(engine, [clone(job) for _, job in arrivals])
    outcome = run(engine, arrivals, Ours(), 32, 32, 60.0)
    firsts_s = [record.chunk_s[0] - record.planned_s for record in records]
    assert outcome.ttft_s(GOOD, 0.0) == pytest.approx(firsts_s)


def test_the_parts_of_a_time_to_first_token_are_all_of_it() -> None:
    engine = replace(roofline("H100", "Qwen2.5-0.5B"), max_num_seqs=32)
    arrivals = poisson(GOOD, 20.0, 5.0, SHORT, random.Random(1))
    arrivals += poisson(FLOOD, 200.0, 5.0, SHORT, random.Random(2))
    arrivals.sort(key=lambda each: each[1].at_s)
    outcome = run(engine, arrivals, Ours(), 32, 64, 5.0)
    ttft_s, parts_s = outcome.ttft_s(GOOD, 0.0), outcome.parts_s(GOOD, 0.0)
    assert [sum(each) for each in parts_s] == pytest.approx(ttft_s)
    assert min(map(min, parts_s)) > -1e-9
    assert max(each[-1] for each in parts_s) > 0  # Prompts of others in the same step.


def test_an_engine_that_prefers_a_tenant_reads_its_prompts_first() -> None:
    engine = replace(roofline("H100", "Qwen2.5-0.5B"), max_num_seqs=32, token_budget=256)
    case = Case(engine, SHORT, SHORT, 0.8, 10.0, 64, 2.0, 8.0, (200,), 10**6, priority=True)
    found = compare(case, seeds=[0])
    assert found["priority"]["ttft_p50_s"] < found["ours"]["ttft_p50_s"]
    assert found["oracle 200"]["ttft_p50_s"] < found["ours"]["ttft_p50_s"]


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
    assert "writing" in table(found)
    # Of the same requests: where prompts differ, another mix is served, and tokens with it.
    if flood is SHORT:
        assert ours["tokens_to_fcfs"] > 0.95
