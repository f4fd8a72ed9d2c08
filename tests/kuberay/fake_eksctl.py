"""eksctl 0.230 for the tests: what it makes, in its order, and what it refuses to make twice.

Read from its source: pkg/ctl/create/cluster.go (the order), pkg/actions/addon/create.go,
pkg/actions/nodegroup/create.go, pkg/actions/podidentityassociation/creator.go. A run may be
stopped after any number of steps, as a signal or a lost connection stops the real one.
"""

from __future__ import annotations

import json
import re
import sys

import fake_aws

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Config = dict[str, Any]

VERSION = "0.230.0"
_ROLE = "arn:aws:iam::123456789012:role/made-by-eksctl"
_TEMPLATE = json.dumps({"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}})
_BEFORE_NODES = ("eks-pod-identity-agent", "vpc-cni", "kube-proxy", "coredns")
# Add-ons with an AWS role, and the service account that has it.
_WITH_ROLE = {"vpc-cni": "aws-node", "aws-ebs-csi-driver": "ebs-csi-controller-sa"}


class Stopped(Exception):
    """The run was stopped between two steps."""


class Failed(Exception):
    """What eksctl prints last, before it ends with status 1."""


class Steps:
    """Everything that eksctl makes, each a step. `left` of None: as many as it takes."""

    def __init__(self, config: Config, left: int | None) -> None:
        self.name = config["metadata"]["name"]
        self.tags = dict(config["metadata"].get("tags") or {})
        self._left = left

    def step(self) -> None:
        if self._left == 0:
            raise Stopped
        if self._left is not None:
            self._left -= 1

    def stack(self, name: str) -> None:
        self.step()
        if name in stacks():
            raise Failed(f'creating CloudFormation stack "{name}": Stack [{name}] already exists')
        more = {"StackName": name, "TemplateBody": _TEMPLATE}
        named = {"alpha.eksctl.io/cluster-name": self.name, **self.tags}
        for number, (key, value) in enumerate(named.items(), 1):
            more[f"Tags.member.{number}.Key"] = key
            more[f"Tags.member.{number}.Value"] = value
        fake_aws.query("cloudformation", "CreateStack", **more)

    def control_plane(self, config: Config) -> None:
        self.stack(f"eksctl-{self.name}-cluster")
        self.step()
        fake_aws.eks(
            "POST",
            "/clusters",
            name=self.name,
            roleArn=_ROLE,
            version=str(config["metadata"]["version"]),
            resourcesVpcConfig={"subnetIds": _subnets()},
            tags={"alpha.eksctl.io/cluster-name": self.name, **self.tags},
        )

    def addon(self, addon: Config) -> None:
        name = addon["name"]
        if name in fake_aws.eks("GET", f"/clusters/{self.name}/addons")["addons"]:
            return
        if account := _WITH_ROLE.get(name):
            self.stack(f"eksctl-{self.name}-addon-{name}-podidentityrole-{account}")
        self.step()
        fake_aws.eks("POST", f"/clusters/{self.name}/addons", addonName=name)

    def node_group(self, group: Config) -> None:
        name = group["name"]
        there = fake_aws.eks("GET", f"/clusters/{self.name}/node-groups")["nodegroups"]
        if name in there or f"eksctl-{self.name}-nodegroup-{name}" in stacks():
            return  # One that exists, or whose stack does, is left out.
        self.stack(f"eksctl-{self.name}-nodegroup-{name}")
        self.step()
        fake_aws.eks(
            "POST",
            f"/clusters/{self.name}/node-groups",
            nodegroupName=name,
            nodeRole=_ROLE,
            subnets=_subnets(),
            instanceTypes=group["instanceTypes"],
            scalingConfig={
                "minSize": group["minSize"],
                "maxSize": group["maxSize"],
                "desiredSize": group["desiredCapacity"],
            },
            tags=self.tags,
        )

    def pod_identity(self, association: Config) -> None:
        where = (association["namespace"], association["serviceAccountName"])
        self.stack(f"eksctl-{self.name}-podidentityrole-{'-'.join(where)}")
        self.step()
        path = f"/clusters/{self.name}/pod-identity-associations"
        fake_aws.eks("POST", path, namespace=where[0], serviceAccount=where[1], roleArn=_ROLE)


def main(argv: list[str], stdin: str, steps: int | None) -> int:
    try:
        return _main(argv, stdin, steps)
    except Failed as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def _main(argv: list[str], stdin: str, left: int | None) -> int:
    if argv[0] == "version":
        print(VERSION)
        return 0
    if argv[0] == "create":
        import yaml

        config = yaml.load(stdin, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _create(argv[1], config, Steps(config, left))
        return 0
    if argv[:2] == ["utils", "write-kubeconfig"]:
        with open(_value(argv, "--kubeconfig"), "w") as file:
            file.write("kind: Config\n")
        return 0
    if argv[:2] == ["delete", "nodegroup"]:
        name, group = _value(argv, "--cluster"), _value(argv, "--name")
        fake_aws.eks("DELETE", f"/clusters/{name}/node-groups/{group}")
        return 0
    if argv[:2] == ["delete", "cluster"]:
        return _delete_cluster(_value(argv, "--name"))
    raise Failed(f"unknown command {argv}")


def _create(what: str, config: Config, steps: Steps) -> None:
    addons = config.get("addons") or []
    groups = config.get("managedNodeGroups") or []
    identities = (config.get("iam") or {}).get("podIdentityAssociations") or []
    if what == "cluster":
        if steps.name in fake_aws.eks("GET", "/clusters")["clusters"]:
            raise Failed(f'creating CloudFormation stack "eksctl-{steps.name}-cluster": exists')
        steps.control_plane(config)
        early = [addon for addon in addons if addon["name"] in _BEFORE_NODES]
        for addon in early:
            steps.addon(addon)
        for group in groups:
            steps.node_group(group)
        for addon in addons:
            if addon not in early:
                steps.addon(addon)
        for association in identities:
            steps.pod_identity(association)
    elif what == "addon":
        if not addons:
            raise Failed("no addons specified")
        nodes = fake_aws.eks("GET", f"/clusters/{steps.name}/node-groups")["nodegroups"]
        for addon in addons:
            if addon["name"] == "coredns" and groups and not nodes:
                raise Failed('timed out waiting for addon "coredns" to become active')
            steps.addon(addon)
    elif what == "nodegroup":
        for group in groups:
            steps.node_group(group)
    elif what == "podidentityassociation":
        if not identities:
            raise Failed("no iam.podIdentityAssociations specified in the config file")
        installed = fake_aws.eks("GET", f"/clusters/{steps.name}/addons")["addons"]
        if "eks-pod-identity-agent" not in installed:
            raise Failed('the "eks-pod-identity-agent" addon must be installed')
        for association in identities:
            steps.pod_identity(association)
    else:
        raise Failed(f"unknown command create {what}")


def _delete_cluster(name: str) -> int:
    if name in fake_aws.eks("GET", "/clusters")["clusters"]:
        for group in fake_aws.eks("GET", f"/clusters/{name}/node-groups")["nodegroups"]:
            fake_aws.eks("DELETE", f"/clusters/{name}/node-groups/{group}")
        fake_aws.eks("DELETE", f"/clusters/{name}")
    for stack in stacks():
        if stack.startswith(f"eksctl-{name}-"):
            fake_aws.query("cloudformation", "DeleteStack", StackName=stack)
    print(f"[✔]  all cluster resources were deleted: {name}")
    return 0


def stacks() -> set[str]:
    listed = fake_aws.query("cloudformation", "DescribeStacks")
    return set(re.findall(r"<StackName>(.*?)</StackName>", listed))


def _subnets() -> list[str]:
    listed = fake_aws.query("ec2", "DescribeSubnets")
    return sorted(set(re.findall(r"<subnetId>(.*?)</subnetId>", listed)))[:2]


def _value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1] if flag in argv else ""
