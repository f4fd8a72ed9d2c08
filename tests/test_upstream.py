"""docs/upstream.md, row by row: each test fails when what a row names has moved."""

import argparse
import inspect
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REGISTER = (ROOT / "docs" / "upstream.md").read_text()


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_every_row_has_a_test() -> None:
    rows = set(re.findall(r"^\| (\d+) \|", REGISTER, re.MULTILINE))
    tests = {name.split("_")[1] for name in globals() if re.match(r"test_\d+_", name)}
    assert rows == tests


def test_every_private_import_is_registered() -> None:
    """A module that imports a private name of Ray or vLLM is named in the register."""
    private = re.compile(
        r"^\s*(?:from|import) (?:ray\.\S*_private|vllm\.v1|vllm\.entrypoints)", re.M
    )
    for path in (ROOT / "serve_app").rglob("*.py"):
        if private.search(path.read_text()):
            name = str(path.relative_to(ROOT / "serve_app"))
            assert f"`{name}`" in REGISTER, f"{name} is not in docs/upstream.md"


def test_only_one_package_imports_vllm() -> None:
    imports = re.compile(r"^(?:from|import) vllm\b", re.M)
    for path in (ROOT / "serve_app").rglob("*.py"):
        if path.parent.name != "replica":
            assert not imports.search(path.read_text()), path


def test_1_a_request_is_added_by_this_method() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    expected = ["self", "request", "prompt", "parent_req", "index", "queue"]
    assert parameters(AsyncLLM._add_request) == expected
    assert callable(AsyncLLM.check_admission)


def test_2_outputs_are_processed_by_these_methods() -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    assert parameters(OutputProcessor.process_outputs)[:3] == [
        "self",
        "engine_core_outputs",
        "engine_core_timestamp",
    ]
    assert "request_states" in inspect.getsource(OutputProcessor.__init__)
    assert callable(OutputProcessor.update_scheduler_stats)


def test_3_the_collector_is_looked_up_in_this_module() -> None:
    import vllm.v1.engine.async_llm as module
    from vllm.v1.engine.output_processor import RequestOutputCollector

    assert module.RequestOutputCollector is RequestOutputCollector
    assert "RequestOutputCollector(" in inspect.getsource(module.AsyncLLM)
    assert parameters(RequestOutputCollector.__init__) == ["self", "output_kind", "request_id"]


def test_4_engine_processes_are_made_by_this_context() -> None:
    import vllm.v1.engine.utils as module

    assert "get_mp_context()" in inspect.getsource(module.CoreEngineProcManager)


def test_5_the_application_is_built_by_these_functions() -> None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

    assert parameters(build_app)[:3] == ["args", "supported_tasks", "model_config"]
    assert parameters(init_app_state)[:4] == ["engine_client", "state", "args", "supported_tasks"]
    assert parameters(make_arg_parser) == ["parser"]
    assert parameters(validate_parsed_serve_args) == ["args"]


def test_6_a_parser_lists_its_arguments() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=["a"])
    assert {action.dest for action in parser._actions} == {"help", "one"}


def test_6_vllm_annotates_its_arguments_with_their_kinds() -> None:
    from serve_app.replica.arguments import _kinds

    kinds = _kinds()
    assert kinds["allowed_origins"] == {list}
    assert kinds["speculative_config"] == kinds["default_chat_template_kwargs"] == {dict}
    assert kinds["served_model_name"] == {str, list}


def test_7_the_fork_server_is_this_object() -> None:
    import multiprocessing.forkserver as module

    assert hasattr(module._forkserver, "_forkserver_pid")  # type: ignore[attr-defined]
    assert callable(module._forkserver._stop)  # type: ignore[attr-defined]


def test_8_serve_run_ends_by_this_function() -> None:
    from ray.serve import scripts

    assert "serve.shutdown()" in inspect.getsource(scripts)


def test_9_haproxy_is_configured_by_lines_that_the_edits_match() -> None:
    from ray.serve._private import haproxy_templates

    template = inspect.getsource(haproxy_templates)
    for line in (
        *("option splice-re", "errorfile 502", "errorfile 503", "errorfile 504", "defaults"),
        *("frontend http_frontend", "# Static routing based on path prefixes", "check backup"),
        *("# Enable HTTP connection reuse for better performance", "_server_up nbsrv("),
    ):
        assert line in template


def test_10_ray_says_where_its_logs_are() -> None:
    from ray._private.node import Node

    assert callable(Node.get_logs_dir_path)


def test_11_the_controller_says_where_http_listens() -> None:
    from ray.serve._private import constants
    from ray.serve._private.controller import ServeController

    assert constants.SERVE_CONTROLLER_NAME
    assert constants.SERVE_NAMESPACE
    original = getattr(ServeController, "__ray_metadata__", None)
    actor = original.modified_class if original is not None else ServeController
    assert callable(actor.get_http_config)


def test_12_the_state_says_whether_the_cluster_can_grow() -> None:
    from ray._private.state import state

    assert callable(state.get_max_resources_from_cluster_config)


def test_13_ray_says_how_often_it_reports_metrics() -> None:
    import ray

    assert ray._config.metrics_report_interval_ms() > 0


def test_14_a_router_is_given_the_replicas() -> None:
    from ray.serve.request_router import RequestRouter, RunningReplica

    assert parameters(RequestRouter.update_replicas) == ["self", "replicas"]
    assert isinstance(RunningReplica.replica_metadata, property)


def test_15_ray_reads_these_variables() -> None:
    import ray

    from serve_app.launch.launcher import ENVIRONMENT

    read = "".join(path.read_text() for path in _python(Path(ray.__file__).parent / "serve"))
    for name in ENVIRONMENT:
        if name.startswith("RAY_SERVE_"):
            assert f'"{name}"' in read, name


def test_16_vllms_application_keeps_its_handlers() -> None:
    from vllm.entrypoints.launchers import app

    source = inspect.getsource(app.build_app)
    assert "exception_handler" in source
    assert "FastAPI" in source


def test_16_vllms_models_are_listed_by_a_method() -> None:
    from vllm.entrypoints.launchers.api_server import app_state
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    assert parameters(OpenAIServingModels.show_available_models) == ["self"]
    assert "state.openai_serving_models" in inspect.getsource(app_state)


def test_17_rays_key_value_store_takes_a_namespace() -> None:
    from ray.experimental import internal_kv

    assert parameters(internal_kv._internal_kv_get) == ["key", "namespace"]
    assert parameters(internal_kv._internal_kv_put) == ["key", "value", "overwrite", "namespace"]


def test_18_a_tool_parser_is_told_of_the_end() -> None:
    from vllm.parser import abstract_parser
    from vllm.tool_parsers.abstract_tool_parser import ToolParser
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    flush = inspect.getsource(abstract_parser.DelegatingParser._flush_engine_parsers)
    assert "engine_based_streaming" in flush
    assert "finish_streaming" in flush
    assert ToolParser.engine_based_streaming is False
    assert Hermes2ProToolParser.structural_tag_model == "hermes"
    assert parameters(ToolParser.get_structural_tag) == [
        *("self", "request", "reasoning", "strict_level")
    ]


def test_31_serving_objects_bound_every_answer_by_this() -> None:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate import api_router
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.scale_out import factories
    from vllm.entrypoints.scale_out.render.serving import ServingRender
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    from serve_app.replica.bounds import SERVING

    kinds = [OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses]
    for kind in (*kinds, ServingTokens, ServingRender):
        assert "self.override_max_tokens" in inspect.getsource(kind)
    assert issubclass(AnthropicServingMessages, OpenAIServingChat)
    source = inspect.getsource(api_router) + inspect.getsource(factories)
    for name in SERVING:
        assert f"state.{name}" in source


def test_32_prompts_are_tokenized_by_this_method() -> None:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.params import TokenizeParams

    assert parameters(BaseRenderer.tokenize_prompts_async) == ["self", "prompts", "params"]
    for method in (BaseRenderer.render_cmpl_async, BaseRenderer.render_chat_async):
        assert "self.tokenize_prompts_async(" in inspect.getsource(method)
    assert "max_total_tokens" in TokenizeParams.__dataclass_fields__


def _python(folder: Path) -> list[Path]:
    return [
        Path(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if name.endswith(".py")
    ]


def test_19_an_engine_is_started_apart_from_its_front_ends() -> None:
    import vllm.utils.network_utils as network_utils
    import vllm.v1.engine.utils as utils
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.engine.core_client import BackgroundResources, MPClient
    from vllm.v1.utils import RustFrontendProcessManager

    assert parameters(utils.bind_engine_zmq_listeners) == ["vllm_config", "num_api_servers"]
    expected = ["vllm_config", "executor_class", "log_stats", "addresses"]
    assert parameters(utils.launch_core_engines) == expected
    launched = utils.CoreEngineLaunch.__dataclass_fields__
    assert {"engine_manager", "addresses", "watched_frontend_processes"} <= launched.keys()
    assert {"client_addresses", "client_count", "client_index"} <= set(
        parameters(AsyncLLM.from_vllm_config)
    )
    assert {
        "_api_process_count",
        "_api_process_rank",
    } <= AsyncEngineArgs.__dataclass_fields__.keys()
    assert "engine_manager" in BackgroundResources.__dataclass_fields__
    assert callable(MPClient.start_engine_core_monitor)
    assert {"binary_path", "sock", "args", "input_listener", "output_listener"} <= set(
        parameters(RustFrontendProcessManager.__init__)
    )
    # A front end that is started anew: the engine core registers with it by its first message.
    assert {"inputs", "outputs"} <= utils.EngineZmqAddresses.__dataclass_fields__.keys()
    source = inspect.getsource(EngineCoreProc.process_input_sockets)
    assert "for input_address in input_addresses" in source
    assert "input_socket.send(ready_payload)" in source
    assert parameters(network_utils.make_zmq_listener) == ["path", "socket_type"]
    assert network_utils.get_open_zmq_ipc_path().startswith("ipc://")


def test_20_the_scheduler_ends_requests_and_steps_by_these_methods() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    for name in ("update_from_output", "make_stats", "add_request"):
        assert callable(getattr(Scheduler, name))
    assert parameters(Scheduler.finish_requests) == ["self", "request_ids", "finished_status"]
    assert parameters(Scheduler._free_request)[:2] == ["self", "request"]
    source = inspect.getsource(Scheduler)
    assert source.count("self._free_request(") == 2
    assert "self.prefill_stats: PrefillStats | None" in inspect.getsource(Request.__init__)
    assert "Return stats to only one of the front-ends" in source
    assert {"outputs", "scheduler_stats"} <= set(EngineCoreOutputs.__struct_fields__)
    # The first request with a grammar names the compiler of all.
    assert "self.structured_output_manager = structured_output_manager" in source
    source = inspect.getsource(StructuredOutputManager.grammar_init)
    assert "if self.backend is None:" in source
    assert "self.backend = XgrammarBackend(" in source


def test_21_vllm_rs_takes_these_options() -> None:
    import subprocess

    from serve_app.replica import frontends

    if (result := frontends.binary()) is None:
        pytest.skip("vllm-rs is not installed")
    output = subprocess.run([result, "frontend", "--help"], capture_output=True, text=True).stdout
    for option in ("listen-fd", "input-listener-fd", "output-listener-fd", "args-json"):
        assert f"--{option}" in output


def test_22_haproxy_closes_what_a_transaction_holds() -> None:
    """tests/lanes/test_door.py shows it: a client that leaves gives its place back."""
    assert "txn:set_priv(socket)" in (ROOT / "serve_app/launch/ask_door.lua").read_text()


def test_33_an_answer_is_over_by_this_rule() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.utils import check_stop
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    assert parameters(check_stop) == ["request", "max_model_len"]
    params = SamplingParams(max_tokens=3, stop_token_ids=[9])
    names = {name: None for name in inspect.signature(EngineCoreRequest).parameters}
    asked = EngineCoreRequest(
        **names
        | {"request_id": "r", "prompt_token_ids": [1, 2], "sampling_params": params}
        | {"arrival_time": 0.0, "priority": 0, "client_index": 0},
    )
    for tokens, ended in (([5], None), ([5, 9], ("stop", 9)), ([5, 6, 7], ("length", None))):
        request = Request.from_engine_core_request(asked, None)
        request.append_output_token_ids(tokens)
        over = check_stop(request, 100)
        found = (str(request.get_finished_reason()), request.stop_reason) if over else None
        assert found == ended


def test_44_vllm_marks_the_parts_of_a_start() -> None:
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry

    from serve_app.observe.phases import VLLM_SPANS

    source = "".join(path.read_text() for path in Path(vllm.__file__).parent.rglob("*.py"))
    for name in VLLM_SPANS:
        assert f'"{name}"' in source, name
    assert callable(ModelRegistry.inspect_model_cls)


def test_45_vllm_keeps_what_it_measured() -> None:
    from vllm import envs
    from vllm.v1.worker import startup_plan

    assert {"VLLM_CACHE_ROOT", "VLLM_ENABLE_STARTUP_PLAN"} <= envs.environment_variables.keys()
    assert "envs.VLLM_CACHE_ROOT" in inspect.getsource(startup_plan._plan_path)
    # A place alone must not change what is compiled.
    ignored = inspect.getsource(envs.compile_factors)
    assert '"VLLM_CACHE_ROOT"' in ignored
    assert '"VLLM_ENABLE_STARTUP_PLAN"' in ignored


def test_34_statistics_of_an_iteration_are_recorded_so() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

    recorded = parameters(StatLoggerManager.record)
    assert recorded[1:3] == ["scheduler_stats", "iteration_stats"]
    assert "self.logger_manager" in inspect.getsource(AsyncLLM.__init__)
    stats = IterationStats()
    for name in (
        "num_generation_tokens",
        "num_preempted_reqs",
        "time_to_first_tokens_iter",
        "inter_token_latencies_iter",
        "finished_requests",
    ):
        assert hasattr(stats, name)
    assert stats.prompt_token_stats.total == stats.prompt_token_stats.computed == 0
    assert {"finish_reason", "e2e_latency", "prefill_time", "mean_time_per_output_token"} <= (
        FinishedRequestStats.__dataclass_fields__.keys()
    )


def test_46_errors_of_reading_a_request_become_answers_in_two_places() -> None:
    import vllm.entrypoints.anthropic.api_router as anthropic
    from vllm.entrypoints.serve.exception_handling import error_response

    assert parameters(error_response.create_error_response) == [
        "message",
        "err_type",
        "status_code",
        "param",
    ]
    # Once this is 400, replica/unreadable.py can go.
    assert error_response.create_error_response(IndexError("x")).error.code == 500
    for route in (anthropic.create_messages, anthropic.count_tokens):
        assert "create_error_response(e)" in inspect.getsource(route)


def test_47_a_ray_worker_is_a_script_that_reads_its_environment_again() -> None:
    """tests/test_life.py runs one; here is what it would take to see why that fails."""
    from ray._private.runtime_env.py_executable import PyExecutablePlugin
    from ray._private.workers import default_worker
    from ray._raylet import Config

    from serve_app.replica import worker

    assert PyExecutablePlugin.name == "py_executable"
    assert '__name__ == "__main__"' in inspect.getsource(default_worker)
    assert callable(Config.initialize)
    import ray

    assert worker.RAY_ENVIRONMENT["RAY_JOB_ID"] == ray.JobID.nil().hex()

    library = (Path(ray.__file__).parent / "_raylet.so").read_bytes()
    assert b"RAY_JOB_ID" in library
    assert b"RAY_RAYLET_PID" in library


def test_48_a_fork_server_is_started_by_this_function() -> None:
    import multiprocessing.forkserver as module

    source = inspect.getsource(module.ForkServer.ensure_running)  # type: ignore[attr-defined]
    assert "util.spawnv_passfds(exe, args, fds_to_pass)" in source
    assert "fds_to_pass = [listener.fileno(), alive_r]" in source
    assert parameters(module.main)[:3] == ["listener_fd", "alive_r", "preload"]
    assert parameters(module.ForkServer.__init__) == ["self"]  # type: ignore[attr-defined]


def test_49_an_engine_sleeps_and_wakes_by_these_calls() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.abstract import SLEEP_TAGS

    assert parameters(AsyncLLM.sleep)[:2] == ["self", "level"]
    assert parameters(AsyncLLM.wake_up) == ["self", "tags"]
    # It is awake, and schedules again, once each of them is back.
    assert {"weights", "kv_cache"} == SLEEP_TAGS
    assert AsyncEngineArgs.enable_sleep_mode is False


def test_50_the_renderer_is_made_by_a_name_of_this_module() -> None:
    import vllm.v1.engine.async_llm as module

    from serve_app.replica import frontends

    source = inspect.getsource(module.AsyncLLM.__init__)
    assert source.count("renderer_from_config(self.vllm_config)") == 1
    assert parameters(module.renderer_from_config)[:1] == ["config"]
    original = module.renderer_from_config
    with frontends._rendering_with(renderer := object()):  # type: ignore[arg-type]
        assert module.renderer_from_config(None) is renderer
    assert module.renderer_from_config is original


def test_51_a_models_class_is_inspected_in_a_process_of_its_own() -> None:
    import vllm.model_executor.models.registry as module

    source = inspect.getsource(module._LazyRegisteredModel.inspect_model_cls)
    assert source.count("_run_in_subprocess(") == 1
    assert parameters(module._run_in_subprocess) == ["fn"]
    # What it runs before the function; the fork server's processes run it with their imports.
    assert "load_general_plugins()" in inspect.getsource(module._run)


def test_52_serve_run_waits_for_the_proxies_that_this_function_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.serve._private import api

    from serve_app.launch import run

    monkeypatch.setattr(run, "_create", lambda *_: ("controller", ["a proxy is ready"]))
    assert run.create() == ("controller", [])
    assert (
        inspect.getsource(api._create_controller_and_proxy_refs)
        .rstrip()
        .endswith("return controller, proxy_ready_refs")
    )
    source = inspect.getsource(api.serve_start)
    assert "controller, proxy_ready_refs = _create_controller_and_proxy_refs(" in source
    assert "if proxy_ready_refs:" in source


def test_53_weights_are_held_by_a_daemon_and_mapped_by_this_load_format(tmp_path: Path) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.weight_cache import daemon, protocol
    from vllm.v1.worker import gpu_worker

    from serve_app.replica import weightcache

    assert parameters(daemon.WeightCacheDaemon.__init__)[1:6] == [
        "vllm_config",
        "global_rank",
        "local_rank",
        "distributed_init_method",
        "socket_dir",
    ]
    # vLLM's own launcher does the same, with a warm-up in between.
    run = inspect.getsource(daemon._run_daemon)
    assert run.index("daemon.load_model()") < run.index("daemon.serve_forever(")
    assert 'cmd == "get_memory"' in inspect.getsource(daemon.WeightCacheDaemon._handle_connection)
    names = {Path(protocol.get_socket_path(gpu, "/folder")).name for gpu in ("GPU-1", "MIG-GPU-12")}
    assert {len(name) for name in names} == {len(weightcache.SOCKET_NAME)}
    assert all(name.endswith(".sock") for name in names)
    assert len(names) == 2
    loader = get_model_loader(LoadConfig(**weightcache.load_arguments(tmp_path)))
    assert (loader.socket_dir, loader.fallback, loader.mode) == (str(tmp_path), True, "zero_copy")
    # What the engine may take of the GPU's memory is less by what the daemon has.
    assert ".get_external_weight_memory(self.vllm_config)" in inspect.getsource(gpu_worker)
    with pytest.raises(protocol.UnsupportedPlatformForIPCError):
        protocol.check_ipc_platform_support()


def test_54_a_process_forgets_the_tracker_of_its_parent() -> None:
    from multiprocessing import resource_tracker

    tracker = type(resource_tracker._resource_tracker)()
    tracker._fd, tracker._pid = 7, 8  # type: ignore[attr-defined]
    tracker.__init__()  # type: ignore[misc]
    assert (tracker._fd, tracker._pid) == (None, None)  # type: ignore[attr-defined]
    assert resource_tracker.register.__self__ is resource_tracker._resource_tracker  # type: ignore[attr-defined]
