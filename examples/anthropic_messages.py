"""The same server through Anthropic's SDK."""

import os

from anthropic import Anthropic

url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
client = Anthropic(base_url=url, api_key=os.environ.get("API_KEY", "none"))
model = client.models.list().data[0].id
message = client.messages.create(
    model=model, max_tokens=64, messages=[{"role": "user", "content": "Hello"}]
)
print(message.content[0].text)
