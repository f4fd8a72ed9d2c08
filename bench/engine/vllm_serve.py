"""`vllm serve` for either build of vLLM: its command fails on the CPU build, which has no package
metadata of the name that the command looks up.

Where `bench starts` asks for it, this notes the phases of the start as a replica does.
"""

import os
from pathlib import Path

from serve_app.replica.startup import FILE_VARIABLE, Startup, record

# Also in processes of the engine that are spawned and import this again.
record()
_startup = Startup(dedicated=True)
with _startup.phase("imports"):
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    with _startup.phase("configuration"):
        args = make_arg_parser(FlexibleArgumentParser()).parse_args()
        validate_parsed_serve_args(args)
    if path := os.environ.get(FILE_VARIABLE):
        _startup.write(Path(path))
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
