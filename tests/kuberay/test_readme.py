"""What README.md states is what the code does: prices, kinds, options, overlays and files."""

import argparse
import importlib
import re
import shlex
import subprocess
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
    result = (f"{bill.at_rest:.2f}", f"{bill.at_most:.2f}", f"{prices.monthly(bill.at_rest):,.0f}")
    assert tuple(cell.strip() for cell in row.split("|")[2:5]) == result


def test_what_bills_without_a_gpu_node(kustomize: Commands) -> None:
    config = yaml.safe_load((HERE / "cluster.yaml").read_text())
    bill = cost.bill(layout.layout(config, render.documents("one-gpu")), table)
    rest = sum(item.at_rest for item in bill.items if not item.name.startswith("gpu"))
    assert f"still costs ${rest:.2f} an hour" in README.replace("\n", " ")


def test_how_many_kinds_a_sweep_looks_at() -> None:
    assert f"a sweep searches {len(kinds.KINDS)} kinds of resources" in README


def test_every_option_that_it_names_is_one_of_a_command() -> None:
    expected = {"--platform", "--username", "--password-stdin", "--query", "--output", "--tags",
             "--repository-name", "--name", "--help"}  # Of docker and aws.  # fmt: skip
    for module in [*SUBCOMMANDS.values(), "kuberay.sweep"]:
        parser = argparse.ArgumentParser()
        importlib.import_module(module).arguments(parser)
        expected |= {flag for action in parser._actions for flag in action.option_strings}
    # Those of bench are parsed by tests/test_docs.py.
    text = re.sub(r"^python -m bench (?:.*\\\n)*.*$", "", README, flags=re.MULTILINE)
    text = re.sub(r"`--(?:no-metrics|url [^`]*)`", "", text)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= expected


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


def test_its_blocks_run_from_top_to_bottom(tmp_path: Path) -> None:
    """In bash, in order, with small programs in place of the real ones, which keep their words."""
    log = tmp_path / "calls"
    for name in ("aws", "docker", "kubectl", "make", "python", "base64"):
        path = tmp_path / name
        # What `aws sts get-caller-identity` prints goes into the names that follow.
        # The end of a pipe is read, or what writes into it may fail.
        read = "[ ! -p /dev/stdin ] || cat >/dev/null\n"
        path.write_text(f'#!/bin/sh\n{read}echo "{name} $*" >> "{log}"\necho 123456789012\n')
        path.chmod(0o755)
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    assert len(blocks) >= 5
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(blocks)],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    registry = "123456789012.dkr.ecr.us-west-2.amazonaws.com/qwen-ray-serve"
    assert any(call.startswith("docker push") and registry in call for call in calls)
    # The address that is pushed is the one that `up` looks for.
    from serve_app import __version__

    assert any(call == f"docker push {registry}:{__version__}" for call in calls)
    ours = [call.split()[3:] for call in calls if call.startswith("python -m kuberay ")]
    ours += [
        [made[1].removeprefix("eks-"), *shlex.split(" ".join(made[2:]).removeprefix("ARGS="))]
        for made in (call.split() for call in calls)
        if made[0] == "make"
    ]
    assert {words[0] for words in ours} >= {"up", "down", "rotate"}
    for name, *words in ours:
        parser = argparse.ArgumentParser()
        importlib.import_module(SUBCOMMANDS[name]).arguments(parser)
        parser.parse_args(words)


def test_the_commands_of_its_first_lines_are_those_of_make() -> None:
    for target, name in re.findall(r"^ +(make eks-(\w+)) +#", README, re.M):
        assert target == f"make eks-{name}"
        assert name in SUBCOMMANDS
