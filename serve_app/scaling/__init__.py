"""How many replicas there should be: the policy, the signals it reads, Ray Serve's entry point."""

from serve_app.scaling.types import Decision

__all__ = ["Decision"]
