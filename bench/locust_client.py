"""Requests to an OpenAI-compatible endpoint from Locust's greenlets.

Answers are read line by line with geventhttpclient, Locust's fast client. The usual ways do not
show when tokens arrive: `iter_lines` of FastHttpUser waits for 1024 bytes, and that of requests for
512 if a response is not chunked.
"""

import socket
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
from gevent import GreenletExit  # type: ignore[import-untyped]
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

from bench.errors import TargetError
from bench.records import Record
from bench.traffic import access
from bench.traffic.sse import Events, error_text, http_error


def connect(host: str | None, options: Any) -> tuple[HTTPClient, str]:
    """A client of the host, and the path of its API, such as "/v1".

    Raises:
        TargetError: the host is not a URL, or there is no such certificate authority.
    """
    parts = urlsplit(host or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TargetError.of("host", host, "is not http://host:port or https://host")
    if options.bench_ca:
        access.tls(options.bench_ca)  # Says what is wrong with the file.
    client = HTTPClient(
        parts.hostname,
        parts.port,
        ssl=parts.scheme == "https",
        ssl_options={"ca_certs": options.bench_ca} if options.bench_ca else None,
        network_timeout=options.bench_timeout,
        connection_timeout=options.bench_timeout,
    )
    return client, parts.path.rstrip("/") or "/v1"


def first_model(http: HTTPClient, base: str, options: Any) -> str:
    """The model to ask where none is named.

    Raises:
        TargetError: the endpoint cannot be reached, or names none.
    """
    path = f"{base}/models"
    try:
        response = http.request("GET", path, headers=headers(options))
        body = response.read()
        if response.status_code != 200:
            raise TargetError(f"{path}: http {response.status_code}: {error_text(body)}")
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (OSError, HTTPParseError) as error:
        where = f"{http.host}:{http.port}"
        raise TargetError(f"{where} cannot be reached: {error}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise TargetError(f"{path} does not name a model: {error!r}") from None


def headers(options: Any) -> dict[str, str]:
    lines = {"content-type": "application/json"}
    if options.bench_api_key:
        lines["authorization"] = f"Bearer {options.bench_api_key}"
    return lines | access.headers(
        options.bench_api_key_env, options.bench_key_header, options.bench_header
    )


def stream(
    http: HTTPClient,
    path: str,
    body: bytes,
    headers: dict[str, str],
    record: Record,
    now_s: Callable[[], float],
) -> None:
    """Send a request and read its answer into `record`; a failure becomes its error.

    `sent_s` is when the client set about sending: where a connection must be made, before that.
    """
    record.sent_s = now_s()
    answer = Events(record, keep_text=True)
    try:
        response = http.request("POST", path, body=body, headers=headers)
        record.headers_s, record.status = now_s(), response.status_code
        try:
            if record.status == 200:
                _feed(answer, response, now_s)
                answer.end()
            else:
                record.error = http_error(record.status, response.read())
        finally:
            response.release()
    except (OSError, HTTPParseError) as error:
        if not answer.done:
            record.error = record.error or _reason(error, record)
        answer.end()
    except GreenletExit:
        record.error = "interrupted: the run was stopped"
        answer.end()
        raise
    finally:
        record.end_s = now_s()


def _feed(answer: Events, response: Any, now_s: Callable[[], float]) -> None:
    """Hand on the lines up to each empty one, which ends an event, as soon as it is there."""
    lines = b""
    while line := response.readline(b"\n"):
        lines += line
        if line in (b"\n", b"\r\n"):
            answer.feed(lines, now_s())
            lines = b""
    answer.feed(lines + response.read(), now_s())


def _reason(error: Exception, record: Record) -> str:
    """The same failure in the same words as from bench's own client."""
    if isinstance(error, TimeoutError):
        return "timeout: nothing came for as long as --bench-timeout allows"
    if isinstance(error, HTTPParseError | ConnectionResetError) and record.status:
        return (
            f"cut: connection {'reset' if isinstance(error, OSError) else 'closed'} in the response"
        )
    if isinstance(error, HTTPConnectionClosed):
        return "connection closed without a response"
    if isinstance(error, HTTPParseError):
        return f"bad response: not HTTP: {error}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionResetError):
        return "connection reset"
    if isinstance(error, ssl.SSLError):
        return f"tls: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return "unknown host"
    return f"connection failed: {error}"
