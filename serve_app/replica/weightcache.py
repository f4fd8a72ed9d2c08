"""vLLM's weight cache: a daemon that holds the weights of one GPU, and how an engine maps them.

`vllm preload` starts such daemons through a command line that imports everything again, and leaves
them alone. Here replica/holder.py starts them and ends them. The names of vLLM that are used are
in docs/upstream.md.
"""

import argparse
import os
import socket
from pathlib import Path
from typing import Any

import vllm.model_executor.models.registry as registry
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.model_loader.weight_cache import daemon, protocol
from vllm.usage.usage_lib import UsageContext
from vllm.utils.network_utils import get_distributed_init_method, get_open_port

# The name of a socket; those of all GPUs are of the same length.
SOCKET_NAME = os.path.basename(protocol.get_socket_path("GPU"))
# A daemon answers one request after another, at once: an engine only asks for handles.
_ANSWER_S = 10.0


def rendezvous() -> str:
    """Where the daemons of one engine find each other."""
    return str(get_distributed_init_method("127.0.0.1", get_open_port()))


def serve(args: argparse.Namespace, folder: str, init_method: str, rank: int) -> None:
    """Load the weights of a rank, and serve them until this process is killed.

    Args:
        args: of the engine, as it would load its weights itself.
    """
    # This process imports the model's class anyway: vLLM need not inspect it in another one.
    registry._run_in_subprocess = lambda inspect: inspect()
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    protocol.check_ipc_platform_support()
    holding = daemon.WeightCacheDaemon(config, rank, rank, init_method, folder)
    holding.load_model()
    # Without its warm-up: the engine tunes the same kernels itself.
    holding.serve_forever()


def load_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of an engine that maps weights; if a daemon ends then, it loads them itself."""
    return {
        "load_format": "ipc_cache",
        "model_loader_extra_config": {"socket_dir": str(folder), "fallback": True},
    }


def ask(path: Path) -> None:
    """Return once the daemon of this socket has answered.

    Raises:
        TimeoutError: it hangs.
        ConnectionError, FileNotFoundError: nobody listens.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_S)
        connection.connect(str(path))
        protocol.send_msg(connection, {"cmd": "get_memory"})
        if protocol.recv_msg(connection).get("status") != "ok":
            raise ConnectionError(f"the daemon of {path} refuses to answer")
