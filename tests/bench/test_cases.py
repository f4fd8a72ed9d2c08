"""The reproduction cases of ../shared still find what they ask of bench."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from bench.search import RateSearch, Sweep

CASES = Path(__file__).parents[3] / "shared" / "cases" / "bench"
PROGRAMS = sorted(CASES.glob("*.py"))
OURS = ("bench", "serve_app")


@pytest.mark.skipif(not PROGRAMS, reason="../shared/cases/bench is not there")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_what_a_case_imports_is_there(program: Path) -> None:
    for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(node.module or "")
            for name in (alias.name for alias in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")


@pytest.mark.parametrize("controller", [Sweep, RateSearch])
def test_the_limit_of_a_search_has_the_name_that_cases_use(controller: type) -> None:
    assert "most" in inspect.signature(controller).parameters
