"""The bytes that the known server sends: heads, JSON bodies, and the events of its streams."""

import json
import time
from typing import Any

MODEL = "fake"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _head(status: str, content_type: str, length: int | None, *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {content_type}", *more]
    lines += ["transfer-encoding: chunked" if length is None else f"content-length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def json_answer(status: str, body: Any, *more: str) -> bytes:
    data = _compact(body).encode()
    return _head(status, "application/json", len(data), *more) + data


def failure(status: str, kind: str, message: str, *more: str) -> bytes:
    error = {"message": message, "type": kind, "param": None, "code": int(status.split()[0])}
    return json_answer(status, {"error": error}, *more)


class Words:
    """The events of one endpoint, encoded once.

    Args:
        word: the text of each event.
        crlf: lines end with CR LF; ping: a comment stands before each event.
    """

    def __init__(self, chat: bool, word: str, crlf: bool, ping: bool) -> None:
        self._chat, self._word = chat, word
        self._end = "\r\n" if crlf else "\n"
        self._ping = f": ping{self._end}{self._end}" if ping else ""
        self.head = _head("200 OK", "text/event-stream; charset=utf-8", None)
        self.event = self._write(self._choice(word, None))
        self.last = self._write(self._choice(word, "length"))
        self.role = self._write(self._choice("", None, role="assistant")) if chat else b""
        self.error = self._write({"error": {"message": "the engine fell over", "code": 500}})
        self.done = self._write("[DONE]") + b"0\r\n\r\n"
        # A stamp is always as long as this one, so that the frame around it stays right.
        stamp = f"{time.perf_counter():017.6f} "
        self.stamped, self.stamped_last = (
            self._write(self._choice(stamp, reason))
            .replace(b"%", b"%%")
            .replace(stamp.encode(), b"%017.6f ")
            for reason in (None, "length")
        )

    def usage(self, usage: dict[str, Any]) -> bytes:
        return self._write({**self._shell(), "choices": [], "usage": usage})

    def whole(self, count: int, usage: dict[str, Any]) -> bytes:
        """An answer that is not streamed."""
        text, choice = self._word * count, {"index": 0, "finish_reason": "length"}
        output = (
            {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        )
        return json_answer(
            "200 OK", {**self._shell(), "choices": [{**choice, **output}], "usage": usage}
        )

    def _shell(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {"id": "cmpl-0123456789abcdef", "object": kind, "created": 1, "model": MODEL}

    def _choice(self, text: str, reason: str | None, role: str | None = None) -> dict[str, Any]:
        output: dict[str, Any] = {"text": text}
        if self._chat:
            output = {"delta": {"role": role, "content": text} if role else {"content": text}}
        choice = {"index": 0, **output, "logprobs": None, "finish_reason": reason}
        return {**self._shell(), "choices": [choice]}

    def _write(self, event: Any) -> bytes:
        text = event if isinstance(event, str) else _compact(event)
        return _chunk(f"{self._ping}data: {text}{self._end}{self._end}".encode())
