"""Our own tag, put on what only the tags of controllers make the cluster's."""

from collections.abc import Sequence

from kuberay.aws import Account
from kuberay.owned import CLUSTER

# What EC2 tags by its id.
_OF_EC2 = (
    "instance", "NAT gateway", "VPC endpoint", "elastic IP", "network interface", "security group",
    "volume", "snapshot", "launch template", "subnet", "route table", "internet gateway", "VPC",
    "spot request",
)  # fmt: skip
_AT_ONCE = 20


def mark(account: Account, kind: str, names: Sequence[str], cluster: str) -> bool:
    """Tag things of one kind. Returns whether things of that kind can be tagged here."""
    tag = {"Key": CLUSTER, "Value": cluster}
    for start in range(0, len(names), _AT_ONCE):
        batch = list(names[start : start + _AT_ONCE])
        if kind in _OF_EC2:
            account.call("ec2", "create_tags", Resources=batch, Tags=[tag])
        elif kind in ("load balancer", "target group"):
            account.call("elbv2", "add_tags", ResourceArns=batch, Tags=[tag])
        elif kind == "classic load balancer":
            for name in batch:  # Its call takes one.
                account.call("elb", "add_tags", LoadBalancerNames=[name], Tags=[tag])
        elif kind == "auto scaling group":
            of = {"ResourceType": "auto-scaling-group", "PropagateAtLaunch": True}
            wanted = [{"ResourceId": name, **of, **tag} for name in batch]
            account.call("autoscaling", "create_or_update_tags", Tags=wanted)
        else:
            return False
    return True
