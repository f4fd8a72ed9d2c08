"""`python runpod/deploy.py up | status | logs | down`: one deployment on Runpod, by its name.

Needs RUNPOD_API_KEY and nothing installed. `up` says what it costs before it creates anything,
makes what is not there, changes what differs, and waits until a real completion came back; a
second `up` with the same words changes nothing. What it cannot bring up it does not leave running.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import fit
import prices
import rest
import teardown
from completion import Hopeless, Question, Target
from deployment import (
    ENDPOINT_TYPES,
    PORT,
    Deployment,
    Refused,
    changes,
    excluded,
    select,
)
from teardown import ENDPOINT, POD, TEMPLATE, VOLUME, Kind, bill, down

KEYS = "API_KEYS"
_GPUS = ("NVIDIA GeForce RTX 4090", "NVIDIA L4")
_PROXY = "https://{pod}-{port}.proxy.runpod.net"
_WAIT_S = 1800.0
# Between two looks: soon at first, then this.
_PERIOD_S = (0.5, 5.0)
# How long a list may take to show what was made unclearly; and how often it is tried.
_LATE_S = 10.0
_CREATIONS = 5
# A pod that was just started may say once more that it is stopped.
_DEAD_LOOKS = 3
# A log stream that has been silent for this long has shown what there is.
_SILENCE_S = 5.0
_FOLLOW_S = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 good, 1 failed or something is left, 2 a word to mend."""
    options = _parser().parse_args(argv)
    key = os.environ.get("RUNPOD_API_KEY")
    if not key:
        print("error: RUNPOD_API_KEY is not set", file=sys.stderr)
        return 2
    client = rest.Client(key, os.environ.get("RUNPOD_API_URL") or rest.URL)
    try:
        return int(options.run(client, options))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except rest.ApiError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python runpod/deploy.py", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="qwen-ray-serve", help="default: %(default)s")
    commands = parser.add_subparsers(required=True)

    up = commands.add_parser("up", parents=[common], help="create or change, and wait for it")
    up.set_defaults(run=_up)
    blank = Deployment(name="")
    modes = [*ENDPOINT_TYPES, "pod"]
    up.add_argument("--mode", choices=modes, default=blank.mode, help="default: %(default)s")
    up.add_argument("--image", required=True, help="the pushed image, with its tag or digest")
    up.add_argument("--model", default="", help="hub id; default: what serve_config.yaml says")
    up.add_argument(
        "--gpu",
        action="append",
        dest="gpus",
        help=f"type or pool, the preferred first; may be repeated; default: {', '.join(_GPUS)}",
    )
    up.add_argument("--gpu-count", type=int, default=1, help="GPUs each; default: %(default)s")
    up.add_argument("--workers-min", type=int, default=blank.workers_min, help="always on")
    up.add_argument("--workers-max", type=int, default=blank.workers_max)
    up.add_argument("--idle-s", type=int, default=blank.idle_s, help="until an idle worker goes")
    up.add_argument("--requests-per-worker", type=int, default=blank.requests_per_worker)
    up.add_argument("--request-timeout-s", type=int, default=blank.request_timeout_s)
    up.add_argument("--disk-gb", type=int, default=blank.disk_gb, help="default: %(default)s")
    up.add_argument("--volume-gb", type=int, default=0, help="0: none; needs --data-center")
    up.add_argument("--data-center", default="", help="such as EU-RO-1")
    up.add_argument("--registry", default="", help="id of a registry credential")
    up.add_argument("--flashboot", choices=["OFF", "FLASHBOOT"], default=blank.flashboot)
    up.add_argument("--cloud", choices=["SECURE", "COMMUNITY"], default=blank.cloud)
    up.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated"
    )
    about = "do not check whether the model fits, as where Runpod caches it on the host"
    up.add_argument("--unchecked", action="store_true", help=about)
    up.add_argument("--yes", action="store_true", help="do not ask whether the cost is right")
    up.add_argument("--no-wait", action="store_true", help="do not wait for a completion")
    up.add_argument("--keep", action="store_true", help="leave a failed start running")
    up.add_argument("--wait-s", type=float, default=_WAIT_S, help="default: %(default)s")

    status = commands.add_parser("status", parents=[common], help="what there is, and its cost")
    status.set_defaults(run=_status)
    status.add_argument("--json", action="store_true", help="print one JSON object")

    logs = commands.add_parser("logs", parents=[common], help="of the pod, or of every worker")
    logs.set_defaults(run=_logs)
    logs.add_argument("--tail", type=int, default=200, help="lines; default: %(default)s")
    logs.add_argument("--follow", action="store_true", help="all of them, until interrupted")

    away = commands.add_parser("down", parents=[common], help="delete all of it, and prove it")
    away.set_defaults(run=_down)
    away.add_argument("--keep-volume", action="store_true", help="it bills on: exit status 1")
    patience_s = teardown.PATIENCE_S
    away.add_argument("--patience-s", type=float, default=patience_s, help="default: %(default)s")
    return parser


# --- up ---------------------------------------------------------------------------------------


def _up(client: rest.Client, options: argparse.Namespace) -> int:
    wanted = _described(options)
    catalog = client.get("/v2/catalog/gpus")["gpus"]
    gpus = select(catalog, wanted.gpus, wanted.serverless)
    if not options.unchecked:
        print(fit.require(wanted, gpus))
    print(f"{wanted.name}: {wanted.mode}, {wanted.image}, {wanted.model or 'the configured model'}")
    for line in wanted.costs(gpus):
        print(f"  {line}")
    print(f"  (GPUs: the catalog's prices now; storage: as of {prices.DATE})")
    _require_room(client, wanted, gpus)
    if not options.yes and not _agreed():
        print("nothing was created")
        return 1
    volume = _volume(client, wanted)
    try:
        if wanted.serverless:
            thing = _endpoint(client, wanted, gpus, catalog, volume)
        else:
            thing = _pod(client, wanted, gpus, volume)
    except (rest.ApiError, Refused):
        if volume is not None:
            print(f"the volume {volume} is there and bills: `down` deletes it")
        raise
    if options.no_wait:
        return 0
    return _wait(client, wanted, thing, options)


def _described(options: argparse.Namespace) -> Deployment:
    env = {}
    for word in options.env:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise Refused(f"--env {word}: must be NAME=VALUE")
        env[name] = value
    if (keys := os.environ.get(KEYS)) and options.mode != "queue":
        env.setdefault(KEYS, keys)
    if options.mode == "pod" and not env.get(KEYS):
        raise Refused(f"a pod's address is public: set {KEYS} to one or more keys first")
    if options.volume_gb and not options.data_center:
        raise Refused("--volume-gb needs --data-center: a volume is in one data center")
    if not options.image:
        raise Refused("--image (make: IMAGE=) must name a pushed image")
    if options.workers_min > options.workers_max:
        raise Refused(f"--workers-min {options.workers_min} is above --workers-max")
    fields = {key: value for key, value in vars(options).items() if key in _FIELDS}
    return Deployment(**{**fields, "env": env, "gpus": tuple(options.gpus or _GPUS)})


_FIELDS = frozenset(Deployment.__dataclass_fields__)


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise Refused("no terminal to ask in: --yes says that the cost is right")
    return input("create it? [y/N] ").strip().lower() in ("y", "yes")


def _require_room(
    client: rest.Client, wanted: Deployment, gpus: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a name that is taken by another mode: both would bill, and one would be forgotten.

    And a pod that would have to become another one: its GPUs and volume are its own for life.
    """
    other = POD if wanted.serverless else ENDPOINT
    if others := other.ours(client, wanted.name):
        raise Refused(f"{wanted.name} is a {other.word} already ({others[0]['id']}): `down` first")
    if wanted.serverless or (pod := _find(client, POD, wanted.name)) is None:
        return
    gpu = pod.get("gpu") or {}
    count, kind = gpu.get("count", 1), gpu.get("id")
    if count != wanted.gpu_count or kind not in {listed_gpu["id"] for listed_gpu in gpus}:
        raise Refused(f"pod {pod['id']} has {count} x {kind}, and keeps them: `down` first")
    if wanted.volume_gb and not (pod["mounts"] or {}).get("network"):
        raise Refused(f"pod {pod['id']} has no volume, and can get none: `down` first")


def _find(client: rest.Client, kind: Kind, name: str) -> dict[str, Any] | None:
    resource = kind.ours(client, name)
    if len(resource) > 1:
        ids = ", ".join(thing["id"] for thing in resource)
        raise Refused(f"there are {len(resource)} of {kind.word} {name} ({ids}): `down` first")
    return resource[0] if resource else None


def _create(client: rest.Client, kind: Kind, body: Mapping[str, Any]) -> dict[str, Any]:
    """Create a thing once: where it is unclear whether it was, its name is looked for first."""
    tries = 0
    while True:
        try:
            thing: dict[str, Any] = client.post(kind.path, body)
            print(f"created {kind.word} {thing['id']}")
            return thing
        except rest.Unclear as error:
            tries += 1
            print(f"unclear: {error}; looking for it")
            if (resource := _appears(client, kind, str(body["name"]))) is not None:
                print(f"created {kind.word} {resource['id']}, as its name says")
                return resource
            if tries >= _CREATIONS:
                raise


def _appears(client: rest.Client, kind: Kind, name: str) -> dict[str, Any] | None:
    """The thing of this name, if a list shows it within a while."""
    deadline_s = time.monotonic() + _LATE_S
    while (resource := _find(client, kind, name)) is None and time.monotonic() < deadline_s:
        time.sleep(1.0)
    return resource


def _change(
    client: rest.Client, kind: Kind, current: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    path = f"{kind.path}/{current['id']}"
    body = changes(current, wanted)
    if not body:
        print(f"{kind.word} {current['id']} is as asked for")
        return dict(current)
    changed: dict[str, Any] = client.patch(path, body)
    print(f"changed {kind.word} {current['id']}: {', '.join(body)}")
    return changed


def _volume(client: rest.Client, wanted: Deployment) -> str | None:
    if not wanted.volume_gb:
        return None
    volume = _find(client, VOLUME, wanted.name)
    if volume is None:
        return str(_create(client, VOLUME, wanted.volume())["id"])
    if volume["dataCenter"] != wanted.data_center:
        raise Refused(f"volume {volume['id']} is in {volume['dataCenter']}, and stays there")
    if volume["size"] < wanted.volume_gb:
        client.patch(f"{VOLUME.path}/{volume['id']}", {"size": wanted.volume_gb})
        print(f"volume {volume['id']} grew to {wanted.volume_gb} GB")
    return str(volume["id"])


def _endpoint(
    client: rest.Client,
    wanted: Deployment,
    gpus: Sequence[Mapping[str, Any]],
    catalog: Sequence[Mapping[str, Any]],
    volume: str | None,
) -> dict[str, Any]:
    body = wanted.endpoint(gpus, volume)
    if others := excluded(catalog, gpus):
        body["gpu"]["excludedTypes"] = others
    current = _find(client, ENDPOINT, wanted.name)
    if current is None:
        return _create(client, ENDPOINT, body)
    if current.get("type") not in (None, body["type"]):
        raise Refused(f"endpoint {current['id']} is of type {current['type']}: `down` first")
    return _change(client, ENDPOINT, current, body)


def _pod(
    client: rest.Client,
    wanted: Deployment,
    gpus: Sequence[Mapping[str, Any]],
    volume: str | None,
) -> dict[str, Any]:
    current = _find(client, POD, wanted.name)
    if current is not None:
        pod = _change(client, POD, current, wanted.container())
        if pod["status"] in ("EXITED", "ERROR"):
            print(f"starting pod {pod['id']}")
            pod = client.post(f"{POD.path}/{pod['id']}/action", {"action": "start"}) or pod
        return pod
    refusal: rest.ApiError | None = None
    for gpu in gpus:
        try:
            return _create(client, POD, wanted.pod(gpu, volume))
        except rest.ApiError as error:
            # No capacity is a 400 like any other: the next type may have it.
            if error.status not in (400, 403):
                raise
            print(f"not on {gpu['name']}: {error.detail}")
            refusal = error
    assert refusal is not None
    raise refusal


# --- waiting ------------------------------------------------------------------------------------

_DEAD = ("is ERROR", "is EXITED", "is TERMINATED")


def _target(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> Target | None:
    """Where to ask; None while it has no address."""
    account = os.environ["RUNPOD_API_KEY"]
    keys = wanted.environment().get(KEYS, "").split(",")
    # A secret's reference is not the key: then only its owner can ask.
    api_key = os.environ.get(KEYS, "").split(",")[0].strip() or keys[0].strip() or None
    if wanted.mode == "pod":
        proxy = os.environ.get("RUNPOD_PROXY_URL") or _PROXY
        return Target(proxy.format(pod=thing["id"], port=PORT), api_key=api_key)
    urls = thing.get("requestUrls") or client.get(f"{ENDPOINT.path}/{thing['id']}").get(
        "requestUrls"
    )
    if not urls:
        return None
    if wanted.mode == "queue":
        return Target(urls["run"], urls["status"], urls["cancel"], account)
    return Target(urls["base"], runpod_key=account, api_key=api_key)


def _wait(
    client: rest.Client,
    wanted: Deployment,
    thing: Mapping[str, Any],
    options: argparse.Namespace,
) -> int:
    """Until a completion came back, or none will. Returns the exit status."""
    began_s, shown, question, dead = time.monotonic(), "", None, 0
    period_s, longest_s = _PERIOD_S
    problem = f"no completion within {options.wait_s:g} s"
    try:
        while time.monotonic() - began_s < options.wait_s:
            state = _state(client, wanted, thing)
            dead = dead + 1 if state.endswith(_DEAD) else 0
            if dead >= _DEAD_LOOKS:
                raise Hopeless(f"the {state}")
            if state != shown:
                shown = state
                print(f"{time.monotonic() - began_s:5.0f} s  {state}", flush=True)
            if question is None and (target := _target(client, wanted, thing)) is not None:
                question = Question(target)
            if question is not None and (text := question.ask()) is not None:
                print(f"up after {time.monotonic() - began_s:.0f} s; it says: {text.strip()!r}")
                _how_to_ask(wanted, question)
                return 0
            time.sleep(period_s)
            period_s = min(1.5 * period_s, longest_s)
    except (Hopeless, rest.ApiError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    if question is not None:
        question.withdraw()
    print(f"failed: {problem}", file=sys.stderr)
    _last_words(client, wanted, thing)
    if not options.keep:
        _quiet(client, wanted, thing)
    return 1


def _state(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> str:
    """Where it stands, as one line."""
    try:
        if wanted.mode == "pod":
            status = client.get(f"{POD.path}/{thing['id']}")["status"]
            return f"pod is {status}"
        summary = client.get(f"{ENDPOINT.path}/{thing['id']}/workers")["summary"]
    except rest.ApiError as error:
        if error.status in (401, 403, 404):
            raise Hopeless(str(error)) from None
        return str(error)
    counts = [f"{summary[word]} {word}" for word in summary if word != "total" and summary[word]]
    state = "workers: " + (", ".join(counts) or "none yet")
    if summary["throttled"] and summary["throttled"] == summary["total"]:
        state += " (no capacity: more --gpu or no --data-center finds more)"
    return state


def _last_words(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> None:
    """The end of the logs, which are gone once the workers are."""
    for path, who in _log_paths(client, wanted.name):
        try:
            for event in client.events(path, _SILENCE_S, tail="30"):
                print(f"[{who}] {event.get('line', '')}")
        except rest.ApiError as error:
            print(f"[{who}] no logs: {error}")


def _quiet(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> None:
    """Let nothing bill that does not serve; `up` with a mended image brings it back."""
    try:
        if wanted.mode == "pod":
            client.post(f"{POD.path}/{thing['id']}/action", {"action": "stop"})
            print("the pod is stopped; `down` deletes it")
        else:
            path = f"{ENDPOINT.path}/{thing['id']}"
            client.patch(path, {"workers": {"min": 0, "max": 0}})
            print("the endpoint's workers are taken away; `down` deletes it")
    except rest.ApiError as error:
        print(f"it may bill on: {error}", file=sys.stderr)


def _how_to_ask(wanted: Deployment, question: Question) -> None:
    """The same question for a shell in which the keys are where they are now."""
    target = question.target
    url, headers = target.url.rstrip("/"), ['"Authorization: Bearer $RUNPOD_API_KEY"']
    ours = "${API_KEYS%%,*}"  # The first of them.
    if wanted.mode == "pod":
        headers = [f'"Authorization: Bearer {ours}"']
    elif wanted.mode == "queue":
        url = url.removesuffix("/run") + "/openai"
    elif target.api_key:
        headers.append(f'"x-api-key: {ours}"')
    body = {"model": question.model, "messages": [{"role": "user", "content": "Hello"}]}
    words = "".join(f" -H {header}" for header in headers)
    print(f"curl {url}/v1/chat/completions{words} \\")
    print(f"  -H 'content-type: application/json' -d '{json.dumps(body)}'")


# --- status, logs, down ---------------------------------------------------------------------------


def _status(client: rest.Client, options: argparse.Namespace) -> int:
    listed: dict[str, list[dict[str, Any]]] = {}
    hourly: dict[str, float] = {}
    for kind in (ENDPOINT, POD, TEMPLATE, VOLUME):
        listed[kind.word] = kind.ours(client, options.name)
        for thing in listed[kind.word]:
            if kind is ENDPOINT:
                thing["active"] = client.get(f"{kind.path}/{thing['id']}/workers")
                hourly = hourly or _hourly(client)
            thing["bills"] = bill(kind, thing, hourly)
            thing.pop("env", None)  # It may hold keys.
    if options.json:
        print(json.dumps(listed))
        return 0 if any(listed.values()) else 1
    for word, things in listed.items():
        for thing in things:
            print(f"{word} {thing['id']} ({thing['name']}): {_condition(thing)}")
    if not any(listed.values()):
        print(f"nothing is called {options.name}")
        return 1
    return 0


def _hourly(client: rest.Client) -> dict[str, float]:
    """What a GPU of each type costs in a worker, by the catalog."""
    gpus = client.get("/v2/catalog/gpus")["gpus"]
    each = ((gpu["id"], prices.serverless_per_hour(gpu)) for gpu in gpus)
    return {number: price for number, price in each if price is not None}


def _condition(thing: Mapping[str, Any]) -> str:
    words = [str(thing["status"])] if "status" in thing else []
    if "active" in thing:
        summary = thing["active"]["summary"]
        counts = [f"{summary[word]} {word}" for word in summary if summary[word]]
        words.append("workers: " + (", ".join(counts) or "none"))
        words += [f"{worker['id']} {worker['status']}" for worker in thing["active"]["workers"]]
    return "; ".join([*words, thing["bills"] or "bills nothing by itself"])


def _log_paths(client: rest.Client, name: str) -> list[tuple[str, str]]:
    """The log streams of a deployment, each with who speaks."""
    paths = [(f"{POD.path}/{pod['id']}/logs", pod["id"]) for pod in POD.ours(client, name)]
    for endpoint in ENDPOINT.ours(client, name):
        path = f"{ENDPOINT.path}/{endpoint['id']}/workers"
        for worker in client.get(path)["workers"]:
            paths.append((f"{path}/{worker['id']}/logs", worker["id"]))
    return paths


def _logs(client: rest.Client, options: argparse.Namespace) -> int:
    paths = _log_paths(client, options.name)
    if not paths:
        print(f"{options.name} has no pod and no active worker", file=sys.stderr)
        return 1
    if not options.follow:
        return 0 if all([_show(client, *path, options) for path in paths]) else 1
    threads = [
        threading.Thread(target=_show, args=(client, *path, options), daemon=True) for path in paths
    ]
    with contextlib.suppress(KeyboardInterrupt):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return 0


def _show(client: rest.Client, path: str, who: str, options: argparse.Namespace) -> bool:
    """One stream to its end. Whether there was one: a worker may go while others speak."""
    silence_s = _FOLLOW_S if options.follow else _SILENCE_S
    try:
        for event in client.events(path, silence_s, tail=str(options.tail)):
            # In one piece: print writes the end of a line apart, and others speak in between.
            sys.stdout.write(f"[{who}] {event.get('line', '')}\n")
            sys.stdout.flush()
    except rest.ApiError as error:
        print(f"[{who}] no logs: {error}", file=sys.stderr)
        return False
    return True


def _down(client: rest.Client, options: argparse.Namespace) -> int:
    gone = down(client, options.name, options.keep_volume, patience_s=options.patience_s)
    return 0 if gone else 1


if __name__ == "__main__":
    sys.exit(main())
