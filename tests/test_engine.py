"""The loop on a target whose every probability is known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from outrider.config import SamplingParams
from outrider.engine.engine import Engine
from outrider.errors import InvalidRequest
from outrider.models.toy import ToyTarget
from outrider.sampling.processors import process
from outrider.scheduling.fixed import FixedPolicy
from outrider.scheduling.threshold import ThresholdConfig, ThresholdPolicy
from outrider.types import Context, Proposal, RaggedBatch, Rng, Values

V = 5
GENERATOR = torch.Generator().manual_seed(3)
TABLE = torch.randn(V, V, generator=GENERATOR, dtype=torch.float64) * 1.2
DRAFT_TABLE = TABLE + torch.randn(V, V, generator=GENERATOR, dtype=torch.float64)


class MarkovDrafter:
    """Drafts from another Markov chain and checks that it is told exactly what was committed."""

    aux_layers: tuple[int, ...] = ()

    def __init__(self, table: Tensor, block: int) -> None:
        self.table, self.block = table, block
        self.seen: dict[int, list[int]] = {}

    def open(self, slot: int, capacity: int) -> None:
        assert slot not in self.seen, "a slot was opened twice"
        self.seen[slot] = []

    def close(self, slot: int) -> None:
        del self.seen[slot]

    def match(self, tokens: list[int]) -> int:
        return len(tokens)

    def adopt(self, slot: int, tokens: list[int], count: int) -> None:
        assert not self.seen[slot], "only an empty slot can begin with a prefix"
        self.seen[slot] = tokens[:count]

    def publish(self, slot: int, tokens: list[int]) -> None:
        seen = self.seen[slot]
        assert seen == tokens[: len(seen)], "what it knows is part of the text"

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        bounds = batch.offsets.tolist()
        for b, slot in enumerate(batch.slots.tolist()):
            tokens = batch.tokens[bounds[b] : bounds[b + 1]].tolist()
            positions = batch.positions[bounds[b] : bounds[b + 1]].tolist()
            start = len(self.seen[slot])
            assert positions == list(range(start, start + len(tokens))), "committed tokens must be told once, in order"
            self.seen[slot].extend(tokens)

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        rows = torch.arange(len(slots))
        for b, slot in enumerate(slots):
            assert self.seen[slot] + [last[b]] == context.history[b], "the drafter must know all but the last token"
        start = torch.tensor([len(h) for h in context.history[: len(slots)]])
        tokens, distributions, x = [], [], torch.tensor(last)
        for j in range(max(limit)):
            drafted = torch.stack(tokens, 1) if tokens else None
            distribution = process(self.table[x], context, rows, drafted=drafted, depth=torch.full((len(slots),), j))
            x = distribution.draw(rng.token_keys(rows, start + j, "draft"))
            tokens.append(x)
            distributions.append(distribution.dense(rows))
        stacked = torch.stack(distributions, 1).flatten(0, 1)
        return Proposal(torch.stack(tokens, 1), list(limit), _Dense(stacked))


class _Dense:
    """A distribution held as plain probabilities."""

    def __init__(self, probabilities: Tensor) -> None:
        self.probabilities = probabilities

    def __len__(self) -> int:
        return len(self.probabilities)

    def at(self, tokens: Tensor) -> Tensor:
        return self.probabilities.gather(1, tokens[:, None]).squeeze(1)

    def dense(self, places: Tensor) -> Tensor:
        return self.probabilities[places]


def engine(
    drafts: int, rows: int = 3, *, chunk: int = 4, eos: tuple[int, ...] = (), drafter: MarkovDrafter | None = None
) -> Engine:
    drafter = drafter or MarkovDrafter(DRAFT_TABLE, drafts)
    target = ToyTarget(TABLE, eos_token_ids=eos)
    policy = FixedPolicy.from_config(FixedPolicy.Config(draft_tokens=drafts))
    return Engine(target, drafter, policy, max_rows=rows, capacity=64, chunk=chunk)


def run(
    loop: Engine, prompts: list[list[int]], params: SamplingParams, seeds: list[int] | None = None
) -> list[list[int]]:
    seeds = seeds or [params.seed or 0] * len(prompts)
    requests = [loop.submit(p, params, s, i) for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))]
    while loop.busy:
        loop.step()
    assert len(loop.admission) == 0 and all(r.slot == -1 for r in requests)
    return [r.output for r in requests]


PROMPTS = [[0], [1, 2, 3], [4, 4, 0, 1, 2, 3, 1, 0, 2], [2, 1], [3] * 6]


@pytest.mark.parametrize("drafts", [0, 1, 3, 7])
@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_is_the_argmax_chain(drafts: int, rows: int) -> None:
    outputs = run(engine(drafts, rows), PROMPTS, SamplingParams(max_tokens=11))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        token, expected = prompt[-1], []
        for _ in range(11):
            token = int(TABLE[token].argmax())
            expected.append(token)
        assert output == expected


def test_coupled_text_depends_on_the_seed_alone() -> None:
    params = SamplingParams(max_tokens=17, temperature=0.9, top_p=0.95, seed=12)
    plain = run(engine(0, 1), PROMPTS, params)
    for drafts, rows, chunk in [(1, 1, 1), (2, 2, 3), (5, 5, 64), (5, 2, 1)]:
        assert run(engine(drafts, rows, chunk=chunk), PROMPTS, params) == plain
    assert run(engine(0, 1), PROMPTS, SamplingParams(max_tokens=17, temperature=0.9, top_p=0.95, seed=13)) != plain


def test_coupled_text_under_penalties_is_the_plain_text() -> None:
    params = SamplingParams(
        max_tokens=20, temperature=1.0, seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3
    )
    assert run(engine(4, 5), PROMPTS, params) == run(engine(0, 1), PROMPTS, params)


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_the_sampled_distribution_end_to_end(rule: str) -> None:
    """First three tokens after [0] against the exact distribution: chi-square, false alarms below 1 in 10,000."""
    count = 2000
    params = SamplingParams(max_tokens=3, temperature=1.0, rule=rule)  # type: ignore[arg-type]
    outputs = run(engine(2, rows=64), [[0]] * count, params, seeds=list(range(count)))
    p = torch.softmax(TABLE, -1)
    distribution = (p[0][:, None, None] * p[:, :, None] * p[None]).flatten().numpy()
    seen = Counter(a * V * V + b * V + c for a, b, c in outputs)
    observed = np.array([seen[i] for i in range(V**3)], dtype=float)
    expected = distribution * count
    big = expected >= 5
    observed = np.append(observed[big], observed[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(1 - 1e-4, len(expected) - 1)


def test_a_drafter_that_misstates_its_distribution_is_caught_by_the_same_check() -> None:
    """Negative control: drafts from one distribution passed off as draws from another bias the text."""

    class Lying(MarkovDrafter):
        def propose(self, *args: object) -> Proposal:
            honest = super().propose(*args)  # type: ignore[arg-type]
            claimed = torch.full((honest.tokens.numel(), V), 1 / V, dtype=torch.float64)
            return Proposal(honest.tokens, honest.lengths, _Dense(claimed))

    count = 2000
    loop = engine(2, rows=64, drafter=Lying(DRAFT_TABLE, 2))
    params = SamplingParams(max_tokens=4, temperature=1.0, rule="rejection")
    outputs = run(loop, [[0]] * count, params, seeds=list(range(count)))
    p = torch.softmax(TABLE, -1)
    distribution = (p[0][:, None] * p).flatten().numpy() * count  # the first two tokens; the second may be a draft
    seen = Counter(a * V + b for a, b, *_ in outputs)
    statistic = sum((seen[i] - distribution[i]) ** 2 / distribution[i] for i in range(V * V))
    assert statistic > chi2.ppf(1 - 1e-4, V * V - 1)


@pytest.mark.parametrize("drafts", [0, 4])
def test_nothing_after_a_stop_token_is_committed_or_counted(drafts: int) -> None:
    free = run(engine(drafts), PROMPTS, SamplingParams(max_tokens=30, temperature=1.0, seed=4))
    stop = 2
    loop = engine(drafts, eos=(stop,))
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=4)
    requests = [loop.submit(p, params, 4, i) for i, p in enumerate(PROMPTS)]
    while loop.busy:
        loop.step()
    for request, long in zip(requests, free, strict=True):
        expected = long[: long.index(stop) + 1] if stop in long else long
        assert request.output == expected
        assert request.finish_reason == ("stop" if stop in long else "length")
        stats = request.stats
        assert stats.generated == len(expected)
        assert stats.accepted <= stats.generated <= 1 + stats.accepted + stats.rounds
        assert sum(stats.accepted_per_position) == stats.accepted <= stats.drafted == sum(stats.drafted_per_position)


def test_end_of_text_can_be_ignored() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=4, ignore_eos=True)
    assert run(engine(3, eos=(2,)), PROMPTS, params) == run(engine(3), PROMPTS, params)


@pytest.mark.parametrize("budget", [1, 2, 3, 8])
def test_the_budget_is_kept_exactly(budget: int) -> None:
    assert [len(o) for o in run(engine(5), PROMPTS, SamplingParams(max_tokens=budget))] == [budget] * len(PROMPTS)


def test_cancelling_frees_the_row_and_leaves_the_others_alone() -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=9)
    expected = run(engine(2), PROMPTS, params)
    loop = engine(2, rows=2)
    requests = [loop.submit(p, params, 9, i) for i, p in enumerate(PROMPTS)]
    loop.step()
    loop.step()
    loop.cancel(requests[0])
    loop.cancel(requests[4])  # still waiting
    while loop.busy:
        loop.step()
    assert [r.finish_reason for r in requests] == ["cancelled", "length", "length", "length", "cancelled"]
    assert [r.output for r in requests[1:4]] == expected[1:4]
    assert requests[0].output == expected[0][: len(requests[0].output)]
    assert run(loop, PROMPTS, params) == expected  # every slot is whole again


def test_rows_that_finish_their_prompt_join_rows_whose_drafts_have_confidences() -> None:
    class Sure(MarkovDrafter):
        def propose(self, *args: object) -> Proposal:
            found = super().propose(*args)  # type: ignore[arg-type]
            return Proposal(found.tokens, found.lengths, found.distribution, torch.full(found.tokens.shape, 0.6))

    policy = ThresholdPolicy.from_config(ThresholdConfig(draft_tokens=3, threshold=0.5))
    loop = Engine(ToyTarget(TABLE), Sure(DRAFT_TABLE, 3), policy, max_rows=2, capacity=64, chunk=4)
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=3)
    assert run(loop, PROMPTS, params) == run(engine(0, 1), PROMPTS, params)


def test_requests_without_drafts_teach_the_policy_nothing() -> None:
    loop = engine(3)
    opened, asked, learnt = [], [], []
    open_slot, plan, learn = loop.drafting.drafter.open, loop.drafting.policy.plan, loop.drafting.policy.observe
    loop.drafting.drafter.open = lambda slot, capacity: (opened.append(slot), open_slot(slot, capacity))[1]  # type: ignore[method-assign, func-returns-value]
    loop.drafting.policy.plan = lambda view: (asked.append(view.can_draft), plan(view))[1]  # type: ignore[method-assign, func-returns-value]
    loop.drafting.policy.observe = lambda *seen: (learnt.append(seen), learn(*seen))[1]  # type: ignore[method-assign, func-returns-value]
    wanted, unwanted = SamplingParams(max_tokens=9), SamplingParams(max_tokens=9, draft_tokens=0)
    prompts = PROMPTS[:2]
    expected = run(engine(0), prompts, wanted)
    assert run(loop, prompts, unwanted) == expected
    assert not opened and not asked and len(learnt) <= 3  # steps that read prompts
    requests = [
        loop.submit(p, params, 0, i) for i, (p, params) in enumerate(zip(prompts, (wanted, unwanted), strict=True))
    ]
    while loop.busy:
        loop.step()
    assert [r.output for r in requests] == expected
    assert len(opened) == 1 and set(asked) <= {0, 1} and 1 in asked
    assert [bool(r.stats.drafted) for r in requests] == [True, False]


def test_bad_prompts_are_refused_before_anything_runs() -> None:
    loop = engine(2)
    for prompt, word in [([], "empty"), ([0, V], "between 0 and"), ([0] * 4090, "context")]:
        with pytest.raises(InvalidRequest, match=word):
            loop.submit(prompt, SamplingParams(max_tokens=10), 0)
    assert len(loop.admission) == 0
