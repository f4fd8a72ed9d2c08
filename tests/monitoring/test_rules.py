"""Each alert fires when it should, is silent when it should be, and asks for metrics that exist."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from serve_app.monitoring import dashboards
from serve_app.monitoring.rows import ROWS
from serve_app.observe import metrics

HERE = Path(dashboards.__file__).parent
TESTS = Path(__file__).with_name("alerts_test.yaml")

# What others report: vLLM (its colon is an underscore in Ray), Ray, Ray Serve, HAProxy, Prometheus.
_THEIRS = """
ray_vllm_generation_tokens_total
ray_vllm_inter_token_latency_seconds_bucket
ray_vllm_iteration_tokens_total_count
ray_vllm_iteration_tokens_total_sum
ray_vllm_kv_cache_usage_perc
ray_vllm_num_preemptions_total
ray_vllm_num_requests_running
ray_vllm_num_requests_waiting
ray_vllm_prefix_cache_hits_total
ray_vllm_prefix_cache_queries_total
ray_vllm_prompt_tokens_total
ray_vllm_request_decode_time_seconds_count
ray_vllm_request_decode_time_seconds_sum
ray_vllm_request_generation_tokens_count
ray_vllm_request_generation_tokens_sum
ray_vllm_request_prefill_time_seconds_count
ray_vllm_request_prefill_time_seconds_sum
ray_vllm_request_prompt_tokens_count
ray_vllm_request_prompt_tokens_sum
ray_vllm_request_queue_time_seconds_count
ray_vllm_request_queue_time_seconds_sum
ray_vllm_request_success_total
ray_vllm_time_to_first_token_seconds_bucket

ray_component_rss_bytes
ray_gcs_actors_count
ray_io_context_event_loop_lag_ms
ray_node_cpu_utilization
ray_node_gpu_power_milliwatts
ray_node_gpus_utilization
ray_node_gram_available
ray_node_gram_used
ray_node_mem_total
ray_node_mem_used
ray_resources

ray_serve_autoscaling_target_replicas
ray_serve_controller_control_loop_duration_s
ray_serve_controller_num_control_loops
ray_serve_deployment_replica_healthy
ray_serve_deployment_replica_starts_total
ray_serve_deployment_status

haproxy_backend_active_servers
haproxy_frontend_http_responses_total

ALERTS
up
"""
THEIRS = frozenset(_THEIRS.split())
# Labels that every series of ours has besides its own: of export.py and of Ray.
COMMON = frozenset({"deployment", "replica", "SessionName", "WorkerId", "NodeAddress"})
_WORDS = frozenset({"and", "or", "unless", "bool", "offset"})


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression asks for."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    words = re.findall(r"(?<![\w:.])([a-zA-Z_][\w:]*)(?!\s*\()(?![\w:])", bare)
    return {word for word in words if word not in _WORDS}


def matchers_in(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Metrics, and the labels by which each is chosen."""
    for name, inside in re.findall(r"([a-zA-Z_][\w:]*)\{([^}]*)\}", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))


def ours() -> dict[str, set[str]]:
    """The metrics of serve_app/observe/metrics.py as Prometheus has them, and their labels."""
    collected: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase | metrics.Gaps):
            (family,) = metric.collect()
            labels = set(getattr(metric, "_labelnames", ("model",)))
            if isinstance(metric, Counter):
                endings: tuple[str, ...] = ("_total",)
            elif isinstance(metric, Histogram | metrics.Gaps):
                endings = ("_bucket", "_sum", "_count")
            else:
                endings = ("",)
            for ending in endings:
                more = {"le"} if ending == "_bucket" else set()
                collected[f"ray_{family.name}{ending}"] = labels | more | COMMON
    for name in metrics.SCALING:
        collected[f"ray_{metrics.SCALING_PREFIX}{name}"] = {"application", *COMMON}
    return collected


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((HERE / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded() -> dict[str, str]:
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression of rules and dashboard, with where it is."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for row in ROWS:
        for panel in row.panels:
            for expression in panel.queries.values():
                yield f"panel {panel.id}", expression


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool comes with Debian's prometheus")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- what Prometheus makes of them ---


def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", str(HERE / "rules.yaml"))


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", str(TESTS))


def test_prometheus_takes_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    shown = [
        expression.replace("$__rate_interval", "1m").replace("$model", ".*")
        for where, expression in expressions()
        if where.startswith("panel")
    ]
    assert not any("$" in expression for expression in shown)
    written = [{"record": f"panel:{i}", "expr": each} for i, each in enumerate(shown)]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": written}]}))
    promtool("check", "rules", str(path))


def reads(alert: Mapping[str, Any]) -> set[str]:
    """The metrics that an alert depends on, through what is recorded."""
    names, expected = names_in(alert["expr"]), recorded()
    while inner := names & expected.keys():
        names = (names - inner).union(*(names_in(expected[name]) for name in inner))
    return names


@pytest.mark.parametrize("name", alerts())
def test_each_alert_is_tested_with_series_for_it_and_against_it(name: str) -> None:
    fires, silent = False, False
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        given = {re.split(r"[{\s]", series["series"])[0] for series in test["input_series"]}
        for case in test.get("alert_rule_test", ()):
            if case["alertname"] == name:
                fires |= bool(case["exp_alerts"])
                # Silence means something only where there is what the alert looks at.
                silent |= not case["exp_alerts"] and bool(given & reads(alerts()[name]))
    assert (fires, silent) == (True, True)


# --- what people make of them ---


@pytest.mark.parametrize("name", alerts())
def test_each_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "runbook"}
    path, _, anchor = rule["annotations"]["runbook"].partition("#")
    text = (HERE.parents[1] / path).read_text()
    # As GitHub makes anchors of headings.
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
    assert name in headings


def test_runbooks_name_alerts_and_panels_that_there_are() -> None:
    text = (HERE / "runbooks.md").read_text()
    assert set(re.findall(r"^## (.+)$", text, re.M)) == set(alerts())
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= {name.lower() for name in alerts()}
    titles = [panel.title for row in ROWS for panel in row.panels]
    for quoted in re.findall(r'"([^"]+)"', text):
        named = " ".join(quoted.split())
        assert any(title.startswith(named) for title in titles), f"no panel {named!r}"


# --- what they ask for ---


def test_names_are_found_in_expressions() -> None:
    expression = """
        sum by (model, le) (rate(ray_a_bucket{model=~"x{1}", status!="b"}[5m] offset 1h)) > 0.5e1
        and on (deployment) (level:b:sum unless bool c == bool 3) / 1e6 or absent(d)
        """
    assert names_in(expression) == {"ray_a_bucket", "level:b:sum", "c", "d"}
    assert list(matchers_in('a{b="1", c=~"x=y"} + d{}')) == [("a", {"b", "c", "x"}), ("d", set())]


def test_metrics_of_ours_are_named_as_prometheus_has_them() -> None:
    result = ours()
    assert "tenant" in result["ray_serve_app_requests_total"]
    assert "le" in result["ray_serve_app_inter_token_seconds_bucket"]
    assert "ray_serve_app_engine_healthy" in result
    assert "application" in result["ray_serve_app_scaling_maximum"]


def test_every_metric_that_is_asked_for_exists() -> None:
    expected = ours().keys() | THEIRS | recorded().keys()
    request = {name for _, expression in expressions() for name in names_in(expression)}
    assert request - expected == set()
    # And the list above has nothing that nobody asks for.
    assert request >= THEIRS


def test_series_of_ours_are_chosen_by_labels_that_they_have() -> None:
    result = ours()
    for where, expression in expressions():
        for name, labels in matchers_in(expression):
            assert labels <= result.get(name, labels), f"{where}: {name} has not {labels}"


def test_names_of_others_are_in_what_is_installed() -> None:
    """A new version of vLLM or Ray may rename them, and an alert would be silent for ever."""
    written = {
        "ray_vllm_": ("vllm", "v1/metrics/loggers.py", "vllm:"),
        "ray_serve_": ("ray", "serve/_private/*.py", "serve_"),
        "ray_node_": ("ray", "dashboard/modules/reporter/reporter_agent.py", "node_"),
        "ray_component_": ("ray", "dashboard/modules/reporter/reporter_agent.py", "component_"),
    }
    for prefix, (package, pattern, begins) in written.items():
        result = importlib.util.find_spec(package)
        assert result is not None
        assert result.origin is not None
        folder = Path(result.origin).parent
        source = "".join(path.read_text() for path in folder.glob(pattern))
        for name in THEIRS:
            if name.startswith(prefix):
                stem = re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix(prefix))
                assert re.search(rf'"{begins}{stem}(_total)?"', source), name


def test_recorded_names_say_level_metric_and_operation() -> None:
    operations = r"((ratio_|quantile_)?rate|increase|count)\d+[mh]|sum|ratio"
    for name, expression in recorded().items():
        level, _, operation = name.split(":")
        assert re.fullmatch(operations, operation), name
        assert re.search(rf"by \([^)]*{level}\b", expression), name
