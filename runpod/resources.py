"""The volume, endpoint and pod of a deployment: found by name, created once, or changed."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import rest
from deployment import Deployment, Refused, changes, excluded
from teardown import ENDPOINT, POD, VOLUME, Kind

# How long a list may take to show a new resource, and how often an uncertain creation is tried.
_LATE_S = 10.0
_CREATIONS = 5


def find(client: rest.Client, kind: Kind, name: str) -> dict[str, Any] | None:
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
    while (resource := find(client, kind, name)) is None and time.monotonic() < deadline_s:
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


def volume(client: rest.Client, wanted: Deployment) -> str | None:
    if not wanted.volume_gb:
        return None
    volume = find(client, VOLUME, wanted.name)
    if volume is None:
        return str(_create(client, VOLUME, wanted.volume())["id"])
    if volume["dataCenter"] != wanted.data_center:
        raise Refused(f"volume {volume['id']} is in {volume['dataCenter']}, and stays there")
    if volume["size"] < wanted.volume_gb:
        client.patch(f"{VOLUME.path}/{volume['id']}", {"size": wanted.volume_gb})
        print(f"volume {volume['id']} grew to {wanted.volume_gb} GB")
    return str(volume["id"])


def endpoint(
    client: rest.Client,
    wanted: Deployment,
    gpus: Sequence[Mapping[str, Any]],
    catalog: Sequence[Mapping[str, Any]],
    volume: str | None,
) -> dict[str, Any]:
    body = wanted.endpoint(gpus, volume)
    if others := excluded(catalog, gpus):
        body["gpu"]["excludedTypes"] = others
    current = find(client, ENDPOINT, wanted.name)
    if current is None:
        return _create(client, ENDPOINT, body)
    if current.get("type") not in (None, body["type"]):
        raise Refused(f"endpoint {current['id']} is of type {current['type']}: `down` first")
    return _change(client, ENDPOINT, current, body)


def pod(
    client: rest.Client,
    wanted: Deployment,
    gpus: Sequence[Mapping[str, Any]],
    volume: str | None,
) -> dict[str, Any]:
    current = find(client, POD, wanted.name)
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
