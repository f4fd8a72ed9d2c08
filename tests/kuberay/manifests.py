# ruff: noqa: E501 - a mutation a line.
"""RayServices made by mutation: harmless changes, and changes that break, each with its truth.

The truth of a broken one is read from the source of the operator (KubeRay 1.7.0, `validation.go`
and `service.go`) and of Ray Serve 2.60 (`schema.py`, `config.py`), not from the lint.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from tests.kuberay.planted_service import SOUND

# Where PyYAML was built with libyaml these are ten times as fast.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
Manifest = dict[str, Any]
Change = Callable[[Manifest], None]


@dataclass(frozen=True)
class Mutation:
    """A change. `rule` finds it as an error; empty where it is harmless."""

    name: str
    change: Change
    rule: str = ""


class DoesNotApply(Exception):
    """What a mutation changes is not there, after another one."""


# --- places ----------------------------------------------------------------------------------


def cluster(m: Manifest) -> Manifest:
    result: Manifest = m["spec"]["rayClusterConfig"]
    return result


def head(m: Manifest) -> Manifest:
    result: Manifest = cluster(m)["headGroupSpec"]
    return result


def worker(m: Manifest) -> Manifest:
    result: Manifest = cluster(m)["workerGroupSpecs"][0]
    return result


def container(group: Manifest) -> Manifest:
    result: Manifest = group["template"]["spec"]["containers"][0]
    return result


def annotate(m: Manifest, **values: str) -> None:
    annotations = m["metadata"].setdefault("annotations", {})
    annotations.update({f"ray.io/{key.replace('_', '-')}": text for key, text in values.items()})


def variable(group: Manifest, name: str, value: str = "x") -> None:
    container(group).setdefault("env", []).append({"name": name, "value": value})


def serve(m: Manifest, change: Callable[[Manifest], None]) -> None:
    """Change what is in the text of serveConfigV2."""
    config = yaml.load(m["spec"]["serveConfigV2"], _LOADER)
    change(config)
    m["spec"]["serveConfigV2"] = yaml.dump(config, Dumper=_DUMPER, sort_keys=False)


def deployment(m: Manifest, place: int, **values: Any) -> None:
    """Set keys of a deployment; None takes one away."""

    def change(config: Manifest) -> None:
        deployments = config["applications"][0].get("deployments")
        if deployments is None:
            raise DoesNotApply
        result = deployments[place]
        for key, value in values.items():
            if value is None:
                result.pop(key, None)
            else:
                result[key] = value

    serve(m, change)


def application(m: Manifest, **values: Any) -> None:
    serve(m, lambda config: config["applications"][0].update(values))


def top(m: Manifest, **values: Any) -> None:
    serve(m, lambda config: config.update(values))


def incremental(m: Manifest, **options: Any) -> None:
    given = {"gatewayClassName": "x", "stepSizePercent": 10, "intervalSeconds": 10, **options}
    remaining = {key: value for key, value in given.items() if value is not None}
    m["spec"]["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": remaining,
    }  # fmt: skip


def no_tolerance(m: Manifest) -> None:
    cluster(m).pop("gcsFaultToleranceOptions", None)


def no_autoscaler(m: Manifest) -> None:
    cluster(m).pop("enableInTreeAutoscaling", None)
    cluster(m).pop("autoscalerOptions", None)


def llm(
    m: Manifest,
    builder: str = "build_openai_app",
    key: str = "",
    more: Manifest | None = None,
    **engine: int,
) -> None:
    """Serve a model of ray.serve.llm instead; `key` is where the builder takes one alone."""
    config: Manifest = {
        "model_loading_config": {"model_id": "q"},
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
        "engine_kwargs": engine,
        **(more or {}),
    }
    args = {key: config} if key else {"llm_configs": [config]}
    application = {"name": "llms", "import_path": f"ray.serve.llm:{builder}", "args": args}
    m["spec"]["serveConfigV2"] = yaml.dump({"applications": [application]}, Dumper=_DUMPER)


def pod(group: Manifest) -> Manifest:
    result: Manifest = group["template"]["spec"]
    return result


def limits(group: Manifest, **values: Any) -> None:
    """Set limits of the first container; `nvidia_gpu` is nvidia.com/gpu."""
    names = {
        "nvidia_gpu": "nvidia.com/gpu",
        "mig": "nvidia.com/mig-1g.10gb",
        "tpu": "google.com/tpu",
    }
    given = {names.get(key, key): value for key, value in values.items()}
    container(group)["resources"]["limits"] = {"memory": "8Gi", **given}


def balancer(m: Manifest, **annotations: str) -> None:
    prefix = "service.beta.kubernetes.io/aws-load-balancer-"
    m["spec"]["serveService"] = {
        "metadata": {"annotations": {prefix + key: text for key, text in annotations.items()}},
        "spec": {"type": "LoadBalancer", "ports": [{"name": "serve", "port": 8000}]},
    }


# --- harmless ----------------------------------------------------------------------------------

HARMLESS = [
    Mutation("nothing", lambda m: None),
    Mutation("a head without ports", lambda m: container(head(m)).pop("ports", None)),
    Mutation("a port named serve-http", lambda m: container(head(m)).update(
        ports=[{"name": "serve-http", "containerPort": 8000}])),
    Mutation("another port, on both sides", lambda m: (
        top(m, http_options={"port": 9000}),
        container(head(m)).update(ports=[{"name": "serve", "containerPort": 9000}]),
        container(worker(m)).update(ports=[{"name": "serve", "containerPort": 9000}]))),
    Mutation("an initializing timeout in minutes", lambda m: annotate(m, initializing_timeout="30m")),
    Mutation("an initializing timeout of 1h30m", lambda m: annotate(m, initializing_timeout="1h30m")),
    Mutation("an initializing timeout in seconds", lambda m: annotate(m, initializing_timeout="300")),
    Mutation("the longest name", lambda m: m["metadata"].update(name="a" * 47)),
    Mutation("the former way to fault tolerance", lambda m: (
        no_tolerance(m), annotate(m, ft_enabled="true"), variable(head(m), "RAY_REDIS_ADDRESS"))),
    Mutation("no fault tolerance, and Redis' password", lambda m: (
        no_tolerance(m), head(m)["rayStartParams"].update({"redis-password": "$REDIS"}))),
    Mutation("idle seconds of a group with v2", lambda m: worker(m).update(idleTimeoutSeconds=60)),
    Mutation("priority with v2", lambda m: worker(m).update(priority=5)),
    Mutation("labels of a group", lambda m: worker(m).update(labels={"example.com/zone": "a_b.c"})),
    Mutation("an empty label", lambda m: worker(m).update(labels={"zone": ""})),
    Mutation("resources of a group alone", lambda m: (
        head(m).update(rayStartParams={}, resources={"CPU": "0"}))),
    Mutation("restartPolicy Never", lambda m: worker(m)["template"]["spec"].update(
        restartPolicy="Never")),
    Mutation("a suspended group without the autoscaler", lambda m: (
        no_autoscaler(m), deployment(m, 1, autoscaling_config=None, num_replicas=1),
        cluster(m)["workerGroupSpecs"].append(
            {**copy.deepcopy(worker(m)), "groupName": "more", "suspend": True}))),
    Mutation("an incremental upgrade", incremental),
    Mutation("its surge as small as its step", lambda m: incremental(m, maxSurgePercent=10)),
    Mutation("deletion at once", lambda m: m["spec"].update(rayClusterDeletionDelaySeconds=0)),
    Mutation("min equal to max", lambda m: worker(m).update(minReplicas=2, maxReplicas=2)),
    Mutation("several routes", lambda m: serve(m, lambda c: c["applications"].append(
        {"name": "b", "import_path": "b:app", "route_prefix": "/b"}))),
    Mutation("applications without a route", lambda m: serve(m, lambda c: c["applications"].extend(
        [{"name": n, "import_path": "b:app", "route_prefix": None} for n in "xy"]))),
    Mutation("num_replicas auto beside autoscaling_config", lambda m: deployment(
        m, 1, num_replicas="auto")),
    Mutation("initial replicas between", lambda m: deployment(
        m, 1, autoscaling_config={"min_replicas": 0, "initial_replicas": 1, "max_replicas": 2})),
    Mutation("numbers as text", lambda m: (
        deployment(m, 0, max_ongoing_requests="8"), deployment(m, 1, ray_actor_options={"num_gpus": "1"}))),
    Mutation("a level of logs in lower case", lambda m: top(m, logging_config={"log_level": "info"})),
    Mutation("a key of a newer Ray", lambda m: deployment(m, 0, brand_new_and_unlike=1)),
    Mutation("user_config of any keys", lambda m: deployment(m, 0, user_config={"someKey": {"aB": 1}})),
    Mutation("a placement group", lambda m: deployment(
        m, 1, placement_group_bundles=[{"GPU": 1}, {"GPU": 1}],
        autoscaling_config={"min_replicas": 1, "max_replicas": 1})),
    Mutation("replicas of several nodes, by ray.serve.llm", lambda m: llm(m, tensor_parallel_size=1)),
    Mutation("proxies everywhere", lambda m: top(m, proxy_location="EveryNode")),
    Mutation("the head alone serves, and is in the service", lambda m: top(
        m, proxy_location="HeadOnly")),
    Mutation("the head left out, and proxies everywhere", lambda m: m["spec"].update(
        excludeHeadPodFromServeSvc=True)),
    Mutation("dashboard for all", lambda m: head(m)["rayStartParams"].update(
        {"dashboard-host": "0.0.0.0"})),
    Mutation("an internal balancer", lambda m: balancer(m, internal="true")),
    Mutation("a slice of a GPU", lambda m: limits(worker(m), cpu=4, mig=1)),
    Mutation("GPUs by the group's resources", lambda m: (
        limits(worker(m), cpu=4), worker(m).update(resources={"nvidia.com/gpu": "1"}))),
    Mutation("GPUs by NVIDIA's runtime", lambda m: (
        limits(worker(m), cpu=4), pod(worker(m)).update(runtimeClassName="nvidia"))),
    Mutation("half a core, which the operator rounds up", lambda m: (
        limits(worker(m), cpu="500m", nvidia_gpu=1), limits(head(m), cpu="500m"),
        deployment(m, 0, ray_actor_options={"num_cpus": 1}))),
    Mutation("a model on TPUs", lambda m: (
        limits(worker(m), cpu=4, tpu=4), llm(m, more={"accelerator_type": "TPU-V6E"}))),
    Mutation("a model on cores", lambda m: (
        limits(worker(m), cpu=4), llm(m, more={"accelerator_config": {"kind": "cpu"}}))),
    Mutation("a model with its own placement", lambda m: llm(
        m, tensor_parallel_size=4, more={"placement_group_config": {"bundle_per_worker": {"GPU": 0.25}}})),
    Mutation("a model in a file", lambda m: (limits(worker(m), cpu=4), application(
        m, import_path="ray.serve.llm:build_openai_app", args={"llm_configs": ["./m.yaml"]}),
        serve(m, lambda c: c["applications"][0].pop("deployments")))),
    Mutation("seconds that nobody reads", lambda m: m["spec"].update(
        serviceUnhealthySecondThreshold=900, deploymentUnhealthySecondThreshold=300)),
    Mutation("options of another upgrade", lambda m: m["spec"].update(upgradeStrategy={
        "type": "NewCluster", "clusterUpgradeOptions": {"gatewayClassName": "x"}})),
    Mutation("another rayVersion than the image's", lambda m: cluster(m).update(rayVersion="2.59.0")),
    Mutation("a drain longer than the grace period", lambda m: deployment(
        m, 1, graceful_shutdown_timeout_s=600)),
    Mutation("a variable of Serve that comes too late", lambda m: application(
        m, runtime_env={"env_vars": {"RAY_SERVE_LOG_TO_STDERR": "1"}})),
    Mutation("a variable of Serve on the head", lambda m: variable(
        head(m), "RAY_SERVE_LOG_TO_STDERR", "1")),
    Mutation("metrics elsewhere", lambda m: head(m)["rayStartParams"].update(
        {"metrics-export-port": "9090"})),
    Mutation("an older vLLM's image, which has wget", lambda m: [
        container(each).update(image="vllm/vllm-openai:v0.8.5") for each in (head(m), worker(m))]),
    Mutation("GPUs of another vendor", lambda m: container(worker(m))["resources"].update(
        limits={"cpu": 4, "amd.com/gpu": 1})),
    Mutation("a selector", lambda m: worker(m)["template"]["spec"].update(
        nodeSelector={"pool": "gpus"})),
    Mutation("vLLM's image on the head", lambda m: [
        container(each).update(image="vllm/vllm-openai:v0.32.0", readinessProbe={"tcpSocket": {"port": 8000}},
                               livenessProbe={"tcpSocket": {"port": 8000}})
        for each in (head(m), worker(m))]),
]  # fmt: skip

# --- broken --------------------------------------------------------------------------------------


def _refused(name: str, change: Change) -> Mutation:
    return Mutation(name, change, "refused")


def _bad_bounds(name: str, place: int = 1, **values: Any) -> Mutation:
    return Mutation(name, lambda m: deployment(m, place, **values), "replica-bounds")


def _bad_value(name: str, change: Change) -> Mutation:
    return Mutation(name, change, "serve-value")


def _typo(name: str, change: Change) -> Mutation:
    return Mutation(name, change, "unknown-key")


BROKEN = [
    _refused("a name with a dot", lambda m: m["metadata"].update(name="a.b")),
    _refused("a name that begins with a digit", lambda m: m["metadata"].update(name="1a")),
    _refused("an initializing timeout in words", lambda m: annotate(m, initializing_timeout="soon")),
    _refused("an initializing timeout of nothing", lambda m: annotate(m, initializing_timeout="0")),
    _refused("a negative initializing timeout", lambda m: annotate(m, initializing_timeout="-5m")),
    _refused("no container", lambda m: worker(m)["template"]["spec"].update(containers=[])),
    _refused("min above max", lambda m: worker(m).update(minReplicas=3)),
    _refused("a negative minimum", lambda m: worker(m).update(minReplicas=-1)),
    _refused("resources twice", lambda m: head(m).update(resources={"CPU": "1"})),
    _refused("labels in rayStartParams", lambda m: worker(m)["rayStartParams"].update(labels="a=b")),
    _refused("a label that is none", lambda m: worker(m).update(labels={"a": "b c"})),
    _refused("a label's key that is none", lambda m: worker(m).update(labels={"-a": "b"})),
    _refused("idle seconds without v2", lambda m: (
        cluster(m).update(autoscalerOptions={"version": "v1"}), worker(m).update(idleTimeoutSeconds=9))),
    _refused("negative idle seconds", lambda m: worker(m).update(idleTimeoutSeconds=-1)),
    _refused("negative idle seconds of all", lambda m: cluster(m)["autoscalerOptions"].update(
        idleTimeoutSeconds=-1)),
    _refused("priority without v2", lambda m: (
        cluster(m).update(autoscalerOptions={"version": "v1"}), worker(m).update(priority=1))),
    _refused("priority with an old Ray", lambda m: (
        cluster(m).update(rayVersion="2.55.1"), worker(m).update(priority=1),
        [container(each).update(image="x") for each in (head(m), worker(m))])),
    _refused("the annotation beside the options", lambda m: annotate(m, ft_enabled="false")),
    _refused("another namespace twice", lambda m: annotate(m, external_storage_namespace="x")),
    _refused("RAY_REDIS_ADDRESS alone", lambda m: (
        no_tolerance(m), variable(head(m), "RAY_REDIS_ADDRESS"))),
    _refused("RAY_REDIS_ADDRESS twice", lambda m: variable(head(m), "RAY_REDIS_ADDRESS")),
    _refused("REDIS_PASSWORD twice", lambda m: container(head(m))["env"].append(
        {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}})),
    _refused("redis-password twice", lambda m: head(m)["rayStartParams"].update(
        {"redis-password": "$X"})),
    _refused("REDIS_USERNAME", lambda m: variable(head(m), "REDIS_USERNAME")),
    _refused("redis-username", lambda m: head(m)["rayStartParams"].update({"redis-username": "x"})),
    _refused("storage of Redis", lambda m: cluster(m)["gcsFaultToleranceOptions"].update(
        storage={"size": "1Gi"})),
    Mutation("RocksDB", lambda m: cluster(m).update(
        gcsFaultToleranceOptions={"backend": "rocksdb"}), "feature-gate"),
    Mutation("a network policy", lambda m: cluster(m).update(networkPolicy={"mode": "DenyAll"}),
             "feature-gate"),
    Mutation("TLS", lambda m: cluster(m).update(tlsOptions={"enabled": True}), "feature-gate"),
    Mutation("a history server", lambda m: cluster(m).update(historyServerOptions={}), "feature-gate"),
    _refused("v2 by its variable without an autoscaler", lambda m: (
        no_autoscaler(m), variable(head(m), "RAY_enable_autoscaler_v2", "1"))),
    _refused("v2 twice", lambda m: variable(head(m), "RAY_enable_autoscaler_v2", "1")),
    _refused("restarts with v2", lambda m: head(m)["template"]["spec"].update(
        restartPolicy="OnFailure")),
    _refused("a suspended group with the autoscaler", lambda m: worker(m).update(suspend=True)),
    _refused("the operator's own variable", lambda m: cluster(m)["autoscalerOptions"].update(
        env=[{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD", "value": "x"}])),
    _refused("tokens without a version", lambda m: cluster(m).pop("rayVersion")),
    _refused("tokens with an old Ray", lambda m: (
        cluster(m).update(rayVersion="2.51.1"),
        [container(each).update(image="x") for each in (head(m), worker(m))])),
    _refused("tokens of Kubernetes", lambda m: cluster(m)["authOptions"].update(
        enableK8sTokenAuth=True)),
    _refused("a name of the head's service", lambda m: head(m).update(
        headService={"metadata": {"name": "x"}})),
    _refused("a negative delay", lambda m: m["spec"].update(rayClusterDeletionDelaySeconds=-1)),
    _refused("an upgrade strategy of the cluster", lambda m: cluster(m).update(
        upgradeStrategy={"type": "Recreate"})),
    Mutation("an unknown strategy", lambda m: m["spec"].update(
        upgradeStrategy={"type": "BlueGreen"}), "upgrade-type"),
    Mutation("incremental without a gateway", lambda m: incremental(m, gatewayClassName=None),
             "upgrade-options"),
    Mutation("incremental, step above surge", lambda m: incremental(
        m, stepSizePercent=50, maxSurgePercent=20), "upgrade-options"),
    Mutation("incremental, surge above 100", lambda m: incremental(m, maxSurgePercent=150),
             "upgrade-options"),
    Mutation("incremental, no interval", lambda m: incremental(m, intervalSeconds=0),
             "upgrade-options"),
    Mutation("incremental without an autoscaler", lambda m: (no_autoscaler(m), incremental(m)),
             "upgrade-options"),
    # What Ray Serve refuses, and what never serves.
    Mutation("a mapping", lambda m: m["spec"].update(
        serveConfigV2=yaml.load(m["spec"]["serveConfigV2"], _LOADER)), "serve-config"),
    Mutation("no application", lambda m: m["spec"].update(serveConfigV2="applications: []\n"),
             "serve-config"),
    Mutation("two of one name", lambda m: serve(m, lambda c: c["applications"].append(
        {"name": "fruit_app", "import_path": "b:app", "route_prefix": "/b"})), "serve-config"),
    Mutation("an import path of one word", lambda m: application(m, import_path="fruit"), "serve-config"),
    Mutation("an import path that ends", lambda m: application(m, import_path="fruit:"), "serve-config"),
    Mutation("a route without its slash", lambda m: application(m, route_prefix="fruit"), "serve-config"),
    Mutation("a port in an application", lambda m: application(m, port=9000), "serve-config"),
    _typo("numReplicas", lambda m: deployment(m, 0, num_replicas=None, numReplicas=2)),
    _typo("rayActorOptions", lambda m: deployment(m, 0, rayActorOptions={"numCpus": 1})),
    _typo("numGpus", lambda m: deployment(m, 1, ray_actor_options={"numGpus": 1})),
    _typo("maxReplicas", lambda m: deployment(m, 1, autoscaling_config={"maxReplicas": 2})),
    _typo("routePrefix", lambda m: application(m, routePrefix="/x")),
    _typo("importPath", lambda m: application(m, importPath="x:y")),
    _typo("proxyLocation", lambda m: top(m, proxyLocation="EveryNode")),
    _typo("httpOptions", lambda m: top(m, httpOptions={"port": 8000})),
    _typo("a slip of the pen", lambda m: deployment(m, 0, num_replica=2)),
    _typo("num_gpus beside ray_actor_options", lambda m: deployment(
        m, 1, ray_actor_options=None, num_gpus=1)),
    _typo("min_replicas in the deployment", lambda m: deployment(m, 0, min_replicas=1)),
    _typo("max_ongoing_requests in autoscaling_config", lambda m: deployment(
        m, 1, autoscaling_config={"max_replicas": 2, "max_ongoing_requests": 8})),
    _typo("a port of all in an application", lambda m: application(m, keep_alive_timeout_s=5)),
    _typo("an unknown key of logging_config", lambda m: top(m, logging_config={"colour": "red"})),
    _bad_value("no request at a time", lambda m: deployment(m, 0, max_ongoing_requests=0)),
    _bad_value("less than no core", lambda m: deployment(m, 0, ray_actor_options={"num_cpus": -1})),
    _bad_value("a duration in words", lambda m: deployment(m, 0, health_check_timeout_s="30s")),
    _bad_value("no load at all", lambda m: deployment(
        m, 1, autoscaling_config={"target_ongoing_requests": 0, "max_replicas": 2})),
    _bad_value("user_config as text", lambda m: deployment(m, 0, user_config="price: 3")),
    _bad_value("arguments as a list", lambda m: application(m, args=["a"])),
    _bad_value("a folder of this machine", lambda m: application(
        m, runtime_env={"working_dir": "./app"})),
    _bad_value("an unknown place of proxies", lambda m: top(m, proxy_location="Everywhere")),
    _bad_value("an unknown level of logs", lambda m: top(m, logging_config={"log_level": "LOUD"})),
    _bad_value("a deployment without a name", lambda m: deployment(m, 0, name=None)),
    _bad_bounds("no replica", place=0, num_replicas=0),
    _bad_bounds("num_replicas beside autoscaling_config", num_replicas=2),
    _bad_bounds("min above max", autoscaling_config={"min_replicas": 3, "max_replicas": 2}),
    _bad_bounds("no replica at most", autoscaling_config={"min_replicas": 0, "max_replicas": 0}),
    _bad_bounds("initial above max", autoscaling_config={"initial_replicas": 3, "max_replicas": 2}),
    _bad_bounds("a queue of nothing", place=0, max_queued_requests=0),
    _bad_bounds("a number in words", place=0, num_replicas="two"),
    Mutation("GPUs that no worker has", lambda m: container(worker(m))["resources"].update(
        limits={"cpu": 4, "memory": "8Gi"}), "too-few-gpus"),
    Mutation("a replica larger than a worker", lambda m: deployment(
        m, 1, ray_actor_options={"num_gpus": 2}), "too-few-gpus"),
    Mutation("TP times DP above all GPUs", lambda m: llm(
        m, tensor_parallel_size=2, data_parallel_size=2), "too-few-gpus"),
    Mutation("PP above all GPUs", lambda m: llm(m, pipeline_parallel_size=4), "too-few-gpus"),
    Mutation("TP of one model above all GPUs", lambda m: llm(
        m, "build_dp_openai_app", "llm_config", tensor_parallel_size=4), "too-few-gpus"),
    Mutation("prefill and decode, each above all GPUs", lambda m: llm(
        m, "build_pd_openai_app", "decode_config", tensor_parallel_size=4), "too-few-gpus"),
    Mutation("bundles above all GPUs", lambda m: llm(
        m, more={"placement_group_config": {"bundles": [{"GPU": 1}] * 4}}), "too-few-gpus"),
    Mutation("two deployments that fit only alone", lambda m: (
        deployment(m, 0, ray_actor_options={"num_gpus": 1}, max_replicas_per_node=None),
        deployment(m, 1, autoscaling_config={"min_replicas": 1, "max_replicas": 2})), "too-few-gpus"),
    Mutation("a slice too few", lambda m: (
        limits(worker(m), cpu=4, mig=1), deployment(m, 1, ray_actor_options={"num_gpus": 3})),
        "too-few-gpus"),
    Mutation("a worker of another Ray than the head", lambda m: container(worker(m)).update(
        image="rayproject/ray:2.59.0"), "version-differs"),
    Mutation("cores that no pod has", lambda m: deployment(
        m, 0, ray_actor_options={"num_cpus": 64}), "too-few-cpus"),
    Mutation("the head alone, and left out", lambda m: (
        top(m, proxy_location="HeadOnly"), m["spec"].update(excludeHeadPodFromServeSvc=True)),
        "no-endpoint"),
    Mutation("no proxy", lambda m: top(m, proxy_location="Disabled"), "no-endpoint"),
    Mutation("a dashboard for the head alone", lambda m: head(m)["rayStartParams"].update(
        {"dashboard-host": "127.0.0.1"}), "dashboard-host"),
    Mutation("a dashboard for localhost", lambda m: head(m)["rayStartParams"].update(
        {"dashboard-host": "localhost"}), "dashboard-host"),
    Mutation("Serve for localhost", lambda m: top(m, http_options={"host": "localhost"}), "serve-host"),
    Mutation("ports without one for requests", lambda m: container(head(m)).update(
        ports=[{"name": "dashboard", "containerPort": 8265}]), "serve-port"),
    Mutation("another port than Serve's", lambda m: top(m, http_options={"port": 9000}), "serve-port"),
    Mutation("our tainted nodes without a toleration", lambda m: (
        worker(m)["template"]["spec"].pop("tolerations", None),
        worker(m)["template"]["spec"].update(nodeSelector={"qwen-ray-serve/workers": "one-gpu"})),
        "gpu-toleration"),
]  # fmt: skip


# Beside another change these may break, or mend: they are not paired.
_ALONE = (
    "the former way to fault tolerance",
    "no fault tolerance, and Redis' password",
    "another port, on both sides",
    "initial replicas between",
    "a placement group",
    "resources of a group alone",
    "an internal balancer",
    "a suspended group without the autoscaler",
    # Whether these are sound depends on the GPUs of the others.
    "a model on TPUs",
    "a model on cores",
    "a model in a file",
    "GPUs by NVIDIA's runtime",
    "another rayVersion than the image's",
)


def sound() -> Manifest:
    result: Manifest = yaml.load(SOUND, Loader=_LOADER)
    return result


def made(*mutations: Mutation) -> str:
    """The sound manifest with these changes, as text."""
    manifest = sound()
    for mutation in mutations:
        mutation.change(manifest)
    return yaml.dump(manifest, Dumper=_DUMPER, sort_keys=False)


def pairs(seed: int, count: int) -> list[tuple[Mutation, Mutation]]:
    """Harmless changes beside each other and beside broken ones, by chance."""
    chance = random.Random(seed)
    harmless = [each for each in HARMLESS if each.name not in _ALONE]
    collected = []
    while len(collected) < count:
        first, other = chance.choice(harmless), chance.choice([*harmless, *BROKEN])
        if first is other:
            continue
        try:
            made(first, other)
        except (DoesNotApply, KeyError, IndexError):
            continue
        collected.append((first, other))
    return collected
