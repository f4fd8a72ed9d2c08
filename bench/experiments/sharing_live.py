"""What a tenant gets beside one that floods, on a real server: order of arrival beside our queue.

    python -m bench.experiments.sharing_live --model FOLDER [--sequences 256] [--times 10]
                                             [--seconds 20] [--unread 3072] [--engine JSON]

Starts one server with three tenants, and sends it these loads in turn, in each round:

    capacity    closed loop of as many users as the batch has sequences: requests/s
    alone       the tenant `good` by itself: a Poisson process of `--load` of half the capacity
    fcfs        the same beside a flood of `--times` the capacity, both with the key of the tenant
                `one`: the requests of one tenant are served in order of arrival
    ours        the same loads again, each with the key of its own tenant, of equal weights

`bench.simulation.sharing` compares the same on a modelled engine; the words mean the same here:

    ttft        of `good`, from the planned time of a request
    served      of the requests of `good`, the share that was answered
    tokens/s    of all answered requests: prompt and output
    jain        Jain's index of the tokens of each tenant, as a share of what it should get
    of half     what `good` asks for (its tokens/s alone) by half of all tokens/s: above 1 it is not
                within its share, as the server does less beside a flood than without one

A tenant that gets no answer has no TTFT (nan): it is longer than the whole load.

The load generator shares the machine with the server, and a flood that it cannot send in time is no
flood: `lag` is the p99 of how late it was. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import yaml

from bench import measure
from bench.engine import systems
from bench.records import Record
from bench.simulation.sharing import jain
from bench.traffic import load, schedule, workload
from bench.traffic.crowd import Crowd
from bench.traffic.sender import Sender, Share, decoder
from bench.traffic.target import Target
from serve_app.tenants.fair import UNREAD_TOKENS
from serve_app.tenants.tenant import digest

# Each tenant's key.
KEYS = {"good": "sk-good", "flood": "sk-flood", "one": "sk-one"}
# Lengths of both tenants' requests, as in bench.simulation.sharing.
_WORKLOAD = "synthetic:input=lognormal(600;0.9),output=lognormal(150;0.8),max=8000,exact=yes"
_SYSTEM = "ours"
# A load of fewer requests is sent by one process.
_FEW = 2000
# Requests of a plan that reach the sending processes in a second.
_HANDED_OVER_PER_S = 5000


class Phase(msgspec.Struct):
    """The figures of one phase of a round.

    Attributes:
        ttft_s: of `good`, in the order of time.
        good_tokens_per_s: of the tokens/s, those of `good`.
        refused: of all requests, the share that was refused.
        errors: of the requests of `good`, how many failed how.
    """

    ttft_s: list[float]
    served: float
    tokens_per_s: float
    good_tokens_per_s: float
    refused: float = 0.0
    lag_p99_s: float = 0.0
    errors: dict[str, int] = msgspec.field(default_factory=dict)


def figures(good: Sequence[Record], flood: Sequence[Record], window: tuple[float, float]) -> Phase:
    """What a phase was, by the requests that were planned in `window`."""
    mine = measure.measure(good, window=window)
    counted = [each for each in good if each.ok and window[0] <= each.planned_s <= window[1]]
    counted.sort(key=lambda each: each.planned_s)
    ttft_s = [ttft for each in counted if (ttft := measure.ttft_s(each)) is not None]
    own = mine.total_tokens_per_s or 0.0
    phase = Phase(ttft_s, 1.0 - (mine.failed_share or 0.0), own, own)
    phase.errors = dict(Counter(each.error for each in good if each.error))
    if flood:
        others = measure.measure(flood, window=window)
        phase.tokens_per_s += others.total_tokens_per_s or 0.0
        phase.refused = (mine.failed + others.failed) / max(1, mine.requests + others.requests)
        phase.lag_p99_s = others.lag_p99_s or 0.0
    return phase


def summary(rounds: Sequence[Mapping[str, Phase]]) -> dict[str, dict[str, float]]:
    """The figures of each phase over all rounds: percentiles of all, means of the rest."""
    of: dict[str, list[Phase]] = defaultdict(list)
    for each in rounds:
        for name, phase in each.items():
            of[name].append(phase)
    ttft_s = {name: [ttft for p in phases for ttft in p.ttft_s] for name, phases in of.items()}

    def mean(name: str, field: str) -> float:
        return float(np.mean([getattr(phase, field) for phase in of[name]]))

    demand = mean("alone", "good_tokens_per_s")
    summaries = {}
    for name in of:
        p50_s, p99_s = _percentiles(ttft_s[name])
        every, good = mean(name, "tokens_per_s"), mean(name, "good_tokens_per_s")
        summaries[name] = {
            "requests": float(len(ttft_s[name])),
            "ttft_p50_s": p50_s,
            "ttft_p99_s": p99_s,
            "ttft_p99_to_alone": p99_s / _percentiles(ttft_s["alone"])[1],
            "served": mean(name, "served"),
            "refused": mean(name, "refused"),
            "tokens_per_s": every,
            "tokens_to_fcfs": every / mean("fcfs", "tokens_per_s"),
            # The demand of `good` is below its half, so that the flood's part is the rest.
            "jain": jain([good / demand, (every - good) / max(1.0, every - demand)]),
            "of_half": demand / max(1.0, every / 2),
            "lag_p99_s": mean(name, "lag_p99_s"),
        }
    return summaries


def doubts(compared: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Why the figures do not say what a tenant within its share gets."""
    of_half = compared["ours"]["of_half"]
    if of_half <= 1:
        return []
    return [f"good asks for {of_half:.2f} of its share beside the flood: choose a lower --load"]


def _percentiles(ttft_s: Sequence[float]) -> tuple[float, float]:
    """p50 and p99; not a number where nothing was answered."""
    p50_s, p99_s = np.percentile(ttft_s or [np.nan], [50, 99])
    return float(p50_s), float(p99_s)


# --- the server and its load ----------------------------------------------------------------


def tenants_file(folder: Path) -> str:
    tenants = [
        {"name": name, "keys": [{"sha256": digest(key.encode())}]} for name, key in KEYS.items()
    ]
    path = folder / "tenants.yaml"
    path.write_text(yaml.safe_dump({"tenants": tenants}))
    return str(path)


def header(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


class Loads:
    """Sends loads to the server, from processes that share this machine's clock."""

    def __init__(self, options: argparse.Namespace, crowd: Crowd) -> None:
        self._options, self._crowd = options, crowd

    def capacity(self) -> float:
        """Requests/s of a full batch."""
        seconds = self._options.seconds
        records = self._send([("one", f"users={self._options.sequences}", 0)])[0]
        # The first prompts are all read at once.
        rate = measure.measure(records, window=(seconds / 3, seconds)).requests_per_s
        if not rate:
            errors = sorted({record.error for record in records if record.error})
            raise SystemExit(f"the server answered nothing: {errors[:3]}")
        return rate

    def phase(self, good: str, flood: str | None, rate: float, seed: int) -> Phase:
        """The good tenant's load alone or beside the flood, with the keys of these tenants."""
        options = self._options
        loads = [(good, f"poisson:rate={options.load * rate / 2!r}", 2 * seed)]
        if flood is not None:
            loads.append((flood, f"poisson:rate={options.times * rate!r}", 2 * seed + 1))
        records = [*self._send(loads), []]
        # By then the flood has filled the queue.
        window = (min(options.warm, options.seconds / 3), options.seconds)
        return figures(records[0], records[1], window)

    def _send(self, loads: Sequence[tuple[str, str, int]]) -> list[list[Record]]:
        """Send each load: whose it is, its schedule and its seed. The records of each."""
        options = self._options
        work: list[tuple[int, Share, Target]] = []
        for place, (tenant, when, seed) in enumerate(loads):
            what, how = workload.parse(options.workload, seed), schedule.parse(when)
            plan = schedule.plan(what, how, None, options.seconds, seed)
            url = f"http://127.0.0.1:{options.port}"
            target = Target(
                url=url, model=systems.NAME, headers=header(tenant), extra={"temperature": 0}
            )
            senders = options.actors if len(plan.planned) > _FEW or plan.closed else 1
            work += [(place, share, target) for share in load.deal(plan, senders)]
        requests = sum(len(share.planned) for _, share, _ in work)
        start_s = time.perf_counter() + 1.0 + requests / _HANDED_OVER_PER_S
        sent = self._crowd.each(_sent, [(share, target, start_s) for _, share, target in work])
        records: list[list[Record]] = [[] for _ in loads]
        for (place, _, _), some in zip(work, sent, strict=True):
            records[place] += some
        return records


def _sent(share: Share, target: Target, start_s: float) -> list[Record]:
    """Send one share; in a process of the crowd."""

    async def send() -> list[Record]:
        batches = Sender(share, target).send(start_s)
        return [record async for batch in batches for record in decoder.decode(batch).records]

    return asyncio.run(send())


def measured_round(loads: Loads, given: float | None, seed: int) -> dict[str, Phase]:
    """The phases of a round, after the capacity unless it is given."""
    rate = given or loads.capacity()
    print(f"capacity: {rate:.1f} requests/s", file=sys.stderr)
    phases = {"alone": ("good", None), "fcfs": ("one", "one"), "ours": ("good", "flood")}
    phases_by_name = {}
    for name, (good, flood) in phases.items():
        phases_by_name[name] = loads.phase(good, flood, rate, seed)
        _, p99_s = _percentiles(phases_by_name[name].ttft_s)
        print(
            f"{name}: TTFT p99 {p99_s:.3f} s, {phases_by_name[name].tokens_per_s:.0f} tokens/s, "
            f"errors {phases_by_name[name].errors}",
            file=sys.stderr,
        )
    return phases_by_name


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    engine = {**options.engine, "max_num_seqs": options.sequences}
    with tempfile.TemporaryDirectory(prefix="sharing.") as name, Crowd(1 + options.actors) as crowd:
        folder, loads = Path(name), Loads(options, crowd)
        changes = {
            "tenants": {"file": tenants_file(folder), "max_unread_tokens": options.unread},
            # In order of arrival a request then waits for about as long as one is served.
            "limits": {"max_queued_requests": options.sequences},
        }
        start = systems.running(
            _SYSTEM, engine, options.model, options.port, folder, changes=changes
        )
        with start as server:
            systems.wait(server, headers=header("one"))
            seeds = range(options.seed, options.seed + options.rounds)
            rounds = [measured_round(loads, options.capacity, seed) for seed in seeds]
    compared = summary(rounds)
    print(table(compared))
    for doubt in (found := doubts(compared)):
        print(f"doubt: {doubt}", file=sys.stderr)
    arguments = {**vars(options), "engine": engine}
    result = {"benchmark": "sharing_live", "arguments": arguments, "results": compared}
    result["doubts"] = found
    print(json.dumps(result))
    return 0


def table(compared: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        f"{'':8}{'requests':>9}{'p50':>8}{'p99':>8}{'to alone':>10}{'served':>8}{'refused':>9}"
        f"{'tokens/s':>10}{'to fcfs':>9}{'jain':>7}{'of half':>9}{'lag p99':>9}"
    ]
    for name, each in compared.items():
        lines.append(
            f"{name:8}{each['requests']:9.0f}{each['ttft_p50_s']:8.3f}{each['ttft_p99_s']:8.3f}"
            f"{each['ttft_p99_to_alone']:10.2f}{each['served']:8.3f}{each['refused']:9.3f}"
            f"{each['tokens_per_s']:10.0f}{each['tokens_to_fcfs']:9.3f}{each['jain']:7.3f}"
            f"{each['of_half']:9.2f}{each['lag_p99_s']:9.3f}"
        )
    return "\n".join(lines)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.sharing_live",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a local model folder")
    add("--sequences", type=int, default=256, help="batch size: %(default)s")
    add(
        "--load", type=float, default=0.8, help="load of `good`, relative to its share: %(default)s"
    )
    add(
        "--times",
        type=float,
        default=10.0,
        help="rate of the flood, relative to the capacity: %(default)s",
    )
    add("--workload", default=_WORKLOAD, help="requests of both tenants: %(default)s")
    add("--capacity", type=float, help="capacity in requests/s; measured by default")
    add("--seconds", type=float, default=20.0, help="duration of each load: %(default)s")
    add("--warm", type=float, default=6.0, help="seconds of warm-up: %(default)s")
    add("--rounds", type=int, default=1)
    add("--seed", type=int, default=1, help="seed of the first round")
    add("--actors", type=int, default=1, help="processes that send the flood: %(default)s")
    add("--port", type=int, default=8100)
    add("--engine", type=json.loads, default=dict(systems.ENGINE), help="vLLM arguments, as JSON")
    add("--unread", type=int, default=UNREAD_TOKENS, help="tenants.max_unread_tokens: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
