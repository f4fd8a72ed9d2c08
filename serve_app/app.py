"""The Ray Serve application: `build` chooses its deployments.

Without a gateway, a request reaches a replica's own HTTP server, from HAProxy (or, in classic mode,
through Serve's proxy), and goes through one stack, outermost first:

    Meter           measures what the client sees     meter.py
    front           CORS, normalised requests         front.py, cors.py, anthropic.py
    KeyGate         checks the API key                keys.py
    LimitGate       bounds a single request           limits.py
    AdmissionGate   admits, queues or refuses         admission.py
    RefusalGate     vLLM's refusals keep their status refusal.py
    vLLM's app      answers                           engine.py

With a gateway (`gateway.enabled`), the gateway runs everything down to LimitGate. Between it and
the rest is the Relay (relay.py), which continues an answer on another replica when one fails.
"""

import os
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve_app.errors import ConfigError
from serve_app.launch import launcher, template
from serve_app.planning.plan import Plan, decide
from serve_app.progress import reported, say
from serve_app.replica.deployment import GatewayReplica, Replica
from serve_app.settings import Settings


def build(args: dict[str, Any]) -> Application:
    """The application that serve_config.yaml describes; Ray Serve calls this with its `args`."""
    with reported("the configuration"):
        settings = Settings.parse(args)
        models = [(each, decide(each)) for each in settings.of_each_model()]
        _check_names([plan.served_model_name for _, plan in models])
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":
        say(
            "warning: classic mode: every token passes through Ray Serve's Python proxy, which "
            "keeps about half of the engine's throughput; start with `make serve`, or set "
            "RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1 before Ray starts"
        )
    elif (problem := launcher.unmet(settings, os.environ)) is not None:
        say(f"warning: {problem}")
    if settings.gateway.enabled:
        return _behind_gateway(settings, models)
    (_, plan) = models[0]
    engine = serve.deployment(serve.ingress()(Replica), name="engine")
    return engine.options(**_options(settings, plan)).bind(settings, plan)


def _options(settings: Settings, plan: Plan) -> dict[str, Any]:
    """Options of a deployment of engines."""
    options = plan.deployment_options(settings)
    beside = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    if env := template.runtime_env(settings, plan, beside):
        options["ray_actor_options"]["runtime_env"] = env
    return options


def _behind_gateway(settings: Settings, models: list[tuple[Settings, Plan]]) -> Application:
    # Imported here: most applications have none, and it takes as long as the rest of this module.
    from serve_app.gateway.deployment import Gateway

    engines = {}
    for place, (each, plan) in enumerate(models):
        name = "engine" if len(models) == 1 else f"engine-{place}"
        watch = RequestRouterConfig(
            request_router_class="serve_app.gateway.fleet:ReplicaWatch",
            request_router_kwargs={"deployment": name},
        )
        engine = serve.deployment(GatewayReplica, name=name).options(
            **_options(each, plan), request_router_config=watch
        )
        engines[plan.served_model_name] = engine.bind(each, plan)
    gateway = serve.deployment(serve.ingress()(Gateway), name="gateway").options(
        num_replicas=settings.gateway.replicas,
        max_ongoing_requests=100_000,
        max_queued_requests=-1,
        # The new ones first: with one gateway there would be none for as long as its start takes.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=Plan.shutdown_s(settings),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        ray_actor_options={"num_cpus": settings.gateway.cpus},
    )
    return gateway.bind(settings, engines)


def _check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                "models", name, "is the name of more than one model; set served_model_name"
            )
