"""What is put beside what, in bench.experiments.observed; the run itself is a benchmark."""

import pytest

from bench.experiments.observed import compared, quantile
from bench.figures import Run
from bench.measure import Measures
from tests.bench import made


def test_a_quantile_is_within_its_bucket() -> None:
    buckets = [(0.1, 0.0), (0.2, 4.0), (0.4, 8.0), (float("inf"), 8.0)]
    assert quantile(0.5, buckets) == pytest.approx(0.2)
    assert quantile(0.75, buckets) == pytest.approx(0.3)


def test_counts_agree_exactly_and_medians_within_a_tenth() -> None:
    def series(requests: float, median_s: float) -> dict[str, dict[float, float]]:
        counts = {"requests": requests, "input_tokens": 50 * requests, "output_tokens": requests}
        buckets = {median_s * 2: requests, float("inf"): requests}
        histograms = dict.fromkeys(("ttft_p50_s", "itl_p50_s"), buckets)
        return {name: {0.0: count} for name, count in counts.items()} | histograms

    whole = {"requests": 10, "input_tokens": 500, "output_tokens": 10}
    measured = [Measures(**whole, ttft_p50_s=0.105, itl_p50_s=0.12)]
    run = Run(**made.UNMEASURED | {"whole": measured})
    rows = {row.what: row.agree for row in compared(run, series(5, 0.1), series(15, 0.1))}
    assert rows == {
        "requests": True,
        "input_tokens": True,
        "output_tokens": True,
        "ttft_p50_s": True,
        "itl_p50_s": False,
    }
    one_lost = compared(run, series(5, 0.1), series(14, 0.1))
    assert not any(row.agree for row in one_lost[:3])
