"""Where a model's weights come from: a bucket that has all of them, and the hub where it has not.

A worker that streams from a bucket which lacks a file, or which its role may not read, fails on a
GPU node, again and again, and the node bills. So that is looked at before anything is made, and
what is found decides: S3 if it is whole, else the model hub, which is said.
"""

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kuberay.aws import Account
from kuberay.errors import AwsError, EksError

_WORKER = "qwen-worker"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """`bucket` as it was given, or None for the hub. `mend` is what stands against the bucket."""

    bucket: str | None
    found: str
    mend: str = ""


def source(
    account: Account, config: Mapping[str, Any], model: str, bucket: str | None = None
) -> Source:
    """Choose for a model by its hub name; `config` is cluster.yaml, with the workers' role."""
    if bucket is None:
        return Source(None, f"{model} from the model hub")
    name, _, prefix = bucket.removeprefix("s3://").strip("/").partition("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name):
        raise EksError(f"{bucket!r} is no bucket's name: 3 to 63 of a-z, 0-9, - and .")
    folder = "/".join(part for part in (prefix, model) if part)
    address = f"s3://{name}/{folder}"
    if not readable(config, name):
        mend = f"a bucket that {_WORKER} of cluster.yaml may read, or its name in that policy"
        return Source(None, f"{address}: closed to the workers; from the hub instead", mend)
    try:
        lacks = lacking(account, name, folder)
    except AwsError as error:
        # Not knowing is no reason to do otherwise than told.
        return Source(bucket, f"{address}: not looked at: {error}", "see that it is whole")
    if lacks:
        mend = f"aws s3 sync FOLDER {address}, then this again"
        return Source(None, f"{address} lacks {lacks}; from the hub instead", mend)
    return Source(bucket, f"{address}, streamed")


def readable(config: Mapping[str, Any], bucket: str) -> bool:
    """Whether the role that cluster.yaml gives the workers reads this bucket; unknown is yes."""
    bound = (config.get("iam") or {}).get("podIdentityAssociations") or ()
    policies = [
        each["permissionPolicy"]
        for each in bound
        if each.get("serviceAccountName") == _WORKER and "permissionPolicy" in each
    ]
    if not policies:
        return True
    arn = f"arn:aws:s3:::{bucket}/x"
    return any(
        fnmatch.fnmatchcase(arn, resource)
        for policy in policies
        for statement in policy["Statement"]
        if "s3:GetObject" in _listed(statement["Action"])
        for resource in _listed(statement["Resource"])
        if resource.endswith("*")
    )


def lacking(account: Account, bucket: str, folder: str) -> str:
    """What a model's folder lacks; empty where it is whole.

    Raises:
        AwsError: the bucket could not be looked at.
    """
    try:
        pages = account.pages(
            "s3", "list_objects_v2", "Contents", Bucket=bucket, Prefix=f"{folder}/"
        )
        there = {item["Key"].removeprefix(f"{folder}/") for item in pages}
        wanted = {"config.json", "tokenizer_config.json"}
        if _INDEX in there:
            key = f"{folder}/{_INDEX}"
            body = account.call("s3", "get_object", Bucket=bucket, Key=key)["Body"].read()
            # A copy that was interrupted has the index, and some of what it names.
            wanted |= set(json.loads(body)["weight_map"].values())
        elif not any(name.endswith(".safetensors") for name in there):
            wanted.add("*.safetensors")
    except AwsError as error:
        if error.absent:
            return "the bucket itself"
        raise
    except (ValueError, KeyError) as error:
        return f"a {_INDEX} that can be read ({error!r})"
    return ", ".join(sorted(wanted - there))


def _listed(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]
