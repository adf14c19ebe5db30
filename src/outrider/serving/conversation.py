"""From the messages of a request to the prompt of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from outrider.errors import CheckpointError
from outrider.serving.fields import Strict
from outrider.serving.service import Service
from outrider.serving.web import ApiError
from outrider.tokenization.chat_template import has_calls, with_system_in_user

__all__ = [
    "MOST_MESSAGES",
    "ChatMessage",
    "Tool",
    "encode_conversation",
    "part_text",
    "plain_text",
    "template_messages",
]

MOST_MESSAGES = 10_000
OF_THE_REQUEST = ("messages", "tools", "add_generation_prompt", "continue_final_message", "self")


class _CalledFunction(Strict):
    name: str
    arguments: str


class _ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    index: int | None = None
    function: _CalledFunction


class ChatMessage(Strict):
    """One message as OpenAI's clients send it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    """An answer's own, sent back: they are empty here."""


class _Function(Strict):
    name: str = Field(min_length=1, max_length=128, pattern=r"^[^\s\x00-\x1f]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: _Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = self.function
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": function.parameters or {"type": "object", "properties": {}},
                **({"strict": True} if function.strict else {}),
            },
        }


def plain_text(content: Any, where: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """The text of a content: a string, or parts of these kinds, a line each. Raises ApiError for other parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part_text(part, f"{where}.{number}", kinds) for number, part in enumerate(content))


def part_text(part: Mapping[str, Any], path: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """The text of one part, which is at ``path``. Raises ApiError for one of another kind."""
    kind = part.get("type")
    if kind not in kinds:
        raise ApiError(
            400,
            f"{path}: parts of type {str(kind)[:40]!r} are not supported, expected {' or '.join(map(repr, kinds))}",
            param=path,
            code="unsupported_content",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise ApiError(400, f"{path}.text: expected a string, got {type(text).__name__}", param=f"{path}.text")
    known = {"type", "text", "cache_control", "annotations", "logprobs", "citations"}
    if unknown := [key for key in part if key not in known]:
        raise ApiError(400, f"{path}: unknown field {unknown[0][:80]!r}; remove it", param=f"{path}.{unknown[0]}")
    return text


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them. Raises ApiError."""
    if len(messages) > MOST_MESSAGES:
        raise ApiError(400, f"messages: got {len(messages)}, expected at most {MOST_MESSAGES}", param="messages")
    found = []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        role = "system" if message.role == "developer" else message.role
        kinds = ("text", "refusal") if role == "assistant" else ("text",)
        one: dict[str, Any] = {"role": role, "content": plain_text(message.content, f"{where}.content", kinds)}
        if message.content is None and not message.tool_calls and role != "assistant":
            raise ApiError(400, f"{where}.content: expected a text, got nothing", param=f"{where}.content")
        if role == "tool" and message.tool_call_id is None:
            raise ApiError(400, f"{where}.tool_call_id is missing: it says which call this answers", param=where)
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                one[name] = value
        if message.reasoning is not None:
            one.setdefault("reasoning_content", message.reasoning)
        if message.tool_calls:
            one["tool_calls"] = [_call_for_template(call) for call in message.tool_calls]
        found.append(one)
    return found


def _call_for_template(call: _ToolCall) -> dict[str, Any]:
    """Templates write arguments as JSON themselves, so they get the object."""
    try:
        arguments: Any = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = call.function.arguments  # what a model wrote once; the template shows it as it is
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


async def encode_conversation(
    service: Service,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    name: str = "messages",
    variables: Mapping[str, Any] | None = None,
    continue_final: bool = False,
    answer_follows: bool | None = None,
) -> list[int]:
    """Tokens of a conversation up to where the answer begins; without ``answer_follows`` (default: unless the final
    message is continued) up to its last message's end. ``name``: the field that holds it. Raises ApiError,
    InvalidRequest."""
    tokenizer = service.llm.tokenizer
    follows = not continue_final if answer_follows is None else answer_follows
    for field in OF_THE_REQUEST:
        if field in (variables or ()):
            raise ApiError(
                400,
                f"chat_template_kwargs: {field!r} is no variable of a template; leave it out, or give it as a field of "
                "the request",
                param="chat_template_kwargs",
            )
    if not tokenizer.has_chat_template:
        raise ApiError(
            400, f"{service.settings.served_name} has no chat template: use /v1/completions", code="no_chat_template"
        )
    _check_calls(messages, name)
    options = {**(variables or {}), "tools": list(tools) or None}
    if has_calls(messages) and not tokenizer.shows_calls(options["tools"]):
        without = "" if tools else " where a request has no tools"
        raise ApiError(
            400,
            f"{name}: the model's chat template leaves out tool calls or their results{without}, so the model would "
            "not see them; write them as text, or use a model that was trained for tools",
            param=name,
        )
    shown = messages if tokenizer.takes_system else with_system_in_user(messages)
    characters = sum(len(message["content"]) for message in messages)

    def make() -> list[int]:
        try:
            return tokenizer.encode_chat(shown, follows, continue_final_message=continue_final, **options)
        except CheckpointError as error:
            raise ApiError(400, str(error)) from None

    return await service.encode(make, characters, name)


def _check_calls(messages: Sequence[Mapping[str, Any]], name: str) -> None:
    """Raise ApiError for a call without a result behind it, as OpenAI and Anthropic do. No answer belongs there, and
    many templates do not show the call."""
    answered: set[str] = set()
    for message in reversed(messages):
        if message["role"] == "tool":
            answered.add(message["tool_call_id"])
        for call in message.get("tool_calls", ()):
            if call["id"] not in answered:
                raise ApiError(
                    400,
                    f"{name}: the call {call['id'][:80]!r} of {call['function']['name'][:80]!r} has no result: a tool "
                    "call must be followed by its result, which names the call's id",
                    param=name,
                )
