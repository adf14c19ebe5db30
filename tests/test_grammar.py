"""Grammars: masks against parsers built anew, exact distributions by enumeration, drafts that are cut or forced."""

from __future__ import annotations

import json
import random
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from grammars import (
    LETTERS,
    MERGED,
    REGEX,
    TOKENS,
    allowed,
    grammars_of,
    is_valid,
    matcher_of,
    random_schema,
    tokenizer_of,
)

import outrider.sampling.grammar as grammar_module
from outrider import SamplingParams
from outrider.config import Grammar, Rule
from outrider.models.toy import ToyTarget
from outrider.sampling.distribution import Categorical, settled
from outrider.sampling.grammar import GrammarMatcher
from outrider.sampling.grammar_drafts import fit_drafts, to_draft
from outrider.sampling.processors import process
from outrider.sampling.rng import RowRng
from outrider.sampling.verification import (
    DraftRound,
    acceptance_probabilities,
    bonus_distribution,
    count_accepted,
    verify,
)
from outrider.types import Context, Proposal

# ------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_masks_along_drafts_are_those_of_a_parser_built_anew(seed: int, ends: bool) -> None:
    """Whatever was looked at before, in whatever order, and taken back."""
    rng = random.Random(seed)
    grammars = grammars_of([*LETTERS, *MERGED], ends)
    grammar = Grammar("json_schema", json.dumps(random_schema(rng)))
    matcher, committed, size = matcher_of(grammars, grammar), [], grammars.vocab_size
    for _ in range(60):
        if matcher.ended:
            break
        for _ in range(3):
            drafts: tuple[int, ...] = ()
            for _ in range(rng.randrange(5)):
                choices = allowed(matcher.mask(drafts), size)
                if choices and rng.random() < 0.9:
                    drafts += (rng.choice(sorted(choices)),)
                else:
                    drafts += (rng.randrange(size),)
            anew = matcher_of(grammars, grammar, committed)
            legal = all(anew.consume(token) and not anew.ended for token in drafts)
            assert allowed(matcher.mask(drafts), size) == (allowed(anew.mask(()), size) if legal else None)
        choices = sorted(allowed(matcher.mask(()), size) or ())
        token = rng.choice(choices)
        assert matcher.consume(token)
        committed.append(token)
    text = tokenizer_of([*LETTERS, *MERGED], ends).decode(committed)
    if matcher.ended:
        assert is_valid(json.loads(text), json.loads(grammar.text))


def test_a_forbidden_token_is_refused_and_the_text_goes_on() -> None:
    grammars = grammars_of(["a", "b", "c"])
    matcher = matcher_of(grammars, Grammar("regex", "ab+"))
    assert not matcher.consume(1) and matcher.failure is not None
    assert matcher.mask((0, 2)) is None and matcher.mask((0, 2, 1)) is None
    assert matcher.consume(0) and allowed(matcher.mask(()), 4) == {1}
    assert matcher.consume(1) and not matcher.ended
    assert allowed(matcher.mask(()), 4) == {1, 3} and matcher.mask((3,)) is None
    assert matcher.consume(3) and matcher.ended, "the end of the text is a token of this vocabulary"


def test_a_grammar_is_not_used_up_by_earlier_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """llguidance's lexer is shared by all requests of a grammar, and its limit with it."""
    monkeypatch.setattr(grammar_module, "_LEXER_STATES", 1500)
    grammars = grammars_of(["a", "b"])
    grammar = Grammar("regex", "(a|b)*a(a|b){30}c?")
    for seed in range(4):
        rng, matcher = random.Random(seed), matcher_of(grammars, grammar)
        for _ in range(600):
            for drafts in ((), (0,), (0, 1)):
                assert {0, 1} <= (allowed(matcher.mask(drafts), 3) or set())
            assert matcher.consume(rng.randrange(2))


def test_the_end_of_a_grammar_is_known_without_a_token_for_it() -> None:
    matcher = matcher_of(grammars_of(["a", "b"], ends=False), Grammar("regex", "ab"))
    assert matcher.mask((0, 1)) is None
    assert matcher.consume(0) and not matcher.ended and matcher.consume(1) and matcher.ended


# ------------------------------------------------------------------------------------------------ exact distributions

K, V = 2, len(TOKENS)
PROMPT = [3]


class World:
    """Random logits for each prefix of new tokens, of a target and of a drafter, and the grammar over them."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.prefixes = [p for n in range(K + 1) for p in product(range(V), repeat=n)]
        self.target, self.draft = torch.randn(2, len(self.prefixes), V, generator=generator, dtype=torch.float64) * 1.5
        self.grammars = grammars_of(TOKENS, ends=False)

    def rows(
        self, table: torch.Tensor, draft: tuple[int, ...], count: int, masked: bool, params: SamplingParams
    ) -> Any:
        """The processed distributions after 0, 1, ... drafts, as the engine asks for them."""
        logits = table[[self.prefixes.index(draft[:j]) for j in range(count)]]
        context = self.context(masked, params)
        zeros = torch.zeros(count, dtype=torch.int64)
        return process(logits, context, zeros, torch.arange(count), drafted=torch.tensor([draft or (0,)]))

    def context(self, masked: bool, params: SamplingParams) -> Context:
        matcher = GrammarMatcher(self.grammars, params)
        return Context([params], [PROMPT], [len(PROMPT)], [(matcher,)] if masked else None)

    def plain(self, params: SamplingParams) -> np.ndarray:
        """[V] * (K + 1): the next K + 1 tokens of plain decoding under the grammar."""
        out = np.ones([V] * (K + 1))
        for n in range(K + 1):
            for prefix in product(range(V), repeat=n):
                matcher = matcher_of(self.grammars, REGEX)
                if not all(map(matcher.consume, prefix)):
                    out[prefix] = 0
                    continue
                history = [*PROMPT, *prefix]
                context = Context([params], [history], [len(PROMPT)], [(matcher,)])
                row = process(self.target[[self.prefixes.index(prefix)]], context).dense(torch.tensor([0]))
                out[prefix] *= row.numpy().reshape([V] + [1] * (K - n))
        return out


def output_distribution(
    world: World,
    params: SamplingParams,
    *,
    mask_drafts: bool = True,
    cut_sampled: bool = False,
    misstated: bool = False,
) -> np.ndarray:
    """[V] * (K + 1): the exact distribution of the next K + 1 tokens after a round of every possible draft."""
    out, plain = np.zeros([V] * (K + 1)), world.plain(params)

    def finish(prefix: tuple[int, ...], weight: float) -> None:
        known = plain[prefix].sum()
        if weight > 0:
            out[prefix] += weight * (plain[prefix] / known if len(prefix) <= K else 1.0)

    for draft in product(range(V), repeat=K):
        drawn = settled(world.rows(world.draft, draft, K, mask_drafts, params))
        weight = float(drawn.at(torch.tensor(draft)).prod())
        if weight == 0:
            continue
        told = settled(world.rows(world.draft, draft, K, not mask_drafts, params)) if misstated else drawn
        proposal = Proposal(torch.tensor([draft]), torch.tensor([K]), told)
        matcher = GrammarMatcher(world.grammars, params)
        proposal = fit_drafts(proposal, [matcher], [K], world.context(True, params))
        kept = proposal.tokens[0, : int(proposal.lengths[0])].tolist()
        if cut_sampled:
            legal = [j for j in range(len(kept)) if not matcher.allows(tuple(kept[:j]), kept[j])]
            kept = kept[: legal[0]] if legal else kept
        keep = [len(kept)]
        target = world.rows(world.target, draft, len(kept) + 1, True, params)
        if params.effective_rule == "rejection" or params.effective_rule == "block":
            round = DraftRound.of(target, proposal, keep)
            chances = acceptance_probabilities(round, np.array([params.effective_rule == "block"]))
            a = chances.probability
            for pattern in product([True, False], repeat=a.shape[1]):
                passes = np.array([pattern], bool)
                chance = np.where(passes, a, 1 - a).prod()
                if chance:
                    accepted = count_accepted(chances, np.where(passes, a / 2, (1 + a) / 2))
                    bonus = bonus_distribution(round, chances, accepted).dense(torch.tensor([0])).numpy()[0]
                    for token in range(V):
                        finish((*kept[: accepted[0]], token), weight * chance * bonus[token])
    return out


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.8}, {"logit_bias": ((0, -1.0), (2, 1.0))}])
def test_the_masked_distribution_is_kept_exactly(rule: Rule, options: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, "rule": rule, "grammar": REGEX, **options})
    for seed in range(2):
        world = World(seed)
        want = world.plain(params)
        assert want.sum() == pytest.approx(1, abs=1e-12) and 0 < (want > 0).sum() < V ** (K + 1)
        for mask_drafts in (True, False):  # a drafter that knows no grammar is lossless too, if it says what it drew
            found = output_distribution(world, params, mask_drafts=mask_drafts)
            assert np.abs(found - want).max() < 1e-12, mask_drafts


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_the_enumeration_catches_what_would_change_the_distribution(rule: Rule) -> None:
    """A mask on the target alone with drafts cut where they break it, and a distribution of drafts that lacks the
    mask they were drawn under."""
    params = SamplingParams(temperature=1.0, rule=rule, grammar=REGEX)
    world = World(0)
    want = world.plain(params)
    cut = output_distribution(world, params, mask_drafts=False, cut_sampled=True)
    assert np.abs(cut - want).sum() / 2 > 1e-3
    misstated = output_distribution(world, params, misstated=True)
    assert np.abs(misstated - want).sum() / 2 > 1e-3


# ------------------------------------------------------------------------------------------------ forced drafts


def proposal_of(drafts: list[int], sampled: bool) -> Proposal:
    tokens = torch.tensor([drafts], dtype=torch.int64)
    distribution = Categorical.of(torch.zeros(len(drafts), V)) if sampled else None
    return Proposal(tokens, torch.tensor([len(drafts)]), distribution, torch.full((1, len(drafts)), 0.5))


@pytest.mark.parametrize(
    ("rule", "sampled", "drafts", "tokens", "sureness"),
    [
        ("block", False, [0, 0], [0, 1], [0.5, 1.0]),  # "b" must follow "a"; then "a", "b", "ab" and "c" may
        ("coupled", True, [0, 0], [0, 1], [0.5, 1.0]),
        ("block", True, [0, 0], [0, 0], [0.5, 0.5]),  # sampled: not cut for what was sampled,
        ("block", True, [0, 0, 1], [0, 0], [0.5, 0.5]),  # but behind it
        ("block", True, [0, 1], [0, 1], [0.5, 1.0]),
        ("block", False, [], [], []),
    ],
)
def test_drafts_are_cut_and_forced_as_their_rule_allows(
    rule: Rule, sampled: bool, drafts: list[int], tokens: list[int], sureness: list[float]
) -> None:
    params = SamplingParams(temperature=1.0, rule=rule, grammar=REGEX)
    matcher = GrammarMatcher(World(0).grammars, params)
    found = fit_drafts(proposal_of(drafts, sampled), [matcher], [4], Context([params], [PROMPT], [1]))
    kept = int(found.lengths[0])
    assert found.tokens[0, :kept].tolist() == tokens
    assert found.confidence is not None and found.confidence[0, :kept].tolist() == sureness


def test_rows_that_are_forced_need_no_drafter_and_say_where_their_drafts_came_from() -> None:
    grammars = grammars_of(["a", "b", "c"])
    forced = SamplingParams(temperature=1.0, rule="block", grammar=Grammar("regex", "abcab[abc]*"))
    free = SamplingParams(temperature=1.0, rule="block")
    matchers = [GrammarMatcher(grammars, forced), None, GrammarMatcher(grammars, forced)]
    assert to_draft(matchers, [3, 3, 9]) == [0, 3, 9]
    tokens = torch.tensor([[0, 0, 0], [2, 1, 0], [0, 0, 0]])
    drawn = Categorical.of(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    proposal = Proposal(tokens, torch.tensor([0, 3, 0]), drawn, torch.full((3, 3), 0.5))
    context = Context([forced, free, forced], [[0]] * 3, [1] * 3)
    found = fit_drafts(proposal, matchers, [3, 3, 4], context)
    assert found.lengths.tolist() == [3, 3, 4]
    assert found.tokens.tolist() == [[0, 1, 2, 0], [2, 1, 0, 0], [0, 1, 2, 0]]
    assert isinstance(found.distribution, Categorical)
    probabilities = found.distribution.dense(torch.arange(12)).view(3, 4, 4)
    assert torch.equal(probabilities[1, :3], drawn.dense(torch.arange(3, 6)))
    for b, n in ((0, 3), (2, 4)):
        assert torch.equal(probabilities[b, :n], torch.eye(4)[found.tokens[b, :n]])


@pytest.mark.parametrize("rule", ["rejection", "block", "coupled"])
def test_the_core_verifies_masked_logits_as_the_rules_do(rule: Rule) -> None:
    """float32 on the CPU, which the compiled core takes where it is there: forced drafts and drawn ones."""
    grammars = grammars_of([*LETTERS, *MERGED])
    size = grammars.vocab_size
    params = SamplingParams(temperature=0.9, top_p=0.95, rule=rule, grammar=Grammar("json_object"))
    backend = ToyTarget(torch.zeros(2, 2)).backend
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        draft, target = torch.randn(2, 5, size, generator=generator) * 2
        context = Context([params], [[0]], [1], [(GrammarMatcher(grammars, params),)])
        rng, zero = RowRng([seed], [0], [rule]), torch.zeros(1, dtype=torch.int64)
        tokens, steps = torch.zeros(1, 4, dtype=torch.int64), []
        for j in range(4):
            steps.append(process(draft[[j]], context, zero, zero + j, drafted=tokens))
            tokens[0, j] = backend.sample(steps[-1], rng.token_keys(zero, zero + 1 + j, "draft"))
        proposal = Proposal(tokens, torch.tensor([4]), Categorical.stack(steps))
        rows = process(target, context, torch.zeros(5, dtype=torch.int64), torch.arange(5), drafted=tokens)
        one = backend.verify(rows, proposal, [4], context, rng)
        two = verify(rows, proposal, [4], context, rng)
        assert one.accepted.tolist() == two.accepted.tolist()
        kept = int(one.lengths[0])
        assert one.tokens[0, :kept].tolist() == two.tokens[0, :kept].tolist()
        matcher = matcher_of(grammars, Grammar("json_object"))
        assert all(matcher.ended or matcher.consume(token) for token in one.tokens[0, :kept].tolist())
