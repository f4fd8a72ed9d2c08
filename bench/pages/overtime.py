"""How a run went over time: the load, the server, and the gaps between tokens."""

from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup

from bench import measure, plots
from bench.figures import Load, Run
from bench.hardware.gpu import GpuSample
from bench.pages.charts import Chart
from bench.pages.loaded import Loaded
from bench.plots import Curve, Panel
from bench.scrape import Sample

_STEPS = 150  # Of a timeline.


def timeline(result: Loaded, place: int) -> Chart:
    """The first repeat over time, with the server's metrics."""
    shown = Chart(name=result.name, repeats=len(result.repeats))
    mine = result.of_repeat(0)
    if not mine:
        shown.absent = [result.records_absent or "it has no first repeat"]
        return shown
    end_s = max(record.end_s or record.planned_s for record in mine)
    shown.step_s = _step_s(end_s)
    line = measure.timeline(mine, shown.step_s)
    panels = [
        Panel(
            title="Requests under way",
            y_title="requests",
            curves=[Curve(label="under way", x=line.t_s, y=line.running)],
            filled=(0,),
        ),
        Panel(
            title="Output",
            y_title="tokens/s",
            curves=[Curve(label="output tokens", x=line.t_s, y=line.output_tokens_per_s)],
            filled=(0,),
        ),
        Panel(
            title="Requests planned, and failed",
            y_title="requests/s",
            curves=[
                Curve(label="planned", x=line.t_s, y=line.planned_per_s),
                Curve(label="failed", x=line.t_s, y=line.failed_per_s),
            ],
            filled=(1,),
        ),
    ]
    server, shown.absent = _server_panels(result)
    window = result.window(0)
    events = [
        (event.at_s, event.what)
        for event in (result.data.events if isinstance(result.data, Load) else [])
        if event.repeat == 0
    ]
    shaded = [window] if window else []
    svg = plots.timeline([*panels, *server, *_gpu_panels(result)], f"time{place}", shaded, events)
    shown.svg, shown.steady = Markup(svg), bool(window)
    return shown


def _step_s(duration_s: float) -> float:
    """A round length for the steps of a timeline."""
    for step_s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0):
        if duration_s / step_s <= _STEPS:
            return step_s
    return duration_s / _STEPS


def _server_panels(result: Loaded) -> tuple[list[Panel], list[str]]:
    """What was scraped in the first repeat; what was not is named."""
    server = result.data.server if isinstance(result.data, Load) else []
    samples = server[0] if server else []
    if not samples:
        return [], ["the server's own metrics: none were scraped"]
    wanted = (
        ("Server: requests waiting and running", "requests", ("waiting", "running"), 1.0, None),
        ("Server: KV cache in use", "%", ("kv_usage",), 100.0, 100.0),
        (
            "Server: prompt tokens found in the prefix cache",
            "%",
            ("prefix_hit_rate",),
            100.0,
            100.0,
        ),
        (
            "Server: replicas",
            "replicas",
            ("replicas", "wanted", "starting", "stopping"),
            1.0,
            None,
        ),
    )
    panels, absent = [], []
    for title, unit, names, scale, top in wanted:
        curves = [_sampled(samples, name, scale) for name in names]
        with_values = [curve for curve in curves if curve.x]
        if with_values:
            low = len(with_values) == 1
            panels.append(Panel(title=title, y_title=unit, curves=with_values, top=top, low=low))
        else:
            absent.append(f"{title}: the server does not say")
    acceptance = _sampled(samples, "acceptance_rate", 100.0)
    if acceptance.y:
        title = "Server: drafted tokens that were right"
        panels.append(Panel(title=title, y_title="%", curves=[acceptance], top=100.0, low=True))
    preemptions = _sampled(samples, "preemptions", 1.0)
    if any(preemptions.y):
        title = "Server: preemptions so far"
        panels.append(Panel(title=title, y_title="requests", curves=[preemptions], low=True))
    return panels, absent


def _gpu_panels(result: Loaded) -> list[Panel]:
    """What the GPUs did in the first repeat, a line each; none where they were not sampled."""
    repeats = result.data.gpu if isinstance(result.data, Run) else []
    each: dict[int, list[GpuSample]] = {}
    for sample in repeats[0] if repeats and isinstance(repeats[0], list) else []:
        each.setdefault(sample.gpu, []).append(sample)
    panels = []
    for title, unit, of, top in (
        ("GPU: share of time with a kernel", "%", _utilisation, 100.0),
        ("GPU: memory in use", "GiB", _memory, None),
        ("GPU: power", "W", _watts, None),
    ):
        curves = [_points(f"GPU {gpu}", of(mine)) for gpu, mine in each.items()]
        if any(curve.y for curve in curves):
            panels.append(Panel(title=title, y_title=unit, curves=curves, low=True, top=top))
    return panels


_Points = list[tuple[float, float]]


def _points(label: str, points: _Points) -> Curve:
    return Curve(label=label, x=[x for x, _ in points], y=[y for _, y in points])


def _utilisation(samples: Sequence[GpuSample]) -> _Points:
    return [(sample.t_s, 100 * sample.utilisation) for sample in samples]


def _memory(samples: Sequence[GpuSample]) -> _Points:
    return [(sample.t_s, sample.memory_gib) for sample in samples]


def _watts(samples: Sequence[GpuSample]) -> _Points:
    """The mean power between one sample and the next; empty where no energy was sampled."""
    return [
        (b.t_s, (b.joules - a.joules) / (b.t_s - a.t_s))
        for a, b in pairwise(samples)
        if a.joules is not None and b.joules is not None and b.t_s > a.t_s
    ]


def _sampled(samples: Sequence[Sample], name: str, scale: float) -> Curve:
    values = [(sample.t_s, getattr(sample, name)) for sample in samples]
    present = [(t_s, value * scale) for t_s, value in values if value is not None]
    return Curve(label=name.replace("_", " "), x=[t for t, _ in present], y=[y for _, y in present])


def heat(result: Loaded, place: int) -> Chart:
    """Gaps between the tokens of the first repeat, over time."""
    at_s: list[float] = []
    gaps_s: list[float] = []
    for record in result.of_repeat(0):
        if record.ok:
            gaps = measure.itl_s(record)
            gaps_s += gaps
            at_s += record.chunk_s[1:] if gaps else []
    if not gaps_s:
        why = result.records_absent or "no answer came in more than one piece"
        return Chart(name=result.name, absent=[why])
    gaps_ms = [gap_s * 1e3 for gap_s in gaps_s]
    svg = plots.heat(at_s, gaps_ms, "ms since the token before (log)", f"heat{place}")
    return Chart(name=result.name, svg=Markup(svg))
