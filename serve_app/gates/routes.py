"""The routes that this application serves, and how many sequences the engine runs for each.

`ROUTES` is the whole list: any other path is 404, in the gateway and in a replica alike, and
/openapi.json lists these and no others. vLLM's routes that control one engine are left out on
purpose (/scale_elastic_ep, /v1/load_lora_adapter, ...): behind a load balancer they would reach one
replica at random, and any client's key would open them. docs/limits.md has the table for users.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from serve_app.errors import nearest


class Counts(StrEnum):
    """What the engine runs for a request, as a number of sequences."""

    NOTHING = "no sequence"
    ONE = "one sequence"
    CHOICES = "n"
    PROMPTS = "prompts x n"
    CONVERSATIONS = "conversations x n"
    ITEMS = "items"
    QUESTIONS = "questions"
    INPUTS = "inputs"
    PAIRS = "the longer of the two sides"


@dataclass(frozen=True, slots=True)
class Route:
    """One path.

    Attributes:
        path: as FastAPI writes it; `{name}` is one segment, `{name:path}` one or more.
        counts: how many sequences the engine runs for a request.
    """

    path: str
    counts: Counts = Counts.NOTHING

    @property
    def generates(self) -> bool:
        """Whether the engine works on it: such requests are admitted, others are not."""
        return self.counts is not Counts.NOTHING


ROUTES = (
    Route("/v1/chat/completions", Counts.CHOICES),
    Route("/v1/chat/completions/batch", Counts.CONVERSATIONS),
    Route("/v1/completions", Counts.PROMPTS),
    Route("/v1/responses", Counts.ONE),
    Route("/v1/messages", Counts.ONE),
    Route("/inference/v1/generate", Counts.CHOICES),
    Route("/generative_scoring", Counts.ITEMS),
    Route("/v1/systemone", Counts.QUESTIONS),
    # Of models that embed, classify or score.
    Route("/v1/embeddings", Counts.INPUTS),
    Route("/v2/embed", Counts.INPUTS),
    Route("/pooling", Counts.INPUTS),
    Route("/classify", Counts.INPUTS),
    Route("/score", Counts.PAIRS),
    Route("/v1/score", Counts.PAIRS),
    Route("/rerank", Counts.PAIRS),
    Route("/v1/rerank", Counts.PAIRS),
    Route("/v2/rerank", Counts.PAIRS),
    # Prompts to tokens and back: the engine runs nothing.
    Route("/tokenize"),
    Route("/detokenize"),
    Route("/v1/messages/count_tokens"),
    Route("/v1/chat/completions/render"),
    Route("/v1/chat/completions/derender"),
    Route("/v1/completions/render"),
    Route("/v1/completions/derender"),
    Route("/v1/messages/render"),
    Route("/v1/responses/render"),
    # What is served, and how it is.
    Route("/v1/models"),
    Route("/v1/models/{model:path}"),
    Route("/v1/responses/{response_id}"),
    Route("/v1/responses/{response_id}/cancel"),
    Route("/health"),
    Route("/ping"),
    Route("/version"),
    Route("/load"),
    Route("/metrics"),
    Route("/openapi.json"),
    Route("/docs"),
    Route("/redoc"),
    # What a tenant used (serve_app/tenants/page.py).
    Route("/tenant"),
    Route("/tenant/usage"),
    # vLLM has these only where an engine argument asks for them.
    Route("/tokenizer_info"),
    Route("/start_profile"),
    Route("/stop_profile"),
)

OTHER = Route("other")


def find(path: str) -> Route | None:
    """The route of a request's path, or None: there is no such route.

    A slash at the end makes no difference.
    """
    bare = path.rstrip("/") or "/"
    if (route := _EXACT.get(bare)) is not None:
        return route
    return next((route for pattern, route in _PATTERNS if pattern.fullmatch(bare)), None)


def label(path: str) -> str:
    """The name of a path's route in metrics and logs, where names are few."""
    return (find(path) or OTHER).path


def nearest_path(path: str) -> str | None:
    """The path that `path` most likely meant, quoted."""
    return nearest(re.sub("/+", "/", path), _EXACT)


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{\w+\}", "[^/]+", re.sub(r"\{\w+:path\}", ".+", path)))


_EXACT = {route.path: route for route in ROUTES if "{" not in route.path}
_PATTERNS = [(_pattern(route.path), route) for route in ROUTES if "{" in route.path]
