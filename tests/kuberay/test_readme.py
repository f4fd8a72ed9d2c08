"""What README.md states is what the code does: prices, kinds, options, overlays and files."""

import argparse
import importlib
import re
from pathlib import Path

import pytest
import yaml

from kuberay import cost, kinds, layout, prices, render
from kuberay.__main__ import SUBCOMMANDS
from kuberay.prices import Rate
from tests.kuberay.conftest import Commands

HERE = Path(render.__file__).parent
README = (HERE / "README.md").read_text()


def table(kind: str) -> Rate | None:
    usd = prices.instance_per_hour(kind)
    return None if usd is None else Rate(usd, "table")


@pytest.mark.parametrize("overlay", render.overlays())
def test_what_it_costs(overlay: str, kustomize: Commands) -> None:
    (row,) = [line for line in README.splitlines() if re.match(rf"\| `{overlay}`.*\d \|", line)]
    config = yaml.safe_load((HERE / "cluster.yaml").read_text())
    bill = cost.bill(layout.layout(config, render.documents(overlay)), table)
    found = (f"{bill.at_rest:.2f}", f"{bill.at_most:.2f}", f"{prices.monthly(bill.at_rest):,.0f}")
    assert tuple(cell.strip() for cell in row.split("|")[2:5]) == found


def test_what_bills_without_a_gpu_node(kustomize: Commands) -> None:
    config = yaml.safe_load((HERE / "cluster.yaml").read_text())
    bill = cost.bill(layout.layout(config, render.documents("one-gpu")), table)
    rest = sum(item.at_rest for item in bill.items if not item.name.startswith("gpu"))
    assert f"what still bills is ${rest:.2f} an hour" in README.replace("\n", " ")


def test_how_many_kinds_a_sweep_looks_at() -> None:
    assert f"a sweep looks at {len(kinds.KINDS)} kinds of things" in README


def test_every_option_that_it_names_is_one_of_a_command() -> None:
    known = {"--platform", "--username", "--password-stdin", "--query", "--output", "--tags",
             "--repository-name", "--name", "--help"}  # Of docker and aws.  # fmt: skip
    for module in [*SUBCOMMANDS.values(), "kuberay.sweep"]:
        parser = argparse.ArgumentParser()
        importlib.import_module(module).arguments(parser)
        known |= {flag for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


def test_every_command_that_it_names_is_there() -> None:
    named = set(re.findall(r"python -m kuberay ([a-z]+)", README))
    assert named <= set(SUBCOMMANDS)
    makefile = (HERE.parent / "Makefile").read_text()
    for target in set(re.findall(r"make (eks-[a-z]+)", README)):
        assert re.search(rf"^[\w -]*{target}\b[\w -]*:", makefile, re.M), target


def test_every_file_of_its_list_is_there_and_none_is_left_out() -> None:
    listed = README.partition("## Where things are")[2]
    files = set(re.findall(r"[\w-]+\.(?:py|yaml)", listed))
    assert {name for name in files if not (HERE / name).exists()} == set()
    ours = {path.name for path in HERE.glob("*.py") if not path.name.startswith("__")}
    assert ours - files == {"errors.py"}
