"""Anthropic's interface: the conversation that a template is given, choices of tools, and answers that are begun."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from served import check_choice, choosing_tools, serving

from outrider.engine.llm import LLM
from outrider.serving.messages_endpoint import CountRequest, _conversation, _end, _Thinking, _thinking, _tools

TOOL = {"name": "now", "strict": True, "input_schema": {"type": "object", "properties": {}}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_blocks_become_messages_as_templates_take_them() -> None:
    result = {"type": "tool_result", "tool_use_id": "c1"}
    asked = CountRequest.model_validate(
        {
            "system": [text("Be brief."), text("Be kind.")],
            "messages": [
                {"role": "user", "content": [text("a"), text("b")]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": ""},
                        text("c"),
                        text("d"),
                        {"type": "tool_use", "id": "c1", "name": "now", "input": {"at": 1}},
                    ],
                },
                {"role": "user", "content": [{**result, "content": "broken", "is_error": True}, text("e")]},
                {"role": "user", "content": [{**result, "content": [text("12"), text("13")], "is_error": False}]},
                {"role": "user", "content": []},
            ],
        }
    )
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {"at": 1}}}
    assert _conversation(asked) == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "cd", "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "Error: broken"},
        {"role": "user", "content": "e"},
        {"role": "tool", "tool_call_id": "c1", "content": "12\n13"},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize(
    ("choice", "forced", "most"),
    [
        (None, False, None),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, 1),
        ({"type": "any"}, True, None),
        ({"type": "any", "disable_parallel_tool_use": True}, True, 1),
        ({"type": "tool", "name": "now"}, True, None),
    ],
)
def test_choices_of_tools(choice: dict[str, Any] | None, forced: bool, most: int | None) -> None:
    def asked(choice: dict[str, Any] | None) -> CountRequest:
        messages = [{"role": "user", "content": "a"}]
        return CountRequest.model_validate({"messages": messages, "tools": [TOOL], "tool_choice": choice})

    service = choosing_tools()
    check_choice(_tools(service, asked(choice)), forced, most)
    assert _tools(service, asked({"type": "none"})) is None


@pytest.mark.parametrize(
    ("finish", "stopped", "reason"),
    [
        ("stop", None, "end_turn"),
        ("stop", "x", "stop_sequence"),
        ("length", None, "max_tokens"),
        ("tool_calls", "x", "tool_use"),
    ],
)
def test_a_stop_sequence_is_told_where_it_is_the_reason(finish: str, stopped: str | None, reason: str) -> None:
    request = SimpleNamespace(finisher=SimpleNamespace(stop_string=stopped))
    answer: Any = SimpleNamespace(finish_reason=finish, answer=SimpleNamespace(request=request))
    told = stopped if reason == "stop_sequence" else None
    assert _end(answer) == {"stop_reason": reason, "stop_sequence": told}


@pytest.mark.parametrize(
    ("kind", "variables"),
    [("enabled", {"enable_thinking": True}), ("disabled", {"enable_thinking": False}), ("adaptive", None)],
)
def test_thinking_is_a_variable_of_the_template(kind: Any, variables: dict[str, Any] | None) -> None:
    assert _thinking(_Thinking(type=kind)) == variables and _thinking(None) is None


def test_counts_of_drafts_come_at_the_end_of_a_stream() -> None:
    """Anthropic's client kept those of the beginning, which were zeros, in its final message."""
    body = {"messages": [{"role": "user", "content": "Hot?"}], "max_tokens": 3, "stream": True}
    with serving(LLM("embedded", "none")) as (url, _), httpx.Client(base_url=url, timeout=20) as client:
        lines = client.post("/v1/messages", json=body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    start, end = events[0]["message"], next(event for event in events if event["type"] == "message_delta")
    assert start["content"] == [] and start["usage"]["output_tokens"] == 0 and "speculative" not in start["usage"]
    assert end["usage"]["output_tokens"] > 0 and end["usage"]["speculative"]["drafter"] == "none"
    assert events[1] == {"type": "ping"}


def test_an_answer_that_is_begun_goes_on() -> None:
    asked = [{"role": "user", "content": "Hot?"}, {"role": "assistant", "content": "It is"}]
    llm = LLM("embedded", "none")
    prompt = llm.tokenizer.encode_chat(asked, False, continue_final_message=True)
    assert prompt != llm.tokenizer.encode_chat(asked)
    with serving(llm) as (url, _), httpx.Client(base_url=url, timeout=20) as client:
        counted = client.post("/v1/messages/count_tokens", json={"messages": asked}).json()
        assert counted == {"input_tokens": len(prompt)}
        for _ in range(2):  # the second time the prompt's keys and values are there
            usage = client.post("/v1/messages", json={"messages": asked, "max_tokens": 1}).json()["usage"]
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(prompt)
