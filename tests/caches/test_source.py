"""Archives of caches in a bucket: moto's S3 over HTTP."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from serve_app.caches import archive, source
from serve_app.caches.cache import Cache
from serve_app.errors import ConfigError

KEY = "a" * 24


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer  # Takes half a second to load.

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def account(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="warm")


def made(folder: Path) -> Path:
    (folder / "triton").mkdir(parents=True)
    (folder / "triton" / "kernel").write_bytes(b"k" * 3_000_000)
    return folder


def test_one_node_compiles_and_the_others_fetch(tmp_path: Path) -> None:
    where = source.at("s3://warm/caches/")
    archive.publish(made(tmp_path / "made"), KEY, {"vllm": "0.32.0"}, where)
    cache = Cache.prepare(tmp_path / "other-node", KEY, source.at("s3://warm/caches"))
    assert cache.origin == "fetched"
    assert (cache.folder / "triton" / "kernel").read_bytes() == b"k" * 3_000_000


@pytest.mark.parametrize("address", ["s3://warm/nothing-here", "s3://no-such-bucket/x"])
def test_a_bucket_without_one_is_no_error(tmp_path: Path, address: str) -> None:
    assert Cache.prepare(tmp_path, KEY, source.at(address)).origin == "nothing"


def test_an_upload_that_did_not_end_is_not_taken(tmp_path: Path) -> None:
    where = source.at("s3://warm/cut")
    archive.publish(made(tmp_path / "made"), KEY, {}, where)
    s3 = boto3.client("s3")
    body = s3.get_object(Bucket="warm", Key=f"cut/{KEY}.tar")["Body"].read()
    s3.put_object(Bucket="warm", Key=f"cut/{KEY}.tar", Body=body[: len(body) // 2])
    assert Cache.prepare(tmp_path / "a", KEY, where).origin == "nothing"
    s3.delete_object(Bucket="warm", Key=f"cut/{KEY}.tar")
    assert Cache.prepare(tmp_path / "b", KEY, where).origin == "nothing"


def test_an_endpoint_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began_s = time.monotonic()
        assert Cache.prepare(tmp_path, KEY, source.at("s3://warm/caches")).origin == "nothing"
        assert time.monotonic() - began_s < 30  # Each of a few attempts is bounded.


@pytest.mark.parametrize("address", ["s3://", "s3:///x", "gs://bucket/x"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="compiled"):
        source.at(address)


def test_a_folder_is_an_address(tmp_path: Path) -> None:
    archive.publish(made(tmp_path / "made"), KEY, {}, source.at(str(tmp_path / "volume")))
    assert Cache.prepare(tmp_path / "node", KEY, source.at(str(tmp_path / "volume"))).origin == (
        "fetched"
    )
