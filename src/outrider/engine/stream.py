"""The events of one request, read at the reader's own pace."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Protocol

from outrider.engine.request import Request
from outrider.types import Event

__all__ = ["EventStream", "Hold"]


class _Engine(Protocol):
    def advance(self, done: Callable[[], bool]) -> None: ...
    def cancel(self, request: Request, reason: str = "cancelled") -> None: ...


class Hold:
    """Keeps a request going: once nobody has its hold any more, the request is cancelled unless it has finished."""

    def __init__(self, engine: _Engine, request: Request) -> None:
        self.engine, self.request = engine, request

    def __del__(self) -> None:
        self.engine.cancel(self.request)


class EventStream:
    """An iterator over a request's events, the last one with its ``finish_reason``. Raises the request's error where it
    failed. Closing it cancels the request, and so does dropping the last stream of its hold unread."""

    def __init__(self, hold: Hold) -> None:
        self._hold, self._engine, self.request = hold, hold.engine, hold.request
        self._read = 0
        self._reading = Lock()  # several threads may share a stream: each event goes to one of them

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Event:
        request = self.request
        with self._reading:
            read = self._read
            self._engine.advance(lambda: len(request.events) > read or request.finish_reason is not None)
            if len(request.events) > read:
                self._read += 1
                return request.events[read]
        if request.error is not None:
            raise request.error
        raise StopIteration

    def close(self) -> None:
        """Cancel the request, unless it has finished."""
        self._engine.cancel(self.request)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
