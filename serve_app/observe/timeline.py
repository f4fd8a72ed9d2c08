"""The times of an answer's tokens that did not pass through this process."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.replica.reports import Ended

# The engine's name for a request whose client left.
_ABORTED = "abort"


@dataclass(frozen=True)
class Timeline:
    """The engine's account of one answer, for the Meter.

    Attributes:
        status: that the client got.
        first_s, last_s: of its tokens, on the monotonic clock; None: it has none.
        left: the client left before the end.
        broken: the engine gave no account of it, or an error.
    """

    status: int
    first_s: float | None = None
    last_s: float | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    left: bool = False
    broken: bool = False
    cached_tokens: int = 0

    @classmethod
    def of(cls, ended: "Ended | None", status: int) -> "Timeline":
        if ended is None:
            return cls(status, broken=status == 200)
        return cls(
            status,
            ended.first_s,
            ended.last_s if ended.first_s is not None else None,
            ended.prompt_tokens,
            ended.generated_tokens,
            left=ended.reason == _ABORTED,
            broken=ended.reason == "error",
            cached_tokens=ended.cached_tokens,
        )
