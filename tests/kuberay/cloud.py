"""AWS for the tests: moto's server, reached over HTTP, with faults that can be put into it.

What moto has no service for (the price list, EC2's quotas) `Extras` answers, also over HTTP, in the
form that botocore's service models give. The code under test is told of neither: it finds them
through AWS_ENDPOINT_URL, which is how botocore is pointed elsewhere.

A teardown makes hundreds of requests. Those of other processes arrive over HTTP. Those of this one
are handed to the same application without a socket, after botocore has signed and serialized them.
"""

import functools
import json
import os
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs

import boto3
import botocore.handlers
import botocore.session
from botocore.awsrequest import AWSPreparedRequest, AWSResponse

# Thousands of images that nobody asks for.
os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"

import moto.backends
import moto.core.responses
from moto.core.botocore_stubber import MockRawResponse
from moto.core.request import normalize_request
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.test import run_wsgi_app

from tests.kuberay.eks_parts import EksParts

# moto lists its own folder twice, and the methods of a class once, for every request. Each session
# of botocore parses the service models anew: that of EC2 has six megabytes.
_MODULES = frozenset(moto.backends.list_of_moto_modules())
moto.backends.list_of_moto_modules = lambda: _MODULES
moto.core.responses.method_names_from_class = functools.cache(  # type: ignore[assignment]
    moto.core.responses.method_names_from_class
)
botocore.session.create_loader = functools.cache(botocore.session.create_loader)

REGION = "us-west-2"
ACCOUNT_ID = "123456789012"
WHO = f"arn:aws:iam::{ACCOUNT_ID}:user/tester"

Environ = dict[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]


@dataclass
class Fault:
    """What a call gets in place of its answer, `times` times."""

    code: str
    message: str
    status: int = 400
    times: int = 10**9
    page: bool = False  # The message is a web page, as a proxy sends one.


@dataclass
class Faults:
    """WSGI middleware: what was called, and what is to fail."""

    app: Any
    calls: list[str] = field(default_factory=list)
    planned: dict[str, Fault] = field(default_factory=dict)
    parts: EksParts = field(default_factory=EksParts)

    def deny(self, action: str, resource: str = "*") -> None:
        """Take a permission away, in AWS's words."""
        message = (
            f"User: {WHO} is not authorized to perform: {action} on resource: {resource} "
            f"because no identity-based policy allows the {action} action"
        )
        code = "UnauthorizedOperation" if action.startswith("ec2:") else "AccessDenied"
        self.planned[action.split(":")[1]] = Fault(code, message, 403)

    def throttle(self, action: str, times: int) -> None:
        code = "RequestLimitExceeded" if action.startswith("ec2:") else "ThrottlingException"
        self.planned[action.split(":")[1]] = Fault(code, "Rate exceeded", 400, times)

    def __call__(self, environ: Environ, start: Start) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = BytesIO(body)
        action, form = _action(environ, body)
        self.calls.append(action)
        fault = self.planned.get(action)
        if fault is None or fault.times <= 0:
            return self._answered(environ, start, body)
        fault.times -= 1
        kind, answer = _refusal(fault, form, "Version=2016-11-15" in body.decode(errors="replace"))
        headers = [("content-type", kind), ("x-amzn-errortype", fault.code)]
        if fault.page:
            answer, headers = fault.message.encode(), [("content-type", "text/html; charset=utf-8")]
        start(f"{fault.status} Refused", [*headers, ("content-length", str(len(answer)))])
        return [answer]

    def _answered(self, environ: Environ, start: Start, body: bytes) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        own = self.parts.answer(method, path, body)
        if own is None:
            if method == "DELETE" and (cluster := re.fullmatch("/clusters/([^/]+)", path)):
                self.parts.forget(cluster[1])
            result: Iterable[bytes] = self.app(environ, start)
            return result
        status, output = own
        headers = [("content-type", "application/json")]
        if "__type" in output:
            headers.append(("x-amzn-errortype", output["__type"]))
        text = json.dumps(output).encode()
        start(f"{status} Answer", [*headers, ("content-length", str(len(text)))])
        return [text]


def _action(environ: Environ, body: bytes) -> tuple[str, str]:
    """The operation of a request, and the protocol it came by."""
    if target := environ.get("HTTP_X_AMZ_TARGET"):
        return target.rsplit(".", 1)[-1], "json"
    form = parse_qs(body.decode(errors="replace"))
    if "Action" in form:
        return form["Action"][0], "query"
    if match := re.search(r"/service/\w+/operation/(\w+)", environ["PATH_INFO"]):
        return match[1], "json"
    for method, pattern, name in _REST:
        if method == environ["REQUEST_METHOD"] and re.fullmatch(pattern, environ["PATH_INFO"]):
            return name, "json"
    if "/s3/" in environ.get("HTTP_AUTHORIZATION", ""):
        return ("ListBucket" if "list-type" in environ["QUERY_STRING"] else "Object"), "s3"
    return f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}", "json"


_REST = (
    ("GET", "/clusters/[^/]+", "DescribeCluster"),
    ("DELETE", "/clusters/[^/]+", "DeleteCluster"),
    ("GET", "/clusters/[^/]+/node-groups", "ListNodegroups"),
    ("DELETE", "/clusters/[^/]+/node-groups/[^/]+", "DeleteNodegroup"),
    ("GET", "/2015-02-01/file-systems", "DescribeFileSystems"),
    ("DELETE", "/2015-02-01/file-systems/[^/]+", "DeleteFileSystem"),
)


def _refusal(fault: Fault, form: str, ec2: bool) -> tuple[str, bytes]:
    if form == "json":
        answer = {"__type": fault.code, "message": fault.message, "Message": fault.message}
        return "application/x-amz-json-1.1", json.dumps(answer).encode()
    error = f"<Error><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>"
    if form == "s3":
        text = error
    elif ec2:
        text = f"<Response><Errors>{error}</Errors><RequestID>1</RequestID></Response>"
    else:
        text = f"<ErrorResponse>{error}<RequestId>1</RequestId></ErrorResponse>"
    return "text/xml", text.encode()


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class Cloud:
    """The server, and clients of it for the tests themselves."""

    def __init__(self) -> None:
        self.faults = Faults(DomainDispatcherApplication(create_backend_app))
        botocore.handlers.BUILTIN_HANDLERS.append(("before-send", self._answered))
        self.server: BaseWSGIServer = make_server(
            "127.0.0.1", 0, self.faults, threaded=True, request_handler=_Silent
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.extras = Extras()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ENDPOINT_URL_PRICING": self.extras.url,
            "AWS_ENDPOINT_URL_SERVICE_QUOTAS": self.extras.url,
        }

    def _answered(self, request: AWSPreparedRequest, **_: Any) -> AWSResponse | None:
        """The answer to a request of this process; None sends it over HTTP."""
        if not request.url.startswith(self.url):
            return None
        environ = normalize_request(request).environ
        output, status, headers = run_wsgi_app(self.faults, environ)
        return AWSResponse(request.url, int(status[:3]), headers, MockRawResponse(b"".join(output)))

    @functools.cache  # noqa: B019 - one cloud a session
    def client(self, service: str, region: str = REGION) -> Any:
        return boto3.client(
            service,
            region_name=region,
            endpoint_url=self.url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def reset(self) -> None:
        request = urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")
        urllib.request.urlopen(request).read()
        self.faults.planned.clear()
        self.faults.calls.clear()
        self.faults.parts.reset()
        self.extras.reset()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.extras.close()


class Extras:
    """Service Quotas and the price list, as far as they are asked here.

    Attributes:
        quotas: value by quota code. A code that is not here is not known to AWS.
        prices: dollars an hour by instance type.
        down: answer nothing but 500.
    """

    def __init__(self) -> None:
        self.quotas: dict[str, float] = {}
        self.prices: dict[str, float] = {}
        self.down = False
        self.denied: set[str] = set()
        extras = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                target = self.headers["x-amz-target"].rsplit(".", 1)[-1]
                status, answer = extras.answer(target, json.loads(body))
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/x-amz-json-1.1")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.reset()

    def reset(self) -> None:
        self.quotas = {
            "L-1216C47A": 64.0,
            "L-DB2E81BA": 64.0,
            "L-417A185B": 192.0,
            "L-3819A6DF": 64.0,
            "L-7212CCBC": 192.0,
            "L-F678F1CE": 5.0,
            "L-0263D0A3": 5.0,
        }
        self.prices = {}
        self.down = False
        self.denied = set()

    def answer(self, target: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.down:
            return 500, {"__type": "InternalFailure", "message": "down"}
        if target in self.denied:
            who = f"User: {WHO} is not authorized to perform: servicequotas:{target}"
            return 400, {"__type": "AccessDeniedException", "message": who}
        if target == "GetServiceQuota":
            code = request["QuotaCode"]
            if code not in self.quotas:
                return 400, {"__type": "NoSuchResourceException", "message": code}
            return 200, {"Quota": {"QuotaCode": code, "Value": self.quotas[code]}}
        if target == "GetProducts":
            wanted = {entry["Field"]: entry["Value"] for entry in request["Filters"]}
            return 200, {"FormatVersion": "aws_v1", "PriceList": list(self._products(wanted))}
        return 400, {"__type": "UnknownOperationException", "message": target}

    def _products(self, wanted: dict[str, str]) -> Iterator[str]:
        usd = self.prices.get(wanted["instanceType"])
        if usd is None:
            return
        # As AWS lists them: a reservation of the same type at nothing an hour, before the price.
        for name, price in (("R", "0.0000000000"), ("P", f"{usd:.10f}")):
            dimension = {"unit": "Hrs", "pricePerUnit": {"USD": price}}
            term = {"priceDimensions": {f"{name}.6YS6EN2CT7": dimension}}
            yield json.dumps({"product": {}, "terms": {"OnDemand": {name: term}}})

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
