"""The packages declare what they import, and no modules import each other."""

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Collection
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = {"serve_app", "bench", "kuberay", "runpod", "tests"}


@cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a file, within functions too."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(folder: str) -> set[str]:
    """Top-level names that a folder's modules import."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in import_statements(path):
            if isinstance(node, ast.Import):
                names |= {each.name.split(".")[0] for each in node.names}
            elif node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    # The scripts of runpod/ import each other.
    own = OWN | {path.stem for path in (ROOT / "runpod").glob("*.py")}
    return names - set(sys.stdlib_module_names) - own


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normal(re.split(r"[\[<>=! ]", each)[0]) for group in groups for each in group}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_direct_import_is_declared() -> None:
    distributions = packages_distributions()
    missing = {}
    for folder in ("serve_app", "bench", "kuberay"):
        for name in imported(folder):
            provided_by = {normal(each) for each in distributions.get(name, [name])}
            if not provided_by & declared():
                missing[name] = folder
    assert missing == {}


def modules() -> dict[str, Path]:
    """Every module of this repository's packages, by its name."""
    files = (path for folder in OWN - {"tests"} for path in (ROOT / folder).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def imports(path: Path, names: Collection[str]) -> set[str]:
    """Which of the modules a file imports."""
    imported = set()
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module`, or a name of a module.
            imported |= whole & set(names) or {node.module}
    return imported & set(names)


def test_no_module_imports_itself_by_way_of_others() -> None:
    files = modules()
    # A package's __init__ only passes names on.
    parts = {name: path for name, path in files.items() if path.name != "__init__.py"}
    graph = {name: imports(path, parts) - {name} for name, path in parts.items()}
    assert "serve_app.errors" in graph["serve_app.settings"]
    graphlib.TopologicalSorter(graph).prepare()  # It raises CycleError, which shows the cycle.


def test_no_packages_of_bench_import_each_other() -> None:
    files = modules()
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        for other in imports(path, files):
            packages = [part.split(".")[1] for part in (name, other) if part.count(".") == 2]
            if name.startswith("bench.") and other.startswith("bench.") and len(packages) == 2:
                graph.setdefault(packages[0], set()).add(packages[1])
    assert "traffic" in graph["faults"]
    graphlib.TopologicalSorter({name: to - {name} for name, to in graph.items()}).prepare()
