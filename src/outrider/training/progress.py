"""Progress of a stage: a live bar on a terminal, a line every 30 seconds elsewhere, nothing without a console."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "duration"]

EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """Counts ``what`` up to ``total``, and tokens; with ``console`` None nothing is printed."""

    def __init__(self, console: Console | None, what: str, total: int, done: int = 0) -> None:
        self.console, self.what, self.total, self.done, self.tokens = console, what, total, done, 0
        self._first, self._began = done, time.monotonic()
        self._printed = self._began
        self._note = ""
        self._bar: Bar | None = None
        self._task = TaskID(0)
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
            )
            self._bar = Bar(*columns, TimeElapsedColumn(), console=console)
            self._task = self._bar.add_task(what, total=total, completed=done, speed="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self.console is not None:
            self._print()

    def advance(self, count: int = 1, tokens: int = 0, note: str = "") -> None:
        """``count`` more are done, with ``tokens`` more tokens; ``note`` is shown beside the speed."""
        self.done += count
        self.tokens += tokens
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self.speed)
        elif self.console is not None and time.monotonic() - self._printed >= EVERY:
            self._print()

    @property
    def speed(self) -> str:
        """The last note, tokens per second since the start, and the estimated remaining time."""
        seconds = max(1e-9, time.monotonic() - self._began)
        pace = (self.done - self._first) / seconds
        parts = [self._note] if self._note else []
        if self.tokens:
            parts.append(f"{self.tokens / seconds:,.0f} tokens/s")
        if pace and self.done < self.total:
            parts.append(f"{duration((self.total - self.done) / pace)} left")
        return ", ".join(parts)

    def _print(self) -> None:
        self._printed = time.monotonic()
        assert self.console is not None
        line = f"{self.what} {self.done}/{self.total}, {self.speed}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in a readable unit: 45 s, 12 min, 3.5 h, 2.1 days."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
