"""Beside other benchmarks: rounds, ratios, and the command line and the result of each tool."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.errors import TargetFailed
from bench.itself import agreement, tools
from bench.itself.peer import Peer
from bench.itself.tools import TOOLS, Ask, Environment, ToolError

FIGURES = {
    "output_throughput": 640.0,
    "request_throughput": 10.0,
    "median_ttft_ms": 50.0,
    "median_tpot_ms": 10.5,
    "median_e2el_ms": 711.5,
}

# What each tool writes, cut down to what is read: the shapes of guidellm 0.8.1, aiperf 0.13.0,
# inference-perf 0.7.0 and genai-bench 0.0.5.
RESULTS: dict[str, tuple[str, Any]] = {
    "guidellm": (
        "result.json",
        {
            "benchmarks": [
                {
                    "metrics": {
                        name: {"successful": {"mean": value, "median": value}}
                        for name, value in {
                            "output_tokens_per_second": 640.0,
                            "requests_per_second": 10.0,
                            "time_to_first_token_ms": 50.0,
                            "inter_token_latency_ms": 10.5,
                            "request_latency": 0.7115,
                        }.items()
                    }
                }
            ]
        },
    ),
    "aiperf": (
        "model-concurrency8/profile_export_aiperf.json",
        {
            "output_token_throughput": {"unit": "tokens/sec", "avg": 640.0},
            "request_throughput": {"unit": "requests/sec", "avg": 10.0},
            "time_to_first_token": {"unit": "ms", "p50": 50.0},
            "inter_token_latency": {"unit": "ms", "p50": 10.5},
            "request_latency": {"unit": "ms", "p50": 711.5},
        },
    ),
    "inference-perf": (
        "report/summary_lifecycle_metrics.json",
        {
            "successes": {
                "latency": {
                    "time_to_first_token": {"median": 0.05},
                    "time_per_output_token": {"median": 0.0105},
                    "request_latency": {"median": 0.7115},
                },
                "throughput": {"output_tokens_per_sec": 640.0, "requests_per_sec": 10.0},
            }
        },
    ),
    "genai-bench": (
        "run/D_50_64_text-to-text_num_concurrency_8_time_3s.json",
        {
            "aggregated_metrics": {
                "mean_output_throughput_tokens_per_s": 640.0,
                "requests_per_second": 10.0,
                "stats": {
                    "ttft": {"p50": 50.0},
                    "tpot": {"p50": 10.5},
                    "e2e_latency": {"p50": 711.5},
                },
            }
        },
    ),
}


def ask(folder: Path) -> Ask:
    prompts = [("one two three", 64), ("four five six", 64)]
    folder.mkdir(exist_ok=True)
    return Ask(
        url="http://127.0.0.1:1",
        model="m",
        tokenizer="/tokenizer",
        users=8,
        prompts=prompts,
        folder=folder,
    )


def installed(root: Path, name: str, script: str) -> Environment:
    """An environment in which the tool is a script of ours."""
    program = root / name / "bin" / name
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    return Environment(root)


@pytest.mark.parametrize("name", TOOLS)
def test_each_tool_is_run_in_its_environment_and_read(tmp_path: Path, name: str) -> None:
    path, result = RESULTS[name]
    script = f"""
import json, os, pathlib, sys
pathlib.Path("arguments.json").write_text(json.dumps(sys.argv[1:]))
pathlib.Path("environment.json").write_text(json.dumps(dict(os.environ)))
out = pathlib.Path({path!r})
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text({json.dumps(result)!r})
"""
    environment, mine = installed(tmp_path / "env", name, script), ask(tmp_path / "out")
    assert tools.measure(TOOLS[name], environment, mine) == pytest.approx(FIGURES)
    arguments = " ".join(json.loads((tmp_path / "out/arguments.json").read_text()))
    told = arguments + "".join(p.read_text() for p in (tmp_path / "out").glob("config.yml"))
    for value in ("http://127.0.0.1:1", "/tokenizer", "8", "ignore_eos"):
        assert value in told
    variables = json.loads((tmp_path / "out/environment.json").read_text())
    # Offline, aiperf finds no tokenizer in a folder.
    assert variables.get("HF_HUB_OFFLINE") == (None if name == "aiperf" else "1")
    assert "PYTHONPATH" not in variables


@pytest.mark.parametrize("name", ["guidellm", "aiperf"])
def test_tools_that_read_a_file_get_the_prompts_with_their_lengths(
    tmp_path: Path, name: str
) -> None:
    TOOLS[name].command(ask(tmp_path / "out"))
    rows = [json.loads(x) for x in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert [sorted(map(str, row.values())) for row in rows] == [
        ["64", "one two three"],
        ["64", "four five six"],
    ]


def test_a_tool_that_needs_a_newer_python_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "PYTHON", (3, 11))
    broken = tmp_path / "python3.12"  # As a version manager leaves it.
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"inference-perf==0.7.0 needs Python 3\.12"):
        Environment(tmp_path).program(TOOLS["inference-perf"])


def test_a_tool_that_needs_a_newer_python_gets_one_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "PYTHON", (3, 11))
    newer = tmp_path / "bin/python3.13"
    newer.parent.mkdir()
    newer.write_text(
        '#!/bin/sh\n[ "$1" = -m ] || exit 0\n'
        'mkdir -p "$3/bin" && cp "$0" "$3/bin/pip" && cp "$0" "$3/bin/inference-perf"\n'
    )
    newer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{newer.parent}:/usr/bin:/bin")
    program = Environment(tmp_path / "env").program(TOOLS["inference-perf"])
    assert program == tmp_path / "env/inference-perf/bin/inference-perf"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("print('no such model'); raise SystemExit(3)", "aiperf ended with 3: no such model"),
        ("pass", "aiperf left no result that can be read: .*0 files"),
        ("open('profile_export_aiperf.json', 'w').write('{}')", "left no result .*KeyError"),
    ],
)
def test_what_goes_wrong_with_a_tool_is_said(tmp_path: Path, script: str, problem: str) -> None:
    environment = installed(tmp_path / "env", "aiperf", script)
    with pytest.raises(ToolError, match=problem):
        tools.measure(TOOLS["aiperf"], environment, ask(tmp_path / "out"))


def test_rounds_are_interleaved_and_one_that_fails_leaves_the_others() -> None:
    calls: list[tuple[str, int]] = []

    def measure(name: str, factor: float, fails_at: int = 99) -> agreement.Measure:
        def once(seed: int) -> dict[str, Any]:
            calls.append((name, seed))
            if sum(each == name for each, _ in calls) > fails_at:
                raise ToolError(f"{name} is not well")
            return {figure: factor * value for figure, value in FIGURES.items()}

        return once

    measures = {
        agreement.OURS: measure("ours", 1.0),
        "vllm": measure("vllm", 1.01),
        "other": measure("other", 0.5),
        "ill": measure("ill", 1.0, fails_at=1),
    }
    rounds, absent = agreement.play(measures, 4)
    order = [name for name, _ in calls]
    assert [" ".join(order[at : at + 4]) for at in (0, 4)] == [
        "ours vllm other ill",
        "ill other vllm ours",
    ]
    assert " ".join(order[8:]) == "ours vllm other other vllm ours"
    assert len({seed for _, seed in calls}) == len(calls), "two would send the same prompts"
    assert absent == {"ill": "ill is not well"}
    rows = {row.figure: row for row in agreement.compare(rounds, "vllm")}
    assert set(rows) == set(FIGURES)  # What the other does not have is left out.
    assert all(row.agrees for row in rows.values())
    assert rows["median_ttft_ms"].ratio == pytest.approx(1 / 1.01, abs=1e-4)
    assert not any(row.agrees for row in agreement.compare(rounds, "other"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tools", "guidelm"], "did you mean 'guidellm'"),
        (["--tools", "aiperf"], "need the tokenizer"),
    ],
)
def test_a_mistake_in_the_command_ends_it_before_anything_starts(
    arguments: list[str], problem: str
) -> None:
    parser = argparse.ArgumentParser()
    agreement.arguments(parser)
    with pytest.raises(ToolError, match=problem):
        agreement.command(parser.parse_args(["--url", "http://127.0.0.1:1", *arguments]))


@pytest.mark.parametrize("tool", ["ours", "vllm"])
def test_figures_of_a_server_that_does_not_answer_are_not_compared(
    tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a traceback: "no median for empty data"."""
    errors = ["", "Traceback:\nConnectionRefusedError: port 1"]

    async def run(*arguments: object) -> SimpleNamespace:
        return SimpleNamespace(records=[SimpleNamespace(error=error) for error in errors])

    monkeypatch.setattr(agreement.load, "run", run)
    parser = argparse.ArgumentParser()
    agreement.arguments(parser)
    options = parser.parse_args(["--url", "http://127.0.0.1:1", "--model", "m"])
    peer = cast(Peer, SimpleNamespace(run=lambda arguments, requests: {"errors": errors}))
    measured = agreement.ours(options) if tool == "ours" else agreement.theirs(options, peer)
    with pytest.raises(TargetFailed, match=f"{tool}: 1 of 2 requests failed: (?s:.*)port 1"):
        measured(0)
