"""One streamed request to an OpenAI-compatible server, timed: the same client for this server and for any other.

HTTP is spoken here rather than by a library: on a machine of few cores a client that computes little disturbs what it
measures least.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from outrider.errors import InvalidRequest, OutriderError

__all__ = ["LoadClient", "Timed"]

KEY = "OPENAI_API_KEY"  # environment variable; without it no key is sent
LONGEST_LINE = 1 << 20


@dataclass(slots=True)
class Timed:
    """One request; times of ``perf_counter``."""

    sent: float
    chunks: list[float] = field(default_factory=list)  # when each piece of text came
    ended: float = 0.0
    tokens: int = 0  # as the server's usage says; else the pieces
    speculative: Mapping[str, Any] | None = None  # Outrider's counts; other servers send none
    error: str = ""

    @property
    def first(self) -> float:
        """Seconds to the first piece of text."""
        return self.chunks[0] - self.sent if self.chunks else float("nan")


class LoadClient:
    """Raises InvalidRequest for a malformed address."""

    def __init__(self, url: str, model: str | None = None, *, timeout: float = 600.0) -> None:
        try:
            parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
            port = parts.port
        except ValueError as error:
            raise InvalidRequest(
                f"--url: expected an address like http://localhost:8000, got {url!r}: {error}"
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"--url: expected an address like http://localhost:8000, got {url!r}")
        self._host, self._secure = parts.hostname, parts.scheme == "https"
        self._port = port or (443 if self._secure else 80)
        self._base = parts.path.rstrip("/")
        self._timeout = timeout
        self.model = model or ""

    async def first_model(self) -> str:
        """The model that requests name. Raises OutriderError where the server does not answer or wants a key."""
        if not self.model:
            try:
                status, lines = await self._open("GET", "/v1/models", None)
                text = b"".join([part async for part in lines])
                if status in (401, 403):
                    raise OutriderError(
                        f"{self._host}:{self._port} asks for an API key (HTTP {status}): set the variable {KEY} "
                        "to one of its keys"
                    )
                self.model = str(json.loads(text)["data"][0]["id"])
            except (OSError, ValueError, KeyError, IndexError, TypeError, asyncio.IncompleteReadError) as error:
                raise OutriderError(
                    f"{self._host}:{self._port}/v1/models gave no model ({type(error).__name__}: {error}); is the "
                    "server running, and is --model its model's name?"
                ) from None
        return self.model

    async def ask(self, prompt: str, options: Mapping[str, Any], *, chat: bool) -> Timed:
        """Send a prompt and read its stream. What goes wrong is in the result's ``error``."""
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        timed = Timed(perf_counter())
        try:
            async with asyncio.timeout(self._timeout):
                await self._read(timed, "/v1/chat/completions" if chat else "/v1/completions", {**body, **options})
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            timed.error = timed.error or f"{type(error).__name__}: {error}"
        timed.ended = perf_counter()
        timed.tokens = timed.tokens or len(timed.chunks)
        return timed

    async def _read(self, timed: Timed, path: str, body: Mapping[str, Any]) -> None:
        status, lines = await self._open("POST", path, json.dumps(body).encode())
        if status != 200:
            text = b"".join([part async for part in lines])
            timed.error = f"HTTP {status}: {text[:200].decode('utf-8', 'replace')}"
            return
        async for line in lines:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                timed.error = str(event["error"])[:200]
            for choice in event.get("choices", ()):
                if (choice.get("delta") or {}).get("content") or choice.get("text"):
                    timed.chunks.append(perf_counter())
            usage = event.get("usage")
            if usage:
                timed.tokens = int(usage.get("completion_tokens") or 0)
                timed.speculative = usage.get("speculative")

    async def _open(self, method: str, path: str, body: bytes | None) -> tuple[int, AsyncIterator[bytes]]:
        """The status, and the lines of the body; the connection is closed after them."""
        context = ssl.create_default_context() if self._secure else None
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=context, limit=LONGEST_LINE)
        head = [f"{method} {self._base}{path} HTTP/1.1", f"Host: {self._host}:{self._port}", "Connection: close"]
        if os.environ.get(KEY):
            head.append(f"Authorization: Bearer {os.environ[KEY]}")
        if body is not None:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*head, "", ""]).encode() + (body or b""))
        try:
            await writer.drain()
            status = int((await reader.readline()).split()[1])
            headers = {}
            while (line := await reader.readline()).strip():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.lower()] = value.strip()
        except IndexError:
            writer.close()
            raise ValueError("the answer is not HTTP") from None
        except BaseException:
            writer.close()
            raise
        return status, _lines(reader, writer, "chunked" in headers.get("transfer-encoding", "").lower())


async def _lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chunked: bool) -> AsyncIterator[bytes]:
    try:
        rest = b""
        async for part in _parts(reader, chunked):
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                yield line
        if rest:
            yield rest
    finally:
        writer.close()
        with suppress(OSError, ssl.SSLError):
            await writer.wait_closed()


async def _parts(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    if not chunked:
        while part := await reader.read(65536):
            yield part
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
