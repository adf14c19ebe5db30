"""What a server must withstand: broken and huge bodies, too many requests, slow readers, clients that go, signals."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from served import eventually, serving

from outrider.engine.llm import LLM
from outrider.serving.engine_thread import Answer
from outrider.serving.service import Service

CHAT = "/v1/chat/completions"
POSTS = [CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/tokenize"]
ASK = [{"role": "user", "content": "It was"}]
LONG = {"messages": ASK, "max_tokens": 1500, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Service]]:
    with serving(LLM("embedded", "none", max_rows=2), max_requests=4, queue_seconds=0.3) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running[0], timeout=30) as one:
        yield one


@pytest.fixture(autouse=True)
def neighbour_is_unharmed(running: tuple[str, Service], client: httpx.Client) -> Iterator[None]:
    """After every test nothing runs any more, and a request is answered as before."""
    body = {"messages": ASK, "max_tokens": 4, "temperature": 0}
    before = client.post(CHAT, json=body).json()["choices"]
    yield
    assert eventually(lambda: not running[1].thread.answers())
    assert client.post(CHAT, json=body).json()["choices"] == before


# ------------------------------------------------------------------------------------------------ bodies

BROKEN: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"null", 400),
    (b'"text"', 400),
    (b'{"messages": "\xff\xfe"}', 400),
    (b'{"a": NaN}', 400),
    (b'{"a": -1e999}', 400),
    (b'{"a": ' + b"9" * 5000 + b"}", 400),
    (b'{"a": "\\ud800"}', 400),
    (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, 400),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    (b'{"model": "' + b"x" * 5_000_000 + b'"}', 413),
    (b'{"messages": [], "messages": [], "\\u0000": 1}', 400),
]


@pytest.mark.parametrize("path", POSTS)
def test_broken_bodies_are_refused(client: httpx.Client, path: str) -> None:
    for body, status in BROKEN:
        response = client.post(path, content=body, headers=JSON)
        assert response.status_code == status, (body[:40], response.text[:200])
        assert len(response.json()["error"]["message"]) < 1000


def test_what_is_wrong_with_a_body_is_said(client: httpx.Client) -> None:
    def message(body: bytes, **headers: str) -> str:
        return str(client.post(CHAT, content=body, headers=JSON | headers).json()["error"]["message"])

    assert "Content-Encoding is 'gzip'" in message(gzip.compress(b"{}"), **{"Content-Encoding": "gzip"})
    assert "-1e999 is not a JSON number" in message(b'{"metadata": {"a": [-1e999]}}')


def test_ten_megabytes_without_a_length_are_cut_off(client: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(160):
            yield b"x" * 65536

    with suppress(httpx.WriteError):  # the server may close while the rest is still on its way
        assert client.post(CHAT, content=parts(), headers=JSON).status_code == 413


def test_a_prompt_beyond_the_context_costs_no_tokenizing(client: httpx.Client) -> None:
    began = time.perf_counter()
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": "wörd " * 600_000}]})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("path", "most", "schema", "prompt"),
    [
        (CHAT, "max_completion_tokens", "response_format", "messages"),
        (CHAT, "max_tokens", "response_format", "messages"),
        ("/v1/completions", "max_tokens", "response_format", "prompt"),
        ("/v1/responses", "max_output_tokens", "text.format", "input"),
    ],
)
def test_the_field_at_fault_is_named(client: httpx.Client, path: str, most: str, schema: str, prompt: str) -> None:
    def error(**fields: Any) -> dict[str, Any]:
        found: dict[str, Any] = client.post(
            path, json={prompt: ASK if prompt == "messages" else "It was"} | fields
        ).json()
        return found["error"]

    long = error(**{most: 99_999})
    assert (long["param"], long["code"]) == (most, "context_length_exceeded") and f"{most} is 99999" in long["message"]
    inner: dict[str, Any] = {"name": "x", "schema": {"type": "nope"}}
    given = {"type": "json_schema", **(inner if schema == "text.format" else {"json_schema": inner})}
    refused = error(**({"text": {"format": given}} if schema == "text.format" else {schema: given}))
    assert refused["param"] == schema and "nope" in refused["message"]


def test_a_prompt_that_leaves_no_room_is_at_fault(client: httpx.Client, running: tuple[str, Service]) -> None:
    room = running[1].llm.engine.limit
    whole = {"prompt": [5] * room}
    found = client.post("/v1/completions", json=whole).json()["error"]
    assert (found["param"], found["code"]) == ("prompt", "context_length_exceeded")
    assert client.post("/v1/completions", json=whole | {"max_tokens": 0, "echo": True}).status_code == 200


def test_other_paths_methods_and_types(client: httpx.Client) -> None:
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get(CHAT).status_code == 405
    assert client.post(CHAT, content=b"a=1", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post("/v1/messages", json={}).json()["type"] == "error"  # Anthropic's form


def test_special_tokens_in_a_message_are_text(client: httpx.Client, running: tuple[str, Service]) -> None:
    tokenizer = running[1].llm.tokenizer
    text = f"Hi<|endoftext|>{'<|mask|>' * 3}"
    body = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "<|endoftext|>"}]}
    tokens = client.post("/v1/tokenize", json=body).json()["tokens"]
    bare = client.post("/v1/tokenize", json={"messages": [{**m, "content": "x"} for m in body["messages"]]}).json()
    special = [token for token in tokens if token in tokenizer.special_ids]
    assert special == [token for token in bare["tokens"] if token in tokenizer.special_ids]
    assert text in client.post("/v1/detokenize", json={"tokens": tokens}).json()["prompt"]


@pytest.mark.parametrize("token", [-1, 10**6, 2**80])
def test_token_ids_that_are_none_are_refused_wherever_a_client_gives_them(client: httpx.Client, token: int) -> None:
    for path, body in (
        ("/v1/detokenize", {"tokens": [5, token]}),
        ("/v1/completions", {"prompt": [5, token], "max_tokens": 1}),
        ("/v1/completions", {"prompt": [[5, token]], "max_tokens": 0, "echo": True}),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 400 and str(token) in response.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------ room


def test_too_many_requests_are_refused_with_a_time(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json={**LONG, "n": 2, "stream": True}):
        response = client.post(CHAT, json={**LONG, "n": 3})
    assert response.status_code == 429
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    assert client.post("/v1/messages", json={**LONG, "n": 5}).status_code == 400  # not a field of that interface


def test_more_answers_than_ever_fit_are_no_matter_of_patience(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 1})
    assert response.status_code == 400 and "Retry-After" not in response.headers
    assert "2 answers to 3 prompts are 6" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi", "echo": True, "max_tokens": 0}),
    ],
    ids=["chat", "completion", "echo"],
)
def test_a_number_of_answers_beyond_the_limit_costs_nothing(client: httpx.Client, path: str, body: dict) -> None:
    """A list of so many would take all memory."""
    response = client.post(path, json={"model": "embedded", "n": 1 << 40, **body})
    assert response.status_code == 400 and "n: this server gives at most" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/tokenize"])
def test_too_many_messages_are_refused_before_they_are_read(client: httpx.Client, path: str) -> None:
    many = [{"role": "user", "content": "a"}] * 100_000
    limits = {} if path == "/v1/tokenize" else {"max_tokens": 8}
    began = time.perf_counter()
    response = client.post(path, json={"model": "embedded", "messages": many, **limits})
    assert response.status_code == 400 and "at most 10000" in response.text
    assert time.perf_counter() - began < 10


def test_a_request_that_finds_no_row_in_time_is_refused(client: httpx.Client, running: tuple[str, Service]) -> None:
    with client.stream("POST", CHAT, json={**LONG, "n": 2, "stream": True}) as both:
        assert both.status_code == 200
        assert eventually(lambda: len(running[1].llm.engine.admission.running) == 2)
        late = client.post(CHAT, json=LONG)
        assert late.status_code == 429 and "Retry-After" in late.headers


def test_answers_of_one_request_wait_for_each_other(client: httpx.Client) -> None:
    """Two of them have all the rows for longer than a request may wait for its first one."""
    with client.stream("POST", CHAT, json={**LONG, "n": 3, "stream": True}) as all_three:
        assert all_three.status_code == 200


def test_the_default_length_of_a_completion_keeps_to_the_limits() -> None:
    with serving(LLM("embedded", "none"), max_new_tokens=4) as (url, service), httpx.Client(base_url=url) as client:
        full = [5] * (service.llm.target.spec.max_positions - 2)
        for prompt, expected in (("It was", 4), (full, 2)):
            answer = client.post("/v1/completions", json={"prompt": prompt, "ignore_eos": True})
            assert answer.json()["usage"]["completion_tokens"] == expected


def test_the_default_length_of_an_answer_fits_the_memory() -> None:
    llm = LLM("embedded", "none", kv_memory=3 << 19)
    with serving(llm) as (url, service), httpx.Client(base_url=url) as client:
        assert service.llm.engine.limit < llm.capacity
        usage = client.post(CHAT, json={"messages": ASK, "ignore_eos": True}).json()["usage"]
        assert usage["total_tokens"] == service.llm.engine.limit


def test_a_lower_priority_number_gets_a_row_first() -> None:
    with serving(LLM("embedded", "none", max_rows=1)) as (address, service):
        admission, ended, threads = service.llm.engine.admission, [], []

        def ask(priority: int, tokens: int) -> None:
            body = {"messages": ASK, "max_tokens": tokens, "ignore_eos": True, "priority": priority}
            assert httpx.post(address + CHAT, json=body, timeout=30).status_code == 200
            ended.append(priority)

        def begin(priority: int, tokens: int) -> None:
            threads.append(Thread(target=ask, args=(priority, tokens)))
            threads[-1].start()

        with httpx.stream("POST", address + CHAT, json={**LONG, "stream": True}, timeout=30) as first:
            lines = first.iter_lines()  # kept: without it the client leaves
            next(lines)
            begin(5, 200)  # long, so that which of the two ended first says which got the row
            assert eventually(lambda: len(admission.waiting) == 1)
            begin(-5, 1)
            assert eventually(lambda: len(admission.waiting) == 2)
        for thread in threads:
            thread.join()
        assert ended.index(-5) < ended.index(5)


def test_leaving_ends_the_work_within_a_step(running: tuple[str, Service]) -> None:
    """Whether the answer is streamed or not, and whether it has begun or waits."""
    url, service = running

    async def leave(body: dict[str, Any]) -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            task = asyncio.ensure_future(client.post(CHAT, json=body))
            while not service.thread.answers():
                await asyncio.sleep(0.005)
            task.cancel()

    for body in (LONG, {**LONG, "stream": True}, {**LONG, "n": 3}):
        asyncio.run(leave(body))
        assert eventually(lambda: not service.thread.answers() and not service.llm.engine.busy, 1.0)


def test_leaving_at_the_moment_of_the_first_news_is_not_lost() -> None:
    """Whatever of the event loop's turns the cancellation comes in."""

    async def leave(turns: int) -> bool:
        answer = Answer(None, SimpleNamespace(events=[], finish_reason=None, started=0.0))  # type: ignore[arg-type]
        task = asyncio.ensure_future(answer.started(60.0))
        await asyncio.sleep(0.01)
        answer.wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=1.0)
        return task.cancelled()

    assert all(asyncio.run(leave(turns)) for turns in range(5))


def test_a_half_closed_and_a_silent_client(running: tuple[str, Service]) -> None:
    url, service = running
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as half:
        half.sendall(head.encode() + body[: len(body) // 2])  # then silence: the others are served
        with socket.create_connection((host, int(port))) as whole:
            whole.sendall(head.encode() + body)
            assert eventually(lambda: bool(service.thread.answers()))
            whole.shutdown(socket.SHUT_WR)
            assert eventually(lambda: not service.thread.answers())


def test_a_client_that_goes_while_it_sends_is_no_failure(running: tuple[str, Service]) -> None:
    url, service = running
    host, port = url.removeprefix("http://").split(":")
    gone = f'outrider_http_responses_total{{path="{CHAT}",status="499"}}'
    before = service.metrics.text().decode().partition(gone)[2].splitlines()[:1]
    with socket.create_connection((host, int(port))) as half:
        half.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
    assert eventually(lambda: service.metrics.text().decode().partition(gone)[2].splitlines()[:1] != before)
    assert f'path="{CHAT}",status="500"' not in service.metrics.text().decode()


def test_a_slow_reader_slows_nobody(running: tuple[str, Service], client: httpx.Client) -> None:
    url, service = running
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "max_tokens": 400, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(head.encode() + body)
        assert eventually(lambda: bool(service.thread.answers()))
        began = time.perf_counter()
        assert client.post(CHAT, json={"messages": ASK, "max_tokens": 8}).status_code == 200
        assert time.perf_counter() - began < 5
        assert eventually(lambda: not service.thread.answers(), 20)  # its answer is finished, read or not


# ------------------------------------------------------------------------------------------------ keys, CORS, health


def test_keys_and_origins(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# comment\nfirst\nsecond\n")
    settings = {"api_key_file": str(tmp_path / "keys"), "cors_origins": ["https://page.example"]}
    with serving(LLM("embedded", "none"), **settings) as (url, _), httpx.Client(base_url=url) as client:
        body = {"messages": ASK, "max_tokens": 1}
        assert client.post(CHAT, json=body).status_code == 401
        assert client.get("/metrics").status_code == 401 and client.get("/health").status_code == 200
        for name, value in (("Authorization", "Bearer second"), ("x-api-key", "first")):
            assert client.post(CHAT, json=body, headers={name: value}).status_code == 200
        for wrong in ("Bearer third", "Bearer", "Basic first", "Bearer firs", "Bearer first2"):
            assert client.post(CHAT, json=body, headers={"Authorization": wrong}).status_code == 401
        asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        allowed = client.options(CHAT, headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = client.options(CHAT, headers={**asked, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_no_page_may_call_by_default(client: httpx.Client) -> None:
    answer = client.get("/v1/models", headers={"Origin": "https://page.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_models_are_listed_in_the_form_of_either_client(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    (model,) = listed["data"]
    assert listed["object"] == "list" and (listed["first_id"], listed["last_id"], listed["has_more"]) == (
        model["id"],
        model["id"],
        False,
    )
    assert model["object"] == "model" and isinstance(model["created"], int)
    assert model["type"] == "model" and model["display_name"] == model["id"]
    assert datetime.fromisoformat(model["created_at"]).timestamp() == model["created"]
    assert client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    theirs = client.get("/v1/models/none", headers={"anthropic-version": "2023-06-01"})
    assert theirs.status_code == 404 and theirs.json()["type"] == "error"


def test_health_and_request_ids(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").json() == {"status": "ready"}
    for name in ("abc123", "550e8400-e29b-41d4-a716-446655440000", "req_1.a"):
        assert client.get("/health", headers={"X-Request-Id": name}).headers["x-request-id"] == name
    for name in ("a b;c", "", "a" * 129):
        forged = client.get("/health", headers={"X-Request-Id": name}).headers["x-request-id"]
        assert re.fullmatch(r"req_[0-9a-f]{24}", forged)


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    def value(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.M)
        assert found, name
        return float(found[1])

    before = value("outrider_generation_tokens_total")
    client.post(CHAT, json={"messages": ASK, "max_tokens": 7, "ignore_eos": True})
    assert value("outrider_generation_tokens_total") == before + 7
    assert value('outrider_request_success_total{finished_reason="length"}') >= 1
    assert value("outrider_time_to_first_token_seconds_count") >= 1
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert value(f"spec_decode_num_{name}_total") == 0  # this server does not draft


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("signals", "drain"), [(1, 60), (2, 60), (1, 0.2)], ids=["first", "second", "late"])
def test_a_signal_lets_answers_finish_and_a_second_ends_them(signals: int, drain: float) -> None:
    """What has not finished in time ends as by the second signal."""
    command = [sys.executable, "-m", "outrider", "serve", "embedded", "--drafter", "none", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUTRIDER_SERVE_DRAIN_SECONDS": str(drain)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        url = next(line for line in process.stderr if "ready:" in line).split("ready: ")[1].strip()
        finishes = signals == 1 and drain > 1
        tokens = 60 if finishes else 1500
        body = {**LONG, "max_tokens": tokens, "stream": True}
        with httpx.stream("POST", url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.05)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        if finishes:
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert last["error"]["code"] == "server_shutdown"
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


# ------------------------------------------------------------------------------------------------ telemetry, logs


def test_spans_of_requests_and_answers() -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    from outrider.serving.telemetry import Telemetry

    exporter = memory.InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(LLM("embedded", "none")) as (url, service), httpx.Client(base_url=url) as client:
        service.telemetry = Telemetry("embedded", provider)
        caller = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        client.post(CHAT, json={"messages": ASK, "max_tokens": 5, "ignore_eos": True}, headers=caller)
        assert eventually(lambda: len(exporter.get_finished_spans()) == 2)
    generate, http = sorted(exporter.get_finished_spans(), key=lambda span: not span.name.startswith("generate"))
    assert http.name == f"POST {CHAT}" and http.attributes["http.response.status_code"] == 200
    assert f"{http.context.trace_id:032x}" == "a" * 32 and f"{http.parent.span_id:016x}" == "b" * 16
    assert generate.parent.span_id == http.context.span_id
    assert generate.attributes["gen_ai.usage.output_tokens"] == 5
    assert [event.name for event in generate.events] == ["row", "first token"]
    assert http.start_time <= generate.start_time <= generate.end_time <= http.end_time + 1_000_000


def test_logs_are_a_line_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from outrider.serving.logs import set_up_logs
    from outrider.serving.settings import ServerSettings

    loggers = [logging.getLogger(name) for name in ("outrider", "uvicorn", "asyncio")]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    try:
        set_up_logs(ServerSettings(log_format="json"))
        warnings.showwarning(UserWarning("the cache is full"), UserWarning, "file.py", 3)
        loggers[2].warning("socket.send() raised exception.")  # of every client that leaves early
        loggers[2].error("a task failed")
        with serving(LLM("embedded", "none")) as (url, _):
            httpx.post(url + CHAT, json={"messages": ASK, "max_tokens": 2}, headers={"X-Request-Id": "mine"})
            httpx.post(url + CHAT, content=b"{\n", headers={**JSON, "X-Request-Id": "broken"})
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)
    assert {"level": "warning", "message": "the cache is full"}.items() <= lines[0].items()
    assert {"level": "error", "message": "a task failed"}.items() <= lines[1].items()
    found = {line["request_id"]: line for line in lines if "request_id" in line}
    assert found["mine"]["status"] == 200 and found["broken"]["status"] == 400 and found["mine"]["path"] == CHAT


def test_a_path_says_nothing_to_the_terminal_that_shows_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from outrider.serving.logs import set_up_logs
    from outrider.serving.settings import ServerSettings

    logger = logging.getLogger("outrider")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        set_up_logs(ServerSettings())
        logger.warning("GET %s", "/\x1b[31m\x00\n12:00:00 info é")
    finally:
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
    assert capsys.readouterr().err.endswith("GET /\\x1b[31m\\x00 12:00:00 info é\n")


# ------------------------------------------------------------------------------------------------ hostile and long


def _schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, Any] = {
    "deep": _schema(300),
    "endless": {"$ref": "#"},
    "many": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000, "maxItems": 10**6},
    "backtracking": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "elsewhere": {"$ref": "http://example.com/schema.json"},
    "wide": {"enum": [f"value {i}" for i in range(20_000)]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_takes_bounded_time(client: httpx.Client, name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": HOSTILE[name]}}
    began = time.perf_counter()
    response = client.post(CHAT, json={"messages": ASK, "max_tokens": 8, "response_format": form})
    assert response.status_code in (200, 400) and time.perf_counter() - began < 10


@pytest.mark.slow
def test_memory_stays_flat(client: httpx.Client, running: tuple[str, Service]) -> None:
    """Answers, refusals and clients that leave: after the first hundred of each nothing grows."""

    def round_of(count: int) -> None:
        for i in range(count):
            client.post(CHAT, json={"messages": [{"role": "user", "content": f"{i} it was"}], "max_tokens": 24})
            client.post(CHAT, content=b'{"a": ' * 10_000, headers=JSON)
            with client.stream("POST", CHAT, json={**LONG, "stream": True}) as left:
                next(left.iter_lines())
            assert eventually(lambda: not running[1].thread.answers())

    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    round_of(100)
    before = resident()
    round_of(300)
    assert resident() - before < 20_000  # kB


def test_answers_beyond_the_limit_are_refused_with_those_that_run(
    running: tuple[str, Service], client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"messages": ASK, "max_tokens": 1, "n": 2}
    for unfinished, status in ((2, 200), (3, 429)):  # of 4
        with monkeypatch.context() as patch:
            patch.setattr(type(running[1].thread), "unfinished", unfinished)
            assert client.post(CHAT, json=body).status_code == status
