"""A discrete-event simulation of an engine: the real policies, under any cost curve, acceptance profile and traffic.

Time is virtual and every step is an event: its drafts are asked of the policy's ``plan``, what is verified of its
``choose``, and its ``observe`` is told the seconds that the costs say, so a policy cannot tell the difference. Texts
are lengths: a draft is accepted with the probability that the acceptance profile says. Days of traffic take minutes.

Everything random follows from the seed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest
from outrider.planning.simulated_drafts import Acceptance
from outrider.planning.step_costs import FollowCosts, ReadCosts, StepCosts
from outrider.types import RequestStats, SchedulerPolicy, StepCost, StepsAside, StepView

__all__ = ["Result", "Traffic", "simulate"]

LARGEST = 1_000_000
"""Users, tokens of a prompt or an answer, and requests a second."""
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests. Raises InvalidRequest for values out of range."""

    concurrency: int = 0
    """Closed loop: so many users, each asks again when answered. 0: an open loop at ``rate``."""
    rate: float = 0.0
    """Open loop: requests a second, at random times (Poisson)."""
    burst: float = 1.0
    """Open loop: every other ``period`` the rate is so many times higher."""
    period: float = 10.0
    prompt: int = 128
    """Mean tokens of a prompt, and of an answer; both are geometric, like lengths of real ones."""
    answer: int = 256
    sizes: tuple[tuple[int, int] | tuple[int, int, int], ...] = ()
    """Tokens of prompt and answer of recorded requests, which come in a random order, instead of the means. A third
    number: how many of the prompt are not read, because the cache holds them from an earlier request."""
    temperature: float = 1.0
    """0: greedy, and a policy may search globally."""

    def __post_init__(self) -> None:
        if max(self.concurrency, self.prompt, self.answer) > LARGEST:
            raise InvalidRequest(
                f"concurrency, prompt and answer may be at most {LARGEST}, got {self.concurrency}, {self.prompt}, "
                f"{self.answer}"
            )
        if self.rate and not all(1e-6 <= rate <= LARGEST for rate in (self.rate, self.rate * self.burst)):
            raise InvalidRequest(
                f"requests a second, and burst times as many, must be 1e-06 to {LARGEST}, got a rate of "
                f"{self.rate:g} and a burst of {self.burst:g}"
            )
        if (self.concurrency > 0) == (self.rate > 0):
            raise InvalidRequest("traffic is either closed (concurrency above 0) or open (rate above 0)")
        if (
            min(self.prompt, self.answer, *(n for size in self.sizes for n in size[:2])) < 1
            or not 0 < self.burst < math.inf
            or self.period <= 0
        ):
            raise InvalidRequest("prompt and answer need at least 1 token, burst and period finite numbers above 0")
        for size in self.sizes:
            if not 0 <= _held(size) < size[0]:
                raise InvalidRequest(
                    f"the cache may hold 0 to {size[0] - 1} tokens of a prompt of {size[0]}, as the last one is always "
                    f"read; got {_held(size)}"
                )

    def arrivals(self, rng: np.random.Generator) -> Iterator[float]:
        """Times of an open loop's requests."""
        now = 0.0
        while True:
            rate = self.rate * (self.burst if int(now / self.period) % 2 else 1.0)
            now += float(rng.exponential(1 / rate))
            yield now


def _held(size: tuple[int, int] | tuple[int, int, int]) -> int:
    """Tokens of a recorded request's prompt that the cache holds."""
    return size[2] if len(size) == 3 else 0


@dataclass(slots=True)
class _Row:
    number: int
    slot: int
    arrived: float
    prompt: int  # tokens still to be read
    context: int  # cached
    left: int
    began: float = 0.0
    last: float = 0.0  # time of its last token
    tokens: int = 0
    followed: bool = True  # by the drafter


@dataclass(frozen=True)
class Result:
    """What a simulation gave. Latencies in seconds."""

    seconds: float
    tokens: int
    requests: int
    steps: int
    rounds: int  # rows of steps that were past their prompt
    drafted: int  # drafts that were verified
    accepted: int
    gaps: Floats  # between a row's commits, by token: what a reader waits for each
    first: Floats  # time to the first token, by request
    users: Floats  # tokens per second of each request, from its first token on
    windows: Floats  # tokens per second of each window

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, float | int]:
        """Figures, in milliseconds where they are times."""

        def quantile(values: Floats, q: float) -> float:
            return round(1e3 * float(np.quantile(values, q)), 4) if len(values) else 0.0

        return {
            "tokens_per_second": round(self.tokens_per_second, 3),
            "per_user_tokens_per_second": round(float(self.users.mean()), 3) if len(self.users) else 0.0,
            "ttft_ms": quantile(self.first, 0.5),
            "ttft_p95_ms": quantile(self.first, 0.95),
            "itl_p50_ms": quantile(self.gaps, 0.5),
            "itl_p95_ms": quantile(self.gaps, 0.95),
            "itl_p99_ms": quantile(self.gaps, 0.99),
            "acceptance_length": round(1 + self.accepted / self.rounds, 4) if self.rounds else 1.0,
            "verified_per_row": round(self.drafted / self.rounds, 4) if self.rounds else 0.0,
            "requests": self.requests,
            "seconds": round(self.seconds, 3),
        }


def simulate(
    policy: SchedulerPolicy,
    costs: StepCosts,
    acceptance: Acceptance,
    traffic: Traffic,
    *,
    seconds: float,
    max_rows: int = 0,
    chunk: int = 512,
    beside: int = 128,
    seed: int = 0,
    noise: float = 0.0,
    stalls: float = 0.0,
    window: float = 60.0,
    slowness: Callable[[float], float] = lambda now: 1.0,
    warm: float = 0.0,
) -> Result:
    """Run ``seconds`` of virtual time, after ``warm`` seconds that are not counted.

    ``max_rows``: rows of the engine (0: as many as there are users, or 256). ``chunk``: most prompt tokens of a step,
    ``beside``: where other rows decode. ``noise``: how far single passes differ,
    as the deviation of the log; ``stalls``: the share of passes that take ten times as long. ``slowness``: a factor on
    all times by the time of day, for a machine that is not alone.
    """
    run = _Simulation(policy, costs, acceptance, traffic, max_rows or traffic.concurrency or 256, chunk, seed)
    run.beside = min(beside, chunk)
    run.noise, run.stalls, run.window, run.slowness = noise, stalls, window, slowness
    while run.now < warm:
        run.step(warm)
    run.count_from_now()
    while run.now < run.counted_from + seconds:
        run.step(run.counted_from + seconds)
    return run.result()


class _Simulation:
    def __init__(
        self,
        policy: SchedulerPolicy,
        costs: StepCosts,
        acceptance: Acceptance,
        traffic: Traffic,
        max_rows: int,
        chunk: int,
        seed: int,
    ) -> None:
        self.policy, self.costs, self.acceptance, self.traffic = policy, costs, acceptance, traffic
        self.aside = policy if isinstance(policy, StepsAside) else None
        self.following = costs if isinstance(costs, FollowCosts) else None
        self.reading = costs if isinstance(costs, ReadCosts) else None
        self.max_rows, self.chunk = max_rows, chunk
        self.beside = chunk
        self.noise = self.stalls = 0.0
        self.window = 60.0
        self.slowness: Callable[[float], float] = lambda now: 1.0
        streams = np.random.SeedSequence(seed).spawn(3)
        self.rng, self.times, self.texts = (np.random.default_rng(stream) for stream in streams)
        self.arrivals = traffic.arrivals(self.texts) if traffic.rate else iter(())
        self.next_arrival = next(self.arrivals, math.inf)
        self.params = SamplingParams(temperature=traffic.temperature)
        self.stats = RequestStats()
        self.now = 0.0
        self.number = 0
        self.waiting: deque[_Row] = deque(self._request(0.0) for _ in range(traffic.concurrency))
        self.rows: list[_Row] = []
        self.free = list(range(max_rows))[::-1]
        self.count_from_now()

    def count_from_now(self) -> None:
        """Forget what was counted so far; rows, and what the policy has learnt, stay."""
        self.counted_from = self.now
        self.steps = self.rounds = self.drafted = self.accepted = self.tokens = self.finished = 0
        self.gaps: list[tuple[float, int]] = []
        self.first: list[float] = []
        self.users: list[float] = []
        self.windows: list[int] = []

    def _request(self, now: float) -> _Row:
        self.number += 1
        if self.traffic.sizes:
            size = self.traffic.sizes[self.texts.integers(len(self.traffic.sizes))]
            held = _held(size)
            return _Row(self.number, -1, now, size[0] - held, held, size[1])
        prompt = int(self.texts.geometric(1 / self.traffic.prompt))
        return _Row(self.number, -1, now, prompt, 0, int(self.texts.geometric(1 / self.traffic.answer)))

    def step(self, ends: float) -> None:
        """One step of the engine, or the wait for the next request."""
        while self.next_arrival <= self.now:
            self.waiting.append(self._request(self.next_arrival))
            self.next_arrival = next(self.arrivals)
        while self.waiting and self.free:
            row = self.waiting.popleft()
            row.slot, row.began, row.followed = self.free.pop(), self.now, self.follows
            self.acceptance.begin(row.slot, self.texts)
            self.rows.append(row)
        if not self.rows:
            self.now = min(self.next_arrival, ends)
            return
        taking_up = self._follow()
        ready = [row for row in self.rows if not row.prompt]
        ready.sort(key=lambda row: not row.followed)
        chunks, finishing = self._chunks()
        base = len(ready) + sum(n for _, n in chunks)
        taking_part = len(ready) + len(chunks)
        context = sum(row.context for row in ready) + sum(row.context for row, _ in chunks)
        limits = self._plan(ready, base, taking_part, context)
        keep, accepted, drafting, longest = self._draft(ready, limits, len(finishing))
        kept = int(keep.sum())
        slow = self.slowness(self.now) * self._stall()
        follow = 0.0
        features = 1.0
        if self.following is not None and any(row.followed for row in self.rows):
            shown = sum(1 + n for n, row in zip(accepted.tolist(), ready, strict=False) if row.followed)
            shown += sum(n for row, n in chunks if row.followed)
            follow, features = self.following.follow(shown) * slow, 1 + self.following.features
        draft = (self.costs.draft(drafting, longest) + taking_up) * slow
        verify = self._verify(base + kept, base - len(ready), taking_part, context) * slow * self._noise() * features
        bookkeeping = self.costs.bookkeeping(taking_part, longest > 0) * slow + follow
        self.now += draft + verify + bookkeeping
        self._commit(ready, accepted[: len(ready)].tolist(), chunks, finishing)
        self.steps += 1
        self.rounds += len(ready)
        self.drafted += kept
        self.accepted += int(accepted.sum())
        cost = StepCost(draft, verify, bookkeeping, taking_part, base + kept, context, follow, longest)
        self.policy.observe(cost, accepted.tolist())

    def _verify(self, tokens: int, prompts: int, rows: int, context: int) -> float:
        if prompts and self.reading is not None:
            return self.reading.read(prompts, tokens, rows, context)
        return self.costs.verify(tokens, rows, context)

    @property
    def follows(self) -> bool:
        return self.aside is None or self.aside.follows

    def _follow(self) -> float:
        """Leave all rows, or take rows up again, as the policy says; seconds that the latter takes."""
        if not self.follows:
            for row in self.rows:
                row.followed = False
            return 0.0
        if self.following is None or self.following.takes_up:
            again = [row for row in self.rows if not row.followed]
            for row in again:
                row.followed = True
            return self.following.follow(sum(row.context for row in again)) if self.following is not None else 0.0
        return 0.0

    def _chunks(self) -> tuple[list[tuple[_Row, int]], list[_Row]]:
        decoding = any(not row.prompt for row in self.rows)
        budget, chunks, finishing = self.beside if decoding else self.chunk, [], []
        for row in self.rows:
            if row.prompt and budget:
                n = min(row.prompt, budget)
                budget -= n
                chunks.append((row, n))
                if n == row.prompt:
                    finishing.append(row)
        return chunks, finishing

    def _plan(self, ready: Sequence[_Row], base: int, taking_part: int, context: int) -> Sequence[int]:
        if not ready:
            return []
        view = StepView(
            [row.context for row in ready],
            [self.stats] * len(ready),
            [self.params] * len(ready),
            slots=[row.slot for row in ready],
            requests=[row.number for row in ready],
            can_draft=sum(row.followed for row in ready),
            tokens=base,
            rows=taking_part,
            context=context,
        )
        return self.policy.plan(view)

    def _draft(self, ready: Sequence[_Row], limits: Sequence[int], more: int) -> tuple[Ints, Ints, int, int]:
        """Drafts verified and accepted by row; rows that were drafted for, and the most drafts that were asked for."""
        batch = len(ready) + more
        keep, accepted = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
        most = [
            min(n, self.acceptance.drafts, row.left - 1) if row.followed else 0
            for n, row in zip(limits, ready, strict=True)
        ]
        asked = [b for b, n in enumerate(most) if n > 0]
        if not asked:
            return keep, accepted, 0, 0
        slots = np.array([ready[b].slot for b in asked])
        said, lengths, right = self.acceptance.draw(slots, self.rng)
        wanted = np.zeros(batch, dtype=np.int64)
        wanted[asked] = np.minimum(lengths, [most[b] for b in asked])
        longest = max(most)
        confidence = None
        if said is not None:
            full = np.zeros((batch, longest), dtype=np.float32)
            full[asked] = said[:, :longest]
            confidence = full
        keep = np.array(self.policy.choose(confidence, wanted.tolist()))
        accepted[asked] = np.minimum(right, keep[asked])
        return keep, accepted, len(asked), longest

    def _commit(
        self,
        ready: Sequence[_Row],
        accepted: Sequence[int],
        chunks: Sequence[tuple[_Row, int]],
        finishing: Sequence[_Row],
    ) -> None:
        committed = 0
        for row, n in zip(ready, accepted, strict=True):
            new = min(n + 1, row.left)
            self.acceptance.advance(row.slot, new)
            self.gaps.append(((self.now - row.last) / new, new))
            committed += self._take(row, new)
        for row, n in chunks:
            row.prompt -= n
            row.context += n
        for row in finishing:
            self.first.append(self.now - row.arrived)
            row.began = self.now
            committed += self._take(row, 1)
        self.tokens += committed
        at = int((self.now - self.counted_from) / self.window)
        self.windows += [0] * (at + 1 - len(self.windows))
        self.windows[at] += committed

    def _take(self, row: _Row, new: int) -> int:
        row.left -= new
        row.context += new
        row.tokens += new
        row.last = self.now
        if row.left <= 0:
            if row.tokens > 1:
                self.users.append((row.tokens - 1) / (self.now - row.began) if self.now > row.began else 0.0)
            self.finished += 1
            self.rows.remove(row)
            self.free.append(row.slot)
            if self.traffic.concurrency:
                self.waiting.append(self._request(self.now))
        return new

    def _noise(self) -> float:
        return float(np.exp(self.noise * self.times.standard_normal())) if self.noise else 1.0

    def _stall(self) -> float:
        return 10.0 if self.stalls and self.times.random() < self.stalls else 1.0

    def result(self) -> Result:
        """What the steps so far gave."""
        gaps = np.repeat([g for g, _ in self.gaps], [n for _, n in self.gaps]) if self.gaps else np.zeros(0)
        seconds = self.now - self.counted_from
        whole = int(seconds / self.window)
        return Result(
            seconds=seconds,
            tokens=self.tokens,
            requests=self.finished,
            steps=self.steps,
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            gaps=np.asarray(gaps, dtype=np.float64),
            first=np.array(self.first),
            users=np.array(self.users),
            windows=np.array(self.windows[:whole]) / self.window,
        )
