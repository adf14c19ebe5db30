"""Steps of an engine that KeyboardInterrupt ends at any line of the package, as Ctrl-C may."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import outrider
from outrider.engine.engine import Engine

__all__ = ["Interrupt", "interrupted", "interrupted_runs"]

PACKAGE = str(Path(outrider.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that the package runs, once. A function for ``sys.settrace``."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@contextmanager
def interrupted(line: int) -> Iterator[Interrupt]:
    """What runs inside is interrupted at that line, if it gets so far; the interrupt goes no further."""
    tracer = Interrupt(line)
    sys.settrace(tracer)
    try:
        yield tracer
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)


def interrupted_runs(
    begin: Callable[[], tuple[Engine, list[Any]]], steps: int, stride: int, *, lines: int
) -> Iterator[tuple[int, Engine, list[Any]]]:
    """(line, engine, requests) after ``steps`` steps that were interrupted at line 1, 1 + stride, ... until none was.

    begin: a new engine with its requests submitted. Fails where the steps have fewer than ``lines`` lines: then nothing
    was traced.
    """
    line, reached = 1, True
    while reached:
        engine, requests = begin()
        with interrupted(line) as tracer:
            for _ in range(steps):
                engine.step()
        reached = tracer.left <= 0
        yield line, engine, requests
        line += stride
    assert line > lines, "a step was never traced"
