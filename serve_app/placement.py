"""Temporary."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    tensor_parallel_size: int
    pipeline_parallel_size: int
    executor: str | None
    num_gpus: int
    bundles: tuple[dict[str, float], ...] | None = None
    strategy: str | None = None


def place(tensor_parallel_size: int, pipeline_parallel_size: int, gpus_per_node: int) -> Placement:
    n = tensor_parallel_size * pipeline_parallel_size
    return Placement(tensor_parallel_size, pipeline_parallel_size, "mp" if n > 1 else None, 0)
