"""Whether the service fits its nodes, and its versions and its image agree."""

import json
import math
from pathlib import Path

from kuberay import images, prices, releases
from kuberay.aws import Account
from kuberay.checks.check import FAIL, OK, WARN, Check
from kuberay.errors import EksError
from kuberay.layout import Layout
from serve_app.errors import ConfigError
from serve_app.launch.doctor import PINS
from serve_app.planning import sizing
from serve_app.planning.hardware import ACCELERATORS, Gpu
from serve_app.planning.sizing import GIB, QWEN25, EngineMemory, ModelShape


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
                    else sizing.choose_tensor_parallel_size(name, shape, cards, memory, stages)
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
    needed = sizing.needed_bytes(shape, memory, size, stages)
    usable = sizing.usable_bytes((gpu,), memory) or 0
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


def versions(plan: Layout) -> list[Check]:
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


def image_exists(account: Account, plan: Layout) -> list[Check]:
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
            checks.append(Check("image", FAIL, f"{image}: not in its repository", push))
        else:
            size_gb = described.get("imageSizeInBytes", 0) / prices.GB
            checks.append(Check("image", OK, f"{image}: {size_gb:.1f} GB"))
    return checks
