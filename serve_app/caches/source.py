"""Where archives of caches come from and go to: a folder, or an s3:// address."""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from serve_app.errors import ConfigError

_PIECE_BYTES = 2**20
_ANSWER_S = 10.0


class Source(Protocol):
    """Files by name."""

    def get(self, name: str, into: Path, deadline_s: float) -> None:
        """Write the file to `into`.

        Raises:
            FileNotFoundError: there is none.
            TimeoutError: it was not there by `deadline_s` of the monotonic clock.
            OSError: it cannot be read.
        """

    def put(self, name: str, file: Path) -> None:
        """Write it whole or not at all.

        Raises:
            OSError: it cannot be written.
        """


def at(address: str) -> Source:
    """The source at a folder or an s3:// address.

    Raises:
        ConfigError: it is neither.
    """
    if address.startswith("s3://"):
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError("compiled", address, "must be s3://BUCKET/PREFIX or a folder")
        return Bucket(bucket, prefix.strip("/"))
    if "://" in address:
        raise ConfigError("compiled", address, "must be s3://BUCKET/PREFIX or a folder")
    return Folder(Path(address).expanduser())


class Folder:
    """A folder, as of a volume or of an image."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def get(self, name: str, into: Path, deadline_s: float) -> None:
        with (self._path / name).open("rb") as source, into.open("wb") as target:
            _copy(source, target, deadline_s)

    def put(self, name: str, file: Path) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        fresh = self._path / f".{name}.{os.getpid()}"
        try:
            shutil.copyfile(file, fresh)
            fresh.replace(self._path / name)
        finally:
            fresh.unlink(missing_ok=True)


class Bucket:
    """A prefix of a bucket in S3, or of what speaks its API (AWS_ENDPOINT_URL)."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix

    def __str__(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    def get(self, name: str, into: Path, deadline_s: float) -> None:
        with _as_os_errors(f"{self}/{name}"):
            body = self._client().get_object(Bucket=self._bucket, Key=self._key(name))["Body"]
            with contextlib.closing(body), into.open("wb") as target:
                _copy(body, target, deadline_s)

    def put(self, name: str, file: Path) -> None:
        with _as_os_errors(f"{self}/{name}"):
            self._client().upload_file(str(file), self._bucket, self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        retries = {"max_attempts": 3, "mode": "standard"}
        config = Config(connect_timeout=_ANSWER_S, read_timeout=_ANSWER_S, retries=retries)
        return boto3.client("s3", config=config)


@contextlib.contextmanager
def _as_os_errors(address: str) -> Any:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey", "NoSuchBucket"):
            raise FileNotFoundError(f"{address} does not exist") from None
        raise OSError(f"{address}: {error}") from error
    except (BotoCoreError, Boto3Error) as error:
        raise OSError(f"{address}: {error}") from error


def _copy(source: Any, target: Any, deadline_s: float) -> None:
    while piece := source.read(_PIECE_BYTES):
        target.write(piece)
        if time.monotonic() > deadline_s:
            raise TimeoutError("the transfer took too long")
