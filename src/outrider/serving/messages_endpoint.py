"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's interface."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from secrets import token_hex
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outrider.config import Grammar
from outrider.serving.chat_run import ChatAnswer, ChatJob, api_error, begin
from outrider.serving.conversation import MOST_MESSAGES, encode_conversation, part_text, plain_text
from outrider.serving.fields import SamplingFields, Strict, stop_strings
from outrider.serving.response_format import grammar_of
from outrider.serving.service import Service, cached_tokens
from outrider.serving.tool_use import CallDelta, ToolUse, joined
from outrider.serving.web import ApiError, EventStreamResponse, JsonResponse, parse, sse

__all__ = ["CountRequest", "MessagesRequest", "count_tokens", "messages"]

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "diagnostics": (),
    "user_profile_id": (),
    "workspace_id": (),
    "cache_control": ({"type": "ephemeral"},),
}


class _Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class _Tool(Strict):
    type: Literal["custom"] | None = None  # the first field: of a tool that this server has not, the type is at fault
    name: str = Field(min_length=1, max_length=128, pattern=r"^[^\s\x00-\x1f]+$")
    description: str | None = None
    input_schema: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[dict[str, Any]] | None = None


class _Choice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class _Thinking(Strict):
    """The template's ``enable_thinking``; ``adaptive``: as the template has it."""

    type: Literal["disabled", "enabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1024)
    """Checked as Anthropic does, and no limit here: ``max_tokens`` holds for thoughts and answer together."""
    display: str | None = None


class _OutputConfig(Strict):
    format: dict[str, Any] | None = None


class CountRequest(Strict):
    """What a prompt is made of."""

    messages: list[_Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig | None = None
    output_format: dict[str, Any] | None = None


class MessagesRequest(CountRequest, SamplingFields):
    """The body of a message."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None


async def messages(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """Answer a conversation."""
    asked = parse(MessagesRequest, body, UNSUPPORTED)
    service.check_model(asked.model)
    if asked.wants_pieces:
        raise ApiError(400, "outrider.pieces: only chat completions and completions have them", param="outrider.pieces")
    if asked.stop is not None and asked.stop_sequences is not None:
        raise ApiError(400, "stop and stop_sequences are the same here: send one of them", param="stop")
    fields = asked.model_copy(update={"stop": asked.stop_sequences or asked.stop})
    stop_strings("stop_sequences", fields.stop)
    job = ChatJob(
        _conversation(asked),
        fields,
        asked.max_tokens,
        tools=_tools(service, asked),
        grammar=_grammar(asked),
        grammar_name=_grammar_name(asked),
        variables=_thinking(asked.thinking, asked.max_tokens),
        continue_final=asked.messages[-1].role == "assistant",
    )
    (answer,) = await begin(service, job)
    head = {
        "id": f"msg_{token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": service.settings.served_name,
    }
    if asked.stream:
        return EventStreamResponse(_stream(service, head, answer))
    return JsonResponse(await _whole(service, head, answer))


async def count_tokens(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """How many tokens a conversation's prompt has; nothing runs."""
    asked = parse(CountRequest, body, UNSUPPORTED)
    service.check_model(asked.model)
    tools = _tools(service, asked)
    tokens = await encode_conversation(
        service,
        _conversation(asked),
        [] if tools is None else tools.for_template,
        variables=_thinking(asked.thinking),
        continue_final=asked.messages[-1].role == "assistant",
    )
    return JsonResponse({"input_tokens": len(tokens)})


# ------------------------------------------------------------------------------------------------ what is asked


def _conversation(asked: CountRequest) -> list[dict[str, Any]]:
    """As chat templates take it: results of tools are messages of their own."""
    found: list[dict[str, Any]] = []
    if asked.system:
        found.append({"role": "system", "content": plain_text(asked.system, "system")})
    for number, message in enumerate(asked.messages):
        where = f"messages.{number}.content"
        if isinstance(message.content, str):
            found.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            found.append(_assistant(message.content, where))
        else:
            found += _user(message.role, message.content, where)
    return found


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    texts, calls, thoughts = [], [], []
    for number, block in enumerate(blocks):
        path, kind = f"{where}.{number}", block.get("type")
        if kind == "tool_use":
            call, name, arguments = block.get("id"), block.get("name"), block.get("input")
            if not isinstance(call, str) or not isinstance(name, str) or not isinstance(arguments, dict):
                raise ApiError(
                    400, f"{path}: a tool_use block needs id and name (texts) and input (object)", param=path
                )
            calls.append({"id": call, "type": "function", "function": {"name": name, "arguments": arguments}})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        else:
            texts.append(part_text(block, path))
    one: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if calls:
        one["tool_calls"] = calls
    if thoughts:
        one["reasoning_content"] = "\n".join(thoughts)
    return one


def _user(role: str, blocks: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    for number, block in enumerate(blocks):
        path = f"{where}.{number}"
        if block.get("type") == "tool_result":
            content = block.get("content")
            if not isinstance(block.get("tool_use_id"), str):
                raise ApiError(400, f"{path}.tool_use_id is missing: it says which call this answers", param=path)
            if content is not None and not isinstance(content, (str, list)):
                raise ApiError(400, f"{path}.content: expected a text or blocks", param=path)
            text = plain_text(_blocks(content, path), f"{path}.content")
            text = f"Error: {text}" if block.get("is_error") is True else text
            found.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
        else:
            texts.append(part_text(block, path))
    if texts or not found:
        found.append({"role": role, "content": "\n".join(texts)})
    return found


def _blocks(content: Any, where: str) -> Any:
    if isinstance(content, list) and not all(isinstance(block, dict) for block in content):
        raise ApiError(400, f"{where}: expected a text or blocks (objects)", param=where)
    return content


def _tools(service: Service, asked: CountRequest) -> ToolUse | None:
    choice = asked.tool_choice or _Choice(type="auto")
    if not asked.tools:
        if choice.type in ("any", "tool"):
            raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
        return None
    if choice.type == "none":
        return None
    if (choice.type == "tool") != (choice.name is not None):
        raise ApiError(400, "tool_choice: type 'tool' needs a name, and no other type has one", param="tool_choice")
    shown = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            | ({"strict": True} if tool.strict else {}),
        }
        for tool in asked.tools
    ]
    name = choice.name or {"any": "required"}.get(choice.type, choice.type)
    parallel = not choice.disable_parallel_tool_use
    return ToolUse(service.llm.tokenizer, shown, name, named=choice.name is not None, parallel=parallel)


def _thinking(asked: _Thinking | None, max_tokens: int | None = None) -> dict[str, Any] | None:
    """Variables of the template."""
    if asked is None:
        return None
    budget, name = asked.budget_tokens, "thinking.budget_tokens"
    if budget is not None and asked.type != "enabled":
        raise ApiError(400, f"{name}: only type 'enabled' has a budget, got type {asked.type!r}", param=name)
    if budget is not None and max_tokens is not None and budget >= max_tokens:
        raise ApiError(400, f"{name}: expected less than max_tokens ({max_tokens}), got {budget}", param=name)
    if asked.type == "adaptive":
        return None
    return {"enable_thinking": asked.type == "enabled"}


def _grammar(asked: MessagesRequest) -> Grammar | None:
    config = asked.output_config.format if asked.output_config is not None else None
    return grammar_of(config if config is not None else asked.output_format, _grammar_name(asked))


def _grammar_name(asked: MessagesRequest) -> str:
    config = asked.output_config
    return "output_format" if config is None or config.format is None else "output_config.format"


# ------------------------------------------------------------------------------------------------ what is answered


def _prompt_usage(answer: ChatAnswer) -> dict[str, Any]:
    request, cached = answer.answer.request, cached_tokens(answer.answer)
    return {
        "input_tokens": request.prompt_length - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }


def _usage(service: Service, answer: ChatAnswer) -> dict[str, Any]:
    return {
        **_prompt_usage(answer),
        "output_tokens": answer.answer.request.stats.generated,
        "speculative": service.speculative([answer.answer]),
    }


def _end(answer: ChatAnswer) -> dict[str, Any]:
    """Why it ended, and the stop sequence that ended it."""
    stopped = answer.answer.request.finisher.stop_string
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(answer.finish_reason, "end_turn")
    if answer.finish_reason == "stop" and stopped is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stopped if reason == "stop_sequence" else None}


async def _whole(service: Service, head: Mapping[str, Any], answer: ChatAnswer) -> dict[str, Any]:
    try:
        deltas = [delta async for delta in answer.deltas()]
    finally:
        answer.cancel()
    text = "".join(delta.text for delta in deltas)
    content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for call in joined(call for delta in deltas for call in delta.calls):
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
    return {**head, "content": content, **_end(answer), "usage": _usage(service, answer)}


def _input(arguments: str) -> Any:
    """The object that the model wrote; where it is none, its text under a key, for the client to see."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


async def _stream(service: Service, head: Mapping[str, Any], answer: ChatAnswer) -> AsyncIterator[bytes]:
    blocks = _Blocks()
    try:
        start = {**head, "content": [], "stop_reason": None, "stop_sequence": None}
        usage = {**_prompt_usage(answer), "output_tokens": 0}  # clients keep what is here beside the final usage
        yield _event("message_start", message={**start, "usage": usage})
        yield _event("ping")
        async with aclosing(answer.deltas()) as deltas:
            async for delta in deltas:
                for event in blocks.of(delta.text, delta.calls):
                    yield event
        for event in blocks.close():
            yield event
        yield _event("message_delta", delta=_end(answer), usage=_usage(service, answer))
        yield _event("message_stop")
    except Exception as error:  # the status has been sent: the stream says it
        yield sse(api_error(error).body(anthropic=True), "error")
    finally:
        answer.cancel()


def _event(kind: str, **values: Any) -> bytes:
    return sse({"type": kind, **values}, kind)


class _Blocks:
    """Content blocks of a stream: one open at a time, numbered in order."""

    def __init__(self) -> None:
        self._index = -1
        self._open: tuple[str, int] | None = None  # text, or the number of a call

    def of(self, text: str, calls: Sequence[CallDelta]) -> list[bytes]:
        found: list[bytes] = []
        if text:
            found += self._begin(("text", 0), {"type": "text", "text": ""})
            found.append(self._delta({"type": "text_delta", "text": text}))
        for call in calls:
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            found += self._begin(("tool_use", call.index), block)
            if call.arguments:
                found.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return found

    def close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [_event("content_block_stop", index=self._index)]

    def _begin(self, wanted: tuple[str, int], block: Mapping[str, Any]) -> list[bytes]:
        if self._open == wanted:
            return []
        found = self.close()
        self._open, self._index = wanted, self._index + 1
        return [*found, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)
