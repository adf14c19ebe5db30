"""The Responses interface: the conversation that a template is given, and items while an answer is made."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.serving.chat_run import Delta
from outrider.serving.responses_endpoint import ResponsesRequest, _Made
from outrider.serving.tool_use import CallDelta
from outrider.serving.web import ApiError


def made(deltas: list[Delta], reason: str = "stop", error: Exception | None = None, **asked: Any) -> _Made:
    """A response whose answer brings these deltas, and then fails where there is an error."""

    class Answer:
        finish_reason = reason
        answer = SimpleNamespace(
            request=SimpleNamespace(
                params=SimpleNamespace(temperature=1.0, top_p=1.0), prompt_length=3, stats=Stats(7, 2)
            )
        )

        async def deltas(self) -> Any:
            for delta in deltas:
                yield delta
            if error is not None:
                raise error

        def cancel(self) -> None:
            pass

    service: Any = SimpleNamespace(settings=SimpleNamespace(served_name="tiny"), speculative=lambda answers: {})
    request = ResponsesRequest.model_validate({"input": "Hot?", **asked})
    return _Made(service, request, Answer(), True)  # type: ignore[arg-type]


class Stats(SimpleNamespace):
    def __init__(self, generated: int, cached: int) -> None:
        super().__init__(generated=generated, cached_tokens=cached)


def streamed(response: _Made) -> list[dict[str, Any]]:
    async def read() -> list[bytes]:
        return [event async for event in response.stream()]

    return [json.loads(event.partition(b"data: ")[2]) for event in asyncio.run(read())]


CALLS = [CallDelta(0, "", "c0", "now"), CallDelta(0, "{}"), CallDelta(1, "", "c1", "oven"), CallDelta(1, '{"a": 1}')]


@pytest.mark.parametrize("delta", [Delta("It is"), Delta("", CALLS[:1])], ids=["text", "call"])
def test_a_failed_stream_leaves_no_item_in_progress(delta: Delta) -> None:
    last = streamed(made([delta], error=ApiError(503, "the server ends", code="server_shutdown")))[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_shutdown", "message": "the server ends"}
    assert [item["status"] for item in last["response"]["output"]] == ["incomplete"]
