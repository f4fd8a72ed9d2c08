"""The README against what it is about: its prices, what holds which model, and each curl."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fit
import overrides
import prices
from serve_app.errors import ConfigError
from serve_app.planning.hardware import Gpu
from serve_app.planning.plan import QWEN25, parallelism
from serve_app.settings import Settings
from tests.runpod import rest_server
from tests.runpod.conftest import FOLDER
from tests.runpod.rest_server import KEY, SERVED, Rest
from tests.server import ROOT

PORT = 8879
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, int, str, str]]:
    """The cost table: pool, GB, price per hour, the largest model."""
    result = re.findall(
        r"^\| .*\((\w+)\) \| (\d+) GB \| \$([\d.]+) \| up to (\S+) \|$", TEXT, re.MULTILINE
    )
    return [(pool, int(memory), price, model) for pool, memory, price, model in result]


def test_its_prices_are_those_of_the_code_and_dated() -> None:
    assert f"as of {prices.DATE}" in TEXT
    given = {pool: price for pool, _, price, _ in rows()}
    per_second = {pool: cost for pool, (_, cost) in prices.SERVERLESS_PER_SECOND.items()}
    assert given == {pool: f"{3600 * cost:.2f}" for pool, cost in per_second.items()}
    for price in (prices.CONTAINER_DISK, prices.POD_DISK_STOPPED, prices.NETWORK_VOLUME):
        assert f"${price:.2f}" in TEXT


@pytest.mark.parametrize(("memory", "largest"), sorted({(row[1], row[3]) for row in rows()}))
def test_the_largest_model_of_a_card(memory: int, largest: str) -> None:
    gpu = Gpu("one", fit.MIB[memory] * 2**20, fit.MIB[memory] * 2**20, (9, 0))

    def fits(model: str) -> bool:
        settings = Settings.parse({"model": model, "engine": {"max_model_len": 32768}})
        try:
            return parallelism(settings, model, (gpu,)).tensor_parallel_size == 1
        except ConfigError:
            return False

    sizes = [re.search(r"-([\d.]+)B", model) for model in QWEN25 if fits(model)]
    assert f"{max(float(size[1]) for size in sizes if size):g}B" == largest


def test_every_variable_that_it_names_is_understood() -> None:
    (section,) = re.findall(r"^## Configure it\n(.*?)^A variable", TEXT, re.MULTILINE | re.DOTALL)
    named = [
        name
        for row in re.findall(r"^\| (`[A-Z].*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`([A-Z_]+)`", row)
    ]
    assert len(named) > 12
    whole = (overrides.ARGS, overrides.EXTRA, overrides.FILE)
    values = {name: "1" for name in named if name not in whole} | {"LORA_MODULES": "a=org/a"}
    assert overrides.apply({}, values)[1] == []


# --- its curls --------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Rest]:
    if not rest_server.SCHEMA.is_file():
        pytest.skip("Runpod's schema is not in ../shared")
    with rest_server.serving(PORT) as running:
        yield running


def curls() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return ["curl" + part for block in blocks for part in re.split(r"^curl", block, flags=re.M)[1:]]


@pytest.mark.parametrize("command", curls())
def test_each_curl_is_answered(server: Rest, command: str) -> None:
    account = server.account
    account.looks_until_up = -1
    environ = {"API_KEYS": "ours", "RUNPOD_API_KEY": KEY}
    endpoint = account.add("serverless", env={"API_KEYS": "ours"})
    pod = account.add("pods", ports=["8000/http"], env={"API_KEYS": "ours", "SERVE_MODE": "pod"})
    account.jobs["JOB_ID"] = "IN_QUEUE"
    for theirs, here in (
        ("https://ENDPOINT_ID.api.runpod.ai", f"{server.url}/lb/{endpoint}"),
        ("https://api.runpod.ai/v2/ENDPOINT_ID", f"{server.url}/queue/{endpoint}"),
        ("https://POD_ID-8000.proxy.runpod.net", f"{server.url}/pod/{pod}-8000"),
        ("Qwen/Qwen2.5-7B-Instruct", SERVED),
    ):
        command = command.replace(theirs, here)
    assert "https://" not in command
    command = command.replace("curl", "curl --silent --fail-with-body", 1)
    answer = subprocess.run(
        ["bash", "-c", command], env={"PATH": "/usr/bin:/bin"} | environ, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert '"choices"' in answer.stdout or '"status"' in answer.stdout


def benches() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    parts = [
        part for block in blocks for part in re.split(r"^(?=python -m bench)", block, flags=re.M)
    ]
    return [part for part in parts if part.startswith("python -m bench")]


def test_there_is_a_benchmark_for_each_mode() -> None:
    assert len(benches()) == 3


@pytest.mark.slow  # Each starts a Ray cluster for its load.
@pytest.mark.parametrize("command", benches())
def test_each_benchmark_gets_its_answers(server: Rest, command: str, tmp_path: Path) -> None:
    account = server.account
    account.looks_until_up = -1
    endpoint = account.add("serverless", env={"API_KEYS": "ours"})
    pod = account.add("pods", ports=["8000/http"], env={"API_KEYS": "ours", "SERVE_MODE": "pod"})
    for theirs, here in (
        ("https://ENDPOINT_ID.api.runpod.ai", f"{server.url}/lb/{endpoint}/v1"),
        ("https://api.runpod.ai/v2/ENDPOINT_ID", f"{server.url}/queue/{endpoint}"),
        ("https://POD_ID-8000.proxy.runpod.net", f"{server.url}/pod/{pod}-8000/v1"),
        ("--out results/", f"--repeats 1 --out {tmp_path}/"),
        ("--requests 40", "--requests 8"),
        ("python -m bench", f"{sys.executable} -m bench"),
    ):
        command = command.replace(theirs, here)
    assert "https://" not in command
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    answer = subprocess.run(
        ["bash", "-c", command],
        env=inherited | {"API_KEYS": "ours", "RUNPOD_API_KEY": KEY},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # 1 is a result with doubts: eight requests say little.
    assert answer.returncode in (0, 1), answer.stderr
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [record.get("error", "") for record in records] == [""] * 8, answer.stderr
    # The keys are nowhere in what is kept.
    remaining = "".join(path.read_text(errors="replace") for path in folder.iterdir())
    assert KEY not in remaining
    assert "x-api-key: ours" not in remaining


def test_there_is_a_curl_for_each_mode() -> None:
    all_of_them = "".join(curls())
    for host in ("ENDPOINT_ID.api.runpod.ai/v1", "v2/ENDPOINT_ID/run", "proxy.runpod.net/v1"):
        assert host in all_of_them
