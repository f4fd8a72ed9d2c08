"""What joins a search to its probes: `ask`, `tell`, `result`, and a loop around them."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from bench import measure
from bench.records import Record
from bench.search.rateresult import RatePoint, RateResult
from bench.search.sweep import SweepResult, UsersPoint

Probe = Callable[[float, int], Awaitable[list[Record]]]
Result = TypeVar("Result", RateResult, SweepResult, covariant=True)


class Controller(Protocol[Result]):
    """What a search does between two probes."""

    def ask(self) -> tuple[float, int] | None:
        """(x, count of requests) to probe next, the same until `tell`; None when the search is
        over.
        """

    def tell(self, records: Sequence[Record], doubts: Sequence[str] = ()) -> None:
        """What came back of what was asked for last, and what else is doubtful about it."""

    @property
    def result(self) -> Result: ...


async def run(
    controller: Controller[Result],
    probe: Probe,
    on_look: Callable[[Result], None] | None = None,
    doubts: Callable[[], Sequence[str]] = list,
) -> Result:
    """Probe until the search is over.

    Args:
        on_look: called with what is known after each probe.
        doubts: what is doubtful about the last probe, beside its records.
    """
    while (trial := controller.ask()) is not None:
        controller.tell(await probe(*trial), doubts())
        if on_look:
            on_look(controller.result)
    return controller.result


def summarise(result: RateResult | SweepResult) -> None:
    """Give each point the summary of its probes, once they are over."""
    points: Sequence[RatePoint | UsersPoint] = result.points
    for point in points:
        point.summary = measure.summary(point.measures)
