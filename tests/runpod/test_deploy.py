"""The deploy and teardown commands, as processes, against a server that holds to the schema."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runpod import hub, rest_server
from tests.runpod.conftest import FOLDER
from tests.runpod.rest_server import Account, Fault, Rest
from tests.server import ROOT

pytestmark = pytest.mark.skipif(
    not rest_server.SCHEMA.is_file(), reason="Runpod's schema is not in ../shared"
)
PORT, HUB = 8877, 8874
NAME = "fleet"
IMAGE = "registry/qwen-ray-serve:1"


@pytest.fixture(scope="module")
def server() -> Iterator[Rest]:
    with rest_server.serving(PORT) as running:
        yield running


@pytest.fixture
def account(server: Rest) -> Iterator[Account]:
    """An empty account; in the end, no request was one that the schema does not know."""
    server.account = Account()
    yield server.account
    assert server.account.violations == []


def begun(*words: str, keys: str | None = "ours", **environ: str) -> "subprocess.Popen[str]":
    """One command, as a process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RUNPOD_", "API_"))}
    own = {
        "RUNPOD_API_KEY": rest_server.KEY,
        "RUNPOD_API_URL": f"http://127.0.0.1:{PORT}",
        "RUNPOD_PROXY_URL": f"http://127.0.0.1:{PORT}/pod/{{pod}}-{{port}}",
        "PYTHONUNBUFFERED": "1",
        # No model hub, unless a test has one.
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }
    if keys is not None:
        own["API_KEYS"] = keys
    # -S: nothing that is installed is needed.
    command = [
        sys.executable,
        "-S",
        str(FOLDER / "deploy.py"),
        words[0],
        "--name",
        NAME,
        *words[1:],
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=inherited | own | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*words: str, **environ: Any) -> tuple[int, str]:
    """One command. Returns its exit status and all that it said."""
    with begun(*words, **environ) as process:
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert "Traceback" not in output, output
    assert rest_server.KEY not in output
    return process.returncode, output


def up(*words: str, **environ: Any) -> tuple[int, str]:
    return run("up", "--image", IMAGE, "--gpu", "L4", "--yes", *words, **environ)


# --- up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["load_balancer", "queue", "pod"])
def test_up_waits_for_a_real_completion_and_down_leaves_nothing(
    account: Account, mode: str
) -> None:
    status, output = up("--mode", mode, "--model", "org/model")
    assert status == 0, output
    assert "it says: 'Hello.'" in output
    kind = "pods" if mode == "pod" else "serverless"
    (thing,) = account.things[kind].values()
    assert thing["env"]["SERVE_MODE"] == mode
    assert thing["env"]["MODEL_NAME"] == "org/model"
    assert thing["env"].get("API_KEYS") == (None if mode == "queue" else "ours")
    # What it costs comes before the first thing is created.
    assert output.index("per hour") < output.index("created")
    status, output = run("status")
    assert status == 0, output
    status, output = run("down")
    assert status == 0, output
    assert "gone: " in output
    assert not any(account.things.values())


def test_the_cost_is_said_and_nothing_created_without_a_yes(account: Account) -> None:
    status, output = run(
        "up", "--image", IMAGE, "--gpu", "L40S", "--gpu-count", "2", "--workers-min", "1",
        "--volume-gb", "100", "--data-center", "EU-RO-1",
    )  # fmt: skip
    assert status == 2, output
    assert "$3.82 per hour and worker" in output
    assert "$3.82 per hour always, at most $11.46" in output
    assert "$7.00 a month" in output
    assert "--yes" in output
    assert not any(account.things.values())
    assert all(method == "GET" for method, _ in account.requests)


def test_a_second_up_changes_nothing_and_a_third_what_differs(account: Account) -> None:
    assert up()[0] == 0
    status, output = up()
    assert status == 0, output
    assert "is as asked for" in output
    assert account.made("POST", "/v2/serverless") == 1
    assert account.made("PATCH", "/v2/serverless/.*") == 0
    status, output = up("--workers-max", "5", "--env", "MAX_MODEL_LEN=8192")
    assert status == 0, output
    assert "changed endpoint" in output
    (endpoint,) = account.things["serverless"].values()
    assert endpoint["workers"]["max"] == 5
    assert endpoint["env"]["MAX_MODEL_LEN"] == "8192"
    (body,) = [body for method, _, body in account.bodies if method == "PATCH"]
    assert sorted(body) == ["env", "workers"]


def test_a_variable_that_is_not_asked_for_any_more_goes(account: Account) -> None:
    assert up("--env", "MAX_MODEL_LEN=8192")[0] == 0
    (endpoint,) = account.things["serverless"].values()
    endpoint["env"]["RUNPOD_ADDED"] = "by Runpod itself"
    assert "is as asked for" in up("--env", "MAX_MODEL_LEN=8192")[1]
    status, output = up()
    assert status == 0, output
    assert "MAX_MODEL_LEN" not in endpoint["env"]


def test_gpus_that_were_left_out_come_back(account: Account) -> None:
    assert up()[0] == 0
    (endpoint,) = account.things["serverless"].values()
    assert endpoint["gpu"]["excludedTypes"] == ["NVIDIA GeForce RTX 4090"]
    status, output = up("--gpu", "RTX 4090")
    assert status == 0, output
    assert not endpoint["gpu"].get("excludedTypes")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "L40S"], "has 1 x NVIDIA L4, and keeps them"),
        (["--gpu", "L4", "--gpu-count", "2"], "has 1 x NVIDIA L4, and keeps them"),
        (
            ["--gpu", "L4", "--volume-gb", "9", "--data-center", "EU-RO-1"],
            "has no volume, and can get none",
        ),
    ],
)
def test_a_pod_does_not_become_another_one_in_silence(
    account: Account, words: list[str], sentence: str
) -> None:
    assert up("--mode", "pod")[0] == 0
    status, output = run("up", "--mode", "pod", "--image", IMAGE, "--yes", *words)
    assert status == 2, output
    assert sentence in output
    assert not account.things["network-volumes"]
    # What can be changed is.
    status, output = up("--mode", "pod", "--env", "MAX_NUM_SEQS=8")
    assert status == 0, output
    (pod,) = account.things["pods"].values()
    assert pod["env"]["MAX_NUM_SEQS"] == "8"


@pytest.mark.parametrize("mode", ["load_balancer", "queue", "pod"])
def test_what_it_says_to_ask_with_is_answered(account: Account, mode: str) -> None:
    # Two keys, and a model with a name of its own.
    environ = {"API_KEYS": "ours,theirs", "RUNPOD_API_KEY": rest_server.KEY}
    status, output = up("--mode", mode, "--model", "org/model", **environ)
    assert status == 0, output
    command = "curl --silent --fail " + output[output.index("curl ") + len("curl ") :]
    answer = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Hello."


def test_only_the_gpus_that_were_asked_for(account: Account) -> None:
    status, output = up("--gpu", "NVIDIA L40S")
    assert status == 0, output
    (endpoint,) = account.things["serverless"].values()
    assert endpoint["gpu"]["pools"] == ["ADA_24", "ADA_48_PRO"]
    assert endpoint["gpu"]["excludedTypes"] == ["NVIDIA GeForce RTX 4090", "NVIDIA L40"]
    assert endpoint["gpu"]["minCudaVersion"] == "13.0"


def test_a_pool_is_its_gpus(account: Account) -> None:
    status, output = run("up", "--image", IMAGE, "--gpu", "ADA_48_PRO", "--yes")
    assert status == 0, output
    (endpoint,) = account.things["serverless"].values()
    assert endpoint["gpu"]["pools"] == ["ADA_48_PRO"]
    assert "excludedTypes" not in endpoint["gpu"]


def test_a_pod_without_keys_is_not_created(account: Account) -> None:
    status, output = up("--mode", "pod", keys=None)
    assert status == 2
    assert "API_KEYS" in output
    assert account.requests == []


def test_a_pod_goes_where_there_is_room(account: Account) -> None:
    account.sold_out = frozenset({"NVIDIA L4"})
    status, output = up("--mode", "pod", "--gpu", "L40S")
    assert status == 0, output
    assert "not on L4: There are no longer any instances available" in output
    (pod,) = account.things["pods"].values()
    assert pod["gpu"]["id"] == "NVIDIA L40S"
    assert pod["ports"] == ["8000/http"]


def test_no_room_anywhere_is_said(account: Account) -> None:
    account.sold_out = frozenset({"NVIDIA L4"})
    status, output = up("--mode", "pod")
    assert status == 1
    assert "no longer any instances" in output
    assert not any(account.things.values())


def test_a_volume_comes_first_and_is_mounted(account: Account) -> None:
    status, output = up("--mode", "pod", "--volume-gb", "20", "--data-center", "EU-RO-1")
    assert status == 0, output
    (volume,), (pod,) = (list(account.things[k].values()) for k in ("network-volumes", "pods"))
    assert pod["mounts"] == {"network": [{"volumeId": volume["id"], "path": "/runpod-volume"}]}
    status, output = run("down", "--keep-volume")
    assert status == 1, output
    assert "$1.40 a month for 20 GB" in output
    assert run("down")[0] == 0
    assert not any(account.things.values())


def test_make_says_the_same(account: Account) -> None:
    environ = {
        **os.environ,
        "RUNPOD_API_KEY": rest_server.KEY,
        "RUNPOD_API_URL": f"http://127.0.0.1:{PORT}",
    }
    common = ["make", "--silent", f"PYTHON={sys.executable}", f"NAME={NAME}"]
    for words in (
        ["runpod-up", "MODE=queue", f"IMAGE={IMAGE}", "ARGS=--yes --gpu L4"],
        ["runpod-status"],
        ["runpod-logs"],
        ["runpod-down"],
    ):
        result = subprocess.run(
            [*common, *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
    assert "gone: " in result.stdout
    assert not any(account.things.values())


# --- when the API fails ---------------------------------------------------------------------


def test_a_busy_and_a_failing_api_are_waited_out(account: Account) -> None:
    account.faults = [
        Fault("GET", "/v2/catalog/gpus", 429),
        Fault("GET", "/v2/serverless", 503),
        Fault("POST", "/v2/serverless", 429),
        Fault("GET", "/v2/serverless/.*/workers", 0),
    ]
    status, output = up()
    assert status == 0, output
    assert account.made("POST", "/v2/serverless") == 2
    assert len(account.things["serverless"]) == 1


@pytest.mark.parametrize("status_code", [500, 0])
@pytest.mark.parametrize("after", [True, False])
def test_an_unclear_creation_is_never_made_twice(
    account: Account, status_code: int, after: bool
) -> None:
    account.faults = [Fault("POST", "/v2/serverless", status_code, after=after)]
    status, output = up("--no-wait")
    assert status == 0, output
    assert "unclear" in output
    assert len(account.things["serverless"]) == 1
    assert account.made("POST", "/v2/serverless") == (1 if after else 2)


def test_a_list_that_is_late_is_waited_for(account: Account) -> None:
    account.faults = [Fault("POST", "/v2/serverless", 500, after=True)]
    account.late_lists = 4
    status, output = up("--no-wait")
    assert status == 0, output
    assert "as its name says" in output
    assert account.made("POST", "/v2/serverless") == 1


def test_an_address_that_is_late_is_waited_for(account: Account) -> None:
    account.late_urls = 3
    status, output = up()
    assert status == 0, output
    assert account.late_urls == 0


def test_an_endpoint_that_cannot_be_looked_at_does_not_bill_on(account: Account) -> None:
    account.late_urls = 1
    account.faults = [Fault("GET", "/v2/serverless/[^/]*", 403)]
    status, output = up("--workers-min", "1")
    assert status == 1, output
    (endpoint,) = account.things["serverless"].values()
    assert (endpoint["workers"]["min"], endpoint["workers"]["max"]) == (0, 0)


@pytest.mark.parametrize("mode", ["load_balancer", "queue", "pod"])
def test_an_answer_of_somebody_else_is_no_completion(account: Account, mode: str) -> None:
    account.stranger = True
    status, output = up("--mode", mode)
    assert status == 1, output
    assert "an answer without" in output
    assert "is stopped" in output or "are taken away" in output


def test_what_was_taken_away_comes_back(account: Account) -> None:
    account.looks_until_up = None
    assert up("--wait-s", "1")[0] == 1
    account.looks_until_up = 2
    status, output = up()
    assert status == 0, output
    (endpoint,) = account.things["serverless"].values()
    assert endpoint["workers"]["max"] == 3


def test_a_refused_key_is_said_at_once(account: Account) -> None:
    status, output = up(RUNPOD_API_KEY="wrong")
    assert status == 1
    assert "HTTP 401" in output
    assert len(account.requests) == 1


def test_what_does_not_come_up_does_not_bill_on(account: Account) -> None:
    account.looks_until_up = None
    status, output = up("--wait-s", "4", "--workers-min", "1")
    assert status == 1, output
    assert "no completion within 4 s" in output
    assert "no capacity" in output
    assert "hello from wrk1" in output
    (endpoint,) = account.things["serverless"].values()
    assert (endpoint["workers"]["min"], endpoint["workers"]["max"]) == (0, 0)


def test_a_job_that_fails_is_the_end_of_waiting(account: Account) -> None:
    account.job_error = "the engine is broken"
    status, output = up("--mode", "queue")
    assert status == 1, output
    assert "the job ended as FAILED: the engine is broken" in output


def test_a_job_that_nobody_took_is_taken_back(account: Account) -> None:
    account.looks_until_up = None
    status, output = up("--mode", "queue", "--wait-s", "2")
    assert status == 1, output
    assert account.jobs == {"job0": "CANCELLED"}


def test_a_wrong_key_of_ours_is_told_from_runpods(account: Account) -> None:
    status, output = up("--env", "API_KEYS=other")
    assert status == 1, output
    assert "check API_KEYS" in output


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpu", "RTX 9090"], "no GPU 'RTX 9090' to be had this way"),
        (["--volume-gb", "10"], "--volume-gb needs --data-center"),
        (["--env", "X"], "must be NAME=VALUE"),
        (["--workers-min", "9"], "is above --workers-max"),
    ],
)
def test_what_cannot_be_is_refused(account: Account, words: list[str], sentence: str) -> None:
    status, output = up(*words)
    assert status == 2, output
    assert sentence in output
    assert not any(account.things.values())


def test_a_name_that_another_mode_has_is_refused(account: Account) -> None:
    account.add("pods", name=NAME)
    status, output = up()
    assert status == 2
    assert "is a pod already" in output
    account.things["pods"].clear()
    assert up("--no-wait")[0] == 0
    status, output = up("--mode", "queue")
    assert status == 2
    assert "is of type LOAD_BALANCER" in output


# --- down -----------------------------------------------------------------------------------


def test_down_takes_what_is_ours_and_nothing_else(account: Account) -> None:
    for kind in ("serverless", "pods", "templates", "network-volumes"):
        account.add(kind, name=NAME)
        account.add(kind, name=f"{NAME}-2")
    account.add("serverless", name=f"{NAME} -fb")
    account.add("templates", name=f"{NAME}__template__abc")
    account.add("pods", name=NAME, locked=True)
    status, output = run("down")
    assert status == 0, output
    for kind in ("serverless", "pods", "templates", "network-volumes"):
        assert account.names(kind) == [f"{NAME}-2"]
    # Others' things that bill are said, and are no failure.
    assert "not of this deployment, and billing:" in output
    assert "$0.43 per hour" in output


def test_what_cannot_be_deleted_is_said_with_its_price(account: Account) -> None:
    volume = account.add("network-volumes", name=NAME, size=50)
    account.stuck = frozenset({volume})
    pod = account.add("pods", name=NAME, status="EXITED", cost=0.0)
    account.things["pods"][pod]["mounts"] = {"persistent": {"size": 20, "path": "/workspace"}}
    other = account.add("pods", name="other", status="EXITED", cost=0.0)
    account.things["pods"][other]["mounts"] = {"persistent": {"size": 20, "path": "/workspace"}}
    status, output = run("down", "--patience-s", "3")
    assert status == 1, output
    assert "is not deleted" in output
    assert f"volume {volume} ({NAME}) is left: $3.50 a month for 50 GB" in output
    assert "EXITED, $4.00 a month for 20 GB of disk" in output


def test_down_survives_a_failing_api(account: Account) -> None:
    account.add("serverless", name=NAME)
    account.add("pods", name=NAME)
    account.faults = [
        Fault("DELETE", "/v2/serverless/.*", 500, after=True),
        Fault("DELETE", "/v2/pods/.*", 429),
        Fault("GET", "/v2/templates", 502),
    ]
    status, output = run("down")
    assert status == 0, output
    assert not any(account.things.values())


def test_down_of_nothing_is_good(account: Account) -> None:
    status, output = run("down")
    assert status == 0
    assert f"nothing is called {NAME}" in output


# --- status and logs ------------------------------------------------------------------------


def test_status_tells_and_keeps_keys_to_itself(account: Account) -> None:
    assert run("status")[0] == 1
    account.add("serverless", name=NAME, env={"API_KEYS": "secret"}, workers={"min": 1, "max": 3})
    account.add("network-volumes", name=NAME)
    status, output = run("status", "--json")
    assert status == 0
    assert "secret" not in output
    body = json.loads(output)
    bills = "$0.69 per hour for 1 worker(s), 1 worker(s) always on"
    assert body["endpoint"][0]["bills"] == bills
    assert body["volume"][0]["bills"] == "$3.50 a month for 50 GB"


def test_a_worker_bills_though_none_is_always_on(account: Account) -> None:
    account.looks_until_up = 0
    account.add("serverless", name=NAME)
    assert "$0.69 per hour for 1 worker(s)" in run("status")[1]
    # One that waits for a machine costs nothing.
    account.looks_until_up = None
    assert "bills nothing by itself" in run("status")[1]


def test_logs_of_every_worker(account: Account) -> None:
    assert run("logs")[0] == 1
    account.add("serverless", name=NAME)
    account.add("pods", name=NAME)
    status, output = run("logs")
    assert status == 0, output
    assert "[wrk1] hello from wrk1" in output
    assert "hello from pod" in output


def test_logs_of_all_that_speak_are_followed_at_once(account: Account) -> None:
    account.open_logs = True
    account.add("serverless", name=NAME)
    account.add("pods", name=NAME)
    with begun("logs", "--follow") as process:
        late = threading.Timer(30, process.kill)
        late.start()
        try:
            assert process.stdout is not None
            # The first stream never ends.
            lines = sorted(process.stdout.readline() for _ in range(2))
            assert ["hello from pod" in lines[0], "hello from wrk1" in lines[1]] == [True, True]
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
        finally:
            late.cancel()
            process.kill()


def test_a_worker_that_went_does_not_silence_the_others(account: Account) -> None:
    account.faults = [Fault("GET", "/v2/pods/.*/logs", 404)]
    account.add("pods", name=NAME)
    account.add("serverless", name=NAME)
    status, output = run("logs")
    assert status == 1
    assert "no logs: " in output
    assert "[wrk1] hello from wrk1" in output


# --- what does not fit ------------------------------------------------------------------------

LARGE = "Qwen/Qwen2.5-32B-Instruct"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--model", LARGE], f"model = '{LARGE}': needs .* GiB on each of 1 GPUs"),
        (["--env", f"MODEL_NAME={LARGE}"], "needs .* GiB on each of 1 GPUs"),
        (["--model", LARGE, "--gpu-count", "2", "--disk-gb", "200"], "needs .* on each of 2 GPUs"),
        (
            [
                *("--model", LARGE, "--env", "TENSOR_PARALLEL_SIZE=1"),
                *("--gpu-count", "8", "--disk-gb", "200"),
            ],
            "with TENSOR_PARALLEL_SIZE=1 needs .* on each of 1 GPUs; there are 8 x L4",
        ),
        (
            ["--model", "Qwen/Qwen2.5-7B-Instruct", "--env", "MAX_MODEL_LEN=200k"],
            "needs .* GiB on each of 1 GPUs",
        ),
        (
            ["--model", LARGE, "--gpu-count", "8"],
            "is 66 GB, and --disk-gb 40 holds less: --disk-gb 68",
        ),
        (
            ["--model", LARGE, "--gpu-count", "8", "--volume-gb", "50", "--data-center", "EU-RO-1"],
            "is 66 GB, and --volume-gb 50 holds less: --volume-gb 68",
        ),
        (["--model", "Qwen/Qwen2.5-7B-Instruct", "--env", "MAX_MODEL_LEN=lots"], "max_model_len"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_bills(
    account: Account, words: list[str], problem: str
) -> None:
    status, output = up(*words)
    assert status == 2, output
    assert re.search(problem, output), output
    assert "Mend: a larger --gpu" in output or "holds less" in output
    assert account.made("POST", ".*") == 0


def test_the_size_of_another_model_is_the_hubs(account: Account, tmp_path: Path) -> None:
    config = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
    config |= {
        "model_type": "qwen2",
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with hub.serving(HUB, "org/large", tmp_path) as models:
        status, output = up("--model", "org/large", "--disk-gb", "200", HF_ENDPOINT=models.url)
        assert status == 2, output
        assert "model = 'org/large': needs" in output
        assert models.fetched == ["config.json"]
    assert account.made("POST", ".*") == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--model", LARGE, "--unchecked"],
        ["--model", LARGE, "--disk-gb", "80", "--env", "QUANTIZATION=bitsandbytes"],
        ["--model", LARGE, "--disk-gb", "80", "--gpu", "H100 SXM"],
        ["--model", "Qwen/Qwen2.5-7B-Instruct", "--env", "MAX_MODEL_LEN=auto"],
        ["--model", "org/that-no-hub-knows"],
        [],
    ],
)
def test_what_fits_or_may_fit_is_made(account: Account, words: list[str]) -> None:
    command = ["up", "--image", IMAGE, "--yes", "--no-wait", *words]
    status, output = run(*command, *([] if "--gpu" in words else ["--gpu", "L4"]))
    assert status == 0, output
    assert account.made("POST", "/v2/serverless") == 1
