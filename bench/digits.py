"""Numbers as text, with as many digits as they need."""

import math
from collections.abc import Iterable


def distinct(value: float, ticks: Iterable[float]) -> str:
    """A tick in as few digits, three at least, as tell it from the others."""
    others = {float(tick) for tick in ticks}
    for digits in range(3, 16):
        if len({plain(tick, digits=digits) for tick in others}) == len(others):
            break
    return plain(value, digits=digits)


def plain(value: float, digits: int = 3) -> str:
    """A number with this many significant digits, without an exponent and trailing zeros."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text
