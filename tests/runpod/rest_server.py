"""Runpod's REST v2 as a real HTTP server that holds every request against the published schema.

A request that the schema does not allow is answered with 422 and remembered in `violations`, and
so is an answer of this server itself, so that neither side can drift. Faults are dealt out by the
test: an answer of 429 or 5xx, a creation that happens and is answered with 500, a connection that
is cut, workers that come late or never, GPUs that are sold out, things that cannot be deleted.

The server also answers where clients of a deployment would ask: /lb/ID as a load balancer,
/queue/ID as a queue, /pod/ID-PORT as a pod's proxy.
"""

import json
import re
import threading
import urllib.parse
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.runpod import web

SCHEMA = Path(__file__).parents[3] / "shared" / "schemas" / "runpod-rest-v2.openapi.json"
KEY = "rpa_account"
# Whatever the model's own name is.
SERVED = "served"
_AT = "2026-11-24T12:00:00Z"
_LISTS = {
    "serverless": "endpoints",
    "pods": "pods",
    "templates": "templates",
    "network-volumes": "networkVolumes",
}


def gpu(id: str, name: str, pool: str | None, memory: int, secure: float, serverless: float) -> Any:
    return {
        "id": id,
        "name": name,
        "pool": pool,
        "manufacturer": "NVIDIA",
        "memory": memory,
        "secure": True,
        "community": False,
        "price": {"secure": secure, "community": secure, "serverless": serverless},
        "maxCount": {"secure": 8, "community": 0},
    }


GPUS = [
    gpu("NVIDIA L4", "L4", "ADA_24", 24, 0.43, 0.69),
    gpu("NVIDIA GeForce RTX 4090", "RTX 4090", "ADA_24", 24, 0.69, 1.12),
    gpu("NVIDIA L40S", "L40S", "ADA_48_PRO", 48, 0.86, 1.91),
    gpu("NVIDIA L40", "L40", "ADA_48_PRO", 48, 0.99, 1.91),
    gpu("NVIDIA H100 80GB HBM3", "H100 SXM", "ADA_80_PRO", 80, 2.69, 4.18),
]


@dataclass
class Fault:
    """What happens instead, `times` times, to requests of `method` whose path matches.

    Attributes:
        status: the answer; 0 cuts the connection.
        after: whether the request is carried out first.
    """

    method: str
    path: str
    status: int
    times: int = 1
    after: bool = False


@dataclass
class Account:
    """What is in the account, and how it behaves.

    Attributes:
        looks_until_up: how often a deployment is looked at before it answers; None: it never does.
        sold_out: GPU types of which there is none.
        stuck: ids that cannot be deleted.
        late_urls: how many answers about an endpoint are without its addresses.
        late_lists: how many lists do not show what is in the account.
        stranger: whether something else answers where the application should.
        open_logs: whether streams of logs go on until their reader leaves.
    """

    looks_until_up: int | None = 2
    sold_out: frozenset[str] = frozenset()
    stuck: frozenset[str] = frozenset()
    late_urls: int = 0
    late_lists: int = 0
    stranger: bool = False
    open_logs: bool = False
    job_error: str | None = None
    faults: list[Fault] = field(default_factory=list)
    things: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=lambda: {kind: {} for kind in _LISTS}
    )
    looks: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[tuple[str, str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)
    numbers: int = 0

    def add(self, kind: str, **thing: Any) -> str:
        """Put a thing into the account, as if it had been made before."""
        self.numbers += 1
        number = f"{kind[:3]}{self.numbers}"
        self.things[kind][number] = {**_blank(kind), **thing, "id": number}
        return number

    def names(self, kind: str) -> list[str]:
        return [thing["name"] for thing in self.things[kind].values()]

    def made(self, method: str, pattern: str) -> int:
        return sum(m == method and re.fullmatch(pattern, p) is not None for m, p in self.requests)


def _blank(kind: str) -> dict[str, Any]:
    container = {"image": "i", "args": "", "disk": 20, "ports": [], "env": {}, "registry": None}
    return {
        "serverless": {
            **container,
            "workers": {"min": 0, "max": 1},
            "scaling": {"type": "REQUEST_COUNT", "requestCount": 1},
            "dataCenterIds": [],
            "networkVolumes": [],
            "timeout": 300000,
            "flashboot": "OFF",
            "createdAt": _AT,
        },
        "pods": {
            **container,
            "status": "RUNNING",
            "actions": [],
            "mounts": {},
            "cloud": "SECURE",
            "dataCenterId": None,
            "cudaVersion": None,
            "ssh": {"proxy": None, "direct": None},
            "template": None,
            "cost": 0.43,
            "locked": False,
            "globalNetworking": {"enabled": False},
            "runtime": None,
            "createdAt": _AT,
            "startedAt": None,
        },
        "templates": {
            **container,
            "mounts": {},
            "serverless": True,
            "public": False,
            "category": "NVIDIA",
            "startSsh": False,
            "startJupyter": False,
            "allowedCudaVersions": [],
        },
        "network-volumes": {"size": 50, "dataCenter": "EU-RO-1", "type": "STANDARD"},
    }[kind]


class Schema:
    """The published schema, as a judge of requests and answers."""

    def __init__(self) -> None:
        self._document = json.loads(SCHEMA.read_text(encoding="utf-8"))
        resource = Resource(contents=self._document, specification=DRAFT202012)
        self._registry = Registry().with_resource("urn:runpod", resource)

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        for template, item in self._document["paths"].items():
            pattern = re.sub(r"\{[^}]+\}", "[^/]+", template)
            if re.fullmatch(pattern, path) and method.lower() in item:
                return dict(item[method.lower()])
        return None

    def problems(self, schema: dict[str, Any], value: Any) -> list[str]:
        absolute = json.loads(json.dumps(schema).replace('"#/', '"urn:runpod#/'))
        validator = jsonschema.Draft202012Validator(absolute, registry=self._registry)
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]

    def request(self, method: str, path: str, query: str, body: Any) -> list[str]:
        operation = self.operation(method, path)
        if operation is None:
            return [f"no operation {method} {path}"]
        expected = {}
        for parameter in operation.get("parameters", []):
            if "$ref" in parameter:
                parameter = self._document["components"]["parameters"][
                    parameter["$ref"].rsplit("/", 1)[1]
                ]
            expected[parameter["name"]] = parameter["schema"]
        problems = []
        for name, value in urllib.parse.parse_qsl(query):
            if name not in expected:
                problems.append(f"no query parameter {name}")
                continue
            integer = expected[name].get("type") == "integer"
            problems += self.problems(expected[name], int(value) if integer else value)
        wanted = operation.get("requestBody")
        if wanted is None:
            return problems + (["a body where none is taken"] if body is not None else [])
        if body is None:
            return [*problems, "no body"]
        return problems + self.problems(wanted["content"]["application/json"]["schema"], body)

    def answer(self, method: str, path: str, status: int, body: Any) -> list[str]:
        operation = self.operation(method, path)
        if operation is None or status >= 400:
            return []
        output = operation["responses"].get(str(status))
        if output is None:
            return [f"{method} {path} does not answer {status}"]
        content = output.get("content", {}).get("application/json")
        return self.problems(content["schema"], body) if content else []


class Rest(web.Server):
    """The server. `account` may be changed between requests."""

    def __init__(self, port: int) -> None:
        super().__init__(port, _Handler)
        self.account = Account()
        self.schema = Schema()
        self.lock = threading.Lock()


class Problem(Exception):
    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class _Handler(web.Handler):
    server: Rest

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PATCH(self) -> None:
        self._answer("PATCH")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        path, _, query = self.path.partition("?")
        body = self.body()
        path = urllib.parse.unquote(path)
        with self.server.lock:
            try:
                status, answer, headers = self._decide(method, path, query, body)
            except Problem as problem:
                status, headers = problem.status, problem.headers
                answer = {"title": "No", "status": status, "detail": problem.detail}
        if status == 0:
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(answer, str) and self.server.account.open_logs and path.endswith("/logs"):
            self._send_and_wait(answer)
        elif isinstance(answer, str):
            self.send(status, answer.encode(), "text/event-stream", headers)
        else:
            self.send_json(status, answer, headers)

    def _send_and_wait(self, events: str) -> None:
        """A stream that its reader ends."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(events.encode())
        self.connection.recv(1)
        self.close_connection = True

    def _decide(self, method: str, path: str, query: str, body: Any) -> tuple[int, Any, Any]:
        account = self.server.account
        account.requests.append((method, path))
        account.bodies.append((method, path, body))
        if not path.startswith("/v2/"):
            return (*self._data_plane(method, path, body), {})
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            raise Problem(401, "missing bearer token")
        fault = self._fault(method, path)
        if fault is not None and not fault.after:
            self._break(fault)
        if problems := self.server.schema.request(method, path, query, body):
            account.violations += [f"{method} {path}: {problem}" for problem in problems]
            raise Problem(422, "; ".join(problems))
        status, answer = self._carry_out(method, path.split("/")[2:], body)
        if not isinstance(answer, str):
            for problem in self.server.schema.answer(method, path, status, answer):
                account.violations.append(f"answer of {method} {path}: {problem}")
        if fault is not None:
            self._break(fault)
        return status, answer, {}

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.server.account.faults:
            if fault.times and fault.method == method and re.fullmatch(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _break(self, fault: Fault) -> None:
        headers = {"Retry-After": "1"} if fault.status == 429 else {}
        raise Problem(fault.status, "as the test wants it", headers)

    # --- the account ------------------------------------------------------------------------

    def _carry_out(self, method: str, words: list[str], body: Any) -> tuple[int, Any]:
        account = self.server.account
        if words[:2] == ["catalog", "gpus"]:
            return 200, {"gpus": GPUS}
        kind, rest = words[0], words[1:]
        things = account.things[kind]
        if not rest:
            if method == "POST":
                return 201, self._shown(self._create(kind, body))
            late = things and account.late_lists > 0
            account.late_lists -= bool(late)
            return 200, {_LISTS[kind]: [] if late else list(things.values())}
        if rest[0] not in things:
            raise Problem(404, "resource not found")
        thing = things[rest[0]]
        if rest[1:] == ["workers"]:
            return 200, self._workers(thing)
        if rest[-1] == "logs":
            line = {"source": "container", "line": f"hello from {rest[-2]}", "ts": _AT}
            return 200, f"id: {_AT}\ndata: {json.dumps(line)}\n\n"
        if rest[1:] == ["action"]:
            thing["status"] = {"stop": "EXITED", "start": "STARTING"}[body["action"]]
            thing["cost"] = 0.0 if thing["status"] == "EXITED" else 0.43
            return 200, thing
        if method == "PATCH":
            for key, value in body.items():
                merge = (
                    isinstance(value, dict) and isinstance(thing.get(key), dict) and key != "env"
                )
                old = thing.get(key)
                if key == "gpu" and "pools" in value:
                    old.pop("excludedTypes", None)  # The two are one selection.
                thing[key] = {**old, **value} if merge else value
            return 200, thing
        if method == "DELETE":
            return self._delete(kind, thing)
        if kind == "pods":
            self._age(thing)
        return 200, self._shown(thing)

    def _shown(self, thing: dict[str, Any]) -> dict[str, Any]:
        """The thing, without addresses while those are late."""
        account = self.server.account
        if "requestUrls" not in thing or account.late_urls == 0:
            return thing
        account.late_urls -= 1
        return {key: value for key, value in thing.items() if key != "requestUrls"}

    def _create(self, kind: str, body: Any) -> dict[str, Any]:
        account = self.server.account
        given = dict(body)
        if kind == "pods":
            if given["gpu"]["id"] in account.sold_out:
                raise Problem(400, "There are no longer any instances available")
            given["gpu"].pop("minCudaVersion", None)
            given.pop("dataCenterIds", None)
            given["status"] = "PROVISIONING"
        if kind == "serverless":
            given["gpu"].setdefault("allowedCudaVersions", [])
        number = account.add(kind, **given)
        thing = account.things[kind][number]
        if kind == "serverless":
            base = self.server.url
            if given["type"] == "LOAD_BALANCER":
                urls = {"base": f"{base}/lb/{number}", "health": f"{base}/lb/{number}/ping"}
            else:
                words = ("run", "runSync", "retry", "purgeQueue", "health")
                urls = {word: f"{base}/queue/{number}/{word.lower()}" for word in words}
                for word in ("status", "stream", "cancel"):
                    urls[word] = f"{base}/queue/{number}/{word}/{{job_id}}"
            thing["requestUrls"] = urls
            # An endpoint brings a template of its own, which goes with it.
            account.add("templates", name=f"{thing['name']}__template__{number}", serverless=True)
        return thing

    def _delete(self, kind: str, thing: dict[str, Any]) -> tuple[int, None]:
        account = self.server.account
        if thing["id"] in account.stuck:
            raise Problem(403, "access denied")
        if kind == "templates":
            owner = thing["name"].partition("__template__")[2]
            if owner in account.things["serverless"]:
                raise Problem(400, "Template is in use")
        if kind == "pods" and thing["locked"]:
            raise Problem(409, "the pod is locked")
        del account.things[kind][thing["id"]]
        return 204, None

    def _age(self, thing: dict[str, Any]) -> bool:
        """One more look at a deployment. Whether it is up."""
        account = self.server.account
        looks = account.looks[thing["id"]] = account.looks.get(thing["id"], 0) + 1
        up = account.looks_until_up is not None and looks > account.looks_until_up
        if thing.get("status") in ("PROVISIONING", "STARTING"):
            thing["status"] = "RUNNING" if up else "STARTING"
        return up

    def _workers(self, thing: dict[str, Any]) -> dict[str, Any]:
        up = self._age(thing)
        never = self.server.account.looks_until_up is None
        status = "IDLE" if up else "THROTTLED" if never else "INITIALIZING"
        workers = []
        if thing["workers"]["max"]:
            workers = [{"id": "wrk1", "status": status, "gpuCount": 1, "isStale": False}]
            workers[0]["gpuTypeId"] = "NVIDIA L4"
        words = ("running", "idle", "initializing", "throttled", "unhealthy")
        summary = {word: sum(w["status"] == word.upper() for w in workers) for word in words}
        return {"workers": workers, "summary": {**summary, "total": len(workers)}}

    # --- what clients of a deployment see ------------------------------------------------------

    def _data_plane(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        account = self.server.account
        where, number, *rest = path.strip("/").split("/")
        bearer = self.headers.get("Authorization")
        if where == "pod":
            number, _, port = number.partition("-")
            thing = account.things["pods"].get(number)
            if thing is None or f"{port}/http" not in thing["ports"]:
                return 404, "nothing there"
            if thing["status"] != "RUNNING":
                return 502, "bad gateway"
            return self._application(thing, rest, body)
        thing = account.things["serverless"].get(number)
        if thing is None:
            return 404, "no such endpoint"
        if bearer != f"Bearer {KEY}":
            return 401, {"error": "unauthorized"}
        never = account.looks_until_up is None
        up = not never and account.looks.get(number, 0) > (account.looks_until_up or 0)
        if where == "lb":
            if not up:
                return 503, {"error": "no workers available"}
            return self._application(thing, rest, body)
        return self._queue(up, rest, body)

    def _application(self, thing: Any, rest: list[str], body: Any) -> tuple[int, Any]:
        keys = [key for key in thing["env"].get("API_KEYS", "").split(",") if key]
        given = {self.headers.get("x-api-key")}
        if thing["env"].get("SERVE_MODE") == "pod":
            given.add((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if keys and not given & set(keys):
            return 401, {"error": {"message": "no", "code": "invalid_api_key"}}
        if self.server.account.stranger:
            return 200, "<html>"
        if rest == ["v1", "models"]:
            return 200, {"data": [{"id": SERVED}]}
        if body["model"] != SERVED:
            return 404, {"error": {"message": "no such model", "code": "model_not_found"}}
        return 200, _stream(body) if body.get("stream") else _completion()

    def _queue(self, up: bool, rest: list[str], body: Any) -> tuple[int, Any]:
        account = self.server.account
        if account.stranger:
            return 200, "<html>"
        if rest == ["openai", "v1", "models"]:
            return 200, {"data": [{"id": SERVED}]}
        if rest[:1] == ["openai"] and body.get("stream"):
            return 200, _stream(body)
        if rest[:1] == ["openai"]:
            return (200, _completion()) if body["model"] == SERVED else (404, "no such model")
        if rest == ["run"]:
            job = f"job{len(account.jobs)}"
            account.jobs[job] = "IN_QUEUE"
            return 200, {"id": job, "status": "IN_QUEUE"}
        verb, job = rest
        if verb == "cancel":
            account.jobs[job] = "CANCELLED"
        elif up and account.jobs[job] == "IN_QUEUE":
            account.jobs[job] = "FAILED" if account.job_error else "COMPLETED"
        answer: dict[str, Any] = {"id": job, "status": account.jobs[job]}
        if answer["status"] == "COMPLETED":
            answer["output"] = [_completion()]
        if answer["status"] == "FAILED":
            answer["error"] = account.job_error
        return 200, answer


def _completion() -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hello."}
    return {"model": SERVED, "choices": [{"index": 0, "message": message}]}


def _stream(body: Any) -> str:
    """The events of an answer of as many tokens as were asked for."""
    tokens = body["max_tokens"]
    events: list[dict[str, Any]] = []
    for number in range(1, tokens + 1):
        reason = "length" if number == tokens else None
        choice = {"index": 0, "delta": {"content": " a"}, "finish_reason": reason}
        events.append({"model": SERVED, "choices": [choice]})
    usage = {"prompt_tokens": 200, "completion_tokens": tokens, "total_tokens": 200 + tokens}
    events.append({"model": SERVED, "choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def serving(port: int) -> AbstractContextManager[Rest]:
    """The server, while the block runs."""
    return web.running(Rest(port))
