"""Where a replica sits, and that Ray can place it so."""

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table

from serve_app.errors import ConfigError
from serve_app.planning import hardware
from serve_app.planning.placement import Placement, place, stages_whole


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 1, 0), Placement(1, 1)),
        ((2, 1, 0), Placement(2, 1, "mp")),
        ((1, 1, 8), Placement(1, 1, None, 1)),
        ((4, 1, 8), Placement(4, 1, "mp", 4)),
        ((4, 2, 8), Placement(4, 2, "mp", 8)),
    ],
)
def test_one_node_needs_no_ray_in_the_engine(
    sizes: tuple[int, int, int], expected: Placement
) -> None:
    assert place(*sizes) == expected


def test_layers_are_not_split_over_nodes() -> None:
    with pytest.raises(ConfigError) as error:
        place(16, 1, 8)
    assert "tensor_parallel_size 8 with pipeline_parallel_size 2" in str(error.value)
    with pytest.raises(ConfigError):
        place(3, 3, 8)


def test_stages_must_be_whole() -> None:
    assert stages_whole(["a"] * 4 + ["b"] * 4, 4)
    assert stages_whole(["a"] * 4 + ["b"] * 4, 2)
    assert not stages_whole(["a"] * 3 + ["b"] * 5, 4)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    cluster.add_node(num_cpus=1, num_gpus=0)
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=4)
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_ray_places_each_stage_on_one_node(cluster: Cluster) -> None:
    wanted = place(4, 2, gpus_per_node=4)
    assert wanted.bundles is not None
    assert wanted.executor == "ray"
    group = placement_group([dict(b) for b in wanted.bundles], strategy=str(wanted.strategy))
    ray.get(group.ready(), timeout=60)
    nodes = placement_group_table(group)["bundles_to_node_id"].values()
    assert len(set(nodes)) == 2
    assert stages_whole(nodes, 4)


def test_a_node_that_is_to_come_is_planned_for() -> None:
    (node,) = hardware._expected("A10G:2")
    assert [gpu.name for gpu in node.gpus] == ["A10G", "A10G"]
    assert node.gpus[0].memory_bytes == hardware.ACCELERATORS["A10G"][0]
    assert hardware._expected("") == ()


@pytest.mark.parametrize("text", ["A10G", "A10G:0", "A10G:x", "GTX:1"])
def test_what_is_to_come_is_named_rightly(text: str) -> None:
    with pytest.raises(hardware.HardwareError, match="SERVE_APP_NODE_GPUS"):
        hardware._expected(text)
