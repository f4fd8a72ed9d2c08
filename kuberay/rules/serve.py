"""serveConfigV2: a text to Kubernetes, which does not look inside, and what Ray Serve reads in it.

The keys and their values are in fields.py. Ray Serve ignores a key that it does not know, but for
`logging_config`, and goes on with its default. A value that it refuses keeps the application from
being deployed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from kuberay.lines import PARSER, at
from kuberay.rayservice import Path, Service
from kuberay.rules import fields
from kuberay.rules.fields import Fields
from kuberay.rules.finding import ERROR, WARNING, Finding, rule
from serve_app.errors import nearest

# Where a key belongs that is written elsewhere.
_PLACES: Mapping[str, Fields] = {
    "a deployment": fields.DEPLOYMENT,
    "ray_actor_options": fields.ACTOR,
    "autoscaling_config": fields.SCALING,
    "an application": fields.APPLICATION,
    "http_options": fields.HTTP,
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


# --- keys and values -------------------------------------------------------------------------


def _mappings(service: Service) -> Iterator[tuple[Path, Any, Fields]]:
    """Every mapping that Ray Serve reads, with its path and its keys."""
    serve = service.serve
    yield (), serve, fields.CONFIG
    yield ("http_options",), serve.get("http_options"), fields.HTTP
    yield ("grpc_options",), serve.get("grpc_options"), fields.GRPC
    yield ("logging_config",), serve.get("logging_config"), fields.LOGGING
    for place, application in enumerate(serve.get("applications") or []):
        path: Path = ("applications", place)
        yield path, application, fields.APPLICATION
        yield (*path, "logging_config"), at(application, "logging_config"), fields.LOGGING
    for path, deployment in service.deployments():
        yield path, deployment, fields.DEPLOYMENT
        for key, keys in (
            ("ray_actor_options", fields.ACTOR),
            ("autoscaling_config", fields.SCALING),
            ("logging_config", fields.LOGGING),
        ):
            yield (*path, key), deployment.get(key), keys


@rule("serve-value")
def _values(service: Service) -> Iterator[Finding]:
    """What Ray Serve refuses when the operator submits the configuration."""
    for path, mapping, keys in _mappings(service):
        if not isinstance(mapping, dict):
            continue
        for key, value in mapping.items():
            if wanted := fields.wanted(keys.get(key, "any"), value):
                yield _refused(service, (*path, key), f"{key} {value!r}", wanted)
        if keys is fields.LOGGING:
            yield from _words(service, path, mapping, _LOG_WORDS)
        if keys is fields.CONFIG:
            yield from _words(service, path, mapping, _PROXY_WORDS)
        if keys is fields.DEPLOYMENT and not mapping.get("name"):
            yield _refused(service, path, "a deployment without a name", "needs a name")
        if keys is fields.APPLICATION and mapping.get("name", "default") in ("", None):
            yield _refused(service, (*path, "name"), "an empty name", "needs a name, or none")
        yield from _addresses(service, (*path, "runtime_env"), mapping.get("runtime_env"))


_PROXY_WORDS = {"proxy_location": ("EveryNode", "HeadOnly", "Disabled")}
_LOG_WORDS = {
    "encoding": ("TEXT", "JSON"),
    "log_level": ("CRITICAL", "FATAL", "ERROR", "WARN", "WARNING", "INFO", "DEBUG", "NOTSET"),
}


def _words(
    service: Service, path: Path, mapping: Mapping[str, Any], words: Mapping[str, tuple[str, ...]]
) -> Iterator[Finding]:
    """Texts that are none of those that Ray Serve knows."""
    for key, known in words.items():
        value = mapping.get(key)
        names = known if key == "proxy_location" else (*known, *map(str.lower, known))
        if isinstance(value, str) and value not in names:
            problem = f"{key} {value!r}"
            yield _refused(service, (*path, key), problem, f"must be one of {', '.join(known)}")


def _addresses(service: Service, path: Path, environment: Any) -> Iterator[Finding]:
    """Folders of whoever wrote the manifest: the cluster fetches code by an address."""
    if not isinstance(environment, dict):
        return
    for key in ("working_dir", "py_modules"):
        given = environment.get(key)
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and "://" not in value:
                yield _refused(service, (*path, key), f"{key} {value!r}", "must be an address, "
                               "such as https://... or s3://... of a zip file")  # fmt: skip


def _refused(service: Service, path: Path, problem: str, wanted: str) -> Finding:
    return Finding("serve-value", ERROR, service.serve_line(*path),
                   f"Ray Serve refuses {problem}", wanted)  # fmt: skip


@rule("unknown-key")
def _unknown_keys(service: Service) -> Iterator[Finding]:
    for path, mapping, keys in _mappings(service):
        yield from _unknown(service, path, mapping, keys)


def _unknown(service: Service, path: Path, mapping: Any, keys: Fields) -> Iterator[Finding]:
    if not isinstance(mapping, dict):
        return
    refused = keys is fields.LOGGING
    does = "refuses" if refused else "ignores"
    for key in mapping:
        if key not in keys:
            severity, hint, mend = _meant(str(key), keys)
            yield Finding(
                "unknown-key", ERROR if refused else severity, service.serve_line(*path, str(key)),
                f"Ray Serve {does} the key {key}{hint}", mend,
            )  # fmt: skip


def _meant(key: str, keys: Fields) -> tuple[str, str, str]:
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
    if isinstance(fixed, int | float) and (fixed < 1 or fixed != int(fixed)):
        problem = f"num_replicas {fixed}: Ray Serve refuses it"
        yield _bad(service, (*path, "num_replicas"), problem, "1 or more")
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
