"""README and docs: links lead somewhere, and commands name targets and options that exist."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "serve_app" / "monitoring" / "runbooks.md",
    ROOT / "kuberay" / "README.md",
    ROOT / "runpod" / "README.md",
]
COMMANDS = re.compile(
    r"python -m ((?:bench|serve_app|kuberay)[\w.]*)((?: [^`\n|]*(?:\\\n[^`\n|]*)*)?)"
)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} of {page}"
        if anchor:
            assert anchor in anchors(file), f"{target} of {page}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    |^)make ([a-z][a-z-]+)", page.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} of {page}"


@cache
def help_of(*words: str) -> str:
    """What `python -m WORDS --help` prints, run in this process: imports are made once."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [words[0], *words[1:], "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    assert ended.value.code in (0, None), f"python -m {' '.join(words)} --help"
    return printed.getvalue()


def commands() -> list[tuple[str, str, str]]:
    """Page, module and arguments of each `python -m` command of ours."""
    collected = []
    for page in PAGES[:-2]:  # The pages of kuberay and runpod have tests of their own.
        for module, rest in COMMANDS.findall(page.read_text()):
            collected.append((str(page.relative_to(ROOT)), module, rest.replace("\\\n", " ")))
    return collected


def test_commands_name_options_that_exist() -> None:
    for page, module, rest in commands():
        words = rest.partition("#")[0].split()
        command = [module]
        if words and re.fullmatch(r"[a-z]+", words[0]) and module in ("bench", "serve_app"):
            command.append(words[0])
        options = [word.split("=")[0] for word in words if re.match(r"--[a-z][a-z-]*", word)]
        for option in options:
            assert option in help_of(*command), f"{option} of `{' '.join(command)}` in {page}"


@pytest.mark.parametrize(
    "page", ["README.md", "docs/benchmarking.md", "kuberay/README.md", "runpod/README.md"]
)
def test_commands_of_bench_have_all_that_they_need(page: str) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    from bench.__main__ import _parser

    start = "python -m bench "
    found = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert found
    for command in found:
        _parser().parse_args(shlex.split(command, comments=True))
