"""`python -m kuberay COMMAND`: create, check and delete a cluster on EKS.

    preflight  check permissions, quotas and cost; change nothing
    lint       find mistakes of a RayService that its schema allows
    render     write serve_config.yaml into the manifests, or print an overlay
    up         create a cluster, and wait until the model has answered
    status     show what exists, what it costs, and when it expires
    rotate     add an API key, which is valid without a restart
    down       delete everything, and verify that nothing is left

Each command is a module with `arguments(parser)` and `command(options)`. It is imported only when
it runs, because most commands need neither AWS's SDK nor a cluster.
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
