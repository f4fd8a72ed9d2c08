"""What things cost: a dated table, and AWS's own price list where it answers.

The table is on-demand list prices, Linux, of us-east-1 in September 2026, which us-west-2 has
shared for these types; other regions cost up to half as much again. Left out everywhere, because it
follows use and not existence: data transfer, load balancer capacity units, NAT per GB, requests.
Spot is counted at the on-demand price: what it costs at most.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from kuberay.aws import Account
from kuberay.errors import AwsError

AS_OF = "2026-09"
# AWS's own month: 365 * 24 / 12.
HOURS_PER_MONTH = 730.0
GB = 1e9


@dataclass(frozen=True)
class Instance:
    """An instance type: what it costs, and what a quota and a model need to know of it.

    Attributes:
        gpu: name of the GPU in `serve_app.planning.hardware.ACCELERATORS`; empty without one.
    """

    usd_per_hour: float
    vcpus: int
    gpus: int = 0
    gpu: str = ""


INSTANCES: Mapping[str, Instance] = {
    # For the head, the operator and monitoring.
    "t3.medium": Instance(0.0416, 2),
    "t3.large": Instance(0.0832, 2),
    "t3.xlarge": Instance(0.1664, 4),
    "m5.large": Instance(0.096, 2),
    "m5.xlarge": Instance(0.192, 4),
    "m5.2xlarge": Instance(0.384, 8),
    "m6a.large": Instance(0.0864, 2),
    "m6a.xlarge": Instance(0.1728, 4),
    "m6i.large": Instance(0.096, 2),
    "m6i.xlarge": Instance(0.192, 4),
    "m6i.2xlarge": Instance(0.384, 8),
    "m7i.large": Instance(0.1008, 2),
    "m7i.xlarge": Instance(0.2016, 4),
    "m7i.2xlarge": Instance(0.4032, 8),
    "m7g.large": Instance(0.0816, 2),
    "m7g.xlarge": Instance(0.1632, 4),
    "c7i.large": Instance(0.08925, 2),
    "c7i.xlarge": Instance(0.1785, 4),
    # A10G, 24 GB
    "g5.xlarge": Instance(1.006, 4, 1, "A10G"),
    "g5.2xlarge": Instance(1.212, 8, 1, "A10G"),
    "g5.4xlarge": Instance(1.624, 16, 1, "A10G"),
    "g5.8xlarge": Instance(2.448, 32, 1, "A10G"),
    "g5.12xlarge": Instance(5.672, 48, 4, "A10G"),
    "g5.16xlarge": Instance(4.096, 64, 1, "A10G"),
    "g5.24xlarge": Instance(8.144, 96, 4, "A10G"),
    "g5.48xlarge": Instance(16.288, 192, 8, "A10G"),
    # L4, 24 GB
    "g6.xlarge": Instance(0.8048, 4, 1, "L4"),
    "g6.2xlarge": Instance(0.9776, 8, 1, "L4"),
    "g6.4xlarge": Instance(1.3232, 16, 1, "L4"),
    "g6.8xlarge": Instance(2.0144, 32, 1, "L4"),
    "g6.12xlarge": Instance(4.6016, 48, 4, "L4"),
    "g6.16xlarge": Instance(3.3968, 64, 1, "L4"),
    "g6.24xlarge": Instance(6.6752, 96, 4, "L4"),
    "g6.48xlarge": Instance(13.3504, 192, 8, "L4"),
    # L40S, 48 GB
    "g6e.xlarge": Instance(1.861, 4, 1, "L40S"),
    "g6e.2xlarge": Instance(2.24208, 8, 1, "L40S"),
    "g6e.4xlarge": Instance(3.00424, 16, 1, "L40S"),
    "g6e.8xlarge": Instance(4.52856, 32, 1, "L40S"),
    "g6e.12xlarge": Instance(10.49264, 48, 4, "L40S"),
    "g6e.16xlarge": Instance(7.57719, 64, 1, "L40S"),
    "g6e.24xlarge": Instance(15.06559, 96, 4, "L40S"),
    "g6e.48xlarge": Instance(30.13118, 192, 8, "L40S"),
    # A100, 40 and 80 GB
    "p4d.24xlarge": Instance(21.957642, 96, 8, "A100-40G"),
    "p4de.24xlarge": Instance(27.44705, 96, 8, "A100-80G"),
    # H100, 80 GB, and H200, 141 GB
    "p5.4xlarge": Instance(6.88, 16, 1, "H100"),
    "p5.48xlarge": Instance(55.04, 192, 8, "H100"),
    "p5en.48xlarge": Instance(63.296, 192, 8, "H200"),
}

CONTROL_PLANE_PER_HOUR = 0.10
# From 14 months after a Kubernetes version came.
CONTROL_PLANE_EXTENDED_PER_HOUR = 0.60
NAT_PER_HOUR = 0.045
# Every public IPv4 address, in use or not.
PUBLIC_IP_PER_HOUR = 0.005
# An interface endpoint, in each zone.
ENDPOINT_PER_HOUR = 0.01
LOAD_BALANCER_PER_HOUR: Mapping[str, float] = {
    "application": 0.0225,
    "network": 0.0225,
    "gateway": 0.0125,
    "classic": 0.025,
}
VOLUME_PER_GB_MONTH: Mapping[str, float] = {
    "gp3": 0.08,
    "gp2": 0.10,
    "io1": 0.125,
    "io2": 0.125,
    "st1": 0.045,
    "sc1": 0.015,
    "standard": 0.05,
}
SNAPSHOT_PER_GB_MONTH = 0.05
EFS_PER_GB_MONTH = 0.30
ECR_PER_GB_MONTH = 0.10
LOGS_PER_GB_MONTH = 0.03
LOGS_PER_GB_TAKEN_IN = 0.50
KEY_PER_MONTH = 1.00
S3_PER_GB_MONTH = 0.023
SECRET_PER_MONTH = 0.40
ZONE_PER_MONTH = 0.50

_GP3_FREE_IOPS, _GP3_FREE_MIB_PER_S = 3000, 125
_IOPS_PER_MONTH: Mapping[str, float] = {"gp3": 0.005, "io1": 0.065, "io2": 0.065}
_GP3_MIB_PER_S_MONTH = 0.04


def monthly(usd_per_hour: float) -> float:
    return usd_per_hour * HOURS_PER_MONTH


def volume_per_month(kind: str, size_gb: float, iops: int = 0, mib_per_s: int = 0) -> float:
    """A volume's price with what was provisioned beyond its size."""
    free = _GP3_FREE_IOPS if kind == "gp3" else 0
    extra = max(0, iops - free) * _IOPS_PER_MONTH.get(kind, 0.0)
    if kind == "gp3":
        extra += max(0, mib_per_s - _GP3_FREE_MIB_PER_S) * _GP3_MIB_PER_S_MONTH
    # A kind that is not known costs what the dearest does.
    return size_gb * VOLUME_PER_GB_MONTH.get(kind, 0.125) + extra


def instance_per_hour(kind: str) -> float | None:
    """From the table; None for a type that is not in it."""
    listed = INSTANCES.get(kind)
    return None if listed is None else listed.usd_per_hour


@dataclass(frozen=True)
class Rate:
    """Dollars an hour for an instance type. `source` says whether it is today's."""

    usd_per_hour: float
    source: str


def rate(account: Account, kind: str) -> Rate | None:
    """AWS's price of today, or the table's; None where neither knows the type.

    That the price list does not answer, or may not be asked, is no reason to stop: the table is
    what it is for.
    """
    try:
        live = _live(account, kind)
    except AwsError:
        live = None
    if live is not None:
        return Rate(live, "live")
    listed = instance_per_hour(kind)
    return None if listed is None else Rate(listed, f"table of {AS_OF}")


def _live(account: Account, kind: str) -> float | None:
    """The on-demand price of an instance type in the account's region."""
    wanted = {
        "instanceType": kind,
        "regionCode": account.region,
        "operatingSystem": "Linux",
        "preInstalledSw": "NA",
        "tenancy": "Shared",
        "capacitystatus": "Used",
    }
    filters = [{"Type": "TERM_MATCH", "Field": f, "Value": v} for f, v in wanted.items()]
    products = account.call("pricing", "get_products", ServiceCode="AmazonEC2", Filters=filters)
    for product in products.get("PriceList", []):
        terms = json.loads(product).get("terms", {}).get("OnDemand", {})
        for term in terms.values():
            for dimension in term.get("priceDimensions", {}).values():
                usd = float(dimension.get("pricePerUnit", {}).get("USD", 0))
                # Reservations of the same type are listed too, at nothing an hour.
                if usd > 0:
                    return usd
    return None
