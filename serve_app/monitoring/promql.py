"""Expressions of PromQL that several panels share."""

# Selects the model chosen on the dashboard, in our metrics and in vLLM's.
MODEL, VLLM_MODEL = 'model=~"$model"', 'model_name=~"$model"'
# One series for each replica, and its legend.
REPLICA, REPLICA_NAME = "deployment, replica", "{{deployment}} {{replica}}"
# Grafana's variable: long enough for a rate, whatever the time between scrapes.
INTERVAL = "$__rate_interval"


def rate(metric: str, by: str, where: str = MODEL) -> str:
    """The increase of a counter per second, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{where}}}[{INTERVAL}]))"


def ratio(part: str, total: str) -> str:
    """A share; no value where the total is zero."""
    return f"{part} / ({total} > 0)"


def mean(metric: str, by: str, where: str = VLLM_MODEL) -> str:
    """The mean of a histogram's observations in the interval."""
    return ratio(rate(f"{metric}_sum", by, where), rate(f"{metric}_count", by, where))


def latest(aggregation: str, metric: str, by: str, where: str = "") -> str:
    """The last value of a gauge, aggregated by labels."""
    selector = f"{metric}{{{where}}}" if where else metric
    return f"{aggregation} by ({by}) ({selector})"


def quantile(share: float, metric: str, by: str, where: str) -> str:
    """A quantile of a histogram's observations in the interval."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', f'{by}, le', where)})"


def recorded_quantiles(name: str, legend: str) -> dict[str, str]:
    """The quantiles that rules.yaml records."""
    return {
        f"{legend}, {words}": f'{name}{{{MODEL}, quantile="{share}"}}'
        for share, words in (("0.5", "median"), ("0.95", "95 %"), ("0.99", "99 %"))
    }


def objective(of: str) -> dict[str, str]:
    """The configured limit of a latency."""
    return {"objective": f'max by (model) (ray_serve_app_slo_seconds{{{MODEL}, of="{of}"}})'}
