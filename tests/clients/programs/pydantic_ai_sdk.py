"""pydantic-ai: agents with tools and typed results, over chat completions and Responses."""

import asyncio

from checks import MODEL, URL, check, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="unused")
chat = OpenAIChatModel(MODEL, provider=provider)
SETTINGS = ModelSettings(max_tokens=100, temperature=0)


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


@check
def text():
    assert Agent(chat, model_settings=SETTINGS).run_sync("Say hello.").output


@check
def streamed():
    async def ask() -> str:
        async with Agent(chat, model_settings=SETTINGS).run_stream("Say hello.") as answer:
            return await answer.get_output()

    assert asyncio.run(ask())


@check
def result_by_tool():
    agent = Agent(chat, output_type=Person, model_settings=SETTINGS)
    assert isinstance(agent.run_sync("Ada is 36 years old.").output, Person)


@check
def result_by_schema():
    agent = Agent(chat, output_type=NativeOutput(Person), model_settings=SETTINGS)
    assert isinstance(agent.run_sync("Ada is 36 years old.").output, Person)


@check
def tool_offered():
    agent = Agent(chat, model_settings=SETTINGS)

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {city}"

    assert agent.run_sync("Say hello.").output is not None


@check
def responses():
    model = OpenAIResponsesModel(MODEL, provider=provider)
    assert Agent(model, model_settings=SETTINGS).run_sync("Say hello.").output


run()
