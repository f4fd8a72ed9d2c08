"""The applications of a RayService that are this repository's, read as they read themselves."""

from collections.abc import Iterator

from kuberay.lines import at
from kuberay.rayservice import Service
from kuberay.rules.finding import ERROR, Finding, rule
from serve_app.errors import ConfigError
from serve_app.settings import Settings


def ours(service: Service) -> Iterator[tuple[int, Settings]]:
    """The settings of each application that is this repository's."""
    for place in _places(service):
        try:
            yield place, Settings.parse(at(service.serve, "applications", place, "args") or {})
        except ConfigError:
            continue  # The rule below says it.


def _places(service: Service) -> list[int]:
    applications = service.serve.get("applications") or []
    return [
        place
        for place, application in enumerate(applications)
        if at(application, "import_path") == "serve_app:build"
    ]


@rule("our-settings")
def _our_settings(service: Service) -> Iterator[Finding]:
    for place in _places(service):
        path = ("applications", place, "args")
        try:
            settings = Settings.parse(at(service.serve, *path) or {})
        except ConfigError as error:
            key = str(error.fields[0]).split(".")
            yield Finding(
                "our-settings", ERROR, service.serve_line(*path, *key), str(error), "as it says"
            )
            continue
        if not settings.api_keys.configured and not settings.allow_unauthenticated_network:
            yield Finding(
                "our-settings", ERROR, service.serve_line(*path, "api_keys"),
                "no API keys: it refuses to start where others can reach it",
                "api_keys: {file: ...}, from a Secret",
            )  # fmt: skip
