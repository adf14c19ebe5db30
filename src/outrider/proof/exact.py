"""The exact tier: the distribution of whole texts, enumerated through the engine, against plain decoding's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import Any

from outrider import registry
from outrider.config import Rule, SamplingParams
from outrider.proof.certificate import Check
from outrider.proof.enumeration import EnumeratingBackend, enumerate_texts
from outrider.proof.literal import plain_texts, total_variation
from outrider.proof.toy_world import ToyWorld, make_policy
from outrider.types import SchedulerPolicy

__all__ = ["METHOD", "OPTIONS", "RULES", "TOLERANCE", "Setting", "exact_checks", "settings"]

TOLERANCE = 1e-10
METHOD = (
    "Requests run through the engine on toy targets of 2 and 3 tokens whose conditional probabilities are known. Every "
    "outcome of every random number is followed, drafts included, and the probabilities of all texts are added up in "
    f"float64. They must equal those of plain decoding, which is computed apart, to {TOLERANCE:g} in total variation. "
    "A number is identified by the key it is derived from, so noise that is used twice is followed as one number."
)
RULES: tuple[Rule, ...] = ("rejection", "block", "coupled")
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.4},
    "hot, top-k and top-p": {"temperature": 1.7, "top_k": 2, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": -0.7},
    "bias": {"logit_bias": ((0, 1.5), (1, -0.5)), "top_p": 0.9},
    "grammar": {"temperature": 0.7},
    "stop token": {},
}
PROMPTS = ([0], [1, 0, 1])
FIXED_DRAFTS = 2


@dataclass(frozen=True)
class Setting:
    """One enumeration."""

    rule: Rule = "rejection"
    option: str = "temperature 1"
    policy: str = "fixed"
    rows: int = 16
    drafter: str = "draft_model"
    size: int = 2
    length: int = 4
    drafts: int = FIXED_DRAFTS
    seed: int = 0

    @property
    def name(self) -> str:
        return (
            f"{self.rule}, {self.option}, {self.drafter}, policy {self.policy}, "
            f"{self.rows} {'row' if self.rows == 1 else 'rows'}, {self.size} tokens"
        )

    @property
    def world(self) -> ToyWorld:
        return ToyWorld(
            size=self.size,
            seed=self.seed,
            no_repeat=1 if self.option == "grammar" else None,
            stop_ids=(0,) if self.option == "stop token" else (),
        )

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            **{"max_tokens": self.length, "temperature": 1.0, "rule": self.rule, **OPTIONS[self.option]}
        )

    @property
    def alone(self) -> bool:
        """Whether the policy decides for each row by itself, so that requests of different outcomes may be mixed."""
        return self.policy in ("fixed", "threshold", "remembers")

    def distance(self, make_policy: Callable[[str, int], SchedulerPolicy] = make_policy, **parts: Any) -> float:
        """The largest total variation over the prompts. ``parts``: what ``ToyWorld.enumerated`` takes; a control's."""
        world, params = self.world, self.params
        found = enumerate_texts(
            lambda: world.enumerated(
                make_policy(self.policy, self.drafts), self.drafts, rows=self.rows, drafter=self.drafter, **parts
            ),
            PROMPTS,
            params,
            together=not self.alone,
        )
        wanted = [plain_texts(world.chain, prompt, params, world.stop_ids) for prompt in PROMPTS]
        return max(total_variation(a, b) for a, b in zip(found, wanted, strict=True))

    def check(self) -> Check:
        """Fails, too, where a drafter's drafts were never verified: nothing would have been checked."""
        backend = EnumeratingBackend()
        distance = self.distance(backend=backend)
        drafts = f"{backend.verified} drafts, up to {backend.deepest} a round" if backend.verified else "no drafts"
        figures = {"total_variation": distance, "drafts": backend.verified, "deepest": backend.deepest}
        passed = distance <= TOLERANCE and (backend.verified > 0 or self.drafter == "none")
        return Check(self.name, passed, f"total variation {distance:.1e}; {drafts}", figures)


def settings(quick: bool, seed: int = 0) -> list[Setting]:
    """Every rule with every sampling option, under every policy, in batches and alone; then the other drafters.

    ``quick``: every rule with every option, policies, batching and vocabulary taking turns.
    """
    policies = [*registry.names("policy"), "remembers"]
    drafters = ("none", "ngram", "suffix")

    def one(rule: Rule, option: str, policy: str, rows: int) -> Setting:
        alone = Setting(policy=policy).alone  # else the outcomes of two rows are followed together: keep them few
        size = 3 if option == "grammar" and alone else 2  # of two tokens a mask leaves one
        length = 4 if alone else 3
        return Setting(rule, option, policy, rows, size=size, length=length, seed=seed)

    if quick:
        turns = cycle(product([name for name in policies if Setting(policy=name).alone], (16, 1)))
        found = [one(*pair, *turn) for pair, turn in zip(product(RULES, OPTIONS), turns, strict=False)]
        found += [Setting(rule, "top-p", size=3, length=3, seed=seed) for rule in RULES]
        found += [
            Setting(rule, "penalties", drafter=name, seed=seed) for rule, name in zip(RULES, drafters, strict=True)
        ]
        return found
    found = [
        one(rule, option, policy, rows)
        for rule, option, policy in product(RULES, OPTIONS, policies)
        for rows in ((16, 1) if Setting(policy=policy).alone else (2,))
    ]
    found += [
        Setting(rule, option, "remembers", size=3, length=4, seed=seed) for rule, option in product(RULES, OPTIONS)
    ]
    found += [Setting(rule, "top-p", "remembers", length=6, drafts=3, seed=seed) for rule in RULES]
    for drafter, rule, option in product(drafters, RULES, ("temperature 1", "penalties", "grammar", "stop token")):
        found.append(Setting(rule, option, "fixed", drafter=drafter, length=5, seed=seed))
    return found


def exact_checks(quick: bool, seed: int = 0, limit: int | None = None) -> Iterator[Check]:
    """One check for each setting."""
    for setting in islice(settings(quick, seed), limit):
        yield setting.check()
