"""``POST /v1/responses``: OpenAI's newer interface, stateless: every request brings its whole conversation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from itertools import count
from secrets import token_hex
from time import time
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outrider.serving.chat_run import ChatAnswer, ChatJob, Delta, TokenReport, api_error, begin
from outrider.serving.conversation import plain_text
from outrider.serving.fields import SamplingFields, StreamFields, Strict
from outrider.serving.response_format import grammar_of
from outrider.serving.service import Service, cached_tokens
from outrider.serving.tool_use import CallDelta, ToolUse
from outrider.serving.web import ApiError, EventStreamResponse, JsonResponse, parse, sse

__all__ = ["ResponsesRequest", "responses"]

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
}
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")  # the second: there is no reasoning of its own to encrypt
TEXT = ("input_text", "output_text", "text", "refusal")


class _Tool(Strict):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128, pattern=r"^[^\s\x00-\x1f]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Text(Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class _Reasoning(Strict):
    """Nothing of it can be asked for: models reason as their templates have it."""

    effort: None = None
    summary: Literal["auto"] | None = None


class ResponsesRequest(SamplingFields, StreamFields):
    """The body of a response."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: _Text | None = None
    reasoning: _Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    client_metadata: dict[str, Any] | None = None


async def responses(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """Answer a conversation."""
    asked = parse(ResponsesRequest, body, UNSUPPORTED)
    service.check_model(asked.model)
    asked.check_stream()
    if asked.wants_pieces:
        raise ApiError(400, "outrider.pieces: only chat completions and completions have them", param="outrider.pieces")
    for wanted in asked.include or ():
        if wanted not in INCLUDED:
            raise ApiError(
                400, f"include: {wanted[:80]!r} is not supported, only {', '.join(INCLUDED)}", param="include"
            )
    logprobs = LOGPROBS in (asked.include or ())
    if asked.top_logprobs and not logprobs:
        raise ApiError(400, f"top_logprobs needs include: [{LOGPROBS!r}]", param="top_logprobs")
    job = ChatJob(
        _conversation(asked),
        asked,
        asked.max_output_tokens,
        "max_output_tokens",
        messages_name="input",
        tools=_tools(service, asked),
        grammar=grammar_of(asked.text.format if asked.text else None, "text.format"),
        grammar_name="text.format",
        logprobs=(asked.top_logprobs or 0) if logprobs else None,
    )
    (answer,) = await begin(service, job)
    made = _Made(service, asked, answer, logprobs)
    if asked.stream:
        return EventStreamResponse(made.stream())
    return JsonResponse(await made.whole())


# ------------------------------------------------------------------------------------------------ what is asked


def _conversation(asked: ResponsesRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if asked.instructions:
        found.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*found, {"role": "user", "content": asked.input}]
    for number, item in enumerate(asked.input):
        _add(found, item, f"input.{number}")
    if not any(message["role"] != "system" for message in found):
        raise ApiError(400, "input: expected at least one message", param="input")
    return found


def _add(found: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """One item of the input, behind those before it."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise ApiError(400, f"{where}.role: expected user, assistant, system or developer", param=f"{where}.role")
        content = item.get("content")
        if not isinstance(content, str) and not (
            isinstance(content, list) and all(isinstance(part, dict) for part in content)
        ):
            raise ApiError(400, f"{where}.content: expected a text or parts", param=f"{where}.content")
        text = plain_text(content, f"{where}.content", TEXT)
        found.append({"role": "system" if role == "developer" else role, "content": text})
    elif kind == "function_call":
        call_id, name, arguments = item.get("call_id"), item.get("name"), item.get("arguments")
        if not all(isinstance(one, str) for one in (call_id, name, arguments)):
            raise ApiError(400, f"{where}: a function_call needs call_id, name and arguments (texts)", param=where)
        try:
            value: Any = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            value = arguments
        call = {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": value},
        }
        if found and found[-1]["role"] == "assistant":
            found[-1].setdefault("tool_calls", []).append(call)
        else:
            found.append({"role": "assistant", "content": "", "tool_calls": [call]})
    elif kind == "function_call_output":
        output, call_id = item.get("output"), item.get("call_id")
        if not isinstance(call_id, str) or not isinstance(output, (str, list)):
            raise ApiError(400, f"{where}: a function_call_output needs call_id and output", param=where)
        if isinstance(output, list) and not all(isinstance(part, dict) for part in output):
            raise ApiError(400, f"{where}.output: expected a text or parts (objects)", param=f"{where}.output")
        found.append({"role": "tool", "tool_call_id": call_id, "content": plain_text(output, f"{where}.output", TEXT)})
    else:
        raise ApiError(400, f"{where}: items of type {str(kind)[:40]!r} are not supported", param=where)


def _tools(service: Service, asked: ResponsesRequest) -> ToolUse | None:
    choice: Any = "auto" if asked.tool_choice is None else asked.tool_choice
    named = isinstance(choice, dict)
    if named:
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise ApiError(400, "tool_choice: expected {type: 'function', name: NAME}", param="tool_choice")
        choice = choice["name"]
    elif choice not in ("none", "auto", "required"):
        raise ApiError(400, f"tool_choice: expected none, auto or required, got {choice[:80]!r}", param="tool_choice")
    if not asked.tools:
        if named or choice == "required":
            raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
        return None
    if choice == "none" and not named:
        return None
    shown = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.parameters or {"type": "object", "properties": {}},
                **({"strict": True} if tool.strict else {}),
            },
        }
        for tool in asked.tools
    ]
    parallel = asked.parallel_tool_calls is not False
    return ToolUse(service.llm.tokenizer, shown, choice, named=named, parallel=parallel)


# ------------------------------------------------------------------------------------------------ what is answered


class _Made:
    """A response while it is made: its items, and an event for every change of them."""

    def __init__(self, service: Service, asked: ResponsesRequest, answer: ChatAnswer, logprobs: bool) -> None:
        self._service, self._asked, self._answer, self._logprobs = service, asked, answer, logprobs
        self._id, self._created = f"resp_{token_hex(16)}", int(time())
        self._numbers = count()
        self._items: list[dict[str, Any]] = []
        self._open: tuple[str, int] | None = None  # text, or the number of a call

    async def whole(self) -> dict[str, Any]:
        try:
            async for delta in self._answer.deltas():
                self._take(delta)
        finally:
            self._answer.cancel()
        self._close()
        return self._response(self._status)

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))
            async with aclosing(self._answer.deltas()) as deltas:
                async for delta in deltas:
                    for event in self._take(delta):
                        yield event
            for event in self._close():
                yield event
            yield self._event(f"response.{self._status}", response=self._response(self._status))
        except Exception as error:  # the status has been sent: the stream says it
            found = api_error(error)
            if self._open is not None:
                self._items[-1]["status"] = "incomplete"
            failed = self._response("failed")
            failed["error"] = {"code": found.code or "server_error", "message": found.message}
            yield self._event("response.failed", response=failed)
        finally:
            self._answer.cancel()

    @property
    def _status(self) -> str:
        return "incomplete" if self._answer.finish_reason == "length" else "completed"

    def _event(self, kind: str, **values: Any) -> bytes:
        return sse({"type": kind, "sequence_number": next(self._numbers), **values}, kind)

    # ------------------------------------------------------------------------------------------ items

    def _take(self, delta: Delta) -> list[bytes]:
        found: list[bytes] = []
        if delta.text or delta.logprobs:
            if self._open != ("text", 0):
                found += self._close() + self._begin_text()
            part = self._items[-1]["content"][0]
            part["text"] += delta.text
            reports = [_report(one) for one in delta.logprobs]
            part["logprobs"] += reports
            found.append(self._part("response.output_text.delta", delta=delta.text, logprobs=reports))
        for call in delta.calls:
            if self._open != ("call", call.index):
                found += self._close() + self._begin_call(call)
            if call.arguments:
                self._items[-1]["arguments"] += call.arguments
                found.append(self._item("response.function_call_arguments.delta", delta=call.arguments))
        return found

    def _begin_text(self) -> list[bytes]:
        item = {"id": f"msg_{token_hex(16)}", "type": "message", "role": "assistant", "status": "in_progress"}
        self._items.append({**item, "content": []})
        self._open = ("text", 0)
        added = self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._items[-1])
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        begun = self._part("response.content_part.added", part=part)
        self._items[-1]["content"].append(part)
        return [added, begun]

    def _begin_call(self, call: CallDelta) -> list[bytes]:
        self._items.append(
            {
                "id": f"fc_{token_hex(16)}",
                "type": "function_call",
                "call_id": call.id,
                "name": call.name,
                "arguments": "",
                "status": "in_progress",
            }
        )
        self._open = ("call", call.index)
        return [self._event("response.output_item.added", output_index=len(self._items) - 1, item=self._items[-1])]

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        item, (kind, _) = self._items[-1], self._open
        self._open = None
        cut = self._answer.finish_reason == "length"
        item["status"] = "incomplete" if cut else "completed"
        if kind == "text":
            part = item["content"][0]
            found = [
                self._part("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
                self._part("response.content_part.done", part=part),
            ]
        else:
            found = [
                self._item("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
            ]
        return [*found, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _item(self, kind: str, **values: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **values)

    def _part(self, kind: str, **values: Any) -> bytes:
        return self._item(kind, content_index=0, **values)

    def _response(self, status: str) -> dict[str, Any]:
        asked, params = self._asked, self._answer.answer.request.params
        cut = status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "completed_at": int(time()) if status in ("completed", "incomplete") else None,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._service.settings.served_name,
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (asked.text and asked.text.format) or {"type": "text"}},
            "tool_choice": "auto" if asked.tool_choice is None else asked.tool_choice,
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
            "user": asked.user,
        }

    def _usage(self) -> dict[str, Any]:
        request = self._answer.answer.request
        generated = request.stats.generated
        return {
            "input_tokens": request.prompt_length,
            "input_tokens_details": {"cached_tokens": cached_tokens(self._answer.answer), "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": request.prompt_length + generated,
            "speculative": self._service.speculative([self._answer.answer]),
        }


def _report(one: TokenReport) -> dict[str, Any]:
    def values(token: str, raw: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(raw)}

    top: Sequence[dict[str, Any]] = [values(token, raw, logprob) for token, raw, logprob in one.top]
    return {**values(one.token, one.raw, one.logprob), "top_logprobs": top}
