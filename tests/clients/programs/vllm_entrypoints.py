"""vLLM's own tests of its entrypoints, run against a server that is already running.

VLLM_TESTS is the folder `tests` of vLLM's source, of the version that is installed here. It is
copied, and in the copy every test asks SERVER_URL for SERVER_MODEL in place of a server and a model
of its own. So a test whose server needs other arguments, or another model, fails at every server.
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from checks import MODEL, URL, report

# Tests of text generation. Speech, images and pooling need other models.
FOLDERS = ("anthropic", "cohere", "generate", "openai", "scale_out", "serve", "tool_parsers")
# These load adapters into a server that was started for them. Without one, some fail everywhere,
# and one goes on asking for an adapter until there is no memory left.
LEFT_OUT = ("test_lora_adapters.py",)
_NAMES = re.compile(r'^(\w*MODEL(?:_NAME)?(?:_SMOLLM)?) = "[^"]*"$', re.MULTILINE)
_ALIASES = ("claude-3-7-sonnet-latest", "command-r-plus-08-2024")
_TEST_TIMEOUT_S = 60


def copied(source: Path, folder: Path) -> Path:
    """A copy of vLLM's tests whose servers serve SERVER_MODEL."""
    tests = folder / "tests"
    shutil.copytree(source, tests)
    (tests / "conftest.py").unlink()  # It loads models, for other tests.
    for module in (tests / "entrypoints").rglob("*.py"):
        text = _NAMES.sub(rf'\1 = "{MODEL}"', module.read_text())
        for alias in _ALIASES:
            text = text.replace(alias, MODEL)
        module.write_text(text)
    return tests


def modules(tests: Path) -> list[str]:
    """The modules with tests that ask a server."""
    found = (path for name in FOLDERS for path in (tests / "entrypoints" / name).rglob("test_*.py"))
    return sorted(
        str(path)
        for path in found
        if path.name not in LEFT_OUT and "RemoteOpenAIServer" in path.read_text()
    )


def ask_the_running_server() -> None:
    """Replace the class that starts a server for each module, and the hub of LoRA adapters."""
    from vllm.transformers_utils import repo_utils

    from tests import utils

    class Hub:
        def snapshot_download(self, *_: object, **__: object) -> str:
            return os.environ["SERVER_MODEL_FOLDER"]

    class Running(utils.RemoteOpenAIServer):
        def __init__(self, *_: object, **__: object) -> None:
            self.host, _, port = URL.rpartition("/")[2].partition(":")
            self.port, self.uds = int(port), None
            self.show_hidden_metrics = False
            self._wait_for_server(url=self.url_for("health"), timeout=600)

        def _poll(self) -> None:
            """Its process belongs to whoever started it."""

        def _shutdown(self) -> None:
            """Others ask the same server."""

    utils.RemoteOpenAIServer = Running
    repo_utils.hf_api = Hub


class Reports:
    """Leaves out tests without a server, and reports how each of the others ended."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _asks_a_server(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail") or report.skipped:
            return
        if report.when == "call" or (report.failed and report.when == "setup"):
            _report(report)


def _asks_a_server(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    return any("server" in name or "client" in name for name in names)


def _report(result: pytest.TestReport) -> None:
    error = None if result.passed else str(result.longrepr)[-2000:]
    report(result.nodeid.partition("entrypoints/")[2], error)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        tests = copied(Path(os.environ["VLLM_TESTS"]), Path(folder))
        # The name of the model is also the folder of its tokenizer.
        (Path(folder) / MODEL).symlink_to(os.environ["SERVER_MODEL_FOLDER"])
        os.chdir(folder)
        sys.path.insert(0, folder)
        ask_the_running_server()
        absent = ("terminal", "cacheprovider", "xdist", "schemathesis")
        quiet = [word for name in absent for word in ("-p", f"no:{name}")]
        # What a module imports may not be installed here.
        rest = ["--continue-on-collection-errors", "--rootdir", folder, "-c", os.devnull]
        limits = [f"--timeout={_TEST_TIMEOUT_S}", "-o", "timeout_func_only=true"]
        chosen = sys.argv[1:] or modules(tests)
        pytest.main([*chosen, *quiet, *rest, *limits], plugins=[Reports()])
