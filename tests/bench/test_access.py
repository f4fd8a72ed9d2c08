"""What lets a request in: keys, headers and authorities, from the command line to the wire."""

import argparse
import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench import scrape
from bench.errors import TargetError
from bench.traffic import access
from bench.traffic.target import Target
from tests.bench.made import certificate_of_localhost
from tests.server import wait


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    access.arguments(parser.add_argument)
    return parser.parse_args(words)


def headers(*words: str, **environ: str) -> dict[str, str]:
    options = parsed(*words)
    return access.headers(options.api_key_env, options.key_header, options.header, environ)


def test_a_key_is_a_bearer_token_or_a_header_of_its_own() -> None:
    assert headers() == {}
    assert headers("--api-key-env", "K", K="s1") == {"authorization": "Bearer s1"}
    own = headers("--api-key-env", "K", "--key-header", "X-API-Key", K="s1\n")
    assert own == {"x-api-key": "s1"}


def test_headers_are_added_and_win() -> None:
    words = ["--header", "X-Tenant: a b: c", "--header", "authorization:Basic eA=="]
    assert headers("--api-key-env", "K", *words, K="s1") == {
        "authorization": "Basic eA==",
        "x-tenant": "a b: c",
    }


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--api-key-env", "NONE"], "'NONE': this environment variable is not set"),
        (["--api-key-env", "K", "--key-header", "x api"], "must be 'NAME: VALUE'"),
        (["--api-key-env", "BROKEN"], "not one line of text"),
        (["--header", "no-colon-secret"], "must be 'NAME: VALUE'"),
        (["--header", ": secret"], "must be 'NAME: VALUE'"),
        (["--header", "x-api-key:  "], "its value is empty"),
        (["--header", "x-api-key: a\r\nhost: b"], "not one line"),
        (["--header", "Content-Length: 3"], "is set by bench itself"),
    ],
)
def test_what_is_no_header_is_refused_and_its_value_not_shown(
    words: list[str], problem: str
) -> None:
    with pytest.raises(TargetError, match=problem) as raised:
        headers(*words, K="secret", BROKEN="secret\nhost: b")
    assert "secret" not in str(raised.value).replace("no-colon-secret", "")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--header", "x-api-key: secret", "--out", "a"], ["--header", "x-api-key: ..."]),
        (["--header=x-api-key: secret"], ["--header=x-api-key: ..."]),
        (["--head", "x-api-key:secret"], ["--head", "x-api-key: ..."]),
        (["-u", "1", "--bench-header", "a: secret"], ["-u", "1", "--bench-header", "a: ..."]),
        (["--extra", '{"a": 1}'], ["--extra", '{"a": 1}']),
    ],
)
def test_a_recorded_command_line_has_no_secret(words: list[str], shown: list[str]) -> None:
    assert access.shown(words)[: len(shown)] == shown
    assert len(access.shown(words)) == len(words)


def test_a_server_is_scheme_host_and_port() -> None:
    assert access.same_server("https://a/v1", "https://a:443/metrics")
    assert not access.same_server("https://a/v1", "https://b/metrics")
    assert not access.same_server("https://a/v1", "http://a/metrics")
    assert not access.same_server("http://a:8000", "http://a:9090/metrics")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_wrong_authority_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TargetError, match=r"ca = '.*ca.pem': no certificate authority"):
        access.tls(str(path))


@contextlib.asynccontextmanager
async def metrics_server(tls: ssl.SSLContext | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nvllm:num_requests_running 3\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}", seen


async def scraped(url: str, target: Target) -> Any:
    scraper = scrape.Scraper([f"{url}/metrics"], 0.01, target=target)
    async with scraper.running():
        assert await asyncio.to_thread(wait, lambda: bool(scraper.scrapes or scraper.failed))
    return scraper


async def test_metrics_are_scraped_as_the_target_is_asked(tmp_path: Path) -> None:
    certificate = certificate_of_localhost(tmp_path)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    async with metrics_server(tls) as (url, seen):
        target = Target(url=f"{url}/v1", model="m", headers={"x-api-key": "secret"})
        assert (await scraped(url, target)).scrapes == []
        trusting = Target(url=url, model="m", headers=target.headers, ca_file=str(certificate))
        assert (await scraped(url, trusting)).scrapes[0][1] == {"running": 3.0}
    assert b"x-api-key: secret" in seen[-1].lower()


async def test_another_server_sees_no_key() -> None:
    async with metrics_server(None) as (url, seen):
        target = Target(url="http://127.0.0.1:1/v1", model="m", headers={"x-api-key": "secret"})
        assert (await scraped(url, target)).scrapes
    assert b"secret" not in seen[0]
