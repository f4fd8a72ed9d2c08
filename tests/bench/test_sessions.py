"""Sessions: who waits for whom, what is said again, and what a task is measured as."""

import asyncio
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import measure
from bench.errors import LoadError, WorkloadError
from bench.records import Record
from bench.traffic import schedule
from bench.traffic.conversation import Script
from bench.traffic.load import deal
from bench.traffic.request import Request
from bench.traffic.schedule import Planned
from bench.traffic.sender import Sender, Share, decoder
from bench.traffic.target import Target
from bench.traffic.workload import parse

PORT = 8842
AGENTS = "sessions:turns=uniform(1;5),system=20,input=8,output=6,think=1,tools=0.5,agents=2"


def planned(spec: str, count: int = 5, load: str = "users=2") -> list[Planned]:
    plan = schedule.plan(parse(spec, 1, "salt"), schedule.parse(load), count, None, 1)
    return plan.planned


def contents(request: Request) -> list[str]:
    if isinstance(request.prompt, str):
        return [request.prompt]
    return [str(part["content"]) for part in request.prompt if isinstance(part, dict)]


# --- what is generated ----------------------------------------------------------------------


def test_sessions_are_the_same_each_time_and_with_another_salt_say_something_else() -> None:
    first, same, other = (parse(AGENTS, 3, salt) for salt in ("a", "a", "b"))
    for number in (0, 7, 3):
        assert first.turns(number) == same.turns(number)
        pairs = list(zip(first.turns(number), other.turns(number), strict=True))
        assert all(contents(a)[-1] != contents(b)[-1] for a, b in pairs)
        assert all(
            msgspec.structs.replace(a, prompt="") == msgspec.structs.replace(b, prompt="")
            for a, b in pairs
        )


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(0, 10**6))
def test_a_session_waits_only_for_what_comes_before(seed: int, number: int) -> None:
    turns = parse(AGENTS, seed, "").turns(number)
    assert turns[0].after == ()
    for place, turn in enumerate(turns[1:], 1):
        assert turn.after
        assert all(before < place for before in turn.after)
        assert turn.context is None or turn.context < place
    main = [turn for turn in turns if turn.kind != "sub-agent"]
    assert [turn.turn for turn in main] == list(range(1, len(main) + 1))
    # Sub-agents begin side by side, and the main agent waits for all of them.
    assert sum(turn.after == (0,) and turn.context is None for turn in turns) == (
        2 if len(main) > 1 else 0
    )


def test_all_sessions_begin_with_the_system_prompt_and_share_nothing_else() -> None:
    firsts = [parse(AGENTS, 1, "x").turns(number)[0] for number in range(20)]
    assert len({contents(first)[0] for first in firsts}) == 1
    assert len({contents(first)[1] for first in firsts}) == 20
    assert {first.shared for first in firsts} == {20 / 28}


def test_a_plan_counts_sessions_and_keeps_each_at_one_actor() -> None:
    plan = schedule.plan(parse(AGENTS, 1), schedule.parse("poisson:rate=3"), 20, None, 1)
    assert len(plan.session_sizes) == 20
    assert sum(plan.session_sizes.values()) == len(plan.planned)
    first = [item for item in plan.planned if not item.after]
    assert [item.at_s is not None for item in first] == [True] * 20
    assert all(item.at_s is None for item in plan.planned if item.after)
    shares = deal(plan, 3)
    actors = {item.index: share.actor for share in shares for item in share.planned}
    assert all(
        actors[item.index] == actors[before] for item in plan.planned for before in item.after
    )
    with pytest.raises(LoadError, match="has no end"):
        schedule.plan(parse(AGENTS, 1), schedule.parse("users=2"), None, None, 1)


# --- who waits for whom ---------------------------------------------------------------------


@settings(deadline=None)
@given(data=st.data(), chat=st.booleans())
def test_in_any_order_of_answers_a_turn_waits_and_repeats_what_was_said(
    data: st.DataObject, chat: bool
) -> None:
    """Random interleavings of the answers of several sessions, some of which fail."""
    script = Script(items := planned(AGENTS, 4), chat)
    by_index = {item.index: item for item in items}
    under_way, over, failed = list(script.first), set(), set()
    texts: dict[int, list[str]] = {}
    for item in under_way:
        texts[item.index] = contents(script.request(item))
    while under_way:
        item = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        record = Record(index=item.index, planned_s=0.0, text=f"answer {item.index}")
        record.error = "broken" if data.draw(st.integers(0, 9)) == 0 else ""
        (failed if record.error else over).add(item.index)
        for following in script.over(item, record):
            assert set(following.after) <= over
            before = by_index[following.index].request.context
            sent = texts[following.index] = contents(script.request(following))
            if before is not None:
                history = [*texts[before], f"answer {before}"]
                whole = "\n".join(history)
                assert sent[: len(history)] == history if chat else sent[0].startswith(whole)
            under_way.append(following)
    never = {item.index for item in items} - over - failed
    assert all(set(by_index[index].after) & (failed | never) for index in never)
    assert bool(never) <= bool(failed)


def test_a_grown_prompt_knows_its_length_and_what_was_sent_before() -> None:
    first, second = planned("sessions:turns=2,input=10,output=5", 1)
    script = Script([first, second], chat=True)
    script.request(first)
    record = Record(index=0, planned_s=0.0, text="a", input_tokens=30, output_tokens=5)
    (following,) = script.over(first, record)
    grown = script.request(following)
    assert grown.input_tokens == 45
    assert grown.shared == pytest.approx(35 / 45)


# --- sent to a server -----------------------------------------------------------------------


class Listener:
    """A server of chats that remembers what it was asked, and answers with a number."""

    def __init__(self) -> None:
        self.requests: list[tuple[float, list[str]]] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            self.requests.append((time.perf_counter(), [m["content"] for m in body["messages"]]))
            answer = {"delta": {"content": f"answer {len(self.requests)}"}, "finish_reason": "stop"}
            answers = sum(m["role"] == "assistant" for m in body["messages"])
            cached = {"cached_tokens": 10 * answers}
            usage = {"prompt_tokens": 90, "completion_tokens": 4, "prompt_tokens_details": cached}
            events = [{"choices": [answer]}, {"choices": [], "usage": usage}]
            stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            whole = (stream + "data: [DONE]\n\n").encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
            writer.write(b"content-length: %d\r\n\r\n%b" % (len(whole), whole))
            await writer.drain()
        writer.close()


async def sent(items: list[Planned], **share: Any) -> tuple[list[Record], Listener]:
    listener = Listener()
    server = await asyncio.start_server(listener.handle, "127.0.0.1", PORT)
    target = Target(url=f"http://127.0.0.1:{PORT}", model="m", endpoint="chat")
    sender = Sender(Share(actor=0, repeat=0, planned=items, **share), target)
    records: list[Record] = []
    async for batch in sender.send(time.perf_counter() + 0.05):
        records += decoder.decode(batch).records
    server.close()
    return records, listener


@pytest.mark.parametrize("users", [None, [0, 1]])
async def test_every_turn_is_sent_once_with_the_answers_before_it(users: list[int] | None) -> None:
    load = "users=2" if users else "poisson:rate=200"
    items = planned("sessions:turns=3,system=5,input=4,output=4,agents=2,agent_turns=2", 6, load)
    records, listener = await sent(items, users=users)
    assert sorted(record.index for record in records) == list(range(len(items)))
    assert all(record.ok and record.text == "" for record in records)
    ends_s = {record.index: record.end_s or 0.0 for record in records}
    starts_s = {record.index: record.sent_s or 0.0 for record in records}
    for item in items:
        assert all(starts_s[item.index] >= ends_s[before] for before in item.after)
    # What was answered is said again: every later message list begins with an earlier one.
    lists = [messages for _, messages in listener.requests]
    longer = [messages for messages in lists if any(m.startswith("answer") for m in messages)]
    assert len(longer) == 6 * 4
    assert all(any(m[: len(n)] == n for n in lists if len(n) < len(m)) for m in longer)
    result = measure.sessions(records, schedule.Plan(items).session_sizes)
    assert result is not None
    assert (result.planned, result.begun, result.done, result.failed) == (6, 6, 6, 0)
    # The cache answers ten tokens of each answer that is said again.
    shares = {turn.name: turn.cached_share for turn in result.turns}
    assert [shares[f"turn {n}"] for n in (1, 2, 3)] == pytest.approx([0, 1 / 9, 2 / 9])
    assert shares["sub-agent"] == pytest.approx(1 / 18)
    assert {(each.turns, each.cached_tokens) for each in result.each} == {(7, 50)}
    assert result.cached_share == pytest.approx(5 / 63)


# --- recorded sessions ----------------------------------------------------------------------

SHAREGPT = [
    {
        "id": "QWJhYvA_0",
        "conversations": [
            {"from": "gpt", "value": "left over from before"},
            {"from": "human", "value": "What is a trace?"},
            {"from": "gpt", "value": "A list of what was asked, and when it was asked."},
            {"from": "human", "value": "And a salt?"},
            {"from": "gpt", "value": "Noise."},
        ],
    },
    {"id": "empty", "conversations": [{"from": "human", "value": "never answered"}]},
]


def test_sharegpt_conversations_are_sessions(tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(SHAREGPT))
    workload = parse(f"sharegpt:{path},think=2", 0)
    assert workload.count == 1
    first, second = workload.turns(0)
    assert contents(first)[0].endswith("\nWhat is a trace?")
    assert (first.output_tokens, second.output_tokens) == (12, 1)
    assert (second.prompt, second.after, second.context) == ("And a salt?", (0,), 0)
    assert second.gap_s > 0
    again = parse(f"sharegpt:{path}", 0).turns(0)[0]
    assert again.prompt != first.prompt, "a second run is answered from the prefix cache"
    assert parse(f"sharegpt:{path},fresh=no", 0).turns(0)[0].prompt == "What is a trace?"
    path.write_text("\n".join(json.dumps(chat) for chat in SHAREGPT))
    assert len(parse(f"sharegpt:{path}", 0).turns(0)) == 2
    path.write_text("[{]")
    with pytest.raises(WorkloadError, match="sharegpt = "):
        parse(f"sharegpt:{path}", 0)


def call(timestamp: str, prompt: int, completion: int, duration_ms: float = 1000.0) -> Any:
    return {
        "message_id": "m",
        "timestamp": timestamp,
        "duration_ms": duration_ms,
        "initiator_type": "agent",
        "model": "Model A",
        "result": "Success",
        "tokens": {"total": prompt + completion, "prompt": prompt, "completion": completion},
    }


def test_agent_logs_are_sessions_whose_prompts_grow_until_room_is_made(tmp_path: Path) -> None:
    calls = [
        call("2026-06-01T00:00:00Z", 100, 10),
        call("2026-06-01T00:00:03Z", 150, 20),
        call("2026-06-01T00:01:00Z", 80, 5),  # The agent has summed up what was said.
    ]
    log = {"session_id": "s", "date": "2026-06-01", "turns": [{"turn_id": "t", "llm_calls": calls}]}
    path = tmp_path / "shard.jsonl"
    path.write_text(json.dumps(log))
    first, second, third = parse(f"copilot:{path}", 0).turns(0)
    assert [r.input_tokens for r in (first, second, third)] == [100, 40, 80]
    assert (first.context, second.context, third.context) == (None, 0, None)
    assert [r.gap_s for r in (first, second, third)] == pytest.approx([0.0, 2.0, 56.0])
    path.write_text('{"turns": 5}')
    with pytest.raises(WorkloadError, match=r"shard.jsonl:1'"):
        parse(f"copilot:{path}", 0)


def test_rows_of_a_trace_that_wait_for_one_another_are_sessions(tmp_path: Path) -> None:
    rows = [
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.0, "input_length": 16},
        {"chat_id": 2, "parent_chat_id": -1, "timestamp": 1.0, "input_length": 16},
        {"chat_id": 3, "parent_chat_id": 1, "timestamp": 4.0, "input_length": 32},
    ]
    for number, row in enumerate(rows):
        row |= {"output_length": 4, "type": "text", "hash_ids": [number]}
    rows[2]["hash_ids"] = [0, 9]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    workload = parse(f"bailian:{path}", 0)
    assert workload.count == 2
    first, other = workload.turns(0)
    assert (first.after, other.after, other.gap_s, other.context) == ((), (0,), 4.0, None)
    plan = schedule.plan(workload, schedule.parse("trace:speed=2"), None, None, 0)
    assert [(item.at_s, item.session, item.after) for item in plan.planned] == [
        (0.0, 0, ()),
        (2.0, 0, (0,)),
        (0.5, 1, ()),
    ]


# --- figures --------------------------------------------------------------------------------


def record(session: int, turn: int, planned_s: float, end_s: float, **more: Any) -> Record:
    return Record(
        index=turn,
        session=session,
        turn=turn,
        planned_s=planned_s,
        sent_s=planned_s,
        end_s=end_s,
        chunk_s=[planned_s + 0.1],
        **more,
    )


def test_a_task_takes_from_its_first_request_to_its_last_answer() -> None:
    records = [
        record(0, 1, 0.0, 2.0, cached_tokens=0, input_tokens=10),
        record(0, 2, 5.0, 8.0, cached_tokens=10, input_tokens=20),
        record(1, 1, 1.0, 2.0),
        record(1, 2, 2.0, 3.0, error="http 500", kind=""),
        record(2, 1, 3.0, 4.0),
    ]
    result = measure.sessions(records, {0: 2, 1: 2, 2: 2, 3: 2})
    assert result is not None
    assert (result.planned, result.begun, result.done, result.failed) == (4, 3, 1, 1)
    assert result.task_mean_s == 8.0
    assert result.served_share == pytest.approx(5 / 8)
    first, second = result.turns
    assert (first.name, first.requests, second.failed) == ("turn 1", 3, 1)
    assert (first.cached_share, second.cached_share) == (0.0, 0.5)
    assert (first.reusable_share, second.reusable_share) == (0.0, 0.0)
    assert [each.task_s for each in result.each] == [8.0, None, None]
    assert [each.cached_share for each in result.each] == [pytest.approx(1 / 3), None, None]
    # One session says nothing of how sessions differ.
    assert result.cached_share == pytest.approx(1 / 3)
    assert (result.cached_share_low, result.cached_share_high) == (None, None)
    assert measure.sessions(records, {}) is None


def test_the_share_of_a_session_that_a_cache_answers_has_an_interval() -> None:
    """Sessions whose share is drawn: its mean is in 95 % of the intervals."""
    rng, held = random.Random(3), 0
    for _ in range(200):
        records = [
            record(n, 1, 0.0, 1.0, cached_tokens=rng.randrange(0, 101), input_tokens=200)
            for n in range(12)
        ]
        result = measure.sessions(records, dict.fromkeys(range(12), 1))
        assert result is not None
        held += (result.cached_share_low or 0) <= 0.25 <= (result.cached_share_high or 0)
    assert 0.9 <= held / 200 <= 0.99


def test_what_could_be_cached_is_what_was_sent_before() -> None:
    records = [
        record(0, 1, 0.0, 1.0, cached_tokens=0, input_tokens=100, shared=0.5),
        record(0, 2, 2.0, 3.0, cached_tokens=160, input_tokens=200, shared=0.9),
        record(1, 2, 2.0, 3.0, cached_tokens=0, input_tokens=200, shared=0.8),
    ]
    result = measure.sessions(records, {0: 2, 1: 1})
    assert result is not None
    first, second = result.turns
    assert (first.cached_share, first.reusable_share) == (0.0, 0.5)
    assert (second.cached_share, second.reusable_share) == pytest.approx((0.4, 0.85))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_time_under_way_is_counted_once_where_requests_overlap(
    spans: list[tuple[float, float]], rng: random.Random
) -> None:
    records = [record(0, turn, min(span), max(span)) for turn, span in enumerate(spans, 1)]
    rng.shuffle(records)
    result = measure.sessions(records, {0: len(records)})
    assert result is not None
    if result.served_share is not None and result.task_mean_s:
        points = sorted({point for span in spans for point in span})
        covered = sum(
            b - a
            for a, b in itertools.pairwise(points)
            if any(min(span) <= a and b <= max(span) for span in spans)
        )
        assert result.served_share * result.task_mean_s == pytest.approx(covered, abs=1e-6)
