"""Why? The phases of a request, the machines and Ray itself."""

from serve_app.monitoring.panel import Panel, Row
from serve_app.monitoring.promql import (
    MODEL,
    REPLICA,
    REPLICA_NAME,
    VLLM_MODEL,
    latest,
    mean,
    quantile,
    rate,
    ratio,
)

ROW = Row(
    500,
    "Why? Inside the engines",
    (
        Panel(
            501,
            "Time of a request by phase",
            "Means in vLLM: its own queue, prefill, decode. The wait for admission comes before.",
            "s",
            {
                words: mean(f"ray_vllm_request_{name}_time_seconds", "model_name")
                for name, words in (
                    ("queue", "{{model_name}}, vLLM's queue"),
                    ("prefill", "{{model_name}}, prefill"),
                    ("decode", "{{model_name}}, decode"),
                )
            },
            stacked=True,
        ),
        Panel(
            502,
            "Length of requests",
            "Means of completed requests. Long prompts make first tokens late, long answers "
            "fill the batch.",
            "suffix: tokens",
            {
                "{{model_name}}, prompt": mean("ray_vllm_request_prompt_tokens", "model_name"),
                "{{model_name}}, answer": mean("ray_vllm_request_generation_tokens", "model_name"),
            },
        ),
        Panel(
            503,
            "Prefix cache",
            "The share of prompt tokens that came from it, of each engine and of all. Low at "
            "one replica: requests with the same beginning go to other replicas.",
            "percentunit",
            {
                REPLICA_NAME: ratio(
                    rate("ray_vllm_prefix_cache_hits_total", REPLICA, VLLM_MODEL),
                    rate("ray_vllm_prefix_cache_queries_total", REPLICA, VLLM_MODEL),
                ),
                "{{model}}, all": f"model:vllm_prefix_cache_hits:ratio_rate5m{{{MODEL}}}",
            },
            maximum=1.0,
        ),
        Panel(
            504,
            "Running in vLLM",
            "Sequences in the batch of each engine.",
            "short",
            {REPLICA_NAME: latest("sum", "ray_vllm_num_requests_running", REPLICA, VLLM_MODEL)},
        ),
        Panel(
            505,
            "Waiting in vLLM",
            "Admitted sequences without a place in the batch: the KV cache is full.",
            "short",
            {REPLICA_NAME: latest("sum", "ray_vllm_num_requests_waiting", REPLICA, VLLM_MODEL)},
        ),
        Panel(
            506,
            "Finish reasons",
            "stop: the model was done. length: it reached max_tokens. abort: the client left, "
            "or the request timed out.",
            "reqps",
            {
                "{{finished_reason}}": rate(
                    "ray_vllm_request_success_total", "finished_reason", VLLM_MODEL
                )
            },
            stacked=True,
        ),
        Panel(
            507,
            "Steps of each engine",
            "Steps per second that produced tokens. 0 with requests in the batch means that "
            "the engine hangs.",
            "ops",
            {REPLICA_NAME: rate("ray_vllm_iteration_tokens_total_count", REPLICA, VLLM_MODEL)},
        ),
        Panel(
            508,
            "Tokens per step",
            "Prompt and generated tokens, as a mean. Many: long prompts, which make steps slow.",
            "suffix: tokens",
            {REPLICA_NAME: mean("ray_vllm_iteration_tokens_total", REPLICA)},
        ),
        Panel(
            509,
            "Between tokens in each engine, 95 %",
            "As vLLM sees it. If it is low here and high above, the delay is in front of the "
            "engine.",
            "s",
            {
                REPLICA_NAME: quantile(
                    0.95, "ray_vllm_inter_token_latency_seconds", REPLICA, VLLM_MODEL
                )
            },
        ),
        Panel(
            510,
            "Replicas by version",
            "More than one version means that an upgrade is in progress, or did not finish.",
            "short",
            {
                "{{model}}: {{version}}, vLLM {{vllm}}, Ray {{ray}}": latest(
                    "count", "ray_serve_app_build_info", "model, version, vllm, ray", MODEL
                )
            },
        ),
        Panel(
            511,
            "Memory of Ray's processes",
            "The largest of each kind on each node. A process that grows without bound will "
            "be killed.",
            "bytes",
            {"{{Component}} {{ip}}": "topk(12, max by (Component, ip) (ray_component_rss_bytes))"},
        ),
        Panel(
            512,
            "Lag of the GCS",
            "How late the event loops of Ray's head are. With a lag of seconds it cannot keep up.",
            "ms",
            {
                "{{Name}}": latest(
                    "max", "ray_io_context_event_loop_lag_ms", "Name", 'Component="gcs_server"'
                )
            },
        ),
    ),
)
