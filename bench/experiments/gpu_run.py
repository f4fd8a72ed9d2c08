"""The measurements on a GPU in one command: stages within a time limit, each result stored at once.

    python -m bench.experiments.gpu_run --stage roofline,baseline,profile --models 7B,0.5B --out OUT
    python -m bench.experiments.gpu_run --stage tune --models 7B --out OUT --limit-s 570

A lent machine goes away: what is not on its way back by then is lost. So each step is a command of
its own, in a process group of its own, with what is left of the limit as its own; after each, what
there is goes to OUT as one archive (results.tar.gz), the traces as another, and a line about the
step to OUT/steps.jsonl. A step that fails or runs out of time is a line with its status, and the
next one begins. A step with too little time left is not begun.

Models are folders, the one that matters first; weights may be dummies (`load_format`), since speed
does not depend on their values. Nothing here is only for a GPU: the same stages rehearse on the CPU
engine with a small model and `--engine` for it.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

# Of a GPU host: 7B in bfloat16 with all the memory there is, and lengths for every workload here.
ENGINE = {"load_format": "dummy", "max_model_len": 4096, "gpu_memory_utilization": 0.9}
# The bundle for a host without a network has no FlashInfer, and its sampler would be asked for.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
STAGES = ("roofline", "baseline", "profile", "tune", "confirm", "kv", "scheduler", "scale")
_TRACES_BYTES = 15 * 2**20  # What comes back in one file has a limit.
_END_S = 8.0  # For the last archive.


@dataclass(frozen=True)
class Step:
    """One command of bench, and how many seconds it needs at least to be worth its start."""

    name: str
    words: tuple[str, ...]
    least_s: float = 20.0


# --- what is run ----------------------------------------------------------------------------


def steps(options: argparse.Namespace, left_s: Callable[[], float]) -> Iterator[Step]:
    """The steps of the stages that were asked for, the first model of all stages before the next.

    Args:
        left_s: asked when a step is reached, for what divides its time by itself.
    """
    engine = json.dumps(options.engine)
    for place, model in enumerate(options.models.split(",")):
        name, folder = Path(model).name, options.work
        roof = folder / f"roofline-{name}"
        against = ("--roofline", str(roof))
        mine = ("--model", model, "--engine", engine)
        if "roofline" in options.stage or not (roof / "result.json").is_file():
            yield Step(f"roofline-{name}", ("roofline", *mine, "--measure", "--out", str(roof)))
        if "baseline" in options.stage:
            out = ("--repeats", str(options.repeats), "--out", str(folder / f"baseline-{name}"))
            yield Step(f"baseline-{name}", ("baseline", *mine, *against, *out), 60)
        if "profile" in options.stage:
            cases = ("--batches", options.batches, "--prefill", options.prefill)
            out_of = ("--out", str(folder / f"profile-{name}"))
            yield Step(f"profile-{name}", ("profile", *mine, *against, *cases, *out_of), 60)
        if place:
            continue
        yield from _first_model_only(options, name, mine, against, left_s)


def _first_model_only(
    options: argparse.Namespace,
    name: str,
    mine: tuple[str, ...],
    against: tuple[str, ...],
    left_s: Callable[[], float],
) -> Iterator[Step]:
    folder = options.work
    tuned = folder / f"tune-{name}"
    goal = ("--slo", options.slo, "--workload", options.workload)
    if "tune" in options.stage:
        budget_s = max(30.0, left_s() - 40.0)
        more = ("--budget-s", f"{budget_s:.0f}", "--out", str(tuned), *options.tune.split())
        yield Step(f"tune-{name}", ("tune", *mine, *against, *goal, *more), 60)
    if "confirm" in options.stage:
        budget_s = max(30.0, left_s() - 60.0)
        more = ("--against", str(tuned), "--out", str(folder / f"confirm-{name}"))
        more += ("--budget-s", f"{budget_s:.0f}", *options.confirm.split())
        yield Step(f"confirm-{name}", ("tune", *mine, *more), 60)
    if "kv" in options.stage:
        out = ("--out", str(folder / f"kv-{name}"))
        yield Step(f"kv-{name}", ("kv", *mine, *out, *options.kv.split()), 60)
    if "scheduler" in options.stage:
        out = ("--out", str(folder / f"scheduler-{name}"))
        yield Step(f"scheduler-{name}", ("scheduler", *mine, *out, *options.scheduler.split()), 60)
    if "scale" in options.stage:
        budget_s = max(30.0, left_s() - 40.0)
        more = ("--budget-s", f"{budget_s:.0f}", "--out", str(folder / f"scale-{name}"))
        yield Step(f"scale-{name}", ("scale", *mine, *more, *options.scale.split()), 60)


# --- running it -----------------------------------------------------------------------------


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was run.

    Attributes:
        status: its exit status, or why there is none.
        last: the last line of its output, decoded where it is JSON.
        log: the last lines of its log, where it failed.
    """

    step: str
    status: int | str
    wall_s: float = 0.0
    command: str = ""
    last: Any = None
    log: list[str] = []


def run(step: Step, work: Path, limit_s: float) -> Done:
    """One step, ended with all it started when its time is over."""
    log = work / f"{step.name}.log"
    command = [sys.executable, "-m", "bench", *step.words]
    began_s = time.monotonic()
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            command,
            env={**ENVIRONMENT, **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            process_group=0,
        )
        try:
            out, _ = process.communicate(timeout=limit_s)
            status: int | str = process.returncode
        except subprocess.TimeoutExpired:
            out, status = _ended(process), f"stopped after {limit_s:.0f} s"
        finally:
            _kill_group(process)  # An engine of a step that failed would keep its memory.
    lines = out.decode(errors="replace").strip().splitlines()
    (work / f"{step.name}.out").write_text("\n".join(lines[-200:]) + "\n")
    last: Any = None
    if lines:
        try:
            last = json.loads(lines[-1])
        except json.JSONDecodeError:
            last = lines[-1][:400]
    log_lines = log.read_text(errors="replace").splitlines()
    return Done(
        step=step.name,
        status=status,
        wall_s=round(time.monotonic() - began_s, 1),
        command="python -m bench " + " ".join(_quoted(word) for word in step.words),
        last=last,
        log=log_lines[-6:] if status != 0 else [],
    )


def _ended(process: "subprocess.Popen[bytes]") -> bytes:
    """Ask it to end, so that it writes what it has; then insist, with all that it started."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    try:
        out, _ = process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        out, _ = process.communicate()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    return out


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _quoted(word: str) -> str:
    return f"'{word}'" if set(word) & set(' {}"()') else word


def archive(work: Path, out: Path) -> None:
    """Write the results so far as two archives into OUT, replacing earlier ones."""
    traces = sorted(
        (path for path in work.rglob("*.pt.trace.json*")), key=lambda path: path.stat().st_size
    )
    rest = [
        path
        for path in sorted(work.rglob("*"))
        if path.is_file() and path not in traces and not path.name.endswith(".safetensors")
    ]
    _archive(out / "results.tar.gz", work, rest)
    total, small = 0, []
    for path in traces:
        total += path.stat().st_size
        if total <= _TRACES_BYTES:
            small.append(path)
    if small:
        _archive(out / "traces.tar.gz", work, small)


def _archive(path: Path, root: Path, files: Sequence[Path]) -> None:
    part = path.with_suffix(".part")
    with tarfile.open(part, "w:gz") as archive:
        for file in files:
            archive.add(file, arcname=str(file.relative_to(root)))
    part.replace(path)


def main() -> int:
    options = _parser().parse_args()
    unknown = set(options.stage) - set(STAGES)
    if unknown:
        print(f"stage = {', '.join(unknown)}: one of {', '.join(STAGES)}", file=sys.stderr)
        return 2
    end_s = time.monotonic() + options.limit_s
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    done: list[Done] = []
    for step in steps(options, lambda: end_s - time.monotonic() - _END_S):
        left_s = end_s - time.monotonic() - _END_S
        if left_s < step.least_s:
            row = Done(step=step.name, status=f"not begun: {left_s:.0f} s left")
        else:
            print(f"{step.name}: {left_s:.0f} s left", file=sys.stderr, flush=True)
            row = run(step, options.work, left_s)
        done.append(row)
        with open(options.out / "steps.jsonl", "a") as file:
            file.write(msgspec.json.encode(row).decode() + "\n")
        print(msgspec.json.encode(row).decode(), file=sys.stderr, flush=True)
        archive(options.work, options.out)
    good = all(row.status == 0 for row in done)
    short = {row.step: row.status for row in done}
    print(json.dumps({"benchmark": "gpu_run", "valid": good, "steps": short}))
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", type=lambda text: text.split(","), required=True, help=",".join(STAGES))
    add("--models", required=True, help="model folders, separated by commas")
    add("--out", type=Path, required=True, help="folder of the archives")
    add("--work", type=Path, default=Path("/tmp/bench-gpu"), help="folder of the steps")
    add("--limit-s", type=float, default=570.0, help="time limit in seconds")
    add("--engine", type=json.loads, default=ENGINE, help="vLLM arguments, as JSON")
    add("--repeats", type=int, default=3, help="repeats of the baseline")
    add("--batches", default="1,32", help="batch sizes of the profile")
    add("--prefill", default="2000", help="prompt tokens of the profile")
    add("--slo", default="mlperf-interactive", help="objective of tune")
    add("--workload", default="synthetic:input=lognormal(800;0.4),output=100,max=3000,exact=yes")
    add("--tune", default="", help="more options of `bench tune`")
    add("--confirm", default="--system bare", help="more options of `bench tune --against`")
    add("--kv", default="", help="more options of `bench kv`")
    add("--scheduler", default="", help="more options of `bench scheduler`")
    add("--scale", default="", help="more options of `bench scale`")
    return parser


if __name__ == "__main__":
    sys.exit(main())
