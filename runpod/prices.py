"""What things cost on Runpod, in USD. Live prices come from the catalog; these are for the rest.

Storage is not in the catalog. The GPU prices are those of the README, for a look before there is
an account. All from Runpod's documentation of the date below.
"""

from collections.abc import Mapping
from typing import Any

DATE = "2026-08-20"
# Per GB and month.
CONTAINER_DISK = 0.10  # While a container runs.
POD_DISK_RUNNING, POD_DISK_STOPPED = 0.10, 0.20
NETWORK_VOLUME, NETWORK_VOLUME_LARGE = 0.07, 0.05
_LARGE_GB = 1000
# Serverless, per GPU and second, by pool.
SERVERLESS_PER_SECOND: Mapping[str, tuple[str, float]] = {
    "AMPERE_16": ("A4000, A4500, RTX 4000 Ada, 16 GB", 0.00016),
    "AMPERE_24": ("L4, A5000, 3090, 24 GB", 0.00019),
    "ADA_24": ("RTX 4090, 24 GB", 0.00031),
    "AMPERE_48": ("A6000, A40, 48 GB", 0.00034),
    "ADA_48_PRO": ("L40, L40S, 6000 Ada, 48 GB", 0.00053),
    "AMPERE_80": ("A100, 80 GB", 0.00076),
    "ADA_80_PRO": ("H100, 80 GB", 0.00116),
    "HOPPER_141": ("H200, 141 GB", 0.00155),
}


def volume_per_month(size_gb: int) -> float:
    """A network volume: it bills from its creation to its deletion, used or not."""
    small = min(size_gb, _LARGE_GB)
    return small * NETWORK_VOLUME + (size_gb - small) * NETWORK_VOLUME_LARGE


def serverless_per_hour(gpu: Mapping[str, Any]) -> float | None:
    """One GPU of a catalog entry in a serverless worker; None where nobody says."""
    price = gpu["price"].get("serverless")
    if price is not None:
        return float(price)
    per_second = SERVERLESS_PER_SECOND.get(gpu.get("pool") or "")
    return per_second[1] * 3600 if per_second else None


def pod_per_hour(gpu: Mapping[str, Any], cloud: str = "SECURE") -> float:
    return float(gpu["price"][cloud.lower()])
