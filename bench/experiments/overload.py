"""A server at ten times its capacity: the tokens/s that remain, and the latency of refusals.

    python -m bench.experiments.overload --url URL --users N [--times 10] [--rounds 3]
                                         [--seconds 20] [--api-key-env NAME]

In turn: a closed loop of N users, which is as many as the server serves at once, for its capacity;
then an open loop of `times` the requests/s that it just answered. Said are, over rounds, tokens/s
under overload as a ratio to capacity, the time to a refusal (429 or 503, from the planned time),
and whether every request that was let in was served whole. The last line is one JSON object.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence

import msgspec

from bench import interval, measure, run
from bench.records import Record
from bench.traffic import access, load, schedule, workload
from bench.traffic.target import Target

REFUSED = (429, 503)


def send(target: Target, options: argparse.Namespace, when: str, seed: int) -> list[Record]:
    """One load of `seconds`; prompts of its own seed."""
    what, how = workload.parse(options.workload, seed), schedule.parse(when)
    plan = schedule.plan(what, how, None, options.seconds, seed)
    outcome = asyncio.run(load.run(plan, target, options.actors, lambda records, progress: None))
    return outcome.records


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Capacity and overload, measured one after the other.

    Attributes:
        ratio: tokens/s under overload divided by the capacity.
        broken: requests that were neither served completely nor refused; there should be none.
    """

    capacity_tokens_per_s: float | None
    offered_per_s: float
    overload_tokens_per_s: float | None
    ratio: float
    sent: int
    served: int
    refused: int
    broken: int
    refusal_p50_ms: float | None
    refusal_p99_ms: float | None
    lag_p99_ms: float | None


def measured_round(target: Target, options: argparse.Namespace, seed: int) -> Round:
    """Measure the capacity, then the same server under overload."""
    records = send(target, options, f"users={options.users}", seed)
    capacity = measure.measure(records, window=measure.window(records, options.users))
    rate = options.times * (capacity.requests_per_s or 0.0)
    records = send(target, options, f"poisson:rate={rate!r}", seed + 1)
    # The server is full within a second; what is still under way at the end is left out.
    to_s = max(record.planned_s for record in records)
    over = measure.measure(records, window=(min(1.0, to_s / 4), to_s))
    refused = [record for record in records if record.status in REFUSED]
    waits_s = [wait for record in refused if (wait := measure.e2e_s(record)) is not None]
    return Round(
        capacity_tokens_per_s=capacity.output_tokens_per_s,
        offered_per_s=rate,
        overload_tokens_per_s=over.output_tokens_per_s,
        ratio=(over.output_tokens_per_s or 0.0) / (capacity.output_tokens_per_s or 1.0),
        sent=len(records),
        served=sum(record.ok for record in records),
        refused=len(refused),
        broken=sum(not record.ok and record.status not in REFUSED for record in records),
        refusal_p50_ms=_ms(waits_s, 0.5),
        refusal_p99_ms=_ms(waits_s, 0.99),
        lag_p99_ms=_ms([measure.lag_s(record) or 0.0 for record in records], 0.99),
    )


def _ms(values_s: Sequence[float], share: float) -> float | None:
    """A percentile in ms; None if there are too few values."""
    if len(values_s) < interval.samples_needed(share):
        return None
    return sorted(values_s)[int(share * (len(values_s) - 1))] * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True)
    parser.add_argument(
        "--users", type=int, required=True, help="concurrent requests that fill the server"
    )
    parser.add_argument("--workload", default="synthetic:input=20,output=256,exact=yes")
    parser.add_argument("--times", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each load")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--api-key-env", default="", help="environment variable with the API key")
    options = parser.parse_args()
    target = Target(
        url=options.url,
        model="",
        headers=access.headers(options.api_key_env, "authorization", []),
        extra={"temperature": 0},
    )
    target = run.with_model(target)
    load.connect()
    rounds = []
    for number in range(options.rounds):
        rounds.append(measured_round(target, options, 2 * number))
        print(msgspec.json.encode(rounds[-1]).decode(), file=sys.stderr)
    ratios = [each.ratio for each in rounds]
    output = {
        "benchmark": "overload",
        "times": options.times,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "broken": sum(each.broken for each in rounds),
        "rounds": rounds,
    }
    print(msgspec.json.encode(output).decode())
    return 1 if output["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
