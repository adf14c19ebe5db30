"""Grammars: masks against parsers built anew, exact distributions by enumeration, texts with and without drafts."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import interrupted_runs
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from trained import DESIGNS, VOCABULARY, make_checkpoint, make_target
from typer.testing import CliRunner

import outrider.sampling.grammar as grammar_module
from outrider import LLM, SamplingParams
from outrider.backends.reference import ReferenceBackend
from outrider.cli import app
from outrider.config import Grammar, Rule, build
from outrider.engine.engine import Engine
from outrider.errors import InvalidRequest
from outrider.models.toy import ToyTarget
from outrider.registry import find
from outrider.sampling.distribution import Categorical, settled
from outrider.sampling.grammar import GrammarMatcher, Grammars
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
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import Context, Proposal

END = "<end>"
LETTERS = ["{", "}", "[", "]", '"', ":", ",", ".", "-", " ", "\n", *"0123456789", *"abcdefghijklmnopqrstuvwxyz"]
MERGED = ['{"', '":', '",', "tr", "fa", "nu", "ab", "en", "ame", "12", "1.", '"a', "se"]


def tokenizer_of(tokens: Sequence[str], ends: bool = True) -> Tokenizer:
    """A byte-level tokenizer of exactly these tokens; the last id is the end, if there is one."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = ["".join(piece for piece, _ in byte_level.pre_tokenize_str(token)) for token in tokens]
    fast = FastTokenizer(models.BPE(vocab={token: i for i, token in enumerate(written)}, merges=[]))
    fast.pre_tokenizer, fast.decoder = byte_level, decoders.ByteLevel()
    if ends:
        fast.add_special_tokens([AddedToken(END, special=True)])
    return Tokenizer(Path("."), fast, {"eos_token": END} if ends else {})


def grammars_of(tokens: Sequence[str], ends: bool = True) -> Grammars:
    tokenizer = tokenizer_of(tokens, ends)
    size = len(tokens) + ends
    return Grammars(lambda: tokenizer.definition, size, (len(tokens),) if ends else ())


def matcher_of(grammars: Grammars, grammar: Grammar, committed: Sequence[int] = (), **options: Any) -> GrammarMatcher:
    matcher = GrammarMatcher(grammars, SamplingParams(grammar=grammar, **options))
    assert all(map(matcher.consume, committed))
    return matcher


def allowed(mask: np.ndarray | None, size: int) -> set[int] | None:
    return None if mask is None else {t for t in range(size) if mask[t // 32] >> (t % 32) & 1}


# ------------------------------------------------------------------------------------------------ random schemas


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema all of whose texts are short."""
    kinds = ["integer", "string", "enum", "boolean", "null"] + (["object", "array"] if depth < 2 else [])
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "integer":
        low = rng.randrange(-20, 20)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 900)}
    if kind == "string":
        return (
            {"type": "string", "maxLength": rng.randrange(1, 6), "pattern": "^[a-z ]*$"}
            if rng.random() < 0.3
            else {
                "type": "string",
                "maxLength": rng.randrange(0, 6),
            }
        )
    if kind == "enum":
        return {"enum": rng.sample(["abc", "ab", "b", 12, 7, None, True, "new name"], rng.randrange(1, 4))}
    if kind == "array":
        low = rng.randrange(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 2}
    if kind == "object":
        names = rng.sample(["a", "ab", "name", "x1", "long name"], rng.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        fits = isinstance(value, str) and len(value) <= schema["maxLength"]
        return fits and re.fullmatch(schema.get("pattern", "(?s).*"), value) is not None
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(is_valid(one, schema["items"]) for one in value)
    if kind == "object":
        parts = schema["properties"]
        fits = isinstance(value, dict) and set(schema["required"]) <= value.keys() <= parts.keys()
        return fits and all(is_valid(one, parts[name]) for name, one in value.items())
    return {"boolean": type(value) is bool, "null": value is None}[kind]


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

TOKENS, K = ["a", "b", "ab", "c"], 2
V = len(TOKENS)
REGEX = Grammar("regex", "(ab|ba|c)*")
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


# ------------------------------------------------------------------------------------------------ whole texts


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 0.9, "seed": 5},
    "penalised": {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.2, "top_k": 20},
    "block": {"temperature": 1.0, "rule": "block"},
    "rejection": {"temperature": 1.0, "rule": "rejection"},
}


@pytest.fixture(scope="module")
def llms() -> dict[str, LLM]:
    """The packaged target and drafters."""
    first = LLM(drafter="none", dtype="float32")
    return {"none": first, **{name: first.with_drafter(name) for name in ("ngram", "suffix", "draft_model")}}


def answers(llm: LLM, schemas: list[dict[str, Any]], tokens: int, **options: Any) -> list[Any]:
    prompts = [f"A record of kind {i}, as JSON:\n" for i in range(len(schemas))]
    params = [
        SamplingParams(max_tokens=tokens, grammar=Grammar("json_schema", json.dumps(schema)), **options)
        for schema in schemas
    ]
    found = llm.generate(prompts, params)
    for one, schema in zip(found, schemas, strict=True):
        if one.finish_reason == "stop":
            assert is_valid(json.loads(one.text), schema), (one.text, schema)
    return found


@pytest.mark.parametrize("sampling", SAMPLING)
def test_texts_are_valid_and_those_of_plain_decoding(sampling: str, llms: dict[str, LLM]) -> None:
    rng = random.Random(1)
    schemas, options = [random_schema(rng) for _ in range(6)], SAMPLING[sampling]
    plain = answers(llms["none"], schemas, 60, **options)
    assert any(one.finish_reason == "stop" for one in plain)
    for name in ("ngram", "suffix", "draft_model"):
        found = answers(llms[name], schemas, 60, **options)
        assert sum(one.stats.accepted for one in found) > 0
        if sampling not in ("block", "rejection"):
            assert [one.token_ids for one in found] == [one.token_ids for one in plain], name


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLING)
def test_many_schemas(sampling: str, llms: dict[str, LLM]) -> None:
    rng = random.Random(2)
    schemas = [random_schema(rng) for _ in range(100)]
    plain = answers(llms["none"], schemas, 120, **SAMPLING[sampling])
    found = answers(llms["draft_model"], schemas, 120, **SAMPLING[sampling])
    if sampling not in ("block", "rejection"):
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]


def engine_of(target: Any, drafter: Any, tokenizer: Tokenizer) -> Engine:
    kind = find("policy", "fixed")
    policy = kind.from_config(build(kind.Config, {"draft_tokens": max(1, drafter.block)}, "policy"))
    return Engine(target, drafter, policy, max_rows=3, capacity=128, chunk=32, tokenizer=tokenizer)


def ngram(drafts: int) -> Any:
    kind = find("drafter", "ngram")
    return kind.from_config(build(kind.Config, {"draft_tokens": drafts, "min_ngram": 1}, "drafter"), None)


def finished(engine: Engine, wanted: Sequence[SamplingParams]) -> list[Any]:
    requests = [engine.submit([1 + i, 2, 3], params, params.seed or 0, i) for i, params in enumerate(wanted)]
    engine.wait(requests)
    return requests


@pytest.mark.parametrize("name", DESIGNS)
def test_trained_drafters_draft_under_the_mask(name: str) -> None:
    """Some draft from 30 tokens of 64, which the mask may all forbid. Rows without a grammar share the steps."""
    target, tokenizer = (
        make_target(dtype=torch.float64),
        tokenizer_of([*LETTERS, *MERGED, "q_"] + list("ABC"), ends=False),
    )
    assert tokenizer.vocab_size == VOCABULARY
    drafted = 30 if name in ("vanilla", "eagle3") else VOCABULARY
    checkpoint = make_checkpoint(DESIGNS[name], target=target, drafted=drafted)
    kind = find("drafter", checkpoint.kind)
    drafter = kind(checkpoint, target, ReferenceBackend(), config=kind.Config(""), dtype=torch.float64, max_rows=3)
    none = find("drafter", "none")
    rng = random.Random(4)
    for options in ({}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.0, "rule": "block"}):
        grammars = [Grammar("json_schema", json.dumps(random_schema(rng))) for _ in range(2)] + [None]
        wanted = [SamplingParams(max_tokens=30, grammar=grammar, **options) for grammar in grammars]
        found = finished(engine_of(target, drafter, tokenizer), wanted)
        if "rule" not in options:
            plain = finished(engine_of(target, none.from_config(none.Config(), target), tokenizer), wanted)
            assert [r.output for r in found] == [r.output for r in plain]
        for request, grammar in zip(found, grammars, strict=True):
            if grammar is not None and request.finish_reason == "stop":
                assert is_valid(json.loads(request.text), json.loads(grammar.text))
        drafter.reset_rows()


def test_forced_tokens_are_accepted_and_the_end_ends_the_text(llms: dict[str, LLM]) -> None:
    text = "the answer is forty-two, and no other."
    for options in ({"temperature": 0.7}, {"temperature": 0.7, "ignore_eos": True}, {}):
        grammar = Grammar("regex", re.escape(text).replace("\\ ", " "))
        params = SamplingParams(max_tokens=60, grammar=grammar, **options)
        for name in ("ngram", "draft_model"):
            one = llms[name].generate("Well,", params)[0]
            assert (one.text, one.finish_reason) == (text, "stop")
            assert one.stats.accepted == one.stats.drafted > 0
            assert one.stats.rounds < len(one.token_ids) / 2
    cut = llms["ngram"].generate("Well,", SamplingParams(max_tokens=4, grammar=grammar))[0]
    assert cut.finish_reason == "length" and len(cut.token_ids) == 4 and text.startswith(cut.text)
    stopped = llms["ngram"].generate("Well,", SamplingParams(max_tokens=60, grammar=grammar, stop=("forty",)))[0]
    assert (stopped.text, stopped.finish_reason) == ("the answer is ", "stop")


@pytest.mark.parametrize("prefix", [True, False])
def test_vocabularies_with_pieces_and_bytes(prefix: bool) -> None:
    """Of the SentencePiece kind, with byte tokens; Llama 2's puts a space before every text."""
    pieces = [
        "\u2581",
        *"abchelo",
        "\u2581a",
        "\u2581b",
        "he",
        "ll",
        "hell",
        "\u2581hell",
        "\u2581hello",
        "hello",
        "lo",
    ]
    vocabulary = ["<unk>", END, *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    merged = [("\u2581", "a"), ("\u2581", "b"), ("h", "e"), ("l", "l"), ("he", "ll"), ("\u2581", "hell"), ("hell", "o")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [*merged, ("\u2581hell", "o"), ("l", "o")]
    fast = FastTokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("\u2581")] * prefix + [normalizers.Replace(" ", "\u2581")]
    fast.normalizer = normalizers.Sequence(spaces)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(END, special=True)])
    tokenizer = Tokenizer(Path("."), fast, {"eos_token": END})
    table = torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    engine = engine_of(ToyTarget(table, eos_token_ids=(1,)), ngram(4), tokenizer)
    for regex in ("hello a b[.]", r" hello\n(a|b| c){3} é hello", "(hello|a) hello"):
        for seed in range(4):
            params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, grammar=Grammar("regex", regex))
            request = engine.submit(tokenizer.encode("a b"), params, seed, 0)
            engine.wait([request])
            assert request.finish_reason == "stop" and re.fullmatch(regex, request.text), request.text


def test_streams_and_neighbours(llms: dict[str, LLM]) -> None:
    params = SamplingParams(max_tokens=40, grammar=Grammar("regex", "[a-z]{3} [0-9]{2}"), temperature=1.0, seed=2)
    events = list(llms["suffix"].stream("x", params))
    assert re.fullmatch("[a-z]{3} [0-9]{2}", "".join(event.text for event in events))
    assert events[-1].finish_reason == "stop"
    alone = llms["suffix"].generate("def f(", SamplingParams(max_tokens=20))[0].token_ids
    both = llms["suffix"].generate(["def f(", "x"], [SamplingParams(max_tokens=20), params])
    assert both[0].token_ids == alone and both[1].text == "".join(event.text for event in events)


# ------------------------------------------------------------------------------------------------ interrupts, failures


def toy_engine(tokens: Sequence[str], drafts: int = 3, ends: bool = True) -> Engine:
    size = len(tokens) + ends
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = ToyTarget(table, eos_token_ids=(len(tokens),) if ends else ())
    return engine_of(target, ngram(drafts), tokenizer_of(tokens, ends))


@pytest.mark.parametrize("stride", [97, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_leaves_the_same_texts(stride: int) -> None:
    wanted = [
        SamplingParams(max_tokens=14, temperature=1.0, seed=9, grammar=Grammar("regex", regex))
        for regex in ("(ab|c){4,9}", "abcab[abc]+")
    ]
    expected = [r.output for r in finished(toy_engine("abc"), wanted)]

    def begin() -> tuple[Engine, list[Any]]:
        engine = toy_engine("abc")
        return engine, [engine.submit([1 + i, 2, 3], params, 9, i) for i, params in enumerate(wanted)]

    for line, engine, requests in interrupted_runs(begin, 4, stride, lines=1000):
        engine.wait(requests)
        assert [r.output for r in requests] == expected, f"interrupted at line {line}"


def test_preempted_rows_go_on_in_their_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [SamplingParams(max_tokens=14, temperature=1.0, seed=9, grammar=Grammar("regex", "(ab|c){4,9}"))] * 2
    expected = [r.output for r in finished(toy_engine("abc"), wanted)]
    engine = toy_engine("abc")
    requests = [engine.submit([1 + i, 2, 3], params, 9, i) for i, params in enumerate(wanted)]
    for _ in range(3):
        engine.step()
        engine._preempt(engine.admission.running[-1])
    engine.wait(requests)
    assert [r.output for r in requests] == expected


@pytest.mark.parametrize("drafts", [1, 4])
def test_a_grammar_that_cannot_go_on_fails_its_request_alone(drafts: int) -> None:
    """The vocabulary has no token for "x"; or a bias forbids what the grammar asks for."""
    engine = toy_engine("abc", drafts)
    good = SamplingParams(max_tokens=6, grammar=Grammar("regex", "(ab)+c"))
    for bad in (
        SamplingParams(max_tokens=6, grammar=Grammar("regex", "abx")),
        SamplingParams(max_tokens=6, grammar=Grammar("regex", "abc"), logit_bias=((2, float("-inf")),)),
    ):
        requests = [engine.submit([1, 2], params, 0, i) for i, params in enumerate([good, bad, good])]
        with pytest.raises(InvalidRequest, match="token"):
            engine.wait(requests)
        engine.wait([requests[0], requests[2]])
        assert requests[1].finish_reason == "error" and requests[1].output == [0, 1]
        assert requests[0].output == requests[2].output
    assert not engine.busy


HOSTILE = {
    "not a regex": Grammar("regex", "(a"),
    "look-around": Grammar("regex", "(?=a)b"),
    "deep regex": Grammar("regex", "(" * 40_000 + "a" + ")" * 40_000),
    "matches nothing": Grammar("regex", r"[^\x00-\x{10ffff}]"),
    "large repetition": Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "many dots": Grammar("regex", ".*" * 200 + "a.{500}b"),
    "deep schema": Grammar("json_schema", '{"items":' * 400 + "{}" + "}" * 400),
    "no such type": Grammar("json_schema", '{"type": "strin"}'),
    "unknown keyword": Grammar("json_schema", '{"not": {}}'),
    "remote": Grammar("json_schema", '{"$ref": "http://127.0.0.1:9/x.json"}'),
    "file": Grammar("json_schema", '{"$ref": "file:///etc/hostname"}'),
    "circle": Grammar("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
    "product": Grammar(
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(12)]}
        ),
    ),
    "long string": Grammar("json_schema", '{"type": "string", "minLength": 1000000}'),
    "many branches": Grammar(
        "json_schema",
        json.dumps({"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"} for j in range(20)}} for i in range(90)]}),
    ),
    "not lark": Grammar("lark", "start: undefined"),
    "deep lark": Grammar("lark", "start: " + "(" * 40_000 + '"a"' + ")" * 40_000),
    "endless lark": Grammar("lark", "start: start"),
    "ambiguous lark": Grammar("lark", 'start: start start | "a" | "aa"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(name: str, llms: dict[str, LLM]) -> None:
    """One InvalidRequest, or a text; soon."""
    began = time.perf_counter()
    try:
        one = llms["ngram"].generate(
            "x", SamplingParams(max_tokens=12, temperature=1.0, seed=1, grammar=HOSTILE[name])
        )[0]
        assert one.finish_reason in ("stop", "length")
    except InvalidRequest as error:
        assert 20 < len(str(error)) < 500
    assert time.perf_counter() - began < 3
    assert not llms["ngram"].engine.busy


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("json",), "kind"),
        (("json_object", "{}"), "no text"),
        (("json_schema", "[]"), "object"),
        (("json_schema", "{"), "JSON"),
        (("json_schema", "[" * 99_999), "nested"),
        (("regex", ""), "empty"),
        (("regex", b"a"), "string"),
        (("lark", "x" * 100_001), "characters"),
    ],
)
def test_what_is_no_grammar_is_refused(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        Grammar(*arguments)


def test_what_cannot_have_a_grammar_says_so() -> None:
    with pytest.raises(InvalidRequest, match="Grammar"):
        SamplingParams(grammar="{}")  # type: ignore[arg-type]
    engine = toy_engine("abc")
    engine_without = Engine(engine.target, engine.drafter, engine.policy, max_rows=1, capacity=16)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        engine_without.submit([1], SamplingParams(grammar=REGEX), 0)
    word_level = FastTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(InvalidRequest, match="bytes"):
        Grammars(word_level.to_str, 2, ()).check(REGEX)


def test_the_command_line_takes_a_schema_and_an_expression(tmp_path: Path) -> None:
    def generate(*options: object) -> Any:
        return CliRunner().invoke(
            app, ["generate", "x", "--drafter", "ngram", "--max-tokens", "40", *map(str, options)]
        )

    schema = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    result = generate("--json-schema", tmp_path / "schema.json")
    assert result.exit_code == 0 and json.loads(result.stdout)["a"] in ("b", "c"), result.output
    result = generate("--regex", "[0-9]{4}-[0-9]{2}")
    assert result.exit_code == 0 and re.fullmatch(r"\d{4}-\d\d\n", result.stdout), result.output
    for wrong in (["--json-schema", tmp_path / "none.json"], ["--regex", "(a"], ["--regex", "a", "--json-schema", "b"]):
        result = generate(*wrong)
        assert result.exit_code == 2 and len(result.stderr.strip()) < 700, result.output
