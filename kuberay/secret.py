"""The Secrets that the manifests name, made of the environment or made up; never of a file here.

    qwen-api-keys   QWEN_API_KEYS, separated by commas; else one key is made up
    qwen-redis      a password is made up
    qwen-hub        HF_TOKEN, where it is set

A Secret that is there is left as it is. Values go to kubectl through a pipe, where no list of
processes shows them, and by server-side apply, which keeps no copy of them in an annotation.
"""

import base64
import json
import os
import secrets
from collections.abc import Mapping

from kuberay.tools import Tools

NAMESPACE = "qwen"
KEYS = "QWEN_API_KEYS"


def make(run: Tools) -> str:
    """Make those that lack. Returns an API key that the service takes."""
    there = {
        found["metadata"]["name"]: found
        for found in run.items("secrets")
        if found["metadata"]["namespace"] == NAMESPACE
    }
    keys = _given() or [f"sk-{secrets.token_urlsafe(32)}"]
    wanted: dict[str, Mapping[str, str]] = {
        "qwen-api-keys": {"keys": "\n".join(keys) + "\n"},
        "qwen-redis": {"password": secrets.token_urlsafe(32)},
    }
    if token := os.environ.get("HF_TOKEN"):
        wanted["qwen-hub"] = {"HF_TOKEN": token}
    for name, values in wanted.items():
        if name not in there:
            _apply(run, name, values)
    if "qwen-api-keys" in there:
        held = base64.b64decode(there["qwen-api-keys"]["data"]["keys"]).decode()
        keys = [line.strip() for line in held.splitlines() if line.strip()]
    return keys[0]


def _given() -> list[str]:
    return [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]


def _apply(run: Tools, name: str, values: Mapping[str, str]) -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "stringData": dict(values),
    }
    run.kubectl("apply", "--server-side", "--filename", "-", stdin=json.dumps(manifest))
