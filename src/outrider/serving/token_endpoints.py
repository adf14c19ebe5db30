"""``POST /v1/tokenize`` and ``/v1/detokenize``: text and tokens, as the model reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outrider.serving.conversation import MOST_MESSAGES, ChatMessage, Tool, encode_conversation, template_messages
from outrider.serving.fields import Strict
from outrider.serving.service import Service
from outrider.serving.tool_use import ToolUse
from outrider.serving.web import ApiError, JsonResponse, parse

__all__ = ["DetokenizeRequest", "TokenizeRequest", "detokenize", "tokenize"]


class TokenizeRequest(Strict):
    """A text (``prompt``) or a conversation (``messages``)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, max_length=MOST_MESSAGES)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int]


async def tokenize(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """Token ids, and their texts where they are asked for."""
    asked = parse(TokenizeRequest, body, {})
    service.check_model(asked.model)
    tokenizer, text = service.llm.tokenizer, asked.prompt
    if (text is None) == (asked.messages is None):
        raise ApiError(400, "expected prompt or messages, and not both", param="prompt")
    if asked.tools is not None and text is not None:
        raise ApiError(400, "tools: a prompt shows none; send them with messages", param="tools")
    if text is None and asked.add_special_tokens:
        raise ApiError(
            400, "add_special_tokens: the chat template writes them; leave it out", param="add_special_tokens"
        )
    if text is None:
        tools = [tool.for_template() for tool in asked.tools or ()]
        if tools:  # refused where the template has none
            tools = ToolUse(tokenizer, tools, "auto", named=False, parallel=True).for_template
        tokens = await encode_conversation(service, template_messages(asked.messages or ()), tools)
    else:
        tokens = await service.encode(
            lambda: tokenizer.encode(text, add_special_tokens=asked.add_special_tokens is not False),
            len(text),
            "prompt",
        )
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.llm.target.spec.max_positions,
        "tokens": tokens,
    }
    if asked.return_token_strs:
        found["token_strs"] = [service.token_text(token)[0] for token in tokens]
    return JsonResponse(found)


async def detokenize(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """The text of token ids, special tokens included."""
    asked = parse(DetokenizeRequest, body, {})
    service.check_model(asked.model)
    service.check_ids(asked.tokens, "tokens")
    return JsonResponse({"prompt": service.llm.tokenizer.decode(asked.tokens, skip_special_tokens=False)})
