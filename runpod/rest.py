"""A thin client of Runpod's REST v2, for scripts that must not create a thing twice.

Nothing but the standard library, so that it runs where nothing is installed. What is safe to send
again is sent again: after 429 when the answer says so, after 5xx and a lost connection with a
growing pause. A creation that was answered by 5xx or not at all may have happened, so it is
`Unclear` and never repeated here: the caller looks for the name first.
"""

import json
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

URL = "https://api.runpod.io"
_TIMEOUT_S = 60.0
# Pauses between tries: 1, 2, 4 ... seconds, until a request has taken this long in all.
_PATIENCE_S = 180.0
_PAUSE_S = (1.0, 30.0)


class ApiError(Exception):
    """What the API answered, in one sentence. `status` is 0 where there was no answer."""

    def __init__(
        self,
        method: str,
        path: str,
        status: int,
        detail: str,
        retry_after_s: float | None = None,
    ) -> None:
        what = f"HTTP {status}" if status else "no answer"
        super().__init__(f"{method} {path}: {what}: {detail}")
        self.status, self.detail, self.retry_after_s = status, detail, retry_after_s


class Unclear(ApiError):
    """A creation that may or may not have happened."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would be followed with the key in its headers, to whatever host it names."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        return None


opener = urllib.request.build_opener(_NoRedirect)


class Client:
    """Requests with the key of one account.

    Raises (every method):
        ApiError: the answer was no, or there was none in time.
    """

    def __init__(self, key: str, url: str = URL, patience_s: float = _PATIENCE_S) -> None:
        self._key, self._url, self._patience_s = key, url.rstrip("/"), patience_s

    def get(self, path: str, **query: str) -> Any:
        if query:
            path += "?" + urllib.parse.urlencode(query, safe=",")
        return self._persist("GET", path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._persist("POST", path, body)

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._persist("PATCH", path, body)

    def delete(self, path: str) -> bool:
        """Whether it was there. Gone already is as good as deleted."""
        try:
            self._persist("DELETE", path)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def events(self, path: str, timeout_s: float, **query: str) -> Iterator[dict[str, Any]]:
        """The events of a log stream, until it has been silent for `timeout_s`."""
        path += "?" + urllib.parse.urlencode(query)
        request = self._request("GET", path, None)
        request.add_header("Accept", "text/event-stream")
        try:
            with opener.open(request, timeout=timeout_s) as response:
                for line in response:
                    if line.startswith(b"data:"):
                        yield json.loads(line[5:])
        except urllib.error.HTTPError as error:
            raise _error("GET", path, error) from None
        except TimeoutError:
            return
        except (urllib.error.URLError, OSError, HTTPException, ValueError) as error:
            raise ApiError("GET", path, 0, str(error)) from None

    def _persist(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        deadline_s = time.monotonic() + self._patience_s
        pause_s, longest_s = _PAUSE_S
        while True:
            try:
                return self._once(method, path, body)
            except ApiError as error:
                again = error.status in (0, 429) or error.status >= 500
                if not again:
                    raise
                if method == "POST" and error.status != 429:
                    raise Unclear(method, path, error.status, error.detail) from None
                wait_s = error.retry_after_s or pause_s * random.uniform(0.8, 1.2)
                if time.monotonic() + wait_s > deadline_s:
                    raise
                time.sleep(wait_s)
                pause_s = min(2 * pause_s, longest_s)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        request = self._request(method, path, body)
        try:
            with opener.open(request, timeout=_TIMEOUT_S) as response:
                data = response.read()
                return json.loads(data) if data else None
        except urllib.error.HTTPError as error:
            raise _error(method, path, error) from None
        except (urllib.error.URLError, OSError, HTTPException, ValueError) as error:
            raise ApiError(method, path, 0, str(error)) from None

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        request.add_header("Authorization", f"Bearer {self._key}")
        request.add_header("User-Agent", "qwen-ray-serve")
        if data is not None:
            request.add_header("Content-Type", "application/json")
        return request


def _error(method: str, path: str, error: urllib.error.HTTPError) -> ApiError:
    """The sentence in a problem document, and how long to wait where it says so."""
    data = error.read(64 * 2**10).decode("utf-8", "replace")
    try:
        problem = json.loads(data)
        words = [
            str(problem.get("detail") or problem.get("title") or ""),
            *problem.get("errors", []),
        ]
        detail = "; ".join(word for word in words if word) or error.reason
    except (ValueError, AttributeError, TypeError):
        detail = data.strip()[:200] or str(error.reason)
    after = error.headers.get("Retry-After") or ""
    wait_s = float(after) if after.isdigit() else None
    return ApiError(method, path, error.code, str(detail), wait_s)
