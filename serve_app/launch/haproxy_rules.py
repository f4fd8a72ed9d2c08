"""Rewrites the configuration that Ray Serve generates for HAProxy, then becomes HAProxy.

Ray Serve runs start_haproxy.sh instead of HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH), at each start
and at each reload. Ray Serve offers no settings for what is changed here. A rule that matches
nothing means that Ray's template has changed: HAProxy then does not start, and the error names the
rule, instead of running without what the rule guarantees.

Standard library only, and nothing of this package: a reload waits for this program.
"""

import itertools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MARK = "# Rewritten by serve_app/launch/haproxy_rules.py."


class UnknownTemplate(Exception):
    """Ray Serve's configuration is not the one that the rules below were written for."""


@dataclass(frozen=True)
class Rule:
    """A change of every line that matches.

    Attributes:
        why: the purpose, for the reader and for the error where nothing matches.
        pattern: matched against the whole text, with ^ and $ at each line.
        replacement: as for `re.sub`.
        where: the rule concerns only a configuration in which this matches too.
    """

    why: str
    pattern: str
    replacement: str
    where: str = ""

    def apply(self, text: str) -> str:
        """The text with the rule applied.

        Raises:
            UnknownTemplate: no line matches.
        """
        if not re.search(self.where, text, flags=re.MULTILINE):
            return text
        changed, count = re.subn(self.pattern, self.replacement, text, flags=re.MULTILINE)
        if not count:
            raise UnknownTemplate(f"no line to change for: {self.why}")
        return changed


_RETRY = " hdr Retry-After 1"
# Message, type and code of what is answered while no replica is up.
_NONE = "no replica is available; try again", "server_error", "unavailable"
_NO_APPLICATION = (
    "no application is served at this path; /-/routes lists their prefixes",
    "invalid_request_error",
    "not_found",
)

_NO_HTTP = "the request is not valid HTTP/1.1, or its headers are longer than 31 KiB"

_LATE = "the request did not arrive in time"


def _body(message: str, kind: str, code: str) -> str:
    """An error as clients parse it."""
    return (
        f'{{"type":"error","error":{{"message":"{message}","type":"{kind}",'
        f'"param":null,"code":"{code}"}}}}'
    )


def _load_lua(name: str) -> str:
    """The section `global`, with a line that loads the actions of a file beside this one."""
    return f'global\n    lua-load-per-thread "{Path(__file__).with_name(name)}"'


def _error(status: int, body: str, headers: str = "") -> Rule:
    """Ray Serve answers its own errors in plain text; clients parse JSON."""
    return Rule(
        why=f"JSON for status {status}",
        pattern=rf"^( *)errorfile {status} .*$",
        replacement=rf"\1http-error status {status} content-type application/json string '{body}'"
        + headers,
    )


def _answer(status: int, body: str = "", headers: str = "") -> str:
    """An answer that HAProxy gives by itself."""
    content = f" content-type application/json string '{body}'" if body else ""
    return f"http-request return status {status}{content}{headers}"


# Ray Serve writes these parts once it knows of an application. A rule adds another use_backend.
_APPLICATION = r"^ *use_backend (?!successor )"
_FALLBACK = r"^ *server \S+ (\S+) check backup$"
# Whether a request is for the application \g<2>. A path may be below several prefixes: Ray Serve
# names the longest first, and the first application that matches gets the request.
_OF = "{ var(txn.application) -m str \\g<2> }"
# Whether it is, and no replica is up.
_NONE_UP = f"if {_OF} !{{ nbsrv(\\g<2>) ge 1 }} !{{ stopping }}"
_HEALTH = "{ path_end /health /ping }"
# Whether a door has let it in (ask_door.lua).
_FAST = "{ var(txn.lane) -m str fast }"

RULES = (
    Rule(
        why="actions in Lua are known before the rules that name them",
        pattern=r"^global$",
        replacement=_load_lua("wait_for_replica.lua"),
    ),
    Rule(
        why="a worker that was replaced passes requests to its successor, which logs them; but not "
        "one that waited at a door and was let in meanwhile: its place is held by this worker",
        pattern=r"^( *)# Static routing based on path prefixes.*$",
        replacement=r"\1http-request set-log-level silent if { stopping }"
        rf"\n\1use_backend successor if {{ stopping }} !{_FAST}\n\g<0>",
    ),
    Rule(
        why="with no replica up, a health check is answered at once, and other requests wait a "
        "bounded time (wait_for_replica.lua); an application that is scaled to zero takes requests",
        pattern=r"^( *)acl is_(\S+) path (\S+)$",
        replacement=r"\g<0>"
        r"\n\1http-request set-var(txn.prefix) str(\3) if is_\2 !{ var(txn.application) -m found }"
        r"\n\1http-request set-var(txn.application) str(\2) if is_\2 "
        r"!{ var(txn.application) -m found }"
        rf"\n\1{_answer(200)} {_NONE_UP} {_HEALTH} {{ env(SERVE_APP_SCALES_TO_ZERO) -m found }}"
        rf"\n\1{_answer(503, _body(*_NONE), _RETRY)} {_NONE_UP} {_HEALTH}"
        rf"\n\1http-request lua.await_replica \2 {_NONE_UP}",
        where=_APPLICATION,
    ),
    Rule(
        why="a replica that does not answer a health check within a second is not healthy",
        pattern=r"^( *)# Enable HTTP connection reuse for better performance$",
        replacement=rf"\1http-request set-timeout server 1s if {_HEALTH}\n\g<0>",
        where=_APPLICATION,
    ),
    Rule(
        why="a node with Ray Serve's own proxy is still ready for requests while no replica is up",
        pattern=r"^( *)acl (backend_\S+_server_up) nbsrv\(.*$",
        replacement=r"\g<0>\n\1acl \2 nbsrv(fallback) ge 1",
        where=_FALLBACK,
    ),
    Rule(
        why="requests do not wait without bound in that proxy",
        pattern=_FALLBACK.removesuffix("$") + r"\n",
        replacement="",
        where=_FALLBACK,
    ),
    Rule(
        why="no splicing: HAProxy 2.8 does not notice that the client of a spliced body left, so "
        "the engine works on, and HAProxy spins on one core until the response ends",
        pattern=r"^ *option splice-re(quest|sponse)\n",
        replacement="",
    ),
    Rule(
        why="statistics and metrics are for this machine only",
        pattern=r"^( *bind )\*?:",
        replacement=r"\g<1>127.0.0.1:",
    ),
    Rule(
        why="a client that sends its headers a byte at a time is given up",
        pattern=r"^defaults$",
        replacement="defaults\n    timeout http-request 20s",
    ),
    Rule(
        why="JSON for what is no HTTP that HAProxy takes, and for a body that does not come; "
        "Ray Serve's template has nothing for them",
        pattern=r"^defaults$",
        replacement="defaults\n    http-error status 400 content-type application/json string "
        f"'{_body(_NO_HTTP, 'invalid_request_error', 'bad_http')}'"
        "\n    http-error status 408 content-type application/json string "
        f"'{_body(_LATE, 'timeout_error', 'timeout')}'",
    ),
    Rule(
        why="JSON for a path below no application's prefix",
        pattern=r'^( *)http-request return status 404 content-type text/plain lf-string "Path .*$',
        replacement=rf"\1{_answer(404, _body(*_NO_APPLICATION))}",
    ),
    _error(
        502,
        _body("the replica failed before it answered; try again", "server_error", "unavailable"),
        _RETRY,
    ),
    _error(503, _body(*_NONE), _RETRY),
    _error(504, _body("the replica did not answer in time", "timeout_error", "timeout")),
)

# Where replicas and HAProxy share a secret (launcher.py), the door of a replica is asked about each
# request that could take the fast lane (ask_door.lua, lanes/door.py).
SECRET_VARIABLE = "SERVE_APP_LANE_SECRET"
# Of HAProxy's buffer, which holds such a request whole, the rest is for headers. Larger bodies take
# the full lane. It takes two buffers of memory for each request that is being read or answered.
_BUFFER_BYTES, _BODY_BYTES = 32768, 24576
_COULD_BE_FAST = (
    "METH_POST { path_end /v1/chat/completions /v1/completions } "
    f"{{ req.fhdr_cnt(content-length) eq 1 }} {{ req.hdr_val(content-length) 1:{_BODY_BYTES} }} "
    "!{ stopping }"
)
# How long HAProxy waits for such a body. Of others limits.body_timeout_s says it.
BODY_TIMEOUT_VARIABLE = "SERVE_APP_BODY_TIMEOUT_S"
# Set where a request needs an API key. The gate of the full lane refuses a request by its headers
# alone, where HAProxy would wait for the body first. So one that sends no key takes the full lane,
# and so does one whose body is late and whose key no door has accepted yet (await_body).
KEYS_VARIABLE = "SERVE_APP_KEYS_REQUIRED"
_KEY_HEADERS = ("authorization", "x-api-key")

# Origins, separated by spaces, whose pages in a browser may read HAProxy's own errors. Replicas add
# these headers to all that they answer (gates/cors.py).
ORIGINS_VARIABLE = "SERVE_APP_ALLOWED_ORIGINS"


def cors_rules(environment: Mapping[str, str]) -> tuple[Rule, ...]:
    """The rules of a HAProxy whose errors pages may read."""
    origins = environment.get(ORIGINS_VARIABLE, "").split()
    if not origins or not all(re.fullmatch(r"[\w.:/*\[\]-]+", origin) for origin in origins):
        return ()
    of_page = "{ var(txn.origin) -m found }"
    if "*" not in origins:
        of_page = f"{{ var(txn.origin) -m str {' '.join(origins)} }}"
    header = r"\1http-after-response set-header"
    missing = "!{ res.hdr(access-control-allow-origin) -m found }"
    return (
        Rule(
            why="a page in a browser can read errors that no replica has seen",
            pattern=r"^( *)# Routes endpoint$",
            replacement=r"\1http-request set-var(txn.origin) req.hdr(origin)"
            rf"\n{header} vary Origin if {of_page} {missing}"
            rf"\n{header} access-control-allow-origin %[var(txn.origin)] if {of_page} {missing}"
            r"\n\g<0>",
        ),
    )


def door_rules(environment: Mapping[str, str]) -> tuple[Rule, ...]:
    """The rules of a HAProxy that asks doors."""
    body_timeout_s = environment.get(BODY_TIMEOUT_VARIABLE) or "20"
    before, could_be_fast = "", _COULD_BE_FAST
    if environment.get(KEYS_VARIABLE):
        # Conditions of one name hold where one of them does.
        before = "".join(rf"\1acl sends_key req.fhdr_cnt({name}) ge 1\n" for name in _KEY_HEADERS)
        could_be_fast += " sends_key"
        before += (
            rf"\1http-request set-var(txn.body_bytes) req.body_len if {_OF} {could_be_fast}\n"
            r"\1acl has_body req.hdr_val(content-length),sub(txn.body_bytes) eq 0\n"
            rf"\1http-request lua.await_body if {_OF} {could_be_fast} !has_body\n"
            r"\1acl has_body var(txn.await_body) -m bool\n"
        )
        could_be_fast += " has_body"
    return (
        Rule(
            why="the action that asks the door",
            pattern=r"^global$",
            replacement=_load_lua("ask_door.lua"),
        ),
        Rule(
            why="a request that could take the fast lane fits a buffer",
            pattern=r"^( *)tune\.bufsize .*$",
            replacement=rf"\1tune.bufsize {_BUFFER_BYTES}",
        ),
        Rule(
            why="the door is asked, and the Rust front end answers what it lets in",
            pattern=r"^( *)use_backend (\S+) if is_\2$",
            replacement=rf"{before}\1http-request wait-for-body time {body_timeout_s}s "
            rf"if {_OF} {could_be_fast}"
            rf"\n\1http-request lua.door \2 if {_OF} {could_be_fast}"
            rf"\n\1http-request set-dst var(txn.host) if {_FAST}"
            rf"\n\1http-request set-dst-port var(txn.port) if {_FAST}"
            rf"\n\1use_backend \2-fast if {_OF} {_FAST}"
            r"\n\g<0>",
            where=_APPLICATION,
        ),
        Rule(
            why="a header names the lane, unless a gateway has said it",
            pattern=r"^( *)# Enable HTTP connection reuse for better performance$",
            replacement=r"\1http-response set-header x-serve-lane python "
            r"unless { res.hdr(x-serve-lane) -m found }\n\g<0>",
            where=_APPLICATION,
        ),
    )


# The Rust front ends of an application. The door names address and port of each; the servers stand
# here by the names of their replicas, so that HAProxy counts the requests of each.
_FAST_BACKEND = """\
backend {name}-fast
    log global
    http-reuse always
    http-request set-timeout server var(txn.timeout_ms)
    http-request del-header x-api-key
{without_prefix}    http-request set-header authorization "Bearer %[var(txn.token)]"
    http-request set-header x-request-id %[var(txn.request_id)]
    http-response set-header x-request-id %[var(txn.request_id)]
    http-response set-header x-serve-lane fast
    http-response lua.add_headers if {{ var(txn.headers) -m found }}
    http-response lua.answered if !{{ status 200 }}
"""
# vllm-rs knows nothing of the application's prefix, of so many bytes.
_WITHOUT_PREFIX = "    http-request set-path %[path,bytes({})]\n"


def rewritten(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The configuration with every rule applied. A rewritten one is returned as it is.

    Raises:
        UnknownTemplate: a rule finds nothing to change.
    """
    if text.startswith(MARK):
        return text
    fast = bool((environment or {}).get(SECRET_VARIABLE))
    more = _SUCCESSOR.format(address=_frontend(text)) + _fallback(text)
    more += _fast_backends(text) if fast else ""
    environment = environment or {}
    for rule in (*RULES, *cors_rules(environment), *(door_rules(environment) if fast else ())):
        text = rule.apply(text)
    return f"{MARK}\n{text}{more}"


def _fast_backends(text: str) -> str:
    """A backend for the Rust front ends of each application."""
    lines = []
    for name in re.findall(r"^ *use_backend (\S+) if is_\1$", text, re.MULTILINE):
        section = re.search(rf"^backend {re.escape(name)}\n((?: .*\n|\n)*)", text, re.MULTILINE)
        if section is None:
            raise UnknownTemplate(f"no backend {name}")
        prefix = re.search(rf"^ *acl is_{re.escape(name)} path (\S+)$", text, re.MULTILINE)
        if prefix is None:
            raise UnknownTemplate(f"no path of {name}")
        without_prefix = "" if prefix[1] == "/" else _WITHOUT_PREFIX.format(len(prefix[1]))
        lines.append(_FAST_BACKEND.format(name=name, without_prefix=without_prefix))
        for server in re.findall(r"^ *server (\S+) (?!.* backup)", section[1], re.MULTILINE):
            lines.append(f"    use-server {server} if {{ var(txn.server) -m str {server} }}\n")
            lines.append(f"    server {server} 0.0.0.0:0\n")
    return "".join(lines)


# A worker that is told to stop keeps the idle connections of its clients, and never again learns
# which servers there are. Its successor listens on the same address. A pooled connection could be
# to a worker that has itself been replaced since.
_SUCCESSOR = """\
backend successor
    http-reuse never
    option http-server-close
    server successor {address}
"""


def _frontend(text: str) -> str:
    """Where this HAProxy listens.

    Raises:
        UnknownTemplate: it is not stated.
    """
    match = re.search(r"^frontend http_frontend\n *bind (\S*):(\d+)$", text, re.MULTILINE)
    if match is None:
        raise UnknownTemplate("no address of the frontend")
    return f"{match[1].removeprefix('*') or '127.0.0.1'}:{match[2]}"


def _fallback(text: str) -> str:
    """A backend for Ray Serve's own proxy on the head node; wait_for_replica.lua asks it."""
    match = re.search(_FALLBACK, text, re.MULTILINE)
    return "backend fallback\n" + (
        f"    server fallback {match[1]} check inter 1s\n" if match is not None else ""
    )


def main(words: list[str], environment: Mapping[str, str]) -> None:
    """Rewrite each file that stands after -f, then run HAProxy with the same arguments."""
    for option, value in itertools.pairwise(words):
        if option == "-f":
            path = Path(value)
            try:
                path.write_text(rewritten(path.read_text(), environment))
            except UnknownTemplate as error:
                sys.exit(f"serve_app: Ray Serve's configuration of HAProxy has changed: {error}")
    binary = environment["SERVE_APP_HAPROXY"]
    os.execv(binary, [binary, *words])


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
