"""The constants of an engine from what a real one was seen to do, and how well they foretell it.

Records hold no steps, but their sums: between the first and the last token of a request the engine
did as many steps as the request got tokens, wrote every token that came to anyone meanwhile, read
their caches, and read every prompt whose first token came. So for each request

    last - first token = step_s * its tokens
                         + prefill_token_s * prompt tokens read meanwhile
                         + decode_seq_s * tokens written meanwhile
                         + kv_token_s * cache tokens read for those

and for each that met no prompt on its way, but those that came with it

    first token - sent = request_s + step_s * (its own steps, and half of one it had to wait for)
                         + prefill_token_s * those prompts + the part of the sequences beside it

are linear in the constants. They are solved together by least squares of relative errors, without
negative constants. Chunks of several tokens do no harm: only sums are used. Loads that are all
alike cannot tell the constants apart, which shows in their errors; take a few users and many, short
prompts and long ones.

`validate` leaves each load out in turn, fits the rest, and foretells the one left out: its errors
are of loads that the constants were not fitted to.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import measure, result
from bench.errors import BenchError, ResultError
from bench.records import Record, read
from bench.result import Asked
from bench.simulation.batch import serve, serve_closed
from bench.simulation.enginemodel import Costs, Engine
from bench.simulation.job import Job
from bench.traffic import schedule

_NAMES = tuple(field.name for field in fields(Costs))
_REQUEST = _NAMES.index("request_s")
_LEAST_CLEAR = 8  # Clear rows of an equation, to do without the others.
_TOGETHER = 0.1  # Of a TTFT: requests this near at both ends were read in the same step.
_SHORTEST_S = 1e-6  # Between two chunks.
_LEAST_TOKENS = 8  # Of a request whose gaps are used: fewer are mostly jitter.
_PARTS = 8  # Of the rows, for the errors of the constants.
_Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """One load that was measured: the repeats of a `bench run`.

    Attributes:
        name: its folder.
        repeats: the records of each, in the order of their plan.
        think_s: of the users of a closed loop.
    """

    name: str
    repeats: tuple[tuple[Record, ...], ...]
    think_s: float = 0.0

    @property
    def users(self) -> int | None:
        """Of a closed loop; None for an open one."""
        users = {record.user for repeat in self.repeats for record in repeat}
        return None if None in users else len(users)


@dataclass(frozen=True)
class Fit:
    """What was found.

    Attributes:
        costs: the constants.
        errors: the standard error of each, from fits that leave an eighth of the rows out.
        residual: root mean square of the relative errors of single requests.
        requests: how many rows were used.
    """

    costs: Costs
    errors: Costs
    residual: float
    requests: int


@dataclass(frozen=True)
class Foretold:
    """One load: what was measured, what the model says, and model / measured - 1."""

    load: str
    fitted_on: int
    measured: dict[str, float | None]
    foretold: dict[str, float | None]
    error: dict[str, float | None]


FIGURES = ("output_tokens_per_s", "ttft_p50_s", "tpot_p50_s")


def loads(folders: Iterable[Path]) -> list[Load]:
    """Every folder with records below the given ones, each a load.

    Raises ResultError where there is none, or one holds no answer.
    """
    parsed = []
    for top in folders:
        paths = sorted(top.rglob(result.RECORDS))
        if not paths:
            raise ResultError(f"{top}: holds no {result.RECORDS}")
        parsed += [_load(path, top) for path in paths]
    return parsed


def _load(path: Path, top: Path) -> Load:
    by_repeat: dict[int, list[Record]] = {}
    for record in read(path):
        by_repeat.setdefault(record.repeat, []).append(record)
    if not any(record.ok and record.chunk_s for each in by_repeat.values() for record in each):
        raise ResultError(f"{path}: no request was answered")
    repeats = tuple(
        tuple(sorted(each, key=lambda record: record.index))
        for _, each in sorted(by_repeat.items())
    )
    name = str(path.parent.relative_to(top)) if path.parent != top else top.name
    return Load(name, repeats, _think_s(path.parent))


def _think_s(folder: Path) -> float:
    """Of the load that the folder's result names; 0 where it names none."""
    try:
        load = schedule.parse(result.read(folder, run=Asked, sweep=Asked, search=Asked).load)
    except BenchError:
        return 0.0
    return load.think_s if isinstance(load, schedule.Closed) else 0.0


# --- fitting --------------------------------------------------------------------------------


def fit(measured: Sequence[Load], engine: Engine) -> Fit:
    """The constants that fit best; of `engine`, only its token budget is used.

    Raises ResultError where there are fewer usable requests than constants.
    """
    parts = [_rows(repeat, engine) for load in measured for repeat in load.repeats]
    rows = np.concatenate([part for part, _, _ in parts])
    took_s = np.concatenate([took for _, took, _ in parts])
    clear: NDArray[np.bool_] = np.concatenate([mask for _, _, mask in parts])
    # Of each equation, the rows that are not clear are only used where there are no others.
    for kind in (rows[:, _REQUEST] > 0, rows[:, _REQUEST] == 0):
        if (kind & clear).sum() < _LEAST_CLEAR:
            clear = clear | kind
    rows, took_s = rows[clear], took_s[clear]
    if len(took_s) <= len(_NAMES):
        raise ResultError(f"{len(took_s)} usable requests are too few for {len(_NAMES)} constants")
    scaled, ones = rows / took_s[:, None], np.ones(len(took_s))
    coefficients = _least_squares(scaled, ones)
    residual = float(np.sqrt(np.mean((scaled @ coefficients - ones) ** 2)))
    # Neighbours met the same steps, so that parts of the time are left out, not single rows.
    place = np.arange(len(ones)) * _PARTS // len(ones)
    without = np.array(
        [_least_squares(scaled[place != part], ones[place != part]) for part in range(_PARTS)]
    )
    spread = np.sqrt((_PARTS - 1) / _PARTS * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    return Fit(Costs(*map(float, coefficients)), Costs(*map(float, spread)), residual, len(ones))


def _least_squares(rows: _Rows, values: _Rows) -> _Rows:
    """Without negative ones: the most negative is set to 0, until none is left."""
    used: NDArray[np.bool_] = np.asarray(rows.any(axis=0))
    coefficients = np.zeros(rows.shape[1])
    scale = np.where(used, np.sqrt((rows**2).mean(axis=0)), 1.0)
    while used.any():
        solved, *_ = np.linalg.lstsq(rows[:, used] / scale[used], values, rcond=None)
        if (solved >= 0).all():
            coefficients[used] = solved / scale[used]
            break
        used[np.flatnonzero(used)[int(np.argmin(solved))]] = False
    return coefficients


def _rows(records: Sequence[Record], engine: Engine) -> tuple[_Rows, _Rows, NDArray[np.bool_]]:
    """One row a request and equation: what the constants are multiplied by; what it took; and
    whether it is clear what was done meanwhile.

    It is not where a prompt was being read at the beginning or the end of the span, as nobody knows
    how much of it; and not for a first token that had to wait for a step of others, as users who
    wait for an answer send when a step has just ended, not at any time.
    """
    ok = [record for record in records if record.ok and record.chunk_s and record.output_tokens]
    meanwhile = _Meanwhile(ok)
    rows: list[list[float]] = []
    took_s: list[float] = []
    clear: list[bool] = []
    for record in ok:
        written = (record.output_tokens or 0) - 1
        first_s, last_s = record.chunk_s[0], record.chunk_s[-1]
        if written >= _LEAST_TOKENS and last_s > first_s:
            rows.append([written, *meanwhile(first_s, last_s), 0.0])
            took_s.append(last_s - first_s)
            clear.append(
                not meanwhile.prompts(first_s, first_s) + meanwhile.prompts(last_s, last_s)
            )
        sent_s = _sent_s(record)
        tokens = meanwhile.together(sent_s, first_s) if first_s > sent_s else 0.0
        if tokens:
            seqs, kv_tokens = meanwhile.beside(sent_s)
            steps = -(-tokens // engine.token_budget) + (0.5 if seqs else 0.0)
            rows.append([steps, tokens, seqs * steps, kv_tokens * steps, 1.0])
            took_s.append(first_s - sent_s)
            clear.append(not seqs)
    matrix = np.array(rows, dtype=float).reshape(-1, len(_NAMES))
    return matrix, np.array(took_s), np.array(clear, dtype=bool)


class _Meanwhile:
    """What an engine did in a span of time, from all records of a repeat."""

    def __init__(self, records: Sequence[Record]) -> None:
        # Tokens come evenly between two chunks of a request: exact for chunks of one token, which
        # come with the others of their step, and right on average for chunks of several.
        begin_s, end_s, tokens, caches = [], [], [], []
        for record in records:
            chunks = len(record.chunk_s) - 1
            if chunks:
                each = ((record.output_tokens or 0) - 1) / chunks
                before = (record.input_tokens or 0) + each * (np.arange(chunks) + 0.5)
                begin_s.append(np.array(record.chunk_s[:-1]))
                end_s.append(np.array(record.chunk_s[1:]))
                tokens.append(np.full(chunks, each))
                caches.append(each * before)
        empty = [np.empty(0)]
        spans = np.concatenate(begin_s or empty), np.concatenate(end_s or empty)
        self._at_s, self._tokens = _running_total(*spans, np.concatenate(tokens or empty))
        _, self._caches = _running_total(*spans, np.concatenate(caches or empty))
        by_first = sorted(records, key=lambda record: record.chunk_s[0])
        self._first_s = np.array([record.chunk_s[0] for record in by_first])
        self._read = np.cumsum([0.0, *(_read(record) for record in by_first)])
        self._spans = np.array(
            [
                (
                    _sent_s(record),
                    record.chunk_s[0],
                    record.chunk_s[-1],
                    record.input_tokens or 0,
                    record.output_tokens or 0,
                    _read(record),
                )
                for record in records
            ]
        ).reshape(-1, 6)

    def __call__(self, from_s: float, to_s: float) -> tuple[float, float, float]:
        """Prompt tokens read, tokens written after first ones, and cache tokens read for them."""
        firsts = np.searchsorted(self._first_s, (from_s, to_s), side="right")
        tokens = np.interp((from_s, to_s), self._at_s, self._tokens)
        caches = np.interp((from_s, to_s), self._at_s, self._caches)
        return (
            float(self._read[firsts[1]] - self._read[firsts[0]]),
            float(tokens[1] - tokens[0]),
            float(caches[1] - caches[0]),
        )

    def prompts(self, from_s: float, to_s: float) -> int:
        """Requests that waited for their first token at any time of a span."""
        spans = self._spans
        return int(np.sum((spans[:, 0] < to_s) & (spans[:, 1] > from_s)))

    def together(self, sent_s: float, first_s: float) -> float:
        """Prompt tokens of a request and of those that came and were read with it; 0 where any
        other was about to be read."""
        spans = self._spans
        waited = spans[(spans[:, 0] < first_s) & (spans[:, 1] > sent_s)]
        near_s = _TOGETHER * (first_s - sent_s)
        same = (abs(waited[:, 0] - sent_s) <= near_s) & (abs(waited[:, 1] - first_s) <= near_s)
        return float(waited[:, 5].sum()) if same.all() else 0.0

    def beside(self, at_s: float) -> tuple[int, float]:
        """How many requests wrote at a time, and what they had in the cache."""
        spans = self._spans
        writing = spans[(spans[:, 1] <= at_s) & (spans[:, 2] > at_s)]
        if not len(writing):
            return 0, 0.0
        _, first_s, last_s, inputs, outputs, _ = writing.T
        done = (at_s - first_s) / (last_s - first_s)
        return len(writing), float((inputs + outputs * done).sum())


def _running_total(begin_s: _Rows, end_s: _Rows, amounts: _Rows) -> tuple[_Rows, _Rows]:
    """(when, how much until then) of amounts that each come evenly over a span."""
    if not len(amounts):
        return np.zeros(1), np.zeros(1)
    rates = amounts / np.maximum(end_s - begin_s, _SHORTEST_S)
    at_s = np.concatenate([begin_s, np.maximum(end_s, begin_s + _SHORTEST_S)])
    order = np.argsort(at_s, kind="stable")
    at_s, changes = at_s[order], np.concatenate([rates, -rates])[order]
    grown = np.cumsum(changes)[:-1] * np.diff(at_s)
    return at_s, np.concatenate([[0.0], np.cumsum(grown)])


def _sent_s(record: Record) -> float:
    return record.planned_s if record.sent_s is None else record.sent_s


def _read(record: Record) -> int:
    """Prompt tokens that the engine had to read."""
    requested = record.input_tokens or record.asked_input_tokens or 0
    return max(1, requested - (record.cached_tokens or 0))


# --- foretelling ----------------------------------------------------------------------------


def validate(measured: Sequence[Load], engine: Engine) -> list[Foretold]:
    """Each load foretold by an engine that was fitted to the others.

    A single load is fitted to its even repeats and foretold for the odd ones, which says less.

    Raises ResultError for a single load of a single repeat.
    """
    if len(measured) == 1:
        (only,) = measured
        if len(only.repeats) < 2:
            raise ResultError(f"{only.name}: one load of one repeat leaves nothing to predict")
        even, odd = (replace(only, repeats=only.repeats[start::2]) for start in (0, 1))
        return [foretell(odd, replace(engine, costs=fit([even], engine).costs), 1)]
    return [
        foretell(
            load,
            replace(
                engine, costs=fit([other for other in measured if other is not load], engine).costs
            ),
            len(measured) - 1,
        )
        for load in measured
    ]


def foretell(load: Load, engine: Engine, fitted_on: int = 0) -> Foretold:
    """What `engine` would have done under a load, beside what was measured."""
    measured = _figures(load.repeats)
    foretold = _figures([_simulated(load, repeat, engine) for repeat in load.repeats])
    error = {
        name: None
        if not (was := measured[name]) or (says := foretold[name]) is None
        else says / was - 1
        for name in FIGURES
    }
    return Foretold(load.name, fitted_on, measured, foretold, error)


def _simulated(load: Load, repeat: Sequence[Record], engine: Engine) -> list[Record]:
    """Only what was answered is sent: a failure says nothing of how long it would have been."""
    answered = [record for record in repeat if record.ok and record.output_tokens]
    jobs = [
        Job(
            record.index,
            record.planned_s,
            record.input_tokens or record.asked_input_tokens or 1,
            record.output_tokens or 1,
            record.cached_tokens or 0,
        )
        for record in answered
    ]
    if load.users is not None:
        return serve_closed(engine, jobs, load.users, load.think_s)
    return serve(engine, sorted(jobs, key=lambda job: job.at_s))


def _figures(repeats: Iterable[Sequence[Record]]) -> dict[str, float | None]:
    """The mean over repeats, each measured from its first request to its last answer."""
    each = [measure.measure(repeat) for repeat in repeats]
    values = {name: [getattr(each_run, name) for each_run in each] for name in FIGURES}
    return {
        name: None if None in numbers else statistics.fmean(numbers)
        for name, numbers in values.items()
    }


def summary(foretold: Sequence[Foretold]) -> dict[str, dict[str, float]]:
    """For each figure the median and the largest absolute error over loads."""
    rows = {}
    for name in FIGURES:
        errors = [abs(error) for each in foretold if (error := each.error[name]) is not None]
        if errors:
            rows[name] = {"median": statistics.median(errors), "largest": max(errors)}
    return rows


# --- keeping it -----------------------------------------------------------------------------


def from_json(path: Path) -> Engine:
    """The engine of a result of `simulate --validate`, or of a file that holds just the engine.

    Raises ResultError where there is none.
    """
    try:
        fields = msgspec.json.decode((path / result.RESULT if path.is_dir() else path).read_bytes())
        return msgspec.convert(fields.get("engine", fields), Engine)
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, AttributeError) as error:
        raise ResultError(f"{path}: holds no engine: {error}") from None


def table(fitted: Fit, foretold: Sequence[Foretold]) -> str:
    """The fit and its test as text."""
    lines = [f"fitted to {fitted.requests} spans; residual {fitted.residual:.1%}"]
    for name in _NAMES:
        value, error = getattr(fitted.costs, name), getattr(fitted.errors, name)
        lines.append(f"  {name:16} {value * 1e6:12.4f} us  +- {error * 1e6:.4f}")
    lines += ["", "measured -> foretold (error), by a fit to the other loads"]
    for each in foretold:
        parts = [
            f"{name} {each.measured[name]:.4g} -> {each.foretold[name]:.4g} ({error:+.1%})"
            for name, error in each.error.items()
            if error is not None
        ]
        lines.append(f"  {each.load}: {', '.join(parts)}")
    for name, errors in summary(foretold).items():
        lines.append(
            f"{name}: median error {errors['median']:.1%}, largest {errors['largest']:.1%}"
        )
    return "\n".join(lines)
