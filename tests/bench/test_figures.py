"""The figures of a run are typed: what is written is read, and what cannot be read says why."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import result
from bench.errors import ResultError
from bench.figures import Figures, Repeat, cost, figures
from bench.traffic.load import Happening, Outcome
from tests.bench import made

STREAMS = [made.records(30, repeat=repeat, users=4) for repeat in range(2)]


def measured(**of_last: Any) -> Figures:
    outcomes = [Outcome(records=STREAMS[0]), Outcome(records=STREAMS[1], **of_last)]
    for outcome in outcomes:
        outcome.actors, outcome.cpu = {0: "here", 1: "there"}, {0: 0.2, 1: 0.3}
    return figures([Repeat(outcome=outcome) for outcome in outcomes], None, 4)


def write(folder: Path, **more: Any) -> dict[str, Any]:
    output = result.header("run", "a run") | msgspec.to_builtins(measured()) | more
    result.write(folder, output)
    return output


def test_figures_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path)
    assert result.read_figures(tmp_path) == measured()


def test_what_other_benchmarks_add_to_a_run_is_no_obstacle(tmp_path: Path) -> None:
    write(tmp_path, num_prompts=60, workload="synthetic:input=5", gpu=[[], []])
    assert result.read_figures(tmp_path).whole == measured().whole


def test_an_interruption_is_a_field_and_a_doubt() -> None:
    whole = measured()
    assert (whole.interrupted, whole.valid, whole.doubts) == (False, True, [])
    broken_off = measured(interrupted=True, events=[Happening(1.0, "any words")])
    assert (broken_off.interrupted, broken_off.valid) == (True, False)
    assert broken_off.doubts[0].startswith("repeat 2: ")
    assert [(event.repeat, event.what) for event in broken_off.events] == [(1, "any words")]


def test_a_doubt_makes_figures_invalid() -> None:
    whole = measured()
    whole.doubt("the disk was full")
    assert (whole.valid, whole.doubts) == (False, ["the disk was full"])


@pytest.mark.parametrize(
    ("schema", "age"), [(result.SCHEMA + 1, "newer"), (0, "older"), ("x", "older")]
)
def test_a_result_of_another_schema_is_refused_in_one_sentence_and_never_replaced(
    tmp_path: Path, schema: Any, age: str
) -> None:
    write(tmp_path, schema=schema)
    before = (tmp_path / result.RESULT).read_bytes()
    with pytest.raises(ResultError, match=f"schema {schema!r}, written by an? {age} version"):
        result.read(tmp_path)
    write(tmp_path)
    assert (tmp_path / "earlier-1" / result.RESULT).read_bytes() == before
    assert result.read_figures(tmp_path) == measured()


def test_a_result_from_before_there_were_schemas_is_read(tmp_path: Path) -> None:
    output = write(tmp_path)
    del output["schema"]
    result.write(tmp_path, output)
    assert result.read(tmp_path)["name"] == "a run"


@pytest.mark.parametrize("lacking", ["whole", "doubts", "interrupted"])
def test_figures_that_are_lacking_are_named(tmp_path: Path, lacking: str) -> None:
    output = write(tmp_path)
    del output[lacking]
    result.write(tmp_path, output)
    with pytest.raises(ResultError, match=f"an older version of bench wrote it.*`{lacking}`"):
        result.read_figures(tmp_path)


def test_a_cost_is_known_where_gpus_and_their_price_are() -> None:
    repeats = [Repeat(outcome=Outcome(records=each)) for each in STREAMS]
    known = cost(measured().repeats, repeats, gpus=2, usd_per_gpu_hour=3.0)
    assert known.efficiency["usd_per_million_output_tokens"]["mean"] > 0
    assert cost(measured().repeats, repeats, None, None).efficiency.keys() == {"user_tokens_per_s"}
