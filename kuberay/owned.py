"""Which resources are a cluster's own, by their tags alone.

The teardown removes what is owned and nothing else, so this is the one place where that is decided.
`qwen-ray-serve/cluster` is put on by cluster.yaml and by `up`; where it is there it decides alone,
also against the other tags. The others are put on by what runs in the cluster, which knows nothing
of ours: eksctl, EKS, the load balancer controller, the CSI driver, the CNI, the autoscaler,
Karpenter. Another installer's cluster of the same name has some of them as well, so they count only
while a cluster of ours is there (`vouched` in search.py).

Roles and identity providers are global: two regions may each have a cluster of one name. They are
owned only where a tag, or the provider's address, also names the region. CloudFormation puts none
of its own tags on roles, so `up` gives every stack `qwen-ray-serve/region`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# The name of the image repository, and what the names of weights' buckets begin with.
PROJECT = "qwen-ray-serve"
CLUSTER = f"{PROJECT}/cluster"
REGION = f"{PROJECT}/region"
EXPIRES = f"{PROJECT}/expires"
ON_EXPIRY = f"{PROJECT}/on-expiry"

# Tags whose value is the name of the cluster.
_NAMED = (
    CLUSTER,
    "alpha.eksctl.io/cluster-name",
    "eksctl.cluster.k8s.io/v1alpha1/cluster-name",
    "eks:cluster-name",  # EKS, on what managed node groups make.
    "aws:eks:cluster-name",  # EKS, on the cluster's security group.
    "eks:eks-cluster-name",  # Karpenter.
    "elbv2.k8s.aws/cluster",  # AWS Load Balancer Controller.
    "ebs.csi.aws.com/cluster-name",  # EBS CSI driver.
    "cluster.k8s.amazonaws.com/name",  # VPC CNI, on network interfaces.
    "KubernetesCluster",
)


@dataclass(frozen=True)
class Owner:
    """A cluster, as the owner of resources."""

    name: str
    region: str

    @property
    def keys(self) -> list[str]:
        """Every tag key that can make a resource this cluster's: for filters of AWS."""
        return [*_NAMED, f"kubernetes.io/cluster/{self.name}", self._autoscaler]

    @property
    def _autoscaler(self) -> str:
        """The key by which the Cluster Autoscaler knows its groups, with whatever value."""
        return f"k8s.io/cluster-autoscaler/{self.name}"

    def marks(self, tags: Mapping[str, str]) -> bool:
        """Whether these tags have our own, for this cluster."""
        # Only `up` writes the region.
        return tags.get(CLUSTER) == self.name or (REGION in tags and self.owns(tags))

    def excludes(self, tags: Mapping[str, str]) -> bool:
        """Whether our own tag says that it is another cluster's, or no cluster's."""
        return CLUSTER in tags and tags[CLUSTER] != self.name

    def owns(self, tags: Mapping[str, str]) -> bool:
        """Whether any of these tags makes a resource of this region the cluster's."""
        if CLUSTER in tags:
            return tags[CLUSTER] == self.name
        # `shared` is what a cluster says of a network that was there before it.
        if tags.get(f"kubernetes.io/cluster/{self.name}") == "owned" or self._autoscaler in tags:
            return True
        return any(tags.get(key) == self.name for key in _NAMED)


def regions(tags: Mapping[str, str], address: str = "") -> set[str]:
    """The regions that the tags of a global resource, or its address, name."""
    names = {tags[REGION]} if REGION in tags else set()
    # oidc.eks.us-west-2.amazonaws.com/id/ABC
    host = address.split("/")[0].split(".")
    if host[:2] == ["oidc", "eks"] and len(host) > 2:
        names.add(host[2])
    return names
