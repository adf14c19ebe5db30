"""Tools through every interface, by the clients' own packages: a random model whose calls are forced by a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, save_llama
from served import drafting, serving

from outrider.engine.llm import LLM

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>{% endif %}"
    "{% for message in messages %}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}" + CHAT_TEMPLATE
)
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}},
    "required": ["unit"],
    "additionalProperties": False,
}
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Hot?"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x", "parameters": SCHEMA}}
    for name in ("weather", "oven")
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = save_llama(tmp_path_factory.mktemp("tools"), chat_template=TEMPLATE)
    with serving(drafting(folder), model_name="tiny") as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as one:
        yield one


def is_valid(arguments: str) -> bool:
    return json.loads(arguments) in ({"unit": "C"}, {"unit": "F"})


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "oven"}}], ids=["any", "oven"]
)
def test_openai_calls(client: openai.OpenAI, choice: Any) -> None:
    body = {"model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 120}
    body |= {"parallel_tool_calls": False, "temperature": 0, "seed": 1}
    answer = client.chat.completions.create(**body)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert call.function.name in ("weather", "oven") if choice == "required" else call.function.name == "oven"
    assert is_valid(call.function.arguments)
    plain = client.chat.completions.create(**body, extra_body={"outrider": {"off": True}})
    assert plain.choices[0].message.tool_calls[0].function == call.function

    chunks = list(client.chat.completions.create(**body, stream=True))
    deltas = [delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or ()]
    assert deltas[0].id and deltas[0].function.name == call.function.name
    assert all(delta.id is None and delta.index == 0 for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["tool_calls"]

    result = {"role": "tool", "tool_call_id": call.id, "content": "200"}
    again = [*ASK, answer.choices[0].message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(model="tiny", messages=again, tools=TOOLS, max_tokens=3).choices


def test_a_tool_choice_that_cannot_be_followed_is_named(client: openai.OpenAI) -> None:
    def param(schema: Any = SCHEMA, **more: Any) -> Any:
        function = {"name": "weather", "parameters": schema, "strict": True}
        body = {"model": "tiny", "messages": ASK, "tools": [{"type": "function", "function": function}], **more}
        with pytest.raises(openai.BadRequestError) as found:
            client.chat.completions.create(**body)
        return found.value.param

    assert param(tool_choice={"type": "function", "function": {"name": "none"}}) == "tool_choice"
    assert param(tool_choice="required", response_format={"type": "json_object"}) == "tool_choice"
    assert param(tool_choice="required", schema={"type": "nope"}) == "tools"
    assert param(tool_choice="required", schema={"x-guidance": 3}) == "tools"


def test_openai_responses_call(client: openai.OpenAI) -> None:
    tools = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
    body = {"model": "tiny", "input": "Hot?", "tools": tools, "tool_choice": "required", "max_output_tokens": 120}
    body |= {"parallel_tool_calls": False, "temperature": 0}
    answer = client.responses.create(**body)
    (call,) = answer.output
    assert call.type == "function_call" and is_valid(call.arguments) and answer.status == "completed"
    events = list(client.responses.create(**body, stream=True))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert done[0].arguments == "".join(parts) == call.arguments and done[0].name == call.name
    items = [{"role": "user", "content": "Hot?"}, call.model_dump(exclude_none=True)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "200"})
    assert client.responses.create(model="tiny", input=items, tools=tools, max_output_tokens=3).output


def test_anthropic_uses_tools(url: str) -> None:
    tools = [{"name": "weather", "description": "x", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}]
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 120, "messages": ASK, "tools": tools}
    body["tool_choice"] = {"type": "tool", "name": "weather"}
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(**body)
        (block,) = answer.content
        assert block.type == "tool_use" and block.name == "weather" and is_valid(json.dumps(block.input))
        assert answer.stop_reason == "tool_use"
        with client.messages.stream(**body) as stream:
            final = stream.get_final_message()
        assert final.content[0].type == "tool_use" and is_valid(json.dumps(final.content[0].input))
        result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "200"}]}
        again = [*ASK, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        counted = client.messages.count_tokens(model="tiny", messages=again, tools=tools)
        assert counted.input_tokens > answer.usage.input_tokens


@pytest.mark.parametrize("behind", ["nothing", "another result", "words"])
def test_a_call_without_its_result_is_refused(client: openai.OpenAI, url: str, behind: str) -> None:
    """A call at the end was taken for the beginning of the answer, and lost where the template shows none."""
    call = {"id": "c1", "type": "function", "function": {"name": "oven", "arguments": "{}"}}
    asked = [*ASK, {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}]
    items = [*ASK, {"type": "function_call", "call_id": "c1", "name": "oven", "arguments": "{}"}]
    use = {"type": "tool_use", "id": "c1", "name": "oven", "input": {}}
    blocks = [*ASK, {"role": "assistant", "content": [use]}]
    if behind == "another result":
        asked += [{"role": "tool", "tool_call_id": "c2", "content": "200"}]
        items += [{"type": "function_call_output", "call_id": "c2", "output": "200"}]
        blocks += [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c2", "content": "200"}]}]
    elif behind == "words":
        asked, items, blocks = asked + ASK, items + ASK, blocks + ASK
    with pytest.raises(openai.BadRequestError, match="the call 'c1' of 'oven' has no result"):
        client.chat.completions.create(model="tiny", messages=asked, max_tokens=3)
    with pytest.raises(openai.BadRequestError, match="the call 'c1' of 'oven' has no result"):
        client.responses.create(model="tiny", input=items, max_output_tokens=3)
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other:
        with pytest.raises(anthropic.BadRequestError, match="the call 'c1' of 'oven' has no result"):
            other.messages.create(model="tiny", messages=blocks, max_tokens=3)
        del use["id"]
        with pytest.raises(anthropic.BadRequestError, match="needs id and name"):
            other.messages.create(model="tiny", messages=blocks, max_tokens=3)
    if behind == "nothing":
        asked += [{"role": "tool", "tool_call_id": "c1", "content": "200"}]
        assert client.chat.completions.create(model="tiny", messages=asked, max_tokens=3).choices


def test_calls_that_the_template_does_not_show_are_refused() -> None:
    """The embedded model's template writes the texts of messages alone: the call vanished, and its result stayed."""
    call = {"id": "c1", "type": "function", "function": {"name": "oven", "arguments": "{}"}}
    asked = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
    asked += [{"role": "tool", "tool_call_id": "c1", "content": "200"}, *ASK]
    use = {"type": "tool_use", "id": "c1", "name": "oven", "input": {}}
    blocks = [*ASK, {"role": "assistant", "content": [use]}]
    blocks += [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "200"}]}]
    items = [*ASK, {"type": "function_call", "call_id": "c1", "name": "oven", "arguments": "{}"}]
    items += [{"type": "function_call_output", "call_id": "c1", "output": "200"}]
    with (
        serving(LLM("embedded", "none")) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as other,
    ):
        with pytest.raises(openai.BadRequestError, match="leaves out tool calls or their results") as refused:
            client.chat.completions.create(model="embedded", messages=asked, max_tokens=3)
        assert refused.value.param == "messages"
        with pytest.raises(openai.BadRequestError, match="leaves out tool calls or their results") as refused:
            client.responses.create(model="embedded", input=items, max_output_tokens=3)
        assert refused.value.param == "input"
        with pytest.raises(anthropic.BadRequestError, match="leaves out tool calls or their results"):
            other.messages.create(model="embedded", messages=blocks, max_tokens=3)


def test_what_is_wrong_with_tools_is_named(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 3}
    with pytest.raises(openai.BadRequestError, match="no tools"):
        client.chat.completions.create(**body, tool_choice="required")
    with pytest.raises(openai.BadRequestError, match="stove"):
        client.chat.completions.create(
            **body, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "stove"}}
        )
    with pytest.raises(openai.BadRequestError, match="2 are called"):
        client.chat.completions.create(**body, tools=TOOLS[:1] * 2)
    with (
        serving(LLM("embedded", "none")) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x") as other,
        pytest.raises(openai.BadRequestError, match="chat template"),
    ):
        other.chat.completions.create(model="embedded", messages=ASK, tools=TOOLS)


@pytest.mark.parametrize("guidance", ["a", [1], 3])
def test_guidance_of_a_schema_that_is_no_object_is_refused(client: openai.OpenAI, guidance: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {**SCHEMA, "x-guidance": guidance}}}]
    with pytest.raises(openai.BadRequestError, match="x-guidance of f"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=tools, tool_choice="required", max_tokens=8)
