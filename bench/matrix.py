"""`bench matrix` and `bench baseline`: the same 18 cells, served and in process.

Prompts of 5, 200 and 1000 tokens; 1, 4 and 8 at once; 50 and 200 tokens out. A cell is a run of its
own in a folder of its own; the matrix's result holds them all, so that an engine alone and the
same engine served stand in one report, cell beside cell.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import result, run
from bench.figures import Repeat, Run, figures
from bench.hardware import gpu, roofline
from bench.hardware.roofline import Allowed, Ceilings, Shape
from bench.records import Record, append
from bench.result import EngineResult
from bench.run import Job
from bench.traffic import workload
from bench.traffic.load import Outcome
from bench.traffic.workload import Cell

# Cells differ in their seeds by more than repeats do: prompts of one must not be found in the
# prefix cache that another filled.
_SEEDS = 1000


class Measured(Run, frozen=True, kw_only=True):
    """A run of one cell."""

    cell: Cell


class Matrix(EngineResult, frozen=True, kw_only=True):
    """The result of `bench matrix`, or of `bench baseline`.

    Attributes:
        load_s: how long the engine in process took to load.
        roofline: what the hardware allows; None where that is not known.
    """

    benchmark: str = "matrix"
    load_s: float | None = None
    cells: list[Measured]
    roofline: Allowed | None = None


async def served(job: Job, per_user: int, folder: Path, cells: Sequence[Cell]) -> Matrix:
    """Every cell as a closed loop on the job's target, `per_user` requests a user and repeat.

    With one request a user a cell is a batch, as it is in process.

    A cell is left out of the result once one was interrupted.
    """
    head = result.header(job.name or "baseline matrix")
    done: list[Measured] = []
    for place, cell in enumerate(cells):
        run.say(f"{cell.name} ({place + 1} of {len(cells)})")
        cell_job = msgspec.structs.replace(
            job,
            name=cell.name,
            seed=job.seed + _SEEDS * place,
            workload=cell.workload,
            load=f"users={cell.users}",
            count=cell.users * per_user,
        )
        measured = await run.run(cell_job, folder / cell.name)
        done.append(_measured(cell, measured))
        if measured.interrupted:
            break
    doubts = _doubts(done, len(cells))
    target = run.named(job.target)
    output = Matrix(**head, target=target, valid=not doubts, doubts=doubts, cells=done)
    return result.write(folder, output)


def in_process(
    model: str,
    arguments: dict[str, Any],
    repeats: int,
    seed: int,
    folder: Path,
    cells: Sequence[Cell],
) -> Matrix:
    """Every cell as one batch of `LLM.generate`, with the GPUs sampled beside it."""
    from bench.engine.baseline import Engine

    head = result.header(f"{model} in process")
    began_s = time.time()
    engine = Engine(model, arguments)
    load_s = time.time() - began_s
    done: list[Measured] = []
    for place, cell in enumerate(cells):
        run.say(f"{cell.name} ({place + 1} of {len(cells)})")
        mine = seed + _SEEDS * place
        done.append(_batches(engine, cell, repeats, mine, folder / cell.name))
    doubts = _doubts(done, len(cells))
    output = Matrix(
        **head,
        benchmark="baseline",
        valid=not doubts,
        doubts=doubts,
        model=model,
        engine=arguments,
        load_s=load_s,
        cells=done,
    )
    return result.write(folder, output)


def _batches(engine: Any, cell: Cell, repeats: int, seed: int, folder: Path) -> Measured:
    path = result.prepare(folder)
    start_s = time.time()
    everything: list[list[Record]] = []
    # Of a seed that no repeat has: what is compiled or allocated on first use is not measured.
    engine.generate(workload.parse(cell.workload, seed - 1, salt="").take(1), 0, start_s)
    with gpu.sampling(start_s) as gpus:
        for repeat in range(repeats):
            requests = workload.parse(cell.workload, seed + repeat, salt="").take(cell.users)
            records = engine.generate(requests, repeat, start_s)
            append(path, records)
            everything.append(records)
    repeats_of = [Repeat(outcome=Outcome(records=records), gpu=gpus) for records in everything]
    output = msgspec.structs.replace(
        figures(repeats_of, None, None, batch=True), **result.header(cell.name), gpu=gpus
    )
    output = result.write(folder, output, [record for each in everything for record in each])
    return _measured(cell, output)


def _measured(cell: Cell, output: Run) -> Measured:
    return Measured(**msgspec.structs.asdict(output), cell=cell)


def _doubts(done: Sequence[Measured], planned: int) -> list[str]:
    doubts = [f"{each.name}: {doubt}" for each in done for doubt in each.doubts]
    if len(done) < planned:
        doubts.append(f"interrupted: {len(done)} of {planned} cells were measured")
    return doubts


def with_roofline(output: Matrix, shape: Shape, ceilings: Ceilings) -> Matrix:
    """The result, each cell beside what the hardware allows."""
    cells = [
        msgspec.structs.replace(
            cell,
            roofline=roofline.of_batch(shape, ceilings, cell.cell, cell.repeats)
            if output.benchmark == "baseline"
            else roofline.of_run(shape, ceilings, cell.repeats),
        )
        for cell in output.cells
    ]
    allowed = Allowed(shape=shape, ceilings=ceilings)
    return msgspec.structs.replace(output, cells=cells, roofline=allowed)
