"""The effect of the disturbances: the figures of a run, from its judged answers.

Pure. All tables of `bench chaos` are computed here.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

from bench import measure
from bench.faults import answers, gaps
from bench.faults.answers import Right, Verdict
from bench.faults.disturber import Done
from bench.faults.gaps import Lengths
from bench.figures import Event
from bench.measure import Measures
from bench.result import Asked
from bench.traffic.transcript import Transcript

_EXAMPLES = 50
_BEFORE, _AFTER = 4, 12  # What of an answer is shown around the place of a fault.


class Judged(Transcript, kw_only=True):
    """A record with its verdict and, for a stream, its longest silence.

    `stalled_s`: the part of that silence in which the machine was stalled.
    """

    verdict: Verdict | None = None
    silent_s: float | None = None
    silent_from_s: float | None = None
    stalled_s: float | None = None

    @property
    def own_s(self) -> float:
        """The silence without what the machine did to it."""
        return max(0.0, (self.silent_s or 0.0) - (self.stalled_s or 0.0))


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Answers by what became of them.

    Attributes:
        asked, streamed: how many.
        outcomes: how many of each; errors: how many of each text.
        equal: to the undisturbed answer; ties: differ by greedy choices that are as likely.
        greatest_tie: in nats; None without any.
    """

    asked: int
    streamed: int
    outcomes: dict[str, int]
    errors: dict[str, int]
    equal: int
    ties: int
    greatest_tie: float | None


class Silences(msgspec.Struct, frozen=True, kw_only=True):
    """The longest silence of each stream: of all, and of those from `from_s` on, the pauses."""

    all: Lengths
    from_s: float
    paused: Lengths
    all_without_stalls: Lengths


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of disturbance, and what its clients saw.

    Attributes:
        done, not_done: how often it happened, and how often not, by the reason.
        waited_s: the longest that it waited for replicas to be ready.
        met, lost: answers that were under way, and those of them that were lost.
        pauses: that belong to it.
    """

    done: int
    not_done: dict[str, int]
    waited_s: float | None
    met: int
    lost: int
    pauses: Lengths
    pauses_without_stalls: Lengths


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """An answer with a fault; `received` and `expected` show the place of it."""

    index: int
    prompt: int
    whole: bool
    sent_s: float | None
    end_s: float | None
    faults: list[str]
    verdict: Verdict
    error: str
    received: str | list[int] | None
    expected: str | list[int] | None


class Chaos(Asked, frozen=True, kw_only=True):
    """The result of `bench chaos`: its load, and what the clients saw.

    Attributes:
        distinct, whole, think_s, most_think_s, keep_alive, disturb, tie_margin: see `chaos.Job`.
        duration_s: of the load; machine_stalled_s: the part in which the machine was stalled.
        faults: answers with each kind of fault.
        doubled, missing: tokens and characters that came twice, or not at all.
        disturbances: by their kind; done: each, in the order of time.
        faulty: the first answers with a fault.
    """

    benchmark: str = "chaos"
    distinct: int = 0
    whole: float = 0.0
    think_s: float = 0.0
    most_think_s: float = 0.0
    keep_alive: bool = True
    disturb: tuple[str, ...] = ()
    tie_margin: float = 0.0
    machine_stalled_s: float = 0.0
    events: list[Event] = []
    answers: Counts
    faults: dict[str, int]
    doubled: dict[str, int]
    missing: dict[str, int]
    silences: Silences
    disturbances: dict[str, Effect]
    done: list[Done]
    faulty: list[Example]
    measures: Measures


def figures(
    judged: Sequence[Judged],
    rights: Sequence[Right],
    done: Sequence[Done],
    prompts: Sequence[str],
    gap_s: float,
) -> Chaos:
    """The figures of a run, its doubts and whether it is valid; what was asked for is left open.

    Args:
        rights: the undisturbed answers, by prompt.
        done: what happened, and what did not.
        prompts: the specs of what was to happen.
        gap_s: silences from this on are pauses.
    """
    verdicts = [record.verdict for record in judged if record.verdict]
    faults = Counter(fault for verdict in verdicts for fault in verdict.faults)
    ties = [verdict.margin for verdict in verdicts if verdict.tie and verdict.margin is not None]
    equal = sum(verdict.outcome == "whole" and verdict.parted_at is None for verdict in verdicts)
    happened = {event.number for event in done if not event.error}
    never = [text for number, text in enumerate(prompts) if number not in happened]
    doubts = _doubts(judged, rights, done) + [f"{text}: never happened" for text in never]
    faulty = [record for record in judged if record.verdict and record.verdict.faults]
    return Chaos(
        valid=bool(judged) and not faults and not never,
        doubts=doubts,
        events=[Event(at_s=event.at_s, what=event.kind) for event in done if not event.error],
        answers=Counts(
            asked=len(judged),
            streamed=sum(not record.whole for record in judged),
            outcomes=dict(Counter(verdict.outcome for verdict in verdicts).most_common()),
            errors=dict(Counter(record.error for record in judged if record.error)),
            equal=equal,
            ties=len(ties),
            greatest_tie=max(ties, default=None),
        ),
        faults={kind: faults[kind] for kind in answers.FAULTS},
        doubled=_counted(verdicts, "doubled"),
        missing=_counted(verdicts, "missing"),
        silences=silences(judged, gap_s),
        disturbances=by_kind(judged, done, gap_s),
        done=list(done),
        faulty=[example(record, rights) for record in faulty[:_EXAMPLES]],
        measures=measure.measure(judged),
    )


def _counted(verdicts: Sequence[Verdict], what: str) -> dict[str, int]:
    """How much came twice or not at all: tokens, or characters where there are no ids."""
    totals = {"tokens": 0, "characters": 0}
    for verdict in verdicts:
        if not verdict.tie:
            totals[verdict.unit] += getattr(verdict, what)
    return totals


def silences(judged: Sequence[Judged], gap_s: float) -> Silences:
    silent = [record for record in judged if record.silent_s is not None]
    lengths_s = [record.silent_s or 0.0 for record in silent]
    return Silences(
        all=gaps.statistics(lengths_s),
        from_s=gap_s,
        paused=gaps.statistics(each for each in lengths_s if each >= gap_s),
        all_without_stalls=gaps.statistics(record.own_s for record in silent),
    )


def by_kind(judged: Sequence[Judged], done: Sequence[Done], gap_s: float) -> dict[str, Effect]:
    """For each kind of disturbance: how often, whom it met, and the pauses that belong to it."""
    happened = [event for event in done if not event.error]
    spans = [event.span for event in happened]
    pauses: dict[str, list[Judged]] = {event.kind: [] for event in done}
    for record in judged:
        if record.silent_s is None or record.silent_from_s is None or record.silent_s < gap_s:
            continue
        silence = gaps.Span(record.silent_from_s, record.silent_from_s + record.silent_s)
        number = gaps.cause(silence, spans)
        if number is not None:
            pauses[happened[number].kind].append(record)
    rows = {}
    for kind, paused in pauses.items():
        mine = [event for event in happened if event.kind == kind]
        failed = [event.error for event in done if event.kind == kind and event.error]
        rows[kind] = Effect(
            done=len(mine),
            not_done=dict(Counter(failed)),
            waited_s=max((event.waited_s for event in mine), default=None),
            met=sum(any(gaps.met(record, event.span) for event in mine) for record in judged),
            lost=sum(_lost_to(record, mine) for record in judged),
            pauses=gaps.statistics(record.silent_s or 0.0 for record in paused),
            pauses_without_stalls=gaps.statistics(record.own_s for record in paused),
        )
    return rows


def _lost_to(record: Judged, done: Sequence[Done]) -> bool:
    """Whether an answer was lost that was under way in one of these, or just after it."""
    lost = record.verdict is not None and record.verdict.outcome != "whole"
    return lost and any(gaps.met(record, gaps.felt(event.span)) for event in done)


def example(record: Judged, rights: Sequence[Right]) -> Example:
    verdict, right = record.verdict, rights[record.prompt]
    assert verdict
    at = verdict.parted_at
    received: str | list[int] = record.text
    expected: str | list[int] | None = right.text
    if verdict.unit == "tokens" and record.token_ids is not None:
        received, expected = record.token_ids, right.token_ids
    around = None if at is None else slice(max(0, at - _BEFORE), at + _AFTER)
    return Example(
        index=record.index,
        prompt=record.prompt,
        whole=record.whole,
        sent_s=record.sent_s,
        end_s=record.end_s,
        faults=verdict.faults,
        verdict=verdict,
        error=record.error,
        received=received[around] if around else None,
        expected=expected[around] if around and expected is not None else None,
    )


def _doubts(judged: Sequence[Judged], rights: Sequence[Right], done: Sequence[Done]) -> list[str]:
    """What a reader should know before the figures."""
    doubts = []
    if any(right.token_ids is None for right in rights):
        doubts.append("the server gives no token ids: texts are compared, and no tie can be shown")
    loops = sum(right.loops for right in rights)
    if 2 * loops > len(rights):
        doubts.append(
            f"{loops} of {len(rights)} right answers repeat themselves: in them a piece that is "
            "doubled or missing shows only in the length"
        )
    happened = [event for event in done if not event.error]
    if happened and not any(
        gaps.met(record, event.span) for record in judged for event in happened
    ):
        doubts.append("no request was under way during a disturbance")
    skipped = len(done) - len(happened)
    if skipped:
        doubts.append(f"{skipped} of {len(done)} disturbances did not happen or failed")
    return doubts
