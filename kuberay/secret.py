"""The Secrets that the manifests name, made of the environment or made up; never of a file here.

    qwen-api-keys   QWEN_API_KEYS, separated by commas; else one key is made up
    qwen-redis      a password is made up
    qwen-lane       what HAProxy and the doors of the replicas share; made up
    qwen-hub        HF_TOKEN, where it is set

A value in the environment replaces the existing value, so a changed key or token arrives with the
next `up`. A value that is not in the environment stays. Values go to kubectl through a pipe, where
no list of processes shows them, and by server-side apply, which keeps no copy of them in an
annotation.
"""

import base64
import json
import os
import secrets
from collections.abc import Mapping, Sequence

from kuberay.console import say
from kuberay.tools import Tools

NAMESPACE = "qwen"
KEYS = "QWEN_API_KEYS"
_API_KEYS, _REDIS, _LANE = "qwen-api-keys", "qwen-redis", "qwen-lane"
_HUB, _TOKEN = "qwen-hub", "HF_TOKEN"
Values = Mapping[str, str]


def make(run: Tools) -> str:
    """Make the Secrets that lack, and change those that the environment names otherwise.

    Returns:
        An API key that the service takes.
    """
    existing = current(run)
    lines = _lines(existing)
    if given := _given():
        if lines and lines != given:
            say(
                "    the API keys are replaced by those of QWEN_API_KEYS: pods read them in minutes"
            )
        lines = given
    lines = lines or [new_key()]
    _apply(run, existing, _API_KEYS, {"keys": "".join(f"{line}\n" for line in lines)})
    if _REDIS not in existing:
        # A new password would lock the head out of its state.
        _apply(run, existing, _REDIS, {"password": secrets.token_urlsafe(32)})
    if _LANE not in existing:
        # Pods read it when they start: another one would reach some of them only.
        _apply(run, existing, _LANE, {"secret": secrets.token_urlsafe(32)})
    if token := os.environ.get(_TOKEN):
        if _HUB in existing and existing[_HUB].get(_TOKEN) != token:
            say("    the hub's token is replaced: workers take it when they start")
        _apply(run, existing, _HUB, {_TOKEN: token})
    return _key(lines)


def rotate(run: Tools, only: bool) -> str:
    """Add a new API key before the existing ones, or put it in their place. Returns it."""
    existing, key = current(run), new_key()
    lines = [key, *([] if only else _lines(existing))]
    _apply(run, existing, _API_KEYS, {"keys": "".join(f"{line}\n" for line in lines)})
    return key


def new_key() -> str:
    return f"sk-{secrets.token_urlsafe(32)}"


def current(run: Tools) -> dict[str, Values]:
    """The values of each Secret of our namespace."""
    return {
        secret["metadata"]["name"]: {
            key: base64.b64decode(value).decode() for key, value in secret.get("data", {}).items()
        }
        for secret in run.items("secrets")
        if secret["metadata"]["namespace"] == NAMESPACE
    }


def _lines(existing: Mapping[str, Values]) -> list[str]:
    """The lines of the existing API keys: a key, or a tenant's name and its key."""
    text = existing.get(_API_KEYS, {}).get("keys", "")
    stripped = [line.strip() for line in text.splitlines()]
    return [line for line in stripped if line and not line.startswith("#")]


def _key(lines: Sequence[str]) -> str:
    return lines[0].split()[-1]


def _given() -> list[str]:
    return [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]


def _apply(run: Tools, existing: Mapping[str, Values], name: str, values: Values) -> None:
    """Make a Secret, unless it has these values already."""
    if existing.get(name) == values:
        return
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "stringData": dict(values),
    }
    # --force-conflicts: whoever edited it by hand owns the field since then.
    where = ("--server-side", "--force-conflicts", "--filename", "-")
    run.kubectl("apply", *where, stdin=json.dumps(manifest))
