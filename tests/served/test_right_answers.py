"""Greedy tokens equal those of transformers on the same weights, alone and in a batch."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NEW_TOKENS = 24
TEXT = (
    "The history of the railway begins long before the steam engine. Wagons ran on wooden rails "
    "in the mines of Europe, pushed by men and drawn by horses, and the gauge of those wagons "
    "decided the gauge of everything that followed. When iron became cheap the rails became iron, "
    "and when the steam engine became small enough to move itself, it was set on the same rails. "
    "The first public railways carried coal to the sea; passengers were an afterthought, and the "
    "directors were surprised to find that people would pay to sit behind a boiler for an hour. "
) * 2


@pytest.fixture(scope="module")
def reference(smollm: Path) -> Any:
    """What transformers would answer, greedily.

    `follow(prompt, answer)` is the token that it puts after the prompt and after each token of the
    answer but the last. That equals `answer` exactly if greedy decoding gives `answer`; one pass
    shows it, where generating would take one for each token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The engine runs beside it; two threads that wait for each other would wait for it, too.
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)

    def follow(prompt: list[int], answer: list[int]) -> list[int]:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0]
        tokens: list[int] = logits[len(prompt) - 1 :].argmax(-1).tolist()
        return tokens

    follow.tokenizer = AutoTokenizer.from_pretrained(smollm)  # type: ignore[attr-defined]
    return follow


def prompts(tokenizer: Any) -> list[list[int]]:
    tokens = tokenizer(TEXT)["input_ids"]
    plain = [tokens[:length] for length in (5, 17, 64, 200)]
    chat = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And twice that?"},
    ]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return [*plain, tokenizer(rendered)["input_ids"]]


async def served(server: Server, http: httpx.AsyncClient, prompt: list[int]) -> list[int]:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        "return_token_ids": True,
    }
    response = await http.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


async def test_alone_and_batched(server: Server, reference: Any) -> None:
    request = prompts(reference.tokenizer)
    assert {5, 200} <= {len(prompt) for prompt in request}
    async with httpx.AsyncClient() as http:
        alone = [await served(server, http, prompt) for prompt in request]
        batched = await asyncio.gather(*(served(server, http, prompt) for prompt in request))
    assert alone == [reference(*pair) for pair in zip(request, alone, strict=True)]
    assert batched == alone
    # Answers to another prompt are not taken for right ones.
    assert reference(request[0], alone[1]) != alone[1]
