"""The applications of a RayService that are this repository's, read as they read themselves."""

from collections.abc import Iterator

from kuberay.lines import at
from kuberay.rayservice import Service
from serve_app.errors import ConfigError
from serve_app.settings import Settings


def ours(service: Service) -> Iterator[tuple[int, Settings]]:
    """The settings of each application that is this repository's."""
    for place, application in enumerate(service.serve.get("applications") or []):
        if at(application, "import_path") == "serve_app:build":
            try:
                yield place, Settings.parse(at(application, "args") or {})
            except ConfigError:
                continue  # Another rule says it.
