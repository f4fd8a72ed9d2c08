"""Who uses it? The shares and quotas of tenants."""

from serve_app.monitoring.panel import Panel, Row
from serve_app.monitoring.promql import MODEL, latest, rate

ROW = Row(
    600,
    "Who uses it?",
    (
        Panel(
            601,
            "Queue time by tenant",
            "Mean of admitted requests. If only one tenant waits, it asks for more than its "
            "share, or is starved.",
            "s",
            {
                "{{model}} {{tenant}}": latest(
                    "max",
                    "tenant:serve_app_tenant_queue_seconds:ratio_rate5m",
                    "model, tenant",
                    MODEL,
                )
            },
        ),
        Panel(
            602,
            "Quotas used",
            "Of a day or a month, for the tenants that are nearest to their quota.",
            "percentunit",
            {
                "{{tenant}}, {{limit}}": latest(
                    "max", "ray_serve_app_quota_used_ratio", "tenant, limit"
                )
            },
            marks=(0.9, 1.0),
        ),
        Panel(
            603,
            "GPUs by tenant",
            "Seconds of GPUs in which the tenant's sequences ran, per second.",
            "short",
            {"{{tenant}}": rate("ray_serve_app_gpu_seconds_total", "tenant")},
            stacked=True,
        ),
        Panel(
            604,
            "Requests refused by limit",
            "429 or 402: the tenant has reached a limit.",
            "reqps",
            {"{{limit}}": rate("ray_serve_app_quota_refusals_total", "limit", "")},
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
