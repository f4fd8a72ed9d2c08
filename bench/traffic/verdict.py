"""Whether an answer with status 200 is one: what contradicts itself is a failure, or unknown.

A server that says it has written 160 tokens of a text of 30 bytes is not to be believed, and a
figure made of that is wrong. So an answer without output has failed; token counts that cannot be
are not counted; and an answer that came all at once has no time between its tokens.
"""

from bench.records import Record

ONE_PIECE = "one piece"
LATE_OUTPUT = "late output: text came after the finish reason"
# No engine writes a stream faster, so what comes closer together was held back on its way.
_FASTEST_TOKEN_S = 100e-6
_READ_AT_ONCE = 12
# Fewer events say little of the time between so many tokens.
_FEWEST_EVENTS = 4
# More tokens an event than a server sends that leaves out tokens which are not shown.
_TOKENS_PER_EVENT = 8
# Other tokenizers and chat templates explain less.
_PROMPT_RATIO, _PROMPT_TEMPLATE = 5, 1000
# A text may have as many tokens as bytes, and a few more that are not shown.
_HIDDEN_TOKENS = 16
# The longest tokens are runs of spaces; a whole text has far fewer bytes a token.
_BYTES_PER_TOKEN, _FEW_BYTES = 32, 64
_BROKEN = ("abort", "aborted", "error", "cancelled")


def judge(record: Record, streamed: bool = True, answers: int = 1) -> None:
    """Mark what is wrong with a complete answer, in its record.

    Args:
        streamed: whether a stream was asked for.
        answers: how many were asked for (`n`).
    """
    if record.error or record.odd:
        return
    if record.finish_reason in _BROKEN:
        record.error = f"broken off: the server ended it with {record.finish_reason!r}"
    elif not record.chunk_s:
        _without_output(record)
    elif record.choices > answers:
        record.odd = f"choices: {record.choices} answers came, and {answers} was asked for"
    elif contradiction := _contradiction(record):
        record.odd = f"usage: {contradiction}"
        record.output_tokens = None
    elif contradiction := _prompt_contradiction(record):
        record.odd = f"prompt usage: {contradiction}"
        record.input_tokens = record.cached_tokens = None
    elif streamed and in_one_piece(record):
        record.odd = f"{ONE_PIECE}: a stream was asked for, and the whole answer came at once"
    elif streamed and (what := _few_events(record)):
        record.odd = f"few events: {what}"
    elif record.finish_reason == "length" and _ends_early(record):
        record.odd = (
            f"finish: the server says 'length' after {record.output_tokens} of "
            f"{record.asked_output_tokens} tokens"
        )


def in_one_piece(record: Record) -> bool:
    """Whether an answer of several tokens came at one time.

    A busy client reads a few events at once that came one after another; not a dozen.
    """
    tokens, took_s = _tokens(record), record.chunk_s[-1] - record.chunk_s[0]
    if tokens is None:
        return took_s == 0 and record.text_bytes > _HIDDEN_TOKENS
    fewest = 2 if len(record.chunk_s) == 1 else _READ_AT_ONCE
    return tokens >= fewest and took_s <= _FASTEST_TOKEN_S * (tokens - 1)


def _few_events(record: Record) -> str:
    """Why the events do not show when the tokens came; empty where they do.

    The tokens of the first event are there before time is taken, so with few events the time
    between tokens would be too short, and a server could claim any number of tokens.
    """
    tokens, times = _tokens(record), record.chunk_s
    if tokens is None or tokens < _READ_AT_ONCE:
        return ""
    if len(times) < _FEWEST_EVENTS * record.choices:
        return f"{record.output_tokens} tokens came in {len(times)} events"
    rest = min(times[-1] - times[1], times[-2] - times[0])
    if rest <= _FASTEST_TOKEN_S * (len(times) - 2):
        return "all events but one came at once"
    return ""


def _ends_early(record: Record) -> bool:
    tokens, requested = _tokens(record), record.asked_output_tokens
    return tokens is not None and requested is not None and tokens < requested


def _without_output(record: Record) -> None:
    """Nothing came. Asked to go on after its end, a model may write only what is not shown."""
    tokens = record.output_tokens
    if tokens and tokens == record.asked_output_tokens and record.finish_reason == "length":
        record.odd = f"no text: {tokens} tokens were written, and none of them is shown"
    else:
        reported = "says nothing of" if tokens is None else f"says {tokens}"
        record.error = f"empty: the answer has no output, and the usage {reported} tokens"


def _contradiction(record: Record) -> str:
    """Why the number of output tokens cannot be; empty where it can, or is not said."""
    tokens, events, text_bytes = record.output_tokens, len(record.chunk_s), record.text_bytes
    if tokens is None:
        return ""
    reported = f"{tokens} output tokens are said"
    if tokens == 0 or tokens < 0.9 * events - 1:
        return f"{reported}, and {events} events came"
    max_tokens = record.asked_output_tokens
    if max_tokens is not None and tokens > max_tokens * record.choices:
        return f"{reported}, and at most {max_tokens * record.choices} were asked for"
    whole = record.finish_reason == "length" and tokens == max_tokens
    if (
        not (whole and tokens <= _TOKENS_PER_EVENT * events)
        and tokens - record.reasoning_tokens > text_bytes + _HIDDEN_TOKENS
    ):
        return f"{reported}, and the text has {text_bytes} bytes"
    if text_bytes > max(_FEW_BYTES, _BYTES_PER_TOKEN * tokens):
        return f"{reported}, and the text has {text_bytes} bytes"
    return ""


def _prompt_contradiction(record: Record) -> str:
    """Why the number of prompt tokens cannot be; empty where it can, or is not said."""
    tokens, requested, cached = record.input_tokens, record.asked_input_tokens, record.cached_tokens
    if tokens is None:
        return ""
    if cached is not None and not 0 <= cached <= tokens:
        return f"{cached} of {tokens} prompt tokens are said to be cached"
    if tokens <= 0:
        return f"{tokens} prompt tokens are said"
    if requested is not None and not (
        requested / _PROMPT_RATIO <= tokens <= _PROMPT_RATIO * requested + _PROMPT_TEMPLATE
    ):
        return f"{tokens} prompt tokens are said, and {requested} were sent"
    return ""


def _tokens(record: Record) -> float | None:
    """Output tokens of one of the answers of a response."""
    return None if record.output_tokens is None else record.output_tokens / record.choices
