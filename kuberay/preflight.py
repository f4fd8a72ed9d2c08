"""`python -m kuberay preflight`: will this account hold this cluster, and what will it cost?

Each check is one line: ok, warn or FAIL, what was found, and the mend. Nothing is changed. A check
that a missing permission hides is a warning that names the permission: not knowing is no reason to
stop somebody who knows. Exit status: 0 without a FAIL, 1 with one.
"""

import argparse
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuberay import (
    console,
    cost,
    images,
    layout,
    prices,
    releases,
    render,
    target,
    tools,
    weights,
    zones,
)
from kuberay.aws import Account, tags
from kuberay.cluster import status
from kuberay.cost import Bill
from kuberay.errors import AwsError, EksError, PermissionMissing, ToolError
from kuberay.layout import Layout, NodeGroup
from kuberay.owned import CLUSTER
from kuberay.target import Target
from kuberay.zones import Zones
from serve_app import __version__
from serve_app.errors import ConfigError
from serve_app.launch.doctor import PINS
from serve_app.planning.hardware import ACCELERATORS, Gpu
from serve_app.planning.sizing import (
    GIB,
    QWEN25,
    EngineMemory,
    ModelShape,
    choose_tensor_parallel_size,
    needed_bytes,
    usable_bytes,
)

DEFAULT = "one-gpu"
OK, WARN, FAIL = "ok", "warn", "FAIL"
# EC2's quotas of running vCPUs, on demand and spot, by the first letter of an instance type.
_VCPU_QUOTAS: Mapping[str, tuple[str, str]] = {
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "p": ("L-417A185B", "L-7212CCBC"),
    "standard": ("L-1216C47A", "L-34B43A08"),
}
_VPC_QUOTA = ("vpc", "L-F678F1CE", "VPCs")
_ADDRESS_QUOTA = ("ec2", "L-0263D0A3", "elastic IPs")


@dataclass(frozen=True)
class Check:
    """One line. `mend` is empty where the status is ok."""

    name: str
    status: str
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Preflight:
    """All lines, the bill, the manifests that both are about, and what eksctl is to be given."""

    checks: tuple[Check, ...]
    bill: Bill | None = None
    manifests: tuple[dict[str, Any], ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def good(self) -> bool:
        return all(check.status != FAIL for check in self.checks)

    def lines(self) -> list[str]:
        shown = []
        for check in self.checks:
            shown.append(f"{check.status:<4}  {check.name:<22} {check.found}")
            if check.mend:
                shown.append(f"      {'':<22} mend: {check.mend}")
        if self.bill is not None:
            shown += ["", *self.bill.lines()]
        verdict = "ready to go up" if self.good else "not ready: mend the lines marked FAIL"
        return [*shown, "", verdict]

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"ok": self.good, "checks": [asdict(c) for c in self.checks]}
        if self.bill is not None:
            data["usd_per_hour"] = {
                "at_rest": round(self.bill.at_rest, 4),
                "at_most": round(self.bill.at_most, 4),
                "items": [asdict(item) for item in self.bill.items],
                "not_known": list(self.bill.unknown),
                "not_counted": cost.NOT_COUNTED,
            }
        return data


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    outcome = preflight(Target.of(options), Choice.of(options))
    print(json.dumps(outcome.as_json()) if options.json else "\n".join(outcome.lines()))
    return 0 if outcome.good else 1


@dataclass(frozen=True)
class Choice:
    """What of the manifests is to be deployed.

    Attributes:
        image: None for the account's own repository, under the name that the manifests give.
        bucket: of the weights; None for the model hub, which is taken too where it lacks them.
    """

    overlay: str = DEFAULT
    image: str | None = None
    bucket: str | None = None
    model_config: Path | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Choice":
        return cls(options.overlay, options.image, options.bucket, options.model_config)


def documents(to: Target, choice: Choice) -> tuple[list[dict[str, Any]], Check]:
    """The manifests as they are to be applied, and where they take the weights from.

    Raises:
        EksError: there is no such overlay, or it cannot be built.
    """
    name, region = to.owner.name, to.owner.region
    registry = f"{to.account.id}.dkr.ecr.{region}.amazonaws.com"
    image = images.pinned(to.account, choice.image or f"{registry}/{render.IMAGE}{__version__}")
    try:
        model = render.serve_config(choice.overlay)["applications"][0]["args"]["model"]
        source = weights.source(to.account, to.config, str(model), choice.bucket)
        manifests = render.documents(choice.overlay, name, region, source.bucket, image)
    except ConfigError as error:
        raise EksError(str(error)) from error
    return manifests, Check("weights", WARN if source.mend else OK, source.found, source.mend)


def preflight(to: Target, choice: Choice) -> Preflight:
    """All checks, in the order in which a start would meet them."""
    checks = [*programs()]
    signed_in = guarded("credentials", lambda: credentials(to.account))
    if signed_in[0].status != OK:
        return Preflight((*checks, *signed_in))
    checks += [*signed_in, *guarded("region", lambda: region(to.account))]
    try:
        manifests, source = documents(to, choice)
        plan = layout.layout(to.config, manifests)
    except EksError as error:
        return Preflight((*checks, Check("manifests", FAIL, str(error), "correct this")))
    account = to.account
    config, zones_found = zoned(to, plan)
    checks += zones_found
    checks += guarded("quota", lambda: vcpu_quotas(account, plan))
    if plan.own_network:
        checks += guarded("network", lambda: network_quotas(account, to, plan))
    else:
        checks += guarded("subnets", lambda: subnets(account, to.config))
    checks.append(source)
    checks += guarded("model", lambda: model(account, plan, choice.model_config))
    checks += guarded("upgrade", lambda: upgrade(plan))
    checks += versions(to, plan)
    checks += guarded("image", lambda: image_there(account, plan))
    checks += guarded("cluster", lambda: cluster(account, to))
    bill = cost.bill(plan, lambda kind: prices.rate(account, kind))
    return Preflight(tuple(checks), bill, tuple(manifests), config)


def guarded(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """The lines of a check, or the one line that says why there are none."""
    try:
        return list(check())
    except AwsError as error:
        if name == "credentials":
            return [Check(name, FAIL, str(error), "sign in to AWS, and run this again")]
        return [unchecked(name, error)]
    except EksError as error:
        return [Check(name, FAIL, str(error), "correct this")]


def unchecked(name: str, error: AwsError) -> Check:
    again = "grant it" if isinstance(error, PermissionMissing) else "run it again"
    return Check(name, WARN, f"not checked: {error}", f"{again}, or check by hand")


# --- who and where --------------------------------------------------------------------------


def programs() -> list[Check]:
    """The commands that `up` and `down` call, and whether they are new enough."""
    checks = []
    for name, least in tools.LEAST.items():
        try:
            path = tools.find(name)
        except ToolError as error:
            mend = str(error).partition(": ")[2]
            checks.append(Check(name, FAIL, "not on PATH", mend))
            continue
        mend = f"install {tools.WHERE[name]}"
        try:
            answer = tools.version(name)
        except ToolError as error:
            checks.append(Check(name, WARN, str(error), mend))
            continue
        old, shown = answer < least, f"{path} {answer[0]}.{answer[1]}"
        checks.append(Check(name, FAIL if old else OK, shown, mend if old else ""))
    signer = shutil.which("aws") or shutil.which("aws-iam-authenticator")
    mend = "" if signer else f"install {tools.WHERE['aws']}"
    signer_found = signer or "neither aws nor aws-iam-authenticator is on PATH"
    return [*checks, Check("sign-in of kubectl", OK if signer else FAIL, signer_found, mend)]


def credentials(account: Account) -> list[Check]:
    who = account.identity
    return [Check("credentials", OK, f"{who['Arn']} in account {who['Account']}")]


def region(account: Account) -> list[Check]:
    key = "AvailabilityZones"
    zones = [
        zone["ZoneName"]
        for zone in account.call("ec2", "describe_availability_zones")[key]
        if zone["State"] == "available" and zone.get("ZoneType", "availability-zone")[0] == "a"
    ]
    status = OK if len(zones) >= 2 else FAIL
    mend = "" if status == OK else "EKS needs two zones: take another region"
    return [Check("region", status, f"{account.region}: {', '.join(zones)}", mend)]


# --- capacity -------------------------------------------------------------------------------


def zoned(to: Target, plan: Layout) -> tuple[dict[str, Any], list[Check]]:
    """cluster.yaml with the zones that are chosen for the overlay, and the lines about them."""
    try:
        zones_found = zones.find(to.account, to.owner, plan)
    except AwsError as error:
        return dict(to.config), [unchecked("instance types", error)]
    return zones.applied(to.config, plan, zones_found), instance_types(plan, zones_found)


def instance_types(plan: Layout, zones_found: Zones) -> list[Check]:
    """Which zones offer the types of each node group, and which were chosen."""
    where = f"{', '.join(zones_found.network)}{' (of the cluster)' if zones_found.made else ''}"
    for name, own in zones_found.groups.items():
        if own and set(own) != set(zones_found.network):
            where += f"; {name} in {', '.join(own)} only"
    checks = [Check("zones", OK, where)]
    for kind in sorted(zones_found.offered):
        inside = sorted(zones_found.offered[kind] & {*zones_found.network})
        groups = [group for group in plan.groups if kind in group.instance_types]
        name = f"zones of {kind}"
        elsewhere = ", ".join(sorted(zones_found.offered[kind])) or "no zone of this region"
        if not inside and all(zones_found.groups[group.name] for group in groups):
            mend = f"offered in: {elsewhere}; the group's other types are taken"
            checks.append(Check(name, WARN, f"none of {', '.join(zones_found.network)}", mend))
        elif not inside:
            mend = f"offered in: {elsewhere}; change availabilityZones, the type or the region"
            checks.append(Check(name, FAIL, f"none of {', '.join(zones_found.network)}", mend))
        elif len(inside) == 1:
            mend = "one zone that runs out stops scaling: name a second instance type"
            checks.append(Check(name, WARN, inside[0], mend))
        else:
            checks.append(Check(name, OK, ", ".join(inside)))
    return checks


def vcpu_quotas(account: Account, plan: Layout) -> list[Check]:
    """Running vCPUs that each quota allows, against what the node groups may come to."""
    by_quota: dict[tuple[str, bool], list[NodeGroup]] = {}
    for group in plan.groups:
        by_quota.setdefault((_family(group.instance_types[0]), group.spot), []).append(group)
    running = running_vcpus(account)
    checks = []
    for (family, spot), groups in by_quota.items():
        code = _VCPU_QUOTAS[family][spot]
        allowed = quota(account, "ec2", code)
        used = running.get((family, spot), 0)
        least = sum(cost.at_rest(plan, group) * _vcpus(account, group) for group in groups)
        at_most = sum(group.maximum * _vcpus(account, group) for group in groups)
        word = "standard" if family == "standard" else family.upper()
        name = f"quota {word}{' spot' if spot else ''}"
        summary = f"{allowed:.0f} vCPUs, {used} in use; {least} at rest, {at_most} at most"
        mend = (
            f"ask for {used + at_most}: aws service-quotas request-service-quota-increase --region "
            f"{account.region} --service-code ec2 --quota-code {code} "
            f"--desired-value {used + at_most}"
        )
        if used + at_most <= allowed:
            checks.append(Check(name, OK, summary))
        elif used + least <= allowed:
            checks.append(Check(name, WARN, f"{summary}: scaling will stop before the most", mend))
        else:
            checks.append(Check(name, FAIL, summary, mend))
    return checks


def _family(kind: str) -> str:
    letter = re.match(r"[a-z]+", kind)
    first = letter[0] if letter else ""
    # "gr6" and "vt1" count as G; "g5", "g6e" too.
    return "g" if first in ("g", "gr", "vt") else "p" if first == "p" else "standard"


def _vcpus(account: Account, group: NodeGroup) -> int:
    """Of the largest type of a group."""
    kinds = list(group.instance_types)
    if all(kind in prices.INSTANCES for kind in kinds):
        return max(prices.INSTANCES[kind].vcpus for kind in kinds)
    types = account.call("ec2", "describe_instance_types", InstanceTypes=kinds)["InstanceTypes"]
    return max(int(entry["VCpuInfo"]["DefaultVCpus"]) for entry in types)


def running_vcpus(account: Account) -> dict[tuple[str, bool], int]:
    """What runs in the region now, by quota."""
    used: dict[tuple[str, bool], int] = {}
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    for reservation in account.pages("ec2", "describe_instances", "Reservations", Filters=states):
        for instance in reservation["Instances"]:
            # A quota counts a type's vCPUs, however many of them an instance has switched on.
            instance_type = prices.INSTANCES.get(instance["InstanceType"])
            options = instance.get("CpuOptions") or {}
            cpus = int(options.get("CoreCount", 1)) * int(options.get("ThreadsPerCore", 1))
            cpus = instance_type.vcpus if instance_type is not None else cpus
            spot = instance.get("InstanceLifecycle") == "spot"
            key = (_family(instance["InstanceType"]), spot)
            used[key] = used.get(key, 0) + cpus
    return used


def quota(account: Account, service: str, code: str) -> float:
    answer = account.call(
        "service-quotas", "get_service_quota", ServiceCode=service, QuotaCode=code
    )
    return float(answer["Quota"]["Value"])


def network_quotas(account: Account, to: Target, plan: Layout) -> list[Check]:
    """A VPC of its own, and an address for each NAT gateway; none for a cluster that exists."""
    if status(account, to.owner.name):
        return []
    networks = len(list(account.pages("ec2", "describe_vpcs", "Vpcs")))
    addresses = len(account.call("ec2", "describe_addresses")["Addresses"])
    checks = []
    for (service, code, name), used, more in (
        (_VPC_QUOTA, networks, 1),
        (_ADDRESS_QUOTA, addresses, plan.nat_gateways),
    ):
        allowed = quota(account, service, code)
        summary = f"{allowed:.0f}, {used} in use, {more} more needed"
        good = used + more <= allowed
        mend = (
            f"release what is not used, or: aws service-quotas request-service-quota-increase "
            f"--region {account.region} --service-code {service} --quota-code {code} "
            f"--desired-value {used + more}"
        )
        checks.append(Check(name, OK if good else FAIL, summary, "" if good else mend))
    return checks


def subnets(account: Account, config: Mapping[str, Any]) -> list[Check]:
    """Subnets that cluster.yaml brings: there, in two zones, with free addresses."""
    named: list[str] = []
    for side in ((config.get("vpc") or {}).get("subnets") or {}).values():
        for key, entry in side.items():
            name = (entry or {}).get("id") or key
            if str(name).startswith("subnet-"):
                named.append(str(name))
    if not named:
        return [Check("subnets", WARN, "none is named by its id", "name them by id to check them")]
    described = account.call("ec2", "describe_subnets", SubnetIds=named)["Subnets"]
    zones = {item["AvailabilityZone"] for item in described}
    free = min(item["AvailableIpAddressCount"] for item in described)
    summary = (
        f"{len(described)} in {', '.join(sorted(zones))}; {free} free addresses in the fullest"
    )
    if len(zones) < 2:
        return [Check("subnets", FAIL, summary, "EKS needs subnets in two zones")]
    if free < 32:
        return [Check("subnets", WARN, summary, "each pod takes an address: take larger subnets")]
    return [Check("subnets", OK, summary)]


# --- the service ----------------------------------------------------------------------------


def model(account: Account, plan: Layout, model_config: Path | None) -> list[Check]:
    """Whether the model fits the GPUs of the node groups that are to run it."""
    service = plan.service
    if service is None or not service.gpus_per_worker:
        return [Check("model", FAIL, "no RayService with GPUs", "name an overlay that has one")]
    name = str(service.arguments.get("model", "auto"))
    engine = service.arguments.get("engine") or {}
    shape = _shape(account, name, model_config)
    if shape is None:
        mend = "give --model-config FILE, its config.json"
        return [Check("model", WARN, f"{name}: its needs are not known", mend)]
    try:
        memory = EngineMemory.of(engine)
    except ConfigError as error:
        return [Check("model", FAIL, str(error), "correct this key")]
    tensor_parallel = service.arguments.get("tensor_parallel_size")
    pipeline = service.arguments.get("pipeline_parallel_size")
    stages = pipeline if isinstance(pipeline, int) else 1
    checks = []
    for group in plan.gpu_groups:
        for kind in group.instance_types:
            gpu = _gpu(prices.INSTANCES[kind].gpu)
            cards = (gpu,) * service.gpus_per_worker
            title = f"model on {kind}"
            try:
                size = (
                    tensor_parallel
                    if isinstance(tensor_parallel, int)
                    else choose_tensor_parallel_size(name, shape, cards, memory, stages)
                )
            except ConfigError as error:
                checks.append(Check(title, FAIL, str(error), "a larger type, or another overlay"))
                continue
            checks.append(
                _fits(
                    title,
                    name,
                    shape,
                    gpu,
                    size,
                    stages,
                    memory,
                    service.gpus_per_worker,
                    prices.INSTANCES[kind].gpus,
                )
            )
    return checks


def _fits(
    title: str, name: str, shape: ModelShape, gpu: Gpu, size: int, stages: int,
    memory: EngineMemory, per_worker: int, per_node: int,
) -> Check:  # fmt: skip
    needed = needed_bytes(shape, memory, size, stages)
    usable = usable_bytes((gpu,), memory) or 0
    summary = f"{name} on {size} x {gpu.name}: {needed / GIB:.1f} GiB of {usable / GIB:.1f} each"
    if per_worker > per_node:
        mend = f"the node has {per_node} GPUs: a worker that asks for {per_worker} never starts"
        return Check(title, FAIL, summary, mend)
    if size > per_worker:
        mend = f"a worker has {per_worker} GPUs and tensor_parallel_size is {size}"
        return Check(title, FAIL, summary, mend)
    if needed > usable:
        mend = "a larger type, more GPUs (tensor_parallel_size), or a lower engine.max_model_len"
        return Check(title, FAIL, summary, mend)
    return Check(title, OK, summary)


def _shape(account: Account, name: str, model_config: Path | None) -> ModelShape | None:
    """The model's dimensions: of the file given, of the table, or of its bucket."""
    try:
        if model_config is not None:
            return ModelShape.from_config(json.loads(model_config.read_text(encoding="utf-8")))
        for shape in QWEN25:
            if name.rstrip("/").endswith(shape.rpartition("/")[2]):
                return QWEN25[shape]
        if name.startswith("s3://"):
            bucket, _, prefix = name.removeprefix("s3://").partition("/")
            key = f"{prefix.rstrip('/')}/config.json"
            body = account.call("s3", "get_object", Bucket=bucket, Key=key)["Body"].read()
            return ModelShape.from_config(json.loads(body))
    except KeyError:
        return None  # An architecture or a quantization that is not known here.
    except (OSError, ValueError) as error:
        raise EksError(f"config.json of {name}: {error!r}") from error
    return None


def _gpu(name: str) -> Gpu:
    memory_bytes, capability = ACCELERATORS[name]
    return Gpu(name, memory_bytes, memory_bytes, capability)


def upgrade(plan: Layout) -> list[Check]:
    """The most GPUs of an upgrade, against the most that the node groups may have."""
    service = plan.service
    if service is None:
        return []
    summary = (
        f"{service.strategy}: {service.peak_gpus} GPUs at the peak, {service.most_gpus} without, "
        f"{plan.most_gpus} at most in the node groups"
    )
    if plan.most_gpus < service.most_gpus:
        mend = f"maxSize of the GPU group for {service.most_gpus} GPUs, or a lower maxReplicas"
        return [Check("GPUs at full size", FAIL, summary, mend)]
    if plan.most_gpus < service.peak_gpus:
        nodes = math.ceil(service.peak_gpus / max(g.gpus_per_node for g in plan.gpu_groups))
        mend = f"maxSize {nodes}, or a strategy that needs fewer GPUs (upgrades.md)"
        # At full size the new workers never start and the old ones serve on: a hang, not a loss.
        return [Check("GPUs in an upgrade", WARN, summary, mend)]
    return [Check("GPUs in an upgrade", OK, summary)]


def versions(to: Target, plan: Layout) -> list[Check]:
    """Ray of the image, of the manifest and of this package; the operator and its CRDs."""
    checks = []
    pinned = PINS["ray"]
    if plan.service is not None:
        stated = plan.service.ray_version
        good = stated == pinned
        mend = "" if good else f"set rayVersion to {pinned}, which pyproject.toml pins"
        checks.append(Check("Ray", OK if good else FAIL, f"rayVersion {stated}", mend))
    operator, chart = releases.operator_version(), releases.KUBERAY
    good = operator == chart
    mend = "" if good else f"image.tag of operator-values.yaml: v{chart}"
    summary = f"operator {operator}, CRDs and chart {chart}"
    return [*checks, Check("KubeRay", OK if good else FAIL, summary, mend)]


def image_there(account: Account, plan: Layout) -> list[Check]:
    """Whether the image is in its repository."""
    checks = []
    for image in plan.service.images if plan.service else ():
        address = images.parsed(image)
        if address is None:
            mend = "see that the nodes can pull it; private networking reaches out through NAT"
            checks.append(Check("image", WARN, f"{image}: not in ECR, not checked", mend))
        elif address.region != account.region:
            summary = f"{image}: in {address.region}, the cluster in {account.region}"
            mend = "push it to the cluster's region: pulls cross regions at $0.02 per GB"
            checks.append(Check("image", WARN, summary, mend))
        elif (described := images.described(account, address)) is None:
            push = "build it and push it (README.md, The image)"
            checks.append(Check("image", FAIL, f"{image}: not there", push))
        else:
            size_gb = described.get("imageSizeInBytes", 0) / prices.GB
            checks.append(Check("image", OK, f"{image}: {size_gb:.1f} GB"))
    return checks


def cluster(account: Account, to: Target) -> list[Check]:
    """Whether the name is free, or is ours to go on with."""
    name = to.owner.name
    try:
        description = account.call("eks", "describe_cluster", name=name)["cluster"]
    except AwsError as error:
        if error.absent:
            return [Check("name", OK, f"{name} is free in {account.region}")]
        raise
    if tags(description, "tags").get(CLUSTER) == name:
        return [Check("name", OK, f"{name} is there already ({description['status']}): up goes on")]
    mend = "give another --name, or change metadata.name"
    return [Check("name", FAIL, f"{name} is a cluster of somebody else's", mend)]


def deployed(parser: argparse.ArgumentParser) -> None:
    """The options of what is deployed, which `up` has too."""
    add = parser.add_argument
    add("--overlay", default=DEFAULT, help=f"{', '.join(render.overlays())}; default: %(default)s")
    add("--image", help="default: that of the manifests, in the account's ECR")
    add("--bucket", help="S3 bucket that has the weights under their hub name; default: the hub")
    add("--model-config", type=Path, help="config.json of a model that is not known here")


def arguments(parser: argparse.ArgumentParser) -> None:
    target.arguments(parser)
    add = parser.add_argument
    deployed(parser)
    add("--json", action="store_true", help="print one JSON object")
