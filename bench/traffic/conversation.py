"""The next prompt of a session: the conversation so far, with the server's own answers.

Pure: it gets the requests and the answers. A prompt grows by its answer and the next message, so a
server with a prefix cache has computed all of it except the end.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.records import Record
from bench.traffic.request import Request
from bench.traffic.schedule import Planned

_Messages = list[dict[str, Any]]


class Script:
    """Requests that wait for one another.

    Args:
        planned: whole sessions, and requests that stand alone.
        chat: whether messages are sent; otherwise text, a paragraph for each message.

    Attributes:
        first: what waits for nothing, in the order of the plan.
    """

    def __init__(self, planned: Sequence[Planned], chat: bool) -> None:
        self._chat = chat
        self.first = [item for item in planned if not item.after]
        self._missing = {item.index: len(set(item.after)) for item in planned if item.after}
        self._next: dict[int, list[Planned]] = {}
        for item in planned:
            for before in set(item.after):
                self._next.setdefault(before, []).append(item)
        contexts = (item.request.context for item in planned)
        self._continued = Counter(before for before in contexts if before is not None)
        self._histories: dict[int, _Messages] = {}
        self._tokens: dict[int, int | None] = {}

    def is_followed(self, item: Planned) -> bool:
        """Whether something waits for its answer, which must then be read at once."""
        return item.index in self._next

    def request(self, item: Planned) -> Request:
        """What to send, when all that it waits for is over."""
        request, before = item.request, item.request.context
        if item.session is None:
            return request
        messages = _messages(request.prompt)
        if before is not None:
            messages = [*self._histories[before], *messages]
            request = self._grown(request, before)
            self._forget(before)
        if item.index in self._continued:
            self._histories[item.index] = messages
        if self._chat:
            return msgspec.structs.replace(request, prompt=messages)
        text = "\n".join(str(message["content"]) for message in messages)
        return msgspec.structs.replace(request, prompt=text)

    def over(self, item: Planned, record: Record) -> list[Planned]:
        """What may be sent now. After a failure nothing that waits for it is ever sent."""
        if not record.ok:
            return []
        if item.index in self._histories:
            self._histories[item.index].append({"role": "assistant", "content": record.text})
            read, written = record.input_tokens, record.output_tokens
            counted = read is not None and written is not None
            self._tokens[item.index] = (read or 0) + (written or 0) if counted else None
        released = []
        for waiting in self._next.get(item.index, ()):
            self._missing[waiting.index] -= 1
            if not self._missing[waiting.index]:
                released.append(waiting)
        return released

    def _grown(self, request: Request, before: int) -> Request:
        """The request with the length of its whole prompt, and the share that was sent before."""
        tokens = self._tokens.get(before)
        if tokens is None or request.input_tokens is None:
            return msgspec.structs.replace(request, input_tokens=None, shared=1.0)
        whole = tokens + request.input_tokens
        return msgspec.structs.replace(request, input_tokens=whole, shared=tokens / whole)

    def _forget(self, before: int) -> None:
        """Drop a conversation that nothing else continues."""
        self._continued[before] -= 1
        if not self._continued[before]:
            self._histories.pop(before)


def _messages(prompt: str | list[int] | list[dict[str, Any]]) -> _Messages:
    """A prompt as messages of their own."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [message for message in prompt if isinstance(message, dict)]
