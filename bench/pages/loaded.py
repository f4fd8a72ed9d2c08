"""What a report reads: result folders, and what can be made of those that were cut off."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from bench import measure, pareto, records, result, search
from bench.engine import confirm, kvcache, profile, scaled, scheduler, tuned
from bench.errors import ResultError
from bench.figures import Load, Run
from bench.hardware import roofline
from bench.matrix import Matrix
from bench.measure import Measures
from bench.pages import locust_report
from bench.records import Record
from bench.result import Asked, Result

# Of the last five a report shows only what was asked for.
KINDS: Mapping[str, type[Result]] = {
    "run": Run,
    "locust": locust_report.Locust,
    "matrix": Matrix,
    "baseline": Matrix,
    "sweep": search.SweepResult,
    "search": search.RateResult,
    "pareto": pareto.Curve,
    "roofline": roofline.Roofline,
    "profile": profile.Profile,
    "kv": kvcache.KvCache,
    "scheduler": scheduler.Schedules,
    "tune": tuned.Tuned,
    "confirm": confirm.Confirmed,
    "scale": scaled.Scaled,
    "simulate": Asked,
    "chaos": Asked,
    "quality": Asked,
    "starts": Result,
    "changes": Result,
}


class Loaded(msgspec.Struct, kw_only=True):
    """A result folder.

    Attributes:
        data: its result; made up from the records where there is none.
        records: all that can be read; `records_absent` says why there are no more.
        namesake: whether another result of the report has the same name.
    """

    folder: Path
    data: Result
    records: list[Record] = []
    records_absent: str = ""
    namesake: bool = False

    @property
    def kind(self) -> str:
        return self.data.benchmark

    @property
    def name(self) -> str:
        """Its own name, and its folder's where another result of the report has the same."""
        own = self.data.name or self.folder.name
        return f"{own} ({self.folder.name})" if self.namesake else own

    @property
    def repeats(self) -> list[Measures]:
        return self.data.repeats if isinstance(self.data, Load) else []

    def of_repeat(self, repeat: int) -> list[Record]:
        return [record for record in self.records if record.repeat == repeat]

    def window(self, repeat: int) -> tuple[float, float] | None:
        """The steady state of a repeat; None where there was none."""
        if repeat >= len(self.repeats) or not self.repeats[repeat].steady:
            return None
        return self.repeats[repeat].from_s, self.repeats[repeat].to_s

    def measured(self) -> list[Record]:
        """The successes that the figures are of: in the steady state, where there was one."""
        records = []
        for repeat in {record.repeat for record in self.records}:
            from_s, to_s = self.window(repeat) or (-math.inf, math.inf)
            records += [r for r in self.of_repeat(repeat) if r.ok and from_s <= r.planned_s <= to_s]
        return records


def load(folder: Path) -> Loaded:
    """Read a folder; what survived of it where the run did not get as far as its result.

    Raises:
        ResultError: it holds neither a result nor a record.
    """
    readable, absent = _records(folder)
    try:
        data = result.read(folder, **KINDS)
    except ResultError as error:
        if not readable:
            raise
        data = _from_records(folder, readable, str(error))
    return Loaded(folder=folder, data=data, records=readable, records_absent=absent)


def _records(folder: Path) -> tuple[list[Record], str]:
    path = folder / result.RECORDS
    readable: list[Record] = []
    if folder.is_file():
        return [], "the result is a single file, without records of its requests"
    try:
        for record in records.read(path):
            readable.append(record)
    except OSError as error:
        return [], f"{path.name}: {error.strerror}"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return readable, f"{path.name}: line {len(readable) + 1} cannot be read: {error}"
    return readable, "" if readable else f"{path.name} is empty"


def _from_records(folder: Path, readable: Sequence[Record], why: str) -> Run:
    """A run that left records and no result: its figures are of the whole."""
    whole = [
        measure.measure(record for record in readable if record.repeat == repeat)
        for repeat in sorted({record.repeat for record in readable})
    ]
    return Run(
        name=folder.name,
        valid=False,
        doubts=[f"the run left no result, so figures are of all its records: {why}"],
        repeats=whole,
        whole=whole,
        summary=measure.summary(whole),
    )


def tell_apart(results: Sequence[Loaded]) -> None:
    names = [each.name for each in results]
    for each, name in zip(results, names, strict=True):
        each.namesake = names.count(name) > 1
