"""`serve run`, started in less time and stopped in order.

Started: with zygotes (zygote.py), Ray's Python processes are forked, and its dashboard comes last.
`ray.init` waits for the dashboard before it starts a worker, and its nine processes would take the
cores that the first replica needs.

Stopped: what is in flight finishes before the proxies are gone. `serve.shutdown()` tells the
replicas to finish and, in the same moment, kills the HTTP proxies that their streams pass through.
Deleting the applications first leaves the proxies up until the last replica is done, or its
`drain_s` is over.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from ray import serve
from ray._private.node import Node
from ray.serve.scripts import cli

from serve_app.launch.zygote import COMMAND, SOCKET_VARIABLE

_shutdown = serve.shutdown
_start_api_server = Node.start_api_server
# The dashboard starts after this in any case, so that a start that hangs can be looked at.
_DASHBOARD_S = 120.0


def shutdown() -> None:
    with contextlib.suppress(Exception):  # A controller that is gone has nothing in flight.
        for name in serve.status().applications:
            serve.delete(name, _blocking=False)
        while serve.status().applications:
            time.sleep(0.2)
    _shutdown()


class LateDashboard:
    """Stands for `Node.start_api_server`: the dashboard is started once the server is ready."""

    def __init__(self) -> None:
        self.due = threading.Event()

    def start(self, node: Node, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        node._webui_url = ""

        def later() -> None:
            self.due.wait(_DASHBOARD_S)
            _start_api_server(node, include_dashboard=include_dashboard, raise_on_failure=False)
            threading.Event().wait()  # The process ends with the thread that started it.

        threading.Thread(target=later, name="dashboard", daemon=True).start()


def main() -> None:
    """Run `serve run`'s command line."""
    # Looked up by `serve run` when it is interrupted.
    serve.shutdown = shutdown
    dashboard = LateDashboard()
    # From the launcher, once requests are answered.
    signal.signal(signal.SIGUSR1, lambda number, frame: dashboard.due.set())
    if os.environ.get(SOCKET_VARIABLE):

        def start_api_server(node: Node, **options: Any) -> None:
            dashboard.start(node, **options)

        Node.start_api_server = start_api_server
        # Ray starts its processes with it.
        sys.executable = str(COMMAND)
    cli()


if __name__ == "__main__":
    main()
