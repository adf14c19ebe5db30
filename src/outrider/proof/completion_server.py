"""Somebody else's OpenAI-compatible server: text completions with log-probabilities, a few requests at once."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from outrider.errors import InvalidRequest, OutriderError

__all__ = ["Completion", "CompletionServer", "SampledToken"]

KEY = "OPENAI_API_KEY"  # environment variable; without it no key is sent


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token of an answer."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens with their log-probabilities, in descending order."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer."""

    text: str
    tokens: tuple[SampledToken, ...] | None
    """None: the server gives no log-probabilities."""
    finish_reason: str | None
    usage: dict[str, int]


class CompletionServer:
    """One server. Raises InvalidRequest for a malformed address, OutriderError where it does not answer as expected."""

    def __init__(self, url: str, *, model: str | None = None, requests: int = 4, timeout: float = 300.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise InvalidRequest(f"--url: expected an address like http://localhost:8000, got {url!r}")
        self._requests, self._timeout = requests, timeout
        self._refused = 0  # how many sets of options the server does not take
        self.model = model or self._first_model()

    def complete(
        self,
        prompt: str,
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None = None,
        logprobs: int | None = None,
    ) -> Completion:
        """One answer. ``logprobs``: how many of the likeliest tokens to tell."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": 1.0,
        }
        if seed is not None:
            body["seed"] = seed
        if logprobs is not None:
            body["logprobs"] = logprobs
        reply = self._ask(body)
        try:
            choice = reply["choices"][0]
            told = choice.get("logprobs") or {}
            return Completion(
                str(choice["text"]), _tokens(told), choice.get("finish_reason"), dict(reply.get("usage") or {})
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise OutriderError(
                f"{self.url}/v1/completions answered {str(reply)[:80]!r}; expected OpenAI's `choices` with a text"
            ) from error

    def many(self, prompts: Sequence[str], seeds: Sequence[int | None], **options: Any) -> list[Completion]:
        """One answer to each prompt, in order."""
        with ThreadPoolExecutor(self._requests) as pool:
            asked = [
                pool.submit(self.complete, prompt, seed=seed, **options)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
            return [future.result() for future in asked]

    def _ask(self, body: dict[str, Any]) -> Any:
        """With the options that leave the distribution alone, as far as the server takes them."""
        while True:
            neutral = NEUTRAL[self._refused] if body["temperature"] else {}
            try:
                return self._call("/v1/completions", {**body, **neutral})
            except _Refused as error:
                if not neutral or self._refused + 1 == len(NEUTRAL):
                    raise OutriderError(str(error)) from None
                self._refused += 1

    def _first_model(self) -> str:
        reply = self._call("/v1/models")
        try:
            return str(reply["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise OutriderError(f"{self.url}/v1/models lists no model; give its name with --server-model") from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=self._timeout) as reply:
                return json.load(reply)
        except HTTPError as error:
            said = error.read(300).decode("utf-8", "replace")
            kind = _Refused if error.code in (400, 422) else OutriderError
            raise kind(f"{self.url}{path} refuses the request (HTTP {error.code}: {said})") from None
        except (URLError, HTTPException, OSError, ValueError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            raise OutriderError(f"{self.url}{path} gives no answer ({problem}); is the server running?") from None


NEUTRAL: tuple[dict[str, float], ...] = (
    {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0},
    {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    {},
)
"""Not in OpenAI's API: servers that have defaults of their own for them are asked to leave the distribution alone; a
server that refuses a set gets the next one."""


class _Refused(OutriderError):
    """A request that the server does not take as it is."""


def _tokens(told: dict[str, Any]) -> tuple[SampledToken, ...] | None:
    """The tokens of OpenAI's ``logprobs`` of a text completion."""
    names, values = told.get("tokens"), told.get("token_logprobs")
    if not names or not values:
        return None
    tops = told.get("top_logprobs") or [{}] * len(names)
    return tuple(
        SampledToken(
            str(name),
            float(value) if value is not None else float("-inf"),
            tuple(sorted(((str(t), float(v)) for t, v in (top or {}).items()), key=lambda pair: -pair[1])),
        )
        for name, value, top in zip(names, values, tops, strict=True)
    )
