"""Ticks of plots: readable, different from each other, and in every picture of a page."""

import math
import re
from collections import defaultdict
from functools import cache
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bench import plots
from bench.axes import linear_ticks, log_ticks, ratio_ticks
from bench.digits import distinct, plain
from bench.faults.chaos_page import clock
from bench.figure import figure
from bench.plots import Curve, Panel, Ratio
from tests.examples import examples

POSITIVE = st.floats(1e-6, 1e9)


def labels(low: float, high: float, log: bool, **options: bool) -> list[tuple[float, str]]:
    """Where ticks are on an axis from `low` to `high`, and what they say."""
    with figure(5, 3) as plot:
        axis = plot.subplots()
        axis.set(xlim=(low, high), xscale="log" if log else "linear")
        axis.set_xlim(low, high)
        if log:
            log_ticks(axis.xaxis)
        else:
            linear_ticks(axis.xaxis, **options)
        places = [float(place) for place in axis.xaxis.get_majorticklocs()]
        texts = axis.xaxis.get_major_formatter().format_ticks(places)
        shown = zip(places, texts, strict=True)
        return [(place, text) for place, text in shown if low <= place <= high]


def check(shown: list[tuple[float, str]], low: float, high: float) -> None:
    texts = [text for _, text in shown]
    assert len(texts) >= 2, (low, high, texts)
    assert len(set(texts)) == len(texts), (low, high, texts)
    assert not any("e" in text for text in texts), texts
    # A label is its tick, to far less than the distance of two.
    apart = min(b - a for (a, _), (b, _) in pairwise(sorted(shown)))
    for place, text in shown:
        assert float(text.replace(",", "")) == pytest.approx(place, abs=0.26 * apart)


@examples(30)
@given(POSITIVE, st.one_of(st.floats(1.002, 3), st.floats(1, 1e9)))
def test_ticks_of_a_log_axis_differ(low: float, times: float) -> None:
    assume(times > 1.001)
    check(labels(low, low * times, log=True), low, low * times)


@examples(30)
@given(st.floats(-1e6, 1e9), st.one_of(POSITIVE, st.floats(0.01, 10)))
def test_ticks_of_a_linear_axis_differ(low: float, length: float) -> None:
    assume(length > 1e-6 * abs(low))
    check(labels(low, low + length, log=False), low, low + length)


@examples(15)
@given(st.integers(2, 10**6))
def test_ticks_of_counts_are_whole(most: int) -> None:
    texts = [text for _, text in labels(0, most, log=False, whole=True)]
    assert all("." not in text for text in texts), texts
    assert len(set(texts)) == len(texts) >= 2


@given(st.floats(1.02, 1e6))
def test_ticks_of_a_ratio_differ_and_have_one_in_the_middle(span: float) -> None:
    ticks = ratio_ticks(span)
    texts = [distinct(tick, ticks) for tick in ticks]
    assert 1.0 in ticks
    assert len(set(texts)) == len(texts)
    assert not any("e" in text for text in texts)


@given(st.floats(1e-3, 1e6))
def test_ticks_of_a_chaos_run_differ(until_s: float) -> None:
    texts = clock(until_s)
    assert len(set(texts)) == len(texts) == 11


@given(st.floats(-1e12, 1e12), st.integers(3, 9))
def test_a_plain_number_is_the_number(value: float, digits: int) -> None:
    assume(value == 0 or abs(value) > 1e-9)
    text = plain(value, digits=digits)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.5001 * 10 ** (1 - digits))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-1500.4, "-1,500"), (0.00001, "0.00001"), (2.50, "2.5"), (1234567.8, "1,234,568")],
)
def test_plain_numbers(value: float, text: str) -> None:
    assert plain(value) == text


@pytest.mark.parametrize(
    "ticks", [[12.01, 12.02, 12.03], [0.9991, 0.9993, 1.0], [1.0, 2.0, 5.0], [10_001.0, 10_002.0]]
)
def test_ticks_that_are_close_differ(ticks: list[float]) -> None:
    texts = [distinct(tick, ticks) for tick in ticks]
    assert len(set(texts)) == len(ticks)
    assert all(
        float(text.replace(",", "")) == tick for text, tick in zip(texts, ticks, strict=True)
    )


# --- whole plots ----------------------------------------------------------------------------


def ticks(svg: str) -> dict[str, list[str]]:
    """The texts of the ticks of each axis in a picture."""
    found: dict[str, list[str]] = defaultdict(list)
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))

    def walk(element: ElementTree.Element, axis: str) -> None:
        name = element.get("id", "")
        axis = name if "matplotlib.axis" in name else axis
        if re.search(r"[xy]tick_\d+$", name):
            found[axis] += [text.text or "" for text in element.iter() if text.tag.endswith("text")]
        for child in element:
            walk(child, axis)

    walk(root, "")
    return {axis: [text for text in texts if text] for axis, texts in found.items()}


def said(svg: str) -> list[str]:
    return re.findall(r'fill="transparent"><title>(.*?)</title>', svg)


TIMES = [0.1 * at for at in range(40)]


@cache
def drawn(name: str) -> str:
    """One picture of each kind, as an SVG."""
    curve = Curve(label="a", x=TIMES, y=TIMES)
    match name:
        case "cdfs":
            return plots.cdfs([("TTFT", "ms", [("a", [20.0 + at for at in range(9)])])], "a")
        case "few":
            lines = [Curve(label="a", x=[1, 2], y=[8.5, 7.7])]
            return plots.curves([("TPOT", "ms (log)", lines)], "GPUs", "b")
        case "close":
            lines = [Curve(label="a", x=[218, 233], y=[14.05, 14.1])]
            return plots.curves([("TPOT", "ms", lines)], "tokens/s", "c")
        case "timeline":
            even = Curve(label="b", x=TIMES, y=[5e3] * 40)
            strips = [
                Panel(title="a", y_title="%", curves=[curve], low=True),
                Panel(title="b", y_title="W", curves=[even]),
            ]
            return plots.timeline(strips, "d")
        case "heat":
            return plots.heat(TIMES, [5 + at for at in TIMES], "ms", "e")
        case _:
            row = Ratio(label="x", ratio=1.01, low=1.005, high=1.02, verdict="better")
            return plots.ratios([("a", [row])], "of", "f")


@pytest.mark.parametrize("name", ["cdfs", "few", "close", "timeline", "heat", "ratios"])
def test_a_plot_has_different_ticks_and_says_its_values_when_pointed_at(name: str) -> None:
    svg = drawn(name)
    for axis, texts in ticks(svg).items():
        assert len(set(texts)) == len(texts), (axis, texts)
    assert ticks(svg)
    assert said(svg)


def test_values_have_the_units_of_their_axes() -> None:
    assert said(drawn("few"))[0] == "a, 8.5 ms at 1 GPUs"
    assert said(drawn("ratios")) == ["x: 1.010 (1.005 to 1.020), better"]
    assert said(drawn("heat"))[0].startswith("0.0 to 0.0 s: 1 gaps, median 5 ms")


def test_every_gap_is_said_in_one_column_of_the_heat_map() -> None:
    counts = [int(text.split(" s: ")[1].split()[0]) for text in said(drawn("heat"))]
    assert sum(counts) == len(TIMES)


def test_the_last_point_of_a_curve_is_inside_the_plot() -> None:
    svg = drawn("close")
    across = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    # The frame of the axes ends where the line at their bottom does.
    frame = re.search(r'patch_2">\s*<path d="M [\d.]+ [\d.]+ *\n?L ([\d.]+) ', svg)
    assert frame is not None
    assert max(across) < float(frame[1]) - 4


def test_ticks_count_in_whole_gpus() -> None:
    texts = [text for each in ticks(drawn("few")).values() for text in each]
    assert {"0", "1", "2"} <= set(texts)
    assert not math.isnan(sum(float(text.replace(",", "")) for text in texts))
