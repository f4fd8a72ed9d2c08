"""The page of a chaos run: every user's answers over time, and the disturbances.

One HTML file that needs nothing else. A lane is a user: its answers follow each other, and where
one stood still for long there is a gap in its line, which should begin at a disturbance.
"""

import html
import string
from collections.abc import Iterable, Mapping, Sequence

from bench.digits import distinct
from bench.faults.damage import Chaos, Judged
from bench.faults.gaps import Lengths
from serve_app.document import document

_WIDTH, _LANE, _HEAD = 1100, 9, 16  # In the SVG's own units.
_COLOURS = 6

_STYLE = """\
.state { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
code { font-size: .84rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 60rem; height: auto; }
svg text { font: 9px system-ui, sans-serif; fill: var(--muted); }
"""
_BODY = string.Template("""\
<p class="state $state">$verdict</p>
<p><code>$command</code></p>
<p>$about</p>
$doubts
<h2>What was wrong</h2>
<div>$faults</div>
<h2>What happened, and the pauses that belong to it</h2>
<div>$kinds</div>
<h2>Over time</h2>
<p>A lane is a user, a line an answer, from its request to its end. A gap in a line is a silence of
$gap s or more; orange is an answer that was lost or wrong, ochre one that differs by a tie. Dashed
lines are disturbances: $legend.</p>
<div>$lanes</div>
<h2>Answers with a fault</h2>
<div>$faulty</div>
""")


def page(result: Chaos, judged: Sequence[Judged]) -> str:
    """The result as an HTML page.

    Args:
        judged: the records of the result.
    """
    answered, kinds = result.answers, list(result.disturbances)
    about = (
        f"{answered.asked} answers ({answered.streamed} of them streams) to "
        f"{result.workload}, {result.load}: {answered.equal} equal the undisturbed one, "
        f"{answered.ties} differ by a tie within {result.tie_margin:g} nats."
    )
    wrong = {kind: count for kind, count in result.faults.items() if count}
    legend = [f'<span style="color:{_colour(n)}">{_text(k)}</span>' for n, k in enumerate(kinds)]
    body = _BODY.substitute(
        state="good" if result.valid else "bad",
        verdict=_text(_verdict(result, wrong)),
        command=_text(result.command),
        about=_text(about),
        doubts="".join(f"<p>{_text(doubt)}</p>" for doubt in result.doubts),
        faults=_faults(result),
        kinds=_kinds(result),
        gap=f"{result.silences.from_s:g}",
        legend=", ".join(legend) or "none",
        lanes=_lanes(result, judged, kinds),
        faulty=_examples(result),
    )
    return document(result.name, body, _STYLE)


def _verdict(result: Chaos, wrong: Mapping[str, int]) -> str:
    if wrong:
        return "Wrong answers: " + ", ".join(f"{count} {kind}" for kind, count in wrong.items())
    return "Nothing was lost, doubled, missing or different." if result.valid else "Not valid."


def _faults(result: Chaos) -> str:
    rows = [(kind, str(count)) for kind, count in result.faults.items()]
    for what, counts in (("doubled", result.doubled), ("missing", result.missing)):
        rows += [(f"{unit} {what}", str(n)) for unit, n in counts.items() if n]
    errors = result.answers.errors.items()
    return _table(("fault", "answers"), rows) + (
        _table(("error", "answers"), [(error, str(count)) for error, count in errors])
        if errors
        else ""
    )


def _kinds(result: Chaos) -> str:
    heads = ["disturbance", "done", "not done", "waited, most", "answers met", "lost"]
    heads += ["pauses", "p50 s", "p99 s", "longest s", "longest without the machine's stalls"]
    rows = []
    for kind, effect in result.disturbances.items():
        not_done = "; ".join(f"{count}: {why}" for why, count in effect.not_done.items())
        cells = [kind, str(effect.done), not_done, _number(effect.waited_s)]
        cells += [str(effect.met), str(effect.lost)]
        own = _number(effect.pauses_without_stalls.max_s)
        rows.append([*cells, *_lengths(effect.pauses), own])
    silences = result.silences
    for name, each in (("all streams", silences.all), ("streams that paused", silences.paused)):
        rows.append([name, "", "", "", "", "", *_lengths(each), ""])
    return _table(heads, rows)


def _lengths(each: Lengths) -> tuple[str, ...]:
    return (str(each.count), *(_number(value) for value in (each.p50_s, each.p99_s, each.max_s)))


def _examples(result: Chaos) -> str:
    if not result.faulty:
        return "<p>None.</p>"
    rows = []
    for example in result.faulty:
        verdict = example.verdict
        reasons = [example.error, verdict.finish, verdict.usage, verdict.identity]
        at = verdict.parted_at
        rows.append(
            (
                str(example.index),
                ", ".join(example.faults),
                "; ".join(reason for reason in reasons if reason),
                "" if at is None else f"{verdict.unit} from {at}",
                "" if example.received is None else str(example.received),
                "" if example.expected is None else str(example.expected),
                _number(verdict.margin),
            )
        )
    heads = ("answer", "faults", "what", "parts", "received", "expected", "margin")
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


# --- the lanes ------------------------------------------------------------------------------


def _lanes(result: Chaos, judged: Sequence[Judged], kinds: Sequence[str]) -> str:
    until_s = max([result.duration_s or 0.0, *(record.end_s or 0.0 for record in judged), 1e-3])
    users = 1 + max((record.user or 0 for record in judged), default=0)
    height = _HEAD + users * _LANE + _HEAD
    scale = _WIDTH / until_s
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Answers of each user">']
    for event in result.done:
        if not event.error:
            x, colour = event.at_s * scale, _colour(kinds.index(event.kind))
            what = _text(f"{event.at_s:.1f} s: {event.kind}, {event.what}")
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD - 6}" y2="{height - _HEAD}" '
                f'stroke="{colour}" stroke-dasharray="2 2"><title>{what}</title></line>'
            )
    for record in judged:
        parts.append(_line(record, scale, result.silences.from_s))
    for tenth, label in enumerate(clock(until_s)):
        x, anchor = _WIDTH * tenth / 10, ("start", "middle", "end")[(tenth > 0) + (tenth > 9)]
        parts.append(f'<text x="{x:.0f}" y="{height - 3}" text-anchor="{anchor}">{label}</text>')
    return "\n".join([*parts, "</svg>"])


def clock(until_s: float) -> list[str]:
    """The labels of the time axis at each tenth of it."""
    ticks_s = [until_s * tenth / 10 for tenth in range(11)]
    return [f"{distinct(tick_s, ticks_s)} s" for tick_s in ticks_s]


def _line(record: Judged, scale: float, gap_s: float) -> str:
    """One answer: its line, broken where it stood still."""
    if record.sent_s is None or record.end_s is None:
        return ""
    verdict, y = record.verdict, _HEAD + _LANE * ((record.user or 0) + 0.5)
    wrong = verdict is not None and bool(verdict.faults)
    tie = verdict is not None and verdict.tie
    colour = "var(--series-1)" if wrong else "var(--series-4)" if tie else "var(--series-0)"
    caption = f"answer {record.index}: {record.sent_s:.1f} to {record.end_s:.1f} s"
    if verdict and wrong:
        caption += f", {', '.join(verdict.faults)}"
    pieces = [(record.sent_s, record.end_s)]
    if record.silent_s is not None and record.silent_from_s is not None:
        caption += f", silent for {record.silent_s:.2f} s"
        if record.silent_s >= gap_s:
            silent_to_s = record.silent_from_s + record.silent_s
            pieces = [(record.sent_s, record.silent_from_s), (silent_to_s, record.end_s)]
    lines = "".join(
        f'<path d="M{from_s * scale:.1f} {y:.1f}H{max(to_s * scale, from_s * scale + 0.8):.1f}"/>'
        for from_s, to_s in pieces
    )
    return f'<g stroke="{colour}" stroke-width="3"><title>{_text(caption)}</title>{lines}</g>'


def _colour(number: int) -> str:
    return f"var(--series-{(number + 2) % _COLOURS})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _text(value: object) -> str:
    return html.escape(str(value))
