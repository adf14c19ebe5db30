"""What is measured once on a machine, while a server that is ready already has nothing to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Event as Flag
from threading import Thread
from time import perf_counter
from typing import TypeVar

from outrider.engine.llm import LLM

__all__ = ["IdleMeasurements"]

T = TypeVar("T")
QUIET = 1.0  # seconds without a request before a piece is measured
POLL = 0.05  # seconds

log = logging.getLogger("outrider.serving")


class IdleMeasurements:
    """A thread that measures what ``LLM(measure=False)`` left out, piece by piece: a request that arrives waits for the
    piece that runs, and the next one waits until requests have stopped for a while."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._stopped = Flag()
        self._latest = perf_counter()  # when the engine was last seen at work
        self._thread = Thread(target=self._run, name="measuring", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the piece that it measures; what is not complete is not kept."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            self._llm.measure(self._alone)
        except _Stopped:
            pass
        except Exception:
            log.exception("this machine could not be measured; the server goes on with what it knows")

    def _alone(self, act: Callable[[], T], /) -> T:
        engine = self._llm.engine
        while engine.busy or perf_counter() - self._latest < QUIET:
            if engine.busy:
                self._latest = perf_counter()
            if self._stopped.wait(POLL):
                raise _Stopped
        if self._stopped.is_set():
            raise _Stopped
        return engine.alone(act)


class _Stopped(Exception):
    """The server ends."""
