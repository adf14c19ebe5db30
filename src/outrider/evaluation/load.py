"""A load on a server, and what its clients see: tokens a second, time to the first token, time between pieces of text.

Closed loop: so many clients, each asks again as soon as it is answered. Open loop: requests arrive by a Poisson process
of a given rate, whether or not those before them are answered.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from outrider.errors import OutriderError
from outrider.evaluation.load_client import LoadClient, Timed

__all__ = ["Load", "LoadRow", "run_load", "summary"]

WARM_UP = 1.0  # seconds at the beginning that count for nothing


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked. ``rate``: requests a second of an open loop; None: a closed loop of ``concurrency`` clients."""

    prompts: Sequence[str]
    chat: bool
    duration: float
    concurrency: int = 1
    rate: float | None = None
    options: Mapping[str, Any] | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True)
class LoadRow:
    """What clients saw. Times are of whole requests that were sent after the warm-up."""

    policy: str
    concurrency: float  # of an open loop: the mean number of requests in flight
    rate: float | None
    tokens_per_second: float
    per_user_tokens_per_second: float  # mean over requests, from the first piece of text to the last
    ttft_ms: float  # median
    ttft_p99_ms: float
    itl_p50_ms: float  # between pieces of text that follow each other in one answer
    itl_p99_ms: float
    acceptance_length: float | None  # tokens of a round; None: the server does not say
    verified_per_row: float | None  # drafts of a round that were verified
    requests: int
    errors: int
    first_error: str  # empty where there is none


async def run_load(client: LoadClient, load: Load) -> tuple[list[Timed], float, float]:
    """All requests, and when counting began and ended. Raises OutriderError where the server does not answer at all."""
    await client.first_model()
    picks = random.Random(load.seed)
    began = perf_counter()
    end = began + WARM_UP + load.duration
    done: list[Timed] = []

    async def ask(number: int) -> None:
        prompt = load.prompts[number % len(load.prompts)]
        done.append(await client.ask(prompt, load.options or {}, chat=load.chat))

    async def one_after_another(first: int) -> None:
        number = first
        while perf_counter() < end:
            await ask(number)
            if done[-1].error:
                await asyncio.sleep(0.1)  # a server that refuses is not asked without a pause
            number += load.concurrency

    if load.rate is None:
        await asyncio.gather(*(one_after_another(first) for first in range(load.concurrency)))
    else:
        at = began
        tasks: list[asyncio.Future[None]] = []
        while (at := at + picks.expovariate(load.rate)) < end:
            await asyncio.sleep(max(0.0, at - perf_counter()))
            tasks.append(asyncio.ensure_future(ask(len(tasks))))
        await asyncio.gather(*tasks)
    if done and all(one.error for one in done):
        raise OutriderError(f"every one of {len(done)} requests failed; the first one: {done[0].error}")
    return done, began + WARM_UP, end


def summary(policy: str, load: Load, done: Sequence[Timed], start: float, end: float) -> LoadRow:
    """The figures of one load."""
    good = [one for one in done if not one.error and one.chunks]
    counted = [one for one in good if one.sent >= start] or good
    tokens = sum(one.tokens * sum(start <= t < end for t in one.chunks) / len(one.chunks) for one in good)
    gaps = [after - before for one in counted for before, after in pairwise(one.chunks)]
    rates = [
        (one.tokens - 1) / (one.chunks[-1] - one.chunks[0])
        for one in counted
        if len(one.chunks) > 1 and one.chunks[-1] > one.chunks[0]
    ]
    counts = [one.speculative for one in counted if one.speculative is not None]
    rounds, drafted, accepted = (sum(int(c.get(n, 0)) for c in counts) for n in ("rounds", "drafted", "accepted"))
    busy = sum(max(0.0, min(one.ended, end) - max(one.sent, start)) for one in done)
    return LoadRow(
        policy=policy,
        concurrency=float(load.concurrency) if load.rate is None else round(busy / (end - start), 2),
        rate=load.rate,
        tokens_per_second=round(tokens / (end - start), 2),
        per_user_tokens_per_second=round(float(np.mean(rates)), 2) if rates else 0.0,
        ttft_ms=_percentile([one.first for one in counted], 50),
        ttft_p99_ms=_percentile([one.first for one in counted], 99),
        itl_p50_ms=_percentile(gaps, 50),
        itl_p99_ms=_percentile(gaps, 99),
        acceptance_length=round(1 + accepted / rounds, 3) if rounds else None,
        verified_per_row=round(drafted / rounds, 3) if rounds else None,
        requests=len(counted),
        errors=sum(bool(one.error) for one in done),
        first_error=next((one.error for one in done if one.error), ""),
    )


def _percentile(seconds: Sequence[float], percent: int) -> float:
    """In milliseconds."""
    return round(1000 * float(np.percentile(seconds, percent)), 3) if seconds else 0.0
