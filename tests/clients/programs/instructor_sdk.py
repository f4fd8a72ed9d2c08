"""instructor: answers as Pydantic models, in each of its modes."""

import instructor
import openai
from checks import MODEL, URL, check, run
from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "Ada is 36 years old."}]


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


def person(mode):
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{URL}/v1", api_key="unused"), mode=mode
    )
    return client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_model=Person,
        max_tokens=100,
        temperature=0,
        max_retries=0,
    )


@check
def tools():
    assert isinstance(person(instructor.Mode.TOOLS), Person)


@check
def json_schema():
    assert isinstance(person(instructor.Mode.JSON_SCHEMA), Person)


@check
def json_mode():
    assert isinstance(person(instructor.Mode.JSON), Person)


@check
def partial():
    client = instructor.from_openai(
        openai.OpenAI(base_url=f"{URL}/v1", api_key="unused"),
        mode=instructor.Mode.JSON_SCHEMA,
    )
    partials = client.chat.completions.create_partial(
        model=MODEL, messages=HELLO, response_model=Person, max_tokens=100, temperature=0
    )
    assert list(partials)[-1].age is not None


run()
