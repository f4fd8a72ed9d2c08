"""A request in the gateway: what it sends to a replica, and what routing needs."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from starlette.types import Scope

from serve_app.errors import BadRequest
from serve_app.gates import reading, routes
from serve_app.gates.keys import tenant
from serve_app.gates.reading import Reading
from serve_app.gates.work import Work
from serve_app.gateway.accounts import Attempts
from serve_app.gateway.fleet import Upstream
from serve_app.gateway.routing import prefix_keys
from serve_app.replica.accounts import HEADER as ACCOUNT_HEADER
from serve_app.replica.backend import (
    CONTINUE_HEADER,
    PREFIX_HEADER,
    SHARE_HEADER,
    TENANT_HEADER,
    TOKEN_HEADER,
)

# Headers that concern a single connection.
HOP_HEADERS = frozenset(
    (b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"upgrade")
)
_OWN_HEADERS = frozenset(
    (
        TOKEN_HEADER.encode(),
        CONTINUE_HEADER.encode(),
        PREFIX_HEADER.encode(),
        TENANT_HEADER.encode(),
        SHARE_HEADER.encode(),
        ACCOUNT_HEADER.encode(),
        b"x-request-id",
    )
)


@dataclass
class Request:
    """One request and its attempts.

    Attributes:
        path: with its query.
        given: the client's headers, by their names in lower case.
        model: the name in its body; None: it has none.
        stream: whether the answer is to come as a stream.
        keys, session: what routing goes by.
        tokens: what it is expected to cost a replica: prompt and answer.
        deaths: replicas that died under it, less those that it was innocent of.
        attempts: replicas that failed it.
        tried: their names, and those of replicas that were full.
        work: what engines do for it; None if it is not counted.
        reports: that are to come of that.
    """

    id: str
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    given: Mapping[bytes, bytes] = field(default_factory=dict)
    model: str | None = None
    stream: bool = False
    keys: tuple[int, ...] = ()
    session: str | None = None
    tokens: int = 0
    deaths: int = 0
    attempts: int = 0
    tried: list[str] = field(default_factory=list)
    work: Work | None = None
    reports: Attempts | None = None

    @classmethod
    def of(
        cls, scope: Scope, body: bytes, session_header: str, main: str | None = None
    ) -> "Request":
        """The request of an ASGI scope, with the reading that LimitGate stored in it.

        Args:
            main: the model of requests that name none.
        """
        given = {name: value for name, value in scope["headers"]}
        request_id = _text(given.get(b"x-request-id", b"")) or uuid.uuid4().hex
        headers = [
            (_text(name), _text(value))
            for name, value in scope["headers"]
            if name not in HOP_HEADERS and name not in _OWN_HEADERS
        ]
        # The same for each attempt: the answer's id is made of it.
        headers.append(("x-request-id", request_id))
        # A name may be in any script, a header may not.
        headers.append((TENANT_HEADER, quote(tenant.get())))
        if prefix := scope.get("root_path"):
            headers.append((PREFIX_HEADER, prefix))
        if (share := scope.get("state", {}).get("share")) is not None:
            headers.append((SHARE_HEADER, f"{share.weight!r} {share.rank}"))
        query = scope.get("query_string", b"").decode("latin-1")
        raw = scope.get("raw_path") or quote(scope["path"]).encode()
        path = raw.decode("latin-1").partition("?")[0] + (f"?{query}" if query else "")
        parsed = _reading(scope, body)
        header = _text(given.get(session_header.encode(), b""))
        made = cls(request_id, scope["method"], path, headers, body, given, parsed.model)
        made.stream = parsed.stream
        made.work = scope.get("state", {}).get("work")
        made.session = header or parsed.session
        if parsed.sequences:
            # The KV cache of an adapter is not the one of its model, or of another adapter.
            made.keys = prefix_keys(parsed.prompt_head, of=parsed.model or main)
            made.tokens = parsed.prompt_tokens_expected + parsed.output_tokens_expected
        return made

    def headers_for(self, replica: Upstream) -> list[tuple[str, str]]:
        """The headers of an attempt."""
        headers = [*self.headers, (TOKEN_HEADER, replica.token)]
        return headers if self.reports is None else [*headers, self.reports.begin(replica)]

    def unreported(self, lost: bool = False) -> None:
        """No replica need report the attempts so far; `lost`: it failed as it answered."""
        if self.reports is not None:
            self.reports.give_up(lost)

    def listing(self, path: str) -> "Request":
        """A GET of `path` with the credentials of this request."""
        return replace(self, method="GET", path=path, body=b"", tried=[], work=None)


def _text(value: bytes) -> str:
    """A header's value, which aiohttp sends as UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _reading(scope: Scope, body: bytes) -> Reading:
    """What LimitGate read of the body, or what stands in it where no LimitGate is."""
    left: Reading | None = scope.get("state", {}).get("reading")
    if left is not None:
        return left
    try:
        return reading.read(routes.find(scope["path"]) or routes.OTHER, body)
    except BadRequest:
        return Reading()  # The engine says what is wrong with it.
