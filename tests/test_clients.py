"""Real clients, unchanged, against a running server: OpenAI's and Anthropic's packages."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import drafting, eventually, serving

from outrider.serving.service import Service

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

MODEL = "embedded"
ASK = [{"role": "user", "content": "def add(a, b):\n    return a"}]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Service]]:
    with serving(drafting()) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def claude(running: tuple[str, Service]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running[0], api_key="none", max_retries=0) as one:
        yield one


# ------------------------------------------------------------------------------------------------ openai


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_openai_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, max_completion_tokens=20, seed=1, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 20 == len(choice.logprobs.content)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    assert answer.usage.model_extra["speculative"]["drafter"] == "suffix"


def test_openai_streams_the_same(client: openai.OpenAI) -> None:
    body = {"model": MODEL, "messages": ASK, "max_tokens": 25, "seed": 3}
    whole = client.chat.completions.create(**body)
    text, last = "", None
    for chunk in client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        assert last is None, "usage is the last chunk"
        last = chunk.usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert last is not None and last.total_tokens == whole.usage.total_tokens


def test_openai_helper_of_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=ASK, seed=3, stop=["e", "a"]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.done" in kinds and final.choices[0].finish_reason == "stop" and final.choices[0].message.content


def test_openai_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["It was", "def f("], max_tokens=6, echo=True, n=2, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(c.text.startswith(p) for c, p in zip(answer.choices, ["It was"] * 2 + ["def f("] * 2, strict=True))
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=MODEL, prompt="def f(", suffix=")", max_tokens=6)


def test_openai_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        max_tokens=100,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content.replace(" ", "").replace("\n", "") in ('{"yes":true}', '{"yes":false}')


def test_openai_responds(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="It was", instructions="Be brief.", max_output_tokens=16)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text and answer.usage.output_tokens == 16
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=MODEL, input="It was", previous_response_id="resp_1")


def test_openai_streams_responses(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="It was", max_output_tokens=12, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == text != ""
    with client.responses.stream(model=MODEL, input="It was", max_output_tokens=12) as stream:
        final = [event.type for event in stream]
    assert final[-1] == "response.incomplete"


def test_openai_cancels(running: tuple[str, Service]) -> None:
    """Leaving a stream ends its work: at the next step nothing of it runs."""
    url, service = running

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=ASK, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                break
            assert service.thread.answers()
            await stream.close()

    asyncio.run(leave())
    assert eventually(lambda: not service.thread.answers() and not service.llm.engine.busy, 1.0)


def test_openai_sees_what_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=-1)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.chat.completions.create(model="gpt-4", messages=ASK)


# ------------------------------------------------------------------------------------------------ anthropic


def test_anthropic_writes_messages(claude: anthropic.Anthropic) -> None:
    body = {"model": MODEL, "max_tokens": 14, "messages": ASK, "system": "Be brief.", "extra_body": {"temperature": 0}}
    answer = claude.messages.create(**body)
    assert answer.role == "assistant" and answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 14
    counted = claude.messages.count_tokens(model=MODEL, messages=ASK, system="Be brief.")
    assert counted.input_tokens == answer.usage.input_tokens
    with claude.messages.stream(**body) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == answer.content[0].text == final.content[0].text
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 14


def test_anthropic_stops_at_a_sequence(claude: anthropic.Anthropic) -> None:
    body = {"model": MODEL, "max_tokens": 20, "messages": ASK, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**body)
    text = whole.content[0].text
    stop = text[len(text) // 2 :][:3]
    answer = claude.messages.create(**body, stop_sequences=[stop])
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == stop
    assert (answer.content[0].text if answer.content else "") == text[: text.index(stop)]


def test_anthropic_sees_what_is_wrong(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=ASK, extra_body={"mcp_servers": [{"url": "x"}]})
    with pytest.raises(anthropic.BadRequestError, match="image"):
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
        claude.messages.create(model=MODEL, max_tokens=5, messages=[{"role": "user", "content": [image]}])


# ------------------------------------------------------------------------------------------------ other clients


def run_client(command: list[str], **environment: str) -> str:
    """What a client that runs as a process of its own prints."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_llm(running: tuple[str, Service], client: openai.OpenAI, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="the package llm is not installed")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {MODEL}\n  api_base: {running[0]}/v1\n"
    )
    ask = [{"role": "user", "content": "It was"}]
    text = client.chat.completions.create(model=MODEL, messages=ask, max_tokens=12, temperature=0)
    for more in ([], ["--no-stream"]):
        command = [
            "-m",
            "llm",
            "-m",
            "here",
            "It was",
            "-o",
            "max_tokens",
            "12",
            "-o",
            "temperature",
            "0",
            "--key",
            "x",
        ]
        # An empty LLM_LOAD_PLUGINS: its plugins are other models.
        said = run_client([*command, *more], LLM_USER_PATH=str(tmp_path), LLM_LOAD_PLUGINS="")
        assert said.strip() == text.choices[0].message.content.strip()


LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
def load(tokens):
    return ChatOpenAI(model="embedded", base_url=sys.argv[1] + "/v1", api_key="x", max_tokens=tokens, temperature=0)
model = load(12)
answer = model.invoke("It was")
assert answer.usage_metadata["output_tokens"] == 12 and answer.response_metadata["finish_reason"] == "length"
assert "".join(part.content for part in model.stream("It was")) == answer.content
schema = {"title": "a", "type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
          "additionalProperties": False}
print(load(100).with_structured_output(schema, method="json_schema").invoke("It was"))
"""


@pytest.mark.slow
def test_langchain(running: tuple[str, Service]) -> None:
    pytest.importorskip("langchain_openai", reason="the package langchain-openai is not installed")
    assert run_client(["-c", LANGCHAIN, running[0]]).strip() in ("{'yes': True}", "{'yes': False}")


LITELLM = """
import json, sys
import litellm
litellm.telemetry = False
ask = {"model": "openai/embedded", "api_base": sys.argv[1] + "/v1", "api_key": "x", "temperature": 0, "max_tokens": 12,
       "messages": [{"role": "user", "content": "It was"}]}
whole = litellm.completion(**ask)
assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == whole.choices[0].message.content, text
assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [12]
plain = litellm.completion(**ask, extra_body={"outrider": {"off": True}}, logprobs=True, top_logprobs=2)
assert plain.choices[0].message.content == text and len(plain.choices[0].logprobs.content) == 12
schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
          "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
answer = litellm.completion(**{**ask, "max_tokens": 100}, response_format=form)
said = litellm.text_completion(model="text-completion-openai/embedded", api_base=sys.argv[1] + "/v1", api_key="x",
                               prompt="It was", max_tokens=6, temperature=0)
assert said.choices[0].text and said.usage.completion_tokens == 6
try:
    litellm.completion(**{**ask, "temperature": -1})
except litellm.BadRequestError as error:
    assert "temperature" in str(error)
else:
    raise AssertionError("a wrong temperature was not refused")
print(json.loads(answer.choices[0].message.content))
"""


@pytest.mark.slow
def test_litellm(running: tuple[str, Service]) -> None:
    pytest.importorskip("litellm", reason="the package litellm is not installed")
    said = run_client(["-W", "ignore", "-c", LITELLM, running[0]], LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert said.strip().splitlines()[-1] in ("{'yes': True}", "{'yes': False}")
