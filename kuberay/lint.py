"""`python -m kuberay lint FILE...`: what a RayService's schema lets pass and still hurts.

It reads a manifest as the operator would, together with the ConfigMaps, Services and PodMonitors of
the same files, and names each finding with its line and the mend. Any RayService will do: a
manifest, `kubectl kustomize` or `kubectl get rayservice NAME --output yaml` on standard input (-).
With --was, the manifest as it was applied before, it also names edits that never arrive.

Exit status: 0 nothing that breaks, 1 an error (with --strict, a warning too), 2 cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from kuberay import console, lines, rules
from kuberay.errors import EksError
from kuberay.rayservice import Service
from kuberay.rules import ERROR, Finding


@dataclass(frozen=True)
class Found:
    """A finding, and the file it is in."""

    file: str
    service: str
    finding: Finding

    def shown(self) -> str:
        each = self.finding
        return (
            f"{self.file}:{each.line}: {each.severity}: {each.found} [{each.rule}]\n"
            f"    mend: {each.mend}"
        )


def lint(
    texts: Sequence[tuple[str, str]],
    was: Sequence[tuple[str, str]] = (),
    ignored: frozenset[str] = frozenset(),
) -> list[Found]:
    """The findings in files, given as name and text.

    Raises:
        EksError: one is not YAML, or there is no RayService in any.
    """
    services = list(_services(texts))
    if not services:
        raise EksError(f"no RayService in {', '.join(name for name, _ in texts)}")
    earlier = {(s.namespace, s.name): s for _, s in _services(was)}
    findings = []
    for file, service in services:
        named = rules.findings(service, ignored)
        before = earlier.get((service.namespace, service.name))
        if before is not None and "frozen-edit" not in ignored:
            named += rules.edits(before, service)
        findings += [Found(file, service.name, finding) for finding in named]
    return findings


def _services(texts: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Service]]:
    documents: list[tuple[str, Any]] = []
    for name, text in texts:
        try:
            loaded = lines.load_all(text)
        except yaml.YAMLError as error:
            raise EksError(f"{name}: is not YAML: {' '.join(str(error).split())}") from error
        for document in loaded:
            # What `kubectl get` prints of several.
            items = document.get("items") if lines.at(document, "kind") == "List" else None
            documents += [(name, each) for each in items or [document]]
    others = [document for _, document in documents if lines.at(document, "kind") != "RayService"]
    for name, document in documents:
        if lines.at(document, "kind") == "RayService":
            yield name, Service(document, others)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="manifests; - is standard input")
    parser.add_argument(
        "--was", nargs="+", default=[], metavar="FILE", help="the manifests as applied before"
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="RULE", choices=sorted(rules.RULES),
        help="a rule to skip; may be repeated",
    )  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="status 1 for warnings too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 nothing that breaks, 1 something."""
    findings = lint(_read(options.files), _read(options.was), frozenset(options.ignore))
    errors = sum(finding.finding.severity == ERROR for finding in findings)
    if options.json:
        listed = [{"file": f.file, "service": f.service, **asdict(f.finding)} for f in findings]
        print(
            json.dumps({"errors": errors, "warnings": len(findings) - errors, "findings": listed})
        )
    else:
        for finding in findings:
            print(finding.shown())
        print(f"{errors} errors, {len(findings) - errors} warnings")
    return 1 if errors or (options.strict and findings) else 0


def _read(names: Sequence[str]) -> list[tuple[str, str]]:
    texts = []
    for name in names:
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EksError(f"{name}: {error}") from error
        texts.append((name, text))
    return texts
