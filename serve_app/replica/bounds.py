"""Limits of a request that only vLLM can tell: how many tokens a prompt and an answer have.

The limits may change while requests run, so vLLM's own objects are told again each time
(docs/upstream.md, rows 31 and 32). A prompt is counted where vLLM has tokenized it anyway, which
costs nothing and is early enough for a 400; the engine client counts once more, because not all
prompts are tokenized there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError

from serve_app.settings import Limits

# What vLLM keeps in `app.state`, each with the most tokens that an answer may have.
SERVING = (
    "openai_serving_chat",
    "openai_serving_chat_batch",
    "openai_serving_completion",
    "openai_serving_responses",
    "anthropic_serving_messages",
    "cohere_serving_chat_v2",
    "serving_tokens",
    "serving_render",
)


class Bounds:
    """The limits in force for one engine and its front ends.

    Attributes:
        max_prompt_tokens: a longer prompt is refused; None: vLLM's own limit alone.
    """

    def __init__(self) -> None:
        self.max_prompt_tokens: int | None = None
        self._max_tokens: int | None = None
        # Each with what vLLM itself had decided.
        self._serving: list[tuple[Any, int | None]] = []

    def change(self, limits: Limits) -> None:
        """Other limits from now on."""
        self.max_prompt_tokens, self._max_tokens = limits.max_prompt_tokens, limits.max_tokens
        self._apply()

    def serve(self, state: Any) -> None:
        """Bound the answers of an application, whose `app.state` this is."""
        states = (getattr(state, name, None) for name in SERVING)
        self._serving = [(each, each.override_max_tokens) for each in states if each is not None]
        self._apply()

    def watch(self, renderer: Any) -> None:
        """Count the tokens of each prompt that vLLM's renderer makes for the engine."""
        tokenize = renderer.tokenize_prompts_async

        async def counted(prompts: Sequence[Any], params: Any) -> Any:
            tokenized = await tokenize(prompts, params)
            if params.max_total_tokens is not None:  # /tokenize may tell of a prompt of any length.
                for prompt in tokenized:
                    self.check(prompt)
            return tokenized

        renderer.tokenize_prompts_async = counted

    def check(self, prompt: Any) -> None:
        """Whether a prompt with token ids is short enough.

        Raises:
            VLLMValidationError: it is not; vLLM answers 400.
        """
        bound = self.max_prompt_tokens
        if bound is None or not isinstance(prompt, Mapping):
            return
        count = len(prompt.get("prompt_token_ids") or ())
        if count > bound:
            raise VLLMValidationError(
                f"The prompt has {count} tokens, above this server's {bound}.", parameter="prompt"
            )

    def _apply(self) -> None:
        for each, own in self._serving:
            each.override_max_tokens = min(
                (bound for bound in (own, self._max_tokens) if bound is not None), default=None
            )
