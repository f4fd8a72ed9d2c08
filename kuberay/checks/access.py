"""Who asks, with which programs, in which region, for which cluster's name."""

import shutil

from kuberay import tools
from kuberay.aws import Account, tags
from kuberay.checks.check import FAIL, OK, WARN, Check
from kuberay.errors import AwsError, ToolError
from kuberay.owned import CLUSTER
from kuberay.target import Target


def programs() -> list[Check]:
    """The commands that `up` and `down` call, and whether they are new enough."""
    checks = []
    for name, least in tools.LEAST.items():
        try:
            path = tools.find(name)
        except ToolError as error:
            mend = str(error).partition(": ")[2]
            checks.append(Check(name, FAIL, "not on PATH", mend))
            continue
        mend = f"install {tools.WHERE[name]}"
        try:
            answer = tools.version(name)
        except ToolError as error:
            checks.append(Check(name, WARN, str(error), mend))
            continue
        old, shown = answer < least, f"{path} {answer[0]}.{answer[1]}"
        checks.append(Check(name, FAIL if old else OK, shown, mend if old else ""))
    signer = shutil.which("aws") or shutil.which("aws-iam-authenticator")
    mend = "" if signer else f"install {tools.WHERE['aws']}"
    signer_found = signer or "neither aws nor aws-iam-authenticator is on PATH"
    return [*checks, Check("sign-in of kubectl", OK if signer else FAIL, signer_found, mend)]


def credentials(account: Account) -> list[Check]:
    who = account.identity
    return [Check("credentials", OK, f"{who['Arn']} in account {who['Account']}")]


def region(account: Account) -> list[Check]:
    key = "AvailabilityZones"
    zones = [
        zone["ZoneName"]
        for zone in account.call("ec2", "describe_availability_zones")[key]
        if zone["State"] == "available" and zone.get("ZoneType", "availability-zone")[0] == "a"
    ]
    status = OK if len(zones) >= 2 else FAIL
    mend = "" if status == OK else "EKS needs two zones: take another region"
    return [Check("region", status, f"{account.region}: {', '.join(zones)}", mend)]


def cluster(account: Account, to: Target) -> list[Check]:
    """Whether the name is free, or is ours to go on with."""
    name = to.owner.name
    try:
        description = account.call("eks", "describe_cluster", name=name)["cluster"]
    except AwsError as error:
        if error.absent:
            return [Check("name", OK, f"{name} is free in {account.region}")]
        raise
    if tags(description, "tags").get(CLUSTER) == name:
        return [Check("name", OK, f"{name} is there already ({description['status']}): up goes on")]
    mend = "give another --name, or change metadata.name"
    return [Check("name", FAIL, f"{name} is a cluster of somebody else's", mend)]
