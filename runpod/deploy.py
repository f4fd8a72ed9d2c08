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
from collections.abc import Mapping, Sequence
from typing import Any

import fit
import prices
import readiness
import resources
import rest
import teardown
from deployment import ENDPOINT_TYPES, Deployment, Refused, select
from readiness import KEYS
from teardown import ENDPOINT, POD, TEMPLATE, VOLUME, bill, down

_GPUS = ("NVIDIA GeForce RTX 4090", "NVIDIA L4")
_WAIT_S = 1800.0
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
    up.add_argument("--model", default="", help="hub id; default: the model of serve_config.yaml")
    up.add_argument(
        "--gpu",
        action="append",
        dest="gpus",
        help=f"type or pool, the preferred first; may be repeated; default: {', '.join(_GPUS)}",
    )
    up.add_argument("--gpu-count", type=int, default=1, help="GPUs each; default: %(default)s")
    up.add_argument(
        "--workers-min", type=int, default=blank.workers_min, help="workers that always run"
    )
    up.add_argument("--workers-max", type=int, default=blank.workers_max)
    up.add_argument(
        "--idle-s", type=int, default=blank.idle_s, help="seconds until an idle worker ends"
    )
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
    up.add_argument("--yes", action="store_true", help="do not ask for consent to the cost")
    up.add_argument("--no-wait", action="store_true", help="do not wait for a completion")
    up.add_argument("--keep", action="store_true", help="leave a failed start running")
    up.add_argument("--wait-s", type=float, default=_WAIT_S, help="default: %(default)s")

    status = commands.add_parser("status", parents=[common], help="show what exists, and its cost")
    status.set_defaults(run=_status)
    status.add_argument("--json", action="store_true", help="print one JSON object")

    logs = commands.add_parser(
        "logs", parents=[common], help="show the logs of the pod, or of every worker"
    )
    logs.set_defaults(run=_logs)
    logs.add_argument("--tail", type=int, default=200, help="lines; default: %(default)s")
    logs.add_argument("--follow", action="store_true", help="keep printing until interrupted")

    away = commands.add_parser("down", parents=[common], help="delete everything, and verify it")
    away.set_defaults(run=_down)
    away.add_argument(
        "--keep-volume", action="store_true", help="the volume costs money: exit status 1"
    )
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
    volume = resources.volume(client, wanted)
    try:
        if wanted.serverless:
            thing = resources.endpoint(client, wanted, gpus, catalog, volume)
        else:
            thing = resources.pod(client, wanted, gpus, volume)
    except (rest.ApiError, Refused):
        if volume is not None:
            print(f"the volume {volume} is there and bills: `down` deletes it")
        raise
    if options.no_wait:
        return 0
    return readiness.wait(client, wanted, thing, options)


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
    if wanted.serverless or (pod := resources.find(client, POD, wanted.name)) is None:
        return
    gpu = pod.get("gpu") or {}
    count, kind = gpu.get("count", 1), gpu.get("id")
    if count != wanted.gpu_count or kind not in {listed_gpu["id"] for listed_gpu in gpus}:
        raise Refused(f"pod {pod['id']} has {count} x {kind}, and keeps them: `down` first")
    if wanted.volume_gb and not (pod["mounts"] or {}).get("network"):
        raise Refused(f"pod {pod['id']} has no volume, and can get none: `down` first")


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


def _logs(client: rest.Client, options: argparse.Namespace) -> int:
    paths = readiness.log_paths(client, options.name)
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
    silence_s = _FOLLOW_S if options.follow else readiness.SILENCE_S
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
