"""The keys that Ray Serve reads in serveConfigV2, and what each may hold.

Those of ray.serve.schema (Ray 2.60); a test holds them against the installed Ray. What a key may
hold is `any`, `text`, `mapping`, `list`, `number` or `integer`, the last two with bounds where
there are some: `integer>0`, `number>=0<=100`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, str]

CONFIG: Fields = {
    "proxy_location": "any", "http_options": "mapping", "grpc_options": "mapping",
    "logging_config": "mapping", "applications": "list", "controller_options": "mapping",
    "target_capacity": "number>=0<=100", "tracing_config": "mapping",
}  # fmt: skip
HTTP: Fields = {
    "host": "text", "port": "integer", "root_path": "text", "request_timeout_s": "number",
    "keep_alive_timeout_s": "integer", "ssl_keyfile": "text", "ssl_certfile": "text",
    "ssl_ca_certs": "text", "ssl_keyfile_password": "text",
}  # fmt: skip
GRPC: Fields = {
    "port": "integer", "grpc_servicer_functions": "list", "request_timeout_s": "number",
    "enable_reflection": "any",
}  # fmt: skip
LOGGING: Fields = {
    "encoding": "any", "log_level": "any", "logs_dir": "text", "enable_access_log": "any",
    "additional_log_standard_attrs": "list",
}  # fmt: skip
APPLICATION: Fields = {
    "name": "text", "route_prefix": "text", "import_path": "text", "runtime_env": "mapping",
    "args": "mapping", "deployments": "list", "logging_config": "mapping",
    "autoscaling_policy": "mapping", "external_scaler_enabled": "any", "host": "text",
    "port": "integer",
}  # fmt: skip
DEPLOYMENT: Fields = {
    "name": "text", "num_replicas": "any", "max_ongoing_requests": "integer>0",
    "max_queued_requests": "integer", "user_config": "mapping", "autoscaling_config": "mapping",
    "graceful_shutdown_wait_loop_s": "number>=0", "graceful_shutdown_timeout_s": "number>=0",
    "health_check_period_s": "number>0", "health_check_timeout_s": "number>0",
    "ray_actor_options": "mapping", "placement_group_bundles": "list",
    "placement_group_strategy": "text", "placement_group_bundle_label_selector": "list",
    "max_replicas_per_node": "integer>0<=100", "logging_config": "mapping",
    "request_router_config": "mapping", "backpressure_config": "mapping",
    "deployment_actors": "list", "gang_scheduling_config": "mapping",
    "max_surge_percent": "integer>=0<=100", "rolling_update_percentage": "number>0<=1",
}  # fmt: skip
ACTOR: Fields = {
    "num_cpus": "number>=0", "num_gpus": "number>=0", "memory": "number>=0",
    "resources": "mapping", "accelerator_type": "text", "runtime_env": "mapping",
    "label_selector": "mapping", "fallback_strategy": "list",
}  # fmt: skip
SCALING: Fields = {
    "min_replicas": "any", "initial_replicas": "any", "max_replicas": "any",
    "target_ongoing_requests": "number>0", "metrics_interval_s": "number>0",
    "look_back_period_s": "number>0", "smoothing_factor": "number>0",
    "upscale_smoothing_factor": "number>0", "downscale_smoothing_factor": "number>0",
    "upscaling_factor": "number>0", "downscaling_factor": "number>0",
    "upscale_delay_s": "number>=0", "downscale_delay_s": "number>=0",
    "downscale_to_zero_delay_s": "number>=0", "aggregation_function": "text", "policy": "mapping",
}  # fmt: skip

_TYPES: Mapping[str, type] = {"text": str, "mapping": dict, "list": list}


def wanted(field: str, value: Any) -> str:
    """What a field must hold, where this value is not that; empty where it is, or is null."""
    match = re.fullmatch(r"(\w+?)(?:(>=?)0)?(?:<=(\d+))?", field)
    assert match is not None, field
    kind, bound, most = match.groups()
    if value is None or kind == "any":
        return ""
    if kind in _TYPES:
        return "" if isinstance(value, _TYPES[kind]) else f"must be a {kind}"
    number = _number(value)
    if number is None or (kind == "integer" and not number.is_integer()):
        return f"must be {'an integer' if kind == 'integer' else 'a number'}"
    if (bound == ">" and number <= 0) or (bound == ">=" and number < 0):
        return f"must be {'above 0' if bound == '>' else '0 or more'}"
    return f"must be {most} or less" if most and number > int(most) else ""


def _number(value: Any) -> float | None:
    """A number, also as text: Ray reads both."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
