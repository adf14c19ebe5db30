"""Answers to a conversation, whichever interface asks: text, calls and log-probabilities as they come."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from outrider.config import Grammar, SamplingParams
from outrider.errors import InvalidRequest, OutriderError
from outrider.serving.conversation import encode_conversation
from outrider.serving.engine_thread import Answer
from outrider.serving.fields import SamplingFields
from outrider.serving.service import Service
from outrider.serving.tool_use import CallDelta, ToolUse
from outrider.serving.web import ApiError
from outrider.types import Piece

__all__ = ["ChatAnswer", "ChatJob", "Delta", "TokenReport", "api_error", "begin", "piece_reports", "token_reports"]

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ChatJob:
    """A conversation and how to answer it, in no interface's own form."""

    messages: Sequence[Mapping[str, Any]]  # as chat templates take them
    fields: SamplingFields
    max_tokens: int | None = None
    max_tokens_name: str = "max_tokens"
    messages_name: str = "messages"
    tools: ToolUse | None = None
    grammar: Grammar | None = None
    grammar_name: str = "response_format"
    n: int = 1
    logprobs: int | None = None
    variables: Mapping[str, Any] | None = None
    continue_final: bool = False
    answer_follows: bool | None = None  # None: unless the final message is continued
    prediction: str | None = None


@dataclass(frozen=True, slots=True)
class TokenReport:
    """A token's log-probabilities, by text."""

    token: str
    raw: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What a round brings."""

    text: str = ""
    calls: Sequence[CallDelta] = ()
    logprobs: list[TokenReport] = field(default_factory=list)
    pieces: Sequence[Piece] = ()
    finish_reason: Reason | None = None  # on the last one


async def begin(service: Service, job: ChatJob) -> list[ChatAnswer]:
    """The choices of a job, all of them running. Raises ApiError, InvalidRequest."""
    service.check_options(job.fields.outrider)
    tools = job.tools
    shown = [] if tools is None else tools.for_template
    prompt = await encode_conversation(
        service,
        job.messages,
        shown,
        name=job.messages_name,
        variables=job.variables,
        continue_final=job.continue_final,
        answer_follows=job.answer_follows,
    )
    most = service.new_tokens(prompt, job.max_tokens, job.max_tokens_name, job.messages_name)
    grammar, name = job.grammar, job.grammar_name
    if tools is not None and tools.grammar is not None:
        if grammar is not None:
            raise ApiError(
                400, f"tool_choice asks for a call and {name} for a text: ask for one of them", param="tool_choice"
            )
        grammar, name = tools.grammar, "tools"
    if grammar is not None:
        await service.check_grammar(grammar, name)
    params = job.fields.sampling(service.llm.target.spec.defaults, most, logprobs=job.logprobs, grammar=grammar)
    prediction = () if job.prediction is None else service.llm.tokenizer.encode_literally(job.prediction)
    answers = await service.submit([prompt], params, job.n, prediction)
    return [ChatAnswer(service, answer, tools) for answer in answers]


class ChatAnswer:
    """One choice."""

    def __init__(self, service: Service, answer: Answer, tools: ToolUse | None = None) -> None:
        self.answer = answer
        self._service = service
        self._reader = None if tools is None else tools.reader()
        self.finish_reason: Reason = "stop"

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Its text as it comes; the last one has the reason why it ended. Raises ApiError where it failed."""
        reader, called = self._reader, False
        try:
            async with aclosing(self.answer.events()) as events:
                async for event in events:
                    reports = token_reports(self._service, event.pieces)
                    if reader is None:
                        yield Delta(event.text, logprobs=reports, pieces=event.pieces)
                        continue
                    text, calls = reader.feed(event.pieces)
                    called = called or bool(calls)
                    yield Delta(text, calls, reports, event.pieces)
                    if reader.complete:  # one call was asked for, and it is there
                        break
        except OutriderError as error:
            raise api_error(error) from None
        if reader is not None:
            text, calls = reader.finish()
            called = called or bool(calls)
            if text or calls:
                yield Delta(text, calls)
        reason = self.answer.request.finish_reason
        if reader is not None and reader.complete:
            self.finish_reason = "tool_calls"
        elif reason == "stop":
            self.finish_reason = "tool_calls" if called else "stop"
        elif reason == "length":
            self.finish_reason = "length"
        else:
            raise ApiError(503, f"the server ended this answer early: {reason}", code="server_shutdown", retry_after=5)
        yield Delta(finish_reason=self.finish_reason)

    def cancel(self) -> None:
        self.answer.cancel()


def piece_reports(pieces: Iterable[Piece]) -> dict[str, Any]:
    """The field ``outrider`` of a choice: what ``outrider.pieces`` asks for."""
    return {
        "pieces": [
            {
                "token_id": piece.token_id,
                "text": piece.text,
                "drafted": piece.drafted,
                "probability": None if piece.logprobs is None else math.exp(piece.logprobs.logprob),
                "draft_probability": None if piece.draft is None else piece.draft.probability,
                "confidence": None if piece.draft is None else piece.draft.confidence,
            }
            for piece in pieces
        ]
    }


def api_error(error: Exception) -> ApiError:
    """The HTTP form of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OutriderError):
        first = str(error).partition(" ")[0]  # of many, the sampling parameter at fault
        param = first if first in SamplingParams.__dataclass_fields__ else None
        return ApiError(400 if isinstance(error, InvalidRequest) else 500, str(error), param=param)
    return ApiError(500, "the server failed; its log has the reason")


def token_reports(service: Service, pieces: Sequence[Piece]) -> list[TokenReport]:
    """Of the tokens that have text and whose log-probabilities were asked for."""
    stop_ids = service.llm.target.spec.eos_token_ids
    found = []
    for piece in pieces:
        if piece.logprobs is None or piece.token_id in stop_ids:
            continue
        top = tuple((*service.token_text(token), logprob) for token, logprob in piece.logprobs.top)
        found.append(TokenReport(*service.token_text(piece.token_id), piece.logprobs.logprob, top))
    return found
