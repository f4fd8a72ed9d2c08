"""What tenants cost a request at the door: CPU time of the gates with and without them.

    python -m bench.experiments.tenant_cost [--tenants 10000] [--requests 3000]

The same requests go through KeyGate and LimitGate, and through these and the gate of tenants, with
a quota of every kind, a journal and a SQLite database, in front of an application that answers at
once. Rounds alternate, and each gives the mean CPU time of the process for a request, in
microseconds; the median of the rounds is reported, and the least, which other programs of the
machine disturb less. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.gates.keys import KeyGate, KeyRing
from serve_app.gates.limits import LimitGate
from serve_app.settings import ApiKeys, Limits, Settings, Tenants
from serve_app.tenants.gate import book_of, gated
from serve_app.tenants.registry import Registry
from serve_app.tenants.tenant import digest

_BODY = json.dumps({"model": "m", "prompt": "x" * 800, "max_tokens": 128}).encode()
_ROUNDS = 20


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    done = scope["state"].get("work")
    if done is not None:
        done.has_counts, done.prompt_tokens, done.output_tokens = True, 200, 128
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def ask(app: ASGIApp, key: str) -> None:
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"x-request-id", b"one")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope |= {"headers": headers, "state": {}}

    async def receive() -> Message:
        return {"type": "http.request", "body": _BODY, "more_body": False}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)


async def measure(folder: Path, tenants: int, requests: int) -> dict[str, float]:
    """Microseconds of a request, without and with tenants: median and least."""
    limits = "{requests_per_minute: 100000000, tokens_per_minute: 10000000000, "
    limits += "tokens_per_day: 10000000000, tokens_per_month: 10000000000, running_requests: 1000}"
    lines = [
        f"- {{name: t{n}, quota: {limits}, keys: [{{sha256: {digest(b'k%d' % n)}}}]}}"
        for n in range(tenants)
    ]
    (folder / "tenants.yaml").write_text("tenants:\n" + "\n".join(lines))
    (folder / "keys").write_text("t0 k0\nt1 k1\n")
    settings = Settings(tenants=Tenants(file=str(folder / "tenants.yaml")))
    registry, book = Registry(settings.tenants, ApiKeys()), book_of(settings)
    assert book is not None
    ring = KeyRing(ApiKeys(file=str(folder / "keys")))
    plain = KeyGate(LimitGate(answer, Limits()), ring)
    with_tenants = KeyGate(
        LimitGate(gated(answer, registry, "m", book, settings), Limits()), registry
    )
    cost_us: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(_ROUNDS):
        for name, app in (("without", plain), ("with", with_tenants)):
            await ask(app, "k0")
            began_ns = time.process_time_ns()
            for number in range(requests // _ROUNDS):
                await ask(app, f"k{number % 2}")
            took_ns = time.process_time_ns() - began_ns
            cost_us[name].append(took_ns / 1000 / (requests // _ROUNDS))
    await book.close()
    return {
        f"{statistic.__name__}_{name}": statistic(values)
        for name, values in cost_us.items()
        for statistic in (statistics.median, min)
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.tenant_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tenants", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=3000, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(Path(folder), arguments.tenants, arguments.requests))
    for name in ("median", "min"):
        without, with_tenants = found[f"{name}_without"], found[f"{name}_with"]
        found[f"{name}_more"] = with_tenants - without
        print(
            f"{name:6} {without:.0f} us without, {with_tenants:.0f} us with tenants: "
            f"{with_tenants - without:.0f} us more"
        )
    json.dump({**found, "tenants": arguments.tenants}, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
