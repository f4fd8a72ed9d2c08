"""When tokens may travel together: only while the front end is late, and never for long."""

from serve_app.pacing import Pacer


def test_a_front_end_that_keeps_up_sends_every_token() -> None:
    pacer = Pacer(max_gap_s=0.05)
    for _ in range(1000):
        pacer.observe(0.001)
    assert pacer.hold_s(0.0) <= 0


def test_lag_opens_a_gap_that_closes_with_it() -> None:
    pacer = Pacer(max_gap_s=0.05)
    for _ in range(100):
        pacer.observe(0.010)
    assert 0 < pacer.gap_s < 0.05
    assert pacer.hold_s(0.0) == pacer.gap_s
    assert pacer.hold_s(pacer.gap_s) <= 0
    for _ in range(100):
        pacer.observe(0.0005)
    assert pacer.hold_s(0.0) <= 0


def test_the_gap_is_bounded() -> None:
    pacer = Pacer(max_gap_s=0.05)
    for _ in range(100):
        pacer.observe(10.0)
    assert pacer.gap_s == 0.05


def test_one_late_output_is_not_a_load() -> None:
    pacer = Pacer(max_gap_s=0.05)
    pacer.observe(0.03)
    assert pacer.hold_s(0.0) <= 0


def test_a_gap_of_zero_switches_it_off() -> None:
    pacer = Pacer(max_gap_s=0.0)
    for _ in range(100):
        pacer.observe(1.0)
    assert pacer.hold_s(0.0) <= 0
