"""Is it healthy? The objective, errors, replicas and nodes."""

from serve_app.monitoring.panel import Panel, Row
from serve_app.monitoring.promql import INTERVAL, MODEL, latest, rate

ROW = Row(
    100,
    "Is it healthy?",
    (
        Panel(
            101,
            "Objective met, last hour or since the start",
            "The share of requests that met the objective, of those to which it applies. It "
            "should be 99 %.",
            "percentunit",
            {"{{model}}": f"1 - model:serve_app_slo_missed:ratio_rate1h{{{MODEL}}}"},
            marks=(0.99, 0.95),
            number=True,
            width=6,
        ),
        Panel(
            102,
            "Ready replicas",
            "Replicas that Ray Serve's controller found healthy.",
            "short",
            {"{{deployment}}": "deployment:serve_replicas_ready:sum"},
            number=True,
            width=6,
        ),
        Panel(
            103,
            "Failed requests",
            "The share with a 5xx in the last five minutes, without requests that reached "
            "only HAProxy.",
            "percentunit",
            {"{{model}}": f"model:serve_app_requests_failed:ratio_rate5m{{{MODEL}}}"},
            marks=(0.01, 0.05),
            number=True,
            width=6,
        ),
        Panel(
            104,
            "Firing alerts",
            "By severity. runbooks.md says what to do about each.",
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
            "Burn rate of the error budget",
            "1: as fast as an objective of 99 % allows. An alert fires above 14.4 over 1 h, "
            "or above 6 over 6 h.",
            "suffix: x",
            {
                "{{model}}, 5 min": f"model:serve_app_slo_missed:ratio_rate5m{{{MODEL}}} / 0.01",
                "{{model}}, 1 h": f"model:serve_app_slo_missed:ratio_rate1h{{{MODEL}}} / 0.01",
                "{{model}}, 6 h": f"model:serve_app_slo_missed:ratio_rate6h{{{MODEL}}} / 0.01",
            },
            marks=(6.0, 14.4),
        ),
        Panel(
            106,
            "Responses by status",
            "Completed requests. 499: the client left before the end.",
            "reqps",
            {"{{status}}": rate("ray_serve_app_requests_total", "status")},
            stacked=True,
        ),
        Panel(
            107,
            "Own errors, by reason",
            "Requests that this application itself answered with an error. queue_full: more "
            "requests wait than limits.max_queued_requests. unavailable: no replica, or too "
            "long a wait.",
            "reqps",
            {"{{reason}}": rate("ray_serve_app_rejections_total", "reason")},
        ),
        Panel(
            108,
            "HAProxy: responses by status",
            "Responses that HAProxy sent, its own included. Not on EKS, where Prometheus does "
            "not scrape it.",
            "reqps",
            {
                "{{code}}": "sum by (code) (rate(haproxy_frontend_http_responses_total"
                f'{{proxy="http_frontend"}}[{INTERVAL}]))'
            },
            stacked=True,
        ),
        Panel(
            109,
            "Replicas: target, ready",
            "The number that Ray Serve aims at, and the number that is ready.",
            "short",
            {
                "{{deployment}}, target": latest(
                    "max", "ray_serve_autoscaling_target_replicas", "deployment"
                ),
                "{{deployment}}": latest(
                    "sum", "deployment:serve_replicas_ready:sum", "deployment"
                ),
            },
        ),
        Panel(
            110,
            "Replica starts, last 15 min",
            "Additional replicas and replacements. More starts than additions mean that "
            "replicas die.",
            "short",
            {
                "{{deployment}}, started": latest(
                    "sum", "deployment:serve_replica_starts:count15m", "deployment"
                ),
                "{{deployment}}, added": latest(
                    "sum", "deployment:serve_replicas_wanted:increase15m", "deployment"
                ),
            },
        ),
        Panel(
            111,
            "Failures hidden from clients",
            "Of the gateway: failed attempts at a replica, by reason, and answers that "
            "another replica continued, by method.",
            "reqps",
            {
                "failed: {{reason}}": rate("ray_serve_app_attempts_failed_total", "reason"),
                "continued: {{method}}": rate("ray_serve_app_continuations_total", "method"),
                "replica full": rate("ray_serve_app_attempts_busy_total", "model"),
            },
        ),
        Panel(
            112,
            "Reachable replicas",
            "As each gateway sees them, and the servers that each HAProxy has up. The two "
            "should agree. Without a reachable replica, requests wait.",
            "short",
            {
                "{{model}}, gateway {{replica}}": latest(
                    "min", "ray_serve_app_replicas_usable", "model, replica", MODEL
                ),
                "{{model}}: waiting requests": latest(
                    "sum", "ray_serve_app_requests_unplaced", "model", MODEL
                ),
                "HAProxy {{instance}}, {{proxy}}": latest(
                    "sum",
                    "haproxy_backend_active_servers",
                    "instance, proxy",
                    'proxy!~"default.*"',
                ),
            },
        ),
        Panel(
            113,
            "Reachable nodes",
            "Targets of Ray that Prometheus reaches, and those that it does not.",
            "short",
            {
                "up": 'sum(up{job=~"ray|.*/qwen-(head|worker)"})',
                "down": 'sum(1 - up{job=~"ray|.*/qwen-(head|worker)"})',
            },
        ),
        Panel(
            114,
            "Ray Serve's controller",
            "The duration of one round of its control loop, which replaces and scales replicas.",
            "s",
            {"round": "max(ray_serve_controller_control_loop_duration_s)"},
        ),
    ),
)
