"""The statistical tier: sampled text through batching and scheduling, against the target's probabilities.

On the toy target each token of a text is a sample whose distribution, given the token before it, is known. On a real
target each token's distribution is computed anew by one plain pass over the text, and the token is placed in it: u =
the mass of the tokens before it in some order, plus a uniform share of its own, is uniform in (0, 1) if the token was
drawn from that distribution (the randomised probability integral transform). u falls into one of 16 buckets; the
orders are by probability, which shows changes of temperature and truncation, and by a fixed shuffle of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outrider.config import Rule, SamplingParams
from outrider.engine.engine import Engine
from outrider.proof.certificate import Check
from outrider.proof.evidence import Budget, Evidence, mean_of, power, samples_needed
from outrider.proof.literal import next_token
from outrider.proof.toy_world import ToyWorld, make_policy
from outrider.sampling.processors import process
from outrider.types import Context, RaggedBatch, TargetModel

__all__ = ["ToySetting", "method", "real_checks", "token_positions", "toy_checks", "toy_settings"]

Floats = npt.NDArray[np.float64]
BUCKETS = 16
ROWS = 48  # of the toy engine's batches
TOKENS = 192  # of each toy text
FOCUS = 3.0  # samples over the concentration of the bet
MARGIN = float(np.log(2))  # what the mean of two pieces of evidence may cost


def method(budget: Budget, toy_bias: float, real_bias: float | None) -> str:
    """How the tier tests, with its rates."""
    real = "" if real_bias is None else f", and of {real_bias:g} over {BUCKETS} buckets on the model itself"
    return (
        "Sequential tests by e-values (Dirichlet mixtures; arXiv 2210.01948), looked at after every batch: sampling "
        f"stops early only to reject. Over the whole certificate the false-alarm rate is at most {budget.alpha:g}, "
        f"shared by {budget.tests} tests, so each rejects at evidence {np.exp(budget.threshold):.0f}. Each takes as "
        f"many samples as find a total variation of {toy_bias:g} a token on the toy target{real}, with the stated "
        "power, when the bias is spread as thinly as it can be."
    )


# ------------------------------------------------------------------------------------------------ the toy target


@dataclass(frozen=True)
class ToySetting:
    """One stream of text from the toy engine."""

    rule: Rule
    policy: str
    drafts: int = 3
    rows: int = ROWS
    seed: int = 0
    temperature: float = 0.9

    @property
    def name(self) -> str:
        return f"toy target, {self.rule}, policy {self.policy}, {self.rows} rows"

    @property
    def world(self) -> ToyWorld:
        return ToyWorld(size=4, order=1, seed=self.seed)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=TOKENS, temperature=self.temperature, rule=self.rule)

    def engine(self) -> Engine:
        options = {"threshold": self.world.middle_confidence} if self.policy == "threshold" else {}
        return self.world.sampled(make_policy(self.policy, self.drafts, **options), self.drafts, rows=self.rows)

    def check(self, bias: float, budget: Budget, make: Callable[[], Engine] | None = None) -> Check:
        """``make``: another engine over the same world, as a control has it."""
        chain, params = self.world.chain, self.params
        expected = np.stack([next_token(chain.logits([token]), params, [token], []) for token in range(4)])
        needed = samples_needed(expected, bias, budget.threshold + MARGIN)
        after_one = Evidence(expected, needed / FOCUS)
        after_two = Evidence(np.repeat(expected, 4, 0), needed / FOCUS)  # context 4 * last + the one before it
        engine, seed, log_value = (make or self.engine)(), 0, 0.0
        while after_one.samples < needed and log_value < budget.threshold:
            requests = [engine.submit([i % 4], params, (self.seed << 32) + seed + i) for i in range(2 * self.rows)]
            seed += len(requests)
            engine.wait(requests)
            for request in requests:
                text = np.array(request.history, np.int64)
                after_one.add(text[1:], text[:-1])
                after_two.add(text[2:], 4 * text[1:-1] + text[:-2])
            log_value = mean_of([after_one.log_value, after_two.log_value])
        accepted = engine.totals[1].accepted
        found = _check(self.name, [after_one, after_two], log_value, budget, bias, expected, needed, accepted)
        return found if accepted else replace(found, passed=False, found="no draft was accepted: nothing was tested")


def toy_settings(quick: bool, seed: int = 0) -> list[ToySetting]:
    """Every rule under policies that differ in what they remember."""
    rules: tuple[Rule, ...] = ("rejection", "block", "coupled")
    policies = ("remembers",) if quick else ("threshold", "remembers")
    return [ToySetting(rule, policy, seed=seed) for policy in policies for rule in rules]


def toy_checks(settings: Sequence[ToySetting], bias: float, budget: Budget) -> Iterator[Check]:
    for setting in settings:
        yield setting.check(bias, budget)


def _check(
    name: str,
    evidence: list[Evidence],
    log_value: float,
    budget: Budget,
    bias: float,
    expected: Floats,
    needed: int,
    accepted: int,
) -> Check:
    samples, rejected = evidence[0].samples, log_value >= budget.threshold
    figures: dict[str, Any] = {
        "samples": samples,
        "accepted": accepted,
        "log_evidence": round(min(log_value, 1e9), 3),
        "log_threshold": round(budget.threshold, 3),
        "total_variation_found": round(evidence[0].distance, 5),
        "detectable_total_variation": bias,
    }
    if rejected:
        return Check(name, False, f"rejected after {samples} tokens", figures)
    figures["power"] = power(expected, bias, needed, budget.threshold + MARGIN, needed / FOCUS)
    return Check(
        name,
        True,
        f"{samples} tokens, {accepted} of them accepted drafts, nothing found; "
        f"total variation {bias:g} has power {figures['power']:.2f}",
        figures,
    )


# ------------------------------------------------------------------------------------------------ a real target


@torch.inference_mode()
def token_positions(
    target: TargetModel,
    history: Sequence[int],
    prompt_length: int,
    params: SamplingParams,
    generator: np.random.Generator,
    shuffle: npt.NDArray[np.int64],
) -> Floats:
    """Where each output token lies in its distribution, in (0, 1): [2, n], by probability and by ``shuffle``.

    ``shuffle`` int64 [V]: the rank of each token in the second order.
    """
    n = len(history) - prompt_length
    cache = target.new_cache(1, len(history))
    batch = RaggedBatch.pack([list(history[:-1])], [0], [cache.open()])
    logits = target.forward(batch, cache, logits_at=torch.arange(prompt_length - 1, len(history) - 1)).logits.double()
    context = Context([params], [list(history[:prompt_length])], [prompt_length])
    rows, depth = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    output = torch.tensor([history[prompt_length:]])
    p = process(logits, context, rows, depth, drafted=output).dense(depth).double().numpy()
    tokens = np.array(history[prompt_length:], np.int64)
    mine = p[depth.numpy(), tokens]
    ids = np.arange(p.shape[1])
    before = (p > mine[:, None]) | ((p == mine[:, None]) & (ids < tokens[:, None]))
    shuffled = shuffle[None] < shuffle[tokens][:, None]
    below = np.stack([np.where(before, p, 0).sum(1), np.where(shuffled, p, 0).sum(1)])
    found: Floats = below + generator.random(below.shape) * mine
    return found


def real_checks(
    engines: Mapping[str, tuple[Callable[[], Engine], SamplingParams]],
    prompts: Sequence[Sequence[int]],
    bias: float,
    budget: Budget,
    *,
    seed: int = 0,
) -> Iterator[Check]:
    """One check for each engine (a drafter under a policy) and the params of its requests."""
    expected = np.full((1, BUCKETS), 1 / BUCKETS)
    needed = samples_needed(expected, bias, budget.threshold + MARGIN)
    for name, (make, params) in engines.items():
        engine = make()
        evidence = [Evidence(expected, needed / FOCUS), Evidence(expected, needed / FOCUS)]
        generator = np.random.default_rng(seed)
        shuffle = np.random.default_rng(1).permutation(engine.target.spec.vocab_size)
        log_value, asked = 0.0, 0
        while evidence[0].samples < needed and log_value < budget.threshold:
            some = [prompts[(asked + i) % len(prompts)] for i in range(2 * engine.max_rows)]
            requests = [engine.submit(p, params, (seed << 32) + asked + i) for i, p in enumerate(some)]
            asked += len(requests)
            engine.wait(requests)
            for request in requests:
                placed = token_positions(
                    engine.target, request.history, request.prompt_length, params, generator, shuffle
                )
                for one, u in zip(evidence, placed, strict=True):
                    one.add(np.minimum((u * BUCKETS).astype(np.int64), BUCKETS - 1))
            log_value = mean_of([one.log_value for one in evidence])
        yield _check(name, evidence, log_value, budget, bias, expected, needed, engine.totals[1].accepted)
