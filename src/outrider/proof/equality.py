"""The equality tier: greedy and coupled text against plain decoding, token for token, on real prompts.

Two correct engines may differ where two tokens score alike and a backend rounds a pass over several tokens differently
from a pass over one. The rounding is measured first; where texts part, the gap between the two tokens is computed, and
a gap within the rounding is a near-tie, anything else a fault. A backend whose rounding is 0 has no near-ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.engine.engine import Engine
from outrider.proof.certificate import Check
from outrider.sampling.processors import process
from outrider.sampling.rng import RowRng, gumbel
from outrider.types import Context, RaggedBatch, TargetModel

__all__ = [
    "METHOD",
    "Difference",
    "Rounding",
    "differences",
    "equality_checks",
    "measured_rounding",
    "next_logits",
    "texts_alone",
    "texts_of",
]

METHOD = (
    "Each prompt is answered by plain decoding, one request at a time, and by every drafter under every policy, "
    "several requests in a batch: greedily, and sampled under the coupled rule with a seed for each prompt. Texts "
    "must be equal token for token. Where they part, the gap between the two tokens' scores is computed anew: within "
    "the backend's measured rounding it is a near-tie and is counted, otherwise it is a fault."
)
SLACK = 4.0
"""A gap up to so many times the measured rounding is a near-tie: two scores on each of two sides, each rounded."""
SAMPLED = SamplingParams(temperature=1.0, top_p=0.98, rule="coupled")


def texts_of(engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """New tokens of every prompt, all submitted at once."""
    requests = [
        engine.submit(prompt, one, one.seed or 0, i)
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    engine.wait(requests)
    return [request.output for request in requests]


def texts_alone(engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """The same, one request after the other."""
    return [texts_of(engine, [prompt], [one])[0] for prompt, one in zip(prompts, params, strict=True)]


# ------------------------------------------------------------------------------------------------ rounding


@dataclass(frozen=True)
class Rounding:
    """The largest difference of a logit between passes that should agree."""

    largest: float
    tokens: int  # positions that were compared

    @property
    def near_tie(self) -> float:
        return SLACK * self.largest


@torch.inference_mode()
def measured_rounding(target: TargetModel, texts: Sequence[Sequence[int]], *, most: int = 24) -> Rounding:
    """Logits of the last ``most`` tokens of each text: one token a pass, 8 tokens a pass, and all texts in a batch.

    Of the whole longest text where all are shorter."""
    largest, count = 0.0, 0
    most = min(most, max(map(len, texts)))
    rows = [list(text) for text in texts if len(text) >= most]
    together = _logits(target, rows, [len(row) for row in rows], most)
    for row, batched in zip(rows, together, strict=True):
        single = _logits(target, [row], [1], most)[0]
        for other in (_logits(target, [row], [8], most)[0], batched):
            largest = max(largest, float((single.double() - other.double()).abs().max()))
        count += most
    return Rounding(largest, count)


def _logits(target: TargetModel, rows: Sequence[list[int]], chunk: Sequence[int], most: int) -> list[Tensor]:
    """Logits [most, V] of each row's last tokens, which are run ``chunk[b]`` at a time after the rest in one pass; rows
    whose chunk is all of them in one batch."""
    cache = target.new_cache(len(rows), max(map(len, rows)) + 1)
    slots = [cache.open() for _ in rows]
    if all(n == len(row) for n, row in zip(chunk, rows, strict=True)):
        batch = RaggedBatch.pack(rows, [0] * len(rows), slots)
        ends = batch.offsets[1:].tolist()
        wanted = torch.tensor([i for end in ends for i in range(end - most, end)], dtype=torch.int64)
        return list(target.forward(batch, cache, logits_at=wanted).logits.clone().split(most))
    found = []
    for row, slot, n in zip(rows, slots, chunk, strict=True):
        first = len(row) - most
        if first:
            nothing = torch.zeros(0, dtype=torch.int64)
            target.forward(RaggedBatch.pack([row[:first]], [0], [slot]), cache, logits_at=nothing)
        parts = []
        for start in range(first, len(row), n):
            batch = RaggedBatch.pack([row[start : min(start + n, len(row))]], [start], [slot])
            parts.append(target.forward(batch, cache).logits.clone())
        found.append(torch.cat(parts))
    return found


@torch.inference_mode()
def next_logits(target: TargetModel, history: Sequence[int]) -> Tensor:
    """Logits [1, V] of the token after a text, in a fresh cache."""
    cache = target.new_cache(1, len(history))
    batch = RaggedBatch.pack([list(history)], [0], [cache.open()])
    return target.forward(batch, cache, logits_at=torch.tensor([len(history) - 1])).logits.clone()


# ------------------------------------------------------------------------------------------------ differences


@dataclass(frozen=True)
class Difference:
    """Where two answers to a prompt part for the first time."""

    prompt: int
    position: int  # of the output
    plain: int | None  # tokens; None: the text had ended
    other: int | None
    gap: float
    near_tie: bool

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt + 1}, output token {self.position + 1}: {self.plain} became {self.other}, "
            f"scores {self.gap:.2g} apart"
        )


def differences(
    target: TargetModel,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    plain: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
    rounding: Rounding,
) -> list[Difference]:
    """Of every prompt whose answers differ, the first difference."""
    found = []
    for i, (prompt, one, a, b) in enumerate(zip(prompts, params, plain, others, strict=True)):
        if list(a) == list(b):
            continue
        at = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        x, y = (text[at] if at < len(text) else None for text in (a, b))
        gap = float("inf")
        if x is not None and y is not None:
            gap = _gap(target, [*prompt, *a[:at]], len(prompt), one, x, y)
        found.append(Difference(i, at, x, y, gap, rounding.largest > 0 and gap <= rounding.near_tie))
    return found


def _gap(target: TargetModel, history: list[int], prompt_length: int, params: SamplingParams, a: int, b: int) -> float:
    """How far apart two tokens score: logits for a greedy request, logits and noise for a sampled one."""
    logits = next_logits(target, history).double()
    if params.temperature == 0:
        warm = replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)  # greedy: bias and penalties only
        scores = process(logits, Context([warm], [history], [prompt_length])).dense(torch.tensor([0]))[0].log()
    else:
        probabilities = process(logits, Context([params], [history], [prompt_length])).dense(torch.tensor([0]))[0]
        keys = RowRng([params.seed or 0], [0], ["coupled"]).token_keys(
            torch.tensor([0]), torch.tensor([len(history)]), "own"
        )
        scores = probabilities.log() + gumbel(keys, None, logits.shape[1])[0]
    return float((scores[a] - scores[b]).abs().nan_to_num(float("inf")))


# ------------------------------------------------------------------------------------------------ the tier


def equality_checks(
    plain: Engine,
    others: Mapping[str, Callable[[], Engine]],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    seed: int = 0,
) -> Iterator[Check]:
    """The backend's rounding first; then one check for each engine (a drafter with a policy) in each mode."""
    target = plain.target
    modes = {"greedy": SamplingParams(max_tokens=max_tokens), "coupled": replace(SAMPLED, max_tokens=max_tokens)}
    asked = {
        mode: [replace(params, seed=seed + i) if params.temperature else params for i in range(len(prompts))]
        for mode, params in modes.items()
    }
    expected = {mode: texts_alone(plain, prompts, params) for mode, params in asked.items()}
    rounding = measured_rounding(
        target, [[*prompt, *text] for prompt, text in zip(prompts, expected["coupled"], strict=True)][:8]
    )
    promised = target.backend.name == "native"
    yield Check(
        "logits of one token and of several tokens a pass",
        rounding.largest == 0 if promised else rounding.largest < 1e-2,
        f"differ by at most {rounding.largest:.2g} over {rounding.tokens} positions"
        + (" (0 is promised on this backend)" if promised else ""),
        {"largest_difference": rounding.largest, "positions": rounding.tokens},
    )
    for name, make in others.items():
        engine = make()
        for mode, params in asked.items():
            before = engine.totals[1].accepted
            found = texts_of(engine, prompts, params)
            wrong = differences(target, prompts, params, expected[mode], found, rounding)
            faults = [one for one in wrong if not one.near_tie]
            tokens = sum(map(len, expected[mode]))
            accepted = engine.totals[1].accepted - before
            text = f"{len(prompts)} texts of {tokens} tokens equal, {accepted} drafts accepted"
            if wrong:
                text = f"{len(faults)} faults, {len(wrong) - len(faults)} near-ties; first: {(faults or wrong)[0]}"
            figures = {"texts": len(prompts), "tokens": tokens, "accepted": accepted}
            yield Check(
                f"{mode}, {name}",
                not faults,
                text,
                {**figures, "faults": len(faults), "near_ties": len(wrong) - len(faults)},
            )
