"""The effect of prefix affinity on real engines: time to first token and cache hits, by policy.

    python -m bench.experiments.affinity [--policies prefix,least_connections] [--rounds 3]
                                         [--requests 256]

For each policy, in rounds of rotating order: this application with a gateway and two engines, each
with a KV cache for `--cache` (0.6) of all prefixes, and a closed loop of prompts that begin with
one of 64 equally likely prefixes of 1,000 tokens. The first 128 requests are not measured. Hits are
vLLM's own counters, scraped as Prometheus does.

The model (`tiny_model`, wider and deeper) has random weights, because only the length of a prompt
matters, not its content. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import yaml

from bench import result, tiny_model
from bench.engine.systems import QUIET, apart
from bench.errors import ResultError
from bench.figures import Run
from bench.traffic import words
from serve_app import processes

GROUPS, SHARED, UNIQUE, OUTPUT = 64, 1000, 20, 8
_BLOCK = 32
# Requests for each prefix before it counts: the caches are as full as they get.
_WARM = 2
_START_S, _END_S = 240.0, 120.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policies", default="prefix,least_connections,round_robin,random", help="%(default)s"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--cache", type=float, default=0.6)
    parser.add_argument("--hidden", type=int, default=512, help="width of the model: %(default)s")
    parser.add_argument("--layers", type=int, default=6, help="%(default)s")
    parser.add_argument("--port", type=int, default=8870)
    options = parser.parse_args(argv)
    policies = options.policies.split(",")
    results: dict[str, list[Round]] = {policy: [] for policy in policies}
    with tempfile.TemporaryDirectory(prefix="affinity.") as made:
        folder = Path(made)
        corpus = " " + " ".join(words.WORDS * 8)
        model = tiny_model.write(
            folder / "model", options.hidden, options.layers, corpus, vocabulary=4096
        )
        for turn in range(options.rounds):
            for policy in policies[turn % len(policies) :] + policies[: turn % len(policies)]:
                row = measured(policy, model, folder, options, seed=turn)
                results[policy].append(row)
                shown = {"round": turn + 1, "policy": policy, **msgspec.structs.asdict(row)}
                print(json.dumps(shown), flush=True)
    rows = msgspec.to_builtins(compared(results, policies[0]))
    print(json.dumps({"benchmark": "affinity", "results": rows}))
    return 0


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One policy in one round, or the medians of several."""

    ttft_p50_s: float
    ttft_p90_s: float
    hit_ratio: float
    busiest_over_mean: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Ratios of rounds."""

    median: float
    min: float
    max: float


class Compared(Round, frozen=True, kw_only=True):
    """The medians of a policy's rounds.

    Attributes:
        first_ttft_p50_ratio: TTFT of the first policy over this one's, in the same round.
    """

    policy: str
    first_ttft_p50_ratio: Spread


def measured(
    policy: str, model: Path, folder: Path, options: argparse.Namespace, seed: int
) -> Round:
    """One policy, once."""
    with serving(policy, model, folder, options) as url:
        load(url, folder / "warm", options, _WARM * GROUPS, seed + 1000)
        before = counted(options.port)
        measured = load(url, folder / "measured", options, options.requests, seed)
        time.sleep(22)  # Ray's agent is told every 10 s what was counted every 5.
        after = counted(options.port)
    grown = {
        replica: {name: after[replica][name] - before[replica][name] for name in after[replica]}
        for replica in after
    }
    hits = sum(of["prefix_cache_hits"] for of in grown.values())
    work = [of["prompt_tokens"] for of in grown.values()]
    (measures,) = measured.whole
    if measures.ttft_p50_s is None or measures.ttft_p90_s is None:
        raise SystemExit(f"{measures.ok} answers are too few for percentiles: give more --requests")
    return Round(
        ttft_p50_s=measures.ttft_p50_s,
        ttft_p90_s=measures.ttft_p90_s,
        hit_ratio=hits / sum(of["prefix_cache_queries"] for of in grown.values()),
        busiest_over_mean=max(work) / statistics.fmean(work),
    )


def compared(results: dict[str, list[Round]], first: str) -> list[Compared]:
    rows = []
    for policy, rounds in results.items():
        ratios = [
            ours.ttft_p50_s / other.ttft_p50_s
            for ours, other in zip(results[first], rounds, strict=True)
        ]
        medians = {
            name: statistics.median(getattr(each, name) for each in rounds)
            for name in Round.__struct_fields__
        }
        spread = Spread(median=statistics.median(ratios), min=min(ratios), max=max(ratios))
        rows.append(Compared(**medians, policy=policy, first_ttft_p50_ratio=spread))
    return rows


@contextlib.contextmanager
def serving(policy: str, model: Path, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    config = yaml.safe_load(Path("serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = options.port
    blocks = int(options.cache * GROUPS * (SHARED + UNIQUE + OUTPUT) / _BLOCK)
    config["applications"][0]["args"] |= {
        "model": str(model),
        "served_model_name": "m",
        "replicas": 2,
        "cpus_per_replica": 0.5,
        "gateway": {"enabled": True, "cpus": 0.1, "routing": policy},
        "engine": {
            "dtype": "float32",
            "max_model_len": 2048,
            "block_size": _BLOCK,
            "num_gpu_blocks_override": blocks,
        },
    }
    path, log = folder / "serve_config.yaml", folder / f"{policy}.log"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "serve_app", "serve", "--config", str(path)]
    environment = {**os.environ, **QUIET, **apart(options.port)}
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            until_s = time.monotonic() + _START_S
            # Both: the server answers once one is there.
            while log.read_text().count("\nready: ") < 2 or "serving http" not in log.read_text():
                if process.poll() is not None or time.monotonic() > until_s:
                    raise SystemExit(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.2)
            time.sleep(3)  # Until the gateway and Prometheus' numbers know of both.
            yield f"http://127.0.0.1:{options.port}"
        finally:
            processes.end(process, _END_S)


def load(url: str, out: Path, options: argparse.Namespace, requests: int, seed: int) -> Run:
    """A closed loop by `bench run`; its figures."""
    what = f"prefix:groups={GROUPS},depth=1,shared={SHARED},unique={UNIQUE},output={OUTPUT}"
    command = [sys.executable, "-m", "bench", "run", "--url", url, "--workload", what]
    command += ["--load", f"users={options.users}", "--requests", str(requests)]
    command += ["--repeats", "1", "--seed", str(seed), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return result.read(out, run=Run)
    except ResultError as error:
        raise SystemExit(f"{error}\n{done.stdout}{done.stderr}") from error


_SAMPLE = re.compile(r"ray_vllm_(\w+)_total\{(.*)\} (\S+)")
_WANTED = frozenset({"prefix_cache_hits", "prefix_cache_queries", "prompt_tokens"})


def counted(port: int) -> dict[str, dict[str, float]]:
    """vLLM's counters of each replica, as Ray's agents tell them."""
    base = Path(apart(port)["RAY_TMPDIR"]) / "ray" / "prom_metrics_service_discovery.json"
    counts: dict[str, dict[str, float]] = {}
    for group in json.loads(base.read_text(encoding="utf-8")):
        for target in group["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            for name, labels, value in _SAMPLE.findall(text):
                replica = re.search(r'(?:^|,)replica="([^"]*)"', labels)
                if name in _WANTED and replica:
                    of = counts.setdefault(replica[1], dict.fromkeys(_WANTED, 0.0))
                    of[name] += float(value)
    return counts


if __name__ == "__main__":
    sys.exit(main())
