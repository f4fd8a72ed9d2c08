"""`bench pareto`: what users get against what GPUs give, at several loads.

    python -m bench pareto --url URL --users 1,4,16,64 --gpus 1 --gpu-hour 2.5 --out DIR ..

Each number of users is a run of its own, in DIR/users-N. A point is the output tokens/s of a user
against those of a GPU, with the intervals of its repeats, and what a token costs there; the front
are the points that no other one beats in both. As in MLPerf Endpoints, what a user gets is 1 / the
90th percentile of the time per output token, points are measured and not interpolated, and the
front is a step function. Its regions, its data sets and its accuracy targets are not followed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import measure, result, run
from bench.errors import BenchError
from bench.pages import plots
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


async def curve(job: Job, users: Sequence[int], per_user: int, folder: Path) -> dict[str, Any]:
    """Measure every load, `per_user` requests for each user and repeat.

    A load is left out once one was interrupted.
    """
    head = result.header("pareto", job.name or f"{job.workload} on {job.gpus or '?'} GPUs")
    points: list[dict[str, Any]] = []
    for place, count in enumerate(users):
        run.say(f"{count} users ({place + 1} of {len(users)})")
        point_job = msgspec.structs.replace(
            job,
            name=f"{count} users",
            load=f"users={count}",
            count=count * per_user,
            seed=job.seed + 1000 * place,
        )
        output = await run.run(point_job, folder / f"users-{count}")
        points.append(point(output, count))
        if output["interrupted"]:
            break
    doubts = [f"{each['users']} users: {doubt}" for each in points for doubt in each["doubts"]]
    if len(points) < len(users):
        doubts.append(f"interrupted: {len(points)} of {len(users)} loads were measured")
    output = head | run.settings_of(job) | {"valid": not doubts, "doubts": doubts, "events": []}
    output |= {"gpus": job.gpus, "usd_per_gpu_hour": job.usd_per_gpu_hour, "curve": front(points)}
    result.write(folder, output)
    (folder / PLOT).write_text(plots.standalone(plots.pareto([("", output["curve"])], "pareto")))
    return output


def point(output: Mapping[str, Any], users: int) -> dict[str, Any]:
    """A run as a point: what it cost, beside the usual figures."""
    return {
        "users": users,
        "efficiency": output["efficiency"],
        "summary": output["summary"],
        "doubts": output["doubts"],
    }


def front(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points, each with whether it is on the front; None where it lacks one of the axes."""
    complete = [
        place for place, each in enumerate(points) if all(_at(each, axis) for axis in _AXES)
    ]
    places = [(_at(points[place], _AXES[0]), _at(points[place], _AXES[1])) for place in complete]
    best = dict(zip(complete, measure.on_front(places), strict=True))
    return [{**each, "front": best.get(place)} for place, each in enumerate(points)]


def row(each: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a point in one line of a table."""
    figures = {name: summary["mean"] for name, summary in each["efficiency"].items()}
    return {"front": each["front"], **figures}


def _at(each: Mapping[str, Any], axis: str) -> float:
    return float((each["efficiency"].get(axis) or {}).get("mean") or 0.0)
