"""Prometheus: its configuration for this machine's Ray cluster, and a client of its API."""

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).with_name("rules.yaml")


def configuration(discovery: Path, haproxy: str, interval_s: int = 5) -> str:
    """What `prometheus --config.file` reads.

    Args:
        discovery: the file in which Ray names the agents of all nodes.
        haproxy: host:port of HAProxy's own metrics.
    """
    return yaml.safe_dump(
        {
            "global": {
                "scrape_interval": f"{interval_s}s",
                "evaluation_interval": f"{interval_s}s",
            },
            "rule_files": [str(RULES)],
            "scrape_configs": [
                # Ray labels its targets job="ray".
                {
                    "job_name": "ray",
                    "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "5s"}],
                },
                {"job_name": "haproxy", "static_configs": [{"targets": [haproxy]}]},
            ],
        },
        sort_keys=False,
    )


class QueryError(Exception):
    """Prometheus is not there, or does not take the expression."""


@dataclass(frozen=True)
class Sample:
    """One series at one time, or over some."""

    labels: Mapping[str, str]
    values: Sequence[float]

    @property
    def value(self) -> float:
        return self.values[-1]


class Prometheus:
    """A client of Prometheus' HTTP API, for expressions that come from this application."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    def instant(self, expression: str) -> list[Sample]:
        """Its value now, of every series.

        Raises:
            QueryError: no answer, or the expression is wrong.
        """
        series = self._get("query", query=expression)["result"]
        return [Sample(each["metric"], [float(each["value"][1])]) for each in series]

    def span(self, expression: str, start_s: float, end_s: float, step_s: float) -> list[Sample]:
        """Its values at `start_s` (Unix time) and every step on to `end_s`, of every series.

        Where a series has none, NaN.
        """
        answer = self._get("query_range", query=expression, start=start_s, end=end_s, step=step_s)
        samples = []
        for series in answer["result"]:
            values = [math.nan] * (int((end_s - start_s) / step_s + 1e-6) + 1)
            for at_s, value in series["values"]:
                values[round((at_s - start_s) / step_s)] = float(value)
            samples.append(Sample(series["metric"], values))
        return samples

    def alerts(self) -> list[dict[str, Any]]:
        """Those that wait or fire: labels, annotations, state, activeAt."""
        alerts: list[dict[str, Any]] = self._get("alerts")["alerts"]
        return alerts

    def _get(self, what: str, **parameters: Any) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=self._timeout_s) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                body = error.read().decode("utf-8", "replace")
            raise QueryError(f"{parameters.get('query', what)}: {body}") from error
        except (OSError, ValueError) as error:
            raise QueryError(f"{self.url}: {error}") from error
