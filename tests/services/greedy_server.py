"""A real HTTP server that answers greedily, as a model does, and wrongly where it is told to.

    python -m tests.services.greedy_server --port 8930 --faults cut,double --every 5 --after 8

The answer to a prompt depends on the prompt alone, token by token, and comes with the ids of its
tokens, as vLLM gives them. `prompt_logprobs` say how likely each token was: the greedy one likely,
any other not, but for the one place of an answer where two are a tie.

From the request number `after` on, every `every`-th answer has one of the faults, in turn:

    refuse  503                          double  a piece comes twice
    cut     the connection is closed     skip    a piece is left out
    error   an error event               wrong   other tokens, from a place on
    usage   one token too many           tie     other tokens, each a greedy choice
    finish  a second finish reason       name    another id from a place on
    pause   stands still for a while     short   ends before its time, as if it were whole
"""

import argparse
import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from setproctitle import setproctitle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.traffic.words import WORDS

_PROMPT = 10_000  # Tokens of prompts are from here on, those of answers below.
_PLACE, _PIECE, _TOGETHER = 9, 3, 2
_NUMBERS = {word: _PROMPT + number for number, word in enumerate(WORDS)}


def right(prompt: tuple[int, ...], count: int, branch: str = "main") -> list[int]:
    rng = random.Random(f"{prompt}/{branch}")
    return [rng.randrange(1000) for _ in range(count)]


def tied(prompt: tuple[int, ...], count: int) -> list[int]:
    """The answer that is as likely: the same up to a place, and other tokens from there on."""
    return right(prompt, _PLACE) + right(prompt, count, "other")[_PLACE:]


def logprobs(ids: list[int]) -> list[dict[str, Any] | None]:
    """Of each place: the token that stands there, and the likeliest."""
    prompt = tuple(token for token in ids if token >= _PROMPT)
    answer = ids[len(prompt) :]
    branches = [right(prompt, len(answer)), tied(prompt, len(answer))]
    results: list[dict[str, Any] | None] = [None for _ in prompt]
    for place, token in enumerate(answer):
        likely = [branch[place] for branch in branches if branch[:place] == answer[:place]]
        entry = {str(each): {"logprob": -0.101 + 0.001 * (each == likely[0])} for each in likely}
        results.append({str(token): {"logprob": -5.0}, "999999": {"logprob": -0.1}} | entry)
    return results


def word(token: int) -> str:
    return f" t{token}"


class Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.faults = [fault for fault in options.faults.split(",") if fault]
        self.requests = self.dealt = 0

    def fault(self) -> str:
        self.requests += 1
        past = self.requests - self.options.after
        if not self.faults or past <= 0 or past % self.options.every:
            return ""
        self.dealt += 1
        return self.faults[(self.dealt - 1) % len(self.faults)]

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "greedy"}]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        prompt, count = body["prompt"], body["max_tokens"]
        ids = [_NUMBERS[each] for each in prompt.split()] if isinstance(prompt, str) else prompt
        if body.get("prompt_logprobs"):
            output = {"text": "", "finish_reason": "length", "prompt_logprobs": logprobs(ids)}
            return JSONResponse({"id": "x", "choices": [output], "usage": self.usage(ids, 1)})
        fault = self.fault()
        if fault == "refuse":
            return JSONResponse({"error": {"message": "no room"}}, 503)
        tokens = self.tokens(tuple(ids), count, fault)
        usage = self.usage(ids, len(tokens) + (fault == "usage"))
        if body.get("stream"):
            events = self.events(body, ids, tokens, usage, fault)
            return StreamingResponse(events, media_type="text/event-stream")
        await asyncio.sleep(self.options.itl_s * count)
        text = "".join(map(word, tokens))
        choice = {"text": text, "finish_reason": "length", **self.ids(body, tokens, ids)}
        return JSONResponse({"id": "x", "choices": [choice], "usage": usage})

    def tokens(self, prompt: tuple[int, ...], count: int, fault: str) -> list[int]:
        tokens, at = right(prompt, count), _PLACE
        if fault == "double":
            return tokens[:at] + tokens[at - _PIECE :]
        if fault == "skip":
            return tokens[:at] + tokens[at + _PIECE :]
        if fault == "wrong":
            return tokens[:at] + [token + 1 for token in tokens[at:]]
        if fault == "tie":
            return tied(prompt, count)
        return tokens[:at] if fault == "short" else tokens

    def usage(self, prompt: list[int], written: int) -> dict[str, int]:
        read = len(prompt)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def ids(self, body: dict[str, Any], tokens: list[int], prompt: list[int]) -> dict[str, Any]:
        if not body.get("return_token_ids") or self.options.no_ids:
            return {}
        return {"token_ids": tokens, **({"prompt_token_ids": prompt} if prompt else {})}

    async def events(
        self,
        body: dict[str, Any],
        prompt: list[int],
        tokens: list[int],
        usage: dict[str, int],
        fault: str,
    ) -> AsyncIterator[bytes]:
        name = "first"

        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            return (
                b"data: " + json.dumps({"id": name, "choices": choices, **more}).encode() + b"\n\n"
            )

        for at in range(0, len(tokens), _TOGETHER):
            await asyncio.sleep(self.options.itl_s * _TOGETHER)
            if at >= _PLACE:
                if fault == "cut":
                    raise ConnectionAbortedError
                if fault == "error":
                    yield b'data: {"error": {"message": "the engine fell over"}}\n\n'
                    return
                if fault == "pause" and at < _PLACE + _TOGETHER:
                    await asyncio.sleep(self.options.pause_s)
                if fault == "name":
                    name = "second"
            batch = tokens[at : at + _TOGETHER]
            last = at + _TOGETHER >= len(tokens)
            output = {
                "text": "".join(map(word, batch)),
                "finish_reason": "length" if last else None,
            }
            yield event([{**output, **self.ids(body, batch, [] if at else prompt)}])
        if fault == "finish":
            yield event([{"text": "", "finish_reason": "stop"}])
        if (body.get("stream_options") or {}).get("include_usage"):
            yield event([], usage=usage)
        yield b"data: [DONE]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--port", type=int, required=True)
    add("--faults", default="")
    add("--every", type=int, default=4)
    add("--after", type=int, default=0)
    add("--itl-s", type=float, default=0.0)
    add("--pause-s", type=float, default=0.6)
    add("--no-ids", action="store_true")
    add("--title", default="")
    options = parser.parse_args()
    if options.title:
        setproctitle(options.title)
    server = Server(options)
    routes = [
        Route("/v1/models", server.models),
        Route("/health", server.health),
        Route("/v1/completions", server.completions, methods=["POST"]),
    ]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=options.port, log_level="critical")


if __name__ == "__main__":
    main()
