"""What is asked of Runpod, as request bodies: an endpoint, a pod or a volume. Pure.

One deployment is one name: everything that carries it is ours, is found again by it, and is
deleted by it. No template is made, because an endpoint and a pod say all of it themselves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import prices

PORT, HEALTH_PORT, HEALTH_PATH = 8000, 8001, "/ping"
VOLUME_PATH = "/runpod-volume"
# What the image is built for: an older driver cannot run it.
CUDA = "13.0"
ENDPOINT_TYPES = {"load_balancer": "LOAD_BALANCER", "queue": "QUEUE"}
# Runpod adds this to the name of an endpoint with FlashBoot, and the other to its template's.
_SUFFIXES = (" -fb",)
_TEMPLATE = "__template__"
# Variables that Runpod adds to those of a container.
_THEIRS = ("RUNPOD_", "PUBLIC_KEY")
# In an answer, what a request leaves out is filled in: these are compared with what was asked.
_COMPARED = (
    *("image", "disk", "ports", "env", "registry", "gpu", "workers", "scaling", "timeout"),
    *("flashboot", "networkVolumes", "dataCenterIds"),
)


class Refused(Exception):
    """A deployment that cannot be; one sentence."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One deployment, as the command line describes it.

    Attributes:
        gpus: GPU types or pools, the most preferred first.
        env: variables of the container beyond those that follow from the rest.
        requests_per_worker: requests in flight from which on a load balancer adds a worker.
    """

    name: str
    mode: str = "load_balancer"
    image: str = ""
    model: str = ""
    gpus: tuple[str, ...] = ()
    gpu_count: int = 1
    workers_min: int = 0
    workers_max: int = 3
    idle_s: int = 60
    requests_per_worker: int = 32
    request_timeout_s: int = 600
    disk_gb: int = 40
    volume_gb: int = 0
    data_center: str = ""
    registry: str = ""
    flashboot: str = "OFF"
    cloud: str = "SECURE"
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def serverless(self) -> bool:
        return self.mode != "pod"

    def environment(self) -> dict[str, str]:
        own = {"SERVE_MODE": self.mode, "PORT": str(PORT), "PORT_HEALTH": str(HEALTH_PORT)}
        own["HEALTH_CHECK_PATH"] = HEALTH_PATH
        if self.model:
            own["MODEL_NAME"] = self.model
        return {**own, **self.env}

    def container(self) -> dict[str, Any]:
        # A pod's ports are public: its health port is nobody's business there.
        ports = {"load_balancer": [PORT, HEALTH_PORT], "queue": [], "pod": [PORT]}[self.mode]
        body = {
            "image": self.image,
            "disk": self.disk_gb,
            "ports": [f"{port}/http" for port in ports],
            "env": self.environment(),
        }
        return {**body, "registry": self.registry} if self.registry else body

    def endpoint(self, gpus: Sequence[Mapping[str, Any]], volume: str | None) -> dict[str, Any]:
        """The body that creates the endpoint, or that it is compared with."""
        scaling: dict[str, Any] = {"type": "QUEUE_DELAY", "queueDelay": 4}
        if self.mode == "load_balancer":
            scaling = {"type": "REQUEST_COUNT", "requestCount": self.requests_per_worker}
        return {
            **self.container(),
            "name": self.name,
            "type": ENDPOINT_TYPES[self.mode],
            "gpu": {
                "pools": pools(gpus),
                "count": self.gpu_count,
                "minCudaVersion": CUDA,
            },
            "workers": {
                "min": self.workers_min,
                "max": self.workers_max,
                "idleTimeout": self.idle_s,
            },
            "scaling": scaling,
            "timeout": 1000 * self.request_timeout_s,
            "flashboot": self.flashboot,
            "networkVolumes": [volume] if volume else [],
            "dataCenterIds": [self.data_center] if self.data_center else [],
        }

    def pod(self, gpu: Mapping[str, Any], volume: str | None) -> dict[str, Any]:
        """The body that creates the pod on one type of GPU."""
        body = {
            **self.container(),
            "name": self.name,
            "cloud": self.cloud,
            "gpu": {"id": gpu["id"], "count": self.gpu_count, "minCudaVersion": CUDA},
        }
        if self.data_center:
            body["dataCenterIds"] = [self.data_center]
        if volume:
            body["mounts"] = {"network": [{"volumeId": volume, "path": VOLUME_PATH}]}
        return body

    def volume(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.volume_gb, "dataCenter": self.data_center}

    def costs(self, gpus: Sequence[Mapping[str, Any]]) -> list[str]:
        """What it will cost, one line a thing that bills, before anything is created."""
        lines = []
        if self.serverless:
            each = [prices.serverless_per_hour(gpu) for gpu in gpus]
            if None in each:
                raise Refused("the catalog has no serverless price for these GPUs")
            worker = self.gpu_count * max(price for price in each if price is not None)
            names = ", ".join(str(gpu["name"]) for gpu in gpus)
            lines.append(
                f"${worker:.2f} per hour and worker ({self.gpu_count} GPU each: {names}): "
                f"${worker * self.workers_min:.2f} per hour always, at most "
                f"${worker * self.workers_max:.2f}"
            )
        else:
            hourly = self.gpu_count * max(prices.pod_per_hour(gpu, self.cloud) for gpu in gpus)
            lines.append(
                f"${hourly:.2f} per hour ({self.gpu_count} x "
                f"{' or '.join(str(gpu['name']) for gpu in gpus)}), busy or idle, until deleted"
            )
        disk = self.disk_gb * prices.CONTAINER_DISK / 730
        lines.append(f"${disk:.4f} per hour for {self.disk_gb} GB of container disk")
        if self.volume_gb:
            month = prices.volume_per_month(self.volume_gb)
            lines.append(
                f"${month / 730:.4f} per hour (${month:.2f} a month) for a volume of "
                f"{self.volume_gb} GB, used or not, until deleted"
            )
        return lines


def is_ours(name_found: str, name: str) -> bool:
    """Whether a thing's name says that it belongs to the deployment `name`."""
    base = name_found.split(_TEMPLATE, 1)[0]
    for suffix in _SUFFIXES:
        base = base.removesuffix(suffix)
    return base == name


def select(
    catalog: Iterable[Mapping[str, Any]], wanted: Sequence[str], serverless: bool
) -> list[Mapping[str, Any]]:
    """The GPU types of the catalog that were asked for, in the order of preference.

    Raises:
        Refused: one is not there, or cannot be had this way.
    """
    types = list(catalog)
    selected: list[Mapping[str, Any]] = []
    for word in wanted:
        low = word.strip().lower()
        same = [gpu for gpu in types if low in (gpu["id"].lower(), gpu["name"].lower())]
        same = same or [gpu for gpu in types if (gpu["pool"] or "").lower() == low]
        if serverless:
            same = [gpu for gpu in same if gpu["pool"]]
        if not same:
            names = sorted({gpu["name"] for gpu in types if gpu["pool"] or not serverless})
            raise Refused(f"no GPU {word!r} to be had this way; there are: {', '.join(names)}")
        selected += [gpu for gpu in same if gpu not in selected]
    return selected


def pools(gpus: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(gpu["pool"]) for gpu in gpus))


def excluded(catalog: Iterable[Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]]) -> list[str]:
    """The other types of the pools: a pool alone would also place workers on those."""
    chosen, wanted = {gpu["id"] for gpu in gpus}, set(pools(gpus))
    return [gpu["id"] for gpu in catalog if gpu["pool"] in wanted and gpu["id"] not in chosen]


def changes(current: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What of `wanted` the API's `current` does not already say: the body of a PATCH."""
    return {
        key: wanted[key]
        for key in _COMPARED
        if key in wanted and not _same(key, current.get(key), wanted[key])
    }


def _same(key: str, current: Any, wanted: Any) -> bool:
    if key == "env":
        # A PATCH replaces all variables: one that is not asked for any more has to go, too.
        given = {k: v for k, v in (current or {}).items() if not k.startswith(_THEIRS)}
        return bool(given == wanted)
    if key == "gpu":
        # Pools that are sent without exclusions clear them.
        wanted = {"excludedTypes": [], **wanted}
    return _holds(current, wanted)


def _holds(current: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        given = current if isinstance(current, Mapping) else {}
        return all(_holds(given.get(key), value) for key, value in wanted.items())
    if not wanted and not current:
        return True
    if isinstance(wanted, list) and isinstance(current, list):
        return bool(sorted(current) == sorted(wanted))
    return bool(current == wanted)
