"""Rewrites the configuration that Ray Serve generates for HAProxy, then becomes HAProxy.

Ray Serve starts ./haproxy in HAProxy's place (RAY_SERVE_HAPROXY_BINARY_PATH), at each start and at
each reload. Ray Serve offers no settings for what is changed here. A rule that finds nothing to
change means that Ray's template has moved: HAProxy then does not start, and says which rule it was,
instead of running without what the rule guarantees.

Standard library only, and nothing of this package: a reload waits for this program.
"""

import itertools
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MARK = "# Rewritten by serve_app/launch/haproxy.py."


class UnknownTemplate(Exception):
    """Ray Serve's configuration is not the one that the rules below were written for."""


@dataclass(frozen=True)
class Rule:
    """A change of every line that matches.

    Attributes:
        why: the purpose, for the reader and for the error where nothing matches.
        pattern: matched against the whole text, with ^ and $ at each line.
        replacement: as for `re.sub`.
    """

    why: str
    pattern: str
    replacement: str

    def apply(self, text: str) -> str:
        """The text with the rule applied.

        Raises:
            UnknownTemplate: no line matches.
        """
        changed, count = re.subn(self.pattern, self.replacement, text, flags=re.MULTILINE)
        if not count:
            raise UnknownTemplate(f"no line to change for: {self.why}")
        return changed


def _error(status: int, message: str, kind: str, code: str, more: str = "") -> Rule:
    """Ray Serve answers its own errors in plain text; clients parse JSON."""
    body = (
        f'{{"type":"error","error":{{"message":"{message}","type":"{kind}",'
        f'"param":null,"code":"{code}"}}}}'
    )
    return Rule(
        why=f"JSON for status {status}",
        pattern=rf"^( *)errorfile {status} .*$",
        replacement=rf"\1http-error status {status} content-type application/json string '{body}'"
        + more,
    )


RULES = (
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
    _error(
        502,
        "the replica died before it answered; ask again",
        "server_error",
        "unavailable",
        " hdr Retry-After 1",
    ),
    _error(503, "no replica is up; ask again", "server_error", "unavailable", " hdr Retry-After 1"),
    _error(504, "the replica did not answer in time", "timeout_error", "timeout"),
)


def rewritten(text: str) -> str:
    """The configuration with every rule applied; one that was rewritten before is left alone.

    Raises:
        UnknownTemplate: a rule finds nothing to change.
    """
    if text.startswith(MARK):
        return text
    for rule in RULES:
        text = rule.apply(text)
    return f"{MARK}\n{text}"


def main(words: list[str], environment: Mapping[str, str]) -> None:
    """Rewrite each file that stands after -f, then run HAProxy with the same arguments."""
    for option, value in itertools.pairwise(words):
        if option == "-f":
            path = Path(value)
            try:
                path.write_text(rewritten(path.read_text()))
            except UnknownTemplate as error:
                sys.exit(f"serve_app: Ray Serve's configuration of HAProxy has changed: {error}")
    binary = environment["SERVE_APP_HAPROXY"]
    os.execv(binary, [binary, *words])


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
