"""Does a change lose a request? Every kind of change to a running application, under steady load.

    python -m bench.experiments.changes --model FOLDER --out DIR [--replicas 3] [--requests 2000]

The application starts with a key file. Two loops of greedy streams run against it, with short and
with long answers (`--long-tokens`: minutes). Each answer is compared with the undisturbed one
(chaos.py). Meanwhile these changes are made in turn, as an operator makes them, and each but the
last is complete only when its effect is observed:

    limits      a limit in the deployment's user_config, by `serve deploy`: no replica is replaced
    key         a line in the key file: no replica is replaced
    engine      an engine argument, by `serve deploy`: every replica is replaced, one by one
    down, up    one replica less, and one more again, by the deployment's num_replicas and `serve
                deploy`: no other replica is replaced
    version     another setting, as a new image would: every replica is replaced again
    controller  SIGKILL of Ray Serve's controller

A removed replica finishes its streams first, so with streams of minutes each replacement takes
minutes. No answer may be cut, refused or different; otherwise the exit status is 1. The last line
is one JSON object.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from bench import records, result, scrape
from bench.engine.systems import QUIET, apart
from bench.faults.damage import Chaos
from bench.result import Line
from serve_app import processes

STEPS = ("limits", "key", "engine", "down", "up", "version", "controller")
_KEY, _SECOND_KEY = "sk-of-the-load", "sk-added-meanwhile"
_KEY_ENV = "BENCH_CHANGES_KEY"
_START_S, _CHANGE_S = 300.0, 1800.0
_BETWEEN_S = 20.0  # So that each change meets streams that the one before did not.
_AGREE = 12  # Answers in a row from which all replicas are taken to have learned of it.
_LOOK_S = 0.5
_END_S = 120.0
_CONFIG, _KEYS = "serve_config.yaml", "keys"


# --- the run --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.step:
        return apply(options)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ[_KEY_ENV] = _KEY
    with _serving(options):
        short, long = _loads(options)
        try:
            short.wait()
            (options.out / "over").touch()  # What the long loop waits for.
            long.wait()
        finally:
            for load in (short, long):
                processes.end(load, _END_S, signal.SIGINT)
    output = _result(options)
    print(json.dumps(output))
    return 0 if output["valid"] else 1


def _loads(options: argparse.Namespace) -> tuple["subprocess.Popen[bytes]", ...]:
    """The two loops: the first makes the changes, the second ends when the first has."""
    begun, over = options.out / "begun", options.out / "over"
    for mark in (begun, over):
        mark.unlink(missing_ok=True)
    this = f"{sys.executable} -m bench.experiments.changes --model {options.model}"
    this += f" --out {options.out} --port {options.port} --dashboard {options.dashboard}"
    disturb = []
    for number, step in enumerate(options.only):
        when = f"every={10 + number},count=1,apart={_BETWEEN_S:g},jitter=0"
        command = f"command:{this} --step {step},{when},wait={_CHANGE_S:g}"
        if step == "controller":
            command = f"restart-controller:{when},min_up=1,up=process"
        disturb += ["--disturb", command]
    short = _chaos(options, "short", options.users, options.short_tokens, options.requests, 32)
    wait = f"command:touch {begun}; until [ -e {over} ]; do sleep 1; done,every=1,count=1"
    waiting = ["--disturb", f"{wait},wait={len(STEPS) * _CHANGE_S:g}"]
    long = _chaos(options, "long", options.long_users, options.long_tokens, 1, 2)
    started_long = subprocess.Popen([*long, *waiting], stdin=subprocess.DEVNULL)
    # The expected long answers are requested without disturbances, before anything else.
    while not begun.exists():
        if started_long.poll() is not None:
            raise SystemExit("the long streams failed without disturbances: see above")
        time.sleep(_LOOK_S)
    return subprocess.Popen([*short, *disturb], stdin=subprocess.DEVNULL), started_long


def _chaos(
    options: argparse.Namespace, name: str, users: int, tokens: int, requests: int, distinct: int
) -> list[str]:
    command = [sys.executable, "-m", "bench", "chaos", "--url", f"http://127.0.0.1:{options.port}"]
    command += ["--api-key-env", _KEY_ENV, "--out", str(options.out / name), "--name", name]
    command += ["--workload", f"synthetic:input=20,output={tokens}", "--distinct", str(distinct)]
    command += ["--requests", str(requests), "--users", str(users), "--think", "1"]
    command += ["--most-think", str(options.most_think)] if name == "short" else []
    command += ["--keep-alive" if options.keep_alive else "--no-keep-alive"]
    # With random weights answers repeat themselves, which hides what is doubled. A long one has
    # more tokens than the vocabulary: its penalty counts how often each was used.
    penalty = "repetition_penalty" if name == "short" else "frequency_penalty"
    extra = {penalty: 10 if name == "short" else 2, "ignore_eos": True}
    command += ["--extra", json.dumps(extra)]
    return command


@contextlib.contextmanager
def _serving(options: argparse.Namespace) -> Iterator[None]:
    folder = options.out
    (folder / _KEYS).write_text(f"{_KEY}\n")
    config = yaml.safe_load(Path("serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = options.port
    application = config["applications"][0]
    application["args"] |= {
        "model": str(options.model),
        "served_model_name": "m",
        "replicas": options.replicas,
        "cpus_per_replica": 0.3,
        "api_keys": {"env": None, "file": str((folder / _KEYS).resolve())},
        "gateway": {**application["args"].get("gateway", {}), "enabled": options.gateway},
        "engine": {
            "max_model_len": 2048,
            **application["args"].get("engine", {}),
            **options.engine,
        },
    }
    (folder / _CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "serve_app", "serve", "--config", str(folder / _CONFIG)]
    with (
        open(folder / "server.log", "wb") as log,
        subprocess.Popen(
            command,
            env={**os.environ, **QUIET, **apart(options.port)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
        ) as process,
    ):
        try:
            deadline_s = time.monotonic() + _START_S
            while len(_settled(options) or ()) < options.replicas:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    text = (folder / "server.log").read_text(errors="replace")
                    raise SystemExit(f"the server did not start:\n{text[-4000:]}")
                time.sleep(_LOOK_S)
            yield
        finally:
            processes.end(process, _END_S)


def _result(options: argparse.Namespace) -> Line:
    """What both loops saw, together."""
    loads = {name: result.read(options.out / name, chaos=Chaos) for name in ("short", "long")}
    in_order = sorted(loads["short"].done, key=lambda done: done.number)
    steps = [
        {
            "step": step,
            "took_s": done.until_s - done.at_s,
            "at_s": done.at_s,
            "error": done.error,
        }
        for step, done in zip(options.only, in_order, strict=False)
    ]
    streams_s = [
        record.end_s - record.sent_s
        for record in records.read(options.out / "long" / result.RECORDS)
        if record.end_s and record.sent_s is not None
    ]
    shown: Line = msgspec.to_builtins(
        {
            "benchmark": "changes",
            "valid": all(load.valid for load in loads.values())
            and len(steps) == len(options.only)
            and not any(step["error"] for step in steps),
            "doubts": [doubt for load in loads.values() for doubt in load.doubts],
            "requests": sum(load.answers.asked for load in loads.values()),
            "loads": {
                name: {
                    key: getattr(load, key)
                    for key in ("answers", "faults", "doubled", "missing", "silences", "duration_s")
                }
                for name, load in loads.items()
            },
            "longest_stream_s": max(streams_s, default=None),
            "steps": steps,
            "replicas": options.replicas,
            "gateway": options.gateway,
            "keep_alive": options.keep_alive,
            "machine": loads["short"].machine,
            "out": str(options.out),
        }
    )
    return shown


# --- one change -----------------------------------------------------------------------------


def apply(options: argparse.Namespace) -> int:
    """Make one change, and wait until it is there. Exit status 1, with a reason, if it is not."""
    os.environ[_KEY_ENV] = _KEY
    before = _settled(options)
    if before is None:
        print(f"{options.step}: the application is not at rest", file=sys.stderr)
        return 1
    path = options.out / _CONFIG
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if options.step == "key":
        with open(options.out / _KEYS, "a") as file:
            file.write(f"{_SECOND_KEY}\n")
    else:
        _changed(config, options.step)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        serve = Path(sys.executable).with_name("serve")
        command = [serve, "deploy", path, "-a", options.dashboard]
        # As the launcher starts Ray: with its token.
        subprocess.run(command, env={**os.environ, "RAY_AUTH_MODE": "token"}, check=True)
    is_applied = _is_applied(options, config, before)
    deadline_s = time.monotonic() + _CHANGE_S
    while not is_applied():
        if time.monotonic() > deadline_s:
            print(f"{options.step}: not applied after {_CHANGE_S:g} s", file=sys.stderr)
            return 1
        time.sleep(_LOOK_S)
    after = _settled(options)
    print(f"{options.step}: {before} -> {after}", file=sys.stderr)
    return 0


def _changed(config: dict[str, Any], step: str) -> None:
    """Change the configuration, as an operator would edit it."""
    application = config["applications"][0]
    args = application["args"]
    if step == "limits":
        limits = {"max_tokens": args["engine"]["max_model_len"] - 1000}
        _override(application, "engine", user_config={"limits": limits})
        if args["gateway"]["enabled"]:
            _override(application, "gateway", user_config={"limits": limits})
    elif step == "engine":
        args["engine"]["max_num_seqs"] = 48
    elif step == "version":
        args["stream_gap_ms"] = 40.0
    else:
        # Any change of args would replace every replica.
        change = {"down": -1, "up": 1}[step]
        _override(application, "engine", num_replicas=_replicas(config) + change)


def _override(application: dict[str, Any], name: str, **values: Any) -> None:
    """Set options of a deployment beside what the application says of it."""
    deployments = application.setdefault("deployments", [])
    for deployment in deployments:
        if deployment["name"] == name:
            deployment |= values
            return
    deployments.append({"name": name, **values})


def _replicas(config: dict[str, Any]) -> int:
    """How many engines there are to be."""
    application = config["applications"][0]
    for deployment in application.get("deployments", []):
        if deployment["name"] == "engine" and "num_replicas" in deployment:
            return int(deployment["num_replicas"])
    return int(application["args"]["replicas"])


def _is_applied(
    options: argparse.Namespace, config: dict[str, Any], before: set[str]
) -> Callable[[], bool]:
    """A function that says whether a change has been applied; it is called repeatedly."""
    max_model_len = config["applications"][0]["args"]["engine"]["max_model_len"]
    wanted = _replicas(config)

    def unchanged() -> bool:
        return _settled(options) == before

    def replaced() -> bool:
        after = _settled(options)
        return after is not None and len(after) == wanted and not after & before

    def resized() -> bool:
        after = _settled(options)
        count = min(len(before), wanted)
        return after is not None and len(after) == wanted and len(after & before) == count

    def limited() -> bool:
        body = {"model": "m", "prompt": "a", "max_tokens": max_model_len - 500, "stream": True}
        return _always(lambda: _status(options, _KEY, body) == 400) and unchanged()

    def changed() -> bool:
        return _always(lambda: _status(options, _SECOND_KEY) == 200) and unchanged()

    return {
        "limits": limited,
        "key": changed,
        "engine": replaced,
        "version": replaced,
        "down": resized,
        "up": resized,
    }[options.step]


def _always(seen: Callable[[], bool]) -> bool:
    return all(seen() for _ in range(_AGREE))


def _status(options: argparse.Namespace, key: str, body: dict[str, Any] | None = None) -> int:
    """The status of an answer: to a request for a completion, or for the models."""
    url = f"http://127.0.0.1:{options.port}/v1/{'completions' if body else 'models'}"
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    data = json.dumps(body).encode() if body else None
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _settled(options: argparse.Namespace) -> set[str] | None:
    """The engines' replicas, by id, if all run that are to; None while anything changes."""
    try:
        details = json.loads(scrape.serve_details(options.dashboard))
    except (OSError, ValueError):
        return None
    application = details.get("applications", {}).get("llm", {})
    deployments = application.get("deployments", {})
    if application.get("status") != "RUNNING" or "engine" not in deployments:
        return None
    for deployment in deployments.values():
        states = [replica["state"] for replica in deployment["replicas"]]
        if deployment["status"] != "HEALTHY" or set(states) != {"RUNNING"}:
            return None
        if len(states) != deployment["target_num_replicas"]:
            return None
    return {replica["replica_id"] for replica in deployments["engine"]["replicas"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a model folder")
    add("--out", type=Path, required=True, help="folder of the result")
    add("--replicas", type=int, default=3)
    add("--gateway", action="store_true", help="behind the gateway")
    add("--engine", type=json.loads, default={}, help="vLLM arguments, as JSON")
    add("--requests", type=int, default=2000, help="least number of short requests")
    add("--users", type=int, default=4, help="tokens of short answers")
    add("--short-tokens", type=int, default=64)
    add("--long-users", type=int, default=2)
    add("--long-tokens", type=int, default=8000)
    about = "changes, in this order"
    add("--only", type=lambda text: text.split(","), default=list(STEPS), help=about)
    add(
        "--most-think",
        type=float,
        default=0.0,
        help="longest random pause in seconds; the shortest is 1",
    )
    about = "keep each user's connection between its requests (the default)"
    add("--keep-alive", action=argparse.BooleanOptionalAction, default=True, help=about)
    add("--port", type=int, default=8930)
    add("--dashboard", default="http://127.0.0.1:8265", help="port of the cluster that is started")
    add("--step", choices=STEPS, help="make one change to the running application, and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
