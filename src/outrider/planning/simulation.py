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
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest
from outrider.types import RequestStats, SchedulerPolicy, StepCost, StepsAside, StepView

__all__ = [
    "PROFILES",
    "Acceptance",
    "Costs",
    "FollowCosts",
    "ReadCosts",
    "Recorded",
    "Result",
    "StepCosts",
    "Synthetic",
    "Traffic",
    "simulate",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PROFILES: dict[str, tuple[float, ...]] = {  # P(draft j accepted | those before it were)
    "chat": (0.72, 0.69, 0.67, 0.66, 0.65, 0.64, 0.63),
    "code": (0.88, 0.87, 0.86, 0.85, 0.85, 0.84, 0.84),
    "maths": (0.92, 0.91, 0.91, 0.90, 0.90, 0.89, 0.89),
    "hostile": (0.02,) * 7,
}
"""Shapes like those of the DSpark paper's figure 2."""


# ------------------------------------------------------------------------------------------------ what costs what


class StepCosts(Protocol):
    """Seconds of the parts of a step."""

    def draft(self, rows: int, drafts: int) -> float: ...
    def verify(self, tokens: int, rows: int, context: int) -> float: ...
    def bookkeeping(self, rows: int, drafting: bool) -> float: ...


@runtime_checkable
class FollowCosts(Protocol):
    """Step costs of a drafter that costs something in steps without drafts too. Rows are followed as in an engine: all
    of them until the policy steps aside (``types.StepsAside``), then none; afterwards those that begin."""

    takes_up: bool
    """The drafter can take up a row in the middle of its text, by being shown it."""
    features: float
    """Share that a pass takes longer while any row is followed."""

    def follow(self, tokens: int) -> float:
        """Seconds of showing the drafter so many tokens."""
        ...


@runtime_checkable
class ReadCosts(Protocol):
    """Step costs that tell the tokens of prompts apart: of a chunk, only the prompt's last token has logits."""

    def read(self, prompts: int, tokens: int, rows: int, context: int) -> float:
        """Seconds of a pass over ``tokens``, so many of which are of prompts: at least 1."""
        ...


@dataclass(frozen=True)
class Costs:
    """Seconds from curves: straight between the points, the last slope beyond. Raises InvalidRequest for bad points."""

    points: tuple[tuple[int, float], ...]
    """(tokens, seconds) of a target pass."""
    per_context: float = 0.0
    """Seconds that each cached token adds."""
    draft_fixed: float = 0.0
    """Seconds of drafting at all."""
    draft_each: float = 0.0
    """Seconds that each drafted position adds (autoregressive drafters; 0 for a block)."""
    draft_row: float = 0.0
    """Seconds that each row adds."""
    draft_share: float = 0.0
    """Of a target pass over as many tokens as are drafted, what drafting them costs (a draft model)."""
    step: float = 0.0
    """Seconds of bookkeeping."""
    step_drafting: float = 0.0
    """More of it, in a step that drafts."""
    follow_each: float = 0.0
    """Seconds of showing the drafter a committed token."""
    features: float = 0.0
    """See ``FollowCosts``."""
    takes_up: bool = True
    """See ``FollowCosts``."""

    def __post_init__(self) -> None:
        tokens = [m for m, _ in self.points]
        if not tokens or sorted(set(tokens)) != tokens or tokens[0] < 1 or any(not s > 0 for _, s in self.points):
            raise InvalidRequest(
                f"a cost curve needs (tokens, seconds) with tokens rising from 1 on and seconds above 0, "
                f"got {list(self.points)[:6]}"
            )
        known = np.array(self.points, dtype=float)
        size = max(4096, 2 * tokens[-1])
        n = np.arange(size)
        curve = np.interp(n, known[:, 0], known[:, 1])
        if len(known) > 1:
            slope = (known[-1, 1] - known[-2, 1]) / (known[-1, 0] - known[-2, 0])
            beyond = n > known[-1, 0]
            curve[beyond] = known[-1, 1] + slope * (n[beyond] - known[-1, 0])
        object.__setattr__(self, "_curve", curve)

    def verify(self, tokens: int, rows: int, context: int) -> float:
        curve: Floats = self.__dict__["_curve"]
        last = len(curve) - 1
        seconds = curve[tokens] if tokens <= last else curve[last] * tokens / last
        return float(seconds) + self.per_context * context

    def draft(self, rows: int, drafts: int) -> float:
        if not rows or not drafts:
            return 0.0
        model = self.draft_share * sum(self.verify(rows, rows, 0) for _ in range(drafts)) if self.draft_share else 0.0
        return self.draft_fixed + self.draft_each * drafts + self.draft_row * rows + model

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return self.step + (self.step_drafting if drafting else 0.0)

    def follow(self, tokens: int) -> float:
        return self.follow_each * tokens


# ------------------------------------------------------------------------------------------------ what is accepted


class Acceptance(Protocol):
    """What drafts of some rows would be: how sure the drafter is, and how many would be accepted."""

    drafts: int

    def begin(self, slot: int, rng: np.random.Generator) -> None:
        """A request begins in a slot."""
        ...

    def draw(self, slots: Ints, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32] | None, Ints, Ints]:
        """-> confidences [n, K] or None, drafts proposed [n], and how many in a row would be accepted [n]."""
        ...

    def advance(self, slot: int, tokens: int) -> None:
        """The text of a slot has become longer by so many tokens."""
        ...


@dataclass
class Synthetic:
    """Acceptance by profile. Each draft has its own probability, around the profile's on the logit scale."""

    profiles: Sequence[Sequence[float]]
    """P(accepted | those before were) by position; each request has one of them."""
    spread: float = 1.5
    """How far single drafts differ, in logits."""
    row_spread: float = 0.5
    """How far requests differ."""
    says: str = "truth"
    """truth: the confidence is the probability; nothing: none is given; sure: 0.99 whatever the truth."""
    silent: float = 0.0
    """Share of rounds in which nothing is proposed."""
    _rows: dict[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.says not in ("truth", "nothing", "sure"):
            raise InvalidRequest(f"says must be truth, nothing or sure, got {self.says!r}")
        if not self.profiles or any(not 0 <= p <= 1 for profile in self.profiles for p in profile):
            raise InvalidRequest("profiles need probabilities between 0 and 1")
        self.drafts = min(len(profile) for profile in self.profiles)
        self._base = [_centred(profile[: self.drafts], self.spread, self.row_spread) for profile in self.profiles]

    def begin(self, slot: int, rng: np.random.Generator) -> None:
        self._rows[slot] = self._base[rng.integers(len(self._base))] + self.row_spread * rng.standard_normal()

    def draw(self, slots: Ints, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32] | None, Ints, Ints]:
        z = np.stack([self._rows[slot] for slot in slots.tolist()])
        p = 1 / (1 + np.exp(-(z + self.spread * rng.standard_normal(z.shape))))
        accepted = np.multiply.accumulate(rng.random(p.shape) < p, axis=1).sum(1)
        lengths = np.where(rng.random(len(slots)) < self.silent, 0, self.drafts)
        said = {"truth": p, "sure": np.full(p.shape, 0.99), "nothing": None}[self.says]
        return None if said is None else said.astype(np.float32), lengths, np.minimum(accepted, lengths)

    def advance(self, slot: int, tokens: int) -> None:
        """Nothing: all places of a text are alike."""


def _centred(profile: Sequence[float], spread: float, row_spread: float) -> Floats:
    """Logits around which drafts spread so that their mean probability is about the profile's (a probit's moments)."""
    p = np.clip(np.array(profile, dtype=float), 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p)) * math.sqrt(1 + (spread**2 + row_spread**2) * math.pi / 8)


@dataclass
class Recorded:
    """Rounds of real requests. A request replays the text of a recorded one, and goes on with another where that ends.

    A recorded round stands for as many tokens as it committed. Where fewer drafts are verified, the next round begins
    inside of it, as it would in the same text: whichever draft length is replayed, easy and hard places count by their
    tokens. What would follow the last recorded draft of such a round is drawn from the means over all rounds.
    """

    requests: Sequence[Sequence[tuple[Sequence[float], int]]]
    """For each request its rounds: the confidences of all drafts, and how many were accepted, all being verified."""
    _at: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # by slot: request, round, tokens since it began

    def __post_init__(self) -> None:
        rounds = [one for some in self.requests for one in some]
        if not rounds or not all(self.requests):
            raise InvalidRequest("a recording needs requests with at least one round each")
        self.drafts = max(len(confidence) for confidence, _ in rounds)
        reached, further = np.zeros(self.drafts), np.zeros(self.drafts)
        sure, counts = np.zeros(self.drafts), np.zeros(self.drafts)
        for confidence, accepted in rounds:
            n = len(confidence)
            sure[:n] += confidence
            counts[:n] += 1
            reached[: min(accepted + 1, n)] += 1
            further[:accepted] += 1
        self._sure = sure / np.maximum(counts, 1)
        self._further = (further / np.maximum(reached, 1)).tolist()  # P(draft j accepted | those before it were)

    def begin(self, slot: int, rng: np.random.Generator) -> None:
        self._at[slot] = int(rng.integers(len(self.requests))), 0, 0

    def advance(self, slot: int, tokens: int) -> None:
        request, at, past = self._at[slot]
        self._at[slot] = request, at, past + tokens

    def draw(self, slots: Ints, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32] | None, Ints, Ints]:
        said = np.zeros((len(slots), self.drafts), dtype=np.float32)
        lengths, accepted = np.zeros(len(slots), dtype=np.int64), np.zeros(len(slots), dtype=np.int64)
        for b, slot in enumerate(slots.tolist()):
            confidence, right, past = self._round(slot, rng)
            n = len(confidence)
            known = n - past
            said[b, :known], said[b, known:n] = confidence[past:], self._sure[known:n]
            right -= past
            while known <= right < n and rng.random() < self._further[right]:
                right += 1
            lengths[b], accepted[b] = n, right
        return said, lengths, accepted

    def _round(self, slot: int, rng: np.random.Generator) -> tuple[Sequence[float], int, int]:
        """The recorded round that a slot's text has come to, and how many of its tokens were committed before."""
        request, at, past = self._at[slot]
        rounds = self.requests[request]
        while past > rounds[at][1]:
            past -= rounds[at][1] + 1
            at += 1
            if at == len(rounds):
                request, at = int(rng.integers(len(self.requests))), 0
                rounds = self.requests[request]
        self._at[slot] = request, at, past
        return *rounds[at], past


# ------------------------------------------------------------------------------------------------ who asks for what


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
        if (self.concurrency > 0) == (self.rate > 0):
            raise InvalidRequest("traffic is either closed (concurrency above 0) or open (rate above 0)")
        if (
            min(self.prompt, self.answer, *(n for size in self.sizes for n in size[:2])) < 1
            or self.burst <= 0
            or self.period <= 0
        ):
            raise InvalidRequest("prompt and answer need at least 1 token, burst and period more than 0")
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
            confidence = torch.from_numpy(full)
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
