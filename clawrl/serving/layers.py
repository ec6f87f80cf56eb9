"""vLLM's own OpenAI serving classes over our engine: one layer per route, all captured alike.

Knows vLLM's request types and what its handlers return. Ignores who asks and what becomes of the reply.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from clawrl.config import PolicySection


@dataclass(frozen=True, slots=True)
class Layer:
    """How one route is answered. `named` is the request's id as its body carries it, `captured` the engine's for it."""

    request: Any  # the pydantic type of the body
    create: Callable[[Any], Awaitable[Any]]  # a whole answer, an error, or server-sent events
    named: str
    captured: str


def layers(engine: Any, settings: PolicySection, chat: Any) -> dict[str, Layer]:
    """The layers by the policy's methods; `chat` is vLLM's handler of `/v1/chat/completions`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    renderer = engine.online_renderer
    completions = OpenAIServingCompletion(
        engine, chat.models, online_renderer=renderer, request_logger=None, enable_prompt_tokens_details=True
    )
    responses = OpenAIServingResponses(
        engine,
        chat.models,
        renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=settings.tool_parser is not None,
        tool_parser=settings.tool_parser,
        reasoning_parser=settings.reasoning_parser or "",
        enable_prompt_tokens_details=True,
    )
    for handler in (completions, responses):
        handler.default_sampling_params = dict(chat.default_sampling_params)

    async def respond(request: Any) -> Any:
        answer: Any = await responses.create_responses(request)
        return _events(answer) if hasattr(answer, "__aiter__") else answer

    return {
        "chat": Layer(ChatCompletionRequest, chat.create_chat_completion, "{}", "chatcmpl-{}"),
        "complete": Layer(CompletionRequest, completions.create_completion, "{}", "cmpl-{}-0"),
        "respond": Layer(ResponsesRequest, respond, "resp_{}", "resp_{}_0"),
    }


async def _events(answer: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The responses' events as they go over the wire."""
    async for event in answer:
        yield f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n"
