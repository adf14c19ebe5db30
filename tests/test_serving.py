"""The server's interfaces, spoken to over HTTP: what is answered, what is refused, and that drafts change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import drafting, serving

from outrider.serving.service import Service

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "def add(a, b):\n    return a"}]


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Service]]:
    with serving(drafting()) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running[0], timeout=30) as one:
        yield one


def ask(client: httpx.Client, path: str = CHAT, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(client: httpx.Client, path: str = CHAT, **body: Any) -> list[dict[str, Any]]:
    """The JSON of every event of a stream that ends in [DONE]."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refused(client: httpx.Client, path: str = CHAT, status: int = 400, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["message"]
    return error


FIELDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 0.9, "seed": 5, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.7, "seed": 1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.7, "seed": 2, "logit_bias": {"13": -5, "60": 2.5}},
    {"temperature": 0, "stop": ["return", "\n\n"]},
    {"temperature": 0.8, "seed": 9, "n": 3},
    {"temperature": 0.8, "seed": 9, "response_format": {"type": "json_object"}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(fields))
def test_speculation_changes_no_answer(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"messages": ASK, "max_tokens": 40, "logprobs": True, "top_logprobs": 3, **fields}
    with_drafts, plain = ask(client, **body), ask(client, **body, outrider={"off": True})
    assert with_drafts["choices"] == plain["choices"]
    assert plain["usage"]["speculative"]["drafted"] == 0
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert all(with_drafts["usage"][name] == plain["usage"][name] for name in counts)


def test_some_answer_is_drafted(client: httpx.Client) -> None:
    """Else the comparison above would say nothing."""
    block = ask(client, messages=ASK, max_tokens=60, temperature=0)["usage"]["speculative"]
    assert block["accepted"] > 0 and block["rounds"] < 59
    assert sum(block["accepted_per_position"]) == block["accepted"]
    assert sum(block["drafted_per_position"]) == block["drafted"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_says_the_same_as_an_answer_in_one_piece(client: httpx.Client, path: str) -> None:
    what = {"messages": ASK} if path == CHAT else {"prompt": ASK[0]["content"]}
    body = {**what, "max_tokens": 30, "seed": 4, "n": 2, "logprobs": True if path == CHAT else 2}
    whole = ask(client, path, **body)
    chunks = events(client, path, **body, stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    *parts, last = chunks
    assert last["choices"] == [] and last["usage"] | {"speculative": 0} == whole["usage"] | {"speculative": 0}
    assert all(chunk["usage"] is None for chunk in parts)
    for choice in whole["choices"]:
        mine = [c for chunk in parts for c in chunk["choices"] if c["index"] == choice["index"]]
        *before, end = mine
        assert all(c["finish_reason"] is None for c in before) and end["finish_reason"] == choice["finish_reason"]
        texts = [c["delta"].get("content") or "" if path == CHAT else c["text"] for c in mine]
        assert "".join(texts) == (choice["message"]["content"] if path == CHAT else choice["text"])
        reports = [c["logprobs"] for c in mine if c["logprobs"]]
        if path == CHAT:
            assert [one for r in reports for one in r["content"]] == choice["logprobs"]["content"]
        else:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [one for r in reports for one in r[name]] == choice["logprobs"][name]


def test_usage_comes_only_where_it_was_asked_for(client: httpx.Client) -> None:
    chunks = events(client, messages=ASK, max_tokens=5)
    assert all("usage" not in chunk for chunk in chunks)


def test_logprobs_are_logarithms_of_probabilities(client: httpx.Client) -> None:
    answer = ask(client, messages=ASK, max_tokens=12, temperature=0, logprobs=True, top_logprobs=20)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for one in content:
        top = one["top_logprobs"]
        assert top[0]["token"] == one["token"] and top[0]["logprob"] == one["logprob"] <= 0  # greedy: the likeliest
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
        assert len(top) == 20
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == answer["choices"][0]["message"]["content"]


def test_completions_name_parts_of_characters_apart(client: httpx.Client) -> None:
    """Tokens that are parts of a character have the same text: they are named by their bytes, and characters are
    counted in the text."""
    form = {"type": "json_schema", "json_schema": {"name": "faces", "schema": {"const": "😀 and 🎉"}}}
    body = {"prompt": "A", "max_tokens": 30, "temperature": 0, "logprobs": 5, "response_format": form}
    (choice,) = ask(client, "/v1/completions", **body)["choices"]
    found = choice["logprobs"]
    assert any(name.startswith("bytes:\\x") for name in found["tokens"]), "no token was a part of a character"
    assert "😀 and 🎉" in choice["text"] and all(len(top) == 5 for top in found["top_logprobs"])
    named = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    assert all(top.get(name, logprob) == logprob for name, logprob, top in named)
    for name, at in zip(found["tokens"], found["text_offset"], strict=True):
        assert name.startswith("bytes:") or choice["text"][at:].startswith(name)


def test_an_echo_alone_can_be_streamed(client: httpx.Client) -> None:
    body = {"prompt": ["one", "two"], "max_tokens": 0, "echo": True}
    whole = ask(client, "/v1/completions", **body)
    *parts, last = events(client, "/v1/completions", **body, stream_options={"include_usage": True})
    assert [choice for part in parts for choice in part["choices"]] == whole["choices"]
    assert last["choices"] == [] and last["usage"] == whole["usage"] and all(part["usage"] is None for part in parts)
    assert all("usage" not in part for part in events(client, "/v1/completions", **body))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_no_number_of_answers_means_one(client: httpx.Client, path: str) -> None:
    what = {"messages": ASK} if path == CHAT else {"prompt": "one"}
    assert len(ask(client, path, **what, max_tokens=2, n=None)["choices"]) == 1


def test_where_the_prompt_ends(client: httpx.Client) -> None:
    """Where the answer begins, or with its last message."""

    def count(**more: Any) -> int:
        return int(ask(client, messages=ASK, max_tokens=1, **more)["usage"]["prompt_tokens"])

    assert count(add_generation_prompt=True) == count() > count(add_generation_prompt=False)
    refused(client, messages=ASK, max_tokens=1, add_generation_prompt=True, continue_final_message=True)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": ASK, "temprature": 1}, "temprature"),
    ({"messages": ASK, "temperature": "hot"}, "temperature"),
    ({"messages": ASK, "temperature": 1e9}, "temperature"),
    ({"messages": ASK, "max_tokens": 0}, "max_tokens"),
    ({"messages": ASK, "max_tokens": 10**12}, "max_tokens"),
    ({"messages": ASK, "max_tokens": 1.5}, "max_tokens"),
    ({"messages": ASK, "n": 1000}, "n"),
    ({"messages": ASK, "priority": 101}, "priority"),
    ({"messages": ASK, "priority": "high"}, "priority"),
    ({"messages": ASK, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": ASK, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": ASK, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": ASK, "logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"messages": ASK, "stop": [""]}, "stop"),
    ({"messages": ASK, "stop": ["x"] * 99}, "stop"),
    ({"messages": ASK, "store": True}, "store"),
    ({"messages": ASK, "functions": [{"name": "f"}]}, "functions"),
    ({"messages": ASK, "modalities": ["audio"]}, "modalities"),
    ({"messages": ASK, "outrider": {"drafter": "eagle3"}}, "outrider.drafter"),
    ({"messages": ASK, "outrider": {"rule": "maybe"}}, "outrider.rule"),
    ({"messages": ASK, "outrider": {"drafts": 3}}, "outrider.drafts"),
    ({"messages": ASK, "response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": ASK, "chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    ({"messages": ASK, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"messages": ASK, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_or_not_supported_is_named(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    error = refused(client, **body)
    assert (error["param"] or "") == param or param in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, {"messages": ASK, "stop": {"a": 1}}, "stop: expected str or list[str], got {'a': 1}"),
        (CHAT, {"messages": [{"role": "user", "content": [5]}]}, "messages.0.content: expected str or list[dict"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt: expected str or list[str] or list[int] or list[list[int]]"),
        ("/v1/completions", {"prompt": None}, "prompt: expected str or"),
        ("/v1/completions", {}, "prompt: Field required"),
    ],
)
def test_fields_of_several_types_are_named_as_they_are_sent(
    client: httpx.Client, path: str, body: dict[str, Any], message: str
) -> None:
    error = client.post(path, json=body).json()["error"]
    assert error["message"].startswith(message) and error["param"] == message.partition(":")[0]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_blocks_of_anthropic_are_named_by_their_place(client: httpx.Client, role: str) -> None:
    blocks = [{"type": "text", "text": "x"}, {"type": "image"}]
    error = refused(client, "/v1/messages", messages=[*ASK, {"role": role, "content": blocks}], max_tokens=1)
    assert error["message"].startswith("messages.1.content.1: parts of type 'image'")


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/responses", {"input": "hi", "tool_choice": ""}, "tool_choice"),
    ("/v1/responses", {"input": "hi", "tool_choice": {}}, "tool_choice"),
    ("/v1/responses", {"input": "hi", "stream_options": {}}, "stream_options"),
    ("/v1/responses", {"input": "hi " * 20_000}, "input"),
    ("/v1/tokenize", {"prompt": "hi", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ("/v1/tokenize", {"messages": ASK, "add_special_tokens": True}, "add_special_tokens"),
    (CHAT, {"messages": ASK, "logit_bias": {"9999999": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "hi", "logit_bias": {"9999999": 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": [[5], []]}, "prompt"),
]


@pytest.mark.parametrize(("path", "body", "param"), OTHERS, ids=[str(i) for i in range(len(OTHERS))])
def test_nothing_is_ignored_elsewhere(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert refused(client, path, **body)["param"] == param


def test_what_is_at_fault_is_said_in_the_clients_words(client: httpx.Client) -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    assert "tools.0.type" in refused(client, "/v1/messages", messages=ASK, max_tokens=1, tools=[search])["message"]
    effort = refused(client, "/v1/responses", input="hi", reasoning={"effort": "low"})
    assert effort["message"] == "reasoning.effort is not supported here, got 'low': leave it out"
    assert effort["code"] == "unsupported_parameter"
    number = client.post(CHAT, content=b'{"n": ' + b"9" * 5000 + b"}", headers={"Content-Type": "application/json"})
    assert "5000 digits" in number.text and "sys." not in number.text


@pytest.mark.parametrize(
    ("path", "body", "param", "hint"),
    [
        (CHAT, {"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        (CHAT, {"outrider": {"draft_token": 1}}, "outrider.draft_token", "did you mean 'draft_tokens'?"),
        (CHAT, {"stream_options": {"x": True}}, "stream_options.x", "expected one of: continuous_usage_stats, "),
        (CHAT, {"messages": [{**ASK[0], "nam": "a"}]}, "messages.0.nam", "did you mean 'name'?"),
        (
            CHAT,
            {"tools": [{"type": "function", "function": {"name": "f", "parameter": {}}}]},
            "tools.0.function.parameter",
            "did you mean 'parameters'?",
        ),
        (
            "/v1/messages",
            {"max_tokens": 1, "thinking": {"type": "enabled", "b": 1}},
            "thinking.b",
            "expected one of: budget_",
        ),
    ],
)
def test_a_misspelt_field_is_told_the_nearest_one(
    client: httpx.Client, path: str, body: dict[str, Any], param: str, hint: str
) -> None:
    message = refused(client, path, **{"messages": ASK, **body})["message"]
    assert message.startswith(f"unknown field {param!r}; {hint}")


def test_a_budget_of_thoughts_is_checked_as_anthropic_does(client: httpx.Client) -> None:
    def answered(path: str = "/v1/messages", most: int = 1100, **thinking: Any) -> str:
        body = {"messages": ASK, "thinking": thinking} | ({"max_tokens": most} if path == "/v1/messages" else {})
        found = client.post(path, json=body).json()
        return str(found["error"]["message"]) if found.get("type") == "error" else "ok"

    count = "/v1/messages/count_tokens"
    assert answered(count, type="enabled", budget_tokens=1024) == answered(count, type="adaptive") == "ok"
    assert "thinking.budget_tokens: Input should be greater" in answered(type="enabled", budget_tokens=1023)
    assert "expected less than max_tokens (1100)" in answered(type="enabled", budget_tokens=1100)
    assert "only type 'enabled' has a budget" in answered(type="adaptive", budget_tokens=1024)
    assert "only type 'enabled' has a budget" in answered(count, type="disabled", budget_tokens=1024)


def test_fields_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    ask(
        client, messages=ASK, max_tokens=1, store=False, modalities=["text"], service_tier="auto", user="me", audio=None
    )


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_pieces_say_where_each_token_comes_from(client: httpx.Client, path: str) -> None:
    what = {"messages": ASK} if path == CHAT else {"prompt": ASK[0]["content"]}
    body = {**what, "max_tokens": 40, "temperature": 0, "outrider": {"pieces": True}}
    (choice,) = (whole := ask(client, path, **body))["choices"]
    pieces = choice["outrider"]["pieces"]
    assert len(pieces) == whole["usage"]["completion_tokens"]
    assert sum(piece["drafted"] for piece in pieces) == whole["usage"]["speculative"]["accepted"] > 0
    assert all(0 < piece["probability"] <= 1 for piece in pieces)
    assert all((0 < (p["confidence"] or 0) <= 1) == p["drafted"] for p in pieces)
    assert "".join(p["text"] for p in pieces) == (choice["message"]["content"] if path == CHAT else choice["text"])
    chunks = events(client, path, **body)
    streamed = [p for chunk in chunks for c in chunk["choices"] for p in c["outrider"]["pieces"]]
    # What is drafted may differ: this drafter has seen the answer by now.
    own = {"drafted": 0, "confidence": 0}
    assert [{**p, **own} for p in streamed] == [{**p, **own} for p in pieces]
    assert choice["logprobs"] is None  # they were not asked for


def test_a_prompt_that_begins_like_an_earlier_one_is_not_read_again(client: httpx.Client) -> None:
    long = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 20}]
    body = {"messages": long, "max_tokens": 3, "temperature": 0}
    first, again = ask(client, **body), ask(client, **body)
    assert again["choices"] == first["choices"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again["usage"]["prompt_tokens"] // 2 < cached < again["usage"]["prompt_tokens"]
    message = client.post("/v1/messages", json=body).json()
    assert message["usage"]["cache_read_input_tokens"] == cached
    assert message["usage"]["input_tokens"] == again["usage"]["prompt_tokens"] - cached


def test_the_page_is_served_whole_and_may_ask_nobody_else(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<title>" in page.text and "connect-src 'self'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_every_prompt_once_and_every_answer(client: httpx.Client, stream: bool) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    body = {"model": "embedded", "prompt": prompts, "n": 2, "max_tokens": 8, "ignore_eos": True, "seed": 1}
    if stream:
        usage = events(client, "/v1/completions", **body, stream_options={"include_usage": True})[-1]["usage"]
    else:
        usage = ask(client, "/v1/completions", **body)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 32, 37)
    made = usage["speculative"]
    assert made["drafted"] >= made["accepted"] == sum(made["accepted_per_position"])
    assert made["acceptance_length"] == round(1 + made["accepted"] / made["rounds"], 4)


def test_each_answer_has_its_own_seed_whatever_other_prompts_there_are(client: httpx.Client) -> None:
    body = {"model": "embedded", "max_tokens": 8, "ignore_eos": True, "temperature": 1.0}
    together = ask(client, "/v1/completions", **body, prompt=[[5, 6, 7], [8, 9]], n=2, seed=3)["choices"]
    alone = [ask(client, "/v1/completions", **body, prompt=[8, 9], seed=seed)["choices"][0] for seed in (3, 4)]
    assert [one["text"] for one in together[2:]] == [one["text"] for one in alone]
    assert alone[0]["text"] != alone[1]["text"]
