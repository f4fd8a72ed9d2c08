"""What follows from the records and samples of an engine: its scheduler, KV cache and profile."""

import pytest

from bench.engine import kvcache, profile, scheduler
from bench.engine.orders import LoadOutcome, Ready
from bench.records import Record


def record(index: int, kind: str, planned_s: float, first_s: float) -> Record:
    return Record(
        index=index,
        kind=kind,
        planned_s=planned_s,
        sent_s=planned_s,
        status=200,
        chunk_s=[first_s, first_s + 0.1],
        end_s=first_s + 0.1,
        input_tokens=10,
        output_tokens=2,
    )


def test_who_passes_whom() -> None:
    longs = [record(0, "long", 0.0, 1.0)]
    shorts = [
        record(1, "short", 0.0, 0.5),  # Behind it, and passed it.
        record(2, "short", 0.2, 1.2),  # Behind it, and waited.
        record(3, "short", 1.1, 1.2),  # It had its token already.
    ]
    assert scheduler.order(longs, shorts) == (0.5, 1.0)
    assert scheduler.order(longs, shorts[1:2]) == (0.0, 0.0)
    assert scheduler.order(longs, shorts[2:]) == (None, None)
    on = scheduler.case("fcfs", True, [*longs, *shorts], 2.0)
    assert on.ttft_max_s == {"short": 1.0, "long": 1.0}
    assert on.tokens_per_s == 4.0
    slow = [record(1, "short", 0.0, 2.0), record(0, "long", 0.0, 1.0)]
    off = scheduler.case("fcfs", False, slow, 2.0)
    output = scheduler.advice([on, off])
    assert output == [
        "fcfs: without chunked prefill short prompts wait 4.00 times as long for their first "
        "token (median), long ones 1.00 times"
    ]


def test_blocks_that_are_partly_empty_are_waste() -> None:
    ready = Ready(limits={}, kv_blocks=101, block_tokens=16, load_s=1.0)
    sample = {"t_s": 1.0, "blocks": 50.0, "tokens": 600.0, "running": 3.0, "waiting": 1.0}
    answer = LoadOutcome(records=[], kv=[sample, sample | {"tokens": 900.0}], preempted=2)
    view = kvcache.view(ready, answer)
    assert view.tokens == 1600
    assert view.used_peak == 0.5
    assert view.waste_share == pytest.approx(0.125)  # A quarter, and none.
    assert view.preempted == 2
    assert view.hit_rate is None
    assert kvcache.fits(100, 16, (16, 17, 5000)) == {16: 100, 17: 50, 5000: 0}
    assert len(kvcache.thinned([sample] * 1000, 100)) == 100


def test_the_hottest_function_is_the_one_most_samples_ended_in() -> None:
    stacks = "main;a (x.py:1);b (x.py:2) 30\nmain;a (x.py:1) 10\nmain;c;b (x.py:2) 20\nnonsense\n"
    outcome = profile.hottest(stacks)
    assert outcome[0] == profile.Hot(function="b (x.py:2)", share=50 / 60)
    assert outcome[1].share == pytest.approx(10 / 60)
    assert profile.hottest("") == []
