"""`python -m serve_app warm --to ADDRESS`: compiles once what every start would compile.

Starts the engine of serve_config.yaml on the GPUs of this machine as a replica does, has it answer,
and puts what was compiled and measured into a folder or bucket. Replicas whose `compiled` names
that address fetch it. Run it where the hardware is that of the replicas: as a job of the cluster
(kuberay/warm.yaml), or on one machine for all that are like it.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from serve_app.caches import archive, engine, source
from serve_app.caches import key as keys
from serve_app.errors import ConfigError
from serve_app.launch.launcher import load
from serve_app.planning import kernels
from serve_app.planning.hardware import Node, local_gpus
from serve_app.planning.plan import Plan, decide_on
from serve_app.settings import Settings


def run(argv: Sequence[str]) -> int:
    """Fill the caches of every model of the configuration. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serve_app warm", description=__doc__)
    parser.add_argument("--config", default="serve_config.yaml", help="default: %(default)s")
    parser.add_argument("--model", default=None, help="model instead of the configured one")
    parser.add_argument("--to", default=None, help="a folder or s3:// address; default: `compiled`")
    options = parser.parse_args(argv)
    config = load(Path(options.config), options.model)
    settings = Settings.parse(config["applications"][0].get("args") or {})
    address = options.to or settings.compiled
    if address is None:
        raise ConfigError("compiled", None, "name a folder or an s3:// address, or give --to")
    gpus = local_gpus()
    for each in settings.of_each_model():
        plan = decide_on(each, [Node(gpus)] if gpus else [])
        print(msgspec.json.encode(warm(each, plan, address)).decode(), flush=True)
    return 0


class Warmed(msgspec.Struct, kw_only=True):
    """An engine whose caches were published.

    Attributes:
        key: of its caches.
        found: what of them was on this machine before.
        start_s: how long it took to start and to answer.
        bytes: of the archive.
        to: its address.
    """

    model: str
    key: str
    found: str
    start_s: float
    bytes: int
    to: str


def warm(settings: Settings, plan: Plan, address: str) -> Warmed:
    """Start one engine, end it, and publish its caches."""
    os.environ.update(plan.environment)
    if plan.cpu_threads is None:
        kernels.settle()
    arguments, count = plan.engine_arguments(settings), plan.placement.num_gpus
    described = engine.description(arguments, count, settings.keep_weights)
    # Not from the address: what is there may be what is to be replaced.
    cache = engine.prepare(arguments, count, None, settings.keep_weights)
    if cache is None:
        raise ConfigError(
            "SERVE_APP_COMPILED", str(engine.root()), "no cache can be made there; the log says why"
        )
    began_s = time.monotonic()
    asyncio.run(_start_once(arguments))
    took_s = time.monotonic() - began_s
    if not cache.seal():
        raise ConfigError(
            "SERVE_APP_COMPILED", str(engine.root()), "another engine is starting and uses it"
        )
    key = keys.key(described)
    size = archive.publish(cache.folder, key, described, source.at(address))
    return Warmed(
        model=plan.model,
        key=key,
        found=cache.origin,
        start_s=round(took_s, 1),
        bytes=size,
        to=address,
    )


async def _start_once(arguments: dict[str, Any]) -> None:
    from serve_app.pacing import Pacer
    from serve_app.replica import forkserver
    from serve_app.replica.engine import Engine
    from serve_app.scaling.signals import Signals

    forkserver.start()
    running = await asyncio.to_thread(Engine.start, arguments, Pacer(0.0), Signals())
    try:
        await running.app()
        await running.warm_up()
    finally:
        await asyncio.to_thread(running.stop)
