"""Drafters and policies that fail or step aside, and several drafters at once: texts stay what they are."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import DRAFT_TABLE, PROMPTS, TABLE, MarkovDrafter, engine, run
from torch import Tensor
from typer.testing import CliRunner

from outrider import LLM, SamplingParams
from outrider.cli import app
from outrider.config import Rule
from outrider.drafters.base import SeveralDrafters
from outrider.engine.engine import Engine
from outrider.engine.rows import Rows
from outrider.errors import InvalidRequest
from outrider.evaluation.synthetic_drafter import SyntheticDrafter
from outrider.models.toy import ToyTarget
from outrider.sampling.distribution import Categorical
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.types import Context, Proposal, RaggedBatch, SharesPrefixes, StepCost, StepRecord, StepView, Values

VOCABULARY = 400  # of the tiny model, at least
PARAMS = SamplingParams(max_tokens=24, temperature=1.0, seed=5)


class Failing(MarkovDrafter):
    """Raises in one of its methods, from the third call on, or on the row of one prompt."""

    def __init__(self, method: str, prompt: int | None = None) -> None:
        super().__init__(DRAFT_TABLE, 3)
        self.method, self.prompt, self.calls, self.drafted = method, prompt, 0, 0

    def _call(self, method: str) -> None:
        self.calls += method == self.method
        if method == self.method and self.calls > 2:
            raise ArithmeticError("no such number")

    def open(self, slot: int, capacity: int) -> None:
        self._call("open")
        super().open(slot, capacity)

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
        if self.prompt is None:
            self._call("propose")
        elif any(n and row[0] == self.prompt for n, row in zip(limit, context.history, strict=False)):
            raise ArithmeticError("not this row")
        proposal = super().propose(slots, last, context, limit, rng)
        self.drafted += int(proposal.lengths.sum())
        return proposal

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        self._call("observe")
        super().observe(batch, features, hidden)

    def close(self, slot: int) -> None:
        super().close(slot)
        self._call("close")


@pytest.mark.parametrize("method", ["open", "propose", "observe", "close"])
def test_a_drafter_that_raises_costs_drafts_alone(method: str) -> None:
    plain = run(engine(0), PROMPTS, PARAMS)
    loop = engine(3, drafter=Failing(method))
    with pytest.warns(RuntimeWarning, match="drafter Failing failed: ArithmeticError: no such number") as said:
        assert run(loop, PROMPTS, PARAMS) == plain
    assert len(said) == 1, "one warning, whatever follows"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(loop, PROMPTS, PARAMS) == plain  # and the engine goes on


def test_only_the_row_concerned_goes_on_without_drafts() -> None:
    drafter = Failing("propose", prompt=4)
    with pytest.warns(RuntimeWarning, match="not this row"):
        outputs = run(engine(3, drafter=drafter), PROMPTS, PARAMS)
    assert outputs == run(engine(0), PROMPTS, PARAMS)
    assert drafter.drafted > 40, "the other rows were drafted for"


class StatesNoNumber(MarkovDrafter):
    """States NaN for some drafts of one prompt's row."""

    def __init__(self, depth: int) -> None:
        super().__init__(DRAFT_TABLE, 3)
        self.depth = depth

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
        drafted = super().propose(slots, last, context, limit, rng)
        assert drafted.distribution is not None
        stated = drafted.distribution.dense(torch.arange(len(slots) * drafted.width)).clone()
        for b, history in enumerate(context.history[: len(slots)]):
            if history[0] == PROMPTS[1][0]:
                stated[b * drafted.width + self.depth : (b + 1) * drafted.width] = torch.nan
        return Proposal(drafted.tokens, drafted.lengths, Categorical(stated.shape[1], probabilities=stated))


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("depth", [0, 1])
def test_probabilities_that_are_no_numbers_cost_the_drafts_of_their_row_alone(rule: Rule, depth: int) -> None:
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=5, rule=rule)
    sound = run(engine(3), PROMPTS, params)
    with pytest.warns(RuntimeWarning, match="the drafter's logits hold NaN or infinity"):
        texts = run(engine(3, drafter=StatesNoNumber(depth)), PROMPTS, params)
    assert texts[0] == sound[0] and texts[2] == sound[2], "the rows beside it keep their drafts, so their texts"
    assert all(len(text) == 24 for text in texts)


def test_a_target_and_a_drafter_that_give_no_numbers_in_one_step_fail_the_targets_row_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = ToyTarget(TABLE)
    loop = Engine(target, StatesNoNumber(0), FixedPolicy(FixedConfig(3)), max_rows=3, capacity=64)
    params = SamplingParams(max_tokens=24, temperature=1.0, rule="rejection")
    requests = [loop.submit(prompt, params, 5) for prompt in (PROMPTS[1], [3])]
    loop.step()
    forward = target.forward

    def broken(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        output.logits[-4:] = torch.nan  # of the last row: three drafts
        return output

    monkeypatch.setattr(target, "forward", broken)
    with pytest.warns(RuntimeWarning, match="the drafter's logits hold NaN or infinity"):
        loop.step()
    assert [request.finish_reason for request in requests] == [None, "error"]


class FailingPolicy(FixedPolicy):
    def __init__(self, method: str) -> None:
        super().__init__(FixedConfig(3))
        self.method, self.calls = method, 0

    def _call(self, method: str) -> None:
        self.calls += method == self.method
        if method == self.method and self.calls > 2:
            raise KeyError("lost")

    def plan(self, step: StepView) -> list[int]:
        self._call("plan")
        return super().plan(step)

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        self._call("choose")
        return super().choose(confidence, lengths)

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        self._call("observe")


@pytest.mark.parametrize("method", ["plan", "choose", "observe"])
def test_a_policy_that_raises_costs_drafts_alone(method: str) -> None:
    loop = engine(3)
    loop.policy = FailingPolicy(method)
    with pytest.warns(RuntimeWarning, match="policy FailingPolicy failed: KeyError: 'lost'; decoding goes on"):
        assert run(loop, PROMPTS, PARAMS) == run(engine(0), PROMPTS, PARAMS)


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(MarkovDrafter):
        def propose(self, *args: object) -> Proposal:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(engine(2, drafter=Interrupted(DRAFT_TABLE, 2)), [[0]], PARAMS)


# ------------------------------------------------------------------------------------------ stepping aside


class Moody(FixedPolicy):
    """Steps aside for some steps of every ten."""

    def __init__(self, away: int) -> None:
        super().__init__(FixedConfig(3))
        self.away, self.turn = away, 0

    @property
    def follows(self) -> bool:
        return self.turn % 10 >= self.away

    def plan(self, step: StepView) -> list[int]:
        self.turn += 1
        return super().plan(step)


class Records:
    def __init__(self) -> None:
        self.drafted: list[int] = []

    def step(self, record: StepRecord) -> None:
        self.drafted.append(sum(row.drafted for row in record.rows))


@pytest.mark.parametrize("away", [0, 3, 7, 10])
@pytest.mark.parametrize("chunk", [2, 16])
def test_a_drafter_that_reads_tokens_takes_rows_up_again(away: int, chunk: int) -> None:
    """``MarkovDrafter`` asserts that it is shown every committed token once and in order, and no other."""
    loop = engine(3, chunk=chunk)
    loop.policy, seen = Moody(away), Records()
    loop.observers.append(seen)
    assert run(loop, PROMPTS, PARAMS) == run(engine(0), PROMPTS, PARAMS)
    assert loop.drafter.seen == {}  # type: ignore[attr-defined]
    assert (sum(seen.drafted) > 0) == (away < 10)
    assert (0 in seen.drafted[8:]) or away == 0


class ReadsFeatures:
    """Drafts wrong tokens, and asserts that it gets features of a row's every token or none at all."""

    aux_layers = (0,)
    block = 2

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.proposed: list[int] = []

    def open(self, slot: int, capacity: int) -> None:
        assert slot not in self.held
        self.held[slot] = 0

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
        for b, slot in enumerate(slots):
            assert self.held[slot] == len(context.history[b]) - 1
        self.proposed.append(len(slots))
        return Proposal.pack(
            [[(one + 1) % 7] * n for one, n in zip(last, limit, strict=True)], [[0.5] * n for n in limit]
        )

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        assert features is not None and len(features) == len(batch.tokens)
        first = batch.offsets.tolist()
        for b, slot in enumerate(batch.slots.tolist()):
            assert int(batch.positions[first[b]]) == self.held[slot]
            self.held[slot] += first[b + 1] - first[b]

    def close(self, slot: int) -> None:
        del self.held[slot]


def test_rows_without_features_are_decoded_plainly_beside_others(tiny_model_dir: Path) -> None:
    """Away in the beginning: those rows go on plainly, no features are computed; later requests are drafted for."""
    llm = LLM(tiny_model_dir, "none", dtype="float32", max_rows=3)
    asked: list[tuple[int, ...]] = []
    forward = llm.target.forward

    class Target:
        def __getattr__(self, name: str) -> Any:
            return getattr(llm.target, name)

        def forward(self, batch: RaggedBatch, cache: Any, aux: tuple[int, ...] = (), *rest: Any) -> Any:
            asked.append(tuple(aux))
            return forward(batch, cache, aux, *rest)

    class Late(FixedPolicy):
        turn = 0

        @property
        def follows(self) -> bool:
            return self.turn > 5

        def plan(self, step: StepView) -> list[int]:
            self.turn += 1
            assert step.can_draft <= len(step) and (self.turn > 6 or step.can_draft == 0)
            return super().plan(step)

    drafter = ReadsFeatures()
    loop = Engine(Target(), drafter, Late(FixedConfig(2)), max_rows=3, capacity=64, chunk=8)  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    prompts = [[5, 6, 7], [9, 8], [3, 4, 5, 6], [11, 12], [2, 9, 4]]
    requests = [
        loop.submit(p, SamplingParams(max_tokens=12 + 8 * (i == 0), ignore_eos=True), 0) for i, p in enumerate(prompts)
    ]
    while loop.busy:
        loop.step()
    plain = [llm.generate([p], params)[0].token_ids for p in prompts]
    assert [r.output for r in requests] == [text[: len(r.output)] for text, r in zip(plain, requests, strict=True)]
    assert asked[0] == () and (0,) in asked and drafter.held == {}
    assert drafter.proposed and max(drafter.proposed) <= 2, "rows that it did not follow were never drafted for"


class ReadsStates(ReadsFeatures):
    """Drafts a known text, of which every third token is wrong, and keeps what it is shown of it."""

    reads_hidden = True
    block = 3

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.texts = texts
        self.features: dict[int, list[Tensor]] = {}
        self.hidden: dict[tuple[int, int], Tensor] = {}  # by slot and tokens before the next one

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
        drafts = []
        for history, most in zip(context.history, limit, strict=False):
            at, text = len(history), next(text for text in self.texts if text[: len(history)] == history)
            drafts.append([text[i] if i % 3 else (text[i] + 1) % 7 for i in range(at, min(at + most, len(text)))])
        return Proposal.pack(drafts, [[0.5] * len(row) for row in drafts])

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        super().observe(batch, features, hidden)
        assert features is not None and hidden is not None
        first = batch.offsets.tolist()
        for b, slot in enumerate(batch.slots.tolist()):
            self.features.setdefault(slot, []).append(torch.as_tensor(features)[first[b] : first[b + 1]].clone())
            if b < len(hidden):
                self.hidden[slot, self.held[slot]] = hidden[b].clone()


def test_a_drafter_is_shown_features_and_states_of_its_own_rows_accepted_tokens(tiny_model_dir: Path) -> None:
    """Beside a row that it does not follow, in rounds of different acceptance."""
    llm = LLM(tiny_model_dir, "none", dtype="float32", max_rows=3)
    prompts = [[5, 6, 7], [9, 8], [3, 4, 5, 6]]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    texts = [[*p, *llm.generate([p], params)[0].token_ids] for p in prompts]
    drafter = ReadsStates(texts)
    loop = Engine(llm.target, drafter, FixedPolicy(FixedConfig(3)), max_rows=3, capacity=256, chunk=8)
    wanted = [SamplingParams(max_tokens=20, ignore_eos=True, draft_tokens=n) for n in (None, 0, None)]
    requests = [loop.submit(p, one, 0) for p, one in zip(prompts, wanted, strict=True)]
    loop.wait(requests)
    assert [r.history for r in requests] == texts
    assert 0 < requests[0].stats.accepted < requests[0].stats.drafted and sorted(drafter.features) == [0, 2]
    for slot, shown in drafter.features.items():
        tokens = texts[slot][: sum(map(len, shown))]
        cache = llm.target.new_cache(1, len(tokens))
        output = llm.target.forward(RaggedBatch.pack([tokens], [0], [cache.open()]), cache, (0,))
        torch.testing.assert_close(torch.cat(shown), torch.as_tensor(output.features), atol=1e-4, rtol=1e-4)
        for (own, held), state in drafter.hidden.items():
            if own == slot:
                assert output.hidden is not None
                torch.testing.assert_close(state, torch.as_tensor(output.hidden)[held - 1], atol=1e-4, rtol=1e-4)


def test_the_time_of_following_rows_is_measured() -> None:
    """It is part of bookkeeping, and nothing once the policy has stepped aside."""

    class Costs:
        def __init__(self) -> None:
            self.seen: list[StepCost] = []

        def step(self, record: StepRecord) -> None:
            self.seen.append(record.cost)

    for away in (0, 10**6):
        loop, seen = engine(3), Costs()
        loop.policy = Moody(away)
        loop.observers.append(seen)
        run(loop, PROMPTS, PARAMS)
        followed = [cost.follow for cost in seen.seen]
        assert all(0 <= cost.follow <= cost.bookkeeping for cost in seen.seen[1:])
        assert all(followed) if not away else not any(followed)


# ------------------------------------------------------------------------------------------ several drafters


@pytest.fixture(scope="module")
def texts(tiny_model_dir: Path) -> tuple[LLM, list[list[int]], dict[tuple[int, ...], list[int]]]:
    llm = LLM(tiny_model_dir, "none", dtype="float32", max_rows=2)
    prompts = [[5, 6, 7, 8], [90, 91, 92]]
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    return llm, prompts, {tuple(p): llm.generate([p], params)[0].token_ids for p in prompts}


def several(texts: Any, good: float = 0.95, bad: float = 0.02, **options: Any) -> SeveralDrafters:
    """Two drafters, each good on one of the two prompts."""
    _, prompts, known = texts
    first, second = (tuple(p) for p in prompts)
    made = []
    for mine in (first, second):
        other = second if mine is first else first
        wrong = [(token + 1) % VOCABULARY for token in known[other]]
        made.append(
            SyntheticDrafter(
                {mine: known[mine], other: wrong}, [good] * 4, vocab_size=VOCABULARY, says="nothing", **options
            )
        )
    return SeveralDrafters(made)


def test_each_row_takes_the_drafter_that_is_good_for_it(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("outrider.drafters.base.several.perf_counter", lambda: 1e-5 * next(ticks))  # both cost the same
    llm, prompts, known = texts
    both = llm.with_drafter(several(texts))
    outputs = both.generate(prompts, SamplingParams(max_tokens=120, ignore_eos=True))
    assert [o.token_ids for o in outputs] == [known[tuple(p)] for p in prompts]
    for output in outputs:  # 4 drafts of 0.95 give 4.5 tokens a round; either drafter alone gives one row 1.0
        assert output.stats.acceptance_length > 3.2


def test_a_dear_drafter_is_not_taken_for_a_little_more(texts: Any) -> None:
    """The text scores the cheap one whether or not it is chosen; the dear one is asked now and then only."""
    llm, prompts, known = texts
    asked = {"cheap": 0, "dear": 0}

    class Counting(SyntheticDrafter):
        def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
            asked["dear" if self._seconds else "cheap"] += any(limit)
            return super().propose(slots, last, context, limit, rng)

    cheap = Counting(known, [0.9] * 4, vocab_size=VOCABULARY)
    dear = Counting(known, [0.95] * 4, vocab_size=VOCABULARY, seconds=0.02)
    output = llm.with_drafter(SeveralDrafters([dear, cheap])).generate(
        prompts[0], SamplingParams(max_tokens=120, ignore_eos=True)
    )[0]
    assert output.token_ids == known[tuple(prompts[0])]
    assert asked["dear"] <= 4 and asked["cheap"] > 0.8 * output.stats.rounds


def test_a_round_takes_the_drafter_that_is_sure_of_it(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copying drafter that knows every other stretch of the text, and says so, beside a dear one that is right about
    one draft everywhere."""
    llm, prompts, known = texts
    text = known[tuple(prompts[0])]
    stretch, clock, asked = 12, [0.0], [0, 0]
    monkeypatch.setattr("outrider.drafters.base.several.perf_counter", lambda: clock[0])

    class Copies(SyntheticDrafter):
        def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
            clock[0] += 1e-5
            at = len(context.history[0]) - len(prompts[0])
            drafts = text[at : at + limit[0]] if at // stretch % 2 else []
            return Proposal.pack([drafts], [[0.9] * len(drafts)])

    class Dear(SyntheticDrafter):
        def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
            clock[0] += 3e-4
            asked[(len(context.history[0]) - len(prompts[0])) // stretch % 2] += 1
            return super().propose(slots, last, context, limit, rng)

        def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
            clock[0] += 1e-3  # the rest of a step
            super().observe(batch, features, hidden)

    cheap = Copies(known, [1.0] * 4, vocab_size=VOCABULARY)
    dear = Dear(known, [1.0, 0.0, 0.0, 0.0], vocab_size=VOCABULARY)
    output = llm.with_drafter(SeveralDrafters([dear, cheap])).generate(
        prompts[0], SamplingParams(max_tokens=120, ignore_eos=True)
    )[0]
    assert output.token_ids == text
    assert asked[0] > 20 and asked[1] < 8  # where the copies have nothing
    assert output.stats.rounds < 50  # some 30 of 2 tokens, and 13 of 5


def test_several_drafters_share_prefixes() -> None:
    class Shares(MarkovDrafter):
        def __init__(self, layers: tuple[int, ...], held: int) -> None:
            super().__init__(TABLE, 2)
            self.aux_layers, self.held, self.calls = layers, held, []  # type: ignore[var-annotated]

        def match(self, tokens: Any) -> int:
            return min(self.held, len(tokens))

        def adopt(self, slot: int, tokens: Any, count: int) -> None:
            self.calls.append(("adopt", slot, count))

        def publish(self, slot: int, tokens: Any) -> None:
            self.calls.append(("publish", slot, len(tokens)))

        def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
            self.calls.append(("observe", *batch.lists[:2]))

    class Reads:
        block = 2
        observe, open, propose, close = Shares.observe, Shares.open, Shares.propose, Shares.close

        def __init__(self, layers: tuple[int, ...]) -> None:
            self.aux_layers, self.calls = layers, []  # type: ignore[var-annotated]

    reader, small, copies = Shares((1,), 6), Shares((), 2), Reads(())
    both = SeveralDrafters([reader, small, copies])
    assert isinstance(both, SharesPrefixes) and both.match([7] * 9) == 6  # what the reader of features has
    both.adopt(3, [7, 8, 9, 7, 8, 9], 4)
    both.publish(3, [7] * 5)
    assert reader.calls == [("adopt", 3, 4), ("publish", 3, 5)]
    assert small.calls == [("adopt", 3, 2), ("observe", [9, 7], [2, 3]), ("publish", 3, 5)]
    assert copies.calls == [("observe", [7, 8, 9, 7], [0, 1, 2, 3])]
    assert SeveralDrafters([reader, Reads((2,))]).match([7] * 9) == 0  # the other would have a hole
    assert SeveralDrafters([small, copies]).match([7] * 9) == 0  # read tokens alone: shown all of them


def test_features_are_handed_to_the_drafter_that_reads_them() -> None:
    class Reads(MarkovDrafter):
        def __init__(self, layers: tuple[int, ...]) -> None:
            super().__init__(TABLE, 2)
            self.aux_layers, self.got = layers, []  # type: ignore[var-annotated]

        def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
            self.got.append(features)

    parts = [Reads((1, 4)), Reads(()), Reads((2,))]
    both = SeveralDrafters(parts)
    assert both.aux_layers == (1, 2, 4) and both.block == 2
    features = torch.arange(12.0).view(2, 6)  # width 2 each
    both.observe(RaggedBatch.pack([[1, 2]], [0], [0]), features)
    assert torch.equal(parts[0].got[0], features[:, [0, 1, 4, 5]])
    assert parts[1].got[0] is None and torch.equal(parts[2].got[0], features[:, [2, 3]])


def test_sampled_text_has_the_targets_distribution_with_several_drafters() -> None:
    """Sampled and deterministic drafters together: counts of first tokens against the chain's own."""
    from scipy.stats import chi2

    class Copies(MarkovDrafter):
        """Deterministic: always the same token."""

        def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Any) -> Proposal:
            return Proposal.pack([[2] * n for n in limit], [[0.6] * n for n in limit])

    texts = 1500
    both = SeveralDrafters([MarkovDrafter(DRAFT_TABLE, 2), Copies(DRAFT_TABLE, 2)])
    target, policy = ToyTarget(TABLE), FixedPolicy(FixedConfig(2))
    loop = Engine(target, both, policy, max_rows=64, capacity=16)
    for rule in ("rejection", "block"):
        params = SamplingParams(max_tokens=3, temperature=1.0, rule=rule)
        outputs = run(loop, [[0]] * texts, params, seeds=list(range(texts)))
        p = torch.softmax(TABLE, -1)
        expected = (p[0][:, None, None] * p[:, :, None] * p[None]).flatten().numpy() * texts
        size = len(TABLE)
        seen = [0.0] * size**3
        for a, b, c in outputs:
            seen[(a * size + b) * size + c] += 1
        statistic = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
        assert statistic < chi2.ppf(1 - 1e-5, size**3 - 1)


def test_lists_of_drafters_load(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, ["ngram", "suffix"], dtype="float32", draft_tokens=3)
    assert llm.drafter_name == "ngram+suffix" and llm.drafter.block == 3
    plain = LLM(tiny_model_dir, "none", dtype="float32")
    params = SamplingParams(max_tokens=40, temperature=0.7, seed=3)
    assert llm.generate("a b a b a b", params)[0].token_ids == plain.generate("a b a b a b", params)[0].token_ids
    assert LLM(tiny_model_dir, ["none", "ngram"], dtype="float32").drafter_name == "ngram"
    with pytest.raises(InvalidRequest, match="several drafters share draft_tokens alone, got 'max_ngram'"):
        LLM(tiny_model_dir, ["ngram", "suffix"], drafter_options={"max_ngram": 3}, dtype="float32")
    own = LLM(tiny_model_dir, ["ngram", "suffix"], drafter_options={"suffix": {"draft_tokens": 5}}, dtype="float32")
    assert isinstance(own.drafter, SeveralDrafters) and own.drafter.drafters[1].block == 5
    with pytest.raises(InvalidRequest, match="at least two"):
        SeveralDrafters([])


def test_a_synthetic_drafter_is_as_good_as_it_is_set(texts: Any) -> None:
    llm, prompts, known = texts
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    for p, low, high in ((1.0, 4.6, 5.0), (0.5, 1.6, 2.5), (0.0, 1.0, 1.0)):
        drafter = SyntheticDrafter(known, [p] * 4, vocab_size=VOCABULARY, says="sure")
        output = llm.with_drafter(drafter).generate(prompts[0], params)[0]
        assert low <= output.stats.acceptance_length <= high
        assert output.token_ids == known[tuple(prompts[0])]
    one = {tuple(prompts[0]): [1.0] * 4}  # a profile of its own
    slow = SyntheticDrafter(known, [0.0] * 4, profiles=one, vocab_size=VOCABULARY, seconds_per_draft=1e-3)
    outputs = llm.with_drafter(slow).generate(prompts[:2], params)
    assert outputs[0].stats.acceptance_length >= 4.6 and outputs[1].stats.acceptance_length == 1.0
    assert outputs[1].stats.seconds > 4e-3 * outputs[1].stats.rounds / 2
    with pytest.raises(InvalidRequest, match="probabilities"):
        SyntheticDrafter(known, [1.5], vocab_size=VOCABULARY)
    with pytest.raises(InvalidRequest, match="as many of every prompt"):
        SyntheticDrafter(known, [0.5], profiles={(1,): [0.5, 0.5]}, vocab_size=VOCABULARY)


def test_the_command_line_takes_policies_and_several_drafters(tiny_model_dir: Path) -> None:
    given = ["generate", "--model", str(tiny_model_dir), "--max-tokens", "8", "a b a b a b"]
    plain = CliRunner().invoke(app, [*given, "--drafter", "none"])
    both = CliRunner().invoke(app, [*given, "--drafter", "ngram,suffix", "--policy", "fixed:2", "--no-guard"])
    assert plain.exit_code == both.exit_code == 0 and plain.stdout == both.stdout
    assert "drafter ngram+suffix" in both.stderr
    wrong = CliRunner().invoke(app, [*given, "--policy", "fixed:two"])
    assert wrong.exit_code == 2 and "--policy must be NAME or NAME:DRAFTS like fixed:3" in wrong.stderr
    memory = ["--kv-memory", "2M", "--prefill-chunk", "2"]
    assert CliRunner().invoke(app, [*given, *memory, "--drafter", "none"]).stdout == plain.stdout
    wrong = CliRunner().invoke(app, [*given, "--kv-memory", "some"])
    assert wrong.exit_code == 2 and "--kv-memory must be a size like 8G or 500M" in wrong.stderr
    wrong = CliRunner().invoke(app, [*given, "--kv-dtype", "int7"])
    assert wrong.exit_code == 2 and "int7" in wrong.stderr


def test_a_chunk_of_prompts_is_as_large_as_asked_for(tiny_model_dir: Path) -> None:
    for chunk in (3, 64):
        llm = LLM(tiny_model_dir, "none", dtype="float32", prefill_chunk=chunk)
        request = llm.engine.submit([1] * 9, SamplingParams(max_tokens=2), 1)
        llm.engine.step()
        assert request.pending == max(1, 9 - chunk)
        assert (llm.engine.admission.chunk, llm.engine.admission.beside) == (chunk, max(1, chunk // 4))
    with pytest.raises(InvalidRequest, match="prefill_chunk"):
        LLM(tiny_model_dir, "none", dtype="float32", prefill_chunk=0)


def test_a_plain_step_makes_no_tensors_for_drafts(tiny_model_dir: Path) -> None:
    """Where nothing is drafted, a step does what plain decoding does: the rows' proposal is the one that all such steps
    share, and nothing is taken back from the cache."""
    llm = LLM(tiny_model_dir, "ngram", dtype="float32", policy="fixed", policy_options={"draft_tokens": 0}, guard=False)
    request = llm.engine.submit([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True), 1)
    llm.engine.step()
    rows = Rows([request], [1])
    empty = Proposal.empty(1)
    assert rows.pad(Proposal.empty(0)) is empty and llm.engine.drafting.choose(empty) == [0]
    rewound: list[Any] = []
    llm.engine.cache.rewind = lambda *given: rewound.append(given)  # type: ignore[method-assign]
    llm.engine.step()
    assert not rewound and len(request.output) == 2
