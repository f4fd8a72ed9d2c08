"""`serve run`, stopped in order: requests in flight finish before the proxies end.

`serve.shutdown()` tells the replicas to finish and, in the same moment, kills the HTTP proxies that
their streams pass through. Deleting the applications first leaves the proxies up until the last
replica is done, or its `drain_s` is over.
"""

import contextlib
import time

from ray import serve
from ray.serve.scripts import cli

_shutdown = serve.shutdown


def shutdown() -> None:
    with contextlib.suppress(Exception):  # A controller that is gone has nothing in flight.
        for name in serve.status().applications:
            serve.delete(name, _blocking=False)
        while serve.status().applications:
            time.sleep(0.2)
    _shutdown()


if __name__ == "__main__":
    # Looked up by `serve run` when it is interrupted.
    serve.shutdown = shutdown
    cli()
