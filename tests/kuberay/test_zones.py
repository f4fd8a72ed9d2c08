"""Zones: each node group starts only where its types are offered, in every region."""

import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kuberay import layout, zones
from kuberay.layout import Layout, NodeGroup
from kuberay.target import HERE
from tests.kuberay import schemas

ABC = ("a", "b", "c", "d")
CPU = NodeGroup("cpu", ("m7i.xlarge", "m6i.xlarge"), 2, 2)
GPU = NodeGroup("gpu", ("g6.2xlarge", "g5.2xlarge"), 0, 6)
LARGE = NodeGroup("gpu-72b", ("g6e.12xlarge",), 0, 2)


def offered(**where: str) -> dict[str, frozenset[str]]:
    names = {"m7i": "m7i.xlarge", "m6i": "m6i.xlarge", "g6": "g6.2xlarge", "g5": "g5.2xlarge",
             "g6e": "g6e.12xlarge"}  # fmt: skip
    return {names[key]: frozenset(zones) for key, zones in where.items()}


def test_zones_that_offer_everything_are_taken_three_at_most() -> None:
    selected = zones.choose([CPU, GPU], offered(m7i="abcd", m6i="abcd", g6="bcd", g5="abcd"), ABC)
    assert selected.network == ("b", "c", "d")
    assert selected.groups == {"cpu": ("b", "c", "d"), "gpu": ("b", "c", "d")}


def test_one_zone_with_gpus_still_has_a_second_for_the_control_plane() -> None:
    selected = zones.choose([CPU, LARGE], offered(m7i="abc", m6i="abc", g6e="c"), ABC[:3])
    assert selected.network == ("a", "c")
    assert selected.groups == {"cpu": ("a", "c"), "gpu-72b": ("c",)}


def test_a_type_that_the_region_has_not_is_left_out() -> None:
    selected = zones.choose([CPU, GPU], offered(m7i="ab", m6i="ab", g6="", g5="ab"), ABC[:2])
    assert selected.groups["gpu"] == ("a", "b")
    assert selected.types(GPU) == ("g5.2xlarge",)


def test_zones_that_are_named_are_taken() -> None:
    where = offered(m7i="abcd", m6i="abcd", g6="ab", g5="ab")
    selected = zones.choose([CPU, GPU], where, ABC, named=("b", "d"), made=True)
    assert selected.network == ("b", "d")
    assert selected.groups["gpu"] == ("b",)


@given(
    where=st.fixed_dictionaries(
        {key: st.sets(st.sampled_from(ABC)) for key in ("m7i", "m6i", "g6", "g5", "g6e")}
    ),
    usable=st.sets(st.sampled_from(ABC), min_size=2),
)
def test_no_group_is_ever_put_where_none_of_its_types_is_offered(
    where: Mapping[str, set[str]], usable: set[str]
) -> None:
    expected = offered(**{key: "".join(zone) for key, zone in where.items()})
    groups = [CPU, GPU, LARGE]
    selected = zones.choose(groups, expected, usable)
    assert 2 <= len(selected.network) <= 3
    assert set(selected.network) <= usable
    for group in groups:
        for zone in selected.groups[group.name]:
            assert zone in selected.network
            assert any(zone in expected[kind] for kind in group.instance_types)
        # Nothing is lost: where two zones of the region would do for all, each has its place.
        if all(set(expected[kind]) >= usable for each in groups for kind in each.instance_types):
            assert selected.groups[group.name] == selected.network


def plan(overlay_label: str, config: dict[str, Any]) -> Layout:
    worker = {"groupName": "gpu", "template": {"spec": {
        "containers": [{"image": "x", "resources": {"limits": {"nvidia.com/gpu": 1}}}],
        "nodeSelector": {"qwen-ray-serve/workers": overlay_label},
    }}}  # fmt: skip
    service = {"kind": "RayService", "metadata": {"name": "x"},
               "spec": {"rayClusterConfig": {"workerGroupSpecs": [worker]}}}  # fmt: skip
    return layout.layout(config, [service])


@pytest.mark.parametrize("label", ["one-gpu", "tp2", "qwen-72b", "spot"])
def test_eksctl_is_given_the_groups_of_the_overlay_and_their_zones(label: str) -> None:
    config = yaml.safe_load((HERE / "cluster.yaml").read_text())
    of = plan(label, config)
    expected = {
        kind: frozenset(("x1a", "x1b", "x1c") if group.name == "cpu" else ("x1b",))
        for group in of.groups
        for kind in group.instance_types
    }
    made = zones.applied(config, of, zones.choose(of.groups, expected, ("x1a", "x1b", "x1c")))
    assert made["availabilityZones"] == ["x1a", "x1b"]
    cpu, gpu = made["managedNodeGroups"]
    assert (cpu["name"], gpu["labels"]["qwen-ray-serve/workers"]) == ("cpu", label)
    assert "availabilityZones" not in cpu
    assert gpu["availabilityZones"] == ["x1b"]
    schema = json.loads(schemas.shared("eksctl-0.230.0.json").read_text())
    errors = jsonschema.Draft7Validator(schema).iter_errors(made)
    assert [error.message[:200] for error in errors] == []
