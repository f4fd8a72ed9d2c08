"""The image in its repository, by what is there and not only by its tag.

A tag can be pushed again. Nodes that have pulled it keep the old image, new nodes get the new one,
and the operator sees no change. So the manifests have the digest that the tag has now: an image
that was built anew is then a change of the pods, like any other.
"""

import re
from dataclasses import dataclass
from typing import Any

from kuberay.aws import Account
from kuberay.errors import AwsError

_ECR = re.compile(
    r"(\d{12})\.dkr\.ecr\.([\w-]+)\.amazonaws\.com/([^:@]+)(?::([^@]+))?(?:@(sha256:\w+))?"
)


@dataclass(frozen=True)
class Address:
    """An image in ECR. `tag` or `digest` is empty where the address names none."""

    registry: str
    region: str
    repository: str
    tag: str
    digest: str


def parsed(image: str) -> Address | None:
    """The parts of an image's address; None where it is not in ECR."""
    match = _ECR.fullmatch(image)
    if match is None:
        return None
    registry, region, repository, tag, digest = match.groups()
    return Address(registry, region, repository, tag or "", digest or "")


def described(account: Account, address: Address) -> dict[str, Any] | None:
    """What ECR knows of an image; None where it is not there.

    Raises:
        AwsError: it may not be asked, or does not answer.
    """
    wanted = {"imageDigest": address.digest} if address.digest else {"imageTag": address.tag}
    try:
        details: list[dict[str, Any]] = account.call(
            "ecr", "describe_images", registryId=address.registry,
            repositoryName=address.repository, imageIds=[wanted],
        )["imageDetails"]  # fmt: skip
    except AwsError as error:
        if error.absent:
            return None
        raise
    return details[0] if details else None


def pinned(account: Account, image: str) -> str:
    """An address with the digest that its tag has now, where ECR of this region says it."""
    address = parsed(image)
    if address is None or address.digest or address.region != account.region:
        return image
    try:
        details = described(account, address)
    except AwsError:
        return image  # The check of the image says why it is not known.
    return image if details is None else f"{image}@{details['imageDigest']}"
