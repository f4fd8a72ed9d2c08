"""The constants of the scaling policy, each with its unit and its reason.

No deployment has to set them: they were chosen on recorded traces with `python -m bench simulate`.
Other values are for experiments (`decide(..., tuning=Tuning(...))`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """How the policy learns, forecasts and moves.

    Attributes:
        cost_memory_s: the costs of a step are fitted to the reports of about this time. The mix of
            requests changes over hours, noise over seconds.
        mix_memory_s: likewise, the work that a prompt token or a request brings with it.
        min_busy_ratio: reports of an engine that is less busy show overhead, not costs; ignored.
        ridge: weight of "every cost is small" against the reports. It decides only what they
            leave open.
        max_work_ratio: no replica is planned to be busier. In the last twentieth queues grow
            without bound.
        max_kv_ratio: above this share of its KV cache an engine soon preempts sequences.
        full_batch_load: load of a replica whose batch has no free slot: more than full, because
            the next request waits.
        queue_window_s: growth of the queued tokens is measured over this time; single prompts
            make them jump.
        parts_per_start, min_part_s: the load history is a series of means, this many for each
            start, and none shorter than this.
        smoothings: a forecast is a running mean of the history; each of these weights of the
            newest mean is tried, from "as now" to "as always".
        memory_s, memory_starts: the history reaches back the longer of these.
        forget_starts: in this many starts an error of a past forecast loses most of its weight.
        first_headroom_ratio: headroom above the highest load until a forecast can be compared with
            what came.
        misses_per_excess: one in this many requests misses the goal while there is more load than
            forecast. With the percentile it gives how likely the forecast must be to hold.
        min_cover: but it is never less likely to hold than this.
        tail_ratio: share of an exponential tail that is assumed beyond the largest error seen.
        down_margin_ratio, down_starts, min_down_s: the fleet shrinks when fewer replicas would do
            with this much more load, for this many starts and at least this long.
        max_step_down_ratio, settle_s: by this share at a time, this long after the last change.
        min_drain_s: a backlog is to be worked off within one start, or within this if longer.
        gain_per_s: the load is multiplied by a factor, because it is estimated from means and
            tails miss the goal. The factor grows by this share a second while all requests miss.
        gain_per_start: the slower it grows the longer a start takes, because its effect shows only
            after one.
        target_miss_ratio: it shrinks so slowly that this share of the allowed misses occurs.
        first_factor, min_factor, max_factor: its first value and its bounds. Below 1 the estimate
            asked for too much.
        typical_s: the usual rate of requests is a mean over about this time.
    """

    cost_memory_s: float = 1800.0
    mix_memory_s: float = 600.0
    min_busy_ratio: float = 0.02
    ridge: float = 1e-3
    max_work_ratio: float = 0.95
    max_kv_ratio: float = 0.9
    full_batch_load: float = 1.1
    queue_window_s: float = 10.0
    parts_per_start: int = 12
    min_part_s: float = 5.0
    smoothings: tuple[float, ...] = (1.0, 0.5, 0.2, 0.07, 0.02)
    memory_s: float = 1800.0
    memory_starts: float = 40.0
    forget_starts: float = 8.0
    first_headroom_ratio: float = 0.3
    misses_per_excess: float = 4.0
    min_cover: float = 0.75
    tail_ratio: float = 0.5
    down_margin_ratio: float = 0.05
    down_starts: float = 1.0
    min_down_s: float = 60.0
    max_step_down_ratio: float = 0.2
    settle_s: float = 20.0
    min_drain_s: float = 15.0
    gain_per_s: float = 0.1
    gain_per_start: float = 6.0
    target_miss_ratio: float = 0.7
    first_factor: float = 1.5
    min_factor: float = 0.6
    max_factor: float = 3.0
    typical_s: float = 300.0


DEFAULT = Tuning()
