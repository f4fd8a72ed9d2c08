"""Ray Serve's controller dies, and the next one takes over what runs."""

import httpx

from bench.faults import victims
from tests.server import Server, wait

_LONG_ENOUGH_S = 15.0  # A replica that the new controller does not accept is gone in less.


def test_the_next_controller_keeps_the_replicas_that_run(server: Server) -> None:
    cluster = victims.Cluster(pids=[server.process.pid])
    (controller,) = cluster.controllers()

    def replicas() -> list[int]:
        return [replica.process.pid for replica in cluster.replicas("llm:engine")]

    before = replicas()
    assert before
    controller.process.kill()

    def restarted() -> bool:
        return any(each.process != controller.process for each in cluster.controllers())

    assert wait(restarted, 60)
    assert not wait(lambda: replicas() != before, _LONG_ENOUGH_S)
    assert httpx.get(f"{server.url}/v1/models").status_code == 200
