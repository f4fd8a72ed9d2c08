"""Qwen2.5-Instruct behind the OpenAI API: vLLM engines as Ray Serve replicas."""

from typing import TYPE_CHECKING, Any

from serve_app.version import RELEASE

if TYPE_CHECKING:
    from serve_app.app import build as build

__version__ = RELEASE


def __getattr__(name: str) -> Any:
    # `serve_app:build` is what serve_config.yaml names. Ray is imported for it alone, so that the
    # command line answers at once.
    if name == "build":
        from serve_app.app import build

        return build
    raise AttributeError(name)
