"""Many questions at once. The SDK retries a request that a full queue refused (429)."""

import asyncio
import os

from openai import AsyncOpenAI

client = AsyncOpenAI(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("API_KEY", "none"),
    max_retries=10,
)


async def ask(model: str, number: int) -> str:
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"What is {number} plus {number}?"}],
        max_tokens=8,
    )
    return answer.choices[0].message.content or ""


async def main() -> None:
    model = (await client.models.list()).data[0].id
    answers = await asyncio.gather(*(ask(model, number) for number in range(32)))
    print(f"{len(answers)} answers, the first: {answers[0]}")


asyncio.run(main())
