"""How one replica sits on the cluster: processes, GPUs and nodes. Pure.

One node holds it: the replica's actor owns all its GPUs and vLLM's multiprocessing executor runs
the workers beside it, without Ray in the engine's inner loop. Several nodes: a placement group of
one-GPU bundles (vLLM's Ray executor takes no other) with the replica's actor in the first.

Serve accepts one strategy for the whole group, and none of them means "each stage on one node". So
a stage takes all GPUs of a node or an equal part of them, the group uses PACK, and `stages_whole`
checks before the engine starts that each node has whole stages.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from serve_app.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where one replica runs.

    Attributes:
        executor: vLLM's distributed_executor_backend; None leaves it to vLLM (one process).
        num_gpus: GPUs that the replica's actor owns.
        bundles, strategy: Ray placement group of a replica on several nodes, else None.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int
    executor: str | None = None
    num_gpus: int = 0
    bundles: tuple[Mapping[str, float], ...] | None = None
    strategy: str | None = None


def place(
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    gpus_per_node: int,
    cpus_per_replica: float = 1.0,
) -> Placement:
    """The placement of one replica.

    Args:
        gpus_per_node: GPUs of the largest node; 0 runs the engine on CPUs.

    Raises:
        ConfigError: the sizes do not fit the nodes; names the nearest that does.
    """
    tp, pp = tensor_parallel_size, pipeline_parallel_size
    world = tp * pp
    if gpus_per_node == 0:
        return Placement(tp, pp, "mp" if world > 1 else None)
    if world <= gpus_per_node:
        return Placement(tp, pp, "mp" if world > 1 else None, num_gpus=world)
    if tp > gpus_per_node or gpus_per_node % tp:
        divisors = [n for n in range(1, gpus_per_node + 1) if gpus_per_node % n == 0]
        best = max(n for n in divisors if n <= tp)
        raise ConfigError(
            "tensor_parallel_size",
            tp,
            f"a node has {gpus_per_node} GPUs, and each layer's GPUs must be on one node; "
            f"the nearest is tensor_parallel_size {best} with pipeline_parallel_size "
            f"{-(-world // best)}",
        )
    first = {"CPU": cpus_per_replica, "GPU": 1.0}
    return Placement(tp, pp, "ray", bundles=(first, *[{"GPU": 1.0}] * (world - 1)), strategy="PACK")


def stages_whole(bundle_nodes: Iterable[str], tensor_parallel_size: int) -> bool:
    """Whether every node was given whole pipeline stages, from the node of each bundle."""
    return all(count % tensor_parallel_size == 0 for count in Counter(bundle_nodes).values())
