"""``POST /v1/completions``: a text goes on, or is filled in before a suffix."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from secrets import token_hex
from time import time
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from outrider.serving.chat_run import ChatAnswer, Delta, TokenReport, api_error, piece_reports
from outrider.serving.fields import SamplingFields, StreamFields
from outrider.serving.infilling import infill_tokens
from outrider.serving.response_format import grammar_of
from outrider.serving.service import Service
from outrider.serving.streams import merged
from outrider.serving.web import ApiError, EventStreamResponse, JsonResponse, parse, sse

__all__ = ["CompletionRequest", "completions"]

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "prompt_logprobs": (0,),
    "store": (False,),
}
MOST_PROMPTS = 64
DEFAULT_TOKENS = 16  # OpenAI's, for this endpoint alone


class CompletionRequest(SamplingFields, StreamFields):
    """The body of a completion."""

    prompt: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    suffix: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=1, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    user: str | None = None


@dataclass(frozen=True)
class _Shown:
    """What every chunk of one answer shares."""

    head: Mapping[str, Any]
    asked: CompletionRequest
    echoes: Sequence[str]  # of each choice

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """An event of a stream."""
        return sse({**self.head, "choices": [choice], **({"usage": None} if self.asked.tells_usage else {})})


async def completions(service: Service, body: Mapping[str, Any], request: Request) -> Response:
    """Go on with one prompt or several."""
    asked = parse(CompletionRequest, body, UNSUPPORTED)
    n = asked.n or 1
    service.check_model(asked.model)
    service.check_options(asked.outrider)
    service.check_n(n)
    asked.check_stream()
    if asked.echo and asked.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported: ask for one of them", param="echo")
    if asked.echo and asked.suffix is not None:
        raise ApiError(400, "echo with suffix is not supported: ask for one of them", param="echo")
    if asked.max_tokens == 0 and not asked.echo:
        raise ApiError(400, "max_tokens: expected at least 1 without echo, got 0", param="max_tokens")
    prompts = [await _encode(service, one, asked.suffix) for one in _prompts(asked.prompt)]
    most = 1 if asked.max_tokens == 0 else min(service.new_tokens(prompt, asked.max_tokens) for prompt in prompts)
    if asked.max_tokens is None:
        most = min(most, DEFAULT_TOKENS)
    grammar = grammar_of(asked.response_format)
    if grammar is not None:
        await service.check_grammar(grammar, "response_format")
    params = asked.sampling(service.llm.target.spec.defaults, most, logprobs=asked.logprobs, grammar=grammar)
    head = {
        "id": f"cmpl-{token_hex(12)}",
        "object": "text_completion",
        "created": int(time()),
        "model": service.settings.served_name,
        "system_fingerprint": service.fingerprint,
    }
    decode = service.llm.tokenizer.decode
    echoed = [decode(prompt, skip_special_tokens=True) if asked.echo else "" for prompt in prompts]
    shown = _Shown(head, asked, [text for text in echoed for _ in range(n)])
    if asked.max_tokens == 0:
        return _prompts_alone(shown, prompts)
    answers = await service.submit(prompts, params, n)
    choices = [ChatAnswer(service, answer) for answer in answers]
    if asked.stream:
        return EventStreamResponse(_stream(service, shown, choices))
    return JsonResponse(await _whole(service, shown, choices))


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    many: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not 0 < len(many) <= MOST_PROMPTS:
        raise ApiError(400, f"prompt: expected 1 to {MOST_PROMPTS} prompts, got {len(many)}", param="prompt")
    return many


async def _encode(service: Service, prompt: str | list[int], suffix: str | None) -> list[int]:
    tokenizer = service.llm.tokenizer
    if not isinstance(prompt, str):
        if suffix is not None:
            raise ApiError(400, "suffix needs a prompt that is text, got token ids", param="suffix")
        service.check_ids(prompt, "prompt")
        tokens = await service.encode(lambda: prompt, 0, "prompt")
    elif suffix is None:
        tokens = await service.encode(lambda: tokenizer.encode(prompt), len(prompt), "prompt")
    else:
        characters = len(prompt) + len(suffix)
        tokens = await service.encode(lambda: infill_tokens(tokenizer, prompt, suffix), characters, "prompt")
    if not tokens:
        raise ApiError(400, "prompt: it has no tokens; expected at least 1", param="prompt")
    return tokens


def _prompts_alone(shown: _Shown, prompts: Sequence[Sequence[int]]) -> Response:
    """``max_tokens`` 0 with ``echo``: nothing runs."""
    choices = [_choice(i, text, None, "length") for i, text in enumerate(shown.echoes)]
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}
    if not shown.asked.stream:
        return JsonResponse({**shown.head, "choices": choices, "usage": usage})

    async def events() -> AsyncIterator[bytes]:
        for choice in choices:
            yield shown.chunk(choice)
        if shown.asked.tells_usage:
            yield sse({**shown.head, "choices": [], "usage": usage})
        yield sse("[DONE]")

    return EventStreamResponse(events())


def _choice(index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class _Offsets:
    """Where each token of a text begins, in characters. A token may be a part of one."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def of(self, reports: Sequence[TokenReport]) -> list[int]:
        """Of the tokens that come next."""
        begins = []
        for one in reports:
            begins.append(self._characters)
            self._characters += len(self._decoder.decode(one.raw))
        return begins


def _logprobs(reports: Sequence[TokenReport], offsets: _Offsets) -> dict[str, Any]:
    """The older form of log-probabilities."""
    return {
        "tokens": [_name(one.token, one.raw) for one in reports],
        "token_logprobs": [one.logprob for one in reports],
        "top_logprobs": [{_name(text, raw): logprob for text, raw, logprob in one.top} for one in reports],
        "text_offset": offsets.of(reports),
    }


def _name(text: str, raw: bytes) -> str:
    """A token's text; its bytes where they are a part of a character, since many tokens would have the same name."""
    if text.encode("utf-8", "replace") == raw:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


async def _whole(service: Service, shown: _Shown, choices: Sequence[ChatAnswer]) -> dict[str, Any]:
    found = []
    try:
        for index, choice in enumerate(choices):
            deltas: list[Delta] = [delta async for delta in choice.deltas()]
            text = shown.echoes[index] + "".join(delta.text for delta in deltas)
            reports = [one for delta in deltas for one in delta.logprobs]
            logprobs = None if shown.asked.logprobs is None else _logprobs(reports, _Offsets())
            found.append(_choice(index, text, logprobs, choice.finish_reason))
            if shown.asked.wants_pieces:
                found[-1]["outrider"] = piece_reports(piece for delta in deltas for piece in delta.pieces)
    finally:
        for choice in choices:
            choice.answer.cancel()
    return {
        **shown.head,
        "choices": found,
        "usage": service.usage([choice.answer for choice in choices], shown.asked.n or 1),
    }


async def _stream(service: Service, shown: _Shown, choices: Sequence[ChatAnswer]) -> AsyncIterator[bytes]:
    offsets = [_Offsets() for _ in choices]

    def chunk(index: int, delta: Delta) -> bytes:
        reports = delta.logprobs if shown.asked.logprobs is not None else []
        logprobs = _logprobs(reports, offsets[index]) if reports else None
        choice = _choice(index, delta.text, logprobs, delta.finish_reason)
        if shown.asked.wants_pieces:
            choice["outrider"] = piece_reports(delta.pieces)
        return shown.chunk(choice)

    try:
        for index, text in enumerate(shown.echoes):
            if text:
                yield chunk(index, Delta(text))
        async with aclosing(merged([choice.deltas() for choice in choices])) as deltas:
            async for index, delta in deltas:
                if delta.text or delta.pieces or delta.finish_reason:
                    yield chunk(index, delta)
        if shown.asked.tells_usage:
            total = service.usage([choice.answer for choice in choices], shown.asked.n or 1)
            yield sse({**shown.head, "choices": [], "usage": total})
    except Exception as error:  # the status has been sent: the stream says it
        yield sse(api_error(error).body())
    finally:
        for choice in choices:
            choice.answer.cancel()
    yield sse("[DONE]")
