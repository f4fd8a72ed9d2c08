"""The policy of tuning, against functions whose best point is known."""

import math
import random
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest

from bench import quality
from bench.engine import gain, knobs, tuning
from bench.engine.climb import Climb
from bench.engine.effects import effects
from bench.engine.floor import Floor, Lengths
from bench.engine.knobs import Knob
from bench.engine.measured import Measured, Outcome, Trial
from bench.engine.tuning import Search
from bench.hardware.roofline import Ceilings, Shape
from bench.itself.power import KNOBS, tuned

SPACE = [
    Knob(name="max_num_seqs", values=(None, 4, 16, 64), live=True, meaning=""),
    Knob(name="max_num_batched_tokens", values=(None, 32, 128, 512), live=True, meaning=""),
    Knob(name="dtype", values=(None, "a", "b"), meaning=""),
]
Score = Callable[[dict[str, Any]], float]


def landscape(settings: dict[str, Any]) -> float:
    """Best at 64, 128 and b, of which two help each other."""
    seqs = {None: 1.0, 4: 0.3, 16: 0.8, 64: 1.3}[settings.get("max_num_seqs")]
    tokens = {None: 1.0, 32: 0.5, 128: 1.2, 512: 1.1}[settings.get("max_num_batched_tokens")]
    kind = {None: 1.0, "a": 0.9, "b": 1.15}[settings.get("dtype")]
    both = 1.1 if settings.get("max_num_seqs") == 64 and settings.get("dtype") == "b" else 1.0
    return 1000 * seqs * tokens * kind * both


def searched(search: Search, score: Score, noise: float = 0.0) -> list[Trial]:
    rng = random.Random(0)
    request = []
    while (trial := search.ask()) is not None:
        request.append(trial)
        scores = [score(trial.settings) * rng.gauss(1, noise) for _ in range(trial.repeats)]
        search.tell(Outcome(scores=scores))
    return request


def test_a_quarter_of_the_grid_finds_its_best() -> None:
    grid = knobs.points(SPACE)
    best = max(map(landscape, grid))
    search = Search(SPACE, max_trials=len(grid) // 4)
    request = searched(search, landscape, noise=0.02)
    assert search.best is not None
    assert landscape(search.best.settings) >= 0.95 * best
    assert len(search.measured) <= len(grid) / 4
    # And with less than a quarter of what measuring each in full would take.
    work = sum(trial.share * trial.repeats for trial in request)
    assert work <= len(grid) * 3 / 4
    # The best was measured in full, as were the defaults.
    assert 2 in search.best.outcomes
    assert search.default is not None
    assert set(search.default.outcomes) == {0, 2}


def test_nothing_is_measured_that_cannot_win() -> None:
    search = Search(
        SPACE, ceiling=lambda settings: 300 if settings.get("max_num_seqs") == 4 else 9e9
    )
    request = searched(search, landscape)
    assert not any(trial.settings.get("max_num_seqs") == 4 for trial in request)
    assert any("cannot exceed 300" in reason for reason in search.pruned.values())


def test_what_is_impossible_is_not_asked_for_and_what_failed_is_not_asked_for_again() -> None:
    search = Search(SPACE, refused=lambda settings: "no" if settings.get("dtype") == "a" else "")
    failed = []
    while (trial := search.ask()) is not None:
        assert trial.settings.get("dtype") != "a"
        if trial.settings.get("dtype") == "b":
            failed.append(trial)
            search.tell(Outcome(failure="out of memory", oom=True))
        else:
            search.tell(Outcome(scores=[landscape(trial.settings)] * trial.repeats))
    # Only an engine with b was started, whatever else was set.
    assert len(failed) == 1
    assert search.best is not None
    assert search.best.settings == {"max_num_seqs": 64, "max_num_batched_tokens": 128}


def test_the_defaults_stay_where_nothing_is_better() -> None:
    search = Search(SPACE)
    searched(search, lambda settings: 100.0 if not settings else 90.0)
    assert search.best is not None
    assert search.best.settings == {}


def test_what_should_be_worth_most_on_paper_is_tried_first() -> None:
    search = Search(SPACE, worth=lambda settings: 2.0 if settings.get("dtype") == "b" else 1.0)
    request = searched(search, landscape)
    changed = [trial.settings for trial in request if trial.settings]
    assert set(changed[0]) == {"dtype"}
    # Without a difference on paper those that need no engine of their own come first.
    request = searched(Search(SPACE), landscape)
    first = next(trial for trial in request if trial.settings)
    assert first.settings.keys() == {"max_num_seqs"}


def test_in_a_hurry_the_best_so_far_is_confirmed_and_no_more() -> None:
    search = Search(SPACE)
    for _ in range(6):
        trial = search.ask()
        assert trial is not None
        search.tell(Outcome(scores=[landscape(trial.settings)] * trial.repeats))
    search.hurry()
    assert search.best is not None
    assert search.best.settings == {}  # Until it is confirmed.
    request = []
    while (trial := search.ask()) is not None:
        assert (trial.rung, trial.repeats, trial.share) == (2, 3, 1.0)
        request.append(trial.settings)
        search.tell(Outcome(scores=[landscape(trial.settings)] * 3))
    assert request == [{"max_num_seqs": 64}, {}]
    assert search.best.settings == {"max_num_seqs": 64}
    # Before anything but the defaults was measured, they are all there is.
    early = Search(SPACE)
    early.tell(Outcome(scores=[1.0]))
    early.hurry()
    trial = early.ask()
    assert trial is not None
    assert trial.settings == {}
    early.tell(Outcome(scores=[1.0] * 3))
    assert early.ask() is None


# --- what is better, and what was only lucky ------------------------------------------------


@pytest.mark.parametrize("ladder", [False, True])
@pytest.mark.parametrize("spread", [0.02, 0.05])
def test_where_no_setting_is_better_the_defaults_stay(spread: float, ladder: bool) -> None:
    """The best of a dozen noisy scores is no better than the rest: only luck chose it."""
    ratios, changed, false = [], 0, 0
    for seed in range(60):
        search = tuned(seed, spread, ladder=ladder)
        assert search.best is not None
        changed += search.best.settings != {}
        result = gain.gain(search.best, search.default, 2, ladder)
        assert result is not None
        ratios.append(result["ratio"])
        worths = effects(search.measured.values(), 1.04 if ladder else 1.0)
        false += any(e.low is not None and not e.low <= 1 <= (e.high or 0) for e in worths)
    assert changed <= 4
    assert fmean(ratios) == pytest.approx(1.0, abs=0.003)
    assert false <= 6


def test_a_setting_that_is_better_is_found_and_its_gain_is_not_flattered() -> None:
    ratios = []
    for seed in range(40):
        search = tuned(seed, 0.03, lambda settings: 1.2 if settings.get("a") == 3 else 1.0)
        assert search.best is not None
        if search.best.settings.get("a") == 3:
            result = gain.gain(search.best, search.default, 2, False)
            assert result is not None
            ratios.append(result["ratio"])
    assert len(ratios) >= 36
    assert fmean(ratios) == pytest.approx(1.2, rel=0.01)


def test_a_confirmation_is_measured_with_seeds_of_its_own() -> None:
    search, seeds = Search(KNOBS), {False: set(), True: set()}
    rng = random.Random(1)
    while (trial := search.ask()) is not None:
        seeds[trial.held_out > 0].update(trial.seeds)
        search.tell(Outcome(scores=[rng.gauss(1, 0.05) for _ in range(trial.repeats)]))
    assert seeds[True]
    assert not seeds[True] & seeds[False]


def test_effects_are_what_each_value_multiplies_the_score_by() -> None:
    rng = random.Random(1)
    measured = [
        Measured(
            settings=point,
            outcomes={0: Outcome(scores=[landscape(point) * rng.gauss(1, 0.01) for _ in range(2)])},
        )
        for point in knobs.points(SPACE)
        # Two help each other, which no single factor says.
        if not ("dtype" in point and point.get("max_num_seqs") == 64)
    ]
    values = {(each.knob, each.value): each for each in effects(measured)}
    for (name, value), ratio in {
        ("max_num_seqs", 4): 0.3,
        ("max_num_seqs", 64): 1.3,
        ("max_num_batched_tokens", 128): 1.2,
        ("dtype", "b"): 1.15,
    }.items():
        effect = values[name, value]
        assert effect.ratio == pytest.approx(ratio, rel=0.02)
        assert effect.low is not None
        assert effect.high is not None
        assert effect.low < ratio < effect.high
        assert effect.high / effect.low < 1.1
    assert effects(measured)[0].knob == "max_num_seqs"


def test_values_that_only_came_together_are_not_told_apart() -> None:
    both = {"max_num_seqs": 64, "dtype": "b"}
    measured = [
        Measured(settings={}, outcomes={0: Outcome(scores=[1.0, 1.0])}),
        Measured(settings=both, outcomes={0: Outcome(scores=[2.0, 2.1])}),
        Measured(settings={"max_num_batched_tokens": 32}, outcomes={0: Outcome(scores=[0.5])}),
    ]
    assert [each.knob for each in effects(measured)] == ["max_num_batched_tokens"]
    # One score is no interval.
    assert effects(measured[:1]) == []
    single = [
        Measured(settings={}, outcomes={0: Outcome(scores=[1.0])}),
        Measured(settings={"dtype": "b"}, outcomes={0: Outcome(scores=[2.0])}),
    ]
    effect = effects(single)[0]
    assert (effect.ratio, effect.low) == (pytest.approx(2.0), None)


SHAPE = Shape(
    name="m",
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    intermediate=18944,
    vocab=152064,
)
CEILINGS = Ceilings(flops_per_s=700e12, bytes_per_s=3e12, source="")


def test_a_small_batch_bounds_the_rate() -> None:
    lengths = Lengths(read=200, written=50)
    floor = Floor(step_s=0.01, seqs=256, tokens=2048)
    # Four sequences of 50 tokens each, a token in 10 ms: eight requests/s.
    assert floor.requests_per_s(lengths, {"max_num_seqs": 4}) == pytest.approx(8)
    # 64 tokens a step of 10 ms, 250 tokens a request.
    few = floor.requests_per_s(lengths, {"max_num_batched_tokens": 64})
    assert few == pytest.approx(25.6)
    assert Floor().requests_per_s(lengths, {"max_num_seqs": 4}) == math.inf
    expected = Floor(shape=SHAPE, ceilings=CEILINGS, step_s=1e-4, seqs=1024, tokens=8192)
    # 2 * 6.5e9 operations for each of 250 tokens at 700 TFLOP/s.
    assert expected.requests_per_s(lengths, {}) == pytest.approx(700e12 / 250 / 13.2e9, rel=0.1)


def test_half_the_bytes_are_worth_something_on_paper() -> None:
    floor = Floor(shape=SHAPE, ceilings=CEILINGS)
    lengths = Lengths(read=800, written=100)
    assert floor.worth(lengths, {}) == 1.0
    assert 1.5 < floor.worth(lengths, {"quantization": "fp8"}) < 2.0
    assert 1.0 < floor.worth(lengths, {"kv_cache_dtype": "fp8"}) < 1.5
    assert Floor().worth(lengths, {"quantization": "fp8"}) == 1.0


@pytest.mark.parametrize("highest", [-30, -3, 0, 1, 7, 25])
@pytest.mark.parametrize("gap", [1, 3])
def test_the_highest_rung_that_passes_is_found_in_few_probes(highest: int, gap: int) -> None:
    climb = Climb(0, gap=gap)
    probes = 0
    while (rung := climb.ask()) is not None:
        climb.tell(rung <= highest)
        probes += 1
    assert climb.passed is not None
    assert climb.failed is not None
    assert climb.passed <= highest < climb.failed
    assert climb.failed - climb.passed <= gap
    assert probes <= 12


def test_a_ladder_of_which_nothing_passes_ends() -> None:
    climb = Climb(0, lowest=-20)
    while (rung := climb.ask()) is not None:
        assert rung >= -20
        climb.tell(False)
    assert climb.passed is None


# --- answers --------------------------------------------------------------------------------


def test_what_may_change_answers_is_not_recommended_before_they_were_compared() -> None:
    default = Measured(settings={}, outcomes={2: Outcome(scores=[10.0])})
    fp8 = Measured(settings={"quantization": "fp8"}, outcomes={2: Outcome(scores=[13.0])})
    batch = Measured(settings={"max_num_seqs": 64}, outcomes={2: Outcome(scores=[12.0])})
    same = quality.agreement(["1 2 3", "4 5"], ["1 2 9", "4 5"])
    lossy = {"quantization", "kv_cache_dtype"}
    assert tuning.recommended(fp8, default, lossy, None) is default
    assert tuning.recommended(fp8, default, lossy, same) is fp8
    assert tuning.recommended(batch, default, lossy, None) is batch
    assert (same.equal, same.asked) == (1, 2)
