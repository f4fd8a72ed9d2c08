"""A picture of starts: one row each, with its phases from left to right in time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from serve_app.observe.phases import Span

_WIDTH, _LEFT, _ROW, _BAR, _LEGEND = 980, 190, 26, 18, 16
# Told apart by every kind of colour blindness as far as so many can be; each bar says its phase
# when pointed at.
_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#0a6e6e",
    "#994455", "#997700", "#6699cc", "#eecc66", "#ee99aa", "#004488", "#117733", "#882255",
    "#ddcc77", "#332288", "#888888",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One start: its label, and its pieces on one clock."""

    title: str
    pieces: Sequence[Span]

    @property
    def took_s(self) -> float:
        return self.pieces[-1].ended_s - self.pieces[0].began_s if self.pieces else 0.0


def svg(rows: Sequence[Row]) -> str:
    """The picture, which stands for itself in a light or a dark page."""
    longest_s = max((row.took_s for row in rows), default=0.0) or 1.0
    per_s = (_WIDTH - _LEFT - 70) / longest_s
    names = list(dict.fromkeys(piece.phase for row in rows for piece in row.pieces))
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}
    parts = [
        _row(row, place * _ROW, per_s, colours) for place, row in enumerate(rows) if row.pieces
    ]
    below = len(rows) * _ROW + 10
    columns = 5
    for place, name in enumerate(names):
        x = 10 + (place % columns) * (_WIDTH - 20) / columns
        y = below + (place // columns) * _LEGEND
        parts.append(
            f'<rect x="{x:.0f}" y="{y}" width="10" height="10" fill="{colours[name]}"/>'
            f'<text x="{x + 14:.0f}" y="{y + 9}" class="small">{escape(name)}</text>'
        )
    height = below + (-(-len(names) // columns)) * _LEGEND + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" fill="#808080">'
        "<style>.small{font-size:11px}</style>" + "".join(parts) + "</svg>\n"
    )


def _row(row: Row, y: float, per_s: float, colours: Mapping[str, str]) -> str:
    first_s = row.pieces[0].began_s
    middle = y + _BAR - 4
    bars = "".join(
        f'<rect x="{_LEFT + (piece.began_s - first_s) * per_s:.1f}" y="{y + 1:.0f}" '
        f'width="{max(0.5, (piece.ended_s - piece.began_s) * per_s):.1f}" height="{_BAR}" '
        f'fill="{colours[piece.phase]}"><title>{escape(piece.phase)} '
        f"{piece.ended_s - piece.began_s:.2f} s</title></rect>"
        for piece in row.pieces
    )
    end = _LEFT + row.took_s * per_s
    return (
        f'<text x="{_LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(row.title)}</text>'
        f'{bars}<text x="{end + 6:.1f}" y="{middle:.0f}">{row.took_s:.1f} s</text>'
    )
