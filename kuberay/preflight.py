"""`python -m kuberay preflight`: will this account hold this cluster, and what will it cost?

Each check is one line: ok, warn or FAIL, what was found, and the mend. Nothing is changed. A check
that a missing permission hides is a warning that names the permission: not knowing is no reason to
stop somebody who knows. Exit status: 0 without a FAIL, 1 with one.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuberay import console, cost, images, layout, prices, render, target, weights
from kuberay.checks import access, capacity, service
from kuberay.checks.check import FAIL, OK, WARN, Check, unchecked
from kuberay.cost import Bill
from kuberay.errors import AwsError, EksError
from kuberay.target import Target
from serve_app import __version__
from serve_app.errors import ConfigError

DEFAULT = "one-gpu"


@dataclass(frozen=True)
class Preflight:
    """All lines, the bill, the manifests that both are about, and what eksctl is to be given."""

    checks: tuple[Check, ...]
    bill: Bill | None = None
    manifests: tuple[dict[str, Any], ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def good(self) -> bool:
        return all(check.status != FAIL for check in self.checks)

    def lines(self) -> list[str]:
        shown = []
        for check in self.checks:
            shown.append(f"{check.status:<4}  {check.name:<22} {check.found}")
            if check.mend:
                shown.append(f"      {'':<22} mend: {check.mend}")
        if self.bill is not None:
            shown += ["", *self.bill.lines()]
        verdict = "ready to go up" if self.good else "not ready: mend the lines marked FAIL"
        return [*shown, "", verdict]

    def as_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"ok": self.good, "checks": [asdict(c) for c in self.checks]}
        if self.bill is not None:
            data["usd_per_hour"] = {
                "at_rest": round(self.bill.at_rest, 4),
                "at_most": round(self.bill.at_most, 4),
                "items": [asdict(item) for item in self.bill.items],
                "not_known": list(self.bill.unknown),
                "not_counted": cost.NOT_COUNTED,
            }
        return data


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    outcome = preflight(Target.of(options), Choice.of(options))
    print(json.dumps(outcome.as_json()) if options.json else "\n".join(outcome.lines()))
    return 0 if outcome.good else 1


@dataclass(frozen=True)
class Choice:
    """What of the manifests is to be deployed.

    Attributes:
        image: None for the account's own repository, under the name that the manifests give.
        bucket: of the weights; None for the model hub, which is taken too where it lacks them.
    """

    overlay: str = DEFAULT
    image: str | None = None
    bucket: str | None = None
    model_config: Path | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Choice":
        return cls(options.overlay, options.image, options.bucket, options.model_config)


def documents(to: Target, choice: Choice) -> tuple[list[dict[str, Any]], Check]:
    """The manifests as they are to be applied, and where they take the weights from.

    Raises:
        EksError: there is no such overlay, or it cannot be built.
    """
    name, region = to.owner.name, to.owner.region
    registry = f"{to.account.id}.dkr.ecr.{region}.amazonaws.com"
    image = images.pinned(to.account, choice.image or f"{registry}/{render.IMAGE}{__version__}")
    try:
        model = render.serve_config(choice.overlay)["applications"][0]["args"]["model"]
        source = weights.source(to.account, to.config, str(model), choice.bucket)
        manifests = render.documents(choice.overlay, name, region, source.bucket, image)
    except ConfigError as error:
        raise EksError(str(error)) from error
    return manifests, Check("weights", WARN if source.mend else OK, source.found, source.mend)


def preflight(to: Target, choice: Choice) -> Preflight:
    """All checks, in the order in which a start would meet them."""
    checks = [*access.programs()]
    signed_in = guarded("credentials", lambda: access.credentials(to.account))
    if signed_in[0].status != OK:
        return Preflight((*checks, *signed_in))
    checks += [*signed_in, *guarded("region", lambda: access.region(to.account))]
    try:
        manifests, source = documents(to, choice)
        plan = layout.layout(to.config, manifests)
    except EksError as error:
        return Preflight((*checks, Check("manifests", FAIL, str(error), "correct this")))
    account = to.account
    config, zones_found = capacity.zoned(to, plan)
    checks += zones_found
    checks += guarded("quota", lambda: capacity.vcpu_quotas(account, plan))
    if plan.own_network:
        checks += guarded("network", lambda: capacity.network_quotas(account, to, plan))
    else:
        checks += guarded("subnets", lambda: capacity.subnets(account, to.config))
    checks.append(source)
    checks += guarded("model", lambda: service.model(account, plan, choice.model_config))
    checks += guarded("upgrade", lambda: service.upgrade(plan))
    checks += service.versions(plan)
    checks += guarded("image", lambda: service.image_exists(account, plan))
    checks += guarded("cluster", lambda: access.cluster(account, to))
    bill = cost.bill(plan, lambda kind: prices.rate(account, kind))
    return Preflight(tuple(checks), bill, tuple(manifests), config)


def guarded(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """The lines of a check, or the one line that says why there are none."""
    try:
        return list(check())
    except AwsError as error:
        if name == "credentials":
            return [Check(name, FAIL, str(error), "sign in to AWS, and run this again")]
        return [unchecked(name, error)]
    except EksError as error:
        return [Check(name, FAIL, str(error), "correct this")]


def deployed(parser: argparse.ArgumentParser) -> None:
    """The options of what is deployed, which `up` has too."""
    add = parser.add_argument
    add("--overlay", default=DEFAULT, help=f"{', '.join(render.overlays())}; default: %(default)s")
    add("--image", help="default: that of the manifests, in the account's ECR")
    add("--bucket", help="S3 bucket that has the weights under their hub name; default: the hub")
    add("--model-config", type=Path, help="config.json of a model that is not known here")


def arguments(parser: argparse.ArgumentParser) -> None:
    target.arguments(parser)
    add = parser.add_argument
    deployed(parser)
    add("--json", action="store_true", help="print one JSON object")
