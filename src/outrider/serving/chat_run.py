"""Answers to a conversation, whichever API asks: text and its log-probabilities as they come, and why it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider.errors import InvalidRequest, OutriderError
from outrider.serving.engine_thread import Answer
from outrider.serving.service import Service
from outrider.serving.web import ApiError
from outrider.types import Piece

__all__ = ["ChatAnswer", "Delta", "TokenReport", "api_error", "token_reports"]


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
    logprobs: list[TokenReport] = field(default_factory=list)
    finish_reason: str | None = None


class ChatAnswer:
    """One choice."""

    def __init__(self, service: Service, answer: Answer) -> None:
        self.answer = answer
        self._service = service
        self.finish_reason = ""

    async def deltas(self) -> AsyncIterator[Delta]:
        """Its text as it comes; the last one has the reason why it ended. Raises ApiError where it failed."""
        try:
            async for event in self.answer.events():
                reports = token_reports(self._service, event.pieces)
                yield Delta(event.text, reports)
        except OutriderError as error:
            raise api_error(error) from None
        reason = self.answer.request.finish_reason
        if reason not in ("stop", "length"):
            raise ApiError(503, f"the server ended this answer early: {reason}", code="server_shutdown", retry_after=5)
        self.finish_reason = reason
        yield Delta(finish_reason=reason)


def api_error(error: Exception) -> ApiError:
    """The HTTP form of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (InvalidRequest, OutriderError)):
        code = "context_length_exceeded" if "pass the context" in str(error) else None
        return ApiError(400 if isinstance(error, InvalidRequest) else 500, str(error), code=code)
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


def chat_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    """The field ``logprobs`` of a choice of a chat completion."""
    return {
        "content": [
            {
                "token": one.token,
                "logprob": one.logprob,
                "bytes": list(one.raw),
                "top_logprobs": [
                    {"token": text, "logprob": logprob, "bytes": list(raw)} for text, raw, logprob in one.top
                ],
            }
            for one in reports
        ],
        "refusal": None,
    }
