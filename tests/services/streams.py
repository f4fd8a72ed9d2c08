"""An answer as each API streams it: how vLLM writes its events, and what a client reads of them."""

import json
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PATHS = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str = "") -> bytes:
    """An event, whose JSON has characters as they are, as pydantic writes them."""
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def _named(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)


def failure(path: str) -> bytes:
    """What vLLM writes where a request fails after its response began."""
    if path in (COMPLETIONS, CHAT):
        error = {"message": "told to", "type": "InternalServerError", "param": None, "code": 500}
        return event({"error": error}) + DONE
    if path == MESSAGES:
        return _named("error", error={"type": "internal_error", "message": "told to"})
    error = {"code": "server_error", "message": "told to"}
    return _named("response.failed", response={"status": "failed", "error": error})


@dataclass(frozen=True)
class Writer:
    """One stream of a replica, which gives it names of its own."""

    path: str
    name: str

    @property
    def _head(self) -> dict[str, Any]:
        return {"id": f"{self.name}-0", "created": sum(map(ord, self.name))}

    def before(self) -> list[bytes]:
        """What comes before the first token."""
        if self.path != RESPONSES:
            return []
        response = {**self._head, "status": "in_progress", "error": None}
        kinds = ("response.created", "response.in_progress")
        return [_named(kind, response=response) for kind in kinds]

    def group(self, text: str, first: bool, last: bool) -> list[bytes]:
        """The events of one group of tokens."""
        finish = "length" if last else None
        item = {"item_id": f"{self.name}-item"}
        if self.path == COMPLETIONS:
            return [event({**self._head, "choices": [{"text": text, "finish_reason": finish}]})]
        if self.path == CHAT:
            begin = [self._delta({"role": "assistant", "content": ""}, None)] if first else []
            return [*begin, self._delta({"content": text}, finish)]
        if self.path == RESPONSES:
            added = [
                _named("response.output_item.added", item={"id": item["item_id"]}),
                _named("response.content_part.added", **item),
            ]
            delta = _named("response.output_text.delta", **item, delta=text)
            return [*(added if first else []), delta]
        begun = [
            _named("message_start", message={"id": f"{self.name}-0", "content": []}),
            _named("content_block_start", index=0),
        ]
        delta = _named("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        return [*(begun if first else []), delta]

    def after(self, whole: str) -> list[bytes]:
        """What comes after the last token."""
        if self.path == COMPLETIONS:
            return [DONE]
        if self.path == CHAT:
            usage = {"prompt_tokens": 1, "completion_tokens": 10, "total_tokens": 11}
            return [event({**self._head, "choices": [], "usage": usage}), DONE]
        if self.path == RESPONSES:
            response = {**self._head, "status": "completed", "error": None, "output": [whole]}
            done = _named("response.output_text.done", item_id=f"{self.name}-item", text=whole)
            return [done, _named("response.completed", response=response)]
        stop = _named("message_delta", delta={"stop_reason": "max_tokens"})
        return [_named("content_block_stop", index=0), stop, _named("message_stop")]

    def _delta(self, delta: dict[str, Any], finish: str | None) -> bytes:
        return event({**self._head, "choices": [{"delta": delta, "finish_reason": finish}]})


@dataclass
class Read:
    """What a client makes of a whole body.

    Attributes:
        ids: of the answer; more than one would be two answers in one.
        finishes: each reason to end.
        ends: the last event of its API came, this often.
        failed: an error event came.
        last: the last event; empty where there is none.
    """

    text: str = ""
    finishes: int = 0
    ends: int = 0
    failed: bool = False
    last: bytes = b""

    def __post_init__(self) -> None:
        self.ids: set[str] = set()

    @classmethod
    def of(cls, body: bytes) -> "Read":
        read = cls()
        for each in body.split(b"\n\n"):
            if each and not each.startswith(b":"):
                read.last = each
                read._take(each)
        return read

    def _take(self, each: bytes) -> None:
        line = each.split(b"\n")[-1].removeprefix(b"data: ")
        if line == b"[DONE]":
            self.ends += 1
            return
        try:
            data = json.loads(line)
        except ValueError:
            return  # A planted one.
        if not isinstance(data, dict):
            return
        kind = data.get("type")
        self.failed |= "error" in data or kind in ("error", "response.failed")
        self.ends += kind in ("response.completed", "message_stop")
        whole = data.get("response") or data.get("message") or data
        self.ids |= {whole["id"]} if isinstance(whole, dict) and "id" in whole else set()
        for choice in data.get("choices") or []:
            self.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            self.finishes += bool(choice.get("finish_reason"))
        delta = data.get("delta")
        if isinstance(delta, dict):
            self.text += delta.get("text", "")
            self.finishes += "stop_reason" in delta
        elif delta:
            self.text += delta
        self.finishes += kind == "response.completed"
