"""`python -m bench profile` and `bench roofline` as a user runs them, on a small engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.hardware import kernels

ROOT = Path(__file__).parent.parent.parent
ENGINE = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**26,
    "block_size": 32,
    "dtype": "float32",
    "enforce_eager": True,
}


def bench(*words: str) -> dict[str, Any]:
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


@pytest.mark.slow
def test_decode_and_prefill_are_traced_and_held_against_the_ceilings(
    tiny: Path, tmp_path: Path
) -> None:
    engine = json.dumps(ENGINE)
    roof, out = tmp_path / "roof", tmp_path / "profile"
    shown = bench(
        *("roofline", "--model", str(tiny), "--measure", "--engine", engine, "--out", str(roof))
    )
    assert shown["ceilings"]["bytes_per_s"] > 1e8
    assert shown["ceilings"]["flops_per_s"] > 1e8
    # A tied table of 1024 words and two layers, four bytes each.
    assert shown["weights_bytes"] == 4 * (1024 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128))
    last = bench(
        *("profile", "--model", str(tiny), "--engine", engine, "--roofline", str(roof)),
        *("--batches", "3", "--context", "40", "--prefill", "300", "--out", str(out)),
    )
    assert set(last["cases"]) == {"decode-3", "prefill-300"}
    body = json.loads((out / "result.json").read_text())
    decode, prefill = body["cases"]
    for case in (decode, prefill):
        assert case["took_s"] > 0
        assert case["verdict"]["bound"] in ("memory-bound", "compute-bound", "host-bound")
        assert case["verdict"]["mbu"] > 0
        names = {each["family"] for each in case["summary"]["families"]}
        assert {"GEMM", "attention"} <= names
    # The steps of decode alone are in its trace, and the prompt was read whole in its own.
    assert decode["summary"]["context_steps"] == 0
    assert decode["summary"]["steps"] >= 20
    steps = [
        event["name"]
        for event in kernels.read(Path(prefill["trace"]))
        if str(event.get("name")).startswith("execute_context")
    ]
    assert "execute_context_1(300)_generation_0(0)" in steps
