"""Two front ends on one engine: vLLM's own in Rust (`vllm-rs`), and AsyncLLM in this process.

The Rust front end answers the requests of the fast lane; no Python touches their tokens. AsyncLLM
is behind vLLM's Python application, which answers everything else. This is what `vllm serve` does
for several API servers, of which one is here another program. The names of vLLM that are used are
in docs/upstream.md.
"""

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import vllm
import vllm.v1.engine.async_llm as async_llm
import vllm.v1.engine.utils as engine_processes
import zmq
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.serve.utils.api_utils import jsonify_non_default_args
from vllm.renderers.base import BaseRenderer
from vllm.usage.usage_lib import UsageContext
from vllm.utils.network_utils import ZmqListener, get_open_zmq_ipc_path, make_zmq_listener
from vllm.v1.executor import Executor
from vllm.v1.utils import RustFrontendProcessManager

from serve_app.replica.arguments import loading
from serve_app.replica.scheduler import FAST, FULL, ReportingAsyncScheduler, ReportingScheduler
from serve_app.replica.startup import Startup

# Arguments of vLLM's API server that change answers and that vllm-rs does not read. Where one is
# set, the replica has the full lane only.
UNREAD_ARGUMENTS = (
    "chat_template_kwargs",
    "override_generation_config",
    "tokenizer",
    "tokenizer_revision",
    "skip_tokenizer_init",
    "return_tokens_as_token_ids",
    "response_role",
    "reasoning_parser_plugin",
    "enable_prompt_embeds",
    "io_processor_plugin",
    "lora_modules",
    "enable_lora",
    "middleware",
    "root_path",
    "enable_force_include_usage",
    "enable_server_load_tracking",
    "exclude_tools_when_tool_choice_none",
    "structured_outputs_config",
)


# What RustFrontendProcessManager leaves out of the arguments.
_OF_THE_MANAGER = {
    "api_server_count",
    "data_parallel_rank",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
}


def binary() -> Path | None:
    """Where `vllm-rs` is: named by VLLM_RUST_FRONTEND_PATH, in vLLM's package, or beside Python."""
    named = os.environ.get("VLLM_RUST_FRONTEND_PATH")
    places = [Path(named)] if named else []
    places += [Path(vllm.__file__).with_name("vllm-rs"), Path(sys.prefix) / "bin" / "vllm-rs"]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def obstacle(args: argparse.Namespace, defaults: argparse.Namespace) -> str | None:
    """Why an engine with these arguments cannot have the Rust front end; None: it can.

    Args:
        defaults: vLLM's arguments where only the model is named.
    """
    if binary() is None:
        return "vllm-rs is not installed"
    if args.data_parallel_size > 1:
        return f"data_parallel_size is {args.data_parallel_size}"
    for name in UNREAD_ARGUMENTS:
        if getattr(args, name, None) != getattr(defaults, name, None):
            return f"vllm-rs does not read the engine argument {name}"
    return _refusal(args)


def _refusal(args: argparse.Namespace) -> str | None:
    """What vllm-rs itself has against these arguments. It reads them first of all, and without the
    sockets that belong to them it always ends there."""
    given = jsonify_non_default_args(_arguments(args, ""), exclude=_OF_THE_MANAGER)
    given["model_tag"] = args.model
    command = [str(binary()), "frontend", "--args-json", json.dumps(given)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr
    _, refused, reason = output.partition("for '--args-json <JSON>':")
    if not refused:
        return None
    if names := re.findall(r"^- (\w+)$", reason, re.MULTILINE):
        return f"vllm-rs does not have the engine arguments {', '.join(names)}"
    return f"vllm-rs does not take these engine arguments: {reason.strip().splitlines()[0]}"


# How often vllm-rs may be started anew beside one engine.
RESTARTS = 5


class RustFrontend:
    """`vllm-rs` beside one engine: a process that can be restarted while the engine runs.

    An engine core registers with a front end once, by the first message of its connection. So the
    core knows an address more for each restart: it tries to connect there until the next `vllm-rs`
    listens, and then registers with it. Results are pushed, and need no registration.

    Attributes:
        host, port: where it listens. The port stays, and connections wait in its backlog, while the
            process is started anew.
        token: what each request must bring, as `Authorization: Bearer`.
    """

    def __init__(self, args: argparse.Namespace, host: str) -> None:
        self.host, self.token = host, secrets.token_urlsafe(32)
        self._args = _arguments(args, self.token)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family, backlog=2048)
        self.port: int = self._listening.getsockname()[1]
        self._spare_inputs = [get_open_zmq_ipc_path() for _ in range(RESTARTS)]

    def addresses(
        self, listeners: engine_processes.EngineZmqListeners
    ) -> engine_processes.EngineZmqAddresses:
        """Where the engine core connects to, those of later processes included."""
        self._output = listeners.outputs[FAST].address
        addresses = listeners.addresses
        return dataclasses.replace(addresses, inputs=[*addresses.inputs, *self._spare_inputs])

    def start(self, input_listener: ZmqListener, output_listener: ZmqListener) -> None:
        """Start the process. It answers once the engine core has registered with it."""
        executable = binary()
        assert executable is not None
        # The process inherits the listening socket.
        self.manager = RustFrontendProcessManager(
            binary_path=str(executable),
            sock=self._listening,
            args=self._args,
            input_listener=input_listener,
            output_listener=output_listener,
            engine_start_index=0,
            engine_count=1,
            data_parallel_size=1,
        )

    @property
    def may_restart(self) -> bool:
        return bool(self._spare_inputs)

    def restart(self) -> None:
        """Start another process in the place of one that has ended."""
        self.manager.shutdown(timeout=0)  # Removes its sockets, but not those of a failed attempt.
        Path(self._output.removeprefix("ipc://")).unlink(missing_ok=True)
        output = make_zmq_listener(self._output, zmq.PULL)
        try:
            inputs = make_zmq_listener(self._spare_inputs.pop(0), zmq.ROUTER)
        except BaseException:
            output.cleanup()
            raise
        self.start(inputs, output)

    @property
    def alive(self) -> bool:
        return self.manager._proc.poll() is None

    async def probe(self) -> None:
        """Return once it has answered; a hung one never does.

        Raises:
            OSError: it does not take connections, or closed this one without an answer.
        """
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(b"GET /health HTTP/1.0\r\nhost: probe\r\n\r\n")
            if not await reader.readline():
                raise ConnectionResetError("vllm-rs closed the connection of a probe")
        finally:
            writer.close()

    def kill(self) -> None:
        """End the process at once: connections to it break, and new ones wait."""
        self.manager._proc.kill()

    def stop(self) -> None:
        """End it for good: connections are refused from now on."""
        self._listening.close()
        self.manager.shutdown(timeout=5)


def launch(
    kind: type[async_llm.AsyncLLM],
    args: argparse.Namespace,
    host: str,
    stat_loggers: list[Any],
    startup: Startup,
    load: Mapping[str, Any],
) -> tuple[async_llm.AsyncLLM, RustFrontend]:
    """Start an engine and both of its front ends; blocks until the engine's processes are ready.

    Args:
        kind: the class of the Python front end.
        host: the address that vllm-rs listens on.
        startup: is told what the start is doing.
        load: arguments about loading, in place of those in `args`. vllm-rs loads nothing.

    Raises:
        ValueError, OSError: from vLLM, for arguments that it cannot honour.
    """
    engine_args = AsyncEngineArgs.from_cli_args(loading(args, load))
    engine_args._api_process_count = 2
    engine_args._api_process_rank = -1
    # The usage context sets vLLM's default batch limits: this one is `vllm serve`'s.
    with startup.configuration():
        config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    scheduler = (
        ReportingAsyncScheduler if config.scheduler_config.async_scheduling else ReportingScheduler
    )
    config.scheduler_config.scheduler_cls = f"{scheduler.__module__}.{scheduler.__qualname__}"
    listeners = engine_processes.bind_engine_zmq_listeners(config, 2)
    rust = RustFrontend(args, host)
    with ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as undo:
        # Copies of a tokenizer with a large vocabulary take seconds. The engine starts meanwhile.
        renderer = beside.submit(async_llm.renderer_from_config, config)
        with engine_processes.launch_core_engines(
            config,
            Executor.get_class(config),
            # Our own recorder wants statistics whether or not vLLM's are on.
            True,
            rust.addresses(listeners),
        ) as launched:
            undo.callback(launched.engine_manager.shutdown, timeout=0)
            rust.start(listeners.inputs[FAST], listeners.outputs[FAST])
            undo.callback(rust.stop)
            launched.watched_frontend_processes = rust.manager.processes
        with _rendering_with(renderer.result()):
            llm = kind.from_vllm_config(
                config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=stat_loggers,
                disable_log_stats=args.disable_log_stats,
                client_addresses={
                    "input_address": launched.addresses.inputs[FULL],
                    "output_address": launched.addresses.outputs[FULL],
                    "input_listener": listeners.inputs[FULL].socket,
                    "output_listener": listeners.outputs[FULL].socket,
                },
                client_count=2,
                client_index=FULL,
            )
        # vLLM leaves an engine that it did not start to its owner; here that is the same process.
        llm.engine_core.resources.engine_manager = launched.engine_manager
        llm.engine_core.start_engine_core_monitor()
        undo.pop_all()
    return llm, rust


@contextlib.contextmanager
def _rendering_with(renderer: BaseRenderer[Any]) -> Iterator[None]:
    """Have the AsyncLLM that is made inside this block use `renderer`, instead of building one."""
    build = async_llm.renderer_from_config
    async_llm.renderer_from_config = lambda config: renderer
    try:
        yield
    finally:
        async_llm.renderer_from_config = build


def _arguments(args: argparse.Namespace, token: str) -> argparse.Namespace:
    """vLLM's arguments, as vllm-rs is to have them."""
    mine = copy.copy(args)
    mine.api_key = [token]
    mine.allowed_origins = []  # Requests of browsers take the full lane.
    mine.enable_request_id_headers = True
    mine.enable_log_requests = False
    # Requests with tools take the full lane, and parsers may be ones that vllm-rs does not know.
    mine.tool_call_parser, mine.enable_auto_tool_choice = None, False
    mine.tool_parser_plugin = ""
    # HAProxy keeps connections to it: the fewer it closes, the fewer close under a request.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "75")
    return mine
