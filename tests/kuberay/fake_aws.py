"""Requests to the tests' AWS without its SDK, which takes a second to load.

Most calls of a tool make no request: what one needs is loaded where it is used.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_VERSIONS = {
    "cloudformation": "2010-05-15",
    "ec2": "2016-11-15",
    "elasticloadbalancing": "2015-12-01",
}


def eks(method: str, path: str, **body: Any) -> Any:
    output = _send("eks", method, path, json.dumps(body).encode(), "application/json")
    return json.loads(output)


def query(service: str, action: str, **more: str) -> str:
    from urllib.parse import urlencode

    form = urlencode({"Action": action, "Version": _VERSIONS[service], **more})
    kind = "application/x-www-form-urlencoded"
    return _send(service, "POST", "/", form.encode(), kind).decode()


def _send(service: str, method: str, path: str, body: bytes, kind: str) -> bytes:
    import urllib.request

    scope = f"testing/20260101/us-west-2/{service}/aws4_request"
    headers = {
        "authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0",
        "content-type": kind,
    }
    url = os.environ["AWS_ENDPOINT_URL"] + path
    request = urllib.request.Request(url, body, headers, method=method)
    with urllib.request.urlopen(request) as answer:
        result: bytes = answer.read()
        return result
