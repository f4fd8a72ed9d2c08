"""The scheduler's statistics go to the Python front end, and vllm-rs gets no empty message.

What vllm-rs had when it died is ended with an error, and nothing else is.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.replica.reports import GONE, LATE

FAST, FULL = 0, 1  # As in serve_app/replica/scheduler.py, which imports vLLM.


def redirected(**fast: Any) -> dict[int, Any]:
    """What each front end gets of a step whose output is for vllm-rs."""
    from vllm.v1.engine import EngineCoreOutputs

    from serve_app.replica.scheduler import _Reporting

    outputs = {FAST: EngineCoreOutputs(**fast)}
    _Reporting._redirect_stats(object.__new__(_Reporting), outputs)
    return outputs


@pytest.mark.parametrize("streams", [0, 2])
def test_statistics_go_to_the_python_front_end(streams: int) -> None:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import SchedulerStats

    stats = SchedulerStats()
    made = [EngineCoreOutput(str(number), [1]) for number in range(streams)]
    outputs = redirected(outputs=made, scheduler_stats=stats)
    assert outputs[FULL].scheduler_stats is stats
    # A message that holds nothing ends vllm-rs: "invalid wire shape".
    assert (FAST in outputs) == bool(streams)


def test_what_the_fast_lane_needs_stays() -> None:
    from vllm.v1.metrics.stats import SchedulerStats

    outputs = redirected(scheduler_stats=SchedulerStats(), finished_requests={"one"})
    assert outputs[FAST].finished_requests == {"one"}
    assert outputs[FAST].scheduler_stats is None


@pytest.mark.parametrize(
    ("asked", "ended", "status"),
    [
        ([GONE], {"cmpl-a-01234567", "cmpl-b-01234567"}, "FINISHED_ERROR"),
        ([LATE + "a"], {"cmpl-a-01234567"}, "FINISHED_ABORTED"),
        ("full-c", {"full-c"}, "FINISHED_ABORTED"),
        (None, None, "FINISHED_ABORTED"),
    ],
)
def test_who_is_ended(
    asked: Any, ended: set[str] | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    from serve_app.replica.scheduler import _Reporting

    scheduler = object.__new__(_Reporting)
    scheduler._late, scheduler._ended = [], []
    clients = {"cmpl-a-01234567": FAST, "cmpl-b-01234567": FAST, "full-c": FULL}
    scheduler.requests = {
        name: SimpleNamespace(client_index=client) for name, client in clients.items()
    }
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        Scheduler, "finish_requests", lambda _, ids, how: calls.append((ids, how)) or []
    )
    scheduler.finish_requests(asked, RequestStatus.FINISHED_ABORTED)
    ((names, how),) = calls
    assert (names if names is None else set(names)) == ended
    assert how == RequestStatus[status]
    # vllm-rs is told of those that are late; one that is gone is told nothing.
    assert scheduler._late == (["cmpl-a-01234567"] if asked == [LATE + "a"] else [])
