"""How an endpoint lets bench in: an API key, more headers, a certificate authority of its own.

The same four options for every command that asks an endpoint, Locust's users included. A key comes
from an environment variable, so that no list of processes shows it; what a header says is left out
of the recorded command line.
"""

import os
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from bench.errors import TargetError

BEARER = "authorization"
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# The client frames each request itself.
_FRAMING = frozenset({"content-length", "transfer-encoding", "connection", "content-type"})


def arguments(add: Callable[..., Any], prefix: str = "", **kinds: Any) -> None:
    """Add the options to a parser through its `add_argument`, which also gets `kinds`."""
    about = "the environment variable that holds the API key"
    add(f"--{prefix}api-key-env", default="", help=about, **kinds)
    about = "the header of the key; in %(default)s it is a bearer token"
    add(f"--{prefix}key-header", default=BEARER, metavar="NAME", help=about, **kinds)
    about = "'NAME: VALUE', one more header of each request; may be repeated"

    more = {"action": "append", "default": [], "metavar": "HEADER", **kinds}
    add(f"--{prefix}header", help=about, **more)
    about = "file with the certificate authority (PEM) to trust in place of the system's"
    add(f"--{prefix}ca", default="", metavar="FILE", help=about, **kinds)


def headers(
    key_env: str, key_header: str, more: Iterable[str], environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The headers that let a request in, by their names in lower case.

    Raises:
        TargetError: no such variable, or not a header.
    """
    collected: dict[str, str] = {}
    if key_env:
        key = environ.get(key_env, "").strip()
        if not key:
            raise TargetError.of("api-key-env", key_env, "this environment variable is not set")
        bearer = key_header.lower() == BEARER
        collected |= _header(f"{key_header}: {'Bearer ' if bearer else ''}{key}", "key-header")
    for text in more:
        collected |= _header(text, "header")
    return collected


def _header(text: str, option: str) -> dict[str, str]:
    name, colon, value = text.partition(":")
    name, value = name.strip().lower(), value.strip()
    # The value may be a secret: it is in no message.
    if not colon or not _NAME.fullmatch(name):
        raise TargetError.of(option, name, "must be 'NAME: VALUE'")
    if not value or not value.isprintable():
        raise TargetError.of(option, name, "its value is empty, or not one line of text")
    if name in _FRAMING:
        raise TargetError.of(option, name, "is set by bench itself")
    return {name: value}


def tls(ca_file: str) -> ssl.SSLContext:
    """What verifies a server's certificate: the system's authorities, or those of the file.

    Raises:
        TargetError: the file cannot be read, or has no certificate.
    """
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:  # Includes ssl.SSLError.
        raise TargetError.of("ca", ca_file, f"no certificate authority: {error}") from None


def same_server(url: str, other: str) -> bool:
    """Whether both URLs are of one server, which alone may see what lets a request in."""
    return _server(url) == _server(other)


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def shown(words: Iterable[str]) -> list[str]:
    """A command line without what its headers say."""
    result: list[str] = []
    for word in words:
        option, equals, text = word.partition("=")
        if result and _is_header(result[-1]):
            result.append(_without_value(word))
        elif equals and _is_header(option):
            result.append(f"{option}={_without_value(text)}")
        else:
            result.append(word)
    return result


def _is_header(option: str) -> bool:
    # argparse takes a prefix of an option for the option.
    return option.startswith(("--head", "--bench-head"))


def _without_value(text: str) -> str:
    return text.partition(":")[0] + ": ..."
