"""The engine model: small cases by hand, what must hold of any batch, fits that find the truth."""

import math
import random
from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from bench import measure, records
from bench.errors import BenchError, ResultError
from bench.records import Record
from bench.simulation import enginefit, enginemodel
from bench.simulation.batch import Batch, serve, serve_closed
from bench.simulation.enginefit import Load
from bench.simulation.enginemodel import Costs, Engine, roofline
from bench.simulation.job import Job, clone

COSTS = Costs(step_s=0.01, prefill_token_s=1e-4, decode_seq_s=1e-3, kv_token_s=1e-6)
ENGINE = Engine(COSTS, max_num_seqs=8, token_budget=100, kv_blocks=1000, block_tokens=16)


def jobs(
    count: int, rate: float, read: tuple[int, int], write: tuple[int, int], seed: int = 0
) -> list[Job]:
    rng, at_s, result = random.Random(seed), 0.0, []
    for index in range(count):
        at_s += rng.expovariate(rate)
        result.append(Job(index, at_s, rng.randint(*read), rng.randint(*write)))
    return result


# --- by hand --------------------------------------------------------------------------------


def test_one_request_alone() -> None:
    (record,) = serve(ENGINE, [Job(0, 1.0, input_tokens=50, output_tokens=3)])
    # Read: 0.01 + 50 * 1e-4. Then a token a step, with 50 and 51 tokens in the cache.
    first_s = 1.0 + 0.015
    second_s = first_s + 0.01 + 0.001 + 50e-6
    third_s = second_s + 0.01 + 0.001 + 51e-6
    assert record.chunk_s == pytest.approx([first_s, second_s, third_s])
    assert record.end_s == record.chunk_s[-1]
    assert (record.planned_s, record.output_tokens, record.ok) == (1.0, 3, True)


def test_a_prompt_longer_than_the_budget_is_read_in_chunks() -> None:
    (record,) = serve(ENGINE, [Job(0, 0.0, input_tokens=250, output_tokens=1)])
    assert record.chunk_s == pytest.approx([3 * 0.01 + 250e-4])


def test_a_prompt_shares_its_step_with_those_that_write() -> None:
    first, second = serve(ENGINE, [Job(0, 0.0, 10, 4), Job(1, 0.012, 150, 1)])
    # The second comes while the first writes its second token: it waits for that step to end.
    a = 0.01 + 10e-4
    b = a + 0.011 + 10e-6
    c = b + 0.011 + 11e-6 + 99e-4  # The budget, less the token of the first.
    d = c + 0.011 + 12e-6 + 51e-4
    assert first.chunk_s == pytest.approx([a, b, c, d])
    assert second.chunk_s == pytest.approx([d])


def test_a_scheduler_that_is_ahead_reads_a_prompt_one_step_later() -> None:
    first, second = serve(
        replace(ENGINE, schedules_ahead=True), [Job(0, 0.0, 10, 5), Job(1, 0.012, 50, 1)]
    )
    a = 0.01 + 10e-4  # An idle engine reads the prompt at once.
    b = a + 0.011 + 10e-6
    c = b + 0.011 + 11e-6  # Scheduled at `a`, when the second had not come.
    d = c + 0.011 + 12e-6 + 50e-4
    assert first.chunk_s[:4] == pytest.approx([a, b, c, d])
    assert second.chunk_s == pytest.approx([d])


def test_no_more_run_than_there_are_places() -> None:
    engine = replace(ENGINE, max_num_seqs=2)
    result = serve(engine, [Job(index, 0.0, 10, 5) for index in range(4)])
    ends_s = [record.end_s for record in result]
    assert ends_s[0] == ends_s[1]
    assert result[2].chunk_s[0] > (
        ends_s[0] or 0
    )  # The third begins when the first two have ended.


def test_one_that_loses_its_blocks_is_read_again_and_gets_every_token() -> None:
    # Two prompts of 2 blocks; 5 blocks in all; each needs 4 in the end.
    engine = replace(ENGINE, kv_blocks=5)
    batch = Batch(engine)
    both = [Job(0, 0.0, 32, 32), Job(1, 0.0, 32, 32)]
    for job in both:
        batch.add(job, 0.0)
    batch.advance(math.inf)
    results = [job.record(batch.step_end_s) for job in both]
    assert [job.preemptions for job in both] == [0, 1]
    assert [len(record.chunk_s) for record in results] == [32, 32]
    assert all(before < after for before, after in pairwise(results[1].chunk_s))
    assert batch.preempted == 1
    assert batch.prefilled == 32 + 32 + both[1].base
    assert batch.kv_usage == 0


def test_one_that_never_fits_is_refused() -> None:
    engine = replace(ENGINE, kv_blocks=4)
    long, short = serve(engine, [Job(0, 0.0, 60, 5), Job(1, 0.0, 10, 5)])
    assert "longer than the KV cache" in long.error
    assert short.ok


def test_a_known_prefix_is_not_read_again() -> None:
    engine = replace(ENGINE, prefix_caching=True)
    same = tuple(range(4))  # 64 tokens.
    first = Job(0, 0.0, 70, 1, hashes=same)
    second = Job(1, 1.0, 70, 1, hashes=same)
    other = Job(2, 2.0, 70, 1, hashes=(9, 1, 2, 3))
    results = [measure.ttft_s(record) for record in serve(engine, [first, second, other])]
    assert results == pytest.approx([0.01 + 70e-4, 0.01 + 6e-4, 0.01 + 70e-4])


def test_what_a_request_spends_before_the_engine() -> None:
    engine = replace(ENGINE, costs=replace(COSTS, request_s=0.5))
    (record,) = serve(engine, [Job(0, 1.0, 50, 1)])
    assert measure.ttft_s(record) == pytest.approx(0.5 + 0.015)


def test_the_first_of_many_that_come_at_once_begins_alone() -> None:
    engine = replace(ENGINE, accept_s=0.001)
    result = serve(engine, [Job(index, 0.0, 10, 1) for index in range(4)])
    firsts_s = [record.chunk_s[0] for record in result]
    assert firsts_s == pytest.approx([0.011, *[0.011 + 0.01 + 30e-4] * 3])


def test_users_of_a_closed_loop_send_when_they_are_answered() -> None:
    result = serve_closed(
        ENGINE, [Job(index, 0.0, 10, 5) for index in range(6)], users=2, think_s=1
    )
    for user in (0, 1):
        mine = [record for record in result if record.user == user]
        assert len(mine) == 3
        for before, after in pairwise(mine):
            assert after.planned_s == pytest.approx((before.end_s or 0) + 1)


# --- what must hold -------------------------------------------------------------------------


SMALL = Engine(COSTS, max_num_seqs=6, token_budget=64, kv_blocks=40, block_tokens=4)


@pytest.mark.parametrize("seed", range(5))
def test_every_request_gets_every_token_and_the_cache_holds(seed: int) -> None:
    mine = jobs(60, 8.0, (1, 60), (1, 60), seed)
    batch = Batch(SMALL)
    rng, at_s = random.Random(seed), 0.0
    left = list(mine)
    ended: list[Job] = []
    while len(ended) < len(mine):
        at_s += rng.expovariate(5.0)
        while left and left[0].at_s <= at_s:
            batch.add(left[0], left.pop(0).at_s)
        ended += batch.advance(at_s)
        running = list(batch._running)
        waiting = sum(SMALL.blocks(_tokens_held(batch, job)) for job in running)
        assert waiting == SMALL.kv_blocks - batch._free
        assert 0 <= batch._free <= SMALL.kv_blocks
        assert len(running) <= SMALL.max_num_seqs
        assert batch.waiting + batch.running + len(ended) + len(left) == len(mine)
        waits = [*batch._waiting, *(job for _, job in batch._coming)]
        unread = [*waits, *([batch._filling] if batch._filling else [])]
        assert batch.unread_tokens == sum(job.input_tokens for job in unread)
    assert batch.idle
    assert batch._kv_tokens == batch._seqs == sum(batch._boundary) == 0
    assert batch.decoded == sum(job.output_tokens for job in mine)
    for job in mine:
        record = job.record(batch.step_end_s)
        assert len(record.chunk_s) == job.output_tokens
        assert record.chunk_s == sorted(record.chunk_s)
        assert record.chunk_s[0] > job.at_s


def _tokens_held(batch: Batch, job: Job) -> int:
    if job.first < 0:
        return job.base
    return job.base + len(batch.step_end_s) - 1 - job.first


@pytest.mark.parametrize("ahead", [False, True])
def test_first_come_first_served(ahead: bool) -> None:
    mine = jobs(200, 30.0, (1, 60), (1, 30))
    engine = replace(SMALL, kv_blocks=10_000, schedules_ahead=ahead)
    firsts = [record.chunk_s[0] for record in serve(engine, mine)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("ahead", [False, True])
def test_how_it_is_advanced_makes_no_difference(ahead: bool) -> None:
    """Stretches are only a way to compute: cut anywhere, the times are the same."""
    engine = replace(SMALL, schedules_ahead=ahead)
    mine = jobs(80, 10.0, (1, 60), (1, 60))
    whole = [record.chunk_s for record in serve(engine, mine)]
    batch, left = Batch(engine), [clone(job) for job in mine]
    for job in left:
        at_s = batch.now_s
        while at_s < job.at_s:
            at_s += 0.003
            batch.advance(min(at_s, job.at_s))
        batch.add(job, job.at_s)
    batch.advance(math.inf)
    for chunks, job in zip(whole, left, strict=True):
        assert chunks == pytest.approx(job.record(batch.step_end_s).chunk_s)


def test_a_longer_load_takes_as_long_as_its_steps_say() -> None:
    """The end of every step is the sum of what the formula says of each."""
    mine = jobs(50, 20.0, (1, 60), (1, 30))
    batch = Batch(replace(SMALL, kv_blocks=10_000))
    for job in mine:
        batch.add(job, 0.0)
    batch.advance(math.inf)
    busy_s = sum(
        COSTS.step_s + COSTS.prefill_token_s * read + COSTS.decode_seq_s * seqs
        for read, seqs in zip(batch.step_prefill, batch.step_seqs, strict=True)
    )
    cached = sum(
        COSTS.kv_token_s * (job.input_tokens + written)
        for job in mine
        for written in range(job.output_tokens - 1)
    )
    assert batch.step_end_s[-1] == pytest.approx(busy_s + cached)
    assert batch.busy_s == pytest.approx(busy_s + cached)


def test_littles_law() -> None:
    result = serve(replace(ENGINE, kv_blocks=10_000), jobs(3000, 8.0, (5, 100), (1, 20)))
    measures = measure.measure(result)
    mean_running = measures.mean_running or 0
    assert mean_running == pytest.approx(
        (measures.requests_per_s or 0) * (measures.e2e_mean_s or 0), rel=0.02
    )


def test_one_place_is_an_m_d_1_queue() -> None:
    """One request at a time, each of the same length, Poisson: the mean wait is known."""
    engine = Engine(
        Costs(step_s=0.1, prefill_token_s=0, decode_seq_s=0, kv_token_s=0),
        max_num_seqs=1,
        token_budget=16,
    )
    busy = 0.6
    result = serve(engine, jobs(20_000, busy / 0.1, (8, 8), (1, 1)))
    waits_s = [(measure.ttft_s(record) or 0) - 0.1 for record in result]
    assert sum(waits_s) / len(waits_s) == pytest.approx(busy * 0.1 / (2 * (1 - busy)), rel=0.05)


# --- on paper -------------------------------------------------------------------------------


def test_a_roofline_of_known_cards() -> None:
    engine = roofline("H100", "Qwen2.5-7B")
    # 15 GB at 80% of 3.35 TB/s is 5.7 ms: a token of one user takes a little longer than that.
    assert 5.7e-3 < engine.step_time_s(0, 1, 500) < 9e-3
    # 57,344 bytes a token: over a million tokens beside the weights in 80 GB.
    assert 0.9e6 < engine.kv_blocks * engine.block_tokens < 1.1e6
    slower = roofline("L4", "Qwen2.5-7B")
    assert slower.step_time_s(0, 1, 500) > 8 * engine.step_time_s(0, 1, 500)
    assert slower.max_num_seqs < engine.max_num_seqs
    two = roofline("H100", "Qwen2.5-72B", gpus=4)
    assert two.gpus == 4


@pytest.mark.parametrize(
    ("gpu", "model", "names"),
    [
        ("H10", "Qwen2.5-7B", "'H100'"),
        ("H100", "qwen2.5-7B", "'Qwen2.5-7B'"),
        ("L4", "Qwen2.5-14B", "does not fit 1 L4"),
    ],
)
def test_a_roofline_that_cannot_be(gpu: str, model: str, names: str) -> None:
    with pytest.raises(BenchError, match=names):
        roofline(gpu, model)


def test_an_engine_that_cannot_be() -> None:
    with pytest.raises(BenchError, match="max_num_seqs"):
        Engine(COSTS, max_num_seqs=100, token_budget=50)


# --- fitted ---------------------------------------------------------------------------------


TRUTH = Engine(Costs(0.008, 1.5e-4, 2e-4, 1.5e-7, 0.006), 128, 2048, 20_000)


def noisy(expected: Sequence[Record], merged: int, rng: random.Random) -> list[Record]:
    """As a client sees them: each chunk late by half a millisecond, several tokens to a chunk."""
    seen, free_s = [], dict[int | None, float]()
    for record in expected:
        late_s: list[float] = []
        for at_s in record.chunk_s:
            late_s.append(max(at_s + rng.expovariate(2000), *late_s[-1:], 0.0))
        remaining = late_s[:1] + late_s[1:][merged - 1 :: merged]
        if remaining[-1] != late_s[-1]:
            remaining.append(late_s[-1])
        sent_s = record.planned_s
        if record.user is not None:
            sent_s = max(sent_s, free_s.get(record.user, 0.0))
            free_s[record.user] = late_s[-1]
        changed = {
            "chunk_s": remaining,
            "end_s": remaining[-1],
            "planned_s": sent_s,
            "sent_s": sent_s,
        }
        seen.append(msgspec.structs.replace(record, **changed))
    return seen


def loads(merged: int) -> list[Load]:
    rng = random.Random(1)
    collected = []
    for users, read, write in ((1, 200, 50), (8, 1000, 100), (32, 300, 150), (64, 600, 60)):
        lengths = (read // 2, read * 3 // 2), (write // 2, write * 3 // 2)
        mine = jobs(users * 6 + 16, 1.0, *lengths, seed=users)
        closed = noisy(serve_closed(TRUTH, mine, users), merged, rng)
        collected.append(Load(f"{users} users", (tuple(closed),)))
    mine = jobs(250, 6.0, (100, 2000), (20, 200))
    return [*collected, Load("open", (tuple(noisy(serve(TRUTH, mine), merged, rng)),))]


@pytest.mark.parametrize("merged", [1, 4])
def test_a_fit_finds_the_constants(merged: int) -> None:
    result = enginefit.fit(loads(merged), TRUTH)
    for value, true in zip(astuple(result.costs)[:3], astuple(TRUTH.costs)[:3], strict=True):
        assert value == pytest.approx(true, rel=0.03)
    assert result.costs.kv_token_s == pytest.approx(TRUTH.costs.kv_token_s, rel=0.1)
    assert result.costs.request_s == pytest.approx(TRUTH.costs.request_s, rel=0.15)
    assert result.residual < 0.05
    for value, error, true in zip(
        astuple(result.costs), astuple(result.errors), astuple(TRUTH.costs), strict=True
    ):
        assert abs(value - true) < 4 * error + 0.03 * true


@pytest.mark.parametrize("merged", [1, 4])
def test_a_fit_foretells_a_load_it_has_not_seen(merged: int) -> None:
    foretold = enginefit.validate(loads(merged), TRUTH)
    assert [each.fitted_on for each in foretold] == [4] * 5
    for each in foretold:
        for figure, error in each.error.items():
            assert error is not None, figure
            assert abs(error) < 0.06, (each.load, figure)


def test_a_validation_from_the_folders_of_runs(tmp_path: Path) -> None:
    for load in loads(1)[:3]:
        folder = tmp_path / load.name
        folder.mkdir()
        records.append(folder / "records.jsonl", load.repeats[0])
    read = enginefit.loads([tmp_path])
    assert [(load.name, load.users) for load in read] == [
        ("1 users", 1),
        ("32 users", 32),
        ("8 users", 8),
    ]
    output = enginefit.table(enginefit.fit(read, TRUTH), enginefit.validate(read, TRUTH))
    assert "8 users: output_tokens_per_s" in output


def test_what_cannot_be_fitted(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="holds no"):
        enginefit.loads([tmp_path])
    failed = Record(index=0, planned_s=0.0, error="http 500", status=500, end_s=1.0)
    records.append(tmp_path / "records.jsonl", [failed])
    with pytest.raises(ResultError, match="no request was answered"):
        enginefit.loads([tmp_path])
    few = tuple(serve(ENGINE, [Job(0, 0.0, 10, 3)]))
    with pytest.raises(ResultError, match="too few"):
        enginefit.fit([Load("few", (few,))], ENGINE)
    with pytest.raises(ResultError, match="nothing to predict"):
        enginefit.validate([Load("few", (few,))], ENGINE)


def test_an_engine_survives_the_way_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(msgspec.json.encode({"engine": TRUTH}))
    assert enginefit.from_json(tmp_path) == TRUTH
    path.write_bytes(msgspec.json.encode(TRUTH))
    assert enginefit.from_json(path) == TRUTH
    path.write_text("[1]")
    with pytest.raises(ResultError, match="holds no engine"):
        enginefit.from_json(path)


def test_the_names_are_known() -> None:
    assert set(enginemodel.GPUS) == {"H100", "A100", "L4", "A10G"}
    assert "Qwen2.5-7B" in enginemodel.MODELS
