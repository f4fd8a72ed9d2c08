"""A panel of the dashboard and a row of panels, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A graph over time, or a number.

    Attributes:
        unit: Grafana's name of it.
        queries: expressions, by the legends of their series.
        marks: the values from which it is yellow, and red; red below the second value if that is
            the smaller one.
        number: shows the last value instead of a graph.
        stacked: the series are stacked.
        maximum: the top of the axis.
    """

    id: int
    title: str
    about: str
    unit: str
    queries: Mapping[str, str]
    marks: tuple[float, float] | None = None
    number: bool = False
    stacked: bool = False
    maximum: float | None = None
    width: int = 8


@dataclass(frozen=True)
class Row:
    """Panels that answer one question of an operator."""

    id: int
    title: str
    panels: Sequence[Panel]
