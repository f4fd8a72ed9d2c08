"""What the driver says of GPUs, oddly described ones too, and clusters of several kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.planning import hardware, plan
from serve_app.planning.hardware import MIB, Gpu, HardwareError, Node
from serve_app.planning.plan import decide
from serve_app.planning.sizing import GIB
from serve_app.settings import Settings

H100 = "0, GPU-1111, NVIDIA H100 80GB HBM3, 81559, 81000, 9.0, 580.65.06"
SLICES = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1111)
  MIG 1g.10gb     Device  0: (UUID: MIG-aaaa)
  MIG 3g.40gb     Device  1: (UUID: MIG-bbbb)
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """An nvidia-smi that answers the query and `-L`."""

    def install(query: str, listing: str = "") -> None:
        (tmp_path / "query").write_text(query + "\n")
        (tmp_path / "listing").write_text(listing)
        script = tmp_path / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\n[ "$1" = -L ] && exec /bin/cat {tmp_path}/listing\n'
            f"exec /bin/cat {tmp_path}/query\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


def test_memory_that_the_driver_does_not_report_is_not_known(
    driver: Callable[..., None],
) -> None:
    driver("0, GPU-1, NVIDIA GB10, [N/A], [N/A], 12.1, 580.1")
    assert hardware.local_gpus() == (Gpu("NVIDIA GB10", None, None, (12, 1), "580.1"),)
    driver("0, GPU-1, NVIDIA X, [Not Supported], 5, [N/A], 580.1")
    assert hardware.local_gpus() == (Gpu("NVIDIA X", None, 5 * MIB, None, "580.1"),)


def test_warnings_and_names_with_commas_are_no_riddle(driver: Callable[..., None]) -> None:
    warning = "WARNING: infoROM is corrupted at gpu 0000:3B:00.0"
    named = "1, GPU-2222, NVIDIA X, limited edition, 81559, 81000, 9.0, 580.65.06"
    driver(f"{H100}\n{named}\n{warning}")
    assert [gpu.name for gpu in hardware.local_gpus()] == [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA X, limited edition",
    ]


@pytest.mark.parametrize(
    ("visible", "sizes_gb"),
    [(None, [10, 40]), ("MIG-bbbb", [40]), ("MIG-aaaa,MIG-bbbb", [10, 40])],
)
def test_a_slice_has_its_own_memory(
    visible: str | None,
    sizes_gb: list[int],
    driver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver(H100, SLICES)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    result = hardware.local_gpus()
    assert [gpu.memory_bytes for gpu in result] == [size * 10**9 for size in sizes_gb]
    assert {gpu.compute_capability for gpu in result} == {(9, 0)}


@pytest.mark.parametrize("visible", ["MIG-0a1b2c3d-1111", "GPU-9999"])
def test_a_device_that_is_not_there_is_named(
    visible: str, driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(H100, SLICES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(HardwareError, match=visible):
        hardware.local_gpus()


def test_an_answer_of_another_form_is_an_error_in_words(driver: Callable[..., None]) -> None:
    driver("NVIDIA-SMI has nothing to say")
    with pytest.raises(HardwareError, match="nothing to say"):
        hardware.local_gpus()


def node(kind: str, gpus: int = 1, node_id: str = "n") -> dict[str, Any]:
    return {"NodeID": node_id, "Resources": {"GPU": gpus, f"accelerator_type:{kind}": 1.0}}


def test_a_node_is_what_its_driver_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = Gpu("NVIDIA A100-SXM4-80GB", 81920 * MIB, 81000 * MIB, (8, 0))
    monkeypatch.setattr(hardware, "_reported", lambda node_id: (a100,) * 8)
    assert hardware._node(node("A100", 4), 4) == Node((a100,) * 4, "A100")
    # Time slicing: more GPUs than there are.
    assert hardware._node(node("A100", 16), 16).gpus == (a100,) * 16


def test_where_no_driver_can_be_asked_rays_name_has_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "_reported", lambda node_id: ())
    assert hardware._node(node("H100", 2), 2).gpus[0].memory_bytes == 81559 * MIB
    # Ray calls one of 40 GB and one of 80 GB alike.
    assert hardware._node(node("A100"), 1).gpus[0].memory_bytes is None
    with pytest.raises(HardwareError, match="set model and sizes by hand"):
        hardware._node(node("GTX"), 1)


def kind(name: str, memory_gib: int, count: int) -> Node:
    return Node((Gpu(name, memory_gib * GIB, memory_gib * GIB, (9, 0)),) * count, name)


def planned(monkeypatch: pytest.MonkeyPatch, *nodes: Node, **args: Any) -> plan.Plan:
    monkeypatch.setattr(plan, "cluster_nodes", lambda: nodes)
    return decide(Settings.parse(args))


def test_a_replica_goes_to_the_kind_that_it_was_sized_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = planned(monkeypatch, kind("L4", 22, 1), kind("H100", 80, 8), model="auto")
    assert result.accelerator == "H100"
    options = result.deployment_options(Settings.parse({"replicas": {"min": 1, "max": 2}}))
    assert options["ray_actor_options"]["resources"] == {"accelerator_type:H100": 0.001}
    # The cluster's room is counted in GPUs of that kind.
    arguments = options["autoscaling_config"]["policy"]["policy_kwargs"]
    assert arguments["bundles"] == [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}]


def test_another_kind_is_taken_where_the_first_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = (kind("T4", 15, 4), kind("H200", 141, 2))
    result = planned(monkeypatch, *nodes, model="Qwen/Qwen2.5-72B-Instruct")
    assert (result.accelerator, result.placement.tensor_parallel_size) == ("H200", 2)
    with pytest.raises(ConfigError, match="4 x T4"):
        planned(monkeypatch, nodes[0], model="Qwen/Qwen2.5-72B-Instruct")


def test_where_all_gpus_are_alike_any_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    result = planned(monkeypatch, kind("H100", 80, 1), kind("H100", 80, 1), model="auto")
    assert result.accelerator == ""
    options = result.deployment_options(Settings.parse({}))
    assert "resources" not in options["ray_actor_options"]


def test_replicas_on_several_nodes_get_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = (kind("H100", 80, 4), kind("L4", 22, 1))
    result = planned(
        monkeypatch,
        *nodes,
        model="Qwen/Qwen2.5-72B-Instruct",
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
    )
    bundles = result.deployment_options(Settings.parse({}))["placement_group_bundles"]
    assert len(bundles) == 8
    assert all(bundle["accelerator_type:H100"] == 0.001 for bundle in bundles)
