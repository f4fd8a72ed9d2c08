"""What came back, in figures: the one place that defines every metric.

Pure: records in, figures out. All latencies count from the time a request was planned for, so that
a client or a server that holds up the load is seen by every request it held up. With `record` for
one request and `window` for the span of time that is measured:

    ttft_s    chunk_s[0] - planned_s                            time to the first token
    tpot_s    (chunk_s[-1] - chunk_s[0]) / (output_tokens - 1)  time per token after the first
    itl_s     the gaps of chunk_s, of all requests together     time between tokens as they came
    e2e_s     end_s - planned_s                                 until the response was complete
    lag_s     sent_s - planned_s                                how late bench itself was

    requests_per_s       successes / duration
    output_tokens_per_s  output tokens of successes / duration
    total_tokens_per_s   input and output tokens of successes / duration
    goodput_per_s        successes that met the SLO / duration
    user_tokens_per_s    output tokens of successes / the sum of their e2e_s: what one user gets
    good_share           requests that met the SLO / requests; a failure has not met it
    failed_share         failures / requests
    max_running, mean_running   requests under way (sent, not ended) at a time
    fairness             Jain's index of user_tokens_per_s over kinds: 1 is equal, 1/kinds is worst

Tokens are those of the server's usage, never chunks: a chunk may hold several. A failure is
counted, and has no latency: as a zero it would make a failing server look fast. A percentile is
None where there are too few samples to say how far off it may be (`interval.samples_needed`: 368
for the 99th); percentiles are linear between samples and deviations divide by n, as in numpy.

Which requests count: for latencies and shares those planned in the window, however late they
ended; leaving out the unfinished would leave out the slow. For what is per second a request counts,
with its tokens, by the share of its time (planned to end) that lies in the window. Counting what
ends in the window, or the chunks that come in it, is off by up to half a request for each user, as
at the beginning of the window all are at the same point of their first request. Without a window
that is every request as a whole, from the first planned time to the last end.
"""

from bench.measure.answers import Answers, may_be_cached_share
from bench.measure.efficiency import (
    CurvePoint,
    Efficiency,
    efficiency,
    efficiency_summary,
    on_front,
)
from bench.measure.figures import (
    METRICS,
    Kind,
    Mean,
    Measures,
    measure,
    settling_of_all,
    summary,
)
from bench.measure.flow import Timeline, Window, output_tokens_by_slice, timeline
from bench.measure.latency import e2e_s, gaps, itl_s, lag_s, present, reason, tpot_s, ttft_s
from bench.measure.sessions import Sessions, Turn, sessions
from bench.measure.slo import SLOS, Slo, parse_slo
from bench.measure.steady import window
from bench.measure.validity import answer_doubts, busy, doubts, falls_behind, unsettled
from bench.measure.vllm_result import vllm_names

__all__ = [
    "METRICS",
    "SLOS",
    "Answers",
    "CurvePoint",
    "Efficiency",
    "Kind",
    "Mean",
    "Measures",
    "Sessions",
    "Slo",
    "Timeline",
    "Turn",
    "Window",
    "answer_doubts",
    "busy",
    "doubts",
    "e2e_s",
    "efficiency",
    "efficiency_summary",
    "falls_behind",
    "itl_s",
    "lag_s",
    "may_be_cached_share",
    "measure",
    "on_front",
    "output_tokens_by_slice",
    "parse_slo",
    "reason",
    "sessions",
    "settling_of_all",
    "summary",
    "timeline",
    "tpot_s",
    "ttft_s",
    "unsettled",
    "vllm_names",
    "window",
]

# Programs outside of the project, such as its cases, ask for these by their former names.
_gaps, _known = gaps, present
