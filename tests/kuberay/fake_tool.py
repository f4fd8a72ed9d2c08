"""eksctl, kubectl and helm for the tests: real commands on PATH, with a small cluster in a folder.

    eksctl delete cluster --name x ...

Each is a script that calls `main` (conftest.py writes them). The folder is FAKE_TOOLS:

    calls.jsonl    one line a call: its arguments and its standard input
    objects.json   Kubernetes' objects by kind; releases of helm under `helm`
    rules.json     calls that are to fail or to hang: the first whose words are all in the call;
                   with `after`, once eksctl has made so many things

What the real ones do to AWS, these do to the AWS of the tests: eksctl deletes the cluster, a
Service takes its load balancer with it, a claim its volume, unless something still mounts it.

A test calls them dozens of times, so that their start is most of their cost: no `pathlib`, no
`typing`, and what only some calls need is imported where it is used.
"""

from __future__ import annotations

import itertools
import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FOLDER = os.environ["FAKE_TOOLS"]


def main(tool: str) -> int:
    argv = sys.argv[1:]
    stdin = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    with open(f"{FOLDER}/calls.jsonl", "a") as calls:
        calls.write(json.dumps({"tool": tool, "argv": argv, "stdin": stdin}) + "\n")
    rule = _rule({tool, *argv})
    if rule is not None and "after" not in rule:
        return _stop(rule)
    if tool == "eksctl":
        import fake_eksctl  # Here, because the other tools need not wait for it.

        try:
            return fake_eksctl.main(argv, stdin, None if rule is None else rule["after"])
        except fake_eksctl.Stopped:
            return _stop(rule or {})
    return {"kubectl": kubectl, "helm": helm, "aws": aws}[tool](argv, stdin)


def _rule(words: set[str]) -> dict[str, Any] | None:
    """The rule of a call, which is used up by it."""
    rules = _read("rules.json", [])
    for rule in rules:
        if set(rule["words"]) <= words and rule.get("times", 1) > 0:
            for other in rules:
                if other["words"] == rule["words"]:
                    other["times"] = other.get("times", 1) - 1
            _write("rules.json", rules)
            result: dict[str, Any] = rule
            return result
    return None


def _stop(rule: dict[str, Any]) -> int:
    if rule.get("hang"):
        _hang()
    print(rule.get("says", "it failed"), file=sys.stderr)
    return int(rule.get("status", 1))


def _read(name: str, default: Any) -> Any:
    try:
        with open(f"{FOLDER}/{name}") as file:
            return json.load(file)
    except FileNotFoundError:
        return default


def _write(name: str, value: Any) -> None:
    with open(f"{FOLDER}/{name}", "w") as file:
        json.dump(value, file)


def _hang() -> None:
    import signal
    import time

    _write("hanging", True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    while True:
        time.sleep(0.1)


def _value(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1] if flag in argv else ""


def aws(argv: list[str], stdin: str) -> int:
    return 0


# --- helm -----------------------------------------------------------------------------------


def helm(argv: list[str], stdin: str) -> int:
    objects = _read("objects.json", {})
    releases = objects.setdefault("helm", [])
    if argv[0] == "version":
        print("v3.19.0")
    elif argv[0] == "list":
        print(json.dumps(releases))
    elif argv[0] == "uninstall":
        objects["helm"] = [entry for entry in releases if entry["name"] != argv[1]]
        _write("objects.json", objects)
    elif argv[0] == "upgrade":
        name = next(word for word in argv[1:] if not word.startswith("-"))
        releases.append({"name": name, "namespace": _value(argv, "--namespace")})
        _write("objects.json", objects)
    elif argv[:2] == ["show", "crds"]:
        print("kind: CustomResourceDefinition\nmetadata: {name: rayservices.ray.io}")
    return 0


# --- kubectl --------------------------------------------------------------------------------


def kubectl(argv: list[str], stdin: str) -> int:
    verb = argv[0]
    if verb == "kustomize":
        os.execv(os.environ["REAL_KUBECTL"], ["kubectl", *argv])
    if verb == "version":
        print(json.dumps({"clientVersion": {"gitVersion": "v1.35.2"}}))
        return 0
    if verb == "apply":
        return _apply(stdin)
    if verb == "port-forward":
        return _forward(argv)
    kind = argv[1]
    objects = _read("objects.json", {})
    namespace = _value(argv, "--namespace")
    named = [
        word
        for before, word in itertools.pairwise(argv[1:])
        if not word.startswith("-") and before not in ("--namespace", "--output")
    ]
    chosen = [
        item
        for item in objects.get(kind, [])
        if (not namespace or item["metadata"]["namespace"] == namespace)
        and (not named or item["metadata"]["name"] in named)
    ]
    if verb == "get":
        if kind == "rayservices.ray.io":
            _looked_at(objects)
        return _get(kind, chosen, bool(named), kind in objects)
    if verb == "patch":
        for item in chosen:
            item["metadata"].pop("finalizers", None)
            if item.get("deleting"):
                objects[kind].remove(item)
        _write("objects.json", objects)
        return 0
    if verb == "delete":
        return _delete(objects, kind, chosen)
    print(f"error: unknown command {argv}", file=sys.stderr)
    return 1


def _get(kind: str, chosen: list[dict[str, Any]], first: bool, expected: bool) -> int:
    custom = "." in kind and not kind.endswith("k8s.io")
    if not expected and custom:
        short = kind.split(".")[0]
        print(f'error: the server doesn\'t have a resource type "{short}"', file=sys.stderr)
        return 1
    if first and not chosen:
        print(f"Error from server (NotFound): {kind} not found", file=sys.stderr)
        return 1
    print(json.dumps(chosen[0] if first else {"kind": "List", "items": chosen}))
    return 0


def _delete(objects: dict[str, Any], kind: str, chosen: list[dict[str, Any]]) -> int:
    late = False
    for item in chosen:
        where = item["metadata"]
        item["deleting"] = True
        waiting = kind == "persistentvolumeclaims" and any(
            other["metadata"]["namespace"] == where["namespace"]
            for other in objects.get("statefulsets", [])
        )
        if where.get("finalizers") or waiting:
            late = True
            continue
        if balancer := where.get("annotations", {}).get("fake/balancer"):
            import fake_aws

            fake_aws.query("elasticloadbalancing", "DeleteLoadBalancer", LoadBalancerArn=balancer)
        if volume := where.get("annotations", {}).get("fake/volume"):
            import fake_aws

            fake_aws.query("ec2", "DeleteVolume", VolumeId=volume)
        objects[kind].remove(item)
    _write("objects.json", objects)
    if late:
        print("error: timed out waiting for the condition", file=sys.stderr)
    return 1 if late else 0


_PLURALS = {"RayService": "rayservices.ray.io", "Secret": "secrets", "Namespace": "namespaces"}


def _documents(text: str) -> list[dict[str, Any]]:
    if text.startswith("{"):
        results = [json.loads(text)]
    else:
        import yaml

        results = list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    return [
        item for each in results for item in (each["items"] if each["kind"] == "List" else [each])
    ]


def _apply(stdin: str) -> int:
    import base64

    objects = _read("objects.json", {})
    for item in _documents(stdin):
        kind = _PLURALS.get(item["kind"])
        if kind is None:
            continue
        where = item["metadata"]
        namespaces = [each["metadata"]["name"] for each in objects.get("namespaces", [])]
        if "namespace" in where and where["namespace"] not in namespaces:
            print(f'Error: namespaces "{where["namespace"]}" not found', file=sys.stderr)
            return 1
        for key, value in item.pop("stringData", {}).items():
            item.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()
        if kind == "rayservices.ray.io":
            # Ready once it was looked at twice.
            item["looks"] = 2
        waiting = objects.setdefault(kind, [])
        waiting[:] = [each for each in waiting if each["metadata"]["name"] != where["name"]] + [
            item
        ]
    _write("objects.json", objects)
    return 0


def _looked_at(objects: dict[str, Any]) -> None:
    for item in objects.get("rayservices.ray.io", []):
        if "looks" not in item:
            continue
        item["looks"] -= 1
        state, why = ("True", "") if item["looks"] <= 0 else ("False", "waits for its workers")
        ready = {"type": "Ready", "status": state, "message": why}
        item["status"] = {"conditions": [ready]}
    _write("objects.json", objects)


def _forward(argv: list[str]) -> int:
    """A service that asks for the key of the Secret, and answers."""
    import base64
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    secrets = {each["metadata"]["name"]: each for each in _read("objects.json", {})["secrets"]}
    key = (
        base64.b64decode(secrets["qwen-api-keys"]["data"]["keys"])
        .decode()
        .split("\n")[0]
        .split()[-1]
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"data": [{"id": "Qwen2.5-7B-Instruct"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            output = f"Hello from {request['model']}"
            self._answer({"choices": [{"message": {"content": output}}]})

        def _answer(self, body: dict[str, Any]) -> None:
            good = self.headers.get("authorization") == f"Bearer {key}"
            text = json.dumps(body if good else {"error": "no key"}).encode()
            self.send_response(200 if good else 401)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"Forwarding from 127.0.0.1:{server.server_port} -> 8000", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":  # fake_tool.py TOOL ARGUMENT...
    sys.exit(main(sys.argv.pop(1)))
