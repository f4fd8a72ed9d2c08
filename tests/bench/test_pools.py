"""Pools of clients, and prompts that offer tools."""

import json
import statistics
from collections import Counter

import pytest

from bench.errors import WorkloadError
from bench.traffic import schedule
from bench.traffic.target import Target, encode
from bench.traffic.workload import parse

POOL = "clients:count=20,rate=10,requests=4000,skew=1.5,input=lognormal(100;0.5),output=20"


def test_few_clients_send_most_and_the_rate_is_that_of_all() -> None:
    taken = parse(POOL, 1).take(4000)
    times = [request.at_s or 0.0 for request in taken]
    assert times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(10, rel=0.25)
    by_client = Counter(request.kind for request in taken)
    assert by_client["client 1"] > by_client["client 2"] > by_client["client 5"]
    assert by_client["client 1"] > 1200


def test_each_client_has_lengths_of_its_own() -> None:
    taken = parse(POOL, 1).take(4000)
    medians = [
        statistics.median(r.input_tokens or 0 for r in taken if r.kind == f"client {n}")
        for n in (1, 2, 3, 4, 5)
    ]
    assert max(medians) > 1.3 * min(medians)
    assert all(len(str(r.prompt).split()) == r.input_tokens for r in taken[:50])


def test_a_pool_is_burstier_than_its_clients_were_one() -> None:
    def dispersion(spec: str) -> float:
        times = [request.at_s or 0.0 for request in parse(spec, 3).take(4000)]
        counts = Counter(int(at_s) for at_s in times)
        each = [counts[second] for second in range(int(times[-1]))]
        return statistics.variance(each) / statistics.fmean(each)

    assert dispersion(POOL + ",cv=4") > 2 * dispersion(POOL + ",cv=0.3")


def test_a_pool_is_replayed_at_its_own_times() -> None:
    plan = schedule.plan(parse(POOL, 1, ""), schedule.parse("trace"), 50, None, 1)
    assert [item.at_s for item in plan.planned] == [r.at_s for r in parse(POOL, 1, "").take(50)]


def test_every_prompt_offers_the_same_tools_and_says_something_else() -> None:
    first, other = parse("calls:tools=3,choice=required", 1).take(2)
    assert first.extra == other.extra
    assert first.prompt != other.prompt
    body = json.loads(encode(Target(url="http://h", model="m", endpoint="chat"), first))
    names = [tool["function"]["name"] for tool in body["tools"]]
    assert len(set(names)) == 3
    assert body["tool_choice"] == "required"
    assert parse("calls:tools=3", 1).request(0).extra["tools"] != first.extra["tools"]
    with pytest.raises(WorkloadError, match="did you mean 'required'"):
        parse("calls:choice=requird", 1)
