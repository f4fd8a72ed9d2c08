"""`engine.allowed_origins` of serve_config.yaml: the origins of pages that may use the server.

Apart from the gate (cors.py), as the launcher and `kuberay` read it in environments without
starlette.
"""

import json
from collections.abc import Mapping
from typing import Any


def allowed_origins(engine: Mapping[str, Any]) -> list[str]:
    """The origins whose pages may use the server; `*` stands for all."""
    return as_list(engine.get("allowed_origins"), [])


def as_list(value: Any, default: list[str]) -> list[str]:
    """A list, as serve_config.yaml may have it: a list, JSON, or one text."""
    if value is None:
        return default
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]
