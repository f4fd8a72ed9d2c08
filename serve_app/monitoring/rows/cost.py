"""What does it cost? GPU hours, and dollars per million tokens."""

from serve_app.monitoring.panel import Panel, Row
from serve_app.monitoring.promql import MODEL, latest, rate

ROW = Row(
    400,
    "What does it cost?",
    (
        Panel(
            401,
            "Cost of a million generated tokens",
            "The cost of all replicas, idle or not, per token of the last 15 minutes. Needs "
            "price_per_gpu_hour.",
            "currencyUSD",
            {
                "{{model}}": "model:serve_app_cost_dollars_per_million_generated_tokens:rate15m"
                f"{{{MODEL}}}"
            },
            number=True,
            width=6,
        ),
        Panel(
            402,
            "Cost of an hour",
            "The cost of all replicas that exist now. Needs price_per_gpu_hour.",
            "currencyUSD",
            {"{{model}}": f"model:serve_app_price_dollars_per_hour:sum{{{MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            403,
            "GPUs in use",
            "By all replicas. A replica on a CPU counts as one.",
            "short",
            {"{{model}}": latest("sum", "ray_serve_app_replica_gpus", "model", MODEL)},
            number=True,
            width=6,
        ),
        Panel(
            404,
            "Tokens per GPU",
            "Generated tokens per second and GPU.",
            "suffix: tokens/s",
            {
                "{{model}}": f"model:vllm_generation_tokens:rate5m{{{MODEL}}} "
                f"/ sum by (model) (ray_serve_app_replica_gpus{{{MODEL}}})"
            },
            number=True,
            width=6,
        ),
        Panel(
            405,
            "Cost of a million generated tokens, over time",
            "It rises when replicas are idle: run fewer replicas, or give each more load.",
            "currencyUSD",
            {
                "{{model}}": "model:serve_app_cost_dollars_per_million_generated_tokens:rate15m"
                f"{{{MODEL}}}"
            },
        ),
        Panel(
            406,
            "Generated tokens by tenant",
            "Of completed requests, by the name of the key.",
            "suffix: tokens/s",
            {"{{tenant}}": rate("ray_serve_app_generated_tokens_total", "tenant")},
            stacked=True,
        ),
        Panel(
            407,
            "Prompt tokens by tenant",
            "Of completed requests, cached or not, by the name of the key.",
            "suffix: tokens/s",
            {"{{tenant}}": rate("ray_serve_app_prompt_tokens_total", "tenant")},
            stacked=True,
        ),
        Panel(
            408,
            "Power of the GPUs",
            "Power draw of the GPUs of each node.",
            "watt",
            {"{{ip}}": "sum by (ip) (ray_node_gpu_power_milliwatts) / 1000"},
            stacked=True,
        ),
    ),
)
