"""Other benchmarks, each in a Python environment of its own: their command lines and their results.

guidellm, aiperf, inference-perf and genai-bench cannot be installed beside each other, nor beside
this project. `Environment` makes one for each, once; a tool that cannot be installed or run here
raises `ToolError` with the reason, which the table of `bench agreement` shows in its place.

Each is given the same number of requests, lengths, concurrency and the same endpoint as the others,
as far as it lets itself be told; `differs` says where it does not.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bench.errors import BenchError

PYTHON = sys.version_info[:2]
INSTALL_S, RUN_S = 900.0, 900.0
_LAST_LINES = 400
_NEWER = 3  # How many releases of Python are tried, from the oldest on that a tool runs on.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# The figures that all of them have, by the names of `vllm bench serve`.
Figures = dict[str, float]


class ToolError(BenchError):
    """A tool that could not be installed or run, or whose result could not be read."""


@dataclass(frozen=True)
class Ask:
    """One measurement.

    Attributes:
        prompts: with the output tokens of each.
        tokenizer: a folder; the tools count or make tokens with it.
        folder: an empty one, for what a tool reads and writes.
    """

    url: str
    model: str
    tokenizer: str
    users: int
    prompts: Sequence[tuple[str, int]]
    folder: Path

    @property
    def input_tokens(self) -> int:
        return max(len(prompt.split()) for prompt, _ in self.prompts)

    @property
    def output_tokens(self) -> int:
        return max(tokens for _, tokens in self.prompts)


@dataclass(frozen=True)
class Tool:
    """One of the other benchmarks.

    Attributes:
        requirement: what pip installs.
        python: the oldest Python that it runs on.
        command: writes what the tool reads into the folder, and returns the arguments.
        read: its figures, from the folder.
        differs: how its load or its definitions are not ours.
        offline: whether it is told that there is no model hub. aiperf then looks for tokenizers in
            the hub's cache only, and finds none in a folder.
    """

    name: str
    requirement: str
    python: tuple[int, int]
    command: Callable[[Ask], list[str]]
    read: Callable[[Path], Figures]
    differs: str
    offline: bool = True


# --- environments ---------------------------------------------------------------------------


class Environment:
    """A folder with a virtual environment for each tool."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def program(self, tool: Tool) -> Path:
        """The tool's program, installed if it is not there yet.

        Raises:
            ToolError: it cannot be installed.
        """
        home = self._folder / tool.name
        program = home / "bin" / tool.name
        if program.exists():
            return program
        _run([_python(tool), "-m", "venv", str(home)], INSTALL_S)
        pip = [str(home / "bin" / "pip"), "install", "--quiet", "--no-input", tool.requirement]
        _run(pip, INSTALL_S)
        if not program.exists():
            raise ToolError(f"{tool.requirement} has no program {tool.name}")
        return program


def _python(tool: Tool) -> str:
    """A Python that is new enough for the tool: this one, or one of the path.

    Raises:
        ToolError: there is none.
    """
    if tool.python <= PYTHON:
        return sys.executable
    major, oldest = tool.python
    for minor in range(oldest, oldest + _NEWER):
        python = shutil.which(f"python{major}.{minor}")
        # A version manager may have the name without the program.
        if (
            python
            and not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode
        ):
            return python
    raise ToolError(f"{tool.requirement} needs Python {major}.{oldest}")


def measure(tool: Tool, environment: Environment, ask: Ask) -> Figures:
    """One run of a tool.

    Raises:
        ToolError: it cannot be installed or run, or does not write what it should.
    """
    program = environment.program(tool)
    offline = _OFFLINE if tool.offline else {}
    _run([str(program), *tool.command(ask)], RUN_S, ask.folder, offline)
    try:
        return tool.read(ask.folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ToolError(f"{tool.name} left no result that can be read: {error!r}") from error


def _run(
    command: list[str],
    timeout_s: float,
    folder: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run to the end, away from the terminal.

    Raises:
        ToolError: it took too long, could not start or failed; with the end of what it wrote.
    """
    # What this process imports from must not be found by the other's Python.
    own = {"PYTHONPATH", "PYTHONHOME", *_OFFLINE}
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**inherited, "NO_COLOR": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{Path(command[0]).name} took longer than {timeout_s:g} s") from error
    except OSError as error:
        raise ToolError(f"{Path(command[0]).name} cannot be started: {error.strerror}") from error
    if done.returncode:
        end = " ".join(done.stdout.decode(errors="replace").split())[-_LAST_LINES:]
        raise ToolError(f"{Path(command[0]).name} ended with {done.returncode}: {end}")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _only(folder: Path, pattern: str) -> Path:
    paths = sorted(folder.glob(pattern))
    if len(paths) != 1:
        raise LookupError(f"{len(paths)} files are like {pattern}")
    return paths[0]


# --- guidellm -------------------------------------------------------------------------------


def _guidellm(ask: Ask) -> list[str]:
    rows = [{"prompt": p, "output_tokens_count": n} for p, n in ask.prompts]
    path = ask.folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    backend = {
        "kind": "openai_http",
        "target": ask.url,
        "model": ask.model,
        "request_format": "/v1/completions",
        "extras": {"body": {"ignore_eos": True, "temperature": 0}},
    }
    return [
        "run",
        *("--backend", json.dumps(backend)),
        *("--profile", json.dumps({"kind": "concurrent", "streams": [ask.users]})),
        *("--constraint", json.dumps({"kind": "max_requests", "count": len(ask.prompts)})),
        *("--tokenizer", json.dumps({"kind": "huggingface_auto", "model": ask.tokenizer})),
        *("--data", json.dumps({"kind": "json_file", "path": str(path)})),
        *("--output", json.dumps({"kind": "json", "path": str(ask.folder / "result.json")})),
        "--disable-console",
    ]


def _of_guidellm(folder: Path) -> Figures:
    metrics = _json(folder / "result.json")["benchmarks"][0]["metrics"]

    def of(name: str, statistic: str) -> float:
        return float(metrics[name]["successful"][statistic])

    return {
        "output_throughput": of("output_tokens_per_second", "mean"),
        "request_throughput": of("requests_per_second", "mean"),
        "median_ttft_ms": of("time_to_first_token_ms", "median"),
        "median_tpot_ms": of("inter_token_latency_ms", "median"),
        "median_e2el_ms": of("request_latency", "median") * 1e3,
    }


# --- aiperf ---------------------------------------------------------------------------------


def _aiperf(ask: Ask) -> list[str]:
    rows = [{"text": prompt, "output_length": tokens} for prompt, tokens in ask.prompts]
    path = ask.folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [
        "profile",
        *("--model", ask.model, "--url", ask.url, "--endpoint-type", "completions"),
        *("--streaming", "--use-server-token-count", "--tokenizer", ask.tokenizer),
        *("--concurrency", str(ask.users), "--request-count", str(len(ask.prompts))),
        *("--input-file", str(path), "--custom-dataset-type", "single_turn"),
        *("--dataset-sampling-strategy", "sequential"),
        *("--extra-inputs", '{"ignore_eos": true, "temperature": 0}'),
        *("--output-artifact-dir", str(ask.folder), "--ui-type", "none"),
        *("--no-gpu-telemetry", "--no-server-metrics"),
    ]


def _of_aiperf(folder: Path) -> Figures:
    export = _json(_only(folder, "**/profile_export_aiperf.json"))
    scales = {"ms": 1.0, "s": 1e3, "sec": 1e3, "us": 1e-3, "ns": 1e-6}

    def median_ms(name: str) -> float:
        return float(export[name]["p50"]) * scales[export[name]["unit"]]

    return {
        "output_throughput": float(export["output_token_throughput"]["avg"]),
        "request_throughput": float(export["request_throughput"]["avg"]),
        "median_ttft_ms": median_ms("time_to_first_token"),
        "median_tpot_ms": median_ms("inter_token_latency"),
        "median_e2el_ms": median_ms("request_latency"),
    }


# --- inference-perf -------------------------------------------------------------------------


def _inference_perf(ask: Ask) -> list[str]:
    def fixed(tokens: int) -> dict[str, float]:
        exact = {name: float(tokens) for name in ("min", "max", "mean")}
        return {**exact, "std_dev": 0.0, "total_count": len(ask.prompts)}

    config = {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "random",
            "input_distribution": fixed(ask.input_tokens),
            "output_distribution": fixed(ask.output_tokens),
        },
        "load": {
            "type": "concurrent",
            "stages": [{"concurrency_level": ask.users, "num_requests": len(ask.prompts)}],
            "num_workers": 1,
            "worker_max_concurrency": ask.users,
        },
        "server": {
            "type": "vllm",
            "model_name": ask.model,
            "base_url": ask.url,
            "ignore_eos": True,
        },
        "tokenizer": {"pretrained_model_name_or_path": ask.tokenizer},
        "report": {"request_lifecycle": {"summary": True, "use_server_output_tokens": True}},
        "storage": {"local_storage": {"path": str(ask.folder / "report")}},
    }
    path = ask.folder / "config.yml"
    path.write_text(json.dumps(config))  # JSON is YAML.
    return ["--config_file", str(path)]


def _of_inference_perf(folder: Path) -> Figures:
    ok = _json(_only(folder, "report/*summary_lifecycle_metrics.json"))["successes"]
    latency, rate = ok["latency"], ok["throughput"]
    return {
        "output_throughput": float(rate["output_tokens_per_sec"]),
        "request_throughput": float(rate["requests_per_sec"]),
        "median_ttft_ms": float(latency["time_to_first_token"]["median"]) * 1e3,
        "median_tpot_ms": float(latency["time_per_output_token"]["median"]) * 1e3,
        "median_e2el_ms": float(latency["request_latency"]["median"]) * 1e3,
    }


# --- genai-bench ----------------------------------------------------------------------------


def _genai_bench(ask: Ask) -> list[str]:
    return [
        "benchmark",
        *("--api-backend", "vllm", "--api-base", ask.url, "--api-key", "none"),
        *("--api-model-name", ask.model, "--model-tokenizer", ask.tokenizer),
        *("--task", "text-to-text", "--num-concurrency", str(ask.users)),
        *("--traffic-scenario", f"D({ask.input_tokens},{ask.output_tokens})"),
        *("--max-requests-per-run", str(len(ask.prompts)), "--max-time-per-run", "15"),
        *("--additional-request-params", '{"ignore_eos": true, "temperature": 0}'),
        *("--experiment-base-dir", str(ask.folder), "--experiment-folder-name", "run"),
        *("--log-dir", str(ask.folder), "--metrics-time-unit", "ms"),
    ]


def _of_genai_bench(folder: Path) -> Figures:
    figures = _json(_only(folder, "run/*_num_concurrency_*.json"))["aggregated_metrics"]
    stats = figures["stats"]
    return {
        "output_throughput": float(figures["mean_output_throughput_tokens_per_s"]),
        "request_throughput": float(figures["requests_per_second"]),
        "median_ttft_ms": float(stats["ttft"]["p50"]),
        "median_tpot_ms": float(stats["tpot"]["p50"]),
        "median_e2el_ms": float(stats["e2e_latency"]["p50"]),
    }


TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "guidellm",
            "guidellm==0.8.1",
            (3, 10),
            _guidellm,
            _of_guidellm,
            "its rates are means over the time between requests, and count from the first start",
        ),
        Tool(
            "aiperf",
            "aiperf==0.13.0",
            (3, 11),
            _aiperf,
            _of_aiperf,
            "its first token is the first event with text",
            offline=False,
        ),
        Tool(
            "inference-perf",
            "inference-perf==0.7.0",
            (3, 12),
            _inference_perf,
            _of_inference_perf,
            "prompts are its own random tokens",
        ),
        Tool(
            "genai-bench",
            "genai-bench==0.0.5",
            (3, 10),
            _genai_bench,
            _of_genai_bench,
            "it asks the chat endpoint, with its own text; users start one after another",
        ),
    )
}
