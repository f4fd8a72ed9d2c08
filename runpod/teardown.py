"""Deletes everything that carries a deployment's name, and proves that it is gone.

The proof is asked of the API after the deletions: every id answers 404, and no list has the name
any more. What still bills is said with its price, and a remainder of ours is exit status 1.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import prices
import rest
from deployment import is_ours

# Workers end before their template can go, and a volume after what mounts it.
PATIENCE_S = 120.0
_PERIOD_S = 3.0


@dataclass(frozen=True)
class Kind:
    """One kind of thing in an account: what it is called, its path, and the key of its list."""

    word: str
    path: str
    key: str

    def all(self, client: rest.Client) -> list[dict[str, Any]]:
        return list(client.get(self.path)[self.key])

    def ours(self, client: rest.Client, name: str) -> list[dict[str, Any]]:
        return [thing for thing in self.all(client) if is_ours(str(thing["name"]), name)]


ENDPOINT = Kind("endpoint", "/v2/serverless", "endpoints")
POD = Kind("pod", "/v2/pods", "pods")
TEMPLATE = Kind("template", "/v2/templates", "templates")
VOLUME = Kind("volume", "/v2/network-volumes", "networkVolumes")
# In the order in which they can go: a template is in use by the first two, a volume mounted.
KINDS = (ENDPOINT, POD, TEMPLATE, VOLUME)


def down(
    client: rest.Client,
    name: str,
    keep_volume: bool = False,
    say: Callable[[str], None] = print,
    patience_s: float = PATIENCE_S,
) -> bool:
    """Delete and prove. Returns whether nothing of ours is left.

    Raises:
        rest.ApiError: the account cannot even be looked at.
    """
    deadline_s = time.monotonic() + patience_s
    deleted: list[tuple[Kind, str]] = []
    kinds = [kind for kind in KINDS if not (keep_volume and kind is VOLUME)]
    while True:
        problems, count = [], 0
        for kind in kinds:
            for thing in kind.ours(client, name):
                count += 1
                if problem := _delete(client, kind, thing, say):
                    problems.append(problem)
                elif (kind, thing["id"]) not in deleted:
                    deleted.append((kind, thing["id"]))
        # A template goes with its endpoint, a moment later; what was just made may appear late.
        if not count or time.monotonic() > deadline_s:
            break
        time.sleep(_PERIOD_S if problems else 0.2)
    for problem in problems:
        say(problem)
    if not deleted and not problems:
        say(f"nothing is called {name}")
    return _prove(client, name, deleted, say)


def _delete(
    client: rest.Client, kind: Kind, thing: Mapping[str, Any], say: Callable[[str], None]
) -> str | None:
    """Delete one thing. Returns why not, or None."""
    path = f"{kind.path}/{thing['id']}"
    try:
        if kind is POD and thing.get("locked"):
            client.patch(path, {"locked": False})
        if client.delete(path):
            say(f"deleted {kind.word} {thing['id']} ({thing['name']})")
    except rest.ApiError as error:
        return f"{kind.word} {thing['id']} ({thing['name']}) is not deleted: {error}"
    return None


def _prove(
    client: rest.Client, name: str, deleted: list[tuple[Kind, str]], say: Callable[[str], None]
) -> bool:
    left = []
    for kind, number in deleted:
        if kind is POD and _terminated(client, number):
            continue
        try:
            client.get(f"{kind.path}/{number}")
            left.append(f"{kind.word} {number} is still there")
        except rest.ApiError as error:
            if error.status != 404:
                left.append(f"{kind.word} {number}: not known to be gone: {error}")
    others = []
    for kind in KINDS:
        for thing in kind.all(client):
            if is_ours(str(thing["name"]), name):
                cost = bill(kind, thing) or "bills nothing by itself"
                left.append(f"{kind.word} {thing['id']} ({thing['name']}) is left: {cost}")
            elif cost := bill(kind, thing):
                others.append(f"{kind.word} {thing['id']} ({thing['name']}): {cost}")
    for line in left:
        say(line)
    if others:
        say("not of this deployment, and billing:")
        for line in others:
            say(f"  {line}")
    if not left:
        say(
            f"gone: {len(deleted)} answer 404, and no endpoint, pod, template or volume is "
            f"called {name}"
        )
    return not left


def _terminated(client: rest.Client, number: str) -> bool:
    try:
        return bool(client.get(f"{POD.path}/{number}")["status"] == "TERMINATED")
    except rest.ApiError as error:
        return error.status == 404


def bill(kind: Kind, thing: Mapping[str, Any], hourly: Mapping[str, float] | None = None) -> str:
    """What a thing costs as it stands; empty for what costs nothing.

    Args:
        thing: of an endpoint, with its workers under `active` where they were asked for.
        hourly: what a GPU of each type costs in a worker.
    """
    if kind is VOLUME:
        return f"${prices.volume_per_month(thing['size']):.2f} a month for {thing['size']} GB"
    if kind is POD:
        if thing["status"] == "TERMINATED":
            return ""
        disk = ((thing.get("mounts") or {}).get("persistent") or {}).get("size", 0)
        running = thing["status"] not in ("EXITED", "ERROR")
        each = prices.POD_DISK_RUNNING if running else prices.POD_DISK_STOPPED
        parts = [f"${thing['cost']:.2f} per hour"] if thing["cost"] else []
        if disk:
            parts.append(f"${disk * each:.2f} a month for {disk} GB of disk")
        return f"{thing['status']}, " + " and ".join(parts) if parts else ""
    if kind is ENDPOINT:
        words = [_workers(thing["active"]["workers"], hourly or {})] if "active" in thing else []
        if always := thing["workers"]["min"]:
            words.append(f"{always} worker(s) always on")
        return ", ".join(word for word in words if word)
    return ""


def _workers(workers: list[Mapping[str, Any]], hourly: Mapping[str, float]) -> str:
    """What the workers that are there cost, from their start to their end."""
    # One that waits for capacity has no machine.
    charged = [worker for worker in workers if worker["status"] != "THROTTLED"]
    if not charged:
        return ""
    each = [hourly.get(worker.get("gpuTypeId") or "") for worker in charged]
    if None in each:
        return f"{len(charged)} worker(s) by the second"
    total = sum(w["gpuCount"] * price for w, price in zip(charged, each, strict=True) if price)
    return f"${total:.2f} per hour for {len(charged)} worker(s)"
