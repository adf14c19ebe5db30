"""Drafters: the contract over the whole catalogue, then what each one proposes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from trained import DESIGNS, VOCABULARY, WIDTH, make_checkpoint, make_target

from outrider import registry
from outrider.backends.reference import ReferenceBackend
from outrider.checkpoints import DraftCheckpoint
from outrider.config import SamplingParams, build
from outrider.drafters.draft_model import DraftModelConfig, DraftModelDrafter
from outrider.drafters.ngram import NgramConfig, NgramDrafter
from outrider.drafters.suffix import SuffixAutomaton, SuffixConfig, SuffixDrafter
from outrider.errors import CacheFull, IncompatibleDrafter, InvalidRequest
from outrider.models.loading import load_backend
from outrider.proof.contracts import drafter_anticipates, draws_off_distribution
from outrider.proof.proposing import Draft, context_of, drafts_of, propose, rng_of
from outrider.sampling.processors import process
from outrider.types import (
    Context,
    Drafter,
    Proposal,
    RaggedBatch,
    Rng,
    TargetModel,
    TargetOutput,
    TargetSpec,
    Values,
    to_list,
)

V = 5

# ------------------------------------------------------------------------------------------ a language model to test on


class PrefixCache:
    """Holds the tokens themselves, so that a cache out of step shows in the logits."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[list[int] | None] = [None] * slots

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row or []) for row in self.rows])

    def open(self) -> int:
        if None not in self.rows:
            raise CacheFull("full")
        slot = self.rows.index(None)
        self.rows[slot] = []
        return slot

    def rewind(self, slots: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor) -> None:
        for slot, length in zip(to_list(slots), to_list(lengths), strict=True):
            row = self.rows[slot]
            assert row is not None and length <= len(row)
            del row[length:]

    def release(self, slot: int) -> None:
        assert self.rows[slot] is not None
        self.rows[slot] = None


class PrefixModel:
    """The next token's logits are a fixed random function of the whole prefix."""

    def __init__(self, vocab_size: int = V, seed: int = 0, max_positions: int = 1000) -> None:
        self.spec = TargetSpec("prefix", vocab_size, 16, 2, max_positions, torch.float64, "prefix")
        self.backend = load_backend("auto")
        generator = torch.Generator().manual_seed(seed)
        self._table = torch.randn(997, vocab_size, generator=generator, dtype=torch.float64)
        self._embedding = torch.randn(vocab_size, 16, generator=generator, dtype=torch.float64)
        self.passes: list[int] = []  # tokens of each pass

    def logits(self, prefix: Sequence[int]) -> Tensor:
        state = 1
        for token in prefix:
            state = (state * 31 + token + 7) % 997
        return 2 * self._table[state]

    def new_cache(self, slots: int, capacity: int) -> PrefixCache:
        return PrefixCache(slots, capacity)

    def forward(
        self, batch: RaggedBatch, cache: PrefixCache, aux_layers: Sequence[int] = (), logits_at: Tensor | None = None
    ) -> TargetOutput:
        self.passes.append(len(batch.tokens))
        rows = []
        offsets = batch.offsets.tolist()
        for slot, first, end in zip(batch.slots.tolist(), offsets, offsets[1:], strict=False):
            held = cache.rows[slot]
            assert held is not None and first < end
            assert batch.positions[first:end].tolist() == list(range(len(held), len(held) + end - first))
            for token in batch.tokens[first:end].tolist():
                held.append(token)
                rows.append(self.logits(held))
            assert len(held) <= cache.capacity
        logits = torch.stack(rows)
        return TargetOutput(logits if logits_at is None else logits[logits_at], None)

    def embed(self, tokens: Tensor) -> Tensor:
        return self._embedding[tokens]

    def unembed(self, hidden: Tensor) -> Tensor:
        return hidden @ self._embedding.T


# ------------------------------------------------------------------------------------------ an engine to test with

TARGET = PrefixModel()
FEATURES = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {  # what a drafter of the catalogue needs to be built here
    "draft_model": {"model": "small", "draft_tokens": 5},
    "suffix": {"stored_tokens": 0},  # earlier outputs are its declared memory; tested apart
}


TRAINED = {"dflash": "dflash", "dspark": "vanilla", "eagle3": "eagle3", "mtp": "mtp"}  # -> a design of trained.py


@cache
def trained_parts(design: str) -> tuple[DraftCheckpoint, TargetModel]:
    target = make_target(dtype=torch.float64)
    return make_checkpoint(DESIGNS[design], target=target), target


def make(name: str, **options: Any) -> Drafter:
    """A drafter of the catalogue, with random weights where it needs any."""
    kind = registry.find("drafter", name)
    if name in TRAINED:
        checkpoint, target = trained_parts(TRAINED[name])
        config = kind.Config("", **options)
        drafter = kind(checkpoint, target, ReferenceBackend(), config=config, dtype=torch.float64, max_rows=8)
        assert isinstance(drafter, Drafter)
        return drafter
    config = build(kind.Config, {**OPTIONS.get(name, {}), **options}, f"drafter {name}")
    drafter = kind.from_config(config, TARGET, load_target=lambda model, dtype: PrefixModel(seed=1))
    assert isinstance(drafter, Drafter)
    return drafter


@dataclass
class Row:
    """One request, and a script of what the target makes of its drafts that no other row has a part in."""

    seed: int
    params: SamplingParams
    prompt_length: int = 12
    slot: int = 0
    round: int = 1
    history: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        motif = [rng.randrange(V) for _ in range(4)]
        self.history = [rng.choice(motif) if rng.random() < 0.2 else motif[i % 4] for i in range(self.prompt_length)]

    def committed(self, drafts: list[int]) -> list[int]:
        """Accepted drafts, then one token of the target's own."""
        rng = random.Random(1000 * self.seed + self.round)
        accepted = drafts[: rng.randrange(6)]
        return [*accepted, rng.randrange(V)]


ROWS = [
    Row(1, SamplingParams(), 12, slot=0),
    Row(2, SamplingParams(temperature=1.0), 7, slot=3),
    Row(3, SamplingParams(temperature=0.7, top_k=3, repetition_penalty=1.3), 20, slot=1),
    Row(4, SamplingParams(temperature=1.0, seed=9), 1, slot=2),
]


def rows_of(indices: Sequence[int]) -> list[Row]:
    return [Row(ROWS[i].seed, ROWS[i].params, ROWS[i].prompt_length, ROWS[i].slot) for i in indices]


def observe(drafter: Drafter, tokens: Sequence[Sequence[int]], starts: Sequence[int], rows: Sequence[Row]) -> None:
    """What passed through the target, with features that are a function of the token where the drafter reads any."""
    batch = RaggedBatch.pack(tokens, starts, [row.slot for row in rows])
    drafter.observe(batch, FEATURES[batch.tokens].repeat(1, len(drafter.aux_layers)) if drafter.aux_layers else None)


def start(drafter: Drafter, rows: Sequence[Row], chunk: int = 8, capacity: int = 400) -> None:
    """Prefill in chunks; the target's first token follows."""
    for row in rows:
        drafter.open(row.slot, capacity)
        for first in range(0, len(row.history), chunk):
            observe(drafter, [row.history[first : first + chunk]], [first], [row])
        row.history.append(random.Random(row.seed).randrange(V))


def commit(drafter: Drafter, rows: Sequence[Row], proposal: Proposal) -> None:
    passed, starts = [], []
    for row, tokens, length in zip(rows, proposal.tokens.tolist(), proposal.lengths.tolist(), strict=True):
        committed = row.committed(tokens[:length])
        starts.append(len(row.history) - 1)
        passed.append([row.history[-1], *committed[:-1]])
        row.history += committed
        row.round += 1
    observe(drafter, passed, starts, rows)


LIMITS = [  # of each round, for each row
    [5, 2, 4, 3],
    [1, 5, 0, 4],
    [0, 0, 0, 0],
    [3, 0, 5, 1],
    [5, 5, 5, 5],
    [0, 4, 0, 2],
    [4, 1, 3, 5],
    [5, 5, 5, 5],
]


def limits_of(drafter: Drafter, step: int, indices: Sequence[int]) -> list[int]:
    return [min(LIMITS[step][i], drafter.block) for i in indices]


def run(drafter: Drafter, indices: Sequence[int], skip: Sequence[int] = ()) -> list[list[Draft]]:
    """Drafts of every round. In the rounds of ``skip`` the engine decodes plainly without asking the drafter."""
    rows = rows_of(indices)
    start(drafter, rows)
    rounds = []
    for step in range(len(LIMITS)):
        plain = step in skip
        proposal = Proposal.empty(len(rows)) if plain else propose(drafter, rows, limits_of(drafter, step, indices))
        rounds.append(drafts_of(proposal))
        commit(drafter, rows, proposal)
    for row in rows:
        drafter.close(row.slot)
    return rounds


# ------------------------------------------------------------------------------------------ the contract of all

each = pytest.mark.parametrize("name", registry.names("drafter"))


@each
def test_shapes_and_bounds(name: str) -> None:
    drafter = make(name)
    assert isinstance(drafter.aux_layers, tuple) and drafter.block >= 0
    rows = rows_of(range(4))
    start(drafter, rows)
    for step in range(len(LIMITS)):
        limit = limits_of(drafter, step, range(4))
        proposal = propose(drafter, rows, limit)
        width = proposal.tokens.shape[1]
        assert proposal.tokens.dtype == proposal.lengths.dtype == torch.int64
        assert proposal.tokens.shape == (4, width) and proposal.lengths.shape == (4,)
        assert all(0 <= n <= min(most, width) for n, most in zip(proposal.lengths.tolist(), limit, strict=True))
        if proposal.confidence is not None:
            assert proposal.confidence.shape == (4, width) and proposal.confidence.dtype == torch.float32
        if proposal.distribution is not None:
            assert len(proposal.distribution) == 4 * width
        for draft in drafts_of(proposal):
            assert all(0 <= token < VOCABULARY for token in draft.tokens)
            assert all(0 <= c <= 1 for c in draft.confidence or [])
            for token, distribution in zip(draft.tokens, draft.distributions or [], strict=False):
                assert distribution[token] > 0 and sum(distribution) == pytest.approx(1)
        commit(drafter, rows, proposal)


@each
def test_drafts_past_its_block_are_not_proposed(name: str) -> None:
    drafter = make(name)
    rows = rows_of([0, 1])
    start(drafter, rows)
    assert int(propose(drafter, rows, [drafter.block + 3] * 2).lengths.max()) <= drafter.block


@each
def test_the_same_rng_gives_the_same_drafts(name: str) -> None:
    assert run(make(name), range(4)) == run(make(name), range(4))


@each
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    together = run(make(name), range(4))
    for i in range(4):
        alone = run(make(name), [i])
        for step, (drafts, draft) in enumerate(zip(together, alone, strict=True)):
            same(drafts[i], draft[0], f"row {i}, round {step}")


def same(a: Draft, b: Draft, where: str) -> None:
    assert a.tokens == b.tokens, where
    if a.confidence is not None and b.confidence is not None:
        assert a.confidence == pytest.approx(b.confidence, abs=1e-6), where
    if a.distributions is not None and b.distributions is not None:  # a batch of greedy rows alone has no distribution
        assert torch.allclose(torch.tensor(a.distributions), torch.tensor(b.distributions)), where


@each
@pytest.mark.parametrize("skip", [(), (0, 1, 2, 3), (1, 3, 6)])
def test_a_proposal_depends_on_the_history_alone(name: str, skip: tuple[int, ...]) -> None:
    """After any rounds, rejected drafts and plain decoding, it is what a fresh drafter makes of the same text."""
    drafter = make(name)
    rows = rows_of(range(4))
    start(drafter, rows)
    for step in range(len(LIMITS)):
        proposal = Proposal.empty(4)
        if step not in skip:
            limit = limits_of(drafter, step, range(4))
            proposal = propose(drafter, rows, limit)
            fresh = make(name)
            for row in rows:
                fresh.open(row.slot, 400)
                observe(fresh, [row.history[:-1]], [0], [row])
            for b, (a, b_) in enumerate(zip(drafts_of(proposal), drafts_of(propose(fresh, rows, limit)), strict=True)):
                same(a, b_, f"row {b}, round {step}")
        commit(drafter, rows, proposal)


@each
def test_a_slot_keeps_nothing_of_its_last_row(name: str) -> None:
    drafter = make(name)
    rows = rows_of([0, 1, 2, 3])
    start(drafter, rows)
    commit(drafter, rows, propose(drafter, rows, limits_of(drafter, 4, range(4))))
    propose(drafter, rows, limits_of(drafter, 4, range(4)))  # cancelled with drafts in flight
    for row in rows:
        drafter.close(row.slot)
    assert run(drafter, range(4)) == run(make(name), range(4))


BLOCKS = ("dspark", "dflash")  # they have a slot for each draft that is asked for


@pytest.mark.parametrize("name", [name for name in registry.names("drafter") if name not in BLOCKS])
def test_a_longer_limit_only_adds(name: str) -> None:
    """What is proposed at j does not depend on how far the draft may go."""
    for step in (1, 3):
        drafts = []
        for most in (1, 2, make(name).block):
            drafter, rows = make(name), rows_of(range(4))
            start(drafter, rows)
            for before in range(step):
                commit(drafter, rows, propose(drafter, rows, limits_of(drafter, before, range(4))))
            drafts.append((most, drafts_of(propose(drafter, rows, [min(most, drafter.block)] * 4))))
        longest = drafts[-1][1]
        for most, shorter in drafts:
            for a, b in zip(shorter, longest, strict=True):
                assert a.tokens == b.tokens[:most]
                assert (a.confidence or []) == pytest.approx((b.confidence or [])[:most], abs=1e-6)


def anticipates(make_drafter: Callable[[], Drafter]) -> tuple[bool, bool]:
    """``drafter_anticipates`` with rows that have read their prompts."""

    def begin(trial: int) -> tuple[Drafter, list[Row]]:
        drafter, rows = make_drafter(), rows_of(range(4))
        for row in rows:
            row.seed += 100 * trial
        start(drafter, rows)
        return drafter, rows

    return drafter_anticipates(begin)


@each
def test_sampled_drafts_are_draws_of_their_stated_probabilities(name: str) -> None:
    looked = 0
    drafter, rows = make(name), rows_of(range(4))
    start(drafter, rows)
    for step in range(len(LIMITS)):
        proposal = propose(drafter, rows, limits_of(drafter, step, range(4)))
        wrong, drawn = draws_off_distribution(proposal, rows)
        assert wrong == 0
        looked += drawn
        commit(drafter, rows, proposal)
    assert looked > 20 or name in ("none", "ngram", "suffix")


@each
def test_does_not_anticipate(name: str) -> None:
    looks_ahead, moved = anticipates(lambda: make(name))
    assert not looks_ahead
    assert moved or name in ("none", "ngram", "suffix"), "the perturbation changed no token: the test shows nothing"


class _Coin:
    """Draws tokens evenly; ``flaw`` lets a length or a confidence peek at the token it is about."""

    aux_layers: tuple[int, ...] = ()
    block = 4

    def __init__(self, flaw: str) -> None:
        self.flaw = flaw

    def open(self, slot: int, capacity: int) -> None: ...

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        columns = []
        for j in range(self.block):
            positions = torch.tensor([len(h) + j for h in context.history])
            columns.append((rng.uniform(torch.arange(len(slots)), positions, "draft") * V).long())
        tokens = torch.stack(columns, 1)
        lengths, confidence = list(limit), torch.full(tokens.shape, 0.5)
        if self.flaw == "length":  # drops a token it does not like
            lengths = (tokens != 0).long().cumprod(1).sum(1).tolist()
        if self.flaw == "confidence":
            confidence = tokens.float() / V
        return Proposal(tokens, lengths, None, confidence)

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None: ...

    def close(self, slot: int) -> None: ...


@pytest.mark.parametrize(("flaw", "caught"), [("length", True), ("confidence", True), ("", False)])
def test_an_anticipating_drafter_is_caught(flaw: str, caught: bool) -> None:
    assert anticipates(lambda: _Coin(flaw)) == (caught, True)


# ------------------------------------------------------------------------------------------ ngram


def one(drafter: Drafter, history: list[int], most: int, prompt_length: int | None = None) -> Draft:
    row = Row(0, SamplingParams())
    row.history, row.prompt_length = history, len(history) if prompt_length is None else prompt_length
    return drafts_of(propose(drafter, [row], [most]))[0]


def brute_ngram(history: list[int], sizes: range, most: int) -> list[int]:
    """The continuation of the latest earlier occurrence of the longest n-gram, by scanning."""
    for n in reversed(sizes):
        tail = history[-n:]
        for end in range(len(history) - 1, n - 1, -1):
            if len(history) > n and history[end - n : end] == tail:
                text = list(history)
                for i in range(most):
                    text.append(text[end + i])
                return text[len(history) :]
    return []


@pytest.mark.parametrize("sizes", [range(1, 4), range(2, 5), range(3, 4)])
def test_ngram_copies_what_followed_last_time(sizes: range) -> None:
    rng = random.Random(0)
    drafter = NgramDrafter(NgramConfig(max_ngram=sizes[-1], min_ngram=sizes[0]))
    found = 0
    for _ in range(30):
        drafter.open(0, 100)
        history: list[int] = []
        for _ in range(12):
            history += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            expected = brute_ngram(history, sizes, 6)
            assert one(drafter, history, 6).tokens == expected
            found += bool(expected)
        drafter.close(0)
    assert found > 100


def test_ngram_confidence_grows_with_the_agreement() -> None:
    drafter = NgramDrafter(NgramConfig())
    drafter.open(0, 100)
    assert one(drafter, [9, 1, 2, 5, 6, 7, 8, 1, 2], 3).confidence == pytest.approx([3 / 4, 4 / 5, 5 / 6])
    drafter.open(0, 100)
    assert one(drafter, [3, 4, 1, 2, 5, 6, 3, 4, 1, 2], 2).confidence == pytest.approx([5 / 6, 6 / 7])


# ------------------------------------------------------------------------------------------ suffix


def automaton_of(texts: Sequence[Sequence[int]]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.restart()
        automaton.extend(text)
    return automaton


def occurrences(texts: Sequence[Sequence[int]], context: Sequence[int]) -> Counter[int]:
    """What followed each occurrence of a context, by scanning."""
    n = len(context)
    return Counter(
        text[i + n] for text in texts for i in range(len(text) - n) if list(text[i : i + n]) == list(context)
    )


def test_automaton_counts_what_followed_every_context() -> None:
    rng = random.Random(1)
    for _ in range(60):
        texts = [[rng.randrange(3) for _ in range(rng.randrange(1, 14))] for _ in range(rng.randrange(1, 4))]
        automaton = automaton_of(texts)
        assert automaton.tokens == sum(map(len, texts))
        for text in texts:
            for i in range(len(text) + 1):
                for j in range(i, len(text) + 1):
                    state, matched = automaton.find(text[i:j])
                    assert matched == j - i
                    followed = occurrences(texts, text[i:j])
                    token, frequency = automaton.best(state)
                    if not followed:
                        assert token == -1
                    else:
                        assert followed[token] == max(followed.values())
                        assert frequency == pytest.approx(max(followed.values()) / followed.total())


def test_automaton_finds_the_longest_suffix_that_occurs() -> None:
    rng = random.Random(2)
    for _ in range(60):
        texts = [[rng.randrange(4) for _ in range(20)] for _ in range(2)]
        query = [rng.randrange(4) for _ in range(8)]
        _, matched = automaton_of(texts).find(query)
        known = [
            n for n in range(9) if any(t[i : i + n] == query[8 - n :] for t in texts for i in range(len(t) - n + 1))
        ]
        assert matched == max(known)
        text = texts[0]
        _, matched = automaton_of([text]).end()
        again = [n for n in range(20) if any(text[i : i + n] == text[20 - n :] for i in range(20 - n))]
        assert matched == max(again)


def test_automaton_appends_in_constant_time_and_space_on_a_loop() -> None:
    automaton = automaton_of([[1] * 20000])
    assert automaton.states <= 2 * 20000
    state, matched = automaton.end()
    assert matched == 19999 and automaton.draft(state, matched, 8, SuffixConfig())[0] == [1] * 8


def test_suffix_follows_the_most_frequent_branch() -> None:
    drafter = SuffixDrafter(SuffixConfig())
    drafter.open(0, 100)
    draft = one(drafter, [7, 1, 2, 8, 1, 2, 9, 1, 3, 7, 1], 1)
    assert draft.tokens == [2]  # after (7, 1): the longest context
    drafter.open(0, 100)
    draft = one(drafter, [1, 2, 8, 1, 2, 9, 1, 3, 6, 1], 1)
    assert draft.tokens == [2]  # after (1): 2 twice, 3 once
    assert draft.confidence == pytest.approx([2 / 3 * 1 / 3])


def test_suffix_stops_where_branches_are_too_even() -> None:
    drafter = SuffixDrafter(SuffixConfig(min_survival=0.3))
    drafter.open(0, 100)
    history = [1, 2, 3, 4, 1, 2, 5, 6, 1]
    assert one(drafter, history, 4).tokens == [2]  # survival 1/3; then 3 or 5, one each: 1/3 * 1/2 * 2/4
    drafter = SuffixDrafter(SuffixConfig(min_match=2))
    drafter.open(0, 100)
    assert one(drafter, history, 4).tokens == []


def test_suffix_learns_from_earlier_outputs_and_forgets_the_oldest() -> None:
    drafter = SuffixDrafter(SuffixConfig(stored_tokens=40))
    prompt, output = [1, 2, 3], [10, 11, 12, 13, 14]

    def finish(prompt: list[int], output: list[int]) -> None:
        drafter.open(0, 100)
        one(drafter, [*prompt, output[0]], 4, len(prompt))
        drafter.observe(RaggedBatch.pack([output], [len(prompt)], [0]), None)
        drafter.close(0)

    def drafted_after(history: list[int]) -> list[int]:
        drafter.open(0, 100)
        tokens = one(drafter, history, 3).tokens
        drafter.close(0)
        return tokens

    assert drafted_after([5, 6, 10, 11]) == []
    finish(prompt, output)
    assert drafted_after([5, 6, 10, 11]) == [12, 13, 14]
    assert drafted_after([7, 1, 2]) == []  # prompts are not shared
    finish(prompt, list(range(20, 60)))
    assert drafted_after([5, 55, 56]) == [57, 58, 59]
    finish(prompt, list(range(60, 100)))
    assert drafted_after([5, 6, 10, 11]) == []
    for _ in range(20):
        finish(prompt, list(range(100, 115)))
        assert drafter.stored_tokens <= 40


# ------------------------------------------------------------------------------------------ draft_model


def small_drafter(model: PrefixModel, **options: Any) -> DraftModelDrafter:
    config = DraftModelConfig(model="small", **options)
    return DraftModelDrafter.from_config(config, TARGET, load_target=lambda name, dtype: model)


def test_draft_model_draws_each_token_from_the_distribution_it_reports() -> None:
    """Recomputed without a cache: the processed logits of the whole prefix, and the row's own rng."""
    model = PrefixModel(seed=1)
    drafter, rows = small_drafter(model, draft_tokens=5), rows_of(range(4))
    start(drafter, rows)
    for step in range(len(LIMITS)):
        proposal, rng = propose(drafter, rows, LIMITS[step]), rng_of(rows)
        for b, draft in enumerate(drafts_of(proposal)):
            assert len(draft.tokens) == LIMITS[step][b]
            history = rows[b].history
            for j, token in enumerate(draft.tokens):
                logits = model.logits([*history, *draft.tokens[:j]])
                drafted = torch.tensor([draft.tokens] * 4)
                distribution = process(
                    logits[None], context_of(rows), torch.tensor([b]), torch.tensor([j]), drafted=drafted
                )
                keys = rng.token_keys(torch.tensor([b]), torch.tensor([len(history) + j]), "draft")
                assert int(distribution.draw(keys)) == token
                assert draft.confidence is not None and draft.distributions is not None
                assert draft.confidence[j] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)
                assert torch.allclose(
                    torch.tensor(draft.distributions[j]).double(), distribution.dense(torch.tensor([0]))[0].double()
                )
        commit(drafter, rows, proposal)


def test_draft_model_has_no_distribution_where_every_row_is_greedy() -> None:
    drafter, rows = small_drafter(PrefixModel(seed=1)), rows_of([0])
    start(drafter, rows)
    assert propose(drafter, rows, [4]).distribution is None


def test_draft_model_runs_no_token_twice() -> None:
    model = PrefixModel(seed=1)
    drafter, rows = small_drafter(model, draft_tokens=4), rows_of([0])
    start(drafter, rows, chunk=8)
    assert model.passes == [8, 4]  # the prompt, chunk by chunk
    row, behind = rows[0], 1
    for accepted, plain in ((4, 0), (1, 0), (0, 3), (4, 0), (2, 0)):
        model.passes.clear()
        draft = propose(drafter, rows, [4]).tokens[0].tolist()
        assert model.passes == [behind, 1, 1, 1]
        observe(drafter, [[row.history[-1], *draft[:accepted]]], [len(row.history) - 1], [row])
        row.history += [*draft[:accepted], 0]
        for _ in range(plain):
            observe(drafter, [[row.history[-1]]], [len(row.history) - 1], [row])
            row.history.append(1)
        assert model.passes == [behind, 1, 1, 1], "observing a round runs nothing"
        behind = 1 + plain + (accepted == 4)


def test_draft_model_grows_its_memory_and_catches_up() -> None:
    expected = run(make("draft_model"), range(4))
    drafter = make("draft_model")
    rows = rows_of(range(4))
    start(drafter, rows[:1], capacity=30)
    start(drafter, rows[1:], capacity=400)  # one by one: more slots, then a larger capacity
    for step in range(2):
        proposal = propose(drafter, rows, LIMITS[step])
        for a, b in zip(drafts_of(proposal), expected[step], strict=True):
            same(a, b, f"round {step}")
        commit(drafter, rows, proposal)


def test_draft_model_catches_up_on_a_long_text_in_bounded_passes() -> None:
    model = PrefixModel(seed=1, max_positions=3000)
    drafter, row = small_drafter(model), Row(1, SamplingParams(), 1300)
    drafter.open(0, 2000)
    assert len(drafts_of(propose(drafter, [row], [2]))[0].tokens) == 2
    assert model.passes == [512, 512, 276, 1]


def test_draft_model_stops_at_the_end_of_its_context() -> None:
    model = PrefixModel(seed=1, max_positions=14)
    drafter, row = small_drafter(model), Row(1, SamplingParams(), 12)
    start(drafter, [row])
    assert len(row.history) == 13
    assert propose(drafter, [row], [4]).lengths.tolist() == [2]
    row.history += [1, 2]
    assert propose(drafter, [row], [4]).lengths.tolist() == [0]
    longer = Row(2, SamplingParams(), 40, slot=1)
    start(drafter, [longer])
    assert propose(drafter, [longer], [4]).lengths.tolist() == [0]


def test_draft_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(IncompatibleDrafter, match="vocabulary of 9 tokens.*one of 5"):
        small_drafter(PrefixModel(vocab_size=9))


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, True),
        ({"model_type": "qwen3"}, True),
        ({"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3"}, False),
        ({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}, False),
        ({}, False),
        ({"model_type": "qwen3", "dflash_config": {"mask_token_id": 1}}, False),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "draft_vocab_size": 32000}, False),
    ],
)
def test_draft_model_recognises_causal_models(config: dict[str, Any], known: bool) -> None:
    assert DraftModelDrafter.recognises(config) is known


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ngram", {"min_ngram": 0}, "1 <= min_ngram <= max_ngram"),
        ("ngram", {"min_ngram": 5, "max_ngram": 4}, "min_ngram 5 and max_ngram 4"),
        ("ngram", {"draft_tokens": 0}, "draft_tokens must be at least 1, got 0"),
        ("suffix", {"max_match": 0}, "max_match must be at least 1, got 0"),
        ("suffix", {"min_survival": 1.5}, "between 0 and 1, got 1.5"),
        ("suffix", {"stored_tokens": -1}, "at least 0, got -1"),
        ("draft_model", {"draft_tokens": 0}, "draft_tokens must be at least 1, got 0"),
        ("ngram", {"max_ngrm": 3}, "did you mean 'max_ngram'"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make(name, **options)
