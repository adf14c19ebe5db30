"""The one thread that keeps an engine running, and its requests as an event loop sees them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from threading import Event as Flag
from threading import RLock, Thread
from time import perf_counter
from typing import Any

from outrider.config import SamplingParams
from outrider.engine.engine import Engine
from outrider.engine.request import Request
from outrider.errors import OutriderError
from outrider.types import Event

__all__ = ["Answer", "EngineThread"]

MOST_FAILURES = 3  # steps in a row that may fail before everything that runs is given up

log = logging.getLogger("outrider.serving")


class Answer:
    """One request of the engine, read from the event loop. It keeps no queue: a slow reader finds the events in the
    request, whose ``max_tokens`` bounds them."""

    def __init__(self, thread: EngineThread, request: Request, context: Any = None) -> None:
        self.request, self.context = request, context
        self.submitted = perf_counter()
        self.ended = False  # and everything about it is known
        self.seconds_saved: float | None = None  # by speculation; None: unknown
        self.first_token = 0.0  # perf_counter; 0: none yet
        self.latest_token = 0.0
        self._thread = thread
        self._news = asyncio.Event()
        self._announced = 0  # events that the reader was told of; only the engine's thread changes it

    async def started(self, seconds: float) -> bool:
        """Wait until the request has its first event or has ended; False if it still has no row after ``seconds``."""
        deadline = perf_counter() + seconds
        while not self.request.events and self.request.finish_reason is None:
            self._news.clear()
            if self.request.events or self.request.finish_reason is not None:
                break
            left = deadline - perf_counter()
            if self.request.started == 0 and left <= 0:
                return False
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that comes just as the event does.
                async with asyncio.timeout(left if self.request.started == 0 else None):
                    await self._news.wait()
            except TimeoutError:
                continue
        return True

    async def events(self) -> AsyncGenerator[Event, None]:
        """Its events from the first one on. Raises the request's error where it failed. Leaving early cancels it."""
        read = 0
        request = self.request
        try:
            while True:
                self._news.clear()
                while read < len(request.events):
                    read += 1
                    yield request.events[read - 1]
                if self.ended and read == len(request.events):
                    break
                await self._news.wait()
            if request.error is not None:
                raise request.error
        finally:
            self.cancel()

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop it at the end of the step that runs; nothing where it has finished."""
        self._thread.cancel(self.request, reason)

    # ------------------------------------------------------------------------------------------ the engine's thread

    def advanced(self) -> int:
        """Tokens that came since the last call, -1 where nothing is new."""
        request = self.request
        count, ended = len(request.events), request.finish_reason is not None
        if count == self._announced and not ended:
            return -1
        tokens = sum(len(event.pieces) for event in request.events[self._announced : count])
        self._announced = count
        return tokens

    def wake(self) -> None:
        """In the event loop."""
        self._news.set()


class EngineThread:
    """Runs steps while there is work, sleeps while there is none.

    ``submit`` and ``cancel`` are for the event loop. ``observe(answer, tokens, seconds)`` is called in the engine's
    thread for every answer that got tokens: seconds since the tokens before them, or since the submission. ``finished``
    is called there for every answer that ended.
    """

    def __init__(
        self,
        engine: Engine,
        observe: Callable[[Answer, int, float], None] | None = None,
        finished: Callable[[Answer], None] | None = None,
    ) -> None:
        self.engine = engine
        self.healthy = True
        self._observe, self._finished = observe, finished
        self._answers: dict[int, Answer] = {}  # by number; those that have not ended
        self._changing = RLock()  # a signal may come while the main thread holds it
        self._work = Flag()
        self._stopped = False
        self._failures = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs and end the thread."""
        self._stopped = True
        self.cancel_all("cancelled")
        self._work.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        index: int = 0,
        expected: Sequence[int] = (),
        context: Any = None,
    ) -> Answer:
        """Queue a request. Raises InvalidRequest. ``context``: kept with the answer."""
        request = self.engine.submit(prompt, params, seed, index, expected)
        answer = Answer(self, request, context)
        with self._changing:
            self._answers[request.number] = answer
        self._work.set()
        return answer

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        if request.finish_reason is None:
            self.engine.cancel(request, reason)
            self._work.set()

    def cancel_all(self, reason: str) -> None:
        for answer in self.answers():
            self.cancel(answer.request, reason)

    def answers(self) -> list[Answer]:
        """Those that have not ended, or whose end is still to be told."""
        with self._changing:
            return list(self._answers.values())

    @property
    def unfinished(self) -> int:
        """How many have not ended: a reader may see an end before the step that brought it is over."""
        return sum(answer.request.finish_reason is None for answer in self.answers())

    # ------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stopped:
            self._work.wait()
            self._work.clear()
            try:
                self.engine.advance(self._idle)
                self._failures = 0
            except Exception:
                self._failures += 1
                log.exception("a step of the engine failed (%d in a row)", self._failures)
                if self._failures >= MOST_FAILURES:
                    self._give_up()
                self._work.set()
            self._deliver()
        self._deliver()

    def _idle(self) -> bool:
        """Between two steps: tell readers what the last one brought. True where nothing is left to do."""
        if self._deliver():
            self._failures = 0
        return not self.engine.busy

    def _give_up(self) -> None:
        """Steps keep failing: end every request with an error rather than try for ever."""
        self.healthy = False
        for answer in self.answers():
            answer.request.error = answer.request.error or OutriderError(
                "the engine failed while this request ran; the server's log has the reason, and a restart may help"
            )
            self.engine.cancel(answer.request, "error")

    def _deliver(self) -> bool:
        """Wake the readers of every answer that has news: one call into the event loop for all of them."""
        woken = []
        now = perf_counter()
        for answer in self.answers():
            tokens = answer.advanced()
            if tokens < 0:
                continue
            woken.append(answer)
            if tokens:
                since = answer.latest_token or answer.submitted
                answer.latest_token = now
                answer.first_token = answer.first_token or now
                if self._observe is not None:
                    self._observe(answer, tokens, now - since)
            if answer.request.finish_reason is not None:
                with self._changing:
                    self._answers.pop(answer.request.number, None)
                if self._finished is not None:
                    self._finished(answer)
                answer.ended = True
        if woken and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake, woken)
        return bool(woken)


def _wake(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.wake()
