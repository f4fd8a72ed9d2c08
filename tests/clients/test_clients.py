"""`make test-clients`: what users' libraries find here, beside what they find at a bare vLLM.

Each library has an environment of its own and runs one program of checks against both servers,
which serve the same model with the same engine arguments. A check that fails only here fails.

vLLM's own tests of its entrypoints run in the same way where VLLM_TESTS names the folder `tests` of
vLLM's source (its sdist, or its repository at the tag of the version that is installed here).
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.engine import systems
from tests.clients.environments import CLIENTS, PROGRAMS, Client

# A suite asks for hundreds of answers, one after the other: minutes on a quiet machine.
_SUITE_S = 1800
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * _SUITE_S)]

# vLLM's own tests that fail here on purpose, or by chance.
_CHATS = "openai/chat_completion/test_chat.py"
EXPECTED = {
    # /invocations is 404 (docs/limits.md).
    f"{_CHATS}::test_invocations",
    "serve/sagemaker/test_sagemaker_stateful_sessions.py::test_create_session_badrequest",
    # The finish reason of a stream has an event of its own (docs/lanes.md).
    f"{_CHATS}::test_chat_streaming[bench]",
    # Every answer has an id.
    "serve/middleware/test_optional_middleware.py::test_no_request_id_header",
    # Two answers that are drawn at random must differ.
    f"{_CHATS}::test_structured_outputs_regex_chat",
    f"{_CHATS}::test_structured_outputs_choice_chat",
}

ENGINE = {
    **systems.ENGINE,
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "max_num_seqs": 32,
}
# Routes and fields that vLLM's own tests ask for.
ENGINE |= dict.fromkeys(("enable_prompt_tokens_details", "enable_tokenizer_info_endpoint"), True)


@pytest.fixture(scope="module")
def ours(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _serving("ours", 8770, smollm, tmp_path_factory)


@pytest.fixture(scope="module")
def bare(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _serving("bare", 8775, smollm, tmp_path_factory)


def _serving(name: str, port: int, model: Path, folders: pytest.TempPathFactory) -> Iterator[str]:
    folder = folders.mktemp(name)
    with systems.running(name, ENGINE, str(model), port, folder) as system:
        systems.wait(system)
        yield f"http://127.0.0.1:{port}"


def results(command: list[str], url: str, model: Path) -> dict[str, str | None]:
    """By check: its error, or None where it passed."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "SERVER_URL": url,
        "SERVER_MODEL": systems.NAME,
        "SERVER_MODEL_FOLDER": str(model),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_TESTS": os.environ.get("VLLM_TESTS", ""),
    }
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SUITE_S)
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"check"')]
    # A program that was killed, as for its memory, leaves out the checks that it had not begun.
    assert lines, ran.stdout + ran.stderr
    assert ran.returncode >= 0, f"{command} ended with {ran.returncode} after {len(lines)} checks"
    return {line["check"]: line["error"] for line in lines}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: Path(client.program).stem)
def test_a_client_finds_here_what_it_finds_at_a_bare_vllm(
    client: Client, ours: str, bare: str, smollm: Path
) -> None:
    if client.program.endswith(".mjs") and shutil.which("npm") is None:
        pytest.skip("no Node.js here")
    command = client.command()
    here, there = results(command, ours, smollm), results(command, bare, smollm)
    assert not only_here(client.program, here, there)
    assert here.keys() == there.keys()
    passing = sum(error is None for error in here.values())
    assert passing > len(here) / 2, here


@pytest.mark.skipif("VLLM_TESTS" not in os.environ, reason="VLLM_TESTS names no folder")
def test_vllms_own_tests_pass_here_where_they_pass_at_a_bare_vllm(
    ours: str, bare: str, smollm: Path
) -> None:
    program = PROGRAMS / "vllm_entrypoints.py"
    command = [sys.executable, str(program)]
    here, there = results(command, ours, smollm), results(command, bare, smollm)
    assert here.keys() == there.keys()
    assert not only_here(program.name, here, there).keys() - EXPECTED


def only_here(
    program: str, here: dict[str, str | None], there: dict[str, str | None]
) -> dict[str, str | None]:
    """The checks that fail here and pass at a bare vLLM, with their errors."""
    failing = {check: error for check, error in here.items() if error is not None}
    found = {check: failing[check] for check in failing if there.get(check, "absent") is None}
    both = len(failing) - len(found)
    print(
        f"{program}: {len(here) - len(failing)} of {len(here)} pass here, {both} fail on both, "
        f"only here fail {found}"
    )
    return found
