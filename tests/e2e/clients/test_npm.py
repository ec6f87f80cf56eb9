"""OpenAI's npm client and Vercel's AI SDK, unmodified, against the real server."""

from __future__ import annotations

import pytest
from npm import Npm
from running import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OPENAI = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "clawrl";

const talk = [{ role: "user", content: "npm: 3 apples and 4 more?" }];
const first = await client.chat.completions.create({ model, messages: talk, max_tokens: 60 });
talk.push(first.choices[0].message, { role: "user", content: "Are you sure?" });
const stream = await client.chat.completions.create({
  model, messages: talk, max_tokens: 60, stream: true, stream_options: { include_usage: true },
});
let second, text = "", ended, usage;
for await (const chunk of stream) {
  second = chunk.id;
  text += chunk.choices[0]?.delta?.content ?? "";
  ended = chunk.choices[0]?.finish_reason ?? ended;
  usage = chunk.usage ?? usage;
}

const lookup = { type: "function", function: { name: "lookup", description: "Count of an item at a place.",
  parameters: { type: "object", properties: { item: { type: "string" }, place: { type: "string" } },
                required: ["item", "place"] } } };
const asked = [{ role: "user", content: 'How many "pears" are at "market" and "barn" together?' }];
const calling = client.chat.completions.stream({ model, messages: asked, tools: [lookup], max_tokens: 200,
  temperature: 0, tool_choice: { type: "function", function: { name: "lookup" } } });
const called = await calling.finalChatCompletion();
const call = called.choices[0].message.tool_calls[0];
asked.push({ role: "assistant", content: null, tool_calls: [{ id: call.id, type: "function",
  function: { name: call.function.name, arguments: call.function.arguments } }] });
asked.push({ role: "tool", tool_call_id: call.id, content: "42" });
const back = await client.chat.completions.create({ model, messages: asked, tools: [lookup], max_tokens: 60 });

const schema = { type: "object", properties: { apples: { type: "integer", enum: [7, 8] } }, required: ["apples"],
                 additionalProperties: false };
const parsed = await client.chat.completions.parse({ model, messages: [{ role: "user", content: "npm: 3 and 4?" }],
  max_tokens: 100, response_format: { type: "json_schema", json_schema: { name: "answer", strict: true, schema } } });
const whole = await client.responses.create({ model, input: "npm: what is 5 + 6?", max_output_tokens: 60 });
console.log(JSON.stringify({ ids: [first.id, second], tools: [called.id, back.id], text, ended, usage,
  tool: call.function.name, apples: JSON.parse(parsed.choices[0].message.content).apples, said: whole.output_text }));
"""

VERCEL = """
import { generateText, streamText, jsonSchema, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
const baseURL = process.argv[2], maxRetries = 0;
const chat = createOpenAICompatible({ name: "clawrl", baseURL, apiKey: "none", includeUsage: true })("clawrl");
const responses = createOpenAI({ baseURL, apiKey: "none" })("clawrl");

async function converse(model, name) {
  const messages = [{ role: "user", content: `${name}: 3 apples and 4 more?` }];
  const first = await generateText({ model, messages, maxOutputTokens: 60, maxRetries });
  messages.push(...first.response.messages, { role: "user", content: "Are you sure?" });
  const streamed = streamText({ model, messages, maxOutputTokens: 60, maxRetries });
  let text = "";
  for await (const piece of streamed.textStream) text += piece;
  const usage = await streamed.usage;
  return { ids: [first.response.id, (await streamed.response).id], text, tokens: usage.outputTokens,
           ended: await streamed.finishReason };
}

const parameters = { type: "object", properties: { item: { type: "string" }, place: { type: "string" } },
                     required: ["item", "place"] };
const tools = { lookup: tool({ description: "Count of an item at a place.", inputSchema: jsonSchema(parameters) }) };
const asked = [{ role: "user", content: 'How many "pears" are at "market" and "hall" together?' }];
const called = await generateText({ model: chat, messages: asked, tools, temperature: 0, maxOutputTokens: 200,
  maxRetries, toolChoice: { type: "tool", toolName: "lookup" } });
const call = called.toolCalls[0];
asked.push(...called.response.messages, { role: "tool", content: [{ type: "tool-result", toolCallId: call.toolCallId,
  toolName: call.toolName, output: { type: "text", value: "42" } }] });
const back = await generateText({ model: chat, messages: asked, tools, maxOutputTokens: 60, maxRetries });
console.log(JSON.stringify({ chat: await converse(chat, "Vercel"),
  responses: await converse(responses, "Vercel, items"), tools: [called.response.id, back.response.id],
  tool: call.toolName }));
"""


def assert_paired(server: Server, first: str, second: str) -> None:
    turn = server.journal().turn(second)
    assert turn is not None, second
    assert (turn.parent, turn.kind) == (first, "main"), turn.reason


def test_openai(server: Server, npm: Npm):
    told = npm.node(OPENAI, f"{server.url}/v1")
    assert_paired(server, *told["ids"])
    assert_paired(server, *told["tools"])
    assert told["text"]
    assert told["ended"] in ("stop", "length")
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + told["usage"]["completion_tokens"]
    assert (told["tool"], told["apples"] in (7, 8), bool(told["said"])) == ("lookup", True, True)


def test_vercel(server: Server, npm: Npm):
    told = npm.node(VERCEL, f"{server.url}/v1")
    assert_paired(server, *told["tools"])
    assert told["tool"] == "lookup"
    for conversation in (told["chat"], told["responses"]):
        assert_paired(server, *conversation["ids"])
        assert conversation["text"]
        assert conversation["tokens"] > 0
        assert conversation["ended"] in ("stop", "length")
