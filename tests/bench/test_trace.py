"""Traces: what of a file becomes a request, when, how long, and which text it shares."""

import gzip
import itertools
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import WorkloadError
from bench.traffic import trace
from bench.traffic.request import Request
from bench.traffic.trace import Cut, Row
from bench.traffic.workload import parse

TRACES = Path(__file__).parents[3] / "shared" / "traces"
CONVERSATION = TRACES / "azure-llm-2023-conv.csv"
CODE = TRACES / "azure-llm-2023-code.csv"


def words(request: Request) -> list[str]:
    assert isinstance(request.prompt, str)
    return request.prompt.split(" ")


def azure(folder: Path, *lines: str, head: str = "TIMESTAMP,ContextTokens,GeneratedTokens") -> Path:
    path = folder / "trace.csv"
    path.write_bytes("\r\n".join([head, *lines]).encode())
    return path


def jsonl(folder: Path, *rows: tuple[float, int, int, list[int] | None]) -> Path:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    lines = [dict(zip(names, row, strict=True)) for row in rows]
    for line in lines:
        if line["hash_ids"] is None:
            del line["hash_ids"]
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- the real traces ------------------------------------------------------------------------


@pytest.mark.skipif(not CONVERSATION.exists(), reason=f"{CONVERSATION.name} is not here")
def test_the_conversation_trace_is_as_published() -> None:
    rows = trace.read("azure", CONVERSATION)
    assert len(rows) == 19366
    assert rows[-1].at_s == pytest.approx(3501.722, abs=0.001)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(rows)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1.09, abs=0.01)
    assert statistics.median(row.input_tokens for row in rows) == 1020
    assert statistics.median(row.output_tokens for row in rows) == 129
    assert (rows[0].input_tokens, rows[0].output_tokens, rows[0].at_s) == (374, 44, 0.0)
    assert rows[1].at_s == pytest.approx(4.3145790, abs=1e-6)


@pytest.mark.skipif(not CODE.exists(), reason=f"{CODE.name} is not here")
def test_the_code_trace_is_as_published_and_replays_scaled_down() -> None:
    rows = trace.read("azure", CODE)
    assert len(rows) == 8819
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(rows)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(13, abs=0.5)
    workload = parse(f"azure:{CODE},scale=0.1,max_input=300,speed=10,duration_s=600", 0)
    wanted = [row for row in rows if row.at_s < 600]
    assert workload.length == len(wanted)
    for row, request in zip(wanted, workload.take(200), strict=False):
        assert request.at_s == pytest.approx(row.at_s / 10)
        assert len(words(request)) == request.input_tokens
        assert request.input_tokens == min(300, max(1, round(row.input_tokens * 0.1)))


# --- formats --------------------------------------------------------------------------------


def test_azure_times_count_from_the_first_request_whatever_their_zone_and_order(
    tmp_path: Path,
) -> None:
    path = azure(
        tmp_path,
        "2024-05-10 00:00:02.500000+00:00,30,3",
        "2024-05-10 00:00:00.009930+00:00,10,1",
        "2024-05-10 00:00:01+00:00,20,0",
    )
    rows = trace.read("azure", path)
    assert [row.at_s for row in rows] == pytest.approx([0, 0.99007, 2.49007])
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [(10, 1), (20, 0), (30, 3)]


def test_mooncake_counts_milliseconds_and_vllm_seconds(tmp_path: Path) -> None:
    path = jsonl(tmp_path, (500, 600, 5, [7, 8]), (3500, 700, 6, None))
    expected = [Row(0.0, 600, 5, (7, 8)), Row(3.0, 700, 6)]
    assert trace.read("mooncake", path) == expected
    assert [row.at_s for row in trace.read("vllm", path)] == [0.0, 3000.0]
    assert trace.read("vllm", path, tick_s=0.001) == expected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2023-11-16 18:17:03.97,12,", "column 'GeneratedTokens' is missing"),
        ("2023-11-16 18:17:03.97,12", "column 'GeneratedTokens' is missing"),
        ("2023-11-16 18:17:03.97,-1,5", "a length is below 0"),
        ("2023-11-16 18:17:03.97,1,-5", "a length is below 0"),
        ("yesterday,1,5", "column 'TIMESTAMP' is 'yesterday': not a date"),
    ],
)
def test_a_bad_azure_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = azure(tmp_path, "2023-11-16 18:17:03.9799600,4808,10", line)
    with pytest.raises(WorkloadError) as caught:
        trace.read("azure", path)
    assert f"azure = '{path}:3': not a request: " in str(caught.value)
    assert problem in str(caught.value)


def test_the_multimodal_trace_of_2025_is_read_packed_or_not(tmp_path: Path) -> None:
    head = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens"
    lines = "2024-10-15 00:00:00.1,2,900,30", "2024-10-15 00:00:03,0,20,5"
    path = azure(tmp_path, *lines, head=head)
    expected = [Row(0.0, 900, 30), Row(pytest.approx(2.9), 20, 5)]
    assert trace.read("azure", path) == expected
    packed = tmp_path / "trace.csv.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    assert trace.read("azure", packed) == expected


BURST_1 = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
BURST_3 = BURST_1.replace("Model", "Session ID,Elapsed time,Model")


def test_burstgpt_of_both_schemas(tmp_path: Path) -> None:
    """The first two files, as published, and the third, which has sessions."""
    path = azure(
        tmp_path,
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,0,1087,API log",  # It failed: nothing was written.
        "118,GPT-4,417,276,693,Conversation log",
        head=BURST_1,
    )
    rows = trace.read("burstgpt", path)
    assert [(row.at_s, row.input_tokens, row.output_tokens) for row in rows] == [
        (0.0, 472, 18),
        (113.0, 417, 276),
    ]
    path = azure(
        tmp_path,
        "19440110.0,1722ac82,43,GPT-4,906,446,1352,Conversation log",
        "19440161.0,d5983bf9,2,ChatGPT,36,29,65,Conversation log",
        "19440192.0,1722ac82,5,ChatGPT,60,10,70,Conversation log",
        head=BURST_3,
    )
    rows = trace.read("burstgpt", path)
    assert [row.busy_s for row in rows] == [43.0, 2.0, 5.0]
    assert trace.families(rows) == [[0, 2], [1]]


BAILIAN = [
    '{"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 21, '
    '"output_length": 4, "type": "text", "turn": 1, "hash_ids": [1089, 1090]}',
    '{"chat_id": 160, "parent_chat_id": 159, "timestamp": 62.5, "input_length": 40, '
    '"output_length": 8, "type": "search", "turn": 2, "hash_ids": [1089, 1091, 6326]}',
    '{"chat_id": 161, "parent_chat_id": 7, "timestamp": 63, "input_length": 9, '
    '"output_length": 8, "type": "text", "turn": 3, "hash_ids": [5]}',
]


def test_bailian_has_seconds_blocks_of_16_and_parents(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(BAILIAN))
    rows = trace.read("bailian", path)
    assert [row.at_s for row in rows] == pytest.approx([0.0, 1.386, 1.886])
    assert trace.families(rows) == [[0, 1], [2]]
    first, other, third = parse(f"bailian:{path}", 0).take(3)
    assert words(first)[:16] == words(other)[:16]
    assert words(first)[16:] != words(other)[16:21]
    assert (first.kind, other.kind) == ("text", "search")
    assert [request.shared for request in (first, other, third)] == pytest.approx(
        [16 / 21, 16 / 40, 0.0]
    )


@settings(deadline=None)
@given(
    size=st.sampled_from([8, 16, 32, 64, 512, 1024]),
    lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=8),
    rounded_up=st.booleans(),
)
def test_different_hashes_are_never_read_as_equal_prompts(
    tmp_path_factory: pytest.TempPathFactory, size: int, lengths: list[int], rounded_up: bool
) -> None:
    """Whatever block size a trace was recorded with: it is read with one that fits."""
    counts = [-(-length // size) if rounded_up else length // size for length in lengths]
    numbers = itertools.count(1)
    rows = [
        (place, length, 5, [next(numbers) for _ in range(count)])
        for place, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]
    path = jsonl(tmp_path_factory.mktemp("trace"), *rows)
    read = trace.read("mooncake", path)
    block = trace.block_tokens("mooncake", path, read, None)
    for row in read:
        cut = list(trace.blocks(row, block))
        assert sum(expected is not None for expected, _ in cut) == len(row.hashes)
        assert sum(tokens for _, tokens in cut) == row.input_tokens


def test_a_block_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, (0, 160, 5, list(range(10))), (100, 160, 5, [0, *range(20, 29)]))
    first, other = parse(f"mooncake:{path}", 1).take(2)
    assert first.prompt != other.prompt
    assert words(first)[:16] == words(other)[:16]
    assert "16 tokens" in parse(f"mooncake:{path}", 1).notes[0]
    with pytest.raises(WorkloadError, match="has 10 hashes for 160 tokens"):
        parse(f"mooncake:{path},block=512", 1)
    path = jsonl(tmp_path, (0, 3, 5, [1, 2, 3, 4, 5]))
    with pytest.raises(WorkloadError, match="say with block="):
        parse(f"mooncake:{path}", 1)


def test_an_azure_file_needs_its_columns(tmp_path: Path) -> None:
    path = azure(tmp_path, "1,2,3", head="TIMESTAMP,Context,GeneratedTokens")
    with pytest.raises(WorkloadError, match="no column 'ContextTokens'"):
        trace.read("azure", path)
    path.write_bytes(b"")
    with pytest.raises(WorkloadError, match="no column 'TIMESTAMP'"):
        trace.read("azure", path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"timestamp": 5, "input_length": 6}', "missing required field `output_length`"),
        ('{"timestamp": "x", "input_length": 6, "output_length": 1}', r"$.timestamp"),
        ('{"timestamp": 5, "input_length": -6, "output_length": 1}', "a length is below 0"),
        ('{"timestamp": 5, "input_length": 6, "output_le', "truncated"),
        ("\x00", "malformed"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = jsonl(tmp_path, (0, 6, 5, []))
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(WorkloadError) as caught:
        trace.read("mooncake", path)
    assert f"mooncake = '{path}:3': not a request: " in str(caught.value)
    assert problem in str(caught.value)


def test_a_trace_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="holds no request"):
        trace.read("azure", azure(tmp_path))
    path = jsonl(tmp_path, (0, 6, 5, None), (1000, 6, 5, None))
    with pytest.raises(
        WorkloadError, match=r"no request in the part of start_s=2, duration_s=None"
    ):
        parse(f"mooncake:{path},start_s=2", 0)


# --- cutting --------------------------------------------------------------------------------

ROWS = [Row(float(n), 100 * n, 10 * n, (n,)) for n in range(10)]


def test_without_options_a_trace_is_as_it_was_but_for_empty_prompts_and_answers() -> None:
    assert Cut()(ROWS) == [Row(0.0, 1, 1, (0,)), *ROWS[1:]]


def test_a_part_starts_at_0_and_is_measured_in_the_time_of_the_trace() -> None:
    rows = Cut(start_s=2.5, duration_s=3.0, speed=2.0)(ROWS)
    assert [row.at_s for row in rows] == [0.25, 0.75, 1.25]
    assert [row.input_tokens for row in rows] == [300, 400, 500]


def test_the_part_holds_its_start_and_not_its_end() -> None:
    assert [row.hashes for row in Cut(start_s=2.0, duration_s=2.0)(ROWS)] == [(2,), (3,)]


def test_lengths_are_scaled_and_then_clipped() -> None:
    rows = Cut(start_s=1.0, scale=0.125, max_input=60, max_output=4)(ROWS)
    assert [row.input_tokens for row in rows] == [12, 25, 38, 50, 60, 60, 60, 60, 60]
    assert [row.output_tokens for row in rows] == [1, 2, 4, 4, 4, 4, 4, 4, 4]


def test_a_limit_counts_within_the_part() -> None:
    assert [row.hashes for row in Cut(start_s=4.0, limit=2)(ROWS)] == [(4,), (5,)]


def test_blocks_are_as_long_as_the_prompt() -> None:
    assert list(trace.blocks(Row(0, 1024, 1, (5, 6)), 512)) == [(5, 512), (6, 512)]
    assert list(trace.blocks(Row(0, 600, 1, (5, 6)), 512)) == [(5, 512), (6, 88)]
    assert list(trace.blocks(Row(0, 500, 1, (5, 6)), 512)) == [(5, 500)]
    assert list(trace.blocks(Row(0, 1100, 1, (5, 6)), 512)) == [(5, 512), (6, 512), (None, 76)]
    assert list(trace.blocks(Row(0, 9, 1, ()), 512)) == [(None, 9)]
    assert list(trace.blocks(Row(0, 8, 1, (5, 6, 7, 8)), 2.5)) == [(5, 2), (6, 3), (7, 2), (8, 1)]


# --- texts ----------------------------------------------------------------------------------


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    return jsonl(
        tmp_path,
        (0, 1300, 5, [1, 2, 3]),
        (1000, 1536, 5, [1, 2, 4]),
        (2000, 1200, 5, [1, 2, 3]),
        (2000, 1024, 5, [9, 2]),
        (4000, 700, 5, [1]),
        (5000, 700, 5, [1]),
    )


def test_equal_hashes_are_equal_text_and_others_are_not(mooncake: Path) -> None:
    taken = [words(request) for request in parse(f"mooncake:{mooncake}", 3).take(9)]
    assert [len(each) for each in taken] == [1300, 1536, 1200, 1024, 700, 700]
    blocks = {
        (place, hash_): [taken[row][512 * place : 512 * (place + 1)] for row in rows]
        for (place, hash_), rows in {
            (0, 1): (0, 1, 2, 4, 5),
            (1, 2): (0, 1, 2, 3),
        }.items()
    }
    for texts in blocks.values():
        assert all(each == texts[0] for each in texts)
    # The last block of one hash, cut at two lengths: the shorter begins the longer.
    assert taken[0][1024 : 1024 + 176] == taken[2][1024:]
    # Hash 4 is not 3, 9 is not 1, and what no hash speaks for is nobody else's.
    for item, other in (
        (taken[1][1024:], taken[0][1024:]),
        (taken[3][:512], taken[0][:512]),
        (taken[4][512:], taken[5][512:]),
    ):
        assert item[:4] != other[:4]
        assert sum(a == b for a, b in zip(item, other, strict=False)) < 0.05 * len(other)


def test_equal_blocks_are_equal_bytes(mooncake: Path) -> None:
    first, second = parse(f"mooncake:{mooncake}", 3).take(2)
    end = len(" ".join(words(first)[:1024]))
    assert str(first.prompt)[:end] == str(second.prompt)[:end]
    assert str(first.prompt)[: end + 10] != str(second.prompt)[: end + 10]


def test_sharing_keeps_its_shape_when_scaled_and_clipped(mooncake: Path) -> None:
    taken = [words(r) for r in parse(f"mooncake:{mooncake},scale=0.1,max_input=125", 3).take(9)]
    assert [len(each) for each in taken] == [125, 125, 120, 102, 70, 70]
    # Blocks of 51.2 words.
    assert taken[0][:102] == taken[1][:102] == taken[2][:102]
    assert taken[0][102:106] != taken[1][102:106]
    assert taken[3][:4] != taken[0][:4]
    assert taken[3][51:] == taken[0][51:102]
    assert taken[4][:51] == taken[5][:51]
    assert taken[4][51:55] != taken[5][51:55]


def test_another_seed_replays_the_same_trace_with_other_words(mooncake: Path) -> None:
    first, other = (parse(f"mooncake:{mooncake}", seed, "").take(9) for seed in (1, 2))
    for a, b in zip(first, other, strict=True):
        assert (a.at_s, a.input_tokens, a.output_tokens) == (
            b.at_s,
            b.input_tokens,
            b.output_tokens,
        )
        assert words(a)[:4] != words(b)[:4]
    assert parse(f"mooncake:{mooncake}", 1, "").take(9) == first


def test_vllm_blocks_are_16_tokens_unless_said(tmp_path: Path) -> None:
    path = jsonl(tmp_path, (0, 40, 5, [1, 2]), (1.5, 40, 5, [1, 3]))
    first, other = parse(f"vllm:{path}", 0).take(2)
    assert other.at_s == 1.5
    assert words(first)[:16] == words(other)[:16]
    assert words(first)[16:20] != words(other)[16:20]
    first, other = parse(f"vllm:{path},block=20,tick_s=0.001", 0).take(2)
    assert other.at_s == 0.0015
    assert words(first)[:20] == words(other)[:20]
    assert words(first)[20:24] != words(other)[20:24]


def test_an_azure_trace_shares_nothing(tmp_path: Path) -> None:
    lines = [f"2023-11-16 18:17:{n:02}.9799600,50,10" for n in range(50)]
    workload = parse(f"azure:{azure(tmp_path, *lines)}", 0)
    assert workload.timed
    taken = workload.take(50)
    assert len({words(request)[0] for request in taken}) == 50
    assert [request.at_s for request in taken] == pytest.approx(list(range(50)))
