"""Whether Prometheus agrees with bench: counts exactly, medians within a tenth.

    python -m bench.experiments.observed --model FOLDER [--requests 400] [--users 8]
                                         [--screenshot FILE]

This application runs together with `observe`. bench measures a load as a client, and the result is
compared with the growth of Prometheus' counters during the load. With `--screenshot`, Chromium
takes a picture of the status page during the load. The last line is one JSON object; the exit
status is 1 if the two do not agree.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from bench import result
from bench.engine import systems
from bench.errors import ResultError
from bench.figures import Run
from serve_app import processes

_PORT, _PROMETHEUS_PORT, _STATUS_PORT = 8880, 8888, 8889
# Ray's agents pass on every 10 s what they were told every 5, and Prometheus looks every 5.
_SEEN_S = 25.0
_END_S = 60.0
_WITHIN = 0.1
COUNTS = {
    "requests": 'sum(ray_serve_app_requests_total{route="/v1/completions"})',
    "input_tokens": "sum(ray_serve_app_prompt_tokens_total)",
    "output_tokens": "sum(ray_serve_app_generated_tokens_total)",
}
MEDIANS = {
    "ttft_p50_s": "ray_serve_app_time_to_first_token_seconds_bucket",
    "itl_p50_s": "ray_serve_app_inter_token_seconds_bucket",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a local model folder")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--screenshot", type=Path, help="PNG file")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="observed.") as made:
        folder = Path(made)
        with systems.running("ours", systems.ENGINE, options.model, _PORT, folder) as system:
            systems.wait(system)
            with observing(folder):
                # The growth of a series counts from its first sample.
                load(folder / "first", requests=options.users, users=options.users)
                time.sleep(_SEEN_S)
                before = prometheus_series()
                run = load(folder / "load", options.requests, options.users, options.screenshot)
                time.sleep(_SEEN_S)
                after = prometheus_series()
    rows = compared(run, before, after)
    print(
        msgspec.json.encode(
            {"benchmark": "observed", "agree": all(row.agree for row in rows), "rows": rows}
        ).decode()
    )
    return 0 if all(row.agree for row in rows) else 1


@contextlib.contextmanager
def observing(folder: Path) -> Iterator[None]:
    """`python -m serve_app observe`, from when its page is there."""
    command = [sys.executable, "-m", "serve_app", "observe"]
    command += ["--prometheus-port", str(_PROMETHEUS_PORT), "--status-port", str(_STATUS_PORT)]
    environment = {**os.environ, **systems.apart(_PORT)}
    with (
        open(folder / "observe.log", "wb") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            until_s = time.monotonic() + 60
            while not _answers(f"http://127.0.0.1:{_STATUS_PORT}/"):
                if process.poll() is not None or time.monotonic() > until_s:
                    raise SystemExit((folder / "observe.log").read_text())
                time.sleep(0.2)
            yield
        finally:
            processes.end(process, _END_S)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def load(out: Path, requests: int, users: int, picture: Path | None = None) -> Run:
    """A closed loop by `bench run`; its result."""
    command = [sys.executable, "-m", "bench", "run", "--url", f"http://127.0.0.1:{_PORT}"]
    command += ["--model", systems.NAME, "--load", f"users={users}", "--requests", str(requests)]
    command += ["--workload", "synthetic:input=50,output=64,exact=yes", "--repeats", "1"]
    command += ["--warm-up", "0"]  # What bench does not count, Prometheus would.
    with subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        if picture is not None:
            time.sleep(30)
            screenshot(picture)
        stdout, _ = process.communicate()
    try:
        return result.read(out, run=Run)
    except ResultError as error:
        raise SystemExit(f"{error}\n{stdout}") from error


def screenshot(picture: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("--screenshot: no chromium on PATH")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    command += ["--window-size=1200,520", "--virtual-time-budget=6000"]
    command += [f"--screenshot={picture.absolute()}", f"http://127.0.0.1:{_STATUS_PORT}/"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


Series = dict[str, dict[float, float]]


def prometheus_series() -> Series:
    """Counts and buckets from Prometheus: by name, values by upper bound (0 for a count)."""
    figures: Series = {}
    for name, expression in COUNTS.items():
        figures[name] = {0.0: sum(value for _, value in _query(expression))}
    for name, metric in MEDIANS.items():
        buckets = _query(f"sum by (le) ({metric})")
        figures[name] = {float(labels["le"]): value for labels, value in buckets}
    return figures


def _query(expression: str) -> list[tuple[dict[str, str], float]]:
    query = urllib.parse.urlencode({"query": expression})
    url = f"http://127.0.0.1:{_PROMETHEUS_PORT}/api/v1/query?{query}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        series = json.load(answer)["data"]["result"]
    return [(each["metric"], float(each["value"][1])) for each in series]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A figure by bench and by Prometheus; counts agree if they are equal."""

    what: str
    bench: float | None
    prometheus: float
    agree: bool


def compared(run: Run, before: Series, after: Series) -> list[Row]:
    (whole,) = run.whole
    rows: list[Row] = []
    for name in COUNTS:
        ours = getattr(whole, name)
        grown = after[name][0.0] - before[name][0.0]
        rows.append(Row(what=name, bench=ours, prometheus=grown, agree=ours == grown))
    for name in MEDIANS:
        grown_by = {
            bound: value - before[name].get(bound, 0) for bound, value in after[name].items()
        }
        value = quantile(0.5, sorted(grown_by.items()))
        ours = getattr(whole, name)
        agree = bool(ours) and abs(value / ours - 1) <= _WITHIN
        rows.append(Row(what=name, bench=ours, prometheus=value, agree=agree))
    return rows


def quantile(share: float, buckets: Sequence[tuple[float, float]]) -> float:
    """As Prometheus' histogram_quantile has it.

    Args:
        buckets: upper bounds, ascending, and how many values are at most that.
    """
    wanted = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


if __name__ == "__main__":
    sys.exit(main())
