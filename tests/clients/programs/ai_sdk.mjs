// The AI SDK of Vercel, on Node: text, streams, objects and tools.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, generateObject, streamText, tool } from "ai";
import { z } from "zod";

const url = process.env.SERVER_URL;
const name = process.env.SERVER_MODEL;
const provider = createOpenAICompatible({
  name: "server",
  baseURL: `${url}/v1`,
  apiKey: "unused",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(name);
const common = { temperature: 0, maxOutputTokens: 60, maxRetries: 0 };
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string().max(20) }),
});

function assert(condition, message) {
  if (!condition) throw new Error(message);
}

const checks = {
  async text() {
    const answer = await generateText({ model, prompt: "Say hello.", ...common });
    assert(answer.text, "no text");
    assert(answer.usage.outputTokens > 0, "no usage");
  },
  async streamed_as_plain() {
    const plain = await generateText({ model, prompt: "Say hello.", ...common });
    const stream = streamText({ model, prompt: "Say hello.", ...common });
    let text = "";
    for await (const part of stream.textStream) text += part;
    assert(text === plain.text, `${text} is not ${plain.text}`);
    assert((await stream.finishReason) === plain.finishReason, "another finish reason");
    assert((await stream.usage).outputTokens === plain.usage.outputTokens, "another usage");
  },
  async object() {
    const schema = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(120) });
    const answer = await generateObject({ model, schema, prompt: "Ada is 36.", ...common });
    assert(typeof answer.object.age === "number", "no age");
  },
  async forced_tool() {
    const answer = await generateText({
      model,
      prompt: "Say hello.",
      tools: { weather },
      toolChoice: "required",
      ...common,
    });
    assert(answer.toolCalls[0].toolName === "weather", "no call");
    assert("city" in answer.toolCalls[0].input, "no city");
  },
  async forced_tool_streamed() {
    const stream = streamText({
      model,
      prompt: "Say hello.",
      tools: { weather },
      toolChoice: "required",
      ...common,
    });
    const calls = await stream.toolCalls;
    assert(calls.length === 1 && calls[0].toolName === "weather", "no call");
  },
  async responses() {
    const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
    const answer = await generateText({
      model: openai.responses(name),
      prompt: "Say hello.",
      ...common,
    });
    assert(answer.text, "no text");
  },
  async unknown_model() {
    try {
      await generateText({ model: provider("nobody"), prompt: "x", ...common });
    } catch (error) {
      assert(error.statusCode === 404, `status ${error.statusCode}`);
      return;
    }
    throw new Error("answered");
  },
};

for (const [check, run] of Object.entries(checks)) {
  let error = null;
  try {
    await run();
  } catch (raised) {
    error = String(raised).slice(0, 1000);
  }
  console.log(JSON.stringify({ check, error }));
}
