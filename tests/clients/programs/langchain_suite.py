"""LangChain's own standard tests of a chat model. Arguments are pytest's: which of them to run."""

import sys

import pytest
from checks import MODEL, URL, report
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestThisServer(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": MODEL,
            "base_url": f"{URL}/v1",
            "api_key": "unused",
            "temperature": 0,
            "max_tokens": 100,
            "stream_usage": True,
        }

    @property
    def supports_json_mode(self):
        return True


class Reports:
    """Says how each test of the suite ended, but for what it skips or expects to fail."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "wasxfail") or report.skipped:
            return
        if report.when == "call" or report.failed:
            _report(report)


def _report(result: pytest.TestReport) -> None:
    error = None if result.passed else str(result.longrepr)[-1000:]
    report(result.nodeid.rpartition("::")[2], error)


if __name__ == "__main__":
    # ChatOpenAI keeps its connections, which belong to one event loop.
    one_loop = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
    # The conftest.py of this repository needs more than this environment has.
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--noconftest"]
    pytest.main([__file__, *quiet, *one_loop, *sys.argv[1:]], plugins=[Reports()])
