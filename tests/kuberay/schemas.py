"""Validates manifests with the schemas of Kubernetes, KubeRay and Karpenter."""

import functools
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

SHARED = Path(__file__).parents[3] / "shared" / "schemas"
KUBERNETES = "1.35"  # cluster.yaml's.


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


@functools.cache
def custom(name: str, version: str) -> dict[str, Any]:
    """The schema of a CRD's version, under which an unknown field is an error."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # A megabyte of YAML.
    definition = yaml.load(shared(name).read_text(), Loader=loader)
    (results,) = [v for v in definition["spec"]["versions"] if v["name"] == version]
    schema: dict[str, Any] = results["schema"]["openAPIV3Schema"]
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _close(schema: dict[str, Any]) -> None:
    # The API server drops unknown fields without a word; here they are mistakes.
    properties = schema.get("properties")
    if properties is not None and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for each in (properties or {}).values():
        _close(each)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            _close(schema[key])


def defaulted(value: Any, schema: dict[str, Any]) -> Any:
    """`value` with the defaults that the API server fills in."""
    if isinstance(value, dict):
        filled = dict(value)
        for key, each in (schema.get("properties") or {}).items():
            if key in filled:
                filled[key] = defaulted(filled[key], each)
            elif "default" in each:
                filled[key] = each["default"]
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict) and not schema.get("properties"):
            filled = {key: defaulted(each, extra) for key, each in filled.items()}
        return filled
    if isinstance(value, list):
        return [defaulted(each, schema.get("items") or {}) for each in value]
    return value


def mistakes(document: Any, schema: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [
        f"{'.'.join(str(step) for step in error.absolute_path)}: {error.message[:200]}"
        for error in validator.iter_errors(defaulted(document, schema))
    ]


CUSTOM = {
    "RayService": ("kuberay-1.7.0/ray.io_rayservices.yaml", "v1"),
    "NodePool": ("karpenter-1.14.1/karpenter.sh_nodepools.yaml", "v1"),
    "EC2NodeClass": ("karpenter-1.14.1/karpenter.k8s.aws_ec2nodeclasses.yaml", "v1"),
}


@functools.cache
def validator() -> Any:
    """kubernetes-validate, which would read its schema of two megabytes for each document."""
    module = pytest.importorskip("kubernetes_validate.utils")
    module.schema_contents = functools.cache(module.schema_contents)
    return module


def check(document: dict[str, Any]) -> None:
    """Fail if the API server would refuse a manifest, or drop a part of it."""
    kind = document["kind"]
    if kind in CUSTOM:
        result = mistakes(document, custom(*CUSTOM[kind]))
        assert not result, result
        return
    validator().validate(document, KUBERNETES, strict=True)
