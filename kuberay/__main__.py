"""`python -m kuberay COMMAND`: the way up, the way down, and what can be known before either.

    preflight  will this account hold the cluster, and what will it cost
    lint       what a RayService's schema lets pass and a controller or a user suffers from
    render     serve_config.yaml into the manifests, and an overlay as one file
    up         from nothing to an answer of the model
    status     what there is, what it bills, how long it may live
    rotate     a new API key, in force without a restart
    down       delete everything, and prove that nothing is left

Each is a module with `arguments(parser)` and `command(options)`, imported only when it is asked
for: most need neither AWS's SDK nor a cluster.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

SUBCOMMANDS: Mapping[str, str] = {
    "preflight": "kuberay.preflight",
    "lint": "kuberay.lint",
    "render": "kuberay.render",
    "up": "kuberay.up",
    "status": "kuberay.status",
    "rotate": "kuberay.rotate",
    "down": "kuberay.down",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m kuberay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=SUBCOMMANDS, metavar="COMMAND")
    name = parser.parse_args(words[:1]).command
    module = importlib.import_module(SUBCOMMANDS[name])
    own = argparse.ArgumentParser(prog=f"python -m kuberay {name}", description=module.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    module.arguments(own)
    return int(module.command(own.parse_args(words[1:])))


if __name__ == "__main__":
    sys.exit(main())
