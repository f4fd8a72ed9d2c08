"""`serve run`, which deploys while the proxies start, and stops in order.

`serve run` waits for the HTTP proxies before it submits the application, although neither needs the
other. The launcher waits for HAProxy by itself.

`serve.shutdown()` tells the replicas to finish and, in the same moment, kills the HTTP proxies that
their streams pass through. Deleting the applications first leaves the proxies up until the last
replica is done, or its `drain_s` is over.
"""

import contextlib
import time
from typing import Any

from ray import serve
from ray.serve._private import api
from ray.serve.scripts import cli

_create = api._create_controller_and_proxy_refs
_shutdown = serve.shutdown


def create(*args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    """Start Ray Serve's controller. Returns it, and no proxies to wait for."""
    controller, _ = _create(*args, **kwargs)
    return controller, []


def shutdown() -> None:
    with contextlib.suppress(Exception):  # A controller that is gone has nothing in flight.
        for name in serve.status().applications:
            serve.delete(name, _blocking=False)
        while serve.status().applications:
            time.sleep(0.2)
    _shutdown()


if __name__ == "__main__":
    api._create_controller_and_proxy_refs = create
    # Looked up by `serve run` when it is interrupted.
    serve.shutdown = shutdown
    cli()
