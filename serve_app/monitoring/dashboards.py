"""Grafana's dashboard as code: `python -m serve_app.monitoring.dashboards` writes serving.json.

Its rows are questions, in the order in which they are asked: is it healthy, is it fast, is it full,
what does it cost, who uses it, and why. What rules.yaml records is not computed here again, so
Prometheus needs those rules too.

A panel's id is part of its address (Ray's dashboard embeds panels by it) and stays when others come
and go: it is written below, and never used again for something else.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

SERVING = Path(__file__).with_name("serving.json")
_WIDTH, _STAT_HEIGHT, _GRAPH_HEIGHT = 24, 4, 8
_SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")

# The model that is looked at, as our metrics name it and as vLLM's do.
_MODEL, _VLLM = 'model=~"$model"', 'model_name=~"$model"'
# The replicas, each for itself, and what it is called.
_EACH, _REPLICA = "deployment, replica", "{{deployment}} {{replica}}"
# Of Grafana: long enough for a rate, whatever the time between scrapes.
_SPAN = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """A graph over time, or a number.

    Attributes:
        unit: Grafana's word for it.
        queries: expressions, by what their series are called.
        marks: values from which it is marked yellow, and red; red below the second where that is
            the smaller one.
        number: the last value instead of a graph.
        stacked: series add up to a whole.
        most: the top of the axis.
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
    id: int
    title: str
    panels: Sequence[Panel]


def _rate(metric: str, by: str, where: str = _MODEL) -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}[{_SPAN}]))"


def _ratio(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


def _mean(metric: str, by: str, where: str = _VLLM) -> str:
    """The mean of a histogram's observations in the interval."""
    return _ratio(_rate(f"{metric}_sum", by, where), _rate(f"{metric}_count", by, where))


def _now(how: str, metric: str, by: str, where: str = "") -> str:
    return f"{how} by ({by}) ({metric}{{{where}}})" if where else f"{how} by ({by}) ({metric})"


def _quantile(quantile: float, metric: str, by: str, where: str) -> str:
    return f"histogram_quantile({quantile}, {_rate(f'{metric}_bucket', f'{by}, le', where)})"


def _recorded(name: str, legend: str) -> dict[str, str]:
    """The quantiles of rules.yaml."""
    return {
        f"{legend}, {words}": f'{name}{{{_MODEL}, quantile="{quantile}"}}'
        for quantile, words in (("0.5", "median"), ("0.95", "95 %"), ("0.99", "99 %"))
    }


def _limit(of: str) -> dict[str, str]:
    return {"objective": f'max by (model) (ray_serve_app_slo_seconds{{{_MODEL}, of="{of}"}})'}


_HEALTHY = Row(
    100,
    "Is it healthy?",
    (
        Panel(
            101,
            "Objective kept, last hour or since the start",
            "Of the requests that count for the objective, those that kept it. 99 % should.",
            "percentunit",
            {"{{model}}": f"1 - model:serve_app_slo_missed:ratio_rate1h{{{_MODEL}}}"},
            marks=(0.99, 0.95),
            number=True,
            width=6,
        ),
        Panel(
            102,
            "Ready replicas",
            "Replicas that Ray Serve's controller has found healthy.",
            "short",
            {"{{deployment}}": "deployment:serve_replicas_ready:sum"},
            number=True,
            width=6,
        ),
        Panel(
            103,
            "Requests failed",
            "With a 5xx, in the last five minutes; without those that only HAProxy saw.",
            "percentunit",
            {"{{model}}": f"model:serve_app_requests_failed:ratio_rate5m{{{_MODEL}}}"},
            marks=(0.01, 0.05),
            number=True,
            width=6,
        ),
        Panel(
            104,
            "Alerts that fire",
            "By severity; runbooks.md says what to do about each.",
            "short",
            {
                severity: f'sum(ALERTS{{alertstate="firing", severity="{severity}"}}) or vector(0)'
                for severity in ("critical", "warning")
            },
            marks=(0.5, 0.5),
            number=True,
            width=6,
        ),
        Panel(
            105,
            "How fast the error budget burns",
            "1: as fast as 99 % allow. Above 14.4 over 1 h, or 6 over 6 h, an alert fires.",
            "suffix: x",
            {
                "{{model}}, 5 min": f"model:serve_app_slo_missed:ratio_rate5m{{{_MODEL}}} / 0.01",
                "{{model}}, 1 h": f"model:serve_app_slo_missed:ratio_rate1h{{{_MODEL}}} / 0.01",
                "{{model}}, 6 h": f"model:serve_app_slo_missed:ratio_rate6h{{{_MODEL}}} / 0.01",
            },
            marks=(6.0, 14.4),
        ),
        Panel(
            106,
            "Answers by status",
            "Requests that are over. 499: the client left before the end.",
            "reqps",
            {"{{status}}": _rate("ray_serve_app_requests_total", "status")},
            stacked=True,
        ),
        Panel(
            107,
            "Errors of ours, by reason",
            "Requests that this application answered with an error itself. queue_full: more wait "
            "than limits.max_queued_requests. unavailable: no replica, or too long a wait.",
            "reqps",
            {"{{reason}}": _rate("ray_serve_app_rejections_total", "reason")},
        ),
        Panel(
            108,
            "HAProxy: answers by status",
            "What it sent, answers of its own included. Not on EKS, where nobody asks it.",
            "reqps",
            {"{{code}}": f"sum by (code) (rate(haproxy_backend_http_responses_total[{_SPAN}]))"},
            stacked=True,
        ),
        Panel(
            109,
            "Replicas: wanted, ready",
            "What Ray Serve was asked for, and what it has.",
            "short",
            {
                "{{deployment}}, wanted": _now(
                    "max", "ray_serve_autoscaling_target_replicas", "deployment"
                ),
                "{{deployment}}": _now("sum", "deployment:serve_replicas_ready:sum", "deployment"),
            },
        ),
        Panel(
            110,
            "Replicas that began, within 15 min",
            "New ones, and those in place of others. More than were added: replicas die.",
            "short",
            {
                "{{deployment}}, began": _now(
                    "sum", "deployment:serve_replica_starts:count15m", "deployment"
                ),
                "{{deployment}}, added": _now(
                    "sum", "deployment:serve_replicas_wanted:increase15m", "deployment"
                ),
            },
        ),
        Panel(
            111,
            "Failures that clients did not see",
            "The gateway's: attempts at a replica that failed, by how, and answers that went on "
            "elsewhere, by how.",
            "reqps",
            {
                "failed: {{reason}}": _rate("ray_serve_app_attempts_failed_total", "reason"),
                "went on: {{method}}": _rate("ray_serve_app_continuations_total", "method"),
                "sent on: full": _rate("ray_serve_app_attempts_busy_total", "model"),
            },
        ),
        Panel(
            112,
            "Replicas that can be asked",
            "As each gateway sees them, and servers that each HAProxy has up. They should agree. "
            "Requests wait where there is none.",
            "short",
            {
                "{{model}}, gateway {{replica}}": _now(
                    "min", "ray_serve_app_replicas_usable", "model, replica", _MODEL
                ),
                "{{model}}: requests that wait for one": _now(
                    "sum", "ray_serve_app_requests_unplaced", "model", _MODEL
                ),
                "HAProxy {{instance}}, {{proxy}}": _now(
                    "sum",
                    "haproxy_backend_active_servers",
                    "instance, proxy",
                    'proxy!~"default.*"',
                ),
            },
        ),
        Panel(
            113,
            "Nodes that answer",
            "Targets of Ray that Prometheus reaches, and those that it does not.",
            "short",
            {
                "answer": 'sum(up{job=~"ray|.*/qwen-(head|worker)"})',
                "silent": 'sum(1 - up{job=~"ray|.*/qwen-(head|worker)"})',
            },
        ),
        Panel(
            114,
            "Ray Serve's controller",
            "How long one round of its control loop takes. It replaces replicas and scales.",
            "s",
            {"a round": "max(ray_serve_controller_control_loop_duration_s)"},
        ),
    ),
)

_FAST = Row(
    200,
    "Is it fast?",
    (
        Panel(
            201,
            "First token, 95 %",
            "95 of 100 requests had their first token within this time, all waiting included.",
            "s",
            {
                "{{model}}": "model:serve_app_time_to_first_token_seconds:quantile_rate5m"
                f'{{{_MODEL}, quantile="0.95"}}'
            },
            number=True,
            width=6,
        ),
        Panel(
            202,
            "Between tokens, 95 %",
            "95 of 100 pauses between two events of a stream were no longer than this.",
            "s",
            {
                "{{model}}": "model:serve_app_inter_token_seconds:quantile_rate5m"
                f'{{{_MODEL}, quantile="0.95"}}'
            },
            number=True,
            width=6,
        ),
        Panel(
            203,
            "Tokens generated",
            "By all replicas together.",
            "suffix: tokens/s",
            {"{{model}}": f"model:vllm_generation_tokens:rate5m{{{_MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            204,
            "Requests",
            "That are over, without those whose client left.",
            "reqps",
            {"{{model}}": f"model:serve_app_requests:rate5m{{{_MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            205,
            "Time to first token",
            "From a request to the first event of its stream, as the client sees it.",
            "s",
            {
                **_recorded(
                    "model:serve_app_time_to_first_token_seconds:quantile_rate5m", "{{model}}"
                ),
                **_limit("ttft"),
            },
        ),
        Panel(
            206,
            "Time between tokens",
            "Between two events of a stream, each a token or more. The objective is for a stream's "
            "mean.",
            "s",
            {
                **_recorded("model:serve_app_inter_token_seconds:quantile_rate5m", "{{model}}"),
                **_limit("itl"),
            },
        ),
        Panel(
            207,
            "Whole answers",
            "From the first byte of a request to the last of its answer; failures are left out.",
            "s",
            _recorded("model:serve_app_request_duration_seconds:quantile_rate5m", "{{model}}"),
        ),
        Panel(
            208,
            "Tokens",
            "Read and generated by the engines, counted as they are made.",
            "suffix: tokens/s",
            {
                "{{model}}, generated": f"model:vllm_generation_tokens:rate5m{{{_MODEL}}}",
                "{{model}}, read": f"model:vllm_prompt_tokens:rate5m{{{_MODEL}}}",
            },
        ),
        Panel(
            209,
            "Requests by route",
            "Requests that are over.",
            "reqps",
            {"{{route}}": _rate("ray_serve_app_requests_total", "route")},
            stacked=True,
        ),
        Panel(
            210,
            "First token of each replica, 95 %",
            "As its engine sees it, after the wait for room. One that is slower than the others is "
            "the one to look at.",
            "s",
            {
                _REPLICA: _quantile(
                    0.95,
                    "ray_vllm_time_to_first_token_seconds",
                    _EACH,
                    _VLLM,
                )
            },
        ),
    ),
)

_FULL = Row(
    300,
    "Is it full?",
    (
        Panel(
            301,
            "Batches filled",
            "Sequences in the engines, of those that they batch at most. At 1, requests wait.",
            "percentunit",
            {"{{model}}": f"model:serve_app_sequences_running:ratio{{{_MODEL}}}"},
            marks=(0.8, 0.98),
            number=True,
            width=6,
        ),
        Panel(
            302,
            "Requests that wait",
            "For room in an engine's batch.",
            "short",
            {"{{model}}": f"model:serve_app_requests_queued:sum{{{_MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            303,
            "KV cache, the fullest",
            "Share in use. When it is full, sequences lose their place and are computed again.",
            "percentunit",
            {"{{model_name}}": _now("max", "ray_vllm_kv_cache_usage_perc", "model_name", _VLLM)},
            marks=(0.8, 0.9),
            number=True,
            width=6,
        ),
        Panel(
            304,
            "Requests under way",
            "Requests that have no full answer yet, waiting ones included.",
            "short",
            {"{{model}}": _now("sum", "ray_serve_app_requests_under_way", "model", _MODEL)},
            number=True,
            width=6,
        ),
        Panel(
            305,
            "Sequences in each engine",
            "Those that were let in, and the most that a batch holds.",
            "short",
            {
                _REPLICA: _now("sum", "ray_serve_app_sequences_running", _EACH, _MODEL),
                "{{model}}, most": _now("max", "ray_serve_app_sequences_max", "model", _MODEL),
            },
        ),
        Panel(
            306,
            "Requests that wait at each replica",
            "As many as limits.max_queued_requests may wait; one more gets a 429.",
            "short",
            {_REPLICA: _now("sum", "ray_serve_app_requests_queued", _EACH, _MODEL)},
            stacked=True,
        ),
        Panel(
            307,
            "Wait for room",
            "Of requests that were let in. limits.queue_timeout_s ends it with a 503.",
            "s",
            {
                f"{{{{model}}}}, {words}": _quantile(
                    quantile, "ray_serve_app_queue_duration_seconds", "model", _MODEL
                )
                for quantile, words in ((0.5, "median"), (0.95, "95 %"))
            },
        ),
        Panel(
            308,
            "KV cache of each engine",
            "Share of its blocks in use.",
            "percentunit",
            {_REPLICA: _now("max", "ray_vllm_kv_cache_usage_perc", _EACH, _VLLM)},
            marks=(0.8, 0.9),
            maximum=1.0,
        ),
        Panel(
            309,
            "Preemptions",
            "Sequences that lost their KV blocks to others, and are computed again.",
            "ops",
            {_REPLICA: _rate("ray_vllm_num_preemptions_total", _EACH, _VLLM)},
        ),
        Panel(
            310,
            "The autoscaler",
            "In replicas: the load, what is foreseen, what is wanted, and the most that may be.",
            "short",
            {
                f"{{{{deployment}}}}, {name}": _now(
                    "max", f"ray_serve_app_scaling_{name}", "deployment"
                )
                for name in ("load", "forecast", "wanted", "running", "starting", "maximum")
            },
        ),
        Panel(
            311,
            "What the autoscaler sees wait",
            "Requests in all replicas and where none is, and prompt tokens that none has read.",
            "short",
            {
                f"{{{{deployment}}}}, {words}": _now(
                    "max", f"ray_serve_app_scaling_{name}", "deployment"
                )
                for name, words in (("waiting", "requests"), ("queued_tokens", "tokens"))
            },
        ),
        Panel(
            312,
            "GPUs",
            "Share of the time in which a GPU computed anything, little or much.",
            "percent",
            {"{{ip}} GPU {{GpuIndex}}": _now("max", "ray_node_gpus_utilization", "ip, GpuIndex")},
            maximum=100.0,
        ),
        Panel(
            313,
            "GPU memory",
            "Share in use. vLLM takes its share when it starts, and keeps it.",
            "percentunit",
            {
                "{{ip}} GPU {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gram_used / "
                "(ray_node_gram_used + ray_node_gram_available))"
            },
            maximum=1.0,
        ),
        Panel(
            314,
            "CPU of each node",
            "Of all its cores. Above 90 % tokens come late, whatever the GPUs do.",
            "percent",
            {"{{ip}}": _now("max", "ray_node_cpu_utilization", "ip")},
            marks=(80.0, 90.0),
            maximum=100.0,
        ),
        Panel(
            315,
            "Memory of each node",
            "Share in use. Ray ends processes at 95 %.",
            "percentunit",
            {"{{ip}}": "max by (ip) (ray_node_mem_used / ray_node_mem_total)"},
            marks=(0.85, 0.95),
            maximum=1.0,
        ),
    ),
)

_COST = Row(
    400,
    "What does it cost?",
    (
        Panel(
            401,
            "A million generated tokens",
            "All replicas, idle or not, over the tokens of the last 15 minutes. Needs "
            "price_per_gpu_hour.",
            "currencyUSD",
            {
                "{{model}}": "model:serve_app_cost_dollars_per_million_generated_tokens:rate15m"
                f"{{{_MODEL}}}"
            },
            number=True,
            width=6,
        ),
        Panel(
            402,
            "An hour",
            "All replicas that there are now. Needs price_per_gpu_hour.",
            "currencyUSD",
            {"{{model}}": f"model:serve_app_price_dollars_per_hour:sum{{{_MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            403,
            "GPUs in use",
            "Of all replicas; on a CPU each counts as one.",
            "short",
            {"{{model}}": _now("sum", "ray_serve_app_replica_gpus", "model", _MODEL)},
            number=True,
            width=6,
        ),
        Panel(
            404,
            "Tokens of a GPU",
            "Generated tokens a second, for each GPU that is paid for.",
            "suffix: tokens/s",
            {
                "{{model}}": f"model:vllm_generation_tokens:rate5m{{{_MODEL}}} "
                f"/ sum by (model) (ray_serve_app_replica_gpus{{{_MODEL}}})"
            },
            number=True,
            width=6,
        ),
        Panel(
            405,
            "A million generated tokens, over time",
            "It rises when replicas are idle: fewer replicas, or more load for each.",
            "currencyUSD",
            {
                "{{model}}": "model:serve_app_cost_dollars_per_million_generated_tokens:rate15m"
                f"{{{_MODEL}}}"
            },
        ),
        Panel(
            406,
            "Generated tokens by tenant",
            "Of requests that are over, by the name of the key.",
            "suffix: tokens/s",
            {"{{tenant}}": _rate("ray_serve_app_generated_tokens_total", "tenant")},
            stacked=True,
        ),
        Panel(
            407,
            "Prompt tokens by tenant",
            "Of requests that are over, cached or not, by the name of the key.",
            "suffix: tokens/s",
            {"{{tenant}}": _rate("ray_serve_app_prompt_tokens_total", "tenant")},
            stacked=True,
        ),
        Panel(
            408,
            "Power of the GPUs",
            "What they draw, of each node.",
            "watt",
            {"{{ip}}": "sum by (ip) (ray_node_gpu_power_milliwatts) / 1000"},
            stacked=True,
        ),
    ),
)

_WHY = Row(
    500,
    "Why? Inside the engines",
    (
        Panel(
            501,
            "Where the time of a request goes",
            "Means in vLLM: its own queue, reading the prompt, generating. The wait for room "
            "comes before.",
            "s",
            {
                words: _mean(f"ray_vllm_request_{name}_time_seconds", "model_name")
                for name, words in (
                    ("queue", "{{model_name}}, vLLM's queue"),
                    ("prefill", "{{model_name}}, reading"),
                    ("decode", "{{model_name}}, generating"),
                )
            },
            stacked=True,
        ),
        Panel(
            502,
            "Length of requests",
            "Means of those that are over. Long prompts make first tokens late, long answers fill "
            "the batch.",
            "suffix: tokens",
            {
                "{{model_name}}, prompt": _mean("ray_vllm_request_prompt_tokens", "model_name"),
                "{{model_name}}, answer": _mean("ray_vllm_request_generation_tokens", "model_name"),
            },
        ),
        Panel(
            503,
            "Prefix cache",
            "Share of prompt tokens that were found in it, of each engine and of all. Low at one "
            "replica: requests with the same beginning go elsewhere.",
            "percentunit",
            {
                _REPLICA: _ratio(
                    _rate("ray_vllm_prefix_cache_hits_total", _EACH, _VLLM),
                    _rate("ray_vllm_prefix_cache_queries_total", _EACH, _VLLM),
                ),
                "{{model}}, all": f"model:vllm_prefix_cache_hits:ratio_rate5m{{{_MODEL}}}",
            },
            maximum=1.0,
        ),
        Panel(
            504,
            "Running in vLLM",
            "Sequences in the batch of each engine.",
            "short",
            {_REPLICA: _now("sum", "ray_vllm_num_requests_running", _EACH, _VLLM)},
        ),
        Panel(
            505,
            "Waiting in vLLM",
            "Sequences that were let in and have no place: the KV cache is full.",
            "short",
            {_REPLICA: _now("sum", "ray_vllm_num_requests_waiting", _EACH, _VLLM)},
        ),
        Panel(
            506,
            "How answers end",
            "stop: the model was done. length: too many tokens. abort: the client left, or it took "
            "too long.",
            "reqps",
            {
                "{{finished_reason}}": _rate(
                    "ray_vllm_request_success_total", "finished_reason", _VLLM
                )
            },
            stacked=True,
        ),
        Panel(
            507,
            "Steps of each engine",
            "Steps a second that gave tokens. 0 with requests in the batch: it hangs.",
            "ops",
            {_REPLICA: _rate("ray_vllm_iteration_tokens_total_count", _EACH, _VLLM)},
        ),
        Panel(
            508,
            "Tokens of a step",
            "Read and generated, as a mean. Many: long prompts, which make a step take long.",
            "suffix: tokens",
            {_REPLICA: _mean("ray_vllm_iteration_tokens_total", _EACH)},
        ),
        Panel(
            509,
            "Between tokens in each engine, 95 %",
            "As vLLM sees it. Good here and bad above: what is slow is in front of the engine.",
            "s",
            {_REPLICA: _quantile(0.95, "ray_vllm_inter_token_latency_seconds", _EACH, _VLLM)},
        ),
        Panel(
            510,
            "Replicas by version",
            "More than one version of something: an upgrade is under way, or did not end.",
            "short",
            {
                "{{model}}: {{version}}, vLLM {{vllm}}, Ray {{ray}}": _now(
                    "count", "ray_serve_app_build_info", "model, version, vllm, ray", _MODEL
                )
            },
        ),
        Panel(
            511,
            "Memory of Ray's processes",
            "The largest of each kind on each node. One that only grows will be ended.",
            "bytes",
            {"{{Component}} {{ip}}": "topk(12, max by (Component, ip) (ray_component_rss_bytes))"},
        ),
        Panel(
            512,
            "Lag of the GCS",
            "How late the event loops of Ray's head are. Seconds: it cannot keep up.",
            "ms",
            {
                "{{Name}}": _now(
                    "max", "ray_io_context_event_loop_lag_ms", "Name", 'Component="gcs_server"'
                )
            },
        ),
    ),
)

_WHO = Row(
    600,
    "Who uses it?",
    (
        Panel(
            601,
            "Wait for room by tenant",
            "Mean of the requests that were let in. Of one tenant only: it asks for more than its "
            "share, or is starved.",
            "s",
            {
                "{{model}} {{tenant}}": _now(
                    "max",
                    "tenant:serve_app_tenant_queue_seconds:ratio_rate5m",
                    "model, tenant",
                    _MODEL,
                )
            },
        ),
        Panel(
            602,
            "Budgets used",
            "Of a day or a month, of the tenants that are nearest to the end.",
            "percentunit",
            {
                "{{tenant}}, {{limit}}": _now(
                    "max", "ray_serve_app_quota_used_ratio", "tenant, limit"
                )
            },
            marks=(0.9, 1.0),
        ),
        Panel(
            603,
            "GPUs by tenant",
            "Seconds of GPUs in which its sequences ran, each second.",
            "short",
            {"{{tenant}}": _rate("ray_serve_app_gpu_seconds_total", "tenant")},
            stacked=True,
        ),
        Panel(
            604,
            "Requests refused by limit",
            "429 or 402: a limit of the tenant is reached.",
            "reqps",
            {"{{limit}}": _rate("ray_serve_app_quota_refusals_total", "limit", "")},
            stacked=True,
        ),
        Panel(
            605,
            "Tenants that cannot be read or counted",
            "1: the file or database of tenants cannot be read, or the ledger waits for it.",
            "short",
            {
                "not read": "max(ray_serve_app_tenants_stale)",
                "not counted": "max(ray_serve_app_ledger_away)",
            },
            marks=(1, 1),
        ),
    ),
)

ROWS = (_HEALTHY, _FAST, _FULL, _COST, _WHO, _WHY)


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
    """As many beside each other as fit; numbers and graphs are of different heights."""
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
