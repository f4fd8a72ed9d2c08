"""`python -m kuberay down`: the cluster, in the order that leaves no orphan, and its proof.

    mark          what the cluster's controllers made gets our own tag, while the cluster vouches
    services      RayServices and what they started, while the operator is there to end them
    finalizers    of those that did not end
    balancers     Services and Ingresses that hold a load balancer, while its controller is there
    volumes       what mounts them, then the claims, while the CSI driver is there
    node pools    Karpenter's, while it is there; then the node groups
    releases      what helm installed
    cluster       by eksctl, with its stacks
    leftovers     whatever still carries the cluster's tag, again and again until it is gone
    proof         a sweep; its exit status is this command's

Where no cluster of ours exists (any more), only what carries our own tag is removed: another
installer may have a cluster of this name, with the tags that Kubernetes writes.

There is no state file: each step looks at what is there, so a run that was interrupted is simply
run again. A step that fails is told and the next one goes on, because what fails most often (an
API server that is gone, a finalizer that hangs) is what the later steps make up for. A missing
permission costs what it protects, and nothing else.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kuberay import console, kinds, target, ttl
from kuberay.aws import Account, tags
from kuberay.cluster import status
from kuberay.console import say, step
from kuberay.errors import AwsError, EksError, InUse, PermissionMissing, Refused
from kuberay.kinds import marking
from kuberay.owned import CLUSTER, Owner
from kuberay.releases import installed
from kuberay.search import Found, Memory, Search
from kuberay.sweep import Gap, Sweep, report, sweep, vouched
from kuberay.target import Target
from kuberay.tools import Tools, tools

# Owners before what they own: the operator deletes clusters of a service that is still there anew.
_RAY = ("rayservices.ray.io", "rayjobs.ray.io", "rayclusters.ray.io")
# Long enough for the grace period of a worker whose streams finish (cluster.yaml's pods: 15 min.)
_RAY_S = 1200
_OBJECT_S = 300
# How often a removal that fails is tried.
_TRIES = 3
# Releases that clean up after the others: they go last.
_LAST = ("kuberay-operator", "aws-load-balancer-controller", "aws-ebs-csi-driver", "karpenter")


@dataclass(frozen=True)
class Pace:
    """How the leftovers are waited for: AWS takes minutes to let go of interfaces.

    Attributes:
        pause_s: between two rounds.
        patience_s: without any change, until they are given up on.
    """

    pause_s: float = 15.0
    patience_s: float = 900.0


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 nothing is left, 1 something is, 2 refused."""
    to = Target.of(options)
    if options.if_expired:
        limit = ttl.read(to.account, to.owner)
        now = datetime.now(UTC)
        if limit.expires is None and not status(to.account, to.owner.name):
            # Gone, or a teardown of which no stack is left to tell: say what there still is.
            return report(sweep(to.account, to.owner), options.json, options.report)
        say(f"{to.owner.name}: {limit.describe(now)}")
        if not limit.expired(now):
            return 0
        if limit.action != "down":
            say("it is tagged to be reported only: nothing was changed")
            return 1
    confirm(to, yes=options.yes or options.if_expired, keep_data=options.keep_data)
    with tools(to) as run:
        swept = down(to, run, options.keep_data, Pace(options.pause, options.patience))
    return report(swept, options.json, options.report)


def down(to: Target, run: Tools, keep_data: bool, pace: Pace) -> Sweep:
    """The whole way. Returns the proof."""
    account, name = to.account, to.owner.name
    ours = vouched(account, to.owner)
    if ours:
        attempt("mark", lambda: mark(account, to.owner))
    if status(account, name) in ("ACTIVE", "UPDATING") and attempt("connect", run.connect):
        attempt("services", lambda: end_services(run))
        attempt("finalizers", lambda: strip_finalizers(run))
        attempt("balancers", lambda: delete_balancers(run))
        if not keep_data:
            attempt("volumes", lambda: delete_volumes(run))
        attempt("node pools", lambda: delete_node_pools(to, run))
        attempt("releases", lambda: delete_releases(run, list(helm_releases(run))))
    attempt("cluster", lambda: delete_cluster(to, run))
    with step("leftovers"):
        return clear(to, keep_data, pace, ours=ours)


def attempt(name: str, act: Callable[[], None]) -> bool:
    """Take a step. Returns whether it went well; what went wrong is told, and no end."""
    try:
        with step(name):
            act()
    except EksError as error:
        say(f"    {name}: {error}; going on")
        return False
    return True


# --- before -----------------------------------------------------------------------------------


def confirm(to: Target, yes: bool, keep_data: bool) -> None:
    """Show what will go, and ask.

    Raises:
        Refused: the cluster of this name is not one of ours, or the person says no.
    """
    account, name = to.account, to.owner.name
    try:
        cluster = account.call("eks", "describe_cluster", name=name)["cluster"]
    except AwsError as error:
        if not error.absent:
            raise
    else:
        # eksctl's own tag would do for leftovers. A whole cluster that runs takes ours.
        if tags(cluster, "tags").get(CLUSTER) != name:
            raise Refused(
                f"the cluster {name} in {to.owner.region} does not carry the tag {CLUSTER}={name}: "
                f"it is not this project's, and stays"
            )
    if yes:
        return
    swept = sweep(account, to.owner)
    for line in swept.lines():
        say(line)
    data = [each for each in swept.left if kinds.BY_NAME[each.kind].data and each.tagged]
    fate = "which --keep-data keeps" if keep_data else "which cannot be made again"
    also = f", {len(data)} of them data, {fate}" if data else ""
    console.confirm(f"All of this is deleted{also}.", name, yes)


# --- in the cluster ---------------------------------------------------------------------------


def end_services(run: Tools) -> None:
    for kind in _RAY:
        if run.items(kind):
            run.kubectl("delete", kind, "--all", "--all-namespaces", f"--timeout={_RAY_S}s")


def strip_finalizers(run: Tools) -> None:
    """End what does not end by itself: Redis, which a finalizer cleans, goes anyway."""
    for kind in _RAY:
        for item in run.items(kind):
            where = item["metadata"]
            say(f"    {kind} {where['name']} still has {where.get('finalizers')}: taken off")
            patch = '{"metadata":{"finalizers":null}}'
            at = ("--namespace", where["namespace"], where["name"])
            run.kubectl("patch", kind, *at, "--type=merge", f"--patch={patch}")
            # It may have no deletion timestamp yet, where the first deletion never arrived.
            run.kubectl("delete", kind, *at, "--ignore-not-found", "--wait=false")


def delete_balancers(run: Tools) -> None:
    """Both kinds have a finalizer, so that kubectl waits until the controller is done with AWS."""
    if run.items("ingresses.networking.k8s.io"):
        run.kubectl(
            "delete", "ingresses.networking.k8s.io", "--all", "--all-namespaces",
            f"--timeout={_OBJECT_S}s",
        )  # fmt: skip
    for item in run.items("services"):
        if item["spec"].get("type") == "LoadBalancer":
            at = ("--namespace", item["metadata"]["namespace"], item["metadata"]["name"])
            run.kubectl("delete", "services", *at, f"--timeout={_OBJECT_S}s")


def delete_volumes(run: Tools) -> None:
    claims = run.items("persistentvolumeclaims")
    if not claims:
        return
    # Whoever mounts a volume holds it: operators, which make their StatefulSets anew, go first.
    delete_releases(run, [at for at in helm_releases(run) if at[0] not in _LAST])
    for namespace in sorted({claim["metadata"]["namespace"] for claim in claims}):
        # The CSI driver, which deletes the volumes, lives in kube-system.
        mounting = ("statefulsets", "deployments", "pods") if namespace != "kube-system" else ()
        for kind in mounting:
            at = ("--namespace", namespace, "--all", f"--timeout={_OBJECT_S}s")
            run.kubectl("delete", kind, *at)
        run.kubectl(
            "delete", "persistentvolumeclaims", "--namespace", namespace, "--all",
            f"--timeout={_OBJECT_S}s",
        )  # fmt: skip


def delete_node_pools(to: Target, run: Tools) -> None:
    for kind in ("nodepools.karpenter.sh", "nodeclaims.karpenter.sh"):
        if run.items(kind):
            run.kubectl("delete", kind, "--all", f"--timeout={2 * _OBJECT_S}s")
    name = to.owner.name
    pages = to.account.pages("eks", "list_nodegroups", "nodegroups", clusterName=name)
    for group in list(pages):
        # Eviction would ask a PodDisruptionBudget that nobody is left to satisfy.
        run.eksctl(
            "delete", "nodegroup", "--cluster", name, "--region", to.owner.region,
            "--name", group, "--disable-eviction", "--wait",
        )  # fmt: skip


def helm_releases(run: Tools) -> list[tuple[str, str]]:
    """Name and namespace of each release, in the order in which they are to go."""
    return sorted(installed(run), key=lambda at: (at[0] in _LAST, at))


def delete_releases(run: Tools, releases: list[tuple[str, str]]) -> None:
    for name, namespace in releases:
        # No hooks: there may be no node left to run them on.
        run.helm("uninstall", name, "--namespace", namespace, "--ignore-not-found", "--no-hooks")


# --- in the account ---------------------------------------------------------------------------


def mark(account: Account, owner: Owner) -> None:
    """Give our own tag to what only the tags of controllers make the cluster's.

    Once the cluster is gone nothing else vouches for it: a teardown that is interrupted then would
    leave it for good.
    """
    left = sweep(account, owner, Search(account, owner)).left
    names: dict[str, list[str]] = {}
    for resource in left:
        if resource.tagged and not resource.marked:
            names.setdefault(resource.kind, []).append(resource.id)
    for kind, ids in names.items():
        if marking.mark(account, kind, ids, owner.name):
            say(f"    {kind}: {', '.join(ids)}")


def delete_cluster(to: Target, run: Tools) -> None:
    """eksctl deletes the cluster and its stacks, also those of a creation that failed."""
    search = Search(to.account, to.owner, vouched(to.account, to.owner))
    stacks = list(kinds.BY_NAME["stack"].find(search))
    if not status(to.account, to.owner.name) and not any(stack.tagged for stack in stacks):
        say("    there is none")
        return
    if foreign := [stack.id for stack in stacks if not stack.tagged]:
        # eksctl goes by the name, and would delete these as well.
        say(f"    eksctl is not called, because of {', '.join(foreign)}, which is not ours")
        return
    run.eksctl(
        "delete", "cluster", "--name", to.owner.name, "--region", to.owner.region,
        "--force", "--disable-nodegroup-eviction", "--wait", "--timeout", "45m",
    )  # fmt: skip


def clear(
    to: Target,
    keep_data: bool,
    pace: Pace,
    clock: Callable[[], float] = time.monotonic,
    ours: bool | None = None,
) -> Sweep:
    """Remove what is the cluster's until nothing is left that can go. Returns the proof.

    Rounds, because one thing holds another (an interface its security group), and because AWS lets
    go late. A round that changes nothing is repeated for as long as `pace` has patience.

    Args:
        ours: whether a cluster of ours was there as the teardown began; None asks now.
    """
    if ours is None:
        ours = vouched(to.account, to.owner)
    memory = Memory()
    refusals: dict[tuple[str, str], list[AwsError]] = {}
    before: frozenset[Found] = frozenset()
    changed_s = clock()
    while True:
        swept = sweep(to.account, to.owner, Search(to.account, to.owner, ours, memory))
        todo = [resource for resource in swept.left if removable(resource, keep_data, refusals)]
        if frozenset(swept.left) != before:
            before, changed_s = frozenset(swept.left), clock()
        if not todo or clock() - changed_s > pace.patience_s:
            return dataclasses.replace(swept, refused=refused(refusals, swept))
        for resource in todo:
            if not resource.leaving:
                remove(to.account, resource, refusals)
        time.sleep(pace.pause_s)


Refusals = dict[tuple[str, str], list[AwsError]]


def removable(resource: Found, keep_data: bool, refusals: Refusals) -> bool:
    """Whether it may go, and there is hope that it will."""
    kind = kinds.BY_NAME[resource.kind]
    if not resource.tagged or kind.remove is None or (kind.data and keep_data):
        return False
    reasons = refusals.get((resource.kind, resource.id), [])
    # A permission does not come by asking again; anything else may.
    return len(reasons) < _TRIES and not any(
        isinstance(error, PermissionMissing) for error in reasons
    )


def remove(account: Account, resource: Found, refusals: Refusals) -> None:
    """Remove one thing, or remember why it cannot be."""
    act = kinds.BY_NAME[resource.kind].remove
    assert resource.tagged
    assert act is not None
    try:
        act(account, resource.id)
    except InUse as error:
        say(f"    {resource.kind} {resource.id}: not yet ({error.code})")
    except AwsError as error:
        if error.absent:
            return
        refusals.setdefault((resource.kind, resource.id), []).append(error)
        say(f"    {resource.kind} {resource.id}: {error}")
    else:
        say(f"    {resource.kind} {resource.id}: removed")


def refused(refusals: Refusals, swept: Sweep) -> tuple[Gap, ...]:
    """Why each thing that is left could not be removed."""
    gaps = []
    left = {(resource.kind, resource.id) for resource in swept.left}
    for (kind, name), errors in refusals.items():
        if (kind, name) not in left:
            continue
        error = errors[-1]
        named = (error.action, error.resource) if isinstance(error, PermissionMissing) else ("", "")
        gaps.append(Gap(f"{kind} {name}", str(error), *named))
    return tuple(gaps)


# --- the command line -------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    target.arguments(parser)
    add = parser.add_argument
    add("--yes", action="store_true", help="do not ask for confirmation")
    add("--keep-data", action="store_true", help="leave volumes, snapshots, file systems, logs, "
        "images and keys, and report them")  # fmt: skip
    add("--if-expired", action="store_true", help="delete only an expired cluster, without asking")
    add("--json", action="store_true", help="print the report as one JSON object")
    add("--report", type=Path, help="also write the report to this file")
    add("--pause", type=float, default=Pace.pause_s, help="seconds between rounds of leftovers")
    add("--patience", type=float, default=Pace.patience_s,
        help="seconds without progress after which it gives up")  # fmt: skip
