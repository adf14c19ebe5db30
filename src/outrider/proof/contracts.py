"""Contracts over the catalogues, as functions that tests and the audit call.

They find what sampling cannot find in realistic sizes: a policy or a drafter that lets a decision depend on what was
drawn after it changes the output distribution by little, and only where its threshold is crossed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.proof.proposing import Draft, DraftRow, Row, Session, drafts_of, future_noise, propose, rng_of
from outrider.sampling.distribution import Categorical
from outrider.sampling.rng import RowRng, gumbel
from outrider.sampling.verification import verify
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.types import (
    Backend,
    Context,
    Drafter,
    Proposal,
    RaggedBatch,
    RequestStats,
    SchedulerPolicy,
    StepCost,
    StepView,
    TargetModel,
)

__all__ = [
    "METHOD",
    "backend_disagreements",
    "drafter_anticipates",
    "drafter_remembers_wrongly",
    "draws_off_distribution",
    "policy_anticipates",
    "policy_faults",
    "rewind_difference",
    "rng_faults",
    "stepped_costs",
    "view",
]

METHOD = (
    "Contracts, checked by perturbation: a drafter's lengths, confidences and probabilities up to a token must not "
    "move when later random numbers change; its tokens must be the draws of the probabilities it states; its "
    "proposals must follow from the text alone, whatever was drafted and rejected before; a policy must not cut at a "
    "token for what comes at or after it; a cache that was rewound must equal a fresh one; a backend must verify as "
    "the rules are written; random numbers of different rows, rounds, positions and purposes must differ, and those "
    "of a row must not depend on its neighbours."
)
COST = StepCost(draft=0.002, verify=0.01, bookkeeping=0.0005, rows=4, tokens=12, context=100)
NEAR = 1e-5
"""Scores of two tokens closer than this may change places when a probability is turned to a logarithm again."""


# ------------------------------------------------------------------------------------------------ policies


def view(rows: int) -> StepView:
    """A step of rows that have no past, and whose text depends on the schedule: greedy rows leave a policy free."""
    params = SamplingParams(temperature=1.0)
    return StepView([10] * rows, [RequestStats() for _ in range(rows)], [params] * rows)


def stepped_costs() -> CostModel:
    """Passes that take longer all at once from 5, 13 and 21 tokens on, as tiles of rows make them: where costs are
    smooth, a search that looks ahead finds what one finds that does not."""
    points = ((1, 0.010), (4, 0.0101), (5, 0.014), (12, 0.0141), (13, 0.020), (20, 0.0201), (21, 0.026), (28, 0.0261))
    key = CostKey("toy", "float64", "none", "none", 1)
    return CostModel(CostTable(key, tuple(CostPoint(tokens, 1, 0, seconds) for tokens, seconds in points)))


def policy_anticipates(
    make_policy: Callable[[], SchedulerPolicy], rows: int = 4, drafts: int = 6, trials: int = 20
) -> bool:
    """Whether (keep[b] >= j) ever moves with confidence[b, j:], or with what lies past the draft's token j.

    A policy may remember the past, so every call is made on a fresh one with the same past.
    """
    generator = torch.Generator().manual_seed(0)

    def keep(confidence: Tensor, lengths: list[int]) -> list[int]:
        policy = make_policy()
        for accepted in (2, 0):
            policy.plan(view(rows))
            policy.choose(torch.full((rows, drafts), 0.8), [drafts] * rows)
            policy.observe(COST, [accepted] * rows)
        policy.plan(view(rows))
        return policy.choose(confidence, lengths)

    for _ in range(trials):
        confidence = torch.rand(rows, drafts, generator=generator)
        lengths = torch.randint(0, drafts + 1, (rows,), generator=generator).tolist()
        before = keep(confidence, lengths)
        for b, j in product(range(rows), range(drafts)):
            for level in (0.0, 0.4, 0.999):
                other = confidence.clone()
                other[b, j:] = level
                if min(keep(other, lengths)[b], j) != min(before[b], j):
                    return True
            longer = lengths.copy()
            longer[b] = drafts
            if j <= lengths[b] and min(keep(confidence, longer)[b], j) != min(before[b], j):
                return True
    return False


def policy_faults(make_policy: Callable[[], SchedulerPolicy], rows: int = 4, drafts: int = 6) -> list[str]:
    """What a policy gives that the engine cannot take."""
    policy, generator, faults = make_policy(), torch.Generator().manual_seed(1), []
    for _ in range(20):
        limit = policy.plan(view(rows))
        if len(limit) != rows or min(limit) < 0:
            faults.append(f"plan gave {list(limit)} for {rows} rows")
        lengths = torch.randint(0, drafts + 1, (rows,), generator=generator).tolist()
        for confidence in (torch.rand(rows, drafts, generator=generator), None):
            keep = policy.choose(confidence, lengths)
            if [type(n) for n in keep] != [int] * rows or any(
                not 0 <= n <= most for n, most in zip(keep, lengths, strict=True)
            ):
                faults.append(f"choose gave {keep} of drafts of {lengths}")
        most = torch.randint(0, drafts + 1, (rows,), generator=generator).tolist()
        policy.observe(COST, [min(n, right) for n, right in zip(keep, most, strict=True)])
    return faults


# ------------------------------------------------------------------------------------------------ drafters


def drafter_anticipates(begin: Callable[[int], tuple[Drafter, Sequence[Row]]], trials: int = 3) -> tuple[bool, bool]:
    """(whether a length, confidence or distribution up to token j depends on the tokens from j on; whether any token
    changed). ``begin(trial)``: a new drafter with rows that are ready to draft, the same ones each time."""
    moved = False
    for trial in range(trials):

        def draft(depth: int | None, trial: int = trial) -> list[Draft]:
            drafter, rows = begin(trial)
            limit = [drafter.block] * len(rows)
            return drafts_of(propose(drafter, rows, limit, None if depth is None else future_noise(rows, depth)))

        before = draft(None)
        for depth in range(begin(trial)[0].block):
            for a, b in zip(before, draft(depth), strict=True):
                moved |= a.tokens != b.tokens
                if a.tokens[:depth] != b.tokens[:depth]:
                    return True, True
                if (len(a.tokens) > depth) != (len(b.tokens) > depth):
                    return True, True
                if (a.confidence or [])[: depth + 1] != (b.confidence or [])[: depth + 1]:
                    return True, True
                if (a.distributions or [])[: depth + 1] != (b.distributions or [])[: depth + 1]:
                    return True, True
    return False, moved


def draws_off_distribution(proposal: Proposal, rows: Sequence[Row]) -> tuple[int, int]:
    """(tokens that are not the draw of their stated probabilities, tokens looked at).

    A draft is drawn by Gumbel-max with its row's token keys "draft" at its position, so it follows from the stated
    probabilities; only two scores closer than ``NEAR`` may come out either way.
    """
    wrong = looked = 0
    rng, width = rng_of(rows), proposal.tokens.shape[1]
    if proposal.distribution is None:
        return 0, 0
    for b, (row, length) in enumerate(zip(rows, proposal.lengths.tolist(), strict=True)):
        index = torch.arange(length)
        keys = rng.token_keys(torch.full((length,), b), len(row.history) + index, "draft")
        p = proposal.distribution.dense(b * width + index).double()
        scores = p.log() + gumbel(keys, None, p.shape[1])
        drawn = scores.gather(1, proposal.tokens[b, :length, None])[:, 0]
        wrong += int((scores.amax(1) - drawn > NEAR).sum())
        looked += length
    return wrong, looked


def drafter_remembers_wrongly(
    target: TargetModel,
    make_drafter: Callable[[], Drafter],
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    rounds: int = 6,
    seed: int = 0,
) -> tuple[str, int, int]:
    """(the first proposal that differs from a fresh drafter's on the same text, or ""; drafted tokens that are not the
    draw of their stated probabilities; drafted tokens).

    The drafter goes through ``rounds`` of random acceptance; a fresh one reads the text of that moment as a prompt.
    """
    script = random.Random(seed)
    length = max(map(len, prompts)) + 1
    drafter = make_drafter()
    capacity = length + rounds * (drafter.block + 1) + drafter.block + 2
    rows = [
        DraftRow(seed + b, one, 0, list(prompt)) for b, (prompt, one) in enumerate(zip(prompts, params, strict=True))
    ]
    session = Session(target, drafter, rows, capacity)
    session.read()
    wrong = looked = 0
    for round in range(rounds):
        limit = script.randint(1, max(drafter.block, 1))
        proposal = session.propose(limit)
        misses, tokens = draws_off_distribution(proposal, rows)
        wrong, looked = wrong + misses, looked + tokens
        fresh_rows = [DraftRow(r.seed, r.params, 0, r.history, r.round) for r in rows]
        for fresh, row in zip(fresh_rows, rows, strict=True):
            fresh.prompt_length = row.prompt_length
        fresh_session = Session(target, make_drafter(), fresh_rows, capacity)
        fresh_session.read()
        for b, (a, z) in enumerate(zip(drafts_of(proposal), drafts_of(fresh_session.propose(limit)), strict=True)):
            if difference := _difference(a, z):
                return f"row {b}, round {round}: {difference}", wrong, looked
        fresh_session.close()
        session.commit(proposal, script)
    session.close()
    return "", wrong, looked


def _difference(a: Draft, b: Draft) -> str:
    if a.tokens != b.tokens:
        return f"drafts {a.tokens} became {b.tokens}"
    for name, x, y in (
        ("confidences", a.confidence, b.confidence),
        ("probabilities", a.distributions, b.distributions),
    ):
        if x and y and not np.allclose(np.array(x), np.array(y), atol=1e-4):
            return f"{name} differ"
    return ""


# ------------------------------------------------------------------------------------------------ caches, backends


@torch.inference_mode()
def rewind_difference(target: TargetModel, text: Sequence[int], *, seed: int = 0) -> float:
    """The largest difference of a logit after wrong tokens were appended and taken back, against a cache that never
    held them."""
    script, size, largest = random.Random(seed), target.spec.vocab_size, 0.0
    used, fresh = (target.new_cache(2, len(text) + 16) for _ in range(2))
    slots = used.open(), fresh.open()
    at = 0
    while at < len(text):
        n = min(script.randint(1, 5), len(text) - at)
        wrong = [script.randrange(size) for _ in range(script.randint(1, 6))]
        target.forward(RaggedBatch.pack([[*text[at : at + n], *wrong]], [at], [slots[0]]), used)
        used.rewind(torch.tensor([slots[0]]), torch.tensor([at + n - 1]))
        last = [RaggedBatch.pack([[text[at + n - 1]]], [at + n - 1], [slot]) for slot in slots]
        if n > 1:
            target.forward(RaggedBatch.pack([text[at : at + n - 1]], [at], [slots[1]]), fresh)
        a = target.forward(last[0], used).logits.double().clone()
        b = target.forward(last[1], fresh).logits.double()
        largest = max(largest, float((a - b).abs().max()))
        at += n
    return largest


def backend_disagreements(backend: Backend, *, rounds: int = 60, vocabulary: int = 50, seed: int = 0) -> int:
    """Rows that a backend verifies otherwise than ``sampling.verification``, of rounds of 8 rows of all three rules."""
    generator, wrong = torch.Generator().manual_seed(seed), 0
    rules = ("rejection", "block", "coupled", "rejection")
    params = [SamplingParams(temperature=float(b != 7), rule=rules[b % 4]) for b in range(8)]  # type: ignore[arg-type]
    for round in range(rounds):
        noise = torch.randn(2, 8 * 5, vocabulary, generator=generator)
        drafter = Categorical.of(noise[0].view(8, 5, -1)[:, :4].reshape(32, -1) * 1.5)
        keep = torch.randint(0, 5, (8,), generator=generator).tolist()
        rows = torch.tensor([b * 5 + j for b, n in enumerate(keep) for j in range(n + 1)])
        logits = noise[0][rows] + 0.5 * noise[1][rows]
        logits = torch.where((rows // 5 == 7)[:, None], logits * 1e4, logits)  # as a greedy row: all but certain
        context = Context(params, [[1, 2, 3]] * 8, [2] * 8)
        rng = RowRng(range(seed + 8 * round, seed + 8 * round + 8), [round] * 8, [p.effective_rule for p in params])
        tokens = drafter.draw(rng.token_keys(torch.arange(32) // 4, torch.arange(32) % 4 + 3, "draft")).view(8, 4)
        proposal = Proposal(tokens, [4] * 8, drafter)
        a, b = (f(Categorical.of(logits), proposal, keep, context, rng) for f in (backend.verify, verify))
        width = torch.arange(5)[None] < a.lengths[:, None]
        same = (a.accepted == b.accepted) & torch.where(width, a.tokens == b.tokens, True).all(1)
        wrong += int((~same).sum())
    return wrong


# ------------------------------------------------------------------------------------------------ random numbers


def rng_faults(make: Callable[..., RowRng] = RowRng) -> Iterator[str]:
    """Streams that share a number, and rows whose numbers depend on their neighbours."""
    seeds, rounds, positions = range(40), range(12), torch.arange(40)
    seen: dict[int, tuple[object, ...]] = {}
    for seed, round in product(seeds, rounds):
        rng = make([seed], [round], ["block"])
        row = torch.zeros(len(positions), dtype=torch.int64)
        streams = {purpose: rng.token_keys(row, positions, purpose).tolist() for purpose in ("draft", "own")}
        streams |= {
            f"uniform {purpose}": (rng.uniform(row, positions, purpose) * 2**53).long().tolist()
            for purpose in ("accept", "own")
        }
        for purpose, keys in streams.items():
            for position, key in enumerate(keys):
                name = (seed, round, position, purpose)
                if key in seen:
                    yield f"{name} and {seen[key]} share a number"
                    return
                seen[key] = name
    crowd = make([3, 8, 5], [1, 2, 3], ["coupled", "block", "rejection"])
    for row_number, (seed, round, rule) in enumerate([(3, 1, "coupled"), (8, 2, "block"), (5, 3, "rejection")]):
        alone = make([seed], [round], [rule])
        here = crowd.uniform(torch.full((40,), row_number), positions, "accept")
        if not torch.equal(here, alone.uniform(torch.zeros(40, dtype=torch.int64), positions, "accept")):
            yield f"numbers of row {row_number} depend on its neighbours"
    early, late = (make([4], [round], ["coupled"]) for round in (0, 9))
    one = torch.zeros(40, dtype=torch.int64)
    if not torch.equal(early.token_keys(one, positions, "draft"), late.token_keys(one, positions, "own")):
        yield "drafter and target do not share their draws under the coupled rule"
