"""Whether answers match their requests: odd ones, short ones, and those from a cache.

A prompt that an earlier run has sent is answered from the server's prefix cache, and its time to
first token is that of another load. The cache may hold what other prompts of the workload begin
with, what the server itself puts around every prompt (a chat template), and nothing else.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from bench.records import Record

# What rounding to blocks and the tokenizer explain, as a share of a prompt.
_SLACK = 0.02
# What a chat template may put in front, where nobody knows how long the prompt itself is.
_TEMPLATE_TOKENS = 64


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """Of the successes of a repeat.

    Attributes:
        odd: how many cannot be believed, by what is odd; `odd_texts`: one text of each.
        given_output_share: output tokens, as a share of those that were asked for, of answers that
            were to have a certain length; None where there are none.
        input_tokens, output_tokens: of the mean request; None where no usage says it.
        cached_share: of the prompt tokens, what came from the prefix cache; None where no usage
            says it.
        unexplained_cached_share: of the prompt tokens, what came from the cache though no other
            prompt of the workload begins so.
    """

    odd: dict[str, int] = {}
    odd_texts: dict[str, str] = {}
    given_output_share: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    cached_share: float | None = None
    unexplained_cached_share: float | None = None


def answers(successes: Sequence[Record]) -> Answers:
    odd = [record for record in successes if record.odd]
    fixed = [r for r in successes if not r.limit and r.output_tokens is not None]
    requested = sum(r.asked_output_tokens or 0 for r in fixed)
    given = sum(r.output_tokens or 0 for r in fixed if r.asked_output_tokens)
    usage = [record for record in successes if record.cached_tokens is not None]
    read = sum(record.input_tokens or 0 for record in usage)
    return Answers(
        odd=dict(Counter(map(_class, odd)).most_common()),
        odd_texts={_class(record): record.odd for record in odd[::-1]},
        given_output_share=given / requested if requested else None,
        input_tokens=_mean(record.input_tokens for record in successes),
        output_tokens=_mean(record.output_tokens for record in successes),
        cached_share=sum(r.cached_tokens or 0 for r in usage) / read if read else None,
        unexplained_cached_share=sum(map(_unexplained, usage)) / read if read else None,
    )


def may_be_cached_share(successes: Sequence[Record]) -> float | None:
    """The share of the prompt tokens that a prefix cache may answer; None where nothing is read."""
    read = sum(record.input_tokens or 0 for record in successes)
    return sum(map(_may_be_cached, successes)) / read if read else None


def _class(record: Record) -> str:
    return record.odd.partition(":")[0]


def _unexplained(record: Record) -> int:
    """Prompt tokens from the cache that the workload and the server's template do not explain."""
    return max(0, (record.cached_tokens or 0) - _may_be_cached(record))


def _may_be_cached(record: Record) -> int:
    """Prompt tokens that other prompts share, and those that a template adds to all of them."""
    read, requested = record.input_tokens or 0, record.asked_input_tokens
    added = _TEMPLATE_TOKENS if requested is None else max(0, read - requested)
    return min(read, added + round((record.shared + _SLACK) * read))


def _mean(values: Iterable[int | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
