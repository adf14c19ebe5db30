"""Losslessness by enumeration: the exact distribution of what a round commits, in float64, against the target's.

The world is a vocabulary of three tokens and a table of logits for every prefix of a target and of a drafter. A round
drafts up to K = 2 tokens; where it commits fewer than K + 1, the text goes on from the target's distribution.
``output_distribution``
walks all drafts, all accept / reject patterns and all own tokens through the very functions that ``verify`` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from outrider.config import Rule, SamplingParams
from outrider.sampling.distribution import Categorical, settled
from outrider.sampling.processors import process
from outrider.sampling.rng import RowRng
from outrider.sampling.verification import (
    DraftRound,
    acceptance_probabilities,
    bonus_distribution,
    count_accepted,
    match,
    verify,
)
from outrider.types import Context, Proposal

V, K = 3, 2
EXACT = 1e-12
ERROR_RATE = 1e-5  # of each hypothesis test below, under seeds that are fixed
HISTORY, PROMPT = [0, 2, 2], 1
Keep = Callable[[tuple[int, ...]], int]
RULES: tuple[Rule, ...] = ("rejection", "block", "coupled")


class World:
    """Random logits for each prefix of new tokens, of a target and of a drafter."""

    def __init__(self, seed: int, size: int = V, depth: int = K + 1, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(depth + 1) for p in product(range(size), repeat=n)]
        rng = torch.randn(2, len(prefixes), size, generator=generator, dtype=torch.float64) * spread
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        self.target_table, self.draft_table = rng[0], 0.5 * rng[0] + rng[1]
        self.size = size

    def target(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        return self.target_table[[self.index[p] for p in prefixes]]

    def draft(self, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
        return self.draft_table[[self.index[p] for p in prefixes]]


def distribution_after(logits: Tensor, prefixes: Sequence[tuple[int, ...]], params: SamplingParams) -> Categorical:
    """The processed distribution after each prefix, one request for each."""
    n = len(prefixes)
    return process(logits, Context([params] * n, [HISTORY + list(p) for p in prefixes], [PROMPT] * n))


def plain_distributions(world: World, params: SamplingParams) -> list[np.ndarray]:
    """Plain decoding: for n = 0 to K, the distribution of the next token after each prefix of n, [V] * (n + 1)."""
    distributions = []
    for n in range(K + 1):
        prefixes = list(product(range(world.size), repeat=n))
        rows = distribution_after(world.target(prefixes), prefixes, params).dense(torch.arange(len(prefixes))).double()
        distributions.append(rows.numpy().reshape([world.size] * (n + 1)))
    return distributions


def target_distribution(world: World, params: SamplingParams) -> np.ndarray:
    """[V] * (K + 1): the distribution of the next K + 1 tokens of plain decoding."""
    distributions = plain_distributions(world, params)
    out = np.ones([world.size] * (K + 1))
    for n, distribution in enumerate(distributions):
        out *= distribution.reshape([world.size] * (n + 1) + [1] * (K - n))
    return out


def finish(plain: list[np.ndarray], prefix: tuple[int, ...], out: np.ndarray, weight: float) -> None:
    """Add the distribution of the text that begins with ``prefix`` and goes on from the target."""
    if len(prefix) > K:
        out[prefix] += weight
    elif weight:
        for token, p in enumerate(plain[len(prefix)][prefix]):
            finish(plain, (*prefix, token), out, weight * p)


def lay_out(world: World, drafts: list[tuple[int, ...]], keep: list[int], params: SamplingParams) -> Categorical:
    """The target's distributions for a batch of drafts, through ``process`` as the engine calls it."""
    rows = [b for b, n in enumerate(keep) for _ in range(n + 1)]
    depth = [j for n in keep for j in range(n + 1)]
    logits = world.target([drafts[b][:j] for b, j in zip(rows, depth, strict=True)])
    count = len(drafts)
    context = Context([params] * count, [HISTORY] * count, [PROMPT] * count)
    return process(logits, context, torch.tensor(rows), torch.tensor(depth), drafted=torch.tensor(drafts))


def draft_distribution(world: World, drafts: list[tuple[int, ...]], params: SamplingParams) -> Categorical:
    prefixes = [draft[:j] for draft in drafts for j in range(K)]
    return distribution_after(world.draft(prefixes), prefixes, params)


def output_distribution(
    world: World,
    params: SamplingParams,
    rule: Rule,
    keep_of: Keep,
    *,
    deterministic: bool = False,
    reported: Callable[[Categorical], Categorical] = lambda distribution: distribution,
    own: Callable[..., Categorical] = bonus_distribution,
) -> np.ndarray:
    """[V] * (K + 1): the exact distribution of the next K + 1 tokens when a round is drafted, checked and gone on from.

    keep_of: how much of a draft is checked. deterministic: one draft, [1, 0], for certain. reported: what verification
    is told about the distribution of the drafts. own: stands in for ``bonus_distribution``.
    """
    drafts = [(1, 0)] if deterministic else list(product(range(world.size), repeat=K))
    drawn = draft_distribution(world, drafts, params)
    weights = np.ones(len(drafts))
    if not deterministic:
        chance = drawn.at(torch.tensor(drafts).flatten()).view(len(drafts), K).double().numpy()
        weights = chance.prod(1)
    possible = [i for i, w in enumerate(weights) if w > 0]  # only what can be drafted
    drafts, weights = [drafts[i] for i in possible], weights[possible]
    distribution = None if deterministic else reported(draft_distribution(world, drafts, params))
    keep = [keep_of(draft) for draft in drafts]
    proposal = Proposal(torch.tensor(drafts), torch.full((len(drafts),), K), distribution)
    round = DraftRound.of(lay_out(world, drafts, keep, params), proposal, keep)
    out, plain = np.zeros([world.size] * (K + 1)), plain_distributions(world, params)

    if rule == "coupled":
        for row, draft in enumerate(drafts):
            alone = round.only(np.array([row]))
            distributions = alone.target.dense(torch.arange(keep[row] + 1)).numpy()
            for draws in product(range(world.size), repeat=keep[row] + 1):
                accepted, token = match(alone, np.array(draws))
                chance = np.prod([distributions[j, draw] for j, draw in enumerate(draws)])
                finish(plain, (*draft[: accepted[0]], int(token[0])), out, weights[row] * chance)
        return out

    probabilities = acceptance_probabilities(round, np.full(len(drafts), rule == "block"))
    a = probabilities.probability
    for pattern in product([True, False], repeat=K):
        passes = np.array(pattern)
        chance = np.where(passes, a, 1 - a).prod(1)
        accepted = count_accepted(probabilities, np.where(passes, a / 2, (1 + a) / 2))
        own_distributions = own(round, probabilities, accepted).dense(torch.arange(len(drafts))).numpy()
        for row, token in product(range(len(drafts)), range(world.size)):
            weight = weights[row] * chance[row] * own_distributions[row, token]
            if weight:
                finish(plain, (*drafts[row][: accepted[row]], token), out, weight)
    return out


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(a - b).sum() / 2)


# ------------------------------------------------------------------------------------------------ exact distributions

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 2},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.4},
    "hot and cut": {"temperature": 1.7, "top_k": 2, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": -0.7},
    "bias": {"logit_bias": ((0, 1.5), (2, -30.0)), "top_p": 0.9},
}
KEEPS: dict[str, Keep] = {
    "all": lambda draft: 2,
    "one": lambda draft: 1,
    "none": lambda draft: 0,
    "by the first token": lambda draft: 1 + (draft[0] == 1),  # draft 2 may be dropped for what draft 1 was
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_output_distribution_is_the_targets(rule: Rule, name: str) -> None:
    params = SamplingParams(**{"temperature": 1.0, **OPTIONS[name]})
    for seed, (label, keep) in enumerate(KEEPS.items()):
        world = World(seed)
        want = target_distribution(world, params)
        for deterministic in (False, True):
            found = output_distribution(world, params, rule, keep, deterministic=deterministic)
            assert found.sum() == pytest.approx(1, abs=EXACT)
            assert distance(found, want) < EXACT, (label, deterministic)


@pytest.mark.parametrize("rule", ("rejection", "block"))
def test_drafter_that_never_drafts_some_tokens(rule: Rule) -> None:
    """Zeros in the drafter's distribution, in the target's, in both; equal ones (a residual without mass)."""
    params = SamplingParams(temperature=1.0)
    never = -torch.inf
    for target_zero, draft_zero, same in product([False, True], [False, True], [False, True]):
        world = World(40)
        if same:
            world.draft_table = world.target_table.clone()
        if target_zero:
            world.target_table[:, 1] = never
        if draft_zero:
            world.draft_table[:, 2] = never
        assert (
            distance(output_distribution(world, params, rule, KEEPS["all"]), target_distribution(world, params)) < EXACT
        )


def test_drafter_with_sampling_options_of_its_own() -> None:
    """q need not be the target's kind of distribution, only the one that was drawn from."""
    world = World(3)
    params = SamplingParams(temperature=0.8)
    for rule in ("rejection", "block"):
        sharper = SamplingParams(temperature=0.3, top_k=2)
        draft_only = World(3)
        draft_only.draft_table = (
            settled(distribution_after(world.draft(list(world.index)), list(world.index), sharper))._spread().double()
            * params.temperature
        )
        assert (
            distance(output_distribution(draft_only, params, rule, KEEPS["all"]), target_distribution(world, params))
            < EXACT
        )


def test_acceptance_length_of_block_is_at_least_that_of_rejection() -> None:
    """Theorem 2 of Sun et al.; and strictly more here."""
    more = 0
    for seed in range(10):
        world, drafts = World(seed), list(product(range(V), repeat=K))
        params = SamplingParams(temperature=1.0)
        distribution = draft_distribution(world, drafts, params)
        weights = distribution.at(torch.tensor(drafts).flatten()).view(-1, K).prod(1).numpy()
        keep = [K] * len(drafts)
        proposal = Proposal(torch.tensor(drafts), keep, distribution)
        round = DraftRound.of(lay_out(world, drafts, keep, params), proposal, keep)
        mean = {}
        for block in (False, True):
            probabilities = acceptance_probabilities(round, np.full(len(drafts), block))
            a, total = probabilities.probability, 0.0
            for pattern in product([True, False], repeat=K):
                passes = np.array(pattern)
                accepted = count_accepted(probabilities, np.where(passes, a / 2, (1 + a) / 2))
                total += float((weights * np.where(passes, a, 1 - a).prod(1) * accepted).sum())
            mean[block] = total
        assert mean[True] >= mean[False] - EXACT
        more += mean[True] > mean[False] + 1e-3
    assert more >= 5


def test_coupled_is_exact_whatever_the_draft_has_to_do_with_the_draws() -> None:
    """Drafts share the target's rng: here they are functions of its draws, right, wrong, and by turns."""
    world, params = World(8), SamplingParams(temperature=1.0)
    plain = plain_distributions(world, params)
    for guess in (lambda d, j: d[j], lambda d, j: (d[j] + 1) % V, lambda d, j: (d[j] + (j > 0 and d[j - 1] == 1)) % V):
        out = np.zeros([V] * (K + 1))
        for draws in product(range(V), repeat=K + 1):
            draft = tuple(guess(draws, j) for j in range(K))
            target = lay_out(world, [draft], [K], params)
            round = DraftRound.of(target, Proposal(torch.tensor([draft]), [K]), [K])
            distributions = target.dense(torch.arange(K + 1)).numpy()
            accepted, token = match(round, np.array(draws))
            chance = float(np.prod([distributions[j, draw] for j, draw in enumerate(draws)]))
            finish(plain, (*draft[: accepted[0]], int(token[0])), out, chance)
        assert distance(out, target_distribution(world, params)) < EXACT


def test_a_residual_that_rounding_left_without_mass_is_the_targets_distribution_at_that_draft() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.8, 0.1, 0.1]])
    same = Categorical(3, probabilities=p[:2])
    round = DraftRound.of(Categorical(3, probabilities=p), Proposal(torch.tensor([[0, 1]]), [2], same), [2])
    probabilities = acceptance_probabilities(round, np.array([False]))
    for accepted in range(3):
        bonus = bonus_distribution(round, probabilities, np.array([accepted]))
        assert torch.equal(bonus.dense(torch.tensor([0]))[0], p[accepted])


@pytest.mark.parametrize("rule", ["greedy", "rejection", "coupled"])
def test_a_round_ends_before_the_row_that_holds_no_numbers(rule: Any) -> None:
    """And its last token is the draft that leads there, so that the next round begins with that row."""
    params = SamplingParams() if rule == "greedy" else SamplingParams(temperature=1.0, rule=rule)
    reached = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        logits, history = torch.randn(8, 2, generator=generator), [[0], [1]]
        drafts = [[int(logits[4 * b + j].argmax()) for j in range(3)] for b in range(2)]
        context = Context([params] * 2, history, [1, 1])

        def outcome(logits: Tensor) -> tuple[list[int], list[list[int]]]:
            rng = RowRng([seed] * 2, [0, 0], [params.effective_rule] * 2)  # noqa: B023
            target = process(logits, context, torch.tensor([0] * 4 + [1] * 4))  # noqa: B023
            return verify(target, Proposal(torch.tensor(drafts), [3, 3]), [3, 3], context, rng).lists  # noqa: B023

        accepted, tokens = outcome(logits)
        row, other = seed % 2, 1 - seed % 2
        for bad in (1, 2, 3):
            broken = logits.clone()
            broken[4 * row + bad] = torch.nan
            counts, found = outcome(broken)
            assert (counts[other], found[other][: counts[other] + 1]) == (
                accepted[other],
                tokens[other][: accepted[other] + 1],
            ), "the row beside it"
            if accepted[row] < bad:
                assert (counts[row], found[row][: counts[row] + 1]) == (accepted[row], tokens[row][: accepted[row] + 1])
            else:
                assert (counts[row], found[row][:bad]) == (bad - 1, drafts[row][:bad])
                reached += 1
    assert reached > 5


# ------------------------------------------------------------------------------------------------ negative controls


def bfloat16(distribution: Categorical) -> Categorical:
    return Categorical(
        distribution.vocab_size, probabilities=distribution.dense(torch.arange(len(distribution))).bfloat16().double()
    )


@pytest.mark.parametrize("rule", ("rejection", "block"))
def test_enumeration_catches_what_breaks_the_distribution(rule: Rule) -> None:
    world, params = World(1), SamplingParams(temperature=0.6)
    want = target_distribution(world, params)

    def unprocessed(distribution: Categorical) -> Categorical:
        prefixes = [draft[:j] for draft in product(range(V), repeat=K) for j in range(K)]
        return Categorical.of(world.draft(prefixes))

    def no_residual(round: DraftRound, probabilities: Any, accepted: np.ndarray) -> Categorical:
        return round.target.take(torch.from_numpy(round.starts + accepted))

    found = {
        "q before temperature": output_distribution(world, params, rule, KEEPS["all"], reported=unprocessed),
        "own token from p, not from the residual": output_distribution(
            world, params, rule, KEEPS["all"], own=no_residual
        ),
        "keep that saw the first token": output_distribution(world, params, rule, lambda draft: 2 * (draft[0] == 1)),
        "keep that saw the second token": output_distribution(world, params, rule, lambda draft: 1 + (draft[1] == 1)),
    }
    assert {name: distance(distribution, want) > 1e-3 for name, distribution in found.items()} == dict.fromkeys(
        found, True
    )
    rounded = output_distribution(world, params, rule, KEEPS["all"], reported=bfloat16)
    assert distance(rounded, want) > 1e-5


def test_peeking_keep_of_the_papers_appendix() -> None:
    """DSpark, appendix A: checking a draft only when it is one of two tokens turns 0.7 / 0.3 into 0.85 / 0.15."""
    params = SamplingParams(temperature=1.0)
    world = World(0, size=2)
    world.target_table[:] = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    world.draft_table[:] = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    peeked = output_distribution(world, params, "rejection", lambda draft: int(draft[0] == 0)).sum((1, 2))
    assert peeked == pytest.approx([0.85, 0.15], abs=EXACT)
    for keep in KEEPS.values():
        honest = output_distribution(world, params, "rejection", keep).sum((1, 2))
        assert honest == pytest.approx([0.7, 0.3], abs=EXACT)


def test_coupled_does_not_mind_a_peeking_keep() -> None:
    world, params = World(2), SamplingParams(temperature=1.0)
    for keep in (lambda draft: 2 * (draft[0] == 1), lambda draft: 1 + (draft[1] == 1)):
        assert distance(output_distribution(world, params, "coupled", keep), target_distribution(world, params)) < EXACT


# ------------------------------------------------------------------------------------------------ verify, end to end


def generate(
    world: World,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    length: int,
    keep_of: Callable[[int, int, int], int],
    *,
    drafter: str = "sampled",
    round_of: Callable[[int], int] = lambda round: round,
    dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """A small engine: rounds of draft and verify until every row has ``length`` tokens.

    keep_of(row, round, drafts the row accepted in the round before) -> drafts to check.
    """
    count = len(params)
    texts: list[list[int]] = [[] for _ in range(count)]
    last = [0] * count
    round = 0
    while live := [b for b in range(count) if len(texts[b]) < length]:
        n = len(live)
        asked = [params[b] for b in live]
        context = Context(asked, [HISTORY + texts[b] for b in live], [PROMPT] * n)
        rules = [p.effective_rule for p in asked]
        rng = RowRng([seeds[b] for b in live], [round_of(round)] * n, rules)
        room = [length - 1 - len(texts[b]) for b in live]
        tokens = torch.zeros(n, K, dtype=torch.int64)
        distributions = []
        rows = torch.arange(n)
        start = torch.tensor([len(h) for h in context.history])
        for j in range(K):
            prefixes = [(*texts[b], *so_far[:j]) for b, so_far in zip(live, tokens.tolist(), strict=True)]
            prefixes = [p if p in world.index else () for p in prefixes]  # past the table: any distribution will do
            distribution = process(world.draft(prefixes).to(dtype), context, rows, torch.full((n,), j), drafted=tokens)
            if drafter == "sampled":
                tokens[:, j] = distribution.draw(rng.token_keys(rows, start + j, "draft"))
            elif drafter == "constant":
                tokens[:, j] = 1
            distributions.append(distribution)
        keep = [min(keep_of(b, round, last[b]), r, K) for b, r in zip(live, room, strict=True)]
        proposal = Proposal(
            tokens, torch.full((n,), K), Categorical.stack(distributions) if drafter == "sampled" else None
        )
        owner = [i for i, k in enumerate(keep) for _ in range(k + 1)]
        depth = [j for k in keep for j in range(k + 1)]
        drafted = tokens.tolist()
        logits = world.target([tuple(texts[live[i]] + drafted[i][:j]) for i, j in zip(owner, depth, strict=True)])
        target = process(logits.to(dtype), context, torch.tensor(owner), torch.tensor(depth), drafted=tokens)
        verification = verify(target, proposal, keep, context, rng)
        assert torch.equal(verification.lengths, verification.accepted + 1)
        for b, accepted, new, most in zip(
            live, verification.accepted.tolist(), verification.tokens.tolist(), keep, strict=True
        ):
            assert accepted <= most
            last[b] = accepted
            texts[b] += new[: accepted + 1]
        round += 1
    return texts


def p_value(world: World, params: SamplingParams, texts: list[list[int]]) -> float:
    counts = np.zeros([world.size] * (K + 1))
    for text in texts:
        counts[tuple(text[: K + 1])] += 1
    want = target_distribution(world, params) * len(texts)
    likely = want > 5
    if not likely.all():
        counts = np.append(counts[likely], counts[~likely].sum())
        want = np.append(want[likely], want[~likely].sum())
    if want.ravel()[-1] == 0:
        assert counts.ravel()[-1] == 0, "a token that the distribution excludes"
        counts, want = counts.ravel()[:-1], want.ravel()[:-1]
    return float(stats.chisquare(counts.ravel(), want.ravel()).pvalue)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.4, "top_k": 2}], ids=["plain", "cut"])
@pytest.mark.parametrize("drafter", ["sampled", "constant"])
@pytest.mark.parametrize("rule", RULES)
def test_text_follows_the_target(rule: Rule, drafter: str, options: dict[str, Any]) -> None:
    world, n = World(21), 2000
    params = SamplingParams(**{"temperature": 1.0, **options}, rule=rule)
    texts = generate(world, [params] * n, range(n), K + 1, lambda b, r, a: (b + r) % (K + 1), drafter=drafter)
    assert p_value(world, params, texts) > ERROR_RATE


def test_reused_noise_is_caught() -> None:
    """Negative control: ``block``, a budget that remembers the last round, and rng that comes back."""
    world, n = World(24, depth=5, spread=2.5), 2000
    params = SamplingParams(temperature=1.0, rule="block")

    def keep(b: int, r: int, a: int) -> int:
        return K if r == 0 or a else 1

    good = generate(world, [params] * n, range(n), 5, keep)
    bad = generate(world, [params] * n, range(n), 5, keep, round_of=lambda r: 0)
    assert p_value(world, params, good) > ERROR_RATE
    assert p_value(world, params, bad) < 1e-9


@pytest.mark.parametrize("wide", [False, True])
def test_coupled_text_is_that_of_plain_decoding(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same text with any drafter, any keep, any company, or no drafts at all."""
    if wide:  # draw place by place, as for a large vocabulary
        monkeypatch.setattr("outrider.sampling.verification._WIDE", 0)
    world, n = World(5, depth=6, spread=0.7), 60
    params = [
        SamplingParams(
            temperature=(0.0, 0.7, 1.0, 1.3)[b % 4], top_k=(0, 2)[b % 2], top_p=(1.0, 0.8)[b // 2 % 2], seed=b
        )
        for b in range(n)
    ]
    seeds = [p.seed or 0 for p in params]
    plain = generate(world, params, seeds, 6, lambda b, r, a: 0, drafter="constant")
    for drafter, keep in (
        ("sampled", lambda b, r, a: K),
        ("sampled", lambda b, r, a: (b + r) % 3),
        ("constant", lambda b, r, a: K),
    ):
        assert generate(world, params, seeds, 6, keep, drafter=drafter) == plain
    for b in range(0, n, 7):
        assert generate(world, [params[b]], [seeds[b]], 6, lambda b, r, a: K) == [plain[b]]
    assert len({tuple(text) for text in plain}) > 20


def test_greedy_text_is_the_argmax_under_every_rule() -> None:
    world = World(6, depth=6)
    want: list[int] = []
    while len(want) < 6:
        want.append(int(world.target([tuple(want)]).argmax()))
    for rule, company in product(RULES, (0.0, 1.0)):
        params = [SamplingParams(temperature=0.0, rule=rule), SamplingParams(temperature=company, rule="block")]
        for drafter in ("sampled", "constant"):
            texts = generate(world, params, [1, 2], 6, lambda b, r, a: K, drafter=drafter)
            assert texts[0] == want


def test_row_is_verified_as_it_is_alone() -> None:
    """Rows of all rules, temperatures and lengths in one batch: each as it would be alone."""
    world, n = World(9, depth=6), 48
    params = [
        SamplingParams(temperature=(0.0, 0.8, 1.0)[b // 3 % 3], rule=RULES[b % 3], top_p=(1.0, 0.9)[b % 2])
        for b in range(n)
    ]

    def keep(b: int, r: int, a: int) -> int:
        return (seeds[b] + r) % (K + 1)

    seeds = list(range(100, 100 + n))
    together = generate(world, params, seeds, 6, keep, dtype=torch.float64)
    for b in range(n):
        alone = generate(world, [params[b]], [seeds[b]], 6, lambda _, r, a, b=b: keep(b, r, a), dtype=torch.float64)
        assert alone == [together[b]]


def test_distribution_may_lack_places_of_rows_that_drafted_nothing() -> None:
    """The engine adds rows that finish their prompt to a proposal whose distribution does not know them."""
    world = World(11)
    params = SamplingParams(temperature=1.0, rule="block")
    context = Context([params] * 2, [HISTORY] * 2, [PROMPT] * 2)
    tokens, keep = torch.tensor([[1, 0], [0, 0]]), [2, 0]
    distribution = distribution_after(world.draft([(), (1,)]), [(), (1,)], params)
    target = Categorical.of(world.target([(), (1,), (1, 0), ()]))
    rng = RowRng([1, 2], [0, 0], ["block"] * 2)
    verification = verify(target, Proposal(tokens, keep, distribution), keep, context, rng)
    assert verification.accepted[1] == 0 and verification.lengths[1] == 1


def test_no_drafts_is_plain_decoding() -> None:
    world = World(12)
    for rule, temperature in product(RULES, (0.0, 1.0)):
        params = SamplingParams(temperature=temperature, rule=rule)
        context = Context([params] * 2, [HISTORY] * 2, [PROMPT] * 2)
        target = process(world.target([(), ()]), context)
        verification = verify(target, Proposal.empty(2), [0, 0], context, RowRng([1, 2], [0, 0], [rule] * 2))
        assert verification.tokens.shape == (2, 1)
        assert verification.accepted.tolist() == [0, 0] and verification.lengths.tolist() == [1, 1]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_meaningless_entries_of_a_proposal_are_not_read(rule: Rule, sampled: bool) -> None:
    world, params = World(13), SamplingParams(temperature=1.0, rule=rule)
    n = 40
    context = Context([params] * n, [HISTORY] * n, [PROMPT] * n)
    kept = [b % 3 for b in range(n)]
    owner = torch.tensor([b for b in range(n) for _ in range(kept[b] + 1)])
    target = process(world.target([(), (1,), (1, 0)] * n)[: len(owner)], context, owner)
    rng = RowRng(range(n), [0] * n, [rule] * n)
    distribution = Categorical.of(world.draft([(), (1,)] * n)) if sampled else None
    found = []
    for junk in (0, -7, 10**12):
        tokens = torch.tensor([[1 if j < kept[b] else junk for j in range(K)] for b in range(n)])
        verification = verify(target, Proposal(tokens, kept, distribution), kept, context, rng)
        texts = [t[:m] for t, m in zip(verification.tokens.tolist(), verification.lengths.tolist(), strict=True)]
        found.append((verification.accepted.tolist(), texts))
    assert found[0] == found[1] == found[2]
    assert set(found[0][0]) > {0}


def test_distribution_of_another_class() -> None:
    """A drafter's distribution needs the protocol only."""

    class Table:
        def __init__(self, rows: Tensor) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def at(self, tokens: Tensor) -> Tensor:
            return self.rows.gather(1, tokens[:, None])[:, 0]

        def dense(self, places: Tensor) -> Tensor:
            return self.rows[places]

    world, params = World(14), SamplingParams(temperature=1.0, top_k=2)
    want = target_distribution(world, params)
    for rule in ("rejection", "block"):
        found = output_distribution(
            world,
            params,
            rule,
            KEEPS["all"],
            reported=lambda distribution: Table(distribution.dense(torch.arange(len(distribution)))),  # type: ignore
        )
        assert distance(found, want) < EXACT


# ------------------------------------------------------------------------------------------------ ends


def test_stop_token_in_a_round_leaves_the_distribution_exact() -> None:
    """Texts that end at token 0 against plain decoding's distribution of such texts."""
    world, params = World(15), SamplingParams(temperature=1.0)

    def ended(distribution: np.ndarray) -> dict[tuple[int, ...], float]:
        out: dict[tuple[int, ...], float] = {}
        for text in product(range(V), repeat=K + 1):
            end = text.index(0) + 1 if 0 in text else K + 1
            out[text[:end]] = out.get(text[:end], 0) + distribution[text]
        return out

    want = ended(target_distribution(world, params))
    for rule in ("rejection", "block"):
        found = ended(output_distribution(world, params, rule, KEEPS["all"]))
        assert found == pytest.approx(want, abs=EXACT)
