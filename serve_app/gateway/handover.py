"""A stream that begins in the fast lane and continues in the full lane if its replica fails.

vllm-rs writes the ids of an event's tokens into the event (`return_token_ids`), where vLLM's Python
application writes marks before it (continuation.py). The two also divide an answer into events
differently: vllm-rs sends the finish reason in a separate event, or holds an incomplete character
back for longer. So the gateway compares the text that the client has, and not a number of events.
The continuing engine gets the tokens and repeats their text, and the gateway removes the text that
the client has from the first events.

Only for answers whose events contain nothing but text and token ids: one choice of chat or
completions, without logprobs and tools.
"""

import re
from typing import Any

import msgspec

from serve_app import events, sse
from serve_app.continuation import EngineReportedDead, Malformed, Method, Stream
from serve_app.errors import CannotContinue
from serve_app.sse import DATA

_DONE = DATA + sse.DONE
# A quote within a text is escaped, so that this matches no text.
_IDS = re.compile(rb',"(?:prompt_)?token_ids":(?:\[[\d,]*\]|null)')


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: Any = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None

    @property
    def new_text(self) -> str:
        return self.text or (self.delta is not None and self.delta.content) or ""

    @property
    def has_more(self) -> bool:
        """Whether there is anything that is not continued by its text."""
        return self.delta is not None and bool(self.delta.reasoning or self.delta.tool_calls)


class _Chunk(msgspec.Struct):
    choices: list[_Choice]
    usage: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class FastStream(Stream):
    """One stream of chat or completions, from vllm-rs until it is asked to `restart`.

    Args:
        with_ids: whether the client asked for token ids.
    """

    def __init__(self, with_ids: bool = False) -> None:
        super().__init__()
        self._fast, self._with_ids = True, with_ids
        self._texts: list[str] = []
        self._finished = self._counted = False
        # Of a continuation: the text and the number of token ids that the client has, how much of
        # them was repeated, and whether an event came.
        self._client_text, self._repeated_characters, self._begun = "", 0, False
        self._sent_ids = self._client_ids = 0

    def restart(self) -> None:
        super().restart()
        self._fast, self._skip = False, 0
        self._texts = ["".join(self._texts)]
        self._client_text, self._repeated_characters, self._begun = self._texts[0], 0, False
        self._client_ids = self._sent_ids

    def _new(self, event: bytes) -> bytes | None:
        failed = events.error_code(event) is not None
        if self.method is Method.NEVER and not self._fast:
            raise CannotContinue(
                "The replica that generated this response failed, and no other replica can "
                "continue it exactly. Try again."
            )
        if failed and self._fast:
            raise EngineReportedDead(event[:200].decode("utf-8", "replace"))
        if failed or self.ended or event == _DONE:
            if not (failed or self.ended or self._finished):
                raise Malformed("it ends without a finish reason")
            return super()._new(event)
        if not event.startswith(DATA):
            raise Malformed("not an event of an answer")
        try:
            chunk = _decode(event[len(DATA) :])
        except (ValueError, RecursionError) as error:
            raise Malformed(f"not an event of an answer: {error}") from error
        return self._of_fast(event, chunk) if self._fast else self._of_full(event, chunk)

    def _of_fast(self, event: bytes, chunk: _Chunk) -> bytes | None:
        if not chunk.choices:
            self._counted = self._counted or chunk.usage is not None
            return event
        choice = chunk.choices[0]
        if choice.token_ids:
            self.progress.groups.append(choice.token_ids)
            self._sent_ids += len(choice.token_ids)
        if text := choice.new_text:
            self._texts.append(text)
        if choice.finish_reason is not None:
            self._finished = True
            self.progress.finish, self.progress.stop = choice.finish_reason, choice.stop_reason
        elif choice.has_more:
            self._unmarked = True  # The client gets it, and no other replica can continue it.
        elif not (text or self._with_ids or (choice.delta is not None and choice.delta.role)):
            return None  # Without token ids it would hold nothing.
        if not self._begun:
            self._begun = True
            self._names.with_first_names(event)
        return event if self._with_ids else _IDS.sub(b"", event)

    def _of_full(self, event: bytes, chunk: _Chunk) -> bytes | None:
        """An event of the full lane, less what the client has of it.

        Raises:
            CannotContinue: the client has another text.
        """
        if not self._begun:
            self._begun = True
            self._names.learn(event)
        if not chunk.choices:
            given, self._counted = self._counted, True
            return None if given else self._names.with_first_names(event)
        choice = chunk.choices[0]
        text = self._without_client_text(choice.new_text)
        ids = choice.token_ids or []
        repeated = min(self._client_ids, len(ids))
        self._client_ids -= repeated
        if self._finished or not (text or ids[repeated:] or choice.finish_reason):
            return None
        self._texts.append(text)
        self._sent_ids += len(ids) - repeated
        self._finished = choice.finish_reason is not None
        event = self._names.with_first_names(event)
        if text == choice.new_text and not repeated and b'"prompt_token_ids":[' not in event:
            return event
        return _with(event, text, ids[repeated:])

    def _without_client_text(self, text: str) -> str:
        start = self._repeated_characters
        client_part = self._client_text[start : start + len(text)]
        if not text.startswith(client_part):
            raise CannotContinue(
                "The replica that generated this response failed, and another one generated "
                "another text. Try again."
            )
        self._repeated_characters += len(client_part)
        return text[len(client_part) :]


def _with(event: bytes, text: str, ids: list[int]) -> bytes:
    """The same event with another text and other token ids."""
    data: dict[str, Any] = msgspec.json.decode(event[len(DATA) :])
    choice = data["choices"][0]
    for part in (data, choice):
        if part.get("prompt_token_ids") is not None:
            part["prompt_token_ids"] = None
    if choice.get("token_ids") is not None:
        choice["token_ids"] = ids
    if "delta" in choice:
        choice["delta"]["content"] = text
    else:
        choice["text"] = text
    return DATA + msgspec.json.encode(data)
