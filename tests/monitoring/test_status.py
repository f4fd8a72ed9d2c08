"""The data of the status page, from a Prometheus that answers with planted samples."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve_app.monitoring import status
from serve_app.monitoring.prometheus import Prometheus, QueryError, Sample

ONE = {"deployment": "engine", "replica": "a"}


class Planted(Prometheus):
    """Answers each query with the samples that are planted for it."""

    def __init__(self, samples: dict[str, list[Sample]], problem: str = "") -> None:
        super().__init__("http://127.0.0.1:1")
        self._samples, self._problem = samples, problem

    def instant(self, expression: str) -> list[Sample]:
        if self._problem:
            raise QueryError(self._problem)
        return self._samples.get(expression, [])

    def span(self, expression: str, start_s: float, end_s: float, step_s: float) -> list[Sample]:
        return [
            Sample(sample.labels, [math.nan, sample.value]) for sample in self.instant(expression)
        ]

    def alerts(self) -> list[dict[str, Any]]:
        labels = {"alertname": "HeadDown", "severity": "critical"}
        waiting = {"labels": labels, "annotations": {}, "state": "pending"}
        return [{**waiting, "state": "firing"}, waiting]


def shown(prometheus: Prometheus) -> dict[str, Any]:
    answer = TestClient(status.app(prometheus)).get("/status.json")
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    return body


def test_values_rows_and_firing_alerts_are_shown() -> None:
    samples = {
        status.FIGURES[0].expression: [Sample({}, [0.0])],
        status.COLUMNS["healthy"]: [Sample(ONE, [1.0])],
        status.STARTS: [
            Sample({"kind": "start", "phase": phase}, [took_s])
            for phase, took_s in (("weights", 2.0), ("imports", 3.0))
        ],
    }
    body = shown(Planted(samples))
    replicas, requests = body["figures"][:2]
    assert (replicas["value"], replicas["past"], replicas["bad"]) == (0.0, [None, 0.0], True)
    assert (requests["value"], requests["past"], requests["bad"]) == (None, [], False)
    assert body["replicas"] == [{"replica": "engine a", "healthy": 1.0}]
    assert body["starts"] == [{"starts": "start", "whole": 5.0, "imports": 3.0, "weights": 2.0}]
    assert body["alerts"] == [{"name": "HeadDown", "severity": "critical", "summary": ""}]


@pytest.mark.parametrize("problem", ["", "it is down"])
def test_the_page_gets_every_list_without_data_and_the_reason_of_a_failure(problem: str) -> None:
    body = shown(Planted({}, problem))
    assert body["error"] == problem
    assert {"figures", "replicas", "starts", "alerts"} <= body.keys()


def test_figures_and_headings_of_tables_are_not_broken_between_letters() -> None:
    """The page lets long words break anywhere: at 390 px each cell was one letter wide."""
    page = (Path(status.__file__).with_name("status.html")).read_text()
    cells = re.search(r"^  th, td \{(.*)\}$", page, re.MULTILINE)
    assert cells is not None
    assert "white-space: nowrap" in cells[1]
