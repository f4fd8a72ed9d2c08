"""Disks, snapshots, file systems, image repositories and buckets."""

from collections.abc import Iterator, Mapping
from typing import Any

from kuberay import prices
from kuberay.aws import Account, tags
from kuberay.errors import AwsError
from kuberay.owned import CLUSTER, PROJECT
from kuberay.search import Found, Search

GIB = 2**30
# Every EBS CSI driver writes this, whatever the cluster; only some are told to name theirs.
_CSI = "ebs.csi.aws.com/cluster"
_CLUSTERS_NAME = ("KubernetesCluster", "ebs.csi.aws.com/cluster-name", CLUSTER)
# Objects of a bucket that are counted: 10 pages. Weights are a few dozen.
_MOST_OBJECTS = 10_000


def volumes(search: Search) -> Iterator[Found]:
    for item in search.ec2("describe_volumes", "Volumes"):
        kind, carried = item["VolumeType"], tags(item)
        usd = prices.volume_per_month(
            kind, item["Size"], item.get("Iops", 0), item.get("Throughput", 0)
        )
        detail = f"{item['Size']} GiB {kind}, {item['State']} {carried.get('Name', '')}".rstrip()
        leaving = item["State"] == "deleting"
        if search.owner.owns(carried):
            search.memory.volumes.add(item["VolumeId"])
            yield from search.resource(
                "volume", item["VolumeId"], carried, usd, detail, leaving=leaving
            )
        elif item["State"] == "available" and _of_no_cluster(carried):
            detail = (
                f"{detail}; its CSI driver wrote no cluster's name and nothing uses it. If it is "
                f"not this cluster's, tag it {CLUSTER}=none"
            )
            yield Found("volume", item["VolumeId"], usd, detail, tagged=False)


def _of_no_cluster(carried: Mapping[str, str]) -> bool:
    if _CSI not in carried or any(key in carried for key in _CLUSTERS_NAME):
        return False
    return not any(key.startswith("kubernetes.io/cluster/") for key in carried)


def snapshots(search: Search) -> Iterator[Found]:
    seen = set()
    for item in search.ec2("describe_snapshots", "Snapshots", OwnerIds=["self"]):
        seen.add(item["SnapshotId"])
        usd = item["VolumeSize"] * prices.SNAPSHOT_PER_GB_MONTH
        detail = f"at most {item['VolumeSize']} GiB, of {item.get('VolumeId', '')}"
        yield from search.resource("snapshot", item["SnapshotId"], tags(item), usd, detail)
    for item in _of_volumes(search):
        if item["SnapshotId"] not in seen and CLUSTER not in tags(item):
            usd = item["VolumeSize"] * prices.SNAPSHOT_PER_GB_MONTH
            detail = f"at most {item['VolumeSize']} GiB, of the cluster's {item['VolumeId']}"
            yield Found("snapshot", item["SnapshotId"], usd, detail, tagged=False)


def _of_volumes(search: Search) -> Iterator[Any]:
    """Snapshots of the cluster's volumes, also of those that this command removed."""
    volumes = sorted(search.memory.volumes)
    for start in range(0, len(volumes), 200):  # As many as one filter of EC2 takes.
        inside = [{"Name": "volume-id", "Values": volumes[start : start + 200]}]
        yield from search.account.pages(
            "ec2", "describe_snapshots", "Snapshots", OwnerIds=["self"], Filters=inside
        )


def file_systems(search: Search) -> Iterator[Found]:
    for item in search.account.pages("efs", "describe_file_systems", "FileSystems"):
        size_gib = item.get("SizeInBytes", {}).get("Value", 0) / GIB
        usd = size_gib * prices.EFS_PER_GB_MONTH
        leaving = item["LifeCycleState"] == "deleting"
        yield from search.resource(
            "file system", item["FileSystemId"], tags(item), usd, f"{size_gib:.1f} GiB",
            leaving=leaving,
        )  # fmt: skip


def remove_file_system(account: Account, name: str) -> None:
    targets = account.pages("efs", "describe_mount_targets", "MountTargets", FileSystemId=name)
    for target in list(targets):
        if target["LifeCycleState"] != "deleting":
            account.call("efs", "delete_mount_target", MountTargetId=target["MountTargetId"])
    account.call("efs", "delete_file_system", FileSystemId=name)


def repositories(search: Search) -> Iterator[Found]:
    """The cluster's by their tag, and the project's: it serves all clusters, and bills on."""
    for item in search.account.pages("ecr", "describe_repositories", "repositories"):
        arn, name = item["repositoryArn"], item["repositoryName"]
        answer = search.account.call("ecr", "list_tags_for_resource", resourceArn=arn)
        carried = tags(answer, "tags")
        projects = name == PROJECT and CLUSTER not in carried
        if not projects and not search.owner.owns(carried):
            continue
        images = search.account.pages("ecr", "describe_images", "imageDetails", repositoryName=name)
        size_gb = sum(image.get("imageSizeInBytes", 0) for image in images) / prices.GB
        usd, detail = size_gb * prices.ECR_PER_GB_MONTH, f"{size_gb:.1f} GB of images"
        if projects:
            yield search.shared("image repository", name, usd, detail)
        else:
            yield from search.resource("image repository", name, carried, usd, detail)


def buckets(search: Search) -> Iterator[Found]:
    """The cluster's by their tag, and those of weights, which no teardown removes."""
    for item in search.account.call("s3", "list_buckets").get("Buckets", []):
        name = item["Name"]
        if not name.startswith(f"{PROJECT}-") and name not in search.bucket_names:
            continue
        where = search.account.call("s3", "get_bucket_location", Bucket=name)
        if (where.get("LocationConstraint") or "us-east-1") != search.owner.region:
            continue
        carried = _bucket_tags(search.account, name)
        size_gb, whole = _bucket_gb(search.account, name)
        usd = size_gb * prices.S3_PER_GB_MONTH
        detail = f"{'' if whole else 'more than '}{size_gb:.1f} GB"
        if CLUSTER not in carried:
            yield search.shared("bucket", name, usd, detail)
        else:
            yield from search.resource("bucket", name, carried, usd, detail)


def _bucket_tags(account: Account, name: str) -> dict[str, str]:
    try:
        return tags(account.call("s3", "get_bucket_tagging", Bucket=name), "TagSet")
    except AwsError as error:
        if error.code == "NoSuchTagSet":
            return {}
        raise


def _bucket_gb(account: Account, name: str) -> tuple[float, bool]:
    """The size of what a bucket holds, and whether all of it was counted."""
    size = 0
    pages = account.pages("s3", "list_objects_v2", "Contents", Bucket=name)
    for number, item in enumerate(pages, 1):
        size += item["Size"]
        if number == _MOST_OBJECTS:
            return size / prices.GB, False
    return size / prices.GB, True
