"""The dashboard is what the code says, and every panel of it can be read and embedded."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from serve_app.monitoring import dashboards
from serve_app.monitoring.dashboards import SERVING
from serve_app.monitoring.panel import Panel
from serve_app.monitoring.rows import ROWS

# Grafana's units that are used, besides those that are a suffix. `short` is a count.
UNITS = {
    "bytes",
    "currencyUSD",
    "ms",
    "ops",
    "percent",
    "percentunit",
    "reqps",
    "s",
    "short",
    "watt",
}


def panels() -> Iterator[Panel]:
    for row in ROWS:
        yield from row.panels


def board() -> dict[str, Any]:
    body: dict[str, Any] = json.loads(dashboards.serving())
    return body


def test_the_committed_dashboard_is_what_the_code_generates() -> None:
    assert SERVING.read_text() == dashboards.serving(), "python -m serve_app.monitoring.dashboards"


def test_rows_are_questions_in_the_order_in_which_they_are_asked() -> None:
    titles = [panel["title"] for panel in board()["panels"] if panel["type"] == "row"]
    assert [title.split("?")[0] for title in titles] == [
        "Is it healthy",
        "Is it fast",
        "Is it full",
        "What does it cost",
        "Who uses it",
        "Why",
    ]


def test_every_panel_has_a_unit_a_description_and_named_series() -> None:
    drawn = [panel for panel in board()["panels"] if panel["type"] != "row"]
    assert len(drawn) == len(list(panels()))
    for panel in drawn:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit in UNITS or unit.startswith("suffix: "), panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["legendFormat"], panel["title"]
            assert target["datasource"]["uid"] == "${datasource}"


def test_every_expression_is_of_all_replicas_together_or_names_them() -> None:
    for panel in panels():
        for legend, expression in panel.queries.items():
            # Either aggregated here or recorded, which is the same.
            whole = any(word in expression for word in ("sum", "max", "min", "count", "model:"))
            assert whole or "deployment:" in expression, panel.title
            if "replica)" in expression:
                assert "{{replica}}" in legend, panel.title


def test_ids_are_unique_and_of_their_row() -> None:
    ids = [panel["id"] for panel in board()["panels"]]
    assert len(set(ids)) == len(ids)
    for row in ROWS:
        assert all(row.id < panel.id < row.id + 100 for panel in row.panels)


def test_ids_stay_when_another_panel_goes() -> None:
    fewer = [replace(row, panels=row.panels[1:]) for row in ROWS[1:]]
    before = {panel["title"]: panel["id"] for panel in board()["panels"]}
    after = json.loads(dashboards.serving(fewer))["panels"]
    assert after
    assert all(before[panel["title"]] == panel["id"] for panel in after)


def test_titles_are_unique() -> None:
    titles = [panel.title for panel in panels()]
    assert len(set(titles)) == len(titles)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + across, place["y"] + down)
            for across in range(place["w"])
            for down in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_ray_can_embed_it() -> None:
    """By uid and panel id, with `var-datasource`; nothing needs to be chosen first."""
    result = board()
    assert result["uid"] == "qwen-serving"
    variables = {each["name"]: each for each in result["templating"]["list"]}
    assert list(variables) == ["datasource", "model"]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["model"]["current"]["value"] == ["$__all"]
    assert variables["model"]["allValue"] == ".*"
    # Panels of a collapsed row are not found by their id.
    assert not any(panel.get("collapsed") for panel in result["panels"])
