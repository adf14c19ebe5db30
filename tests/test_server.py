"""Answers from an OpenAI-compatible server: exact prompts, patience, and nothing asked twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest, OutriderError
from outrider.tokenization.tokenizer import Tokenizer
from outrider.training import server
from outrider.training.artefact import read_lines
from outrider.training.conversations import ChatTurn, Settings
from outrider.training.prompts import Config as PromptsConfig
from outrider.training.prompts import Source, make_prompts
from outrider.training.regenerate import Config, regenerate

EOS = 0


class Fake(ThreadingHTTPServer):
    """Echoes what it was asked; fails as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.failures: list[int] = []  # status codes of the next answers
        self.answers = 10**9  # how many it gives before it is gone for good

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.failures:
            return self._reply(self.server.failures.pop(), b"not now \xff, which is no UTF-8")
        if self.server.answers <= 0:
            return self._reply(503, {"error": "gone"})
        self.server.answers -= 1
        self.server.asked.append((self.path, body))
        if self.path == "/v1/chat/completions":
            choice = {"message": {"content": f"said {body['messages'][-1]['content']}"}, "finish_reason": "stop"}
        else:
            choice = {"text": f" {sum(body['prompt'])}", "finish_reason": "length"}
        return self._reply(200, {"choices": [choice]})

    def _reply(self, status: int, value: Any) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LONGEST_PAUSE", 0.01)
    monkeypatch.delenv(server.KEY, raising=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    source = tmp_path / "data.jsonl"
    lines = [{"text": f"prompt {i}"} for i in range(9)] + [{"turns": ["ask", "again"]}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    make_prompts(PromptsConfig(sources=(Source(path=source),), held_out=0), tmp_path / "prompts")
    return tmp_path / "prompts"


def config(fake: Fake, **options: Any) -> Config:
    return Config(server=fake.url, max_tokens=32, requests=3, **options)


def test_token_ids_go_out_and_answers_come_back_as_tokens(
    fake: Fake, prompts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    fake.failures = [503, 429]
    regenerate(config(fake, temperature=0.5, top_k=3), prompts, tmp_path / "out", str(tiny_model_dir))
    tokenizer = Tokenizer(tiny_model_dir)
    lines = list(read_lines(tmp_path / "out" / "train.jsonl"))
    assert len(lines) == 11 and len(fake.asked) == 11
    for line in lines:
        assert tokenizer.decode(line["answer"]) == f" {sum(line['prompt'])}"
        assert line["answer"][-1] != EOS  # it was cut short, and did not end
    path, body = fake.asked[0]
    assert path == "/v1/completions" and body["model"] == "the-model"
    assert {name: body[name] for name in ("temperature", "top_k", "max_tokens")} == {
        "temperature": 0.5,
        "top_k": 3,
        "max_tokens": 32,
    }
    assert "min_p" not in body and len({body["seed"] for _, body in fake.asked}) == 11


def test_the_chat_endpoint_gets_messages_and_its_end_is_a_token(
    fake: Fake, prompts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    regenerate(config(fake, endpoint="chat"), prompts, tmp_path / "out", str(tiny_model_dir))
    tokenizer = Tokenizer(tiny_model_dir)
    answers = {tokenizer.decode(line["answer"]) for line in read_lines(tmp_path / "out" / "train.jsonl")}
    assert {"said prompt 0", "said ask", "said again"} <= answers
    assert all(line["answer"][-1] == EOS for line in read_lines(tmp_path / "out" / "train.jsonl"))
    longest = max((body["messages"] for _, body in fake.asked), key=len)
    assert [message["content"] for message in longest] == ["ask", "said ask", "again"]


def test_a_server_that_goes_away_costs_nothing_that_was_answered(
    fake: Fake, prompts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    fake.answers = 5
    with pytest.raises(OutriderError, match=r"no answer in 3 attempts \(HTTP 503.*the same command goes on"):
        regenerate(config(fake, retries=2), prompts, tmp_path / "out", str(tiny_model_dir))
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 5
    fake.answers = 10**9
    regenerate(config(fake), prompts, tmp_path / "out", str(tiny_model_dir))
    assert len(fake.asked) == 11  # none of them twice
    undisturbed = regenerate(config(fake), prompts, tmp_path / "other", str(tiny_model_dir))
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == (undisturbed.folder / "train.jsonl").read_bytes()


def test_what_no_patience_helps_is_said_at_once(
    fake: Fake, prompts: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    fake.failures = [400]
    with pytest.raises(OutriderError, match=r"refuses the request \(HTTP 400: .*not now"):
        regenerate(config(fake), prompts, tmp_path / "out", str(tiny_model_dir))
    with pytest.raises(InvalidRequest, match="expected an address like http"):
        regenerate(Config(server="localhost:80", max_tokens=32), prompts, tmp_path / "b", str(tiny_model_dir))
    with pytest.raises(OutriderError, match="no answer in 2 attempts"):
        gone = Config(server="http://127.0.0.1:9", retries=1, max_tokens=32)
        regenerate(gone, prompts, tmp_path / "c", str(tiny_model_dir))


def test_an_answer_is_cut_to_its_length_and_ends_only_where_the_server_stopped(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(tiny_model_dir)
    text = " one two three"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    turn = ChatTurn("a", "", [1, 2], (), ())
    cases = (("stop", 1, [*tokens, EOS]), ("length", 1, tokens), ("stop", 0, tokens), ("stop", -1, tokens[:-1]))
    for reason, room, expected in cases:
        params = SamplingParams(max_tokens=len(tokens) + room)
        asked = server.Server(
            "http://here",
            tokenizer,
            Settings(params, (EOS,), 99, 0),
            model="m",
            chat=False,
            requests=1,
            retries=0,
            timeout=1,
        )
        choice = {"text": text, "finish_reason": reason}
        monkeypatch.setattr(asked, "_call", lambda path, body, choice=choice: {"choices": [choice]})
        assert asked._answer_one(turn) == expected
