"""The proof that a cluster is gone: every kind of thing that carries its tag, looked for anew.

A sweep reads and removes nothing. It is clean when nothing is left and every kind could be looked
at: a kind that a missing permission hides is not proved to be gone, and is named. What serves all
clusters of the project (its image repository, buckets of weights) is named as well, with its price
and the command that removes it, and is no reason for a proof to fail.
"""

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kuberay import console, kinds, prices, target
from kuberay.aws import Account, tags
from kuberay.errors import AwsError, PermissionMissing
from kuberay.owned import Owner
from kuberay.search import Found, Search
from kuberay.target import Target


@dataclass(frozen=True)
class Gap:
    """A kind that could not be looked at, or a thing that could not be removed."""

    kind: str
    problem: str
    action: str = ""
    resource: str = ""


@dataclass(frozen=True)
class Sweep:
    """What was found, and what could not be looked at."""

    owner: Owner
    account_id: str
    swept_at: str
    left: tuple[Found, ...]
    gaps: tuple[Gap, ...]
    refused: tuple[Gap, ...] = ()

    @property
    def clean(self) -> bool:
        return not self.counted and not self.gaps

    @property
    def counted(self) -> list[Found]:
        """What is left of the cluster, without what outlives clusters."""
        return [each for each in self.left if each.counted]

    @property
    def usd_per_month(self) -> float:
        return sum(each.usd_per_month or 0.0 for each in self.counted)

    def command(self, resource: Found) -> str:
        return kinds.command(resource, self.owner.region)

    def as_json(self) -> dict[str, Any]:
        return {
            "cluster": self.owner.name,
            "region": self.owner.region,
            "account": self.account_id,
            "swept_at": self.swept_at,
            "clean": self.clean,
            "usd_per_month": round(self.usd_per_month, 2),
            "prices_as_of": prices.AS_OF,
            "kinds": [kind.name for kind in kinds.KINDS],
            "left": [
                {**dataclasses.asdict(each), "command": self.command(each)} for each in self.left
            ],
            "not_looked_at": [dataclasses.asdict(gap) for gap in self.gaps],
            "not_removed": [dataclasses.asdict(gap) for gap in self.refused],
        }

    def lines(self) -> list[str]:
        """The same for a person."""
        where = f"{self.owner.name} in {self.owner.region} (account {self.account_id})"
        shown = []
        for each in self.left:
            shown += self._shown(each)
        for gap in self.gaps:
            shown.append(f"????  {gap.kind:<22} {'':>16}  not looked at: {gap.problem}")
        for gap in self.refused:
            shown.append(f"????  {gap.kind}: not removed: {gap.problem}")
        if self.clean:
            looked = f"{len(kinds.KINDS)} kinds of things were looked for"
            return [*shown, f"{where}: nothing is left; {looked}"]
        total = f"{len(self.counted)} things are left, {self.usd_per_month:.2f} $/month at least"
        unseen = f"; {len(self.gaps)} kinds could not be looked at" if self.gaps else ""
        return [*shown, f"{where}: {total}{unseen} (prices of {prices.AS_OF})"]

    def _shown(self, resource: Found) -> list[str]:
        usd = (
            "price ?" if resource.usd_per_month is None else f"{resource.usd_per_month:.2f} $/month"
        )
        state = ", leaving" if resource.leaving else ""
        word, margin = "left" if resource.counted else "note", f"      {'':<22} {'':>16}  "
        shown = [f"{word}  {resource.kind:<22} {usd:>16}  {resource.id}  {resource.detail}{state}"]
        if not resource.tagged and resource.counted:
            shown.append(f"{margin}does not carry the tag: left alone")
        return [*shown, f"{margin}{self.command(resource)}"]


def vouched(account: Account, owner: Owner) -> bool:
    """Whether a cluster of ours exists: then the tags of its controllers are its own."""
    try:
        description = account.call("eks", "describe_cluster", name=owner.name)["cluster"]
    except AwsError:
        return False  # Less is removed then. Of a missing permission the kind `cluster` tells.
    return owner.marks(tags(description, "tags"))


def sweep(account: Account, owner: Owner, search: Search | None = None) -> Sweep:
    """Look for every kind of thing.

    Args:
        search: another than a new one, which knows whether a cluster of ours is there.

    Raises:
        AwsError: the credentials are not accepted.
    """
    account_id = account.id
    if search is None:
        search = Search(account, owner, vouched(account, owner))
    left: list[Found] = []
    gaps = []
    for kind in kinds.KINDS:
        try:
            # A kind that fails half way keeps what it found.
            for resource in kind.find(search):
                left.append(resource)
        except PermissionMissing as error:
            gaps.append(Gap(kind.name, str(error), error.action, error.resource))
        except AwsError as error:
            gaps.append(Gap(kind.name, str(error)))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Sweep(owner, account_id, now, tuple(left), tuple(gaps))


def report(swept: Sweep, as_json: bool, path: Path | None) -> int:
    """Print a sweep, and write it to a file. Returns the exit status: 1 if it is not clean."""
    text = json.dumps(swept.as_json(), indent=None if as_json else 2)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    print(text if as_json else "\n".join(swept.lines()))
    return 0 if swept.clean else 1


def arguments(parser: argparse.ArgumentParser) -> None:
    target.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, help="write the JSON to this file too")


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 nothing is left, 1 something is, or could not be looked at."""
    to = Target.of(options)
    return report(sweep(to.account, to.owner), options.json, options.report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m kuberay.sweep", description=__doc__)
    arguments(parser)
    sys.exit(command(parser.parse_args()))
