"""What the cluster costs an hour, at rest and at full size, item by item.

At rest is with nobody asking: the node groups at their least, and the GPU nodes that the service's
least replicas need. Full size is every node group at its most. Spot is counted at the on-demand
price, and what follows use (traffic, log lines) is left out: `NOT_COUNTED` says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from kuberay import prices
from kuberay.layout import Layout, NodeGroup
from kuberay.prices import Rate

NOT_COUNTED = (
    "not counted: traffic, NAT per GB ($0.045), log lines taken in ($0.50 per GB), "
    "volumes of claims, storage of weights and images"
)


@dataclass(frozen=True)
class Item:
    """One line of the bill. `source` says where its price is from."""

    name: str
    at_rest: float
    at_most: float
    source: str


@dataclass(frozen=True)
class Bill:
    items: tuple[Item, ...]
    unknown: tuple[str, ...]

    @property
    def at_rest(self) -> float:
        return sum(item.at_rest for item in self.items)

    @property
    def at_most(self) -> float:
        return sum(item.at_most for item in self.items)

    def lines(self) -> list[str]:
        shown = [f"{'$/hour':<44} {'at rest':>9} {'at most':>9}"]
        for item in self.items:
            shown.append(
                f"{item.name:<44} {item.at_rest:>9.3f} {item.at_most:>9.3f}  {item.source}"
            )
        shown.append(f"{'together':<44} {self.at_rest:>9.3f} {self.at_most:>9.3f}")
        shown += [f"price not known: {name}" for name in self.unknown]
        return [*shown, NOT_COUNTED]


def bill(layout: Layout, rate: Callable[[str], Rate | None]) -> Bill:
    """Price a layout. `rate` gives the price of an instance type."""
    table = f"table of {prices.AS_OF}"
    items = [Item("EKS control plane", *_twice(prices.CONTROL_PLANE_PER_HOUR), table)]
    unknown = []
    for group in layout.groups:
        dearest = _dearest(group, rate)
        if dearest is None:
            unknown.append(f"{group.name}: {', '.join(group.instance_types)}")
            continue
        kind, priced = dearest
        disk = prices.volume_per_month("gp3", group.volume_gb) / prices.HOURS_PER_MONTH
        each = priced.usd_per_hour + disk
        least = at_rest(layout, group)
        name = f"{group.name}: {least} to {group.maximum} x {kind}{' (spot)' if group.spot else ''}"
        items.append(Item(name, least * each, group.maximum * each, priced.source))
    if layout.nat_gateways:
        each = prices.NAT_PER_HOUR + prices.PUBLIC_IP_PER_HOUR
        name = f"{layout.nat_gateways} NAT gateway with its address"
        items.append(Item(name, *_twice(layout.nat_gateways * each), table))
    if layout.load_balancers:
        each = prices.LOAD_BALANCER_PER_HOUR["network"]
        name = f"{layout.load_balancers} load balancer"
        items.append(Item(name, *_twice(layout.load_balancers * each), table))
    return Bill(tuple(items), tuple(unknown))


def at_rest(layout: Layout, group: NodeGroup) -> int:
    """Nodes of a group with nobody asking."""
    if group not in layout.gpu_groups or layout.service is None:
        return group.minimum
    # The first GPU group that can hold the service's least replicas does.
    first = layout.gpu_groups[0] == group
    needed = math.ceil(layout.service.least_gpus / group.gpus_per_node) if first else 0
    return min(max(group.minimum, needed), group.maximum)


def _twice(usd: float) -> tuple[float, float]:
    return usd, usd


def _dearest(group: NodeGroup, rate: Callable[[str], Rate | None]) -> tuple[str, Rate] | None:
    """The type of a group that costs most, with its price; None where one is not known."""
    rates = [(kind, rate(kind)) for kind in group.instance_types]
    priced_kinds = [(kind, priced) for kind, priced in rates if priced is not None]
    if len(priced_kinds) < len(rates):
        return None
    return max(priced_kinds, key=lambda pair: pair[1].usd_per_hour)
