"""`bench scale`: layouts, their ratios, and the whole command on servers that are models."""

import argparse
import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import result
from bench.engine import layouts, scale, scaled
from bench.engine.layouts import Layout
from bench.engine.orders import LoadOutcome
from bench.engine.scaled import Load, OfWorkload, Row
from bench.engine.trial import EngineError
from bench.errors import BenchError
from bench.hardware import roofline
from bench.hardware.roofline import Ceilings, Shape
from bench.records import Record


def test_layouts_are_powers_of_two_and_all_there_are() -> None:
    assert layouts.splits(1) == [(1, 1)]
    assert layouts.splits(2) == [(1, 1), (2, 1), (1, 2)]
    assert layouts.splits(4) == [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4)]
    assert layouts.splits(6)[-2:] == [(6, 1), (1, 6)]


def test_an_engine_stands_in_each_variant_and_replicas_do_not() -> None:
    one_split = {"attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 1}}
    every = layouts.layouts(2, variants={"one": one_split})
    names = ["TP=1", "TP=1 one", "TP=2", "TP=2 one", "2 replicas"]
    assert [layout.name for layout in every] == names
    assert [layout.engine for layout in every] == [{}, one_split, {}, one_split, {}]
    only = layouts.layouts(2, variants={"one": one_split}, only=["TP=1", "TP=2 one"])
    assert [layout.name for layout in only] == ["TP=1", "TP=2 one"]
    with pytest.raises(BenchError, match=r"only = 'TP=3': no such layout"):
        layouts.layouts(2, only=["TP=3"])


@given(
    st.integers(1, 9),
    st.lists(st.sampled_from(["ours", "ours-python", "rust", "apis4"]), min_size=1, unique=True),
)
def test_each_system_has_each_layout_once_and_peers_have_no_replicas(
    gpus: int, names: list[str]
) -> None:
    every = layouts.layouts(gpus, names)
    stood = [(layout.system, layout.tensor_parallel, layout.replicas) for layout in every]
    assert len(set(stood)) == len(stood)
    for name in names:
        mine = [split for system, *split in stood if system == name]
        splits = [list(split) for split in layouts.splits(gpus)]
        assert mine == [split for split in splits if name.startswith("ours") or split[1] == 1]


def test_an_unknown_system_is_refused_by_name() -> None:
    with pytest.raises(BenchError, match=r"systems = 'rusty': no such system; did you mean 'rust'"):
        layouts.layouts(2, ["ours", "rusty"])


def test_layouts_that_stand_together_share_the_gpus_evenly() -> None:
    wanted = layouts.layouts(4)
    places = layouts.placed(wanted, 4)
    assert [len(place) for place in places] == [layout.gpus for layout in wanted]
    waiting = [0.0] * 4
    for layout, place in zip(wanted, places, strict=True):
        assert len(set(place)) == len(place)
        for gpu_ in place:
            waiting[gpu_] += 1 / layout.tensor_parallel
    assert max(waiting) <= 2.75  # In models: 4 replicas, 2 replicas, one, and parts of two more.
    assert layouts.placed([Layout(tensor_parallel=1)], 1) == [[0]]


def test_at_saturation_long_prompts_are_fewer() -> None:
    assert scale.at_saturation("synthetic:input=200,output=128", 256, 4) == 1024
    assert scale.at_saturation("synthetic:input=1024,output=64", 256, 4) == 256
    # Fewer than are asked at once anyway.
    assert scale.at_saturation("synthetic:input=8000,output=64", 256, 4) is None


def test_a_gpu_may_be_saturated_in_several_ways() -> None:
    short = scale.loads("synthetic:input=200,output=128", [256, 512], 2)
    assert [(load.name, load.users) for load in short] == [
        ("1 request", 1),
        ("100 at once", 100),
        ("256 a GPU", 512),
        ("512 a GPU", 1024),
    ]
    # Long prompts saturate at 100: such a load has the figures of that one.
    long = scale.loads("synthetic:input=8000,output=64", [256, 512], 2)
    assert [(load.users, load.count) for load in long[1:]] == [(100, 100)] * 3
    assert [load.name for load in scale.loads("synthetic:input=200,output=128", [], 2)] == [
        "1 request"
    ]


def loads(tpot_s: list[float], *tokens_per_s: list[float], ttft_s: float = 0.1) -> dict[str, Any]:
    """One request alone, and loads with these tokens/s."""
    names = ["100 at once", "256 a GPU", "512 a GPU"][: len(tokens_per_s)]
    every = {"1 request": [Load(users=1, tokens_per_s=9, ttft_s=ttft_s, tpot_s=t) for t in tpot_s]}
    for name, values in zip(names, tokens_per_s, strict=True):
        every[name] = [Load(users=9, tokens_per_s=v, ttft_s=ttft_s, tpot_s=0.1) for v in values]
    return every


ROWS = [
    Row(
        layout=Layout(tensor_parallel=1),
        loads=loads([0.010, 0.010], [1000.0, 1010.0], [2000.0, 2020.0]),
    ),
    Row(
        layout=Layout(tensor_parallel=2),
        loads=loads([0.006, 0.006], [1500.0, 1490.0], [3000.0, 3010.0]),
    ),
    Row(
        layout=Layout(tensor_parallel=1, replicas=2),
        loads=loads([0.010, 0.010], [1800.0, 1790.0], [3900.0, 3980.0]),
    ),
    Row(layout=Layout(tensor_parallel=4), failure="out of memory"),
]


def point(points: list[scaled.Point], layout: str, load: str, system: str = "ours") -> scaled.Point:
    (found,) = [
        each for each in points if (each.layout, each.load, each.system) == (layout, load, system)
    ]
    return found


def test_a_variant_is_compared_with_the_plain_single_gpu() -> None:
    better = Row(layout=Layout(tensor_parallel=1, variant="one"), loads=loads([0.009]))
    plain = Row(layout=Layout(tensor_parallel=1), loads=loads([0.010]))
    both = Row(layout=Layout(tensor_parallel=2, variant="one"), loads=loads([0.005]))
    table = scaled.table([better, plain, both])
    assert [row.single["tpot_s"].ratio for row in table] == pytest.approx([0.9, 1.0, 0.5])
    goal = "2 GPUs: for the latency of one request TP=2 one (0.50 of one GPU's time per token)"
    assert scaled.advice(table) == [goal]


def test_a_split_is_advised_for_each_goal() -> None:
    table = scaled.table(ROWS)
    assert point(table, "TP=2", "1 request").single["tpot_s"].ratio == pytest.approx(0.6)
    assert point(table, "TP=2", "1 request").efficiency is None
    wide = point(table, "2 replicas", "256 a GPU")
    assert wide.efficiency == pytest.approx(0.98, abs=0.01)
    ratio = wide.single["tokens_per_s"]
    assert ratio.low < ratio.ratio < ratio.high
    output = scaled.advice(table)
    assert len(output) == 2
    assert "latency of one request TP=2 (0.60" in output[0]
    assert "throughput 2 replicas (1.96 times one GPU, 0.98 of linear)" in output[0]
    assert output[1] == "4 GPUs: not measured"
    # A single GPU that failed leaves nothing to compare with.
    assert scaled.table(ROWS[1:])[0].single == {}


def of_system(system: str, parallel: int, tpot_s: float, tokens_per_s: float) -> Row:
    drift = (0.9, 1.0, 1.1)
    return Row(
        layout=Layout(tensor_parallel=parallel, system=system),
        loads=loads([tpot_s * d for d in drift], [tokens_per_s * d for d in drift]),
    )


SYSTEMS = [
    of_system("ours", 1, 0.010, 1000.0),
    of_system("rust", 1, 0.010, 2000.0),
    of_system("apis4", 1, 0.020, 900.0),
    of_system("ours", 2, 0.006, 1500.0),
    of_system("rust", 2, 0.005, 1400.0),
    of_system("apis4", 2, 0.004, 1600.0),
]


def test_a_system_is_compared_with_its_own_single_gpu() -> None:
    table = scaled.table(SYSTEMS)
    efficiency = {
        (each.system, each.layout): each.efficiency for each in table if each.load == "100 at once"
    }
    assert efficiency["ours", "TP=2"] == pytest.approx(0.75)
    assert efficiency["rust", "TP=2"] == pytest.approx(0.35)
    assert efficiency["apis4", "TP=2"] == pytest.approx(1600 / 900 / 2)


def test_ours_is_compared_with_the_strongest_peer_of_each_figure() -> None:
    table = scaled.table(SYSTEMS)
    alone, many = point(table, "TP=2", "1 request"), point(table, "TP=2", "100 at once")
    assert (alone.peers["tpot_s"].to, many.peers["tokens_per_s"].to) == ("apis4", "apis4")
    assert alone.peers["tpot_s"].ratio == pytest.approx(1.5)
    one = point(table, "TP=1", "100 at once").peers["tokens_per_s"]
    assert (one.to, one.ratio) == ("rust", pytest.approx(0.5))
    assert one.low < 0.5 < one.high
    assert all(not each.peers for each in table if each.system != "ours")
    # Measured in turn, what drifts under both does not count.
    paired = point(scaled.table(SYSTEMS, paired=True), "TP=1", "100 at once").peers["tokens_per_s"]
    assert (paired.low, paired.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert "0.94" in scaled.advice(table)[0]
    assert "of apis4" in scaled.advice(table)[0]


def test_repeats_beyond_the_time_limit_have_no_pair() -> None:
    cut = SYSTEMS[1].loads | {"100 at once": SYSTEMS[1].loads["100 at once"][:2]}
    rows = [SYSTEMS[0], Row(layout=SYSTEMS[1].layout, loads=cut)]
    ratio = point(scaled.table(rows, paired=True), "TP=1", "100 at once").peers["tokens_per_s"]
    assert ratio.ratio == pytest.approx(0.5)


def test_the_last_line_has_units_and_a_workload_only_where_there_are_several() -> None:
    of = OfWorkload(workload="w", table=scaled.table(SYSTEMS), advice=[])
    short = scaled.in_short([of])
    assert short["table"][0]["tpot_ms"] == pytest.approx(10.0)
    assert {row["figure"] for row in short["peers"]} == {"tokens_per_s", "ttft_s", "tpot_s"}
    assert {row["system"] for row in short["peers"]} == {"ours"}
    assert "workload" not in short["table"][0]
    twice = scaled.in_short([of, of])
    assert {row["workload"] for rows in twice.values() for row in rows} == {"w"}


# --- the whole command, with servers and a client that are models ---------------------------


@dataclass
class Model:
    """Stands for a server: how fast it is follows from its layout.

    Attributes:
        open: servers that run now.
    """

    system: str
    arguments: dict[str, Any]
    replicas: int
    environment: dict[str, str]
    load_s: float = 3.0
    open: ClassVar[list["Model"]] = []
    started: ClassVar[list["Model"]] = []

    def __enter__(self) -> "Model":
        if self.system == "apis4" and self.arguments["tensor_parallel_size"] == 2:
            raise EngineError("out of memory")
        Model.open.append(self)
        Model.started.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Model.open.remove(self)

    def processes(self) -> list[Any]:
        return []

    def step_s(self) -> float:
        slower = {"ours": 1.0, "rust": 0.8}.get(self.system, 1.0)
        return 0.01 * slower / self.arguments["tensor_parallel_size"] ** 0.5


def served(system: str, model: str, arguments: Any, *more: Any) -> Model:
    _folder, _port, _left_s, replicas, environment = more
    return Model(system, arguments, replicas, environment)


def crowded(_: object, server: Model, what: str, users: int, count: int, seed: int) -> LoadOutcome:
    """Each replica serves 200 at a time, the rest wait."""
    assert server in Model.open
    tokens, waves = 10, -(-users // (200 * server.replicas))
    tpot_s = server.step_s() * (1 + 0.01 * (seed % 1000))
    records = [
        Record(
            index=index,
            planned_s=0.0,
            chunk_s=[tpot_s * (1 + token) for token in range(tokens)],
            end_s=tpot_s * tokens,
            input_tokens=200,
            output_tokens=tokens,
        )
        for index in range(count)
    ]
    elapsed_s = waves * tpot_s * tokens * max(1, count // users)
    return LoadOutcome(records=records, elapsed_s=elapsed_s)


def scale_with_models(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> scaled.Scaled:
    Model.open, Model.started = [], []
    monkeypatch.setattr(scale, "Served", served)
    monkeypatch.setattr(scale, "crowded", crowded)
    monkeypatch.setattr(scale, "Crowd", lambda size: contextlib.nullcontext())
    parser = argparse.ArgumentParser()
    scale.arguments(parser)
    scale.command(parser.parse_args(["--model", "m", "--out", str(folder), *words]))
    assert Model.open == []
    return result.read(folder, scale=scaled.Scaled)


@pytest.mark.parametrize("together", [False, True])
def test_each_layout_is_measured_once_for_each_system(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--gpus", "2", "--systems", "ours,rust,apis4", "--saturation", "256,512"]
    if together:
        words += ["--together", "--engine", '{"kv_cache_memory_bytes": 1}']
    measured = scale_with_models(tmp_path, monkeypatch, *words)
    assert [row.layout.title for row in measured.rows] == [
        "TP=1 of ours",
        "TP=1 of rust",
        "TP=1 of apis4",
        "TP=2 of ours",
        "TP=2 of rust",
        "TP=2 of apis4",
        "2 replicas of ours",
    ]
    assert len(Model.started) == 6
    for row in measured.rows[:5]:
        assert {name: len(each) for name, each in row.loads.items()} == {
            "1 request": 3,
            "100 at once": 3,
            "256 a GPU": 3,
            "512 a GPU": 3,
        }
    # One that does not start is a row with its reason, and a doubt.
    assert not measured.valid
    assert measured.doubts == [
        "TP=2 of apis4, synthetic:input=200,output=128: out of memory",
    ]
    many = point(measured.table, "TP=1", "512 a GPU")
    assert many.users == 512
    assert many.peers["tokens_per_s"].to == "rust"
    assert many.peers["tokens_per_s"].ratio == pytest.approx(0.8)
    assert point(measured.table, "2 replicas", "256 a GPU").efficiency == pytest.approx(1.0)
    assert "of rust" in measured.advice[0]
    # Nothing counts joules here, and the models have no processes.
    assert (many.joules_per_token, many.door_s, many.roofline) == (None, None, None)


def test_what_was_measured_is_beside_what_the_hardware_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(
        name="m",
        layers=2,
        hidden=64,
        heads=4,
        kv_heads=4,
        head_dim=16,
        intermediate=128,
        vocab=1000,
    )
    limits = Ceilings(flops_per_s=1e12, bytes_per_s=1e9, source="test")
    monkeypatch.setattr(
        scale.ceilings,
        "shape_and_ceilings",
        lambda folder, model, engine: (
            msgspec.structs.replace(shape, gpus=engine["tensor_parallel_size"]),
            limits,
        ),
    )
    measured = scale_with_models(tmp_path, monkeypatch, "--gpus", "2")
    one = point(measured.table, "TP=1", "1 request")
    step_s = roofline.decode(shape, 1, 200).least_s(limits)
    assert one.roofline == pytest.approx(one.tokens_per_s * step_s, rel=0.02)
    # One request uses one of two replicas.
    assert point(measured.table, "2 replicas", "1 request").roofline == pytest.approx(one.roofline)
    # Two replicas at twice the tokens/s are as far from their limit as one.
    single, both = (
        point(measured.table, name, "256 a GPU").roofline for name in ("TP=1", "2 replicas")
    )
    assert both == pytest.approx(single)


def test_servers_get_the_gpus_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = SimpleNamespace(nvmlInit=lambda: None, nvmlShutdown=lambda: None)
    monkeypatch.setattr(scale, "pynvml", nvml)
    monkeypatch.setattr(scale.gpu, "present", lambda: True)
    monkeypatch.setattr(scale.gpu, "visible", lambda: [5, 2, 3])
    scale_with_models(tmp_path, monkeypatch, "--gpus", "2", "--repeats", "1")
    visible = [server.environment["CUDA_VISIBLE_DEVICES"] for server in Model.started]
    assert visible == ["5", "5,2", "5,2"]
    with pytest.raises(BenchError, match="gpus = '4': this process may use 3"):
        scale_with_models(tmp_path, monkeypatch, "--gpus", "4")


def test_a_layout_that_fails_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any) -> LoadOutcome:
        outcome = crowded(*args)
        if args[3] > 100:
            outcome.records[0].error = "HTTP 500"
        return outcome

    monkeypatch.setattr(scale, "Served", served)
    words = ["--gpus", "1", "--repeats", "1"]
    measured = None
    with monkeypatch.context() as patched:
        patched.setattr(scale, "Crowd", lambda size: contextlib.nullcontext())
        patched.setattr(scale, "crowded", failing)
        parser = argparse.ArgumentParser()
        scale.arguments(parser)
        scale.command(parser.parse_args(["--model", "m", "--out", str(tmp_path), *words]))
        measured = result.read(tmp_path, scale=scaled.Scaled)
    assert list(measured.rows[0].loads) == ["1 request", "100 at once"]
    assert measured.rows[0].failure == "1 of 512 requests failed: HTTP 500"
    assert not measured.valid
