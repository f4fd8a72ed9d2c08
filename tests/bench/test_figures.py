"""The figures of a run are typed: what is written is read, and what cannot be read says why."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import result
from bench.errors import ResultError
from bench.figures import Repeat, Run, figures
from bench.pages.loaded import KINDS
from bench.result import Result
from bench.traffic.load import Happening, Outcome
from tests.bench import made

RESULTS = Path(result.__file__).parent / "results"

STREAMS = [made.records(30, repeat=repeat, users=4) for repeat in range(2)]


def measured(**of_last: Any) -> Run:
    outcomes = [Outcome(records=STREAMS[0]), Outcome(records=STREAMS[1], **of_last)]
    for outcome in outcomes:
        outcome.actors, outcome.cpu = {0: "here", 1: "there"}, {0: 0.2, 1: 0.3}
    return figures([Repeat(outcome=outcome) for outcome in outcomes], None, 4)


def write(folder: Path, **more: Any) -> dict[str, Any]:
    """The result of a run as a file may hold it, whoever wrote it."""
    fields: dict[str, Any] = msgspec.to_builtins(measured(), str_keys=True) | more
    folder.mkdir(exist_ok=True)
    (folder / result.RESULT).write_bytes(msgspec.json.encode(fields))
    return fields


def test_figures_are_read_as_they_were_written(tmp_path: Path) -> None:
    result.write(tmp_path, measured())
    assert result.read(tmp_path, run=Run) == measured()


def test_what_other_tools_add_to_a_run_is_no_obstacle(tmp_path: Path) -> None:
    result.write(tmp_path, measured(), more={"num_prompts": 60, "label": None})
    assert result.read(tmp_path, run=Run) == measured()
    assert msgspec.json.decode((tmp_path / result.RESULT).read_bytes())["num_prompts"] == 60


def test_an_interruption_is_a_field_and_a_doubt() -> None:
    whole = measured()
    assert (whole.interrupted, whole.valid, whole.doubts) == (False, True, [])
    broken_off = measured(interrupted=True, events=[Happening(1.0, "any words")])
    assert (broken_off.interrupted, broken_off.valid) == (True, False)
    assert broken_off.doubts[0].startswith("repeat 2: ")
    assert [(event.repeat, event.what) for event in broken_off.events] == [(1, "any words")]


def test_a_doubt_makes_figures_invalid() -> None:
    whole = result.doubted(measured(), "the disk was full")
    assert (whole.valid, whole.doubts) == (False, ["the disk was full"])
    assert measured().valid


@pytest.mark.parametrize(
    ("schema", "age"), [(result.SCHEMA + 1, "newer"), (0, "older"), ("x", "older")]
)
def test_a_result_of_another_schema_is_refused_in_one_sentence_and_never_replaced(
    tmp_path: Path, schema: Any, age: str
) -> None:
    write(tmp_path, schema=schema)
    before = (tmp_path / result.RESULT).read_bytes()
    problem = f"schema {schema!r}, written by an? {age} version of bench; this one reads schema 1"
    with pytest.raises(ResultError, match=problem):
        result.read(tmp_path, run=Run)
    result.write(tmp_path, measured())
    assert (tmp_path / "earlier-1" / result.RESULT).read_bytes() == before
    assert result.read(tmp_path, run=Run) == measured()


@pytest.mark.parametrize("kind", ["tune", "", "something newer"])
def test_a_result_of_another_kind_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    write(tmp_path, benchmark=kind)
    problem = rf"a result of `bench {kind}` \(schema 1\); wanted is one of `bench run`, `bench kv`"
    with pytest.raises(ResultError, match=problem):
        result.read(tmp_path, run=Run, kv=Result)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[]", "not a result"), ("{}", "not a result"), ("{", "not JSON"), ("\xff", "not JSON")],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / result.RESULT).write_bytes(text.encode("latin-1"))
    with pytest.raises(ResultError, match=problem):
        result.read(tmp_path, run=Run)


def test_a_result_from_before_there_were_schemas_is_read(tmp_path: Path) -> None:
    fields = write(tmp_path, name="a run")
    del fields["schema"]
    (tmp_path / result.RESULT).write_bytes(msgspec.json.encode(fields))
    assert result.read(tmp_path, run=Run).name == "a run"


@pytest.mark.parametrize("field", ["repeats", "whole", "summary"])
@pytest.mark.parametrize("schema", [True, False])
def test_a_run_without_its_figures_is_refused(tmp_path: Path, field: str, schema: bool) -> None:
    """No default stands for what was not measured, in a first result neither."""
    fields = write(tmp_path)
    for name in (field, *([] if schema else ["schema"])):
        del fields[name]
    (tmp_path / result.RESULT).write_bytes(msgspec.json.encode(fields))
    with pytest.raises(ResultError, match=f"missing required field `{field}`"):
        result.read(tmp_path, run=Run)


@pytest.mark.parametrize(
    ("field", "value"), [("whole", 3), ("doubts", None), ("repeats", [{"ok": "many"}])]
)
def test_a_field_of_another_type_is_named(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path, **{field: value})
    with pytest.raises(ResultError, match=rf"not as this version .* schema 1: .*\$\.{field}"):
        result.read(tmp_path, run=Run)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_result_of_any_kind_is_written_with_its_name_and_schema(kind: str) -> None:
    of_kind = KINDS[kind]
    assert of_kind.__struct_config__.frozen
    assert {"schema", "valid", "doubts", "machine"} < set(of_kind.__struct_fields__)
    assert of_kind.__doc__


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_of_this_repository_can_be_read_if_they_are_of_a_command(path: Path) -> None:
    """Most are compiled by hand from several results, and name no command."""
    fields = msgspec.json.decode(path.read_bytes())
    if fields.get("benchmark") in KINDS:
        read = result.read(path, **KINDS)
        assert read.doubts == fields.get("doubts", [])
        assert read.started == fields.get("started", "")
    else:
        with pytest.raises(ResultError, match=r"not a result of bench|wanted is one of"):
            result.read(path, **KINDS)


def test_a_cost_is_known_where_gpus_and_their_price_are() -> None:
    repeats = [Repeat(outcome=Outcome(records=each)) for each in STREAMS]
    known = figures(repeats, None, 4, gpus=2, usd_per_gpu_hour=3.0)
    assert known.efficiency["usd_per_million_output_tokens"]["mean"] > 0
    assert measured().efficiency.keys() == {"user_tokens_per_s"}
