"""The ledger of a gateway beside the counters of its real engines, without kills and with them.

Port 8310.
"""

import contextlib
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bench.engine.systems import apart
from serve_app.tenants.commands import main
from serve_app.tenants.database import Database
from serve_app.tenants.ledger import COLUMNS, Ledger
from tests.server import Server, configuration, launched, wait

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]

PORT = 8310
AT_ONCE, KILLS = 8, 3
# vLLM's own counts of prompt and output tokens, as Ray's agent exports them: for each replica.
COUNTERS = ("ray_vllm_prompt_tokens_total", "ray_vllm_generation_tokens_total")
# A replica sets its gauges every 5 s, and Ray reports them to its agent every 10 s.
EXPORT_S = 16.0


@dataclass(frozen=True)
class Fleet:
    """Two engines behind a gateway, and the key and the database of one tenant."""

    server: Server
    database: str
    key: str

    def rows(self) -> list[dict[str, Any]]:
        ledger = Ledger(Database(self.database), "test")
        rows = [dict(zip(COLUMNS, each, strict=True)) for each in ledger.rows(0, 1e12)]
        ledger.database.close()
        return rows

    def counted(self) -> tuple[float, float]:
        """Prompt and output tokens of all engines, once the counts have come to rest."""
        before = self._counted()
        while True:
            time.sleep(EXPORT_S)
            now = self._counted()
            if now == before:
                return now
            before = now

    def _counted(self) -> tuple[float, float]:
        folder = Path(apart(PORT)["RAY_TMPDIR"]) / "ray"
        text = ""
        for group in json.loads((folder / "prom_metrics_service_discovery.json").read_text()):
            for target in group["targets"]:
                text += httpx.get(f"http://{target}/metrics", timeout=30).text
        lines = text.splitlines()
        prompts, outputs = (
            sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))
            for name in COUNTERS
        )
        return prompts, outputs

    def ask(self, number: int, name: str) -> "Asked":
        """One request; every fifth client leaves, every fourth that stays asks for two answers."""
        leaves, n = number % 5 == 0, 2 if number % 4 == 1 else 1
        stream, usage = leaves or number % 2 == 0, number % 3 == 0
        body = {
            "prompt": f"{number} {name}: once upon a time there were",
            "max_tokens": 400 if leaves else 20 + number % 50,
            "ignore_eos": True,
            "n": n,
            "stream": stream,
        }
        if stream and usage:
            body["stream_options"] = {"include_usage": True}
        headers = {"authorization": f"Bearer {self.key}", "x-request-id": name}
        url = f"{self.server.url}/v1/completions"
        told: dict[str, Any] | None = None
        with contextlib.suppress(httpx.HTTPError):
            with httpx.stream("POST", url, headers=headers, json=body, timeout=120) as answer:
                status = answer.status_code
                for place, line in enumerate(answer.iter_lines()):
                    if leaves and place == 10:
                        break
                    line = line.removeprefix("data: ")
                    if line.startswith("{"):
                        told = json.loads(line).get("usage") or told
            return Asked(name, n, status, told)
        return Asked(name, n, None, None)


@dataclass(frozen=True)
class Asked:
    """A request: its answers, its status (None: the connection broke) and the usage it was told."""

    name: str
    n: int
    status: int | None
    usage: dict[str, Any] | None


@pytest.fixture(scope="module")
def fleet(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    database = str(tmp_path_factory.mktemp("tenants") / "t.sqlite3")
    config = configuration(
        PORT,
        model=str(tiny),
        served_model_name="m",
        replicas=2,
        cpus_per_replica=0.5,
        gateway={"enabled": True, "cpus": 0.1},
        tenants={"database": database},
        engine={"dtype": "float32"},
    )
    with launched(config, tmp_path_factory.mktemp("server")) as running:
        assert running.ready(), running.output()
        fleet = Fleet(running, database, _key(database))
        assert wait(lambda: fleet.ask(1, "first").status == 200)
        assert wait(lambda: [row["request_id"] for row in fleet.rows()].count("first") == 1)
        yield fleet


def _key(database: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["add", "ann", "--database", database]) == 0
    return output.getvalue().strip()


def test_the_ledger_of_a_gateway_has_what_its_engines_counted(fleet: Fleet) -> None:
    read, written = fleet.counted()
    names = [f"calm-{number}" for number in range(300)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = list(pool.map(fleet.ask, range(len(names)), names))
    assert {each.status for each in asked} == {200}
    assert wait(lambda: sum(r["request_id"].startswith("calm") for r in fleet.rows()) >= 300)
    after = fleet.counted()
    rows = {row["request_id"]: row for row in fleet.rows() if row["request_id"] in names}
    assert len(rows) == len(names)
    assert Counter(row["lane"] for row in rows.values()).keys() == {"fast", "python"}
    assert not any(row["estimated"] for row in rows.values())
    # vLLM counts a prompt once for each of its answers, and a client pays for it once.
    prompts = sum(rows[each.name]["prompt_tokens"] * each.n for each in asked)
    outputs = sum(row["output_tokens"] for row in rows.values())
    print({"vllm": (after[0] - read, after[1] - written), "ledger": (prompts, outputs)})
    assert prompts == pytest.approx(after[0] - read, rel=0.001)
    assert outputs == pytest.approx(after[1] - written, rel=0.001)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "vllm-rs", "engine", "gateway"])
def test_over_kills_each_request_is_in_the_ledger_once_and_none_costs_less(
    fleet: Fleet, victim: str
) -> None:
    """The counters of a killed replica are gone, so rows are compared with what answers said."""
    names = [f"{victim}-{number}" for number in range(120)]
    title = f"ServeReplica:llm:{victim}" if victim in ("engine", "gateway") else victim
    stop = threading.Event()

    def kill() -> None:
        for _ in range(KILLS):
            if stop.wait(1.5):
                return
            for process in fleet.server.named(title)[:1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = list(pool.map(fleet.ask, range(len(names)), names))
    stop.set()
    killer.join()
    assert fleet.server.ready()
    # A killed process's journal is read within ten seconds of another's next request.
    assert wait(lambda: fleet.ask(1, f"{victim}-after").status == 200, 240)
    served = {each.name for each in asked if each.status == 200}
    assert len(served) > len(asked) / 2

    def missing() -> set[str]:
        fleet.ask(1, f"{victim}-after")
        return served - {row["request_id"] for row in fleet.rows()}

    assert wait(lambda: not missing(), 60), missing()
    rows = [row for row in fleet.rows() if row["request_id"] in names]
    assert max(Counter(row["request_id"] for row in rows).values()) == 1
    of = {row["request_id"]: row for row in rows}
    more = [
        (of[each.name]["output_tokens"] - each.usage["completion_tokens"], _kind(of[each.name]))
        for each in asked
        if each.usage is not None and _differs(each.usage, of[each.name])
    ]
    kinds = Counter(_kind(row) for row in rows)
    print({"victim": victim, "served": len(served), "outcomes": kinds, "more": more})
    # What a replica had written and could not deliver is in the row as well: it was work.
    assert all(tokens > 0 for tokens, _ in more)
    assert len(more) <= KILLS * AT_ONCE


def _differs(usage: dict[str, Any], row: dict[str, Any]) -> bool:
    told = (usage["prompt_tokens"], usage["completion_tokens"])
    return told != (row["prompt_tokens"], row["output_tokens"])


def _kind(row: dict[str, Any]) -> tuple[str, bool]:
    return row["outcome"], bool(row["estimated"])
