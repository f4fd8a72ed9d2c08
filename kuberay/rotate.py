"""`python -m kuberay rotate`: a new API key, in force without a restart.

The new key is added before those that are there, so that clients can change over; `rotate --only`
then takes the others away. It is printed alone on standard output. Pods read the Secret within
minutes. The hub's token, and API keys of your own, are replaced by `up` with HF_TOKEN or
QWEN_API_KEYS set.
"""

import argparse

from kuberay import console, secret, target
from kuberay.console import say
from kuberay.target import Target
from kuberay.tools import tools


@console.reports_errors
def command(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, or 2 where the cluster does not answer."""
    to = Target.of(options)
    with tools(to) as run:
        run.connect()
        key = secret.rotate(run, options.only)
    say("the earlier keys are gone" if options.only else "the earlier keys are taken as well")
    print(key)
    return 0


def arguments(parser: argparse.ArgumentParser) -> None:
    target.arguments(parser)
    parser.add_argument("--only", action="store_true", help="remove the earlier keys")
