"""Whether what a prefix cache answered is explained by the workload."""

from typing import Any

import pytest

from bench import measure
from bench.figures import Repeat, figures
from bench.records import Record
from bench.scrape import Sample
from bench.traffic.load import Outcome


def record(**changes: Any) -> Record:
    settings: dict[str, Any] = {
        "status": 200,
        "sent_s": 0.0,
        "end_s": 1.0,
        "chunk_s": [0.5],
        "asked_input_tokens": 200,
        "input_tokens": 200,
        "output_tokens": 1,
    }
    return Record(index=0, planned_s=0.0, **{**settings, **changes})


def doubt(*records: Record) -> str:
    return " ".join(measure.answer_doubts(measure.measure(records)))


def test_hits_in_a_workload_that_shares_nothing_are_doubted() -> None:
    outcome = doubt(record(cached_tokens=192), record(cached_tokens=0))
    assert "47% of the prompt tokens" in outcome
    assert outcome in measure.doubts(
        measure.measure([record(cached_tokens=192), record(cached_tokens=0)])
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"cached_tokens": None},
        {"cached_tokens": 0},
        {"cached_tokens": 96, "shared": 0.5},  # Half of it is shared.
        {"cached_tokens": 32, "input_tokens": 234},  # A chat template of 34 tokens.
        {"cached_tokens": 32, "input_tokens": 60, "asked_input_tokens": None},
    ],
)
def test_hits_that_the_workload_explains_are_not(changes: dict[str, Any]) -> None:
    assert doubt(record(**changes)) == ""


def test_hits_beyond_what_is_shared_are_doubted() -> None:
    assert doubt(record(cached_tokens=192, shared=0.5))


def test_the_share_that_came_from_the_cache() -> None:
    expected, unknown = record(cached_tokens=50), record()
    assert measure.measure([expected, unknown]).answers.cached_share == 0.25
    assert measure.measure([unknown]).answers.cached_share is None


@pytest.mark.parametrize(("rate", "doubted"), [(None, False), (0.04, False), (0.9, True)])
def test_where_answers_do_not_say_it_the_metrics_of_the_server_do(
    rate: float | None, doubted: bool
) -> None:
    server = [Sample(t_s=0.0), Sample(t_s=1.0, prefix_hit_rate=rate)]
    repeat = Repeat(outcome=Outcome(records=[record() for _ in range(20)]), server=server)
    outcome = figures([repeat], None, None, batch=True).doubts
    assert any("by the server's metrics" in doubt for doubt in outcome) == doubted
    shared = [record(shared=0.9) for _ in range(20)]
    repeat = Repeat(outcome=Outcome(records=shared), server=server)
    outcome = figures([repeat], None, None, batch=True).doubts
    assert not any("by the server's metrics" in doubt for doubt in outcome)
