"""`bench pareto`: what users get against what GPUs give, at several loads.

    python -m bench pareto --url URL --users 1,4,16,64 --gpus 1 --gpu-hour 2.5 --out DIR ..

Each number of users is a run of its own, in DIR/users-N. A point is the output tokens/s of a user
against those of a GPU, with the intervals of its repeats, and what a token costs there; the front
are the points that no other one beats in both. As in MLPerf Endpoints, what a user gets is 1 / the
90th percentile of the time per output token, points are measured and not interpolated, and the
front is a step function. Its regions, its data sets and its accuracy targets are not followed.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench import measure, result, run
from bench.errors import BenchError
from bench.measure import CurvePoint
from bench.result import Asked
from bench.run import Job

PLOT = "pareto.svg"
_AXES = ("user_tokens_per_s", "gpu_tokens_per_s")


def users_of(text: str) -> tuple[int, ...]:
    """The loads of a curve, "1,4,16": whole numbers, each once.

    Raises BenchError for what is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise BenchError.of("users", text, "must be numbers of users, as in 1,4,16")
    return tuple(sorted({int(part) for part in parts}))


class Curve(Asked, frozen=True, kw_only=True):
    """The result of `bench pareto`: a point for each number of users."""

    benchmark: str = "pareto"
    gpus: int | None = None
    usd_per_gpu_hour: float | None = None
    curve: list[CurvePoint]


async def curve(job: Job, users: Sequence[int], per_user: int, folder: Path) -> Curve:
    """Measure every load, `per_user` requests for each user and repeat.

    A load is left out once one was interrupted.
    """
    from bench import figure, plots  # These load matplotlib, which takes a second.

    gpus = "1 GPU" if job.gpus == 1 else f"{job.gpus or '?'} GPUs"
    head = result.header(job.name or f"{job.workload} on {gpus}")
    points: list[CurvePoint] = []
    for place, count in enumerate(users):
        run.say(f"{count} users ({place + 1} of {len(users)})")
        point_job = msgspec.structs.replace(
            job,
            name=f"{count} users",
            load=f"users={count}",
            count=count * per_user,
            seed=job.seed + 1000 * place,
        )
        measured = await run.run(point_job, folder / f"users-{count}")
        points.append(
            CurvePoint(
                users=count,
                efficiency=measured.efficiency,
                summary=measured.summary,
                doubts=measured.doubts,
            )
        )
        if measured.interrupted:
            break
    doubts = [f"{point.users} users: {doubt}" for point in points for doubt in point.doubts]
    if len(points) < len(users):
        doubts.append(f"interrupted: {len(points)} of {len(users)} loads were measured")
    output = Curve(
        **head,
        **run.load_fields(job),
        valid=not doubts,
        doubts=doubts,
        gpus=job.gpus,
        usd_per_gpu_hour=job.usd_per_gpu_hour,
        curve=front(points),
    )
    output = result.write(folder, output)
    (folder / PLOT).write_text(figure.standalone(plots.pareto([("", output.curve)], "pareto")))
    return output


def front(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The points, each with whether it is on the front."""
    complete = [
        place for place, each in enumerate(points) if all(_at(each, axis) for axis in _AXES)
    ]
    places = [(_at(points[place], _AXES[0]), _at(points[place], _AXES[1])) for place in complete]
    best = dict(zip(complete, measure.on_front(places), strict=True))
    return [
        msgspec.structs.replace(each, front=best.get(place)) for place, each in enumerate(points)
    ]


def row(point: CurvePoint) -> dict[str, float | None]:
    """A point as one line of a table."""
    return {"front": point.front, **{name: each["mean"] for name, each in point.efficiency.items()}}


def _at(point: CurvePoint, axis: str) -> float:
    return point.efficiency[axis]["mean"] if axis in point.efficiency else 0.0
