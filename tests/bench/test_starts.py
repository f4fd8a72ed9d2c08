"""Measured starts: compared round by round, and drawn."""

import argparse
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest

from bench.engine import systems
from bench.engine.starts import (
    SCENARIOS,
    Compared,
    Start,
    _framed,
    _measured,
    _require_choices,
    compared,
)
from bench.engine.waterfall import Row, svg
from bench.errors import BenchError
from serve_app.observe.phases import Span


def start(scenario: str, system: str, round_: int, took_s: float) -> Start:
    return Start(scenario, system, round_, took_s)


def test_ratios_are_of_the_same_round() -> None:
    # The machine was twice as slow in the second round.
    starts = [
        start("warm", "ours", 1, 10.0),
        start("warm", "bare", 1, 20.0),
        start("warm", "ours", 2, 22.0),
        start("warm", "bare", 2, 40.0),
        start("cold", "ours", 1, 30.0),
    ]
    found = compared(starts, "bare")
    assert found["warm ours"] == Compared(
        median_s=16.0, least_s=10.0, most_s=22.0, starts=2, to_reference=0.525
    )
    assert found["warm bare"].to_reference == 1.0
    assert found["cold ours"].to_reference is None


def test_what_is_before_and_after_a_replica_is_in_the_picture() -> None:
    pieces = [Span("imports", 104.0, 109.0), Span("weights", 109.0, 111.0)]
    framed = _framed(pieces, 100.0, 112.0, True)
    assert framed == [
        Span("Ray and Serve", 100.0, 104.0),
        *pieces,
        Span("first health", 111.0, 112.0),
    ]
    assert _framed([], 100.0, 112.0, True) == [Span("other", 100.0, 112.0)]
    picture = svg([Row("warm, <ours>", framed), Row("warm, bare", [Span("process", 7.0, 31.0)])])
    root = xml.fromstring(picture)
    texts = [each.text for each in root.iter() if each.tag.endswith("text")]
    assert {"warm, <ours>", "12.0 s", "24.0 s", "imports"} <= set(texts)
    bars = [each for each in root.iter() if each.tag.endswith("rect") and len(each)]
    # Twice as long, twice as wide; and the longest fits.
    widths = [float(each.get("width", 0)) for each in bars]
    assert sum(widths[:4]) == pytest.approx(widths[4] / 2, rel=0.01)
    assert float(bars[4].get("x", 0)) + widths[4] < 980


def test_an_unknown_scenario_is_named() -> None:
    with pytest.raises(BenchError, match="did you mean 'restart'"):
        _require_choices(["restrat"], SCENARIOS)


def test_the_system_of_a_scenario_has_what_the_name_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def running(*words: Any) -> None:
        started.append((words[0], words[-1]))
        raise BenchError("enough")

    monkeypatch.setattr(systems, "running", running)
    options = argparse.Namespace(engine={}, model="m", port=1, out=tmp_path)
    for scenario, name in (
        ("warm", "ours-template"),
        ("restart", "ours-template"),
        ("warm", "bare"),
    ):
        with pytest.raises(BenchError, match="enough"):
            _measured(scenario, name, 1, options, tmp_path / name)
    template = {"template": True}
    assert started == [
        ("ours-template", template),
        ("ours-gateway-fast", template),
        ("bare", None),
    ]
