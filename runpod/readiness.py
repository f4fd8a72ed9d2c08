"""Waits until a deployment has answered a completion, and says how to send the next one."""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import rest
from completion import Hopeless, Question, Target
from deployment import PORT, Deployment
from teardown import ENDPOINT, POD

KEYS = "API_KEYS"
_PROXY = "https://{pod}-{port}.proxy.runpod.net"
# The first and the longest pause between two checks.
_PERIOD_S = (0.5, 5.0)
# A pod that was just started may once more report that it is stopped.
_DEAD_LOOKS = 3
# A log stream that has been silent for this long has sent its whole tail.
SILENCE_S = 5.0
_DEAD = ("is ERROR", "is EXITED", "is TERMINATED")


def _target(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> Target | None:
    """Where to ask; None while it has no address."""
    account = os.environ["RUNPOD_API_KEY"]
    keys = wanted.environment().get(KEYS, "").split(",")
    # A secret's reference is not the key: then only its owner can ask.
    api_key = os.environ.get(KEYS, "").split(",")[0].strip() or keys[0].strip() or None
    if wanted.mode == "pod":
        proxy = os.environ.get("RUNPOD_PROXY_URL") or _PROXY
        return Target(proxy.format(pod=thing["id"], port=PORT), api_key=api_key)
    urls = thing.get("requestUrls") or client.get(f"{ENDPOINT.path}/{thing['id']}").get(
        "requestUrls"
    )
    if not urls:
        return None
    if wanted.mode == "queue":
        return Target(urls["run"], urls["status"], urls["cancel"], account)
    return Target(urls["base"], runpod_key=account, api_key=api_key)


def wait(
    client: rest.Client,
    wanted: Deployment,
    thing: Mapping[str, Any],
    options: argparse.Namespace,
) -> int:
    """Until a completion came back, or none will. Returns the exit status."""
    began_s, shown, question, dead = time.monotonic(), "", None, 0
    period_s, longest_s = _PERIOD_S
    problem = f"no completion within {options.wait_s:g} s"
    try:
        while time.monotonic() - began_s < options.wait_s:
            state = _state(client, wanted, thing)
            dead = dead + 1 if state.endswith(_DEAD) else 0
            if dead >= _DEAD_LOOKS:
                raise Hopeless(f"the {state}")
            if state != shown:
                shown = state
                print(f"{time.monotonic() - began_s:5.0f} s  {state}", flush=True)
            if question is None and (target := _target(client, wanted, thing)) is not None:
                question = Question(target)
            if question is not None and (text := question.ask()) is not None:
                print(f"up after {time.monotonic() - began_s:.0f} s; it says: {text.strip()!r}")
                _how_to_ask(wanted, question)
                return 0
            time.sleep(period_s)
            period_s = min(1.5 * period_s, longest_s)
    except (Hopeless, rest.ApiError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    if question is not None:
        question.withdraw()
    print(f"failed: {problem}", file=sys.stderr)
    _last_words(client, wanted, thing)
    if not options.keep:
        _quiet(client, wanted, thing)
    return 1


def _state(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> str:
    """Where it stands, as one line."""
    try:
        if wanted.mode == "pod":
            status = client.get(f"{POD.path}/{thing['id']}")["status"]
            return f"pod is {status}"
        summary = client.get(f"{ENDPOINT.path}/{thing['id']}/workers")["summary"]
    except rest.ApiError as error:
        if error.status in (401, 403, 404):
            raise Hopeless(str(error)) from None
        return str(error)
    counts = [f"{summary[word]} {word}" for word in summary if word != "total" and summary[word]]
    state = "workers: " + (", ".join(counts) or "none yet")
    if summary["throttled"] and summary["throttled"] == summary["total"]:
        state += " (no capacity: more --gpu or no --data-center finds more)"
    return state


def _last_words(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> None:
    """The end of the logs, which are gone once the workers are."""
    for path, who in log_paths(client, wanted.name):
        try:
            for event in client.events(path, SILENCE_S, tail="30"):
                print(f"[{who}] {event.get('line', '')}")
        except rest.ApiError as error:
            print(f"[{who}] no logs: {error}")


def _quiet(client: rest.Client, wanted: Deployment, thing: Mapping[str, Any]) -> None:
    """Let nothing bill that does not serve; `up` with a mended image brings it back."""
    try:
        if wanted.mode == "pod":
            client.post(f"{POD.path}/{thing['id']}/action", {"action": "stop"})
            print("the pod is stopped; `down` deletes it")
        else:
            path = f"{ENDPOINT.path}/{thing['id']}"
            client.patch(path, {"workers": {"min": 0, "max": 0}})
            print("the endpoint's workers are taken away; `down` deletes it")
    except rest.ApiError as error:
        print(f"it may bill on: {error}", file=sys.stderr)


def _how_to_ask(wanted: Deployment, question: Question) -> None:
    """The same question for a shell in which the keys are where they are now."""
    target = question.target
    url, headers = target.url.rstrip("/"), ['"Authorization: Bearer $RUNPOD_API_KEY"']
    ours = "${API_KEYS%%,*}"  # The first of them.
    if wanted.mode == "pod":
        headers = [f'"Authorization: Bearer {ours}"']
    elif wanted.mode == "queue":
        url = url.removesuffix("/run") + "/openai"
    elif target.api_key:
        headers.append(f'"x-api-key: {ours}"')
    body = {"model": question.model, "messages": [{"role": "user", "content": "Hello"}]}
    words = "".join(f" -H {header}" for header in headers)
    print(f"curl {url}/v1/chat/completions{words} \\")
    print(f"  -H 'content-type: application/json' -d '{json.dumps(body)}'")


def log_paths(client: rest.Client, name: str) -> list[tuple[str, str]]:
    """The log streams of a deployment, each with who speaks."""
    paths = [(f"{POD.path}/{pod['id']}/logs", pod["id"]) for pod in POD.ours(client, name)]
    for endpoint in ENDPOINT.ours(client, name):
        path = f"{ENDPOINT.path}/{endpoint['id']}/workers"
        for worker in client.get(path)["workers"]:
            paths.append((f"{path}/{worker['id']}/logs", worker["id"]))
    return paths
