"""`python -m kuberay up`: from nothing to an answer of the model.

    preflight     stops here where a check fails
    cost          shown, and confirmed
    cluster       by eksctl, from cluster.yaml, tagged with its end
    plugin        the NVIDIA device plugin
    operator      KubeRay: its CRDs first, which helm installs and never upgrades
    secrets       API keys and what else the manifests name, from the environment or made up
    manifests     the overlay
    monitoring    with --monitoring: Prometheus and Grafana, our alert rules and dashboard
    answer        waited for, until a completion came back through a port of this machine

Each step is done again without harm: a run that was interrupted is simply run again.
"""

import argparse
import contextlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from kuberay import cluster, console, layout, render, secret, target, ttl
from kuberay.console import say, step
from kuberay.errors import EksError, ToolError
from kuberay.layout import Service
from kuberay.preflight import Choice, deployed, preflight
from kuberay.releases import install_monitoring, install_operator, install_plugin
from kuberay.status import Served, served
from kuberay.target import Target
from kuberay.tools import Tools, tools
from kuberay.ttl import Ttl

_POLL_S = 10.0
# From apply to an answer: a GPU node (5 min), a 15 GB image (5 min), weights (1 to 15 min).
_WAIT_S = 3600.0


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 the model answered, 1 a check failed, 2 anything else."""
    to = Target.of(options)
    checked = preflight(to, Choice.of(options))
    for line in checked.lines():
        say(line)
    if not checked.good:
        return 1
    now = datetime.now(UTC)
    limit = Ttl.starting(now, options.ttl_hours, options.on_expiry) if options.ttl_hours else Ttl()
    say(f"the cluster's hours: {limit.describe(now)}")
    usd = f"{checked.bill.at_rest:.2f} to {checked.bill.at_most:.2f}" if checked.bill else "?"
    console.confirm(f"This costs {usd} $/hour until `make eks-down`.", to.owner.name, options.yes)
    with tools(to) as run:
        config = cluster.configured(to, limit, checked.config)
        print(up(to, run, config, list(checked.manifests), limit, options.wait, options.monitoring))
    return 0


def up(
    to: Target,
    run: Tools,
    config: dict[str, Any],
    manifests: list[dict[str, Any]],
    limit: Ttl,
    wait_s: float,
    monitoring: bool = False,
) -> str:
    """The whole way. Returns what the model said."""
    service = layout.layout(to.config, manifests).service
    if service is None:
        raise EksError("the overlay has no RayService")
    with step("cluster"):
        cluster.create(to, run, config, limit)
        run.connect()
    with step("plugin"):
        install_plugin(run)
    with step("operator"):
        install_operator(run)
    with step("secrets"):
        apply(run, [manifest for manifest in manifests if manifest["kind"] == "Namespace"])
        key = secret.make(run)
    with step("manifests"):
        apply(run, manifests)
    if monitoring:
        with step("monitoring"):  # After the manifests, which have the storage class.
            install_monitoring(run)
            apply(run, list(render.monitoring()))
    with step("answer"):
        wait_until_ready(run, service, wait_s)
        return complete(run, service, key)


def apply(run: Tools, manifests: list[dict[str, Any]]) -> None:
    # As one JSON List: the order is kept, and nothing is lost on the way through a dialect of YAML.
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    run.kubectl("apply", "--server-side", "--force-conflicts", "--filename", "-", stdin=text)


# --- the service ----------------------------------------------------------------------------


def wait_until_ready(run: Tools, service: Service, wait_s: float) -> None:
    """Until the operator says that requests can be sent; what is still missing is told meanwhile.

    Raises:
        EksError: it took longer than `wait_s`; with what was missing last.
    """
    deadline_s = time.monotonic() + wait_s
    shown = ""
    while True:
        now = missing(run, service)
        if not now:
            return
        if now != shown:
            say(f"    {now}")
            shown = now
        if time.monotonic() > deadline_s:
            raise EksError(f"{service.name} is not ready after {wait_s:.0f} s: {shown}")
        time.sleep(_POLL_S)


def missing(run: Tools, service: Service) -> str:
    """Why the service is not ready yet, in one line; empty once it is."""
    live = next((each for each in served(run) if _same(each, service)), None)
    if live is not None and live.ready:
        return ""
    waits = []
    for pod in run.items("pods"):
        if pod["metadata"]["namespace"] == service.namespace and (why := _waits(pod)):
            waits.append(f"{pod['metadata']['name']}: {why}")
    return "; ".join(sorted(waits)) or (live.message if live else "the RayService is not there")


def _same(live: Served, service: Service) -> bool:
    return (live.name, live.namespace) == (service.name, service.namespace)


def _waits(pod: Mapping[str, Any]) -> str:
    """What a pod waits for: a node, an image, its probes."""
    status = pod.get("status") or {}
    for container in status.get("containerStatuses") or ():
        if waiting := (container.get("state") or {}).get("waiting"):
            return str(waiting.get("reason", "waiting"))
    for condition in status.get("conditions") or ():
        if condition["status"] != "True" and condition["type"] in ("PodScheduled", "Ready"):
            return str(condition.get("message") or condition.get("reason") or condition["type"])
    return ""


def complete(run: Tools, service: Service, key: str | None, tries: int = 30) -> str:
    """One completion, through a port of this machine.

    Raises:
        EksError: no answer came.
    """
    last: Exception = EksError("not asked")
    for _ in range(tries):
        try:
            with forwarded(run, service) as url:
                models = _ask(f"{url}/v1/models", key)
                body = {
                    "model": models["data"][0]["id"],
                    "messages": [{"role": "user", "content": "Say hello in one short sentence."}],
                    "max_tokens": 32,
                }
                answer = _ask(f"{url}/v1/chat/completions", key, body)
                text = str(answer["choices"][0]["message"]["content"]).strip()
                if text:
                    return text
                last = EksError("an empty answer")
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise EksError(f"the service answers {error.code}: {error.reason}") from error
            last = error
        except (OSError, ToolError, KeyError, IndexError, ValueError) as error:
            last = error
        time.sleep(_POLL_S / 5)
    raise EksError(f"{service.name} is ready and does not answer: {last!r}")


def _ask(url: str, key: str | None, body: Mapping[str, Any] | None = None) -> Any:
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return json.loads(answer.read())


@contextlib.contextmanager
def forwarded(run: Tools, service: Service) -> Iterator[str]:
    """The address of the service on this machine, for as long as the block."""
    at = ("--namespace", service.namespace, f"service/{service.name}-serve-svc", ":8000")
    with run.started("kubectl", "port-forward", *at) as process:
        for line in process.stdout or ():
            if match := re.search(r"Forwarding from 127\.0\.0\.1:(\d+)", line):
                yield f"http://127.0.0.1:{match[1]}{service.prefix}"
                return
        raise ToolError(f"kubectl port-forward to {service.name} ended at once")


# --- the command line -------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    target.arguments(parser)
    deployed(parser)
    add = parser.add_argument
    add(
        "--ttl-hours",
        type=ttl.hours,
        default=8.0,
        help="lifetime of the cluster, then `status` fails; 0: unlimited (default: %(default)s)",
    )
    add("--on-expiry", choices=ttl.ACTIONS, default="report",
        help="what `down --if-expired` does after the lifetime; default: %(default)s")  # fmt: skip
    add("--wait", type=float, default=_WAIT_S, help="seconds within which the model must answer")
    add(
        "--monitoring",
        action="store_true",
        help="also install Prometheus and Grafana in the cluster",
    )
    add("--yes", action="store_true", help="do not ask for consent to the cost")
