"""Which cluster a command is about.

Name, region, node groups and tags come from cluster.yaml, which eksctl reads too; `--name`,
`--region` and `--profile` stand in for them.
"""

import argparse
import functools
import re
from pathlib import Path
from typing import Any

import yaml

from kuberay.aws import Account
from kuberay.errors import EksError
from kuberay.owned import Owner

HERE = Path(__file__).parent


class Target:
    """A cluster of an account."""

    def __init__(
        self, config: dict[str, Any], name: str, region: str, profile: str | None = None
    ) -> None:
        self.config, self.profile = config, profile
        self.owner = Owner(name, region)

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Target":
        """The cluster that a command line means.

        Raises:
            EksError: its file cannot be read.
        """
        # A timer that takes clusters down knows their names, and has no folder of ours.
        named = options.name and options.region and not options.cluster.exists()
        config = {} if named else read(options.cluster)
        metadata = config.get("metadata") or {}
        name = options.name or metadata.get("name")
        region = options.region or metadata.get("region")
        if not name or not region:
            raise EksError(f"{options.cluster}: metadata.name and metadata.region are not set")
        return cls(config, cluster_name(str(name)), region_name(str(region)), options.profile)

    @functools.cached_property
    def account(self) -> Account:
        return Account(self.owner.region, self.profile)


def cluster_name(name: str) -> str:
    """A name that EKS, eksctl and CloudFormation take.

    Raises:
        EksError: it is none.
    """
    # It is part of the names of stacks, of which CloudFormation takes 128 characters.
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,49}", name):
        raise EksError(
            f"{name!r} is no name for a cluster: a letter, then letters, digits and -, 50 in all"
        )
    return name


def region_name(name: str) -> str:
    """A name as AWS writes its regions.

    Raises:
        EksError: it is none.
    """
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d{1,2}", name):
        raise EksError(f"{name!r} is no region of AWS, such as us-west-2")
    return name


def read(path: Path) -> dict[str, Any]:
    """A YAML file that holds one object."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise EksError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise EksError(f"{path}: is not a YAML object")
    return data


def arguments(parser: argparse.ArgumentParser) -> None:
    default = HERE / "cluster.yaml"
    parser.add_argument("--cluster", type=Path, default=default, help="default: %(default)s")
    parser.add_argument("--name", help="cluster name, instead of the file's")
    parser.add_argument("--region", help="region, instead of the file's")
    parser.add_argument("--profile", help="profile of the AWS configuration")
