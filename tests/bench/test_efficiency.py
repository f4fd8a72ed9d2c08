"""What a token costs: joules, dollars, and what a user gets for it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import measure, pareto
from bench.errors import BenchError
from bench.hardware import gpu
from bench.hardware.gpu import GpuSample
from tests.bench import made


def samples(watts: list[float], seconds: int, start_j: float = 5e6) -> list[GpuSample]:
    """GPUs that use so much, read every half second one after another."""
    return [
        GpuSample(
            t_s=t / 2 + 0.01 * number,
            gpu=number,
            utilisation=1.0,
            memory_gib=1.0,
            joules=start_j + power * (t / 2 + 0.01 * number),
        )
        for t in range(2 * seconds)
        for number, power in enumerate(watts)
    ]


def test_energy_is_of_all_gpus_from_zero() -> None:
    used = gpu.energy(samples([300.0, 100.0], 10))
    assert used[0][1] == pytest.approx(0.0, abs=2.0)
    assert used[-1][1] == pytest.approx(400.0 * used[-1][0], rel=0.01)
    assert gpu.energy([]) == []
    broken = samples([300.0], 3)
    broken[2].joules = None
    assert gpu.energy(broken) == []


@pytest.mark.parametrize(
    ("named", "indices"),
    [
        (None, [0, 1, 2]),
        ("", [0, 1, 2]),
        ("2,0", [2, 0]),
        ("1,7,0", [1]),
        ("GPU-b", [1]),
        ("GPU-", []),
        ("-1", []),
    ],
)
def test_only_visible_gpus_are_sampled(
    named: str | None, indices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: f"GPU-{'abc'[handle]}123")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpu.visible() == indices


def test_a_token_costs_what_was_used_while_it_was_made() -> None:
    measures = measure.measure(made.records(200))
    seconds = int(measures.to_s) + 2
    result = measure.efficiency(measures, gpu.energy(samples([300.0, 100.0], seconds)), 2, 3.6)
    assert measures.output_tokens_per_s is not None
    assert result.watts == pytest.approx(400.0, rel=0.02)
    assert result.joules_per_output_token == pytest.approx(
        400 / measures.output_tokens_per_s, rel=0.02
    )
    assert result.gpu_tokens_per_s == pytest.approx(measures.output_tokens_per_s / 2)
    # Two GPUs at 3.6 dollars an hour are 0.002 dollars a second.
    assert result.usd_per_million_output_tokens == pytest.approx(
        2000 / measures.output_tokens_per_s
    )
    assert measures.tpot_p90_s is not None
    assert result.user_tokens_per_s == pytest.approx(1 / measures.tpot_p90_s)


def test_what_is_not_known_is_not_said() -> None:
    measures = measure.measure(made.records(50))
    result = measure.efficiency(measures)
    assert (result.joules, result.gpu_tokens_per_s, result.usd_per_million_tokens) == (
        None,
        None,
        None,
    )
    assert result.user_tokens_per_s is not None
    # Sampling began late: the window is not covered.
    late = [(measures.to_s + t, 100.0 * t) for t in range(5)]
    assert measure.efficiency(measures, late).joules is None
    assert "joules" not in measure.efficiency_summary([result, result])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_nobody_beats(points: list[tuple[int, int]]) -> None:
    result = measure.on_front([(float(x), float(y)) for x, y in points])
    for (x, y), best in zip(points, result, strict=True):
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert best != beaten
    assert any(result)
    order = list(range(len(points)))
    random.Random(1).shuffle(order)
    again = measure.on_front([(float(points[i][0]), float(points[i][1])) for i in order])
    assert again == [result[i] for i in order]


def test_the_loads_of_a_curve() -> None:
    assert pareto.users_of("16, 1,4,4") == (1, 4, 16)
    for text in ("", "0", "1,x", "-1"):
        with pytest.raises(BenchError, match="users = "):
            pareto.users_of(text)
