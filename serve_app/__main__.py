"""The command line of the application: `python -m serve_app COMMAND`."""

import argparse
import sys
from collections.abc import Sequence

from serve_app.errors import ConfigError
from serve_app.version import version


class _Version(argparse.Action):
    """Asks git for the version only where it is wanted."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"qwen-ray-serve {version()}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 good, 1 failed, 2 a setting to mend."""
    parser = argparse.ArgumentParser(prog="python -m serve_app", description=__doc__)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version, and end")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run serve_config.yaml on this machine")
    serve.add_argument("--config", default="serve_config.yaml", help="default: %(default)s")
    serve.add_argument("--model", default=None, help="model to serve instead of the configured one")
    commands.add_parser("doctor", help="check this machine", add_help=False)
    commands.add_parser("tenants", help="manage tenants and their keys", add_help=False)
    commands.add_parser(
        "observe", help="start Prometheus, Grafana or a status page", add_help=False
    )
    commands.add_parser("warm", help="compile kernels once, for later starts", add_help=False)
    commands.add_parser(
        "template", help="start the process from which replicas are forked", add_help=False
    )
    arguments, rest = parser.parse_known_args(argv)
    try:
        if arguments.command == "doctor":
            from serve_app.launch import doctor

            return doctor.run(rest)
        if arguments.command == "tenants":
            from serve_app.tenants import commands as tenant_commands

            return tenant_commands.main(rest)
        if arguments.command == "observe":
            from serve_app.monitoring import observe

            return observe.main(rest)
        if arguments.command == "warm":
            from serve_app.launch import warm

            return warm.run(rest)
        if arguments.command == "template":
            from serve_app.launch import template

            return template.run(rest)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        from serve_app.launch import launcher

        return launcher.serve(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
