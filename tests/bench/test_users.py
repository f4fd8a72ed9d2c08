"""Users of a closed loop: their connections, and how long they are idle."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from bench.itself.known_server import Options, serving
from bench.traffic.request import Request
from bench.traffic.target import Target
from bench.traffic.users import Users

PORT = 8853


def users(path: Path, **changes: Any) -> Users:
    settings: dict[str, Any] = {
        "target": Target(url=f"http://127.0.0.1:{PORT}", model="fake"),
        "requests": [Request(prompt="one two three", output_tokens=3)],
        "users": 3,
        "count": 12,
        "whole": 0.0,
        "most_s": None,
        "seed": 0,
        "clock": time.perf_counter,
        "more": lambda: False,
        "path": path / "records.jsonl",
    }
    return Users(**{**settings, **changes})


@pytest.mark.parametrize(("keep_alive", "connections"), [(True, 3), (False, 12)])
async def test_each_user_keeps_a_connection_of_its_own(
    tmp_path: Path, keep_alive: bool, connections: int
) -> None:
    async with serving(Options(), PORT) as server:
        loop = users(tmp_path, keep_alive=keep_alive)
        await loop.run()
        assert [record.error for record in loop.transcripts] == [""] * 12
        assert server.accepted == connections


def test_pauses_are_drawn_with_each_order_of_magnitude_as_often(tmp_path: Path) -> None:
    loop = users(tmp_path, think_s=1.0, most_think_s=100.0)
    loop._rng = random.Random(1)
    pauses = [loop._idle_s() for _ in range(2000)]
    assert min(pauses) >= 1.0
    assert max(pauses) <= 100.0
    assert sum(pause < 10.0 for pause in pauses) == pytest.approx(1000, abs=100)
    assert users(tmp_path, think_s=2.0)._idle_s() == 2.0
