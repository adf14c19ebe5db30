"""Answers from an OpenAI-compatible server: a few requests at once, sent again while it is busy or restarts."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from outrider.errors import InvalidRequest, OutriderError
from outrider.tokenization.tokenizer import Tokenizer
from outrider.training.conversations import ChatTurn, Settings

__all__ = ["Server"]

BUSY = {408, 409, 425, 429, 500, 502, 503, 504}  # worth asking again
KEY = "OPENAI_API_KEY"  # environment variable; without it no key is sent
LONGEST_PAUSE = 60.0  # seconds


class Server:
    """One server. Raises InvalidRequest for a malformed address, OutriderError where the server does not answer.

    Its text is encoded by the target's tokenizer, which may give other tokens than the server's model generated. An end
    token is added where the server says that the target stopped.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        model: str | None,
        chat: bool,
        requests: int,
        retries: int,
        timeout: float,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise InvalidRequest(f"server: expected an address like http://localhost:8000, got {url!r}")
        self._tokenizer, self._settings, self._chat = tokenizer, settings, chat
        self._requests, self._retries, self._timeout = requests, retries, timeout
        self._model = model or self._first_model()

    def answer(self, todo: deque[ChatTurn]) -> Iterator[list[tuple[ChatTurn, list[int]]]]:
        """Answers as they come. Raises OutriderError once a request has failed for good."""
        asked: dict[Future[list[int]], ChatTurn] = {}
        with ThreadPoolExecutor(self._requests) as pool:
            try:
                while todo or asked:
                    while todo and len(asked) < self._requests:
                        turn = todo.popleft()
                        asked[pool.submit(self._answer_one, turn)] = turn
                    done, _ = wait(asked, return_when=FIRST_COMPLETED)
                    failed = [future for future in done if future.exception() is not None]
                    yield [(asked.pop(future), future.result()) for future in done if future not in failed]
                    for future in failed:  # only now, so that the finished answers are kept
                        future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _answer_one(self, turn: ChatTurn) -> list[int]:
        params = self._settings.of(turn)
        body: dict[str, Any] = {"model": self._model, "max_tokens": params.max_tokens, "seed": params.seed}
        body |= {"temperature": params.temperature, "top_p": params.top_p}
        for name, neutral in (("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0), ("ignore_eos", False)):
            if getattr(params, name) != neutral:  # not in OpenAI's API: sent only where it changes something
                body[name] = getattr(params, name)
        if self._chat:
            messages = turn.messages or ({"role": "user", "content": self._tokenizer.decode(turn.tokens)},)
            path, body = "/v1/chat/completions", {**body, "messages": list(messages)}
        else:
            path, body = "/v1/completions", {**body, "prompt": turn.tokens}
        reply = self._call(path, body)
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if self._chat else choice["text"]
            tokens = self._tokenizer.encode(text or "", add_special_tokens=False)
        except (KeyError, IndexError, TypeError) as error:
            raise OutriderError(
                f"{self._url}{path} answered {str(reply)[:80]!r}; expected OpenAI's `choices` with a text"
            ) from error
        tokens = tokens[: params.max_tokens]
        ended = choice.get("finish_reason") == "stop" and len(tokens) < params.max_tokens
        return [*tokens, *self._settings.end_tokens[:1]] if ended else tokens

    def _first_model(self) -> str:
        reply = self._call("/v1/models")
        try:
            return str(reply["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise OutriderError(f"{self._url}/v1/models lists no model; give its name as server_model") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request, sent again while that may help."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(LONGEST_PAUSE, 2.0 ** (attempt - 1)))
            try:
                with urlopen(Request(self._url + path, data, headers), timeout=self._timeout) as reply:
                    return json.load(reply)
            except HTTPError as error:
                problem = f"HTTP {error.code}: {error.read(300).decode('utf-8', 'replace')}"
                if error.code not in BUSY:
                    raise OutriderError(f"{self._url}{path} refuses the request ({problem})") from None
            except (URLError, HTTPException, OSError, ValueError) as error:  # no server, cut connection, or no JSON
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise OutriderError(
            f"{self._url}{path} gave no answer in {self._retries + 1} attempts ({problem}). Answers so far are "
            "kept: start the server, then the same command goes on"
        )
