"""Grafana's dashboard as code: `python -m serve_app.monitoring.dashboards` writes serving.json.

Its rows (`rows/`) are the questions of an operator, in the order in which they are asked.
Expressions that rules.yaml records are not computed again, so Prometheus needs those rules too.

A panel's id is part of its address: Ray's dashboard embeds panels by id. So ids are written down in
the rows, do not change when panels are added or removed, and are never reused.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)

from serve_app.monitoring.panel import Panel, Row
from serve_app.monitoring.rows import ROWS

SERVING = Path(__file__).with_name("serving.json")
_WIDTH, _STAT_HEIGHT, _GRAPH_HEIGHT = 24, 4, 8
_SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")


def serving(rows: Sequence[Row] = ROWS) -> str:
    """The dashboard as JSON that Grafana takes."""
    board = (
        build.Dashboard("Serving Qwen2.5")
        .uid("qwen-serving")
        .description(
            "Is it healthy, is it fast, is it full, what does it cost, who uses it, and why?"
        )
        .tags(["qwen", "ray", "vllm"])
        .timezone("browser")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        # Ray's dashboard fills in `datasource` where it embeds a panel.
        .with_variable(
            build.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(
            build.QueryVariable("model")
            .label("Model")
            .query("label_values(ray_serve_app_build_info, model)")
            .datasource(_SOURCE)
            .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(dashboard.VariableOption(text=["All"], value=["$__all"]))
        )
    )
    top = 0
    for row in rows:
        place = dashboard.GridPos(h=1, w=_WIDTH, x=0, y=top)
        board.with_row(build.Row(row.title).id(row.id).grid_pos(place))
        top += 1
        for line in _lines(row.panels):
            left, height = 0, _STAT_HEIGHT if line[0].number else _GRAPH_HEIGHT
            for panel in line:
                place = dashboard.GridPos(h=height, w=panel.width, x=left, y=top)
                board.with_panel(_drawn(panel).grid_pos(place))
                left += panel.width
            top += height
    return json.dumps(board.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _lines(panels: Sequence[Panel]) -> Iterator[list[Panel]]:
    """As many panels side by side as fit; a line holds either numbers or graphs."""
    line: list[Panel] = []
    for panel in panels:
        full = sum(placed.width for placed in line) + panel.width > _WIDTH
        if line and (full or panel.number != line[0].number):
            yield line
            line = []
        line.append(panel)
    if line:
        yield line


def _drawn(panel: Panel) -> stat.Panel | timeseries.Panel:
    drawn = _number(panel) if panel.number else _graph(panel)
    drawn = drawn.id(panel.id).title(panel.title).description(panel.about).unit(panel.unit)
    drawn = drawn.datasource(_SOURCE)
    if panel.marks is not None:
        drawn = drawn.thresholds(_thresholds(*panel.marks))
    for index, (legend, expression) in enumerate(panel.queries.items()):
        drawn = drawn.with_target(
            prometheus.Dataquery()
            .ref_id(chr(ord("A") + index))
            .expr(expression)
            .legend_format(legend)
            .datasource(_SOURCE)
            .range()
        )
    return drawn


def _number(panel: Panel) -> stat.Panel:
    marked = panel.marks is not None
    return (
        stat.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(BigValueGraphMode.AREA)
        .color_mode(BigValueColorMode.VALUE if marked else BigValueColorMode.NONE)
        .text_mode(BigValueTextMode.AUTO)
        .no_value("none")
    )


def _graph(panel: Panel) -> timeseries.Panel:
    graph = (
        timeseries.Panel()
        .min(0)
        .line_width(1)
        .fill_opacity(30 if panel.stacked else 5)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        # With many replicas, the largest come first.
        .tooltip(
            common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
        )
    )
    if panel.stacked:
        graph = graph.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if panel.maximum is not None:
        graph = graph.max(panel.maximum)
    if panel.marks is not None:
        style = common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED)
        graph = graph.thresholds_style(style)
    return graph


def _thresholds(first: float, second: float) -> build.ThresholdsConfig:
    """From `first` yellow and from `second` red; the other way round where `second` is less."""
    if second < first:
        steps = [(None, "red"), (second, "yellow"), (first, "green")]
    else:
        steps = [(None, "green"), (first, "yellow"), (second, "red")]
    return (
        build.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(value, colour) for value, colour in steps])
    )


def main() -> None:
    SERVING.write_text(serving(), encoding="utf-8")
    print(f"wrote {SERVING}")


if __name__ == "__main__":
    main()
