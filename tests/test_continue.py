"""Requests as Continue's editor extension sends them, replayed, and its rules for reading the answers.

The bodies have the fields of its ``core/llm/openaiTypeConverters.ts``, and what ``packages/openai-adapters`` adds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import CHAT_TEMPLATE, save_llama
from served import drafting, serving

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "continue_requests.json").read_text(encoding="utf-8")
)
TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }}<tool_call></tool_call>{% endif %}"
    "{% for message in messages %}{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
) + CHAT_TEMPLATE


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, str]]:
    """By whether the template takes tools."""
    folder = save_llama(tmp_path_factory.mktemp("tools"), chat_template=TEMPLATE)
    with serving(drafting()) as (plain, _), serving(drafting(folder), model_name="embedded") as (tools, _):
        yield {False: plain, True: tools}


def streamed(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Chunks as its reader of server-sent events gives them."""
    chunks = []
    with httpx.stream("POST", url + path, json=body, headers={"x-api-key": "x"}, timeout=60) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        assert line.startswith("data: ")
        chunks.append(json.loads(line.removeprefix("data: ")))
    return chunks


def text_of(chunk: dict[str, Any]) -> str:
    """A chunk of chat has a delta, one of a completion a text."""
    if not chunk["choices"]:
        return ""
    choice = chunk["choices"][0]
    return (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]


@pytest.mark.parametrize("case", CASES, ids=[case["what"].partition(":")[0] for case in CASES])
def test_its_requests_are_answered(case: dict[str, Any], urls: dict[bool, str]) -> None:
    url = urls[case.get("tools", False)]
    body = {**case["body"], "model": "embedded", "seed": 7}
    if not body["stream"]:
        answer = httpx.post(url + case["path"], json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] > 0
        return
    chunks = streamed(url, case["path"], body)
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons[-1] in ("stop", "length", "tool_calls") and set(reasons[:-1]) <= {None}
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    assert len(usages) == ("stream_options" in body)
    text = "".join(map(text_of, chunks))
    assert text and not any(stop in text for stop in body.get("stop", ()))
    body.pop("prediction", None)  # which is a drafter
    plain = streamed(url, case["path"], {**body, "outrider": {"off": True}})
    assert "".join(map(text_of, plain)) == text, "speculation changes nothing"


def test_its_list_of_models(urls: dict[bool, str]) -> None:
    answer = httpx.get(f"{urls[False]}/v1/models", headers={"Authorization": "Bearer x"}).json()
    assert [model["id"] for model in answer["data"]] == ["embedded"]


def test_a_path_of_other_providers_is_refused_clearly(urls: dict[bool, str]) -> None:
    """It asks ``fim/completions`` only of providers that have it."""
    answer = httpx.post(f"{urls[False]}/v1/fim/completions", json={"model": "embedded", "prompt": "a", "suffix": "b"})
    assert answer.status_code == 404 and answer.json()["error"]["message"]
