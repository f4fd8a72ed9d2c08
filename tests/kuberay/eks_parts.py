"""Add-ons and pod identity associations of EKS, which moto's server has not.

The paths and fields are those of botocore's service model of `eks`.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

_PATH = re.compile(r"/clusters/([^/]+)/(addons|pod-identity-associations)(?:/([^/]+))?")


@dataclass
class EksParts:
    """What each cluster has, by its name.

    Attributes:
        addons: status by add-on.
        identities: role by namespace and service account.
    """

    addons: dict[str, dict[str, str]] = field(default_factory=dict)
    identities: dict[str, dict[tuple[str, str], str]] = field(default_factory=dict)

    def reset(self) -> None:
        self.addons.clear()
        self.identities.clear()

    def forget(self, cluster: str) -> None:
        """A cluster that is deleted takes its parts along."""
        self.addons.pop(cluster, None)
        self.identities.pop(cluster, None)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]] | None:
        """Status and body; None for a request that is for somebody else."""
        match = _PATH.fullmatch(path)
        if match is None:
            return None
        cluster, kind, name = match.groups()
        request = json.loads(body) if body else {}
        if kind == "addons":
            return self._addon(method, self.addons.setdefault(cluster, {}), name, request)
        return self._identity(method, cluster, request)

    def _addon(
        self, method: str, waiting: dict[str, str], name: str | None, request: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        if method == "GET" and name is None:
            return 200, {"addons": sorted(waiting)}
        name = name or request["addonName"]
        if method == "POST":
            if name in waiting:
                return 409, _refusal("ResourceInUseException", "Addon already exists.")
            waiting[name] = "ACTIVE"
        if name not in waiting:
            return 404, _refusal("ResourceNotFoundException", f"No addon: {name} found.")
        status = waiting.pop(name) if method == "DELETE" else waiting[name]
        return 200, {"addon": {"addonName": name, "status": status}}

    def _identity(
        self, method: str, cluster: str, request: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        waiting = self.identities.setdefault(cluster, {})
        if method == "POST":
            key = (request["namespace"], request["serviceAccount"])
            if key in waiting:
                return 409, _refusal("ResourceInUseException", "Association already exists")
            waiting[key] = request["roleArn"]
            return 200, {"association": {"namespace": key[0], "serviceAccount": key[1]}}
        listed = [
            {"clusterName": cluster, "namespace": namespace, "serviceAccount": account}
            for namespace, account in sorted(waiting)
        ]
        return 200, {"associations": listed}


def _refusal(code: str, message: str) -> dict[str, Any]:
    return {"__type": code, "message": message}
