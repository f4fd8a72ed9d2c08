"""Tenants on a real server with a real engine: the ledger beside vLLM's own counters.

Port 8300.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.tenants.commands import main
from serve_app.tenants.database import Database
from serve_app.tenants.ledger import COLUMNS, Ledger
from tests.server import Server, configuration, launched, wait

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tenants") / "t.sqlite3")


@pytest.fixture(scope="module")
def server(
    smollm: Path, database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    config = configuration(8300, tenants={"database": database})
    with launched(config, tmp_path_factory.mktemp("server")) as running:
        assert running.ready(), running.output()
        yield running


def key_of(name: str, database: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["add", name, *words, "--database", database]) == 0
    return capsys.readouterr().out.strip()


def ask(server: Server, key: str, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    body = {"prompt": "The capital of France is", "max_tokens": 16, **fields}
    return httpx.post(f"{server.url}/v1/completions", headers=headers, json=body, timeout=120)


def counted(server: Server, key: str) -> list[float]:
    """vLLM's own counts of tokens read and written."""
    headers = {"authorization": f"Bearer {key}"}
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    return [server.metric(name, **headers) for name in names]


def rows(database: str) -> list[dict[str, Any]]:
    ledger = Ledger(Database(database), "test")
    found = [dict(zip(COLUMNS, each, strict=True)) for each in ledger.rows(0, 1e12)]
    ledger.database.close()
    return found


def test_the_ledger_has_what_the_engine_counted(
    server: Server, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = key_of("ann", database, capsys)
    # A key works within a second or two of its tenant.
    assert wait(lambda: ask(server, key, max_tokens=1).status_code == 200)
    assert wait(lambda: len(rows(database)) >= 1)
    before, known = counted(server, key), len(rows(database))
    choices = [1 + number % 3 for number in range(12)]
    for number, n in enumerate(choices):
        assert ask(server, key, stream=number % 2 == 0, n=n).status_code == 200
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        headers={"authorization": f"Bearer {key}"},
        json={"prompt": "Once upon a time", "max_tokens": 400, "stream": True, "ignore_eos": True},
        timeout=120,
    ) as stream:
        for place, _ in enumerate(stream.iter_lines()):
            if place == 20:
                break  # The client leaves.
    assert wait(lambda: len(rows(database)) == known + 13)
    new = rows(database)[known:]
    after = counted(server, key)
    read, written = (b - a for a, b in zip(before, after, strict=True))
    print({"vllm": (read, written), "rows": len(new)})
    # vLLM counts a prompt once for each of its answers, and a client pays for it once.
    prompts = [row["prompt_tokens"] * n for row, n in zip(new, [*choices, 1], strict=True)]
    assert sum(prompts) == pytest.approx(read, rel=0.001)
    assert sum(row["output_tokens"] for row in new) == pytest.approx(written, rel=0.001)
    assert [row["outcome"] for row in new].count("left") == 1
    assert all(row["gpu_s"] > 0 for row in new)


def test_a_limit_is_kept(server: Server, database: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = key_of("bob", database, capsys, "--tokens-per-day", "300")
    assert wait(lambda: ask(server, key, max_tokens=1).status_code == 200)
    statuses = [ask(server, key, max_tokens=100, ignore_eos=True).status_code for _ in range(4)]
    assert statuses == [200, 200, 402, 402]
    refused = ask(server, key, priority=-1)
    assert refused.status_code == 400
