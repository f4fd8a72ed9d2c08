"""The duration of starts by phase: this application compared with a bare vLLM.

    cold      all cache folders are empty
    warm      the same start again, with the caches of the first one
    page      warm, with the machine's page cache dropped, if that is permitted
    restart   the engine is killed behind the gateway; until a request is answered again
    wake      an application that is scaled to zero gets a request; until it answers
    sleep     an engine that sleeps on its GPU gets a request; until it answers

Rounds are interleaved: each scenario of a round is done by every system before the next. A bare
vLLM ends with its engine and never sleeps, so for it `restart`, `wake` and `sleep` are a warm
start, which is the best that an operator could do.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from bench import result, run
from bench.engine import systems, waterfall
from bench.engine.systems import NAME, System
from bench.errors import BenchError
from bench.faults.victims import Cluster
from bench.hardware import gpu
from bench.options import json_object, whole
from bench.result import Line, Result
from serve_app.observe.phases import Logged, Span, durations, segments
from serve_app.replica.sleep import ASLEEP
from serve_app.replica.startup import FILE_VARIABLE, read

SCENARIOS = ("cold", "warm", "page", "restart", "wake", "sleep")
# Which of our configurations a scenario needs, and the event with its phases in a replica's log.
_OURS = {"restart": "ours-gateway-fast", "wake": "ours-asleep", "sleep": "ours-dozing"}
_EVENTS = {"restart": "restart", "sleep": "wake"}
_DROP = Path("/proc/sys/vm/drop_caches")
_POLL_S = 0.02
_ASK_S = 5.0
_LIMIT_S = 600.0


@dataclass
class Start:
    """One start that was measured.

    Attributes:
        took_s: until an answer; of a restart, the longest time without one.
        pieces: its phases, on one clock; none where the system does not tell them.
    """

    scenario: str
    system: str
    round: int
    took_s: float
    pieces: list[Span] = field(default_factory=list)

    def written(self) -> "Phases":
        return Phases(
            scenario=self.scenario,
            system=self.system,
            round=self.round,
            took_s=round(self.took_s, 3),
            phases={k: round(v, 3) for k, v in _by_phase(self.pieces).items()},
        )


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """A start as it is written: seconds of the whole, and of each phase."""

    scenario: str
    system: str
    round: int
    took_s: float
    phases: dict[str, float]


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """The starts of a system in one scenario, in seconds.

    Attributes:
        to_reference: median of the ratios to the reference, round by round; None without any.
    """

    median_s: float
    least_s: float
    most_s: float
    starts: int
    to_reference: float | None = None


class Starts(Result, frozen=True, kw_only=True):
    """The result of `bench starts`.

    Attributes:
        reference: the system that ratios are to.
        scenarios: by "scenario system".
        picture: path of the waterfalls.
    """

    benchmark: str = "starts"
    starts: list[Phases]
    reference: str
    scenarios: dict[str, Compared]
    picture: str


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench starts`."""
    add = parser.add_argument
    add("--model", required=True, help="a local folder or a hub id")
    add("--engine", type=json_object, default=dict(systems.ENGINE), help="vLLM arguments, as JSON")
    add("--systems", default="ours,bare", help="systems to start; default: %(default)s")
    add("--scenarios", default=",".join(SCENARIOS), help="default: %(default)s")
    add("--rounds", type=whole(1, 100), default=3)
    add("--port", type=whole(1024, 40000), default=8300)
    add(
        "--caches",
        type=Path,
        help="folder of compile caches to keep; by default a new one for each round",
    )
    add("--out", type=Path, required=True, help="folder of the result and its picture")


def command(options: argparse.Namespace) -> Line:
    """What `python -m bench starts` does with its options; returns its last line."""
    head = result.header(f"starts of {options.model}")
    scenarios = _require_choices(options.scenarios.split(","), SCENARIOS)
    doubts = []
    if "page" in scenarios and not os.access(_DROP, os.W_OK):
        scenarios.remove("page")
        doubts.append("the page cache could not be dropped: it takes the rights of root")
    if "sleep" in scenarios and not gpu.present():
        scenarios.remove("sleep")
        doubts.append("engines sleep on GPUs only, and this machine has none")
    options.out.mkdir(parents=True, exist_ok=True)
    starts: list[Start] = []
    for round_ in range(1, options.rounds + 1):
        with _folder(options.caches) as folder:
            for scenario in scenarios:
                for name in options.systems.split(","):
                    start = _measured(scenario, name, round_, options, folder / name)
                    starts.append(start)
                    run.say(msgspec.json.encode(start.written()).decode())
    picture = options.out / "starts.svg"
    picture.write_text(waterfall.svg(_rows(starts)))
    reference = options.systems.split(",")[-1]
    output = Starts(
        **head,
        doubts=doubts,
        starts=[start.written() for start in starts],
        reference=reference,
        scenarios=compared(starts, reference),
        picture=str(picture),
    )
    output = result.write(options.out, output)
    return result.line(output, options.out, "scenarios", "reference", "picture")


def compared(starts: Sequence[Start], reference: str) -> dict[str, Compared]:
    """By scenario and system: median and range, and the ratio to the reference, round by round."""
    table: dict[str, Compared] = {}
    for scenario in dict.fromkeys(start.scenario for start in starts):
        of_it = [start for start in starts if start.scenario == scenario]
        theirs = {start.round: start.took_s for start in of_it if start.system == reference}
        for name in dict.fromkeys(start.system for start in of_it):
            mine = [start for start in of_it if start.system == name]
            took_s = [start.took_s for start in mine]
            ratios = [s.took_s / theirs[s.round] for s in mine if theirs.get(s.round)]
            table[f"{scenario} {name}"] = Compared(
                median_s=round(statistics.median(took_s), 2),
                least_s=round(min(took_s), 2),
                most_s=round(max(took_s), 2),
                starts=len(took_s),
                to_reference=round(statistics.median(ratios), 3) if ratios else None,
            )
    return table


def _require_choices(names: Sequence[str], choices: Sequence[str]) -> list[str]:
    for name in names:
        if name not in choices:
            raise BenchError.of("--scenarios", name, "unknown", choices)
    return list(names)


# --- one start ------------------------------------------------------------------------------


def _measured(
    scenario: str, name: str, round_: int, options: argparse.Namespace, caches: Path
) -> Start:
    ours = name.startswith("ours")
    system = _OURS.get(scenario, name) if ours else name
    if scenario == "cold":
        shutil.rmtree(caches, ignore_errors=True)
    caches.mkdir(parents=True, exist_ok=True)
    spans = caches / "spans"
    spans.write_text("")
    environment = _caches(caches) | ({} if ours else {FILE_VARIABLE: str(spans)})
    environment |= systems.guided(name)
    # The scenario may need another of ours, started alike.
    changes = systems.changed(name) if ours else None
    if scenario == "page":
        os.sync()
        _DROP.write_text("3")
    began_s = time.time()
    place = (system, options.engine, options.model, options.port, options.out, environment)
    with systems.running(*place, changes) as running:
        systems.wait(running, _LIMIT_S)
        _answer(running, _LIMIT_S)
        ended_s = time.time()
        if ours and scenario in _OURS:
            took_s = _MEASURES[scenario](running)
            return Start(scenario, name, round_, took_s, _of_ours(options.port, scenario))
        pieces = _of_ours(options.port, "warm") if ours else segments(read(spans))
    return Start(scenario, name, round_, ended_s - began_s, _framed(pieces, began_s, ended_s, ours))


@contextlib.contextmanager
def _folder(caches: Path | None) -> Iterator[Path]:
    """Where the caches of a round are, which stay for its later scenarios."""
    if caches is not None:
        yield caches
        return
    with tempfile.TemporaryDirectory(prefix="bench-starts.") as scratch:
        yield Path(scratch)


def _caches(folder: Path) -> dict[str, str]:
    """The folders of the libraries' compile caches, without the model, its weights and the
    application's conversions.
    """
    return {
        "SERVE_APP_COMPILED": str(folder / "compiled"),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FLASHINFER_WORKSPACE_BASE": str(folder / "flashinfer"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
    }


def _framed(pieces: list[Span], began_s: float, ended_s: float, ours: bool) -> list[Span]:
    """The phases of a replica or server, with the time before and after them."""
    before = "Ray and Serve" if ours else "process"
    whole = [Span("other", began_s, ended_s)]
    if pieces:
        whole.append(Span(before, began_s, pieces[0].began_s))
        whole.append(Span("first health", pieces[-1].ended_s, ended_s))
    return segments([*whole, *pieces])


class _Event(msgspec.Struct):
    """A line of a replica's log; `phases` are those of a start."""

    event: str = ""
    time: str = ""
    phases: list[Logged] = []


def _of_ours(port: int, scenario: str) -> list[Span]:
    """The phases that the newest replica logged."""
    event = _EVENTS.get(scenario, "start")
    folder = Path(f"/tmp/ray-{port}/ray/session_latest/logs/serve_app")
    logged: list[_Event] = []
    for path in folder.glob("engine*.log"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                logged.append(msgspec.json.decode(line, type=_Event))
    starts_of = [each for each in logged if each.event == event]
    newest = max(starts_of, key=lambda each: each.time, default=_Event())
    return [phase.span() for phase in newest.phases]


def _restarted(system: System) -> float:
    """Kill the engine; the longest time without an answer."""
    engine = [
        process for process in system.family() if _title(process).startswith("VLLM::EngineCore")
    ]
    if not engine:
        raise BenchError("no process of an engine was found")
    for process in engine:
        process.kill()
    killed_s = time.monotonic()
    # The death is noticed when a request fails: until then an answer may still come.
    silent_s = last_s = 0.0
    answered = 0
    while answered < 20 and time.monotonic() - killed_s < _LIMIT_S:
        if _answers(system):
            now_s = time.monotonic() - killed_s
            silent_s, last_s = max(silent_s, now_s - last_s), now_s
            answered += 1
        time.sleep(_POLL_S)
    if not answered:
        raise BenchError(f"no request was answered within {_LIMIT_S:g} s of the engine's end")
    return silent_s


def _woken(system: System) -> float:
    """Wait until no replica remains, then send a request."""
    cluster = Cluster(pids=[system.process.pid])
    deadline_s = time.monotonic() + _LIMIT_S
    while cluster.replicas("engine"):
        if time.monotonic() > deadline_s:
            raise BenchError("the application does not scale to zero")
        time.sleep(0.5)
    return _answer(system, _LIMIT_S)


def _roused(system: System) -> float:
    """Wait until the engine sleeps, and ask."""
    deadline_s = time.monotonic() + _LIMIT_S
    while ASLEEP not in system.log.read_text(errors="replace"):
        if time.monotonic() > deadline_s:
            raise BenchError("the engine does not fall asleep")
        time.sleep(0.1)
    return _answer(system, _LIMIT_S)


_MEASURES = {"restart": _restarted, "wake": _woken, "sleep": _roused}


def _answer(system: System, within_s: float) -> float:
    """Seconds until a completion came."""
    began_s = time.monotonic()
    while not _answers(system, within_s):
        if time.monotonic() - began_s > within_s:
            raise BenchError(f"{system.name}: no answer within {within_s:g} s")
        time.sleep(_POLL_S)
    return time.monotonic() - began_s


def _answers(system: System, timeout_s: float = _ASK_S) -> bool:
    """Whether the system answers a request for one token."""
    body = json.dumps({"model": NAME, "prompt": "Hello", "max_tokens": 1, "temperature": 0})
    headers = {"content-type": "application/json", **systems.key_header()}
    connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=timeout_s)
    try:
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        return answer.status == 200 and bool(answer.read())
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        words = process.cmdline()
        return words[0] if words else ""
    return ""


# --- the picture ----------------------------------------------------------------------------


def _rows(starts: Sequence[Start]) -> list[waterfall.Row]:
    """Of each scenario and system the start whose time is the median."""
    rows = []
    for scenario, system in dict.fromkeys((start.scenario, start.system) for start in starts):
        of_it = [s for s in starts if (s.scenario, s.system) == (scenario, system)]
        middle = sorted(of_it, key=lambda start: start.took_s)[(len(of_it) - 1) // 2]
        if middle.pieces:
            rows.append(waterfall.Row(f"{scenario}, {system}", middle.pieces))
    return rows


def _by_phase(pieces: Sequence[Span]) -> dict[str, float]:
    durations_s = durations(pieces)
    others = {p.phase: 0.0 for p in pieces if p.phase not in durations_s}
    for piece in pieces:
        if piece.phase in others:
            others[piece.phase] += piece.ended_s - piece.began_s
    return {**others, **durations_s}
