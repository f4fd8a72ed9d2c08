"""A measured run beside simulated ones: its requests, and the number of replicas.

    python -m bench run ... --load trace --dashboard http://127.0.0.1:8265 --repeats 1 --out RUN
    python -m bench simulate --beside RUN --engine FIT --policy ours ...

The simulated fleets get the requests that were answered, at the times at which they were planned
and with the tokens that they had. What the run's own scaling did is one more row among theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import result
from bench.errors import ResultError
from bench.figures import Run
from bench.records import Record, read
from bench.simulation.fleet import Timeline
from bench.simulation.job import Job


@dataclass(frozen=True)
class Measured:
    """The first repeat of a run.

    Attributes:
        name: of the run.
        records: by planned time.
        timeline: as it was sampled; `waiting`, `running` and `kv_usage` are empty.
        end_s: when the last answer ended.
    """

    name: str
    records: tuple[Record, ...]
    timeline: Timeline
    end_s: float

    @classmethod
    def read(cls, folder: Path) -> "Measured":
        """Raises ResultError where replicas were not counted, or nothing was answered."""
        run = result.read(folder, run=Run)
        samples = run.server[0] if run.server else []
        present = [sample for sample in samples if sample.wanted is not None]
        if not present:
            problem = "replicas were not counted; run it with --dashboard http://host:port"
            raise ResultError(f"{folder}: {problem}")
        records = [record for record in read(folder / result.RECORDS) if record.repeat == 0]
        if not any(record.ok for record in records):
            raise ResultError(f"{folder}: no request was answered")
        columns = ("t_s", "wanted", "replicas", "starting", "stopping")
        t_s, *counted = ([getattr(each, name) for each in present] for name in columns)
        wanted, serving, starting, draining = ([int(count) for count in each] for each in counted)
        return cls(
            name=run.name,
            records=tuple(sorted(records, key=lambda record: record.planned_s)),
            timeline=Timeline(
                t_s=t_s, wanted=wanted, serving=serving, starting=starting, draining=draining
            ),
            end_s=max(record.end_s or record.planned_s for record in records),
        )

    def jobs(self) -> list[Job]:
        """What was answered, once more. A failure says nothing of how long it would have been."""
        answered = [record for record in self.records if record.ok and record.output_tokens]
        return [
            Job(
                index,
                record.planned_s,
                record.input_tokens or record.asked_input_tokens or 1,
                record.output_tokens or 1,
                record.cached_tokens or 0,
            )
            for index, record in enumerate(answered)
        ]

    @property
    def start_s(self) -> float | None:
        """Seconds until a replica served, the mean of those that began to start; None: none did."""
        starting = np.array(self.timeline.starting)
        begun = np.maximum(np.diff(starting, prepend=0), 0).sum()
        return float(_over(self.timeline.t_s, starting) / begun) if begun else None

    @property
    def decisions(self) -> list[tuple[float, int, str]]:
        """(when, replicas, "") of each change of what was wanted."""
        wanted = self.timeline.wanted
        changed = np.flatnonzero(np.diff(wanted)) + 1
        return [(self.timeline.t_s[place], wanted[place], "") for place in changed]

    def replica_s(self, from_s: float = 0.0) -> float:
        """Seconds that were paid for from a time on, summed over replicas."""
        line = self.timeline
        return _over(line.t_s, paid(line), from_s, self.end_s)


def paid(line: Timeline) -> Any:
    """Replicas that are paid for, at each time of a timeline."""
    return np.add(np.add(line.serving, line.starting), line.draining)


def apart(simulated: Timeline, measured: Measured) -> float:
    """By how many serving replicas two timelines differ, the mean over the time that both have."""
    first, other = measured.timeline, simulated
    end_s = min(first.t_s[-1], other.t_s[-1])
    at_s = np.arange(max(first.t_s[0], other.t_s[0]), end_s, 1.0)
    if not len(at_s):
        return 0.0
    counts = [_at(each.t_s, each.serving, at_s) for each in (first, other)]
    return float(np.abs(counts[0] - counts[1]).mean())


def _over(
    t_s: Sequence[float], counts: Any, from_s: float = 0.0, to_s: float | None = None
) -> float:
    """The integral of counts that hold until the next one; the first holds from 0."""
    end_s = t_s[-1] if to_s is None else to_s
    edges = np.clip([0.0, *t_s[1:], max(end_s, t_s[-1])], from_s, end_s)
    return float((np.diff(edges) * np.asarray(counts)).sum())


def _at(t_s: Sequence[float], counts: Any, at_s: Any) -> Any:
    places = np.clip(np.searchsorted(t_s, at_s, side="right") - 1, 0, len(t_s) - 1)
    return np.asarray(counts)[places]
