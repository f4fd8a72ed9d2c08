"""The measurements on a GPU in one command, with a script in place of bench."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.experiments import gpu_run


def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, *more: str) -> dict[str, Any]:
    """Run stages with `bench` replaced by a script."""
    (tmp_path / "bench").mkdir(exist_ok=True)
    (tmp_path / "bench" / "__init__.py").write_text("")
    (tmp_path / "bench" / "__main__.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    words = ["gpu_run", "--models", "/m/seven,/m/half", "--out", str(tmp_path / "out")]
    words += ["--work", str(tmp_path / "work"), *more]
    monkeypatch.setattr(sys, "argv", words)
    gpu_run.main()
    rows = [json.loads(line) for line in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


GOOD = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
(out / "result.json").write_text("{}")
print("noise")
print(json.dumps({"benchmark": sys.argv[1], "valid": True}))
"""
SLOW = """
import subprocess, sys, time
if sys.argv[1] == "baseline":
    subprocess.Popen(["sleep", "77"])
    print("it had this", flush=True)
    time.sleep(60)
sys.exit(3)
"""


def test_stages_are_run_one_after_the_other_and_what_they_made_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tarfile

    rows = gpu(
        tmp_path, monkeypatch, GOOD, "--stage", "roofline,baseline,profile", "--limit-s", "100"
    )
    # All of the first model comes before any of the second.
    assert list(rows) == [
        f"{stage}-{model}"
        for model in ("seven", "half")
        for stage in ("roofline", "baseline", "profile")
    ]
    assert all(row["status"] == 0 for row in rows.values())
    assert rows["profile-half"]["last"] == {"benchmark": "profile", "valid": True}
    assert "--roofline" in rows["baseline-seven"]["command"]
    with tarfile.open(tmp_path / "out/results.tar.gz") as archive:
        names = archive.getnames()
    assert "baseline-half/result.json" in names
    assert "profile-seven.log" in names


def test_a_step_that_fails_or_is_too_slow_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(gpu_run, "_END_S", 0.5)
    monkeypatch.setattr(gpu_run.Step, "__init__", _small(gpu_run.Step.__init__))
    rows = gpu(tmp_path, monkeypatch, SLOW, "--stage", "roofline,baseline", "--limit-s", "4")
    assert rows["roofline-seven"]["status"] == 3
    assert str(rows["baseline-seven"]["status"]).startswith("stopped after")
    assert rows["baseline-seven"]["last"] == "it had this"
    assert "not begun" in str(rows["baseline-half"]["status"])
    left = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "77"]]
    assert left == []


def _small(init: Any) -> Any:
    """Steps that are worth a start however little time is left."""

    def made(self: Any, name: str, words: tuple[str, ...], least_s: float = 1.0) -> None:
        init(self, name, words, 1.0)

    return made
