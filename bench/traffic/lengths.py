"""How long a prompt or an answer is: a fixed number of tokens, or one that is drawn."""

import math
import random
import re
from dataclasses import dataclass, replace

from bench import spec
from bench.errors import WorkloadError

MAX_TOKENS = 1_000_000
_EXAMPLES = ("200", "uniform(50;300)", "lognormal(200;0.5)")
_DRAWN = re.compile(r"(?P<name>uniform|lognormal)\((?P<first>[^;,]*)[;,](?P<second>[^;,]*)\)")


@dataclass(frozen=True)
class Length:
    """A number of tokens: one (`low`), one from a range, or one around a median with a long tail.

    Attributes:
        low, high: both included; equal for a fixed length.
        sigma: of the logarithm; 0 unless lognormal, whose median is `low`.
        maximum: longer ones are clipped to it.
    """

    low: int
    high: int
    sigma: float = 0.0
    maximum: int = MAX_TOKENS

    def draw(self, rng: random.Random) -> int:
        if self.sigma:
            drawn = round(rng.lognormvariate(math.log(self.low), self.sigma))
        else:
            drawn = rng.randint(self.low, self.high)
        return min(max(1, drawn), self.maximum)


def length(
    options: spec.Options, key: str, maximum: int = MAX_TOKENS, default: str | None = None
) -> Length:
    """The length that an option says; `default` where the option is absent.

    Raises WorkloadError, which names the option and what is wrong with its value.
    """
    value = options.text(key, default)
    match = _DRAWN.fullmatch(value)
    if match is None:
        if value[:1].isalpha():
            raise WorkloadError.of(key, value, "not a length", _EXAMPLES)
        tokens = replace(options, values={key: value}).whole(key, minimum=1, maximum=MAX_TOKENS)
        return Length(tokens, tokens, maximum=maximum)
    # The two are read as options are, and named in errors as parts of this one.
    lognormal = match["name"] == "lognormal"
    first, second = ("median", "sigma") if lognormal else ("low", "high")
    names = f"{key}: {first} of {value}", f"{key}: {second} of {value}"
    values = {names[0]: match["first"].strip(), names[1]: match["second"].strip()}
    parts = replace(options, values=values)
    low = parts.whole(names[0], minimum=1, maximum=MAX_TOKENS)
    if lognormal:
        return Length(low, low, parts.number(names[1], above=0.0, maximum=5.0), maximum)
    return Length(low, parts.whole(names[1], minimum=low, maximum=MAX_TOKENS), maximum=maximum)


def clipped(tokens: float, maximum: int | None) -> int:
    """A whole number of tokens, from 1 to `maximum`."""
    whole = max(1, round(tokens))
    return whole if maximum is None else min(whole, maximum)
