"""A matplotlib figure that becomes an SVG element of a page.

A figure is drawn once for light and dark pages: every colour is a placeholder in matplotlib and
becomes a CSS variable of the page in the SVG (`--ink`, `--muted`, `--grid`, `--series-0` ..),
backgrounds are transparent, and text stays text in the page's own font. Ids are prefixed, because
matplotlib uses the same ids in every SVG.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import msgspec
from matplotlib.figure import Figure

SERIES_COLOURS = 6
INK, MUTED, GRID = "#0a0b10", "#0a0b11", "#0a0b12"
SERIES = [f"#0a0b0{index}" for index in range(SERIES_COLOURS)]
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)},
}
_ALONE = ("#0b62a8", "#c4520a", "#2c7a3f", "#7b3fa0", "#8a6d00", "#5b6470")
_TIP_RADIUS = 4
_POINTS_PER_INCH = 72
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


class Tip(msgspec.Struct, frozen=True, kw_only=True):
    """What a point of a plot says when pointed at. It is not seen."""

    axis: Any
    x: float
    y: float
    text: str

    def element(self, page: "_Page") -> str:
        across, up = page.place(self.axis.transData.transform((self.x, self.y)))
        return f'<circle cx="{across:.2f}" cy="{up:.2f}" r="{_TIP_RADIUS}"'


class StripTip(msgspec.Struct, frozen=True, kw_only=True):
    """What a span of the x axis says, at any height."""

    axis: Any
    from_x: float
    to_x: float
    text: str

    def element(self, page: "_Page") -> str:
        bounds = self.axis.bbox
        left, right = self.axis.transData.transform([(self.from_x, 1), (self.to_x, 1)])[:, 0]
        at, top = page.place((left, bounds.y1))
        end, bottom = page.place((right, bounds.y0))
        size = f'width="{end - at:.2f}" height="{bottom - top:.2f}"'
        return f'<rect x="{at:.2f}" y="{top:.2f}" {size}'


class _Page:
    """Where the pixels of a figure are in its SVG."""

    def __init__(self, figure: Figure) -> None:
        self._scale = _POINTS_PER_INCH / figure.dpi
        self._height = figure.get_figheight() * _POINTS_PER_INCH

    def place(self, pixel: Any) -> tuple[float, float]:
        return self._scale * pixel[0], self._height - self._scale * pixel[1]


class Plot(Figure):
    """A figure with tips. They are no artists of matplotlib, whose layout would measure each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tips: list[Tip | StripTip] = []


@contextmanager
def figure(width_in: float, height_in: float) -> Iterator[Plot]:
    """A figure of its own: no pyplot, hence nothing global to close."""
    with matplotlib.rc_context(_STYLE):
        yield Plot(figsize=(width_in, height_in), layout="constrained", dpi=110)


def add_tip(axis: Any, x: float, y: float, text: str) -> None:
    axis.figure.tips.append(Tip(axis=axis, x=x, y=y, text=_printable(text)))


def add_strip_tip(axis: Any, from_x: float, to_x: float, text: str) -> None:
    axis.figure.tips.append(StripTip(axis=axis, from_x=from_x, to_x=to_x, text=_printable(text)))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def standalone(svg: str) -> str:
    """An SVG that can be opened by itself: with the colours that a page would give it."""
    style = "--ink:#1b1f24;--muted:#5b6470;--grid:#d9dee4;--plot-font:sans-serif;" + "".join(
        f"--series-{index}:{colour};" for index, colour in enumerate(_ALONE)
    )
    return svg.replace("<svg ", f'<svg style="{style}background:#fff" ', 1)


def svg(figure: Plot, prefix: str, label: str) -> str:
    """The figure as an SVG element for a page: own ids, the page's colours and font."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}), warnings.catch_warnings():
        # Matplotlib only lays text out; the page's fonts draw what its own do not have.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}-', text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: var(--plot-font)", text)
    text = re.sub(r"(<svg[^>]*?) width=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"(<svg[^>]*?) height=\"[^\"]*\"", r"\1", text, count=1)
    text = re.sub(r"\n\s*", "\n", text)
    text = text.replace("</svg>", f"{_tips(figure)}</svg>")
    return text.replace(
        "<svg ", f'<svg class="plot" role="img" aria-label="{html.escape(label)}" ', 1
    )


def _tips(figure: Plot) -> str:
    """Unseen shapes over what says something, laid out as the figure was saved."""
    page = _Page(figure)
    elements = [(tip.element(page), html.escape(tip.text, quote=False)) for tip in figure.tips]
    return "".join(
        f'{element} fill="transparent"><title>{text}</title></{element[1:].split()[0]}>\n'
        for element, text in elements
        if "nan" not in element and "inf" not in element  # Such as 0 on a log axis.
    )
