"""What the engine reports, and what becomes of it."""

import asyncio
import random
from types import SimpleNamespace

import msgspec
import pytest

from serve_app.lanes.door import Ends
from serve_app.lanes.fastlane import FastLane
from serve_app.observe.timeline import Timeline
from serve_app.replica.reports import Ended, Receiver, Report, Sender, client_ids
from serve_app.scaling.signals import Signals


def ended(request_id: str, reason: str = "length") -> Ended:
    return Ended(request_id, 4, 11, arrived_s=1.0, first_s=2.0, last_s=4.0, reason=reason)


def report(*over: Ended, steps: int = 5) -> Report:
    return Report(
        engine=0,
        steps=steps,
        busy_s=0.25,
        running=3,
        waiting=1,
        kv_usage=0.5,
        unread_tokens=70,
        prompt_tokens=4,
        first_s=[0.1],
        generated_tokens=11,
        gaps=10,
        gap_s=2.0,
        preempted=0,
        ended=list(over),
    )


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("cmpl-mine-0123abcd", ("mine", "mine-0123abcd")),
        ("chatcmpl-mine", ("mine",)),
        ("cmpl-a-b-c", ("a-b-c",)),
        ("other", ("other",)),
    ],
)
def test_a_request_is_found_by_the_id_of_its_client(name: str, ids: tuple[str, ...]) -> None:
    assert client_ids(name) == ids


async def test_reports_reach_the_replica_whole_and_in_order() -> None:
    received: list[Report] = []
    receiver = Receiver(received.append)
    receiver.start()
    sent = [report(*(ended(f"cmpl-{n}") for n in range(place)), steps=place) for place in range(50)]
    first, second = Sender(receiver.path), Sender(receiver.path)  # An engine that was started anew.
    for each in sent[:25]:
        first.send(each)
    while len(received) < 25:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for each in sent[25:]:
        second.send(each)
    while len(received) < 50:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert received == sent
    receiver.close()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        second.send(sent[0])


async def test_every_request_learns_its_own_end() -> None:
    """Ids that clients use twice at once, in any order of ends and departures."""
    chance = random.Random(3)
    ends = Ends()
    waiting: list[tuple[str, asyncio.Future[Ended]]] = []
    for _ in range(2000):
        what = chance.random()
        if what < 0.5 or not waiting:
            name = f"id-{chance.randrange(5)}"
            waiting.append((name, ends.expect(name)))
        elif what < 0.8:
            name, _ = waiting[chance.randrange(len(waiting))]
            place = next(n for n, (other, _) in enumerate(waiting) if other == name)
            ends.tell(ended(f"chatcmpl-{name}-0123abcd"))
            assert waiting.pop(place)[1].done()
        else:
            ends.forget(*waiting.pop(chance.randrange(len(waiting))))
        assert len(ends) == len(waiting)
    ends.tell(ended("cmpl-nobody"))


def test_what_the_scheduler_saw_is_what_the_policy_gets() -> None:
    from serve_app.replica.engine import _recorder
    from serve_app.replica.iterations import iteration_of

    now_s = 100.0
    signals = Signals(clock=lambda: now_s, ttft_s=0.5, itl_s=0.1)
    lane = FastLane("tiny", "secret", signals)
    recorder = _recorder(signals, None)(None, 0)
    lane._engine = SimpleNamespace(
        count=lambda report: recorder.record(None, iteration_of(report)),
        last_sign_s=0.0,
        fast=None,
    )
    lane._receive(report(ended("cmpl-a"), ended("cmpl-b", "abort")))
    now_s += 1.0
    load = signals.load(max_running=8, in_engine=4)
    assert (load.running, load.waiting, load.kv_usage) == (3, 1, 0.5)
    assert load.steps_per_s == 5
    assert load.decode_tokens_per_s == 11
    assert load.busy == pytest.approx(0.25)
    assert load.itl_s == pytest.approx(0.2)
    assert load.finished_per_s == 2
    assert load.missed_per_s == 2  # A first token after 1 s, and 0.2 s between tokens.
    assert lane.unread_tokens == 70
    assert lane._engine.last_sign_s > 0
    lane.close()


def test_the_compiler_of_grammars_is_that_of_the_engine_that_runs() -> None:
    lane = FastLane("tiny", "secret", Signals())
    lane._engine = engine = SimpleNamespace(count=lambda report: None, last_sign_s=0.0, fast=1)
    assert not lane._compiles_grammars()
    for compiler, known in (("", False), ("GuidanceBackend", False), ("XgrammarBackend", True)):
        lane._receive(msgspec.structs.replace(report(), grammar_compiler=compiler))
        assert lane._compiles_grammars() == known
    engine.fast = 2  # It was started anew, and has reported nothing yet.
    assert not lane._compiles_grammars()
    lane.close()


def test_the_account_of_an_answer() -> None:
    whole = Timeline.of(ended("cmpl-a"), 200)
    assert (whole.left, whole.broken, whole.generated_tokens) == (False, False, 11)
    assert Timeline.of(ended("cmpl-a", "abort"), 200).left
    assert Timeline.of(None, 200).broken
    assert not Timeline.of(None, 400).broken


def test_vllm_counts_the_fast_lane_as_its_own() -> None:
    from serve_app.replica.iterations import iteration_of

    stats = iteration_of(report(ended("cmpl-a"), ended("cmpl-b", "abort"), ended("cmpl-c", "odd")))
    assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (4, 11)
    # A sample: nothing is done for each token.
    assert stats.inter_token_latencies_iter == [pytest.approx(0.2)] * 8
    assert [str(each.finish_reason) for each in stats.finished_requests] == [
        "length",
        "abort",
        "error",
    ]
    (first, *_) = stats.finished_requests
    assert (first.e2e_latency, first.prefill_time, first.decode_time) == (3.0, 1.0, 2.0)
    assert first.mean_time_per_output_token == pytest.approx(0.2)
