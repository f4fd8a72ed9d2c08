"""The result of `bench scale`: figures of every repeat, ratios, and which layout suits which goal.

Two ratios are taken. Efficiency compares a layout with one GPU of the *same system*, so that it
says what more GPUs are worth. The ratio to a peer compares this application with the strongest
other system in the *same layout* under the same load, so that it says what the application costs.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import msgspec

from bench import interval
from bench.engine import systems
from bench.engine.layouts import Layout
from bench.result import EngineResult

ALONE, AT_ONCE = "1 request", "100 at once"
# For each figure with ratios, whether more of it is better.
_MORE_IS_BETTER = {"tokens_per_s": True, "ttft_s": False, "tpot_s": False}
_FIGURES = (*_MORE_IS_BETTER, "joules_per_token", "roofline", "haproxy_s", "door_s")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A load of one repeat.

    Attributes:
        users: requests at once.
        tokens_per_s: output tokens; ttft_s, tpot_s: means of its requests.
        joules_per_token: of the layout's GPUs, for each output token.
        roofline: tokens/s as a share of what the hardware allows for this many requests.
        haproxy_s, door_s: processor time for each request.
    """

    users: int
    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    joules_per_token: float | None = None
    roofline: float | None = None
    haproxy_s: float | None = None
    door_s: float | None = None


class Row(msgspec.Struct, kw_only=True):
    """A layout under a workload: the repeats of each load, by its name.

    Attributes:
        load_s: duration of the server's start.
        failure: why there are no figures, or no more.
    """

    layout: Layout
    workload: str = ""
    load_s: float = 0.0
    failure: str = ""
    loads: dict[str, list[Load]] = {}

    def values(self, load: str, metric: str) -> list[float]:
        return [
            value
            for each in self.loads.get(load, [])
            if (value := getattr(each, metric)) is not None
        ]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio and its 95 % interval; `to` is what it is a ratio to."""

    to: str
    ratio: float
    low: float | None = None
    high: float | None = None

    @property
    def in_words(self) -> str:
        bounds = f" ({self.low:.2f} to {self.high:.2f})" if self.low and self.high else ""
        return f"{self.ratio:.2f}{bounds} of {self.to}"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """A layout under a load: means over repeats, None where there are none.

    Attributes:
        load: its name; empty for a layout that failed before its first load.
        single: ratios to one GPU of the same system, by figure.
        efficiency: of tokens/s, the share of the linear gain.
        peers: of this application, ratios to the strongest other system, by figure.
    """

    system: str
    layout: str
    gpus: int
    tensor_parallel: int
    replicas: int
    load: str = ""
    users: int = 0
    tokens_per_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    efficiency: float | None = None
    roofline: float | None = None
    joules_per_token: float | None = None
    haproxy_s: float | None = None
    door_s: float | None = None
    load_s: float = 0.0
    failure: str = ""
    single: dict[str, Ratio] = {}
    peers: dict[str, Ratio] = {}


class OfWorkload(msgspec.Struct, frozen=True, kw_only=True):
    """The layouts under one workload, and which of them to take."""

    workload: str = ""
    table: list[Point]
    advice: list[str]


class Scaled(EngineResult, frozen=True, kw_only=True):
    """The result of `bench scale`.

    Attributes:
        together: whether all layouts stood at once and were measured in turn.
        rows: every repeat; `table` and `advice` are those of the first workload.
    """

    benchmark: str = "scale"
    together: bool = False
    rows: list[Row] = []
    workloads: list[OfWorkload] = []
    table: list[Point] = []
    advice: list[str] = []


def table(rows: Sequence[Row], paired: bool = False) -> list[Point]:
    """A line for each load of each layout.

    Args:
        rows: of one workload.
        paired: whether repeats of different layouts were measured in turn, so that they belong
            together by their number.
    """
    points = []
    for row in rows:
        single = next((other for other in rows if _is_single_of(other, row)), None)
        peers = [other for other in rows if _is_peer_of(other, row)]
        loads = list(row.loads) or [""]
        points += [_point(row, load, single, peers, paired) for load in loads]
    return points


def _is_single_of(other: Row, row: Row) -> bool:
    layout = other.layout
    return layout.gpus == 1 and not layout.variant and layout.system == row.layout.system


def _is_peer_of(other: Row, row: Row) -> bool:
    mine, theirs = systems.is_ours(row.layout.system), systems.is_ours(other.layout.system)
    return mine and not theirs and other.layout.name == row.layout.name


def _point(row: Row, load: str, single: Row | None, peers: Sequence[Row], paired: bool) -> Point:
    layout = row.layout
    means = {name: fmean(values) for name in _FIGURES if (values := row.values(load, name))}
    of_single = {
        metric: ratio
        for metric in _MORE_IS_BETTER
        if single and (ratio := _ratio(row, single, load, metric, "one GPU", paired))
    }
    linear = of_single.get("tokens_per_s")
    return Point(
        system=layout.system,
        layout=layout.name,
        gpus=layout.gpus,
        tensor_parallel=layout.tensor_parallel,
        replicas=layout.replicas,
        load=load,
        users=max((each.users for each in row.loads.get(load, [])), default=0),
        # One request cannot use a second replica.
        efficiency=linear.ratio / layout.gpus if linear and load != ALONE else None,
        load_s=row.load_s,
        failure=row.failure,
        single=of_single,
        peers=_to_strongest(row, peers, load, paired),
        **means,
    )


def _to_strongest(row: Row, peers: Sequence[Row], load: str, paired: bool) -> dict[str, Ratio]:
    ratios: dict[str, Ratio] = {}
    for metric, more in _MORE_IS_BETTER.items():
        measured = [peer for peer in peers if peer.values(load, metric)]
        if not measured:
            continue
        best = (max if more else min)(measured, key=lambda peer: fmean(peer.values(load, metric)))
        if ratio := _ratio(row, best, load, metric, best.layout.system, paired):
            ratios[metric] = ratio
    return ratios


def _ratio(row: Row, other: Row, load: str, metric: str, to: str, paired: bool) -> Ratio | None:
    over, under = row.values(load, metric), other.values(load, metric)
    if not over or not under:
        return None
    if paired:
        # A run that ended at its time limit may have one repeat more of the first layouts.
        pairs = min(len(over), len(under))
        over, under = over[:pairs], under[:pairs]
    estimate = interval.paired_ratio(over, under) if paired else interval.ratio(over, under)
    if estimate is None or row is other:
        return Ratio(to=to, ratio=fmean(over) / fmean(under))
    low, high = estimate.bounds()
    return Ratio(to=to, ratio=math.exp(estimate.log), low=low, high=high)


def in_short(workloads: Sequence[OfWorkload]) -> dict[str, list[dict[str, Any]]]:
    """The figures and the ratios to peers as plain rows, for the last line of the command."""
    figures, peers = [], []
    for each in workloads:
        about = {"workload": each.workload} if len(workloads) > 1 else {}
        for point in each.table:
            figures.append(about | _figures(point))
            peers += [about | row for row in _peers(point)]
    return {"table": figures, "peers": peers}


def _figures(point: Point) -> dict[str, Any]:
    return {
        "system": point.system,
        "layout": point.layout,
        "load": point.load,
        "tokens_per_s": point.tokens_per_s,
        "ttft_ms": _times(point.ttft_s, 1e3),
        "tpot_ms": _times(point.tpot_s, 1e3),
        "efficiency": point.efficiency,
        "roofline": point.roofline,
        "joules_per_token": point.joules_per_token,
        "haproxy_us": _times(point.haproxy_s, 1e6),
        "door_us": _times(point.door_s, 1e6),
    } | ({"failure": point.failure} if point.failure else {})


def _peers(point: Point) -> list[dict[str, Any]]:
    return [
        {
            "system": point.system,
            "layout": point.layout,
            "load": point.load,
            "figure": metric,
            "strongest_peer": peer.to,
            "ratio": peer.ratio,
            "low": peer.low,
            "high": peer.high,
        }
        for metric, peer in point.peers.items()
    ]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def advice(points: Sequence[Point]) -> list[str]:
    """Which layout of the first system to take for which goal, and its ratio to its peers."""
    sentences = []
    system = points[0].system if points else ""
    for gpus in sorted({point.gpus for point in points if point.gpus > 1}):
        same = [p for p in points if p.gpus == gpus and p.system == system and not p.failure]
        fast = _best((p for p in same if p.load == ALONE and p.tpot_s), "tpot_s")
        wide = _best((p for p in same if p.load not in ("", ALONE)), "tokens_per_s")
        if fast is None:
            sentences.append(f"{gpus} GPUs: not measured")
            continue
        goals = (
            f"for the latency of one request {fast.layout} "
            f"({_of(fast, 'tpot_s')} of one GPU's time per token{_against(fast, 'tpot_s')})"
        )
        if wide is not None:
            goals += (
                f"; for throughput {wide.layout} ({_of(wide, 'tokens_per_s')} times one GPU, "
                f"{_number(wide.efficiency)} of linear{_against(wide, 'tokens_per_s')})"
            )
        sentences.append(f"{gpus} GPUs: {goals}")
    return sentences


def _best(points: Iterable[Point], metric: str) -> Point | None:
    sign = 1 if _MORE_IS_BETTER[metric] else -1
    return max(points, key=lambda point: sign * (getattr(point, metric) or 0.0), default=None)


def _of(point: Point, metric: str) -> str:
    single = point.single.get(metric)
    return _number(single.ratio if single else None)


def _against(point: Point, metric: str) -> str:
    """Beside the strongest peer, where there is one."""
    peer = point.peers.get(metric)
    if peer is None:
        return ""
    return f", {peer.in_words}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"
