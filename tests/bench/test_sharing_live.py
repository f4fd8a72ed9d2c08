"""What a tenant gets beside one that floods, from the records of a load on a real server."""

import json
import math
from pathlib import Path

import pytest
import yaml

from bench.engine import systems
from bench.experiments import sharing_live
from bench.experiments.sharing_live import Phase
from bench.records import Record
from serve_app.tenants.tenant import digest, read_file


def answered(at_s: float, ttft_s: float = 0.1, tokens: int = 10) -> Record:
    first_s = at_s + ttft_s
    record = Record(index=0, planned_s=at_s, sent_s=at_s, end_s=first_s, status=200)
    record.input_tokens, record.output_tokens, record.chunk_s = tokens, tokens, [first_s]
    return record


def refused(at_s: float) -> Record:
    return Record(index=0, planned_s=at_s, sent_s=at_s, end_s=at_s, status=429, error="http 429")


def test_a_phase_counts_what_was_planned_in_its_window() -> None:
    good = [answered(1.0, 9.0), answered(6.0, 0.3), answered(5.0, 0.2), refused(7.0)]
    phase = sharing_live.figures(good, [], (4.0, 8.0))
    assert phase.ttft_s == pytest.approx([0.2, 0.3])
    assert phase.served == pytest.approx(2 / 3)
    assert phase.errors == {"http 429": 1}
    # Two answers of 20 tokens in four seconds.
    assert phase.tokens_per_s == phase.good_tokens_per_s == pytest.approx(10.0)


def test_tokens_and_refusals_are_those_of_both_tenants() -> None:
    flood = [answered(4.5), answered(5.5), refused(6.5), refused(9.0)]
    phase = sharing_live.figures([answered(5.0)], flood, (4.0, 8.0))
    assert phase.tokens_per_s == pytest.approx(3 * 20 / 4)
    assert phase.good_tokens_per_s == pytest.approx(20 / 4)
    assert phase.refused == pytest.approx(1 / 4)


def test_what_a_tenant_gets_is_compared_with_what_it_has_alone() -> None:
    alone = Phase([0.1] * 99 + [1.0], 1.0, 400.0, 400.0)
    # In order of arrival it gets a tenth of its demand, and waits.
    fcfs = Phase([10.0] * 100, 0.1, 1000.0, 40.0)
    fair = Phase([0.1] * 99 + [1.5], 1.0, 990.0, 400.0)
    summary = sharing_live.summary([{"alone": alone, "fcfs": fcfs, "ours": fair}] * 2)
    assert summary["ours"]["requests"] == 200
    assert 1.0 < summary["ours"]["ttft_p99_to_alone"] < 2.0
    assert summary["ours"]["tokens_to_fcfs"] == pytest.approx(0.99)
    assert summary["ours"]["jain"] == pytest.approx(1.0, abs=1e-3)
    assert summary["fcfs"]["jain"] < 0.7
    # It asks for 400 tokens/s, and half of what the server does is 495.
    assert summary["ours"]["of_half"] == pytest.approx(400 / 495)
    assert "ours" in sharing_live.table(summary)


def test_a_tenant_above_its_share_is_doubted() -> None:
    alone, fcfs = Phase([0.1], 1.0, 400.0, 400.0), Phase([9.0], 0.1, 1000.0, 40.0)
    within, above = Phase([0.2], 1.0, 990.0, 400.0), Phase([0.2], 1.0, 700.0, 400.0)
    for ours, count in ((within, 0), (above, 1)):
        summary = sharing_live.summary([{"alone": alone, "fcfs": fcfs, "ours": ours}])
        assert len(sharing_live.doubts(summary)) == count


def test_a_tenant_that_gets_no_answer_has_no_time_to_first_token() -> None:
    alone, starved = Phase([0.1], 1.0, 400.0, 400.0), Phase([], 0.0, 900.0, 0.0)
    summary = sharing_live.summary([{"alone": alone, "fcfs": starved, "ours": starved}])
    assert math.isnan(summary["fcfs"]["ttft_p99_s"])
    assert summary["fcfs"]["served"] == 0
    assert "nan" in sharing_live.table(summary)


def test_each_tenant_has_the_key_that_its_load_sends(tmp_path: Path) -> None:
    tenants = read_file(Path(sharing_live.tenants_file(tmp_path)))
    for name in ("good", "flood", "one"):
        key = sharing_live.header(name)["authorization"].removeprefix("Bearer ")
        assert [each.sha256 for each in tenants[name].keys] == [digest(key.encode())]


def test_a_system_is_started_with_the_settings_that_are_asked_for(tmp_path: Path) -> None:
    changes = {"tenants": {"file": "t.yaml"}, "lane": "python"}
    words = systems.command("ours", {"dtype": "float32"}, "m", 8000, tmp_path, changes)
    config = yaml.safe_load(Path(words[-1]).read_text())
    args = config["applications"][0]["args"]
    assert args["tenants"] == {"file": "t.yaml"}
    assert args["lane"] == "python"
    assert json.loads(json.dumps(args["engine"])) == {"dtype": "float32"}
