"""The EKS cluster: eksctl makes it, and what an interrupted run left out is made afterwards.

`eksctl create cluster` works in this order and cannot be run a second time:

    network and control plane    one stack
    add-ons that nodes need      before the nodes
    node groups                  a stack each
    the other add-ons
    pod identities               the AWS roles of pods, a stack each

So where a cluster of ours exists, its parts are compared with cluster.yaml, and each part that is
missing is made by the eksctl command for that part alone. The role of a part has a stack of its
own, whose name is fixed: a stack without its part is deleted first, because eksctl would stop at
"already exists".
"""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from kuberay import ttl
from kuberay.aws import Account, tags
from kuberay.console import say
from kuberay.errors import AwsError, Refused
from kuberay.owned import CLUSTER, REGION, Owner
from kuberay.stacks import Stacks
from kuberay.target import Target
from kuberay.tools import Tools
from kuberay.ttl import Ttl

Config = dict[str, Any]
# The log groups of EKS and of the pods, and for how many days they keep lines.
_LOG_GROUPS = {"cluster": 7, "ray": 14}
# Add-ons without which a node does not become ready. CoreDNS is not among them: without nodes it
# stays degraded, and eksctl would wait for it.
_BEFORE_NODES = ("eks-pod-identity-agent", "vpc-cni", "kube-proxy")
# What eksctl installs unless `addonsConfig.disableDefaultAddons` is set.
_DEFAULT_ADDONS = ("vpc-cni", "kube-proxy", "coredns", "metrics-server")


def create(to: Target, run: Tools, config: Config, limit: Ttl) -> None:
    """Bring the cluster to what `config` (an eksctl ClusterConfig) describes.

    Raises:
        Refused: a cluster or a stack of this name belongs to somebody else.
    """
    account, name = to.account, to.owner.name
    make_log_groups(account, to.owner)
    if not recovered(account, to.owner):
        where = ("--kubeconfig", str(run.kubeconfig))
        run.eksctl("create", "cluster", "--config-file", "-", *where, stdin=yaml.safe_dump(config))
    else:
        # Before the parts, which take long: a timer may be about to take the cluster down.
        ttl.write(account, to.owner, limit)
    complete(account, to.owner, run, config)
    say(f"    {name} is complete: node groups, add-ons and pod identities")


def configured(to: Target, limit: Ttl, config: Mapping[str, Any] | None = None) -> Config:
    """cluster.yaml, or what was chosen of it, with the name, the region and teardown's tags."""
    config = dict(to.config if config is None else config)
    metadata = dict(config.get("metadata") or {})
    metadata["name"], metadata["region"] = to.owner.name, to.owner.region
    ours = {CLUSTER: to.owner.name, REGION: to.owner.region, **limit.tags}
    metadata["tags"] = {**(metadata.get("tags") or {}), **ours}
    return {**config, "metadata": metadata}


def make_log_groups(account: Account, owner: Owner) -> None:
    """Make the log groups before EKS and the pods do: theirs would carry no tag."""
    ours = {CLUSTER: owner.name, REGION: owner.region}
    for kind, days in _LOG_GROUPS.items():
        name = f"/aws/eks/{owner.name}/{kind}"
        try:
            account.call("logs", "create_log_group", logGroupName=name, tags=ours)
        except AwsError as error:
            if error.code != "ResourceAlreadyExistsException":
                raise
        account.call("logs", "put_retention_policy", logGroupName=name, retentionInDays=days)


# --- network and control plane -----------------------------------------------------------------


def status(account: Account, name: str) -> str:
    """The status of a cluster in EKS; empty when there is none."""
    try:
        return str(account.call("eks", "describe_cluster", name=name)["cluster"]["status"])
    except AwsError as error:
        if error.absent:
            return ""
        raise


def recovered(account: Account, owner: Owner) -> bool:
    """Whether an earlier run made the control plane; what is in progress is waited for.

    Raises:
        Refused: the cluster, or its stack, belongs to somebody else.
    """
    stacks, stack = Stacks(account, owner), f"eksctl-{owner.name}-cluster"
    if not status(account, owner.name):
        if not stacks.named(stack):
            return False
        if not stacks.ours(stack):
            raise Refused(f"the stack {stack} does not carry the tag {CLUSTER}={owner.name}")
        stacks.settled(stack)
        if not status(account, owner.name):
            # Rolled back, or about to be: nothing can go on from it.
            stacks.remove(stack)
            return False
    cluster = account.call("eks", "describe_cluster", name=owner.name)["cluster"]
    if not owner.marks(tags(cluster, "tags")):
        raise Refused(f"the cluster {owner.name} does not carry the tag {CLUSTER}={owner.name}")
    # The stack ends after the cluster: it still adds rules and tags to it.
    stacks.settled(stack)
    if cluster["status"] == "CREATING":
        say(f"    the control plane of {owner.name} is being created: waiting")
        account.wait("eks", "cluster_active", name=owner.name)
    return True


# --- the parts ---------------------------------------------------------------------------------


def complete(account: Account, owner: Owner, run: Tools, config: Config) -> None:
    """Make the parts that the cluster lacks."""
    addons = list(_addons(config))
    early = [addon for addon in addons if addon["name"] in _BEFORE_NODES]
    _add_addons(account, owner, run, config, early)
    _add_node_groups(account, owner, run, config)
    _add_addons(account, owner, run, config, [addon for addon in addons if addon not in early])
    _add_pod_identities(account, owner, run, config)


def _addons(config: Mapping[str, Any]) -> Iterable[Config]:
    listed = list(config.get("addons") or ())
    yield from listed
    if not (config.get("addonsConfig") or {}).get("disableDefaultAddons"):
        names = {addon["name"] for addon in listed}
        yield from ({"name": name} for name in _DEFAULT_ADDONS if name not in names)


def _add_addons(
    account: Account, owner: Owner, run: Tools, config: Config, wanted: list[Config]
) -> None:
    listed = set(account.pages("eks", "list_addons", "addons", clusterName=owner.name))
    missing = [
        addon
        for addon in wanted
        if addon["name"] not in listed or _failed_addon(account, owner.name, addon["name"])
    ]
    if not missing:
        return
    stacks = Stacks(account, owner)
    for addon in missing:
        own = f"eksctl-{owner.name}-addon-{addon['name']}"
        for stack in stacks.named(own, prefix=f"{own}-podidentityrole-"):
            stacks.remove(stack)
    _say_missing("add-ons", (addon["name"] for addon in missing))
    partial = {**config, "addons": missing}
    # --force: a copy that is not managed by EKS is taken over, as `create cluster` does.
    _create(run, "addon", partial, "--force")


def _failed_addon(account: Account, cluster: str, name: str) -> bool:
    """Remove an add-on whose creation failed: EKS keeps it, and never tries it again."""
    of = {"clusterName": cluster, "addonName": name}
    state = account.call("eks", "describe_addon", **of)["addon"]["status"]
    if state == "CREATE_FAILED":
        account.call("eks", "delete_addon", **of)
    elif state != "DELETING":
        return False
    account.wait("eks", "addon_deleted", **of)
    return True


def _add_node_groups(account: Account, owner: Owner, run: Tools, config: Config) -> None:
    wanted = {group["name"]: group for group in config.get("managedNodeGroups") or ()}
    stacks = Stacks(account, owner)
    stack = {name: f"eksctl-{owner.name}-nodegroup-{name}" for name in wanted}
    for name in wanted:
        stacks.settled(stack[name])
    listed = set(account.pages("eks", "list_nodegroups", "nodegroups", clusterName=owner.name))
    missing = [
        name for name in wanted if name not in listed or not _usable(account, owner.name, name)
    ]
    if not missing:
        return
    for name in missing:
        stacks.remove(stack[name])
    _say_missing("node groups", missing)
    partial = {**config, "managedNodeGroups": [wanted[name] for name in missing]}
    # These belong to a network that is to be made, and this one exists.
    partial.pop("availabilityZones", None)
    _create(run, "nodegroup", partial)


def _usable(account: Account, cluster: str, group: str) -> bool:
    """Whether a node group works, or will: one whose creation failed is removed."""
    of = {"clusterName": cluster, "nodegroupName": group}
    state = account.call("eks", "describe_nodegroup", **of)["nodegroup"]["status"]
    if state == "CREATING":
        account.wait("eks", "nodegroup_active", **of)
    if state not in ("CREATE_FAILED", "DELETING"):
        return True
    if state == "CREATE_FAILED":
        account.call("eks", "delete_nodegroup", **of)
    account.wait("eks", "nodegroup_deleted", **of)
    return False


def _add_pod_identities(account: Account, owner: Owner, run: Tools, config: Config) -> None:
    wanted = list((config.get("iam") or {}).get("podIdentityAssociations") or ())
    pages = account.pages(
        "eks", "list_pod_identity_associations", "associations", clusterName=owner.name
    )
    listed = {(page["namespace"], page["serviceAccount"]) for page in pages}
    missing = [each for each in wanted if _identity(each) not in listed]
    if not missing:
        return
    stacks = Stacks(account, owner)
    for each in missing:
        stacks.remove(f"eksctl-{owner.name}-podidentityrole-{'-'.join(_identity(each))}")
    _say_missing("pod identities", ("/".join(_identity(each)) for each in missing))
    partial = {**config, "iam": {**config["iam"], "podIdentityAssociations": missing}}
    _create(run, "podidentityassociation", partial)


def _identity(association: Mapping[str, Any]) -> tuple[str, str]:
    return str(association["namespace"]), str(association["serviceAccountName"])


def _say_missing(what: str, names: Iterable[str]) -> None:
    say(f"    {what} to be made: {', '.join(names)}")


def _create(run: Tools, what: str, config: Config, *flags: str) -> None:
    run.eksctl("create", what, "--config-file", "-", *flags, stdin=yaml.safe_dump(config))
