"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from secrets import token_hex
from time import time
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outrider.serving.chat_run import ChatAnswer, api_error, chat_logprobs
from outrider.serving.conversation import ChatMessage, Tool, encode_conversation, template_messages
from outrider.serving.fields import SamplingFields, StreamOptions
from outrider.serving.service import Service
from outrider.serving.streams import merged
from outrider.serving.web import ApiError, EventStreamResponse, JsonResponse, parse, sse

__all__ = ["ChatRequest", "chat_completions"]

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "best_of": (1,),
    "prompt_logprobs": (0,),
}


class ChatRequest(SamplingFields):
    """The body of a chat completion."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(1, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: dict[str, str] | None = None


async def chat_completions(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """Answer a conversation."""
    asked = parse(ChatRequest, body, UNSUPPORTED)
    service.check_model(asked.model)
    service.check_options(asked.outrider)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    messages = template_messages(asked.messages)
    prompt = await encode_conversation(
        service,
        messages,
        variables=asked.chat_template_kwargs,
        continue_final=asked.continue_final_message,
    )
    name = "max_completion_tokens" if asked.max_completion_tokens is not None else "max_tokens"
    most = service.new_tokens(prompt, asked.max_completion_tokens or asked.max_tokens, name)
    params = asked.sampling(
        service.llm.target.spec.defaults, most, logprobs=(asked.top_logprobs or 0) if asked.logprobs else None
    )
    answers = await service.submit([prompt], params, asked.n)
    head = {
        "id": f"chatcmpl-{token_hex(12)}",
        "created": int(time()),
        "model": service.settings.served_name,
        "system_fingerprint": service.fingerprint,
    }
    choices = [ChatAnswer(service, answer) for answer in answers]
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStreamResponse(_stream(service, head, choices, bool(asked.logprobs), usage))
    return JsonResponse(await _whole(service, head, choices, bool(asked.logprobs)))


async def _whole(
    service: Service, head: Mapping[str, Any], choices: Sequence[ChatAnswer], logprobs: bool
) -> dict[str, Any]:
    found = []
    try:
        for index, choice in enumerate(choices):
            deltas = [delta async for delta in choice.deltas()]
            message = {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None}
            found.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": chat_logprobs([one for d in deltas for one in d.logprobs]) if logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
            )
    finally:
        for choice in choices:
            choice.answer.cancel()
    usage = service.usage([choice.answer for choice in choices])
    return {**head, "object": "chat.completion", "choices": found, "usage": usage}


async def _stream(
    service: Service, head: Mapping[str, Any], choices: Sequence[ChatAnswer], logprobs: bool, usage: bool
) -> AsyncIterator[bytes]:
    whole = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: Mapping[str, Any], reports: Sequence[Any], reason: str | None) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
        choice["logprobs"] = chat_logprobs(reports) if logprobs and reports else None
        return sse({**whole, "choices": [choice], **({"usage": None} if usage else {})})

    try:
        for index in range(len(choices)):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None}, (), None)
        async with aclosing(merged([choice.deltas() for choice in choices])) as deltas:
            async for index, delta in deltas:
                if delta.finish_reason is not None:
                    yield chunk(index, {}, delta.logprobs, delta.finish_reason)
                elif delta.text or delta.logprobs:
                    yield chunk(index, {"content": delta.text}, delta.logprobs, None)
        if usage:
            total = service.usage([choice.answer for choice in choices])
            yield sse({**whole, "choices": [], "usage": total})
    except Exception as error:  # the status has been sent: the stream says it
        yield sse(api_error(error).body())
    finally:
        for choice in choices:
            choice.answer.cancel()
    yield sse("[DONE]")
