"""An answer that is JSON of a given shape."""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("API_KEY", "none"),
)
model = client.models.list().data[0].id

schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
    },
    "required": ["city", "country"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Name a city and its country, as JSON."}],
    response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    max_tokens=96,
)
print(json.loads(answer.choices[0].message.content))
