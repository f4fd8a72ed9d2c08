"""serveConfigV2: a text to Kubernetes, which does not look inside, and what Ray Serve reads in it.

The keys are those of ray.serve.schema (Ray 2.60); a test holds them against the installed Ray. Ray
Serve ignores a key that it does not know, but for `logging_config`, and goes on with its default.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kuberay.lines import PARSER, at
from kuberay.rayservice import Path, Service
from kuberay.rules.finding import ERROR, WARNING, Finding, rule
from serve_app.errors import nearest

Keys = tuple[str, ...]
_CONFIG: Keys = (
    "proxy_location", "http_options", "grpc_options", "logging_config", "applications",
    "controller_options", "target_capacity", "tracing_config",
)  # fmt: skip
_HTTP: Keys = (
    "host", "port", "root_path", "request_timeout_s", "keep_alive_timeout_s", "ssl_keyfile",
    "ssl_certfile", "ssl_ca_certs", "ssl_keyfile_password",
)  # fmt: skip
_LOGGING: Keys = (
    "encoding", "log_level", "logs_dir", "enable_access_log", "additional_log_standard_attrs",
)  # fmt: skip
_APPLICATION: Keys = (
    "name", "route_prefix", "import_path", "runtime_env", "args", "deployments", "logging_config",
    "autoscaling_policy", "external_scaler_enabled", "host", "port",
)  # fmt: skip
_DEPLOYMENT: Keys = (
    "name", "num_replicas", "max_ongoing_requests", "max_queued_requests", "user_config",
    "autoscaling_config", "graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s",
    "health_check_period_s", "health_check_timeout_s", "ray_actor_options",
    "placement_group_bundles", "placement_group_strategy", "placement_group_bundle_label_selector",
    "max_replicas_per_node", "logging_config", "request_router_config", "backpressure_config",
    "deployment_actors", "gang_scheduling_config", "max_surge_percent",
    "rolling_update_percentage",
)  # fmt: skip
_ACTOR: Keys = (
    "num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "runtime_env",
    "label_selector", "fallback_strategy",
)  # fmt: skip
_SCALING: Keys = (
    "min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests",
    "metrics_interval_s", "look_back_period_s", "smoothing_factor", "upscale_smoothing_factor",
    "downscale_smoothing_factor", "upscaling_factor", "downscaling_factor", "upscale_delay_s",
    "downscale_delay_s", "downscale_to_zero_delay_s", "aggregation_function", "policy",
)  # fmt: skip
# Where a key belongs that is written elsewhere.
_PLACES: Mapping[str, Keys] = {
    "a deployment": _DEPLOYMENT,
    "ray_actor_options": _ACTOR,
    "autoscaling_config": _SCALING,
    "an application": _APPLICATION,
    "http_options": _HTTP,
}
# Names of before, which Ray Serve no longer reads.
_RENAMED = {
    "target_num_ongoing_requests_per_replica": "target_ongoing_requests",
    "max_concurrent_queries": "max_ongoing_requests",
}


@rule("serve-config")
def _serve_config(service: Service) -> Iterator[Finding]:
    line = service.line("spec", "serveConfigV2")
    text = service.spec.get("serveConfigV2")
    if not text:
        yield _error(line, "there is no serveConfigV2: nothing is served",
                     "applications: with at least one")  # fmt: skip
    elif not isinstance(text, str):
        yield _error(line, "serveConfigV2 must be text, and the API server refuses a mapping",
                     "serveConfigV2: |, with the same lines below it")  # fmt: skip
    else:
        yield from _text(service, text, line)


def _error(line: int, problem: str, mend: str) -> Finding:
    return Finding("serve-config", ERROR, line, problem, mend)


def _text(service: Service, text: str, line: int) -> Iterator[Finding]:
    try:
        parsed = yaml.load(str(text), PARSER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = getattr(text, "first", line) + mark.line if mark is not None else line
        problem = getattr(error, "problem", None) or "not YAML"
        yield _error(where, f"serveConfigV2 is not YAML: {problem}",
                     "it is a text to Kubernetes, which does not look inside")  # fmt: skip
        return
    applications = at(parsed, "applications")
    if not applications or not isinstance(applications, list):
        yield _error(line, "serveConfigV2 has no applications", "applications: with at least one")
        return
    for place, application in enumerate(service.serve.get("applications") or []):
        yield from _application(service, place, application)
    yield from _unique(service, applications)


def _application(service: Service, place: int, application: Any) -> Iterator[Finding]:
    path: Path = ("applications", place)
    if not isinstance(application, dict):
        yield _error(service.serve_line(*path), "an application must be a mapping", "name: ...")
        return
    for key in ("host", "port"):
        if key in application:
            problem = f"Ray Serve refuses {key} in an application"
            yield _error(service.serve_line(*path, key), problem, f"http_options: {{{key}: ...}}")
    given = str(application.get("import_path") or "")
    if not _importable(given):
        yield _error(service.serve_line(*path, "import_path"),
                     f"the import_path {given or '(none)'} names no module and attribute",
                     "import_path: package.module:application")  # fmt: skip
    prefix = application.get("route_prefix")
    if isinstance(prefix, str) and not prefix.startswith("/"):
        problem = f"Ray Serve refuses the route_prefix {prefix}"
        yield _error(service.serve_line(*path, "route_prefix"), problem, f"route_prefix: /{prefix}")


def _importable(path: str) -> bool:
    separator = ":" if ":" in path else "."
    if separator == ":" and path.count(":") > 1:
        return False
    return separator in path and not path.startswith(separator) and not path.endswith(separator)


def _unique(service: Service, applications: list[Any]) -> Iterator[Finding]:
    for key, default in (("name", "default"), ("route_prefix", "/")):
        seen: set[str] = set()
        for place, application in enumerate(applications):
            given = at(application, key)
            if given is None and key == "route_prefix" and key in (application or {}):
                continue  # Not served over HTTP, on purpose.
            given = str(given or default)
            if given in seen:
                yield _error(service.serve_line("applications", place, key),
                             f"two applications have the {key} {given}: Ray Serve refuses both",
                             f"another {key}")  # fmt: skip
            seen.add(given)


# --- keys ------------------------------------------------------------------------------------


@rule("unknown-key")
def _unknown_keys(service: Service) -> Iterator[Finding]:
    serve = service.serve
    yield from _unknown(service, (), serve, _CONFIG)
    for key, keys in (("http_options", _HTTP), ("logging_config", _LOGGING)):
        yield from _unknown(service, (key,), serve.get(key), keys)
    for place, application in enumerate(serve.get("applications") or []):
        path: Path = ("applications", place)
        yield from _unknown(service, path, application, _APPLICATION)
        logging = at(application, "logging_config")
        yield from _unknown(service, (*path, "logging_config"), logging, _LOGGING)
    for path, deployment in service.deployments():
        yield from _unknown(service, path, deployment, _DEPLOYMENT)
        for key, keys in (
            ("ray_actor_options", _ACTOR),
            ("autoscaling_config", _SCALING),
            ("logging_config", _LOGGING),
        ):
            yield from _unknown(service, (*path, key), deployment.get(key), keys)


def _unknown(service: Service, path: Path, mapping: Any, keys: Keys) -> Iterator[Finding]:
    if not isinstance(mapping, dict):
        return
    refused = keys is _LOGGING
    does = "refuses" if refused else "ignores"
    for key in mapping:
        if key not in keys:
            severity, hint, mend = _meant(str(key), keys)
            yield Finding(
                "unknown-key", ERROR if refused else severity, service.serve_line(*path, str(key)),
                f"Ray Serve {does} the key {key}{hint}", mend,
            )  # fmt: skip


def _meant(key: str, keys: Keys) -> tuple[str, str, str]:
    """How severe an unknown key is, what it may mean, and the mend."""
    if key in _RENAMED:
        return WARNING, f", which is now called {_RENAMED[key]}", f"{_RENAMED[key]}: ..."
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in key).replace("-", "_")
    place = next((place for place, own in _PLACES.items() if snake in own), None)
    if snake not in keys and place is not None:
        return ERROR, f": it belongs in {place}", f"move {snake} into {place}"
    near = snake if snake in keys else (nearest(snake, keys) or "").strip("'")
    if near:
        return ERROR, f": did you mean '{near}'?", f"{near}: ..."
    return WARNING, "", "remove it, or see that your Ray knows it"


# --- replicas --------------------------------------------------------------------------------


@rule("replica-bounds")
def _replica_bounds(service: Service) -> Iterator[Finding]:
    for path, deployment in service.deployments():
        yield from _bounds(service, path, deployment)
    for path, scaling in service.llm_scaling():
        yield from _autoscaling(service, path, scaling)


def _bounds(service: Service, path: Path, deployment: Mapping[str, Any]) -> Iterator[Finding]:
    scaling, fixed = deployment.get("autoscaling_config"), deployment.get("num_replicas")
    if isinstance(fixed, int) and scaling is not None:
        yield _bad(service, (*path, "num_replicas"),
                   f"num_replicas {fixed} beside autoscaling_config: Ray Serve refuses the two",
                   "remove num_replicas, or set it to auto")  # fmt: skip
    if isinstance(fixed, str) and fixed != "auto":
        problem = f"num_replicas {fixed!r}: Ray Serve takes a number or auto"
        yield _bad(service, (*path, "num_replicas"), problem, "a number")
    if isinstance(fixed, int) and fixed < 0:
        yield _bad(service, (*path, "num_replicas"), f"num_replicas {fixed}", "0 or more")
    queued = deployment.get("max_queued_requests")
    if isinstance(queued, int) and queued < 1 and queued != -1:
        problem = f"max_queued_requests {queued}: Ray Serve refuses it"
        yield _bad(service, (*path, "max_queued_requests"), problem, "-1, or 1 and more")
    if deployment.get("max_replicas_per_node") and deployment.get("placement_group_bundles"):
        problem = "max_replicas_per_node beside placement_group_bundles: Ray Serve refuses the two"
        yield _bad(service, (*path, "max_replicas_per_node"), problem, "use one")
    if scaling is not None:
        yield from _autoscaling(service, (*path, "autoscaling_config"), scaling)


def _autoscaling(service: Service, path: Path, scaling: Any) -> Iterator[Finding]:
    """Bounds of an autoscaling_config, with Ray Serve's own where it names none."""
    if not isinstance(scaling, dict):
        return
    # With num_replicas: auto, and in ray.serve.llm, Serve's own maximum is 100.
    maximum = scaling.get("max_replicas")
    minimum, first = scaling.get("min_replicas", 1), scaling.get("initial_replicas")
    for key, given in (
        ("min_replicas", minimum),
        ("max_replicas", maximum),
        ("initial_replicas", first),
    ):
        if given is not None and (not isinstance(given, int) or given < (key == "max_replicas")):
            bound = "1 or more" if key == "max_replicas" else "0 or more"
            yield _bad(service, (*path, key), f"{key} {given}: Ray Serve refuses it", bound)
            return
    if maximum is not None and minimum > maximum:
        yield _bad(service, (*path, "min_replicas"),
                   f"min_replicas {minimum} above max_replicas {maximum}: Ray Serve refuses it",
                   f"max_replicas: {minimum}, or fewer at least")  # fmt: skip
    elif first is not None and (first < minimum or (maximum is not None and first > maximum)):
        yield _bad(service, (*path, "initial_replicas"),
                   f"initial_replicas {first} is not between min_replicas {minimum} and "
                   f"max_replicas {maximum}: Ray Serve refuses it", "between the two")  # fmt: skip


def _bad(service: Service, path: Path, problem: str, mend: str) -> Finding:
    return Finding("replica-bounds", ERROR, service.serve_line(*path), problem, mend)
