"""How long a start takes, learned from what can be seen of the replicas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.observe.phases import PHASES
from serve_app.scaling.starts import PARTS, Starts, distribution_s, parts_of


def measured(starts: Starts, *took_s: float) -> Starts:
    """`starts` after one start of each length, one after another."""
    now_s, running = 0.0, 1
    starts.see(now_s, 1, 1)
    for each_s in took_s:
        now_s += 1
        starts.see(now_s, running + 1, running)
        now_s += each_s
        starts.see(now_s, running + 1, running + 1)
        running += 1
    return starts


def test_the_first_start_of_a_deployment_is_measured() -> None:
    starts = Starts(120.0)
    starts.see(0.0, 1, 0)
    starts.see(115.0, 1, 1)
    assert starts.start_s == 115.0


@pytest.mark.parametrize("running", [1, 4])
def test_replicas_that_run_already_say_nothing_of_a_start(running: int) -> None:
    starts = Starts(120.0)
    starts.see(0.0, running, running)
    starts.see(1.0, running, running)
    assert starts.start_s == 120.0
    assert starts.took_s == ()


def test_a_start_that_began_before_the_first_look_is_not_measured() -> None:
    starts = Starts(120.0, resumed=True)
    starts.see(0.0, 2, 1)
    starts.see(3.0, 2, 2)  # It was wanted under the controller before.
    assert starts.start_s == 120.0


def test_a_start_between_two_looks_is_not_measured_unless_its_beginning_is_known() -> None:
    # Serve does not ask the policy while requests wait for a first replica.
    starts = Starts(120.0)
    starts.see(0.0, 0, 0)
    starts.see(100.0, 1, 1)
    assert starts.took_s == ()
    starts = Starts(120.0)
    starts.see(0.0, 0, 0)
    starts.see(100.0, 1, 1, scaled_up_s=10.0)
    assert starts.took_s == (90.0,)


def test_one_odd_start_is_not_the_rule() -> None:
    assert measured(Starts(120.0), 7200.0).start_s == 120.0
    assert measured(Starts(120.0), 115.0, 7200.0).start_s == 115.0
    assert measured(Starts(120.0), 7200.0, 115.0, 118.0).start_s == 118.0


def test_a_rule_that_the_configuration_does_not_know_is_learned() -> None:
    assert measured(Starts(60.0), 600.0, 590.0).start_s == 590.0
    assert measured(Starts(60.0), 5.0).start_s == 5.0
    assert measured(Starts(60.0), *[100.0] * 7, *[300.0] * 4).start_s == 300.0


@given(
    usual=st.lists(st.floats(60, 180), min_size=1, max_size=9),
    odd=st.floats(0.01, 1e6),
    place=st.integers(0, 9),
)
def test_wherever_the_odd_one_stands_the_estimate_is_of_the_others(
    usual: list[float], odd: float, place: int
) -> None:
    took_s = [*usual]
    took_s.insert(min(place, len(usual)), odd)
    estimate = measured(Starts(120.0), *took_s).start_s
    # Of two, the shorter: the odd one, where it is the shorter.
    low = min(60.0, odd) if len(usual) == 1 else 60.0
    assert low <= estimate * (1 + 1e-9)
    assert estimate <= 180.0 * (1 + 1e-9)


def test_what_is_given_up_was_no_start() -> None:
    starts = Starts(60.0)
    starts.see(0.0, 1, 1)
    starts.see(1.0, 3, 1)
    starts.see(2.0, 2, 1)  # The one wanted last is given up.
    starts.see(41.0, 2, 2)
    starts.see(50.0, 3, 2)
    starts.see(95.0, 3, 3)
    assert starts.took_s == (40.0, 45.0)


def test_what_was_learned_is_taken_over() -> None:
    before = measured(Starts(60.0), 100.0, 110.0, 120.0)
    assert Starts(60.0, before.took_s, resumed=True).start_s == before.start_s == 110.0


# --- by part --------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(*[st.floats(0, 500)] * 5).map(
            lambda took: (took[0], dict(zip(PARTS, took[1:], strict=True)))
        ),
        min_size=1,
        max_size=7,
    )
)
def test_a_start_is_as_long_as_its_parts_together(
    starts: list[tuple[float, dict[str, float]]],
) -> None:
    took_s = [wait_s + sum(parts.values()) for wait_s, parts in starts]
    found = distribution_s(took_s, [parts for _, parts in starts])
    assert found == sorted(found)
    assert len(found) <= 101
    # The fastest of each part, and the slowest of each.
    least = min(w for w, _ in starts) + sum(min(p[name] for _, p in starts) for name in PARTS)
    most = max(w for w, _ in starts) + sum(max(p[name] for _, p in starts) for name in PARTS)
    assert found[0] == pytest.approx(least, abs=1e-6)
    assert found[-1] == pytest.approx(most, abs=1e-6)


def test_parts_vary_for_reasons_of_their_own() -> None:
    """Of seven starts one waited long and another compiled: a start may do both."""
    starts = Starts(60.0)
    now_s = 0.0
    starts.see(now_s, 0, 0)
    for number in range(7):
        wait_s = 300.0 if number == 2 else 20.0
        kernels_s = 60.0 if number == 5 else 5.0
        now_s += 10
        starts.see(now_s, number + 1, number)
        now_s += wait_s + kernels_s + 10.0
        starts.see(now_s, number + 1, number + 1)
        starts.report({"code": 10.0, "kernels": kernels_s})
    assert starts.start_s == pytest.approx(35.0)
    assert starts.quantile_s(1.0) == pytest.approx(370.0)
    assert 35.0 < starts.quantile_s(0.9) < 370.0


def test_a_start_without_a_report_counts_as_a_whole() -> None:
    assert distribution_s([30.0, 10.0, 20.0], [{}, {"code": 5.0}, {"code": 6.0}]) == [10, 20, 30]
    starts = Starts(60.0)
    starts.report({"code": 5.0})  # Of a replica whose start was not seen.
    assert starts.start_s == 60.0
    assert starts.parts_s == ()


def test_every_phase_is_of_one_part() -> None:
    took_s = {phase: 1.0 for phase in PHASES}
    assert sum(parts_of(took_s).values()) == len(PHASES)
    assert set(parts_of({})) == PARTS.keys()
    named = [phase for phases in PARTS.values() for phase in phases]
    assert len(named) == len(set(named))
    assert set(named) <= PHASES.keys()
