"""Whether bench measures known values: a real server with set times, errors, limits and a stall.

    python -m bench.itself.calibration [--requests 400]

Each case is a load on a small server (`bench/itself/known_server.py`, a process of its own)
and what should be found there. Times must be within 2% or 1 ms, counts exact. The stall is seen by
an open loop, whose requests were due while the server stood still, and hidden by a closed loop,
whose users waited: that both happen is part of what is checked. The last line is one JSON object,
and the exit status is 1 where something was not found.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bench import measure
from bench.itself import known_server, known_words
from bench.measure import Measures
from bench.traffic import load, schedule, workload
from bench.traffic.target import Target

TOLERANCE, TOLERANCE_S = 0.02, 0.001
PORT = 8867
_WORKLOAD = "synthetic:input=20,output=20"
# (what, known, found): times in seconds, everything else exact.
Finding = tuple[str, float, float | None]


def _case(options: Any, when: str, requests: int) -> Measures:
    """One load on a fresh server."""
    with known_server.launched(PORT, known_server.Options(**options)) as server:
        target = Target(url=server.url, model=known_words.MODEL)
        what, how = workload.parse(_WORKLOAD, 0), schedule.parse(when)
        plan = schedule.plan(what, how, requests, None, 0)
        outcome = asyncio.run(load.run(plan, target, 1, lambda records, progress: None))
    return measure.measure(outcome.records)


def _times(options: dict[str, float], when: str, requests: int) -> Iterator[Finding]:
    result = _case(options, when, requests)
    ttft_s, itl_s = options["ttft_ms"] / 1e3, options["itl_ms"] / 1e3
    yield "ttft_p50_s", ttft_s, result.ttft_p50_s
    yield "itl_p50_s", itl_s, result.itl_p50_s
    yield "tpot_p50_s", itl_s, result.tpot_p50_s
    yield "e2e_p50_s", ttft_s + 19 * itl_s, result.e2e_p50_s
    yield "output_tokens", requests * 20, result.output_tokens


def _errors(requests: int) -> Iterator[Finding]:
    result = _case({"error_rate": 0.25, "itl_ms": 2}, "poisson:rate=200", requests)
    yield "http 500", requests // 4, result.failures.get("http 500")
    yield "ok", requests - requests // 4, result.ok
    result = _case({"cut_rate": 0.5, "itl_ms": 2}, "poisson:rate=200", requests)
    yield "cut", requests // 2, result.failures.get("cut")
    # All at once, on a limit of one request a second.
    result = _case({"rate_limit": 1}, f"burst:size={requests},every=60", requests)
    yield "http 429", requests - 1, result.failures.get("http 429")


def _stall(requests: int) -> Iterator[Finding]:
    """2 s of a run of 8 s: an open loop sees it in a quarter of the requests."""
    options = {"ttft_ms": 20, "itl_ms": 2, "stall_at": 3, "stall_s": 2}
    rate = requests / 8
    result = _case(options, f"constant:rate={rate:g}", requests)
    # Those due during the stall waited for its end: at 95% by 2 s less a fifth of its 2 s.
    yield "open loop: ttft_p95_s", 2.02 - 0.05 * 8, result.ttft_p95_s
    result = _case(options, "users=4", requests)
    yield "closed loop hides it: ttft_p90_s", 0.02, result.ttft_p90_s


def agrees(finding: Finding) -> bool:
    what, truth, measured = finding
    if measured is None:
        return False
    if not what.endswith("_s"):
        return measured == truth
    return abs(measured - truth) <= max(TOLERANCE * truth, TOLERANCE_S)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=400, help="of each case")
    requests = parser.parse_args().requests
    load.connect()
    times = {"ttft_ms": 100.0, "itl_ms": 10.0}
    cases: dict[str, Callable[[], Iterator[Finding]]] = {
        "closed loop, 20 users": lambda: _times(times, "users=20", requests),
        "open loop, Poisson 50/s": lambda: _times(times, "poisson:rate=50", requests),
        "errors": lambda: _errors(requests),
        "a stall of 2 s": lambda: _stall(requests),
    }
    rows = []
    print(f"{'':42}{'known':>10}{'found':>10}")
    for name, case in cases.items():
        for finding in case():
            what, truth, measured = finding
            good = agrees(finding)
            rows.append({"case": name, "what": what, "known": truth, "found": measured, "ok": good})
            shown = "-" if measured is None else f"{measured:.4f}"
            note = "" if good else "  differs"
            print(f"{name + ': ' + what:42}{truth:>10.4f}{shown:>10}{note}")
    good = all(row["ok"] for row in rows)
    print(json.dumps({"benchmark": "calibration", "agrees": good, "results": rows}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
