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
from bench.figures import Repeat, figures
from bench.hardware import gpu
from bench.records import Record, append
from bench.run import Job
from bench.traffic import workload
from bench.traffic.load import Outcome
from bench.traffic.workload import Cell

# Cells differ in their seeds by more than repeats do: prompts of one must not be found in the
# prefix cache that another filled.
_SEEDS = 1000


async def served(job: Job, per_user: int, folder: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    """Every cell as a closed loop on the job's target, `per_user` requests a user and repeat.

    With one request a user a cell is a batch, as it is in process.

    A cell is left out of the result once one was interrupted.
    """
    head = result.header("matrix", job.name or "baseline matrix")
    done: list[dict[str, Any]] = []
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
        output = await run.run(cell_job, folder / cell.name)
        done.append({"cell": msgspec.to_builtins(cell), **output})
        if output["interrupted"]:
            break
    return _write(folder, head, done, len(cells))


def in_process(
    model: str,
    arguments: dict[str, Any],
    repeats: int,
    seed: int,
    folder: Path,
    cells: Sequence[Cell],
) -> dict[str, Any]:
    """Every cell as one batch of `LLM.generate`, with the GPUs sampled beside it."""
    from bench.engine.baseline import Engine

    head = result.header("baseline", f"{model} in process") | {
        "model": model,
        "engine": arguments,
    }
    began_s = time.time()
    engine = Engine(model, arguments)
    head["load_s"] = time.time() - began_s
    done: list[dict[str, Any]] = []
    for place, cell in enumerate(cells):
        run.say(f"{cell.name} ({place + 1} of {len(cells)})")
        mine = seed + _SEEDS * place
        done.append(_batches(engine, cell, repeats, mine, folder / cell.name))
    return _write(folder, head, done, len(cells))


def _batches(engine: Any, cell: Cell, repeats: int, seed: int, folder: Path) -> dict[str, Any]:
    path = result.prepare(folder)
    start_s = time.time()
    everything: list[Record] = []
    outcomes = []
    # Of a seed that no repeat has: what is compiled or allocated on first use is not measured.
    engine.generate(workload.parse(cell.workload, seed - 1, salt="").take(1), 0, start_s)
    with gpu.sampling(start_s) as gpus:
        for repeat in range(repeats):
            requests = workload.parse(cell.workload, seed + repeat, salt="").take(cell.users)
            records = engine.generate(requests, repeat, start_s)
            append(path, records)
            everything += records
            outcomes.append(Repeat(outcome=Outcome(records=records)))
    output: dict[str, Any] = msgspec.to_builtins(figures(outcomes, None, None, batch=True))
    output |= {"gpu": msgspec.to_builtins(gpus)}
    result.write(folder, result.header("run", cell.name) | output, everything)
    return {"cell": msgspec.to_builtins(cell), "name": cell.name, **output}


def _write(
    folder: Path, head: dict[str, Any], done: list[dict[str, Any]], planned: int
) -> dict[str, Any]:
    doubts = [f"{cell['name']}: {doubt}" for cell in done for doubt in cell["doubts"]]
    if len(done) < planned:
        doubts.append(f"interrupted: {len(done)} of {planned} cells were measured")
    output = head | {"valid": not doubts, "doubts": doubts, "cells": done}
    result.write(folder, output)
    return output
