"""An OpenAI-compatible server of the packaged model in this process, fair or with a planted bias."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

from outrider import LLM, SamplingParams
from outrider.proof.reference_check import text_logits

BIASES: dict[str, dict[str, Any]] = {"": {}, "top-p": {"top_p": 0.95}, "temperature": {"temperature": 1.05}}
PERIOD = 50


class Simulated:
    """Answers ``/v1/completions`` with ``llm``; ``bias``: a name of ``BIASES``, or ``greedy`` for every 50th token."""

    def __init__(self, llm: LLM, bias: str = "", logprobs: bool = True) -> None:
        self.llm, self.bias, self.logprobs = llm, bias, logprobs
        self.lock = Lock()
        self.requests = 0

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.requests += 1
        ids = self.llm.encode(body["prompt"])
        output, reason = self._tokens(ids, body)
        told: dict[str, Any] = {}
        if body.get("logprobs") and self.logprobs and output:
            log_p = text_logits(self.llm.target, ids, output).log_softmax(-1)
            names = [self.llm.tokenizer.decode([token]) for token in output]
            told = {
                "tokens": names,
                "token_logprobs": [float(row[token]) for row, token in zip(log_p, output, strict=True)],
                "top_logprobs": [self._named(row.topk(body["logprobs"])) for row in log_p],
            }
        choice = {"text": self.llm.tokenizer.decode(output), "finish_reason": reason, "logprobs": told or None}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(output)}
        return {"choices": [choice], "usage": usage}

    def _named(self, top: Any) -> dict[str, float]:
        """Log-probabilities by the tokens' texts, or by their rank where texts are the same."""
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        named = {self.llm.tokenizer.decode([token]): value for token, value in pairs}
        return named if len(named) == len(top.values) else {str(i): v for i, v in enumerate(top.values.tolist())}

    def _tokens(self, ids: list[int], body: dict[str, Any]) -> tuple[list[int], str]:
        options: dict[str, Any] = {"temperature": body["temperature"], "top_p": body["top_p"], "seed": body.get("seed")}
        if options["temperature"]:
            options |= BIASES.get(self.bias, {})
        left, text, reason = int(body["max_tokens"]), list(ids), "length"
        greedy = self.bias == "greedy" and options["temperature"]
        while left:
            done = len(text) - len(ids)
            turn = greedy and done % PERIOD == PERIOD - 1
            most = 1 if turn else min(left, PERIOD - 1 - done % PERIOD) if greedy else left
            asked = {"temperature": 0.0} if turn else options
            output = self.llm.generate([text], SamplingParams(max_tokens=most, ignore_eos=True, **asked))[0]
            text += output.token_ids
            left -= len(output.token_ids)
        return text[len(ids) :], reason


@contextmanager
def serving(simulated: Simulated) -> Iterator[str]:
    """Its address while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "simulated"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(simulated.answer(body))

        def _send(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
