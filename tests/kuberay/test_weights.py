"""Weights come from a bucket that has all of them, else from the hub, and it is said which."""

import json
from typing import Any

import pytest
import yaml

from kuberay import weights
from kuberay.aws import Account
from kuberay.preflight import Choice, documents
from kuberay.target import HERE, Target
from tests.kuberay.cloud import REGION, Cloud
from tests.kuberay.conftest import Commands
from tests.kuberay.test_preflight import checked, push

BUCKET = "qwen-ray-serve-weights"
MODEL = "Qwen/Qwen2.5-7B-Instruct"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def config() -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((HERE / "cluster.yaml").read_text())
    return result


def weigh(cloud: Cloud, model: str, bucket: str = BUCKET, leave: str = "") -> None:
    """A model's files in a bucket, less one."""
    s3 = cloud.client("s3")
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    files = {"model.safetensors.index.json": json.dumps(index)}
    files |= dict.fromkeys(("config.json", "tokenizer_config.json", *SHARDS), "{}")
    for name, body in files.items():
        if name != leave:
            s3.put_object(Bucket=bucket, Key=f"{model}/{name}", Body=body)


def source(bucket: str | None) -> weights.Source:
    return weights.source(Account(REGION), config(), MODEL, bucket)


def test_a_bucket_that_has_all_of_it_is_taken(cloud: Cloud) -> None:
    weigh(cloud, MODEL)
    result = source(BUCKET)
    assert (result.bucket, result.mend) == (BUCKET, "")
    assert result.found == f"s3://{BUCKET}/{MODEL}, streamed"


def test_a_folder_of_a_bucket_is_looked_into(cloud: Cloud) -> None:
    weigh(cloud, f"here/{MODEL}")
    given = f"s3://{BUCKET}/here/"
    assert source(given).bucket == given
    assert source(BUCKET).bucket is None


@pytest.mark.parametrize("leave", ["config.json", "tokenizer_config.json", SHARDS[1]])
def test_a_copy_that_was_interrupted_leaves_the_hub(cloud: Cloud, leave: str) -> None:
    weigh(cloud, MODEL, leave=leave)
    result = source(BUCKET)
    assert result.bucket is None
    assert f"lacks {leave}; from the hub instead" in result.found
    assert result.mend.startswith("aws s3 sync")


def test_one_file_of_weights_needs_no_index(cloud: Cloud) -> None:
    weigh(cloud, MODEL, leave="model.safetensors.index.json")
    assert source(BUCKET).bucket == BUCKET
    for name in SHARDS:
        cloud.client("s3").delete_object(Bucket=BUCKET, Key=f"{MODEL}/{name}")
    assert "lacks *.safetensors" in source(BUCKET).found


def test_no_bucket_leaves_the_hub(cloud: Cloud) -> None:
    assert "lacks the bucket itself" in source(BUCKET).found
    assert source(BUCKET).bucket is None
    assert source(None) == weights.Source(None, f"{MODEL} from the model hub")


def test_a_bucket_that_the_workers_may_not_read_leaves_the_hub(cloud: Cloud) -> None:
    weigh(cloud, MODEL, bucket="somewhere-else")
    result = source("somewhere-else")
    assert result.bucket is None
    assert "closed to the workers" in result.found
    # A policy of one's own may name it.
    mine = config()
    (bound,) = [
        each
        for each in mine["iam"]["podIdentityAssociations"]
        if each["serviceAccountName"] == "qwen-worker"
    ]
    bound["permissionPolicy"]["Statement"][0]["Resource"].append("arn:aws:s3:::somewhere-else/*")
    assert weights.source(Account(REGION), mine, MODEL, "somewhere-else").bucket


def test_a_bucket_that_we_may_not_list_is_taken_and_the_permission_named(cloud: Cloud) -> None:
    weigh(cloud, MODEL)
    cloud.faults.deny("s3:ListBucket", f"arn:aws:s3:::{BUCKET}")
    result = source(BUCKET)
    assert result.bucket == BUCKET
    assert f"missing permission: s3:ListBucket on arn:aws:s3:::{BUCKET}" in result.found


def test_preflight_says_it_and_the_manifests_follow(cloud: Cloud, kustomize: Commands) -> None:
    push(cloud)
    for code in ("L-1216C47A", "L-DB2E81BA"):
        cloud.extras.quotas[code] = 256.0
    weigh(cloud, MODEL, leave=SHARDS[0])
    result, checks = checked("--bucket", BUCKET)
    # The hub serves as well: no reason to stop.
    assert (result.returncode, checks["weights"]["status"]) == (0, "warn")
    assert model() == MODEL
    cloud.client("s3").put_object(Bucket=BUCKET, Key=f"{MODEL}/{SHARDS[0]}", Body="{}")
    assert checked("--bucket", BUCKET)[1]["weights"]["status"] == "ok"
    assert model() == f"s3://{BUCKET}/{MODEL}"


def model() -> str:
    """What the manifests with the bucket tell the application to serve."""
    manifests, _ = documents(Target(config(), "ours", REGION), Choice(bucket=BUCKET))
    (service,) = [each for each in manifests if each["kind"] == "RayService"]
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    return str(serve["applications"][0]["args"]["model"])
