"""Which of the threads that wait for an engine runs its next step."""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition, get_ident
from typing import Protocol, TypeVar

__all__ = ["Alone", "Turns", "at_once"]

T = TypeVar("T")


class Alone(Protocol):
    """Calls a function while nothing else uses the target, and returns what it returned."""

    def __call__(self, act: Callable[[], T], /) -> T: ...


def at_once(act: Callable[[], T], /) -> T:
    """``Alone`` where no engine runs yet."""
    return act()


class Turns:
    """One thread at a time runs steps; the others wait for what these bring, or for their turn."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._runner = 0  # a thread's identifier; 0: none

    def run_until(self, done: Callable[[], bool], step: Callable[[], object]) -> None:
        """Call ``step``, or wait while another thread does, until ``done()``."""
        while not done():
            try:
                with self._changed:
                    while self._runner not in (0, get_ident()) and not done():
                        self._changed.wait()
                    if done():
                        return
                    # Inside the try: an interrupt right here leaves no claim behind.
                    self._runner = get_ident()
                step()
            finally:
                self._release()

    def run_once(self, act: Callable[[], T]) -> T:
        """What ``act`` returns, called when no other thread runs a step."""
        found: list[T] = []
        self.run_until(lambda: bool(found), lambda: found.append(act()))
        return found[0]

    def run_if_free(self, act: Callable[[], object]) -> None:
        """Call ``act`` while no thread runs a step; do nothing where one does, this thread's own included."""
        with self._changed:
            if self._runner:
                return
            self._runner = get_ident()
        try:
            act()
        finally:
            self._release()

    def _release(self) -> None:
        """Give up this thread's claim, if it has one."""
        with self._changed:
            if self._runner == get_ident():
                self._runner = 0
                self._changed.notify_all()
