"""What a worker does before Kubernetes ends it: hand its work over, and wait until it has ended.

Ray itself ends its processes at the first signal, and every stream with them. As a preStop hook
this runs before that signal, for at most `seconds`:

1. It tells Ray that the node will go. Serve then starts replicas elsewhere if it can, sends new
   requests there, and lets those of this node end what they have.
2. It holds the node until no connection is left, neither to a replica here nor through this node's
   HAProxy to a replica elsewhere: a node that is drained and idle would end at once.

    python drain.py SECONDS [--node-id ID] [--ports 8000,30000-30999]

Exit status 0 also where something was left: Kubernetes goes on either way, and the log says it.
"""

import argparse
import os
import sys
import time
from pathlib import Path

_ESTABLISHED = "01"
_LOOK_S = 1.0
# Ports are closed and opened as replicas go and HAProxy learns of it.
_QUIET_LOOKS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--node-id")
    parser.add_argument("--ports", default="8000,30000-30999")
    options = parser.parse_args()
    deadline_s = time.monotonic() + options.seconds
    ports = parsed(options.ports)
    try:
        holding = drain(options.node_id, options.seconds)
    except Exception as error:  # Whatever Ray says: the streams are waited for all the same.
        say(f"Ray was not told: {error!r}")
        holding = None
    left = wait(ports, deadline_s)
    say(f"{left} connections left" if left else "nothing is left to do here")
    del holding
    return 0


def drain(node_id: str | None, seconds: float) -> object:
    """Have Ray move its work elsewhere. The node is held as long as what this returns."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    context = ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    node_id = node_id or ray.get_runtime_context().get_node_id()
    holding = hold(node_id)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=context.address_info["gcs_address"]).drain_node(
        node_id, reason, "the pod is to end", deadline_ms
    )
    say(f"drains node {node_id}" if accepted else f"Ray refuses: {why}")
    return holding


def hold(node_id: str) -> object:
    """An actor on a node, which is not idle while it is there; None where none can start."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Holding:
        def here(self) -> bool:
            return True

    # A little memory, which no replica reserves; there may be no CPU left.
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    holding = ray.remote(num_cpus=0, memory=2**20, scheduling_strategy=where)(Holding).remote()
    try:
        ray.get(holding.here.remote(), timeout=30)
    except Exception as error:
        say(f"the node is not held: {error!r}")
        return None
    return holding


def wait(ports: frozenset[int], deadline_s: float) -> int:
    """Until no connection to these ports is left. Returns how many are, at the deadline."""
    quiet = 0
    while True:
        left = connections(ports)
        quiet = 0 if left else quiet + 1
        if quiet >= _QUIET_LOOKS or time.monotonic() > deadline_s:
            return left
        time.sleep(_LOOK_S)


def connections(ports: frozenset[int]) -> int:
    """Established connections to local ports, of this pod's network."""
    count = 0
    for name in ("tcp", "tcp6"):
        path = Path("/proc/net") / name
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *_ = line.split()
            count += state == _ESTABLISHED and int(local.rpartition(":")[2], 16) in ports
    return count


def parsed(text: str) -> frozenset[int]:
    """`8000,30000-30999` as a set."""
    ports: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        ports |= set(range(int(first), int(last or first) + 1))
    return frozenset(ports)


def say(text: str) -> None:
    # A hook's output is shown nowhere; that of process 1 is the container's log.
    line = f"drain: {text}"
    print(line, flush=True)
    try:
        with open("/proc/1/fd/1", "w") as log:
            print(line, file=log)
    except OSError:
        pass


if __name__ == "__main__":
    sys.exit(main())
