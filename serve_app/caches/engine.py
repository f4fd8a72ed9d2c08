"""The cache of one engine: its key from settings and hardware, its place on this machine."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve_app.caches import key as keys
from serve_app.caches import source
from serve_app.caches.cache import Cache
from serve_app.planning import embedded
from serve_app.planning.hardware import HardwareError, local_gpus

logger = logging.getLogger("serve_app")

# A folder in place of ~/.cache/serve_app/compiled, as of a volume.
ROOT_VARIABLE = "SERVE_APP_COMPILED"


def root() -> Path:
    return Path(os.environ.get(ROOT_VARIABLE) or embedded.cache_dir() / "compiled")


def description(
    arguments: Mapping[str, Any], count: int, keep_weights: bool = False
) -> dict[str, Any]:
    """All that the cache of an engine on `count` GPUs of this machine depends on.

    Args:
        keep_weights: whether the weights are another process's, which changes what the engine
            measures of the GPU's memory.

    Raises:
        HardwareError: the driver does not answer.
    """
    if keep_weights:
        arguments = {**arguments, "keep_weights": True}
    return keys.describe(arguments, local_gpus()[:count], os.environ)


def prepare(
    arguments: Mapping[str, Any], count: int, address: str | None, keep_weights: bool = False
) -> Cache | None:
    """The cache for an engine that starts now in this process, and its place in the environment.

    Args:
        count: GPUs of a replica on this machine.
        address: where to fetch it from, if it is not here; None: from nowhere.
        keep_weights: as in `description`.

    None: there can be none here; the engine compiles for itself.
    """
    try:
        described = description(arguments, count, keep_weights)
        where = source.at(address) if address is not None else None
        cache = Cache.prepare(root(), keys.key(described), where)
    except (OSError, HardwareError) as error:
        logger.warning("compiled kernels cannot be cached: %s", error)
        return None
    os.environ.update(cache.environment(os.environ))
    return cache
