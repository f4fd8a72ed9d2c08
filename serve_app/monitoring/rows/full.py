"""Is it full? Queues, batches, KV caches and the autoscaler."""

from serve_app.monitoring.panel import Panel, Row
from serve_app.monitoring.promql import (
    MODEL,
    REPLICA,
    REPLICA_NAME,
    VLLM_MODEL,
    latest,
    quantile,
    rate,
)

ROW = Row(
    300,
    "Is it full?",
    (
        Panel(
            301,
            "Batch occupancy",
            "Running sequences divided by the most that the engines can batch. At 1, requests "
            "wait.",
            "percentunit",
            {"{{model}}": f"model:serve_app_sequences_running:ratio{{{MODEL}}}"},
            marks=(0.8, 0.98),
            number=True,
            width=6,
        ),
        Panel(
            302,
            "Waiting requests",
            "Requests that wait for a place in an engine's batch.",
            "short",
            {"{{model}}": f"model:serve_app_requests_queued:sum{{{MODEL}}}"},
            number=True,
            width=6,
        ),
        Panel(
            303,
            "KV cache, the fullest",
            "Share in use. When it is full, sequences are preempted and computed again.",
            "percentunit",
            {
                "{{model_name}}": latest(
                    "max", "ray_vllm_kv_cache_usage_perc", "model_name", VLLM_MODEL
                )
            },
            marks=(0.8, 0.9),
            number=True,
            width=6,
        ),
        Panel(
            304,
            "Requests in flight",
            "Requests without a complete response, waiting ones included.",
            "short",
            {"{{model}}": latest("sum", "ray_serve_app_requests_under_way", "model", MODEL)},
            number=True,
            width=6,
        ),
        Panel(
            305,
            "Sequences in each engine",
            "Admitted sequences, and the most that a batch holds.",
            "short",
            {
                REPLICA_NAME: latest("sum", "ray_serve_app_sequences_running", REPLICA, MODEL),
                "{{model}}, maximum": latest("max", "ray_serve_app_sequences_max", "model", MODEL),
            },
        ),
        Panel(
            306,
            "Waiting requests of each replica",
            "At most limits.max_queued_requests may wait; further requests get a 429.",
            "short",
            {REPLICA_NAME: latest("sum", "ray_serve_app_requests_queued", REPLICA, MODEL)},
            stacked=True,
        ),
        Panel(
            307,
            "Queue time",
            "Of admitted requests. After limits.queue_timeout_s a request gets a 503.",
            "s",
            {
                f"{{{{model}}}}, {words}": quantile(
                    share, "ray_serve_app_queue_duration_seconds", "model", MODEL
                )
                for share, words in ((0.5, "median"), (0.95, "95 %"))
            },
        ),
        Panel(
            308,
            "KV cache of each engine",
            "Share of its blocks in use.",
            "percentunit",
            {REPLICA_NAME: latest("max", "ray_vllm_kv_cache_usage_perc", REPLICA, VLLM_MODEL)},
            marks=(0.8, 0.9),
            maximum=1.0,
        ),
        Panel(
            309,
            "Preemptions",
            "Sequences that lost their KV blocks to others, and are computed again.",
            "ops",
            {REPLICA_NAME: rate("ray_vllm_num_preemptions_total", REPLICA, VLLM_MODEL)},
        ),
        Panel(
            310,
            "The autoscaler",
            "In replicas: the load, the forecast, the target and the maximum.",
            "short",
            {
                f"{{{{deployment}}}}, {name}": latest(
                    "max", f"ray_serve_app_scaling_{name}", "deployment"
                )
                for name in ("load", "forecast", "wanted", "running", "starting", "maximum")
            },
        ),
        Panel(
            311,
            "Backlog seen by the autoscaler",
            "Waiting requests, in replicas and outside them, and the prompt tokens that no "
            "engine has processed.",
            "short",
            {
                f"{{{{deployment}}}}, {words}": latest(
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
            {"{{ip}} GPU {{GpuIndex}}": latest("max", "ray_node_gpus_utilization", "ip, GpuIndex")},
            maximum=100.0,
        ),
        Panel(
            313,
            "GPU memory",
            "Share in use. vLLM allocates its share when it starts, and keeps it.",
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
            "Of all its cores. Above 90 % tokens are late, whatever the GPUs do.",
            "percent",
            {"{{ip}}": latest("max", "ray_node_cpu_utilization", "ip")},
            marks=(80.0, 90.0),
            maximum=100.0,
        ),
        Panel(
            315,
            "Memory of each node",
            "Share in use. Ray kills processes at 95 %.",
            "percentunit",
            {"{{ip}}": "max by (ip) (ray_node_mem_used / ray_node_mem_total)"},
            marks=(0.85, 0.95),
            maximum=1.0,
        ),
    ),
)
