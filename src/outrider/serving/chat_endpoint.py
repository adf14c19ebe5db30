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

from outrider.serving.chat_run import ChatAnswer, ChatJob, Delta, TokenReport, api_error, begin, piece_reports
from outrider.serving.conversation import MOST_MESSAGES, ChatMessage, Tool, part_text, template_messages
from outrider.serving.fields import SamplingFields, StreamFields
from outrider.serving.response_format import grammar_of
from outrider.serving.service import Service
from outrider.serving.streams import merged
from outrider.serving.tool_use import CallDelta, ToolUse, joined
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


class ChatRequest(SamplingFields, StreamFields):
    """The body of a chat completion."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    model: str | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=1, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
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
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    asked.check_stream()
    job = ChatJob(
        template_messages(asked.messages),
        asked,
        asked.max_completion_tokens or asked.max_tokens,
        "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens",
        tools=_tools(service, asked),
        grammar=grammar_of(asked.response_format),
        n=asked.n or 1,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        variables=asked.chat_template_kwargs,
        continue_final=asked.continue_final_message,
        answer_follows=asked.add_generation_prompt,
        prediction=_predicted(asked.prediction),
    )
    choices = await begin(service, job)
    head = {
        "id": f"chatcmpl-{token_hex(12)}",
        "created": int(time()),
        "model": service.settings.served_name,
        "system_fingerprint": service.fingerprint,
    }
    if asked.stream:
        return EventStreamResponse(_stream(service, head, choices, asked))
    return JsonResponse(await _whole(service, head, choices, asked))


def _tools(service: Service, asked: ChatRequest) -> ToolUse | None:
    """The request's tools, None where the model is not to see any."""
    choice: Any = "auto" if asked.tool_choice is None else asked.tool_choice
    if isinstance(choice, dict):
        inner = choice.get("function")
        if choice.get("type") != "function" or not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ApiError(
                400, "tool_choice: expected a function's name in it, got something else", param="tool_choice"
            )
        choice = inner["name"]
        named = True
    else:
        named = False
        if choice not in ("none", "auto", "required"):
            raise ApiError(
                400,
                f"tool_choice: expected none, auto, required or a function, got {choice[:80]!r}",
                param="tool_choice",
            )
    if not asked.tools:
        if asked.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
        return None
    if choice == "none" and not named:
        return None
    shown = [tool.for_template() for tool in asked.tools]
    parallel = asked.parallel_tool_calls is not False
    return ToolUse(service.llm.tokenizer, shown, choice, named=named, parallel=parallel)


def _predicted(given: Mapping[str, Any] | None) -> str | None:
    """The text that OpenAI's ``prediction`` expects."""
    if given is None:
        return None
    if set(given) != {"type", "content"} or given["type"] != "content":
        raise ApiError(400, "prediction: expected {type: 'content', content: text}", param="prediction")
    content = given["content"]
    if not isinstance(content, str) and not (
        isinstance(content, list) and all(isinstance(part, dict) for part in content)
    ):
        raise ApiError(400, "prediction.content: expected a text or parts of text", param="prediction.content")
    if isinstance(content, str):
        return content
    return "".join(part_text(part, f"prediction.content.{number}") for number, part in enumerate(content))


def _logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """The field ``logprobs`` of a choice."""

    def one(token: str, raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(raw)}

    content = [
        {**one(r.token, r.raw, r.logprob), "top_logprobs": [one(token, raw, logprob) for token, raw, logprob in r.top]}
        for r in reports
    ]
    return {"content": content, "refusal": None}


def _call(delta: CallDelta) -> dict[str, Any]:
    """A part of a call, in a chunk."""
    function: dict[str, Any] = {"arguments": delta.arguments}
    if not delta.id:
        return {"index": delta.index, "function": function}
    return {
        "index": delta.index,
        "id": delta.id,
        "type": "function",
        "function": {"name": delta.name, **function},
    }


async def _whole(
    service: Service, head: Mapping[str, Any], choices: Sequence[ChatAnswer], asked: ChatRequest
) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    try:
        for index, choice in enumerate(choices):
            deltas = [delta async for delta in choice.deltas()]
            calls = joined(call for delta in deltas for call in delta.calls)
            text = "".join(delta.text for delta in deltas)
            message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
            if calls:
                message["tool_calls"] = [
                    {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
                    for one in calls
                ]
            found.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": _logprobs([one for d in deltas for one in d.logprobs]) if asked.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
            )
            if asked.wants_pieces:
                found[-1]["outrider"] = piece_reports(piece for delta in deltas for piece in delta.pieces)
    finally:
        for choice in choices:
            choice.cancel()
    usage = service.usage([choice.answer for choice in choices])
    return {**head, "object": "chat.completion", "choices": found, "usage": usage}


async def _stream(
    service: Service, head: Mapping[str, Any], choices: Sequence[ChatAnswer], asked: ChatRequest
) -> AsyncIterator[bytes]:
    whole = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, message: Mapping[str, Any], delta: Delta) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": message, "finish_reason": delta.finish_reason}
        choice["logprobs"] = _logprobs(delta.logprobs) if asked.logprobs and delta.logprobs else None
        if asked.wants_pieces:
            choice["outrider"] = piece_reports(delta.pieces)
        return sse({**whole, "choices": [choice], **({"usage": None} if asked.tells_usage else {})})

    try:
        for index in range(len(choices)):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None}, Delta())
        async with aclosing(merged([choice.deltas() for choice in choices])) as deltas:
            async for index, delta in deltas:
                new: dict[str, Any] = {"content": delta.text} if delta.text else {}
                if delta.calls:
                    new["tool_calls"] = [_call(call) for call in delta.calls]
                if new or delta.logprobs or delta.finish_reason or (asked.wants_pieces and delta.pieces):
                    yield chunk(index, new, delta)
        if asked.tells_usage:
            total = service.usage([choice.answer for choice in choices])
            yield sse({**whole, "choices": [], "usage": total})
    except Exception as error:  # the status has been sent: the stream says it
        yield sse(api_error(error).body())
    finally:
        for choice in choices:
            choice.cancel()
    yield sse("[DONE]")
