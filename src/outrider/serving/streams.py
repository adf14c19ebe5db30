"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from typing import TypeVar

__all__ = ["merged"]

T = TypeVar("T")


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all sources with the index of theirs, as they come. Raises the first error; leaving closes all."""
    if len(sources) == 1:
        async for item in sources[0]:
            yield 0, item
        return
    waiting = {asyncio.ensure_future(_next(source)): index for index, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: waiting[task]):
                index = waiting.pop(task)
                found = task.result()
                if found:
                    yield index, found[0]
                    waiting[asyncio.ensure_future(_next(sources[index]))] = index
    finally:
        for task in waiting:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _next(source: AsyncIterator[T]) -> tuple[T] | tuple[()]:
    try:
        return (await anext(source),)
    except StopAsyncIteration:
        return ()
