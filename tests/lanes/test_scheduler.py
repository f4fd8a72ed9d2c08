"""The scheduler's statistics go to the Python front end, and vllm-rs gets no empty message."""

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from serve_app.replica.scheduler import FAST, FULL, _Reporting


def redirected(outputs: dict[int, EngineCoreOutputs]) -> dict[int, EngineCoreOutputs]:
    _Reporting._redirect_stats(object.__new__(_Reporting), outputs)
    return outputs


@pytest.mark.parametrize("streams", [0, 2])
def test_statistics_go_to_the_python_front_end(streams: int) -> None:
    stats = SchedulerStats()
    made = [EngineCoreOutput(str(number), [1]) for number in range(streams)]
    outputs = redirected({FAST: EngineCoreOutputs(outputs=made, scheduler_stats=stats)})
    assert outputs[FULL].scheduler_stats is stats
    # A message that holds nothing ends vllm-rs: "invalid wire shape".
    assert (FAST in outputs) == bool(streams)


def test_what_the_fast_lane_must_hear_stays() -> None:
    ended = EngineCoreOutputs(scheduler_stats=SchedulerStats(), finished_requests={"one"})
    outputs = redirected({FAST: ended})
    assert outputs[FAST].finished_requests == {"one"}
    assert outputs[FAST].scheduler_stats is None
