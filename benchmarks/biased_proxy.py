"""A proxy before an OpenAI-compatible server that plants one bias in what it samples: what an audit must find.

    python benchmarks/biased_proxy.py --upstream http://localhost:8000 --port 8010 --bias top-p

    top-p         top_p lowered by 0.05
    temperature   temperature times 1.05
    greedy        every 50th token of an answer is the likeliest one
    none          nothing: the control

Only text completions (`/v1/completions`) with a temperature above 0 are changed; greedy ones pass as they are.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

BIASES = ("none", "top-p", "temperature", "greedy")
PERIOD = 50


def ask(upstream: str, path: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(upstream + path, data, {"Content-Type": "application/json"}), timeout=600) as reply:
        return json.load(reply)


def biased(upstream: str, path: str, body: dict[str, Any], bias: str) -> Any:
    """The upstream's reply to a request that samples, with the bias."""
    if not body.get("temperature") or bias == "none":
        return ask(upstream, path, body)
    if bias == "top-p":
        return ask(upstream, path, {**body, "top_p": body.get("top_p", 1.0) - 0.05})
    if bias == "temperature":
        return ask(upstream, path, {**body, "temperature": 1.05 * body["temperature"]})
    return in_turns(upstream, path, body)


def in_turns(upstream: str, path: str, body: dict[str, Any]) -> Any:
    """49 sampled tokens, one greedy, and so on; put together as one reply."""
    text, done, parts = str(body["prompt"]), 0, []
    while done < body["max_tokens"]:
        turn = done % PERIOD == PERIOD - 1
        most = 1 if turn else min(PERIOD - 1 - done % PERIOD, body["max_tokens"] - done)
        asked = {**body, "prompt": text, "max_tokens": most, "seed": (body.get("seed") or 0) * 1000 + done}
        reply = ask(upstream, path, {**asked, "temperature": 0.0} if turn else asked)
        choice = reply["choices"][0]
        parts.append(reply)
        text += choice["text"]
        done += most
        if choice.get("finish_reason") == "stop":
            break
    joined: dict[str, Any] = parts[-1]
    choices = [part["choices"][0] for part in parts]
    joined["choices"][0] = {**choices[-1], "text": "".join(choice["text"] for choice in choices)}
    if all(choice.get("logprobs") for choice in choices):
        names = ("tokens", "token_logprobs", "top_logprobs")
        together = {name: [one for choice in choices for one in choice["logprobs"][name]] for name in names}
        joined["choices"][0]["logprobs"] = together
    counts = [part.get("usage") or {} for part in parts]
    joined["usage"] = {
        "prompt_tokens": counts[0].get("prompt_tokens", 0),
        "completion_tokens": sum(count.get("completion_tokens", 0) for count in counts),
    }
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--bias", choices=BIASES, default="none")
    args = parser.parse_args()
    upstream = args.upstream.rstrip("/").removesuffix("/v1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(ask(upstream, self.path, None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                change = self.path.endswith("/v1/completions")
                self._send(biased(upstream, self.path, body, args.bias) if change else ask(upstream, self.path, body))
            except HTTPError as error:
                self._send(json.loads(error.read() or b"{}"), error.code)

        def _send(self, value: Any, code: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    print(f"port {args.port}: {args.bias} before {upstream}", flush=True)
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
