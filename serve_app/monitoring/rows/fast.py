"""Is it fast? Latencies beside their objectives."""

from serve_app.monitoring.panel import Panel, Row
from serve_app.monitoring.promql import (
    MODEL,
    REPLICA,
    REPLICA_NAME,
    VLLM_MODEL,
    objective,
    quantile,
    rate,
    recorded_quantiles,
)

ROW = Row(
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
                f'{{{MODEL}, quantile="0.95"}}'
            },
            number=True,
            width=6,
        ),
        Panel(
            202,
            "Between tokens, 95 %",
            "95 of 100 gaps between two events of a stream were no longer than this.",
            "s",
            {
                "{{model}}": "model:serve_app_inter_token_seconds:quantile_rate5m"
                f'{{{MODEL}, quantile="0.95"}}'
            },
            number=True,
            width=6,
        ),
        Panel(
            203,
            "Tokens generated",
            "By all replicas together.",
            "suffix: tokens/s",
            {"{{model}}": f"model:vllm_generation_tokens:rate5m{{{MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            204,
            "Requests",
            "Completed requests, without those whose client left.",
            "reqps",
            {"{{model}}": f"model:serve_app_requests:rate5m{{{MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            205,
            "Time to first token",
            "From a request to the first event of its stream, as the client sees it.",
            "s",
            {
                **recorded_quantiles(
                    "model:serve_app_time_to_first_token_seconds:quantile_rate5m", "{{model}}"
                ),
                **objective("ttft"),
            },
        ),
        Panel(
            206,
            "Time between tokens",
            "Between two events of a stream, each of one or more tokens. The objective "
            "applies to a stream's mean.",
            "s",
            {
                **recorded_quantiles(
                    "model:serve_app_inter_token_seconds:quantile_rate5m", "{{model}}"
                ),
                **objective("itl"),
            },
        ),
        Panel(
            207,
            "End-to-end latency",
            "From the first byte of a request to the last byte of its response, without failures.",
            "s",
            recorded_quantiles(
                "model:serve_app_request_duration_seconds:quantile_rate5m", "{{model}}"
            ),
        ),
        Panel(
            208,
            "Tokens",
            "Prompt and generated tokens, counted by the engines as they are processed.",
            "suffix: tokens/s",
            {
                "{{model}}, generated": f"model:vllm_generation_tokens:rate5m{{{MODEL}}}",
                "{{model}}, prompt": f"model:vllm_prompt_tokens:rate5m{{{MODEL}}}",
            },
        ),
        Panel(
            209,
            "Requests by route",
            "Completed requests.",
            "reqps",
            {"{{route}}": rate("ray_serve_app_requests_total", "route")},
            stacked=True,
        ),
        Panel(
            210,
            "First token of each replica, 95 %",
            "As its engine sees it, after the wait in the queue. Look at a replica that is "
            "slower than the others.",
            "s",
            {
                REPLICA_NAME: quantile(
                    0.95,
                    "ray_vllm_time_to_first_token_seconds",
                    REPLICA,
                    VLLM_MODEL,
                )
            },
        ),
    ),
)
