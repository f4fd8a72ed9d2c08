"""What the fast lane did, as vLLM's own metrics count it.

vLLM's Python front end counts the requests whose tokens it passes on. Those of vllm-rs it learns
from the scheduler's reports (reports.py), so that `vllm:*` is of both lanes.
"""

from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

from serve_app.replica.reports import Ended, Report

# Gaps between tokens of one report that vLLM's histogram gets. It takes microseconds for each, and
# no work may be done for each token of the fast lane.
_MOST_GAPS = 8

_REASONS = {str(reason): reason for reason in FinishReason}


class FastIteration(IterationStats):  # type: ignore[misc]
    """Statistics of the fast lane, which the signals have already (lanes/fastlane.py)."""


def iteration_of(report: Report) -> FastIteration:
    """One report in the place of an engine step. All times are the scheduler's."""
    stats = FastIteration()
    stats.num_generation_tokens = report.generated_tokens
    # Cached or not: the scheduler counts hits of the prefix cache for both lanes.
    stats.prompt_token_stats.total = stats.prompt_token_stats.computed = report.prompt_tokens
    stats.num_preempted_reqs = report.preempted
    stats.time_to_first_tokens_iter = list(report.first_s)
    gap_s = report.gap_s / report.gaps if report.gaps else 0.0
    stats.inter_token_latencies_iter = [gap_s] * min(report.gaps, _MOST_GAPS)
    stats.finished_requests = [_finished(each) for each in report.ended]
    return stats


def _finished(ended: Ended) -> FinishedRequestStats:
    first_s = ended.last_s if ended.first_s is None else ended.first_s
    return FinishedRequestStats(
        finish_reason=_REASONS.get(ended.reason, FinishReason.ERROR),
        request_id=ended.request_id,
        e2e_latency=ended.last_s - ended.arrived_s,
        num_prompt_tokens=ended.prompt_tokens,
        num_generation_tokens=ended.generated_tokens,
        prefill_time=first_s - ended.arrived_s,
        inference_time=ended.last_s - ended.arrived_s,
        decode_time=ended.last_s - first_s,
        mean_time_per_output_token=ended.gap_s,
        num_cached_tokens=ended.cached_tokens,
    )
