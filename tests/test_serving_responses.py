"""The Responses interface: the conversation that a template is given, and items while an answer is made."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from served import check_choice, choosing_tools

from outrider.serving.chat_run import Delta, TokenReport
from outrider.serving.responses_endpoint import ResponsesRequest, _conversation, _Made, _tools
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


def test_items_become_messages_as_templates_take_them() -> None:
    call = {"type": "function_call", "call_id": "c0", "name": "now", "arguments": '{"at": 1}'}
    asked = ResponsesRequest.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
                call,
                {**call, "call_id": "c1", "arguments": "no JSON"},
                {"type": "function_call_output", "call_id": "c0", "output": "12"},
                {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "13"}]},
            ],
        }
    )

    def shown(number: str, arguments: Any) -> dict[str, Any]:
        return {"id": number, "type": "function", "function": {"name": "now", "arguments": arguments}}

    assert _conversation(asked) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [shown("c0", {"at": 1}), shown("c1", "no JSON")]},
        {"role": "tool", "tool_call_id": "c0", "content": "12"},
        {"role": "tool", "tool_call_id": "c1", "content": "13"},
    ]
    alone = [call, {"type": "function_call_output", "call_id": "c0", "output": "12"}]
    assert _conversation(ResponsesRequest.model_validate({"input": alone}))[0] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [shown("c0", {"at": 1})],
    }
    with pytest.raises(ApiError, match="at least one message"):
        _conversation(ResponsesRequest.model_validate({"input": [{"role": "system", "content": "a"}]}))


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_every_item_is_begun_and_ended_once(reason: str) -> None:
    report = TokenReport("It", b"It", -0.5, (("It", b"It", -0.5),))
    deltas = [Delta("It", logprobs=[report]), Delta(" is"), Delta("", CALLS[:2]), Delta("", CALLS[2:])]
    events = streamed(made(deltas, reason))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    status = "incomplete" if reason == "length" else "completed"
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{status}" and last["status"] == status
    assert last["incomplete_details"] == ({"reason": "max_output_tokens"} if reason == "length" else None)
    text, now, oven = last["output"]
    (part,) = text["content"]
    assert part["text"] == "It is" and [one["token"] for one in part["logprobs"]] == ["It"]
    assert (now["call_id"], now["name"], now["arguments"]) == ("c0", "now", "{}")
    assert (oven["call_id"], oven["name"], oven["arguments"]) == ("c1", "oven", '{"a": 1}')
    assert text["status"] == now["status"] == "completed" or reason == "length"
    assert oven["status"] == status
    for kind in ("response.output_item.added", "response.output_item.done"):
        found = [event for event in events if event["type"] == kind]
        assert [event["output_index"] for event in found] == [0, 1, 2]
        assert [event["item"]["id"] for event in found] == [item["id"] for item in last["output"]]
    assert [event["item"] for event in found] == last["output"]
    assert events[0]["response"]["usage"] is None
    assert last["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert last["usage"]["output_tokens"] == 7 and last["usage"]["total_tokens"] == 10


def test_a_response_repeats_what_was_asked() -> None:
    form = {"type": "json_schema", "name": "a", "schema": {}}
    asked = {"metadata": {"a": "b"}, "text": {"format": form}, "tool_choice": "none", "parallel_tool_calls": False}
    found = asyncio.run(made([Delta("It is")], instructions="Be brief.", **asked).whole())
    assert found["text"]["format"] == form and found["instructions"] == "Be brief."
    assert {name: found[name] for name in ("metadata", "tool_choice", "parallel_tool_calls")} == {
        name: asked[name] for name in ("metadata", "tool_choice", "parallel_tool_calls")
    }


@pytest.mark.parametrize(
    ("choice", "parallel", "forced", "most"),
    [
        (None, None, False, None),
        ("auto", False, False, 1),
        ("required", True, True, None),
        ({"type": "function", "name": "now"}, True, True, None),
    ],
)
def test_choices_of_tools(choice: Any, parallel: bool | None, forced: bool, most: int | None) -> None:
    def asked(choice: Any) -> ResponsesRequest:
        tool = {"type": "function", "name": "now", "strict": True}
        body = {"input": "a", "tools": [tool], "tool_choice": choice, "parallel_tool_calls": parallel}
        return ResponsesRequest.model_validate(body)

    service = choosing_tools()
    check_choice(_tools(service, asked(choice)), forced, most)
    assert _tools(service, asked("none")) is None
