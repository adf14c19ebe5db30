"""Policies: what each one does, and the contract that keeps all of them lossless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import pytest
import torch

from outrider import registry
from outrider.config import build
from outrider.engine.loader import load_model
from outrider.errors import InvalidRequest
from outrider.proof.certify import Audit
from outrider.proof.contracts import policy_anticipates, policy_faults, view
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.scheduling.online_correction import OnlineCorrection
from outrider.scheduling.threshold import ThresholdConfig, ThresholdPolicy
from outrider.scheduling.throughput import ThroughputConfig, ThroughputPolicy
from outrider.types import SchedulerPolicy, StepCost, Values

OPTIONS: dict[str, dict[str, object]] = {"fixed": {"draft_tokens": 3}, "threshold": {"draft_tokens": 6}}
COST = StepCost(draft=0.002, verify=0.01, bookkeeping=0.0005, rows=4, tokens=12, context=100)
K = 6


def make(name: str) -> SchedulerPolicy:
    kind = registry.find("policy", name)
    policy = kind.from_config(build(kind.Config, OPTIONS.get(name, {}), f"policy {name}"))
    assert isinstance(policy, SchedulerPolicy)
    return policy


# ------------------------------------------------------------------------------------------ the contract of all


@pytest.mark.parametrize("name", registry.names("policy"))
def test_keeps_the_contract(name: str) -> None:
    assert not policy_faults(lambda: make(name))


@pytest.mark.parametrize("name", registry.names("policy"))
def test_no_drafts_and_no_rows_are_served(name: str) -> None:
    policy = make(name)
    assert policy.choose(None, [0] * 2) == [0, 0]
    assert policy.choose(torch.zeros(2, 0), [0] * 2) == [0, 0]
    assert policy.choose(torch.zeros(0, 3), [0] * 0) == []


@pytest.mark.parametrize("name", registry.names("policy"))
def test_does_not_anticipate(name: str) -> None:
    assert not policy_anticipates(lambda: make(name))


@pytest.mark.parametrize("broken", [False, True])
def test_the_audit_sees_a_search_that_looks_past_an_edge_of_the_costs(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:
        monkeypatch.setattr(ThroughputPolicy, "_search", lambda *parts, **named: "global")
    audit = Audit(load_model("embedded"), ("ngram",), ("throughput",), ((1, 2),), ("contracts",), quick=True)
    bounds, ahead = islice(audit._contract_checks(), 2)
    assert bounds.passed and ahead.passed is not broken


class _LooksOneAhead(FixedPolicy):
    """Keeps token j only where the confidence of the token after it is high: off by one, and biased."""

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        assert isinstance(confidence, torch.Tensor)
        following = torch.cat([confidence[:, 1:], torch.ones(len(confidence), 1)], 1)
        return torch.tensor(lengths).minimum((following > 0.5).long().cumprod(1).sum(1)).tolist()


class _BestCut(FixedPolicy):
    """Cuts where expected tokens per second peak over all depths: the search DSpark's Appendix A forbids.

    On a smooth cost it would stop where the first rise ends, and be harmless; on a jagged one it looks past a dip.
    """

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        assert isinstance(confidence, torch.Tensor)
        expected = 1 + torch.cat([torch.zeros(len(confidence), 1), confidence.cumprod(1).cumsum(1)], 1)
        cost = torch.tensor([4.0, 7.0, 7.0, 7.0, 7.5, 7.5, 7.5])
        return torch.tensor(lengths).minimum((expected / cost).argmax(1)).tolist()


class _AllOrNothing(FixedPolicy):
    """Drops short drafts: whether token 1 is kept depends on whether the draft went on."""

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        return [n if n > 3 else 0 for n in lengths]


@pytest.mark.parametrize("kind", [_LooksOneAhead, _BestCut, _AllOrNothing])
def test_an_anticipating_policy_is_caught(kind: type[FixedPolicy]) -> None:
    assert policy_anticipates(lambda: kind(FixedConfig(draft_tokens=K)))


# ------------------------------------------------------------------------------------------ one by one


def test_fixed_keeps_what_was_drafted_up_to_k() -> None:
    policy = FixedPolicy.from_config(FixedConfig(draft_tokens=3))
    assert policy.plan(view(5)) == [3] * 5
    assert policy.choose(torch.zeros(3, 5), [0, 2, 5]) == [0, 2, 3]


def test_threshold_stops_at_the_first_doubt() -> None:
    policy = ThresholdPolicy.from_config(ThresholdConfig(draft_tokens=4, threshold=0.5))
    confidence = torch.tensor([[0.9, 0.5, 0.4, 0.9], [0.4, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]])
    assert policy.choose(confidence, [4, 4, 4, 2]) == [2, 0, 4, 2]
    assert policy.choose(None, [4, 6]) == [4, 4]
    assert policy.choose(torch.full((1, 2), torch.nan), [2]) == [0]


def drifting() -> ThresholdPolicy:
    return ThresholdPolicy.from_config(ThresholdConfig(draft_tokens=K, threshold=0.5, follow_drift=True))


def test_threshold_follows_drift_without_anticipating() -> None:
    assert not policy_anticipates(drifting)
    policy, sure, full = drifting(), torch.full((1, K), 0.7), [K]
    assert policy.choose(sure, full) == [K]
    for _ in range(60):  # what it is sure of turns out wrong
        policy.plan(view(1))
        policy.choose(sure, full)
        policy.observe(COST, [0])
    assert policy.choose(sure, full) == [0]
    for _ in range(3000):  # nothing is verified any more: it forgets, and tries again
        policy.choose(torch.zeros(1, K), full)
        policy.observe(COST, [0])
    assert policy.choose(sure, full) == [K]
    assert policy.choose(torch.full((1, K), torch.nan), full) == [0]


def test_a_correction_is_told_what_the_drafter_said_not_what_it_made_of_it() -> None:
    """Else it would settle where the correction of a correction is right."""
    policy, expected = ThresholdPolicy.from_config(ThresholdConfig(1, 0.0, follow_drift=True)), OnlineCorrection()
    for accepted in (0, 1, 0):
        policy.choose(torch.tensor([[0.875]]), [1])
        policy.observe(COST, [accepted])
        expected = expected.update([0.875], 1, accepted)
    assert policy._correction == expected


def test_throughput_plans_for_rows_that_can_be_drafted_for() -> None:
    policy = ThroughputPolicy.from_config(ThroughputConfig(3))
    assert policy.plan(replace(view(4), can_draft=1)) == [3, 0, 0, 0]
    assert policy.plan(replace(view(4), can_draft=0)) == [0, 0, 0, 0]


def test_throughput_pays_for_drafting_when_it_tries() -> None:
    policy = ThroughputPolicy.from_config(ThroughputConfig(3))
    before, limits = policy._ledger.balance, policy.plan(view(4))
    tokens = 4 + sum(policy.choose(None, limits))
    assert tokens > 4, "nothing is known yet"
    policy.observe(StepCost(0.002, 0.01, 0.0005, 4, tokens, 100), [0] * 4)
    spent = policy._ledger.balance
    assert spent <= before - 0.002
    policy.plan(replace(view(4), can_draft=0))
    policy.observe(StepCost(0.0, 0.01, 0.0, 4, 4, 100), [0] * 4)
    assert policy._ledger.balance == pytest.approx(spent + 0.005 * 0.01), "a plain step earns its share"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FixedConfig, {"draft_tokens": -1}, "draft_tokens must be at least 0, got -1"),
        (ThresholdConfig, {"draft_tokens": -1}, "draft_tokens must be at least 0, got -1"),
        (ThresholdConfig, {"threshold": 1.5}, "threshold must be between 0 and 1, got 1.5"),
        (ThresholdConfig, {"treshold": 0.5}, "did you mean 'threshold'"),
    ],
)
def test_bad_options_are_refused(kind: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build(kind, options, "policy")
