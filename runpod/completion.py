"""A real completion, asked for as a client of each mode would ask. The last word on 'is it up'."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import rest

# Runpod holds a request for two minutes while no worker is there.
_TIMEOUT_S = 150.0
_CHAT_ROUTE = "/v1/chat/completions"
_CHAT = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
_TEXT = ("choices", 0, "message", "content")
# The code with which the application refuses a key; a refusal without it is Runpod's.
_OUR_REFUSAL = "invalid_api_key"


class Hopeless(Exception):
    """An answer that waiting does not mend; one sentence."""


@dataclass(frozen=True)
class Target:
    """Where to ask, and with which keys.

    Attributes:
        url: the base of a load balancer's or a pod's paths; of a queue, where jobs are submitted.
        status_url, cancel_url: of a queue, with {job_id} for the job.
        runpod_key: for Runpod's gateway, in Authorization; a pod has no gateway.
        api_key: for the application, in x-api-key.
    """

    url: str
    status_url: str = ""
    cancel_url: str = ""
    runpod_key: str | None = None
    api_key: str | None = None

    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "User-Agent": "qwen-ray-serve"}
        if self.runpod_key:
            headers["Authorization"] = f"Bearer {self.runpod_key}"
        if self.api_key:
            headers["x-api-key"] = self.api_key
        return headers


class Question:
    """Asked again and again until there is somebody to answer it.

    It names no model of its own: a variable or serve_config.yaml may have given it another name.

    Attributes:
        target: where it is asked.
        model: the name that is served, once it is known.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.model = target, ""
        self._job: str | None = None

    def ask(self) -> str | None:
        """The text of an answer, or None while there is none.

        Raises:
            Hopeless: the answer says that none will come.
        """
        return self._ask_queue() if self.target.status_url else self._ask_server()

    def withdraw(self) -> None:
        """Take back a job that nobody has answered: a worker that starts later would bill."""
        if self._job is not None:
            self._call(self._of_job(self.target.cancel_url), {})
            self._job = None

    def _ask_server(self) -> str | None:
        base = self.target.url.rstrip("/")
        if not self.model:
            status, listing = self._call(base + "/v1/models")
            if status != 200:
                return None
            self.model = _of(listing, "data", 0, "id")
        status, answer = self._call(base + _CHAT_ROUTE, {"model": self.model, **_CHAT})
        return _of(answer, *_TEXT) if status == 200 else None

    def _ask_queue(self) -> str | None:
        if self._job is None:
            job = {"input": {"openai_route": _CHAT_ROUTE, "openai_input": _CHAT}}
            status, state = self._call(self.target.url, job)
        else:
            status, state = self._call(self._of_job(self.target.status_url))
        if status != 200:
            return None
        self._job, ended = _of(state, "id"), _of(state, "status")
        if ended in ("IN_QUEUE", "IN_PROGRESS", "RUNNING"):
            return None
        self._job = None
        output = state.get("output")
        if ended != "COMPLETED":
            raise Hopeless(f"the job ended as {ended}: {str(state.get('error') or output)[:500]}")
        answer = output[0] if isinstance(output, list) and output else output
        self.model = _of(answer, "model")
        return _of(answer, *_TEXT)

    def _of_job(self, url: str) -> str:
        return url.replace("{job_id}", str(self._job))

    def _call(self, url: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Status and parsed body; status 0 where nobody answered."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self.target.headers())
        try:
            with rest.opener.open(request, timeout=_TIMEOUT_S) as response:
                return int(response.status), _parsed(response.read())
        except urllib.error.HTTPError as error:
            answer = _parsed(error.read())
            _judge(error.code, answer)
            return error.code, answer
        except (urllib.error.URLError, OSError, HTTPException):
            return 0, None


def _judge(status: int, answer: Any) -> None:
    """Raise for what will be the same the next time."""
    if status in (401, 403):
        whose = "API_KEYS" if _OUR_REFUSAL in json.dumps(answer) else "RUNPOD_API_KEY"
        raise Hopeless(f"HTTP {status}: the key is refused: check {whose}")
    error = answer.get("error") if isinstance(answer, Mapping) else None
    if status in (400, 404, 422) and isinstance(error, Mapping) and "code" in error:
        raise Hopeless(f"HTTP {status}: {error.get('message')}")  # The application itself says so.


def _of(answer: Any, *path: str | int) -> str:
    """What an answer has at a path.

    Raises:
        Hopeless: it is not of that shape: it is somebody else who answers.
    """
    value = answer
    try:
        for word in path:
            value = value[word]
    except (KeyError, IndexError, TypeError):
        where = ".".join(str(word) for word in path)
        raise Hopeless(f"an answer without {where}: {json.dumps(answer)[:300]}") from None
    return str(value)


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode("utf-8", "replace")
