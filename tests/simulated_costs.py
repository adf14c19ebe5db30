"""Costs of imagined machines, and policies in simulations on virtual time: exact, whatever the machine."""

from __future__ import annotations

from collections.abc import Callable

from outrider.planning.simulated_drafts import PROFILES, Synthetic
from outrider.planning.simulation import Result, Traffic, simulate
from outrider.planning.step_costs import Costs
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.scheduling.fixed import FixedPolicy
from outrider.scheduling.guard import GuardedPolicy
from outrider.scheduling.throughput import ThroughputConfig, ThroughputPolicy
from outrider.types import SchedulerPolicy

K = 7
SEEDS = (1, 2)  # which requests meet in a step differs with the policy, and is worth up to 1 % of one run
NATIVE = Costs(  # a 110M target in int8 on two cores, and a block drafter
    ((1, 0.0049), (8, 0.0051), (16, 0.0098), (32, 0.016), (64, 0.031), (512, 0.24)),
    draft_fixed=0.0012,
    step=0.0002,
    step_drafting=0.0003,
)
JAGGED = Costs(  # tiles of 16 and 32 rows
    ((1, 0.010), (16, 0.0105), (17, 0.016), (32, 0.0165), (33, 0.022), (64, 0.0235), (65, 0.032), (512, 0.2)),
    draft_fixed=0.002,
    step=0.0002,
    step_drafting=0.0002,
)
IN_TURN = Costs(  # a small target, and a draft model that drafts one token after the other
    ((1, 0.00075), (4, 0.00085), (8, 0.001), (16, 0.0015), (32, 0.0026), (64, 0.005), (512, 0.04)),
    draft_each=0.00022,
    step=0.0002,
    step_drafting=0.00016,
)
STEEP = Costs(((1, 0.004), (2, 0.0075), (4, 0.0145), (8, 0.028), (64, 0.22)), draft_fixed=0.001, step=0.0001)
SLOW = Costs(((1, 0.005), (8, 0.0055), (64, 0.03)), draft_share=1.0, step=0.0002, step_drafting=0.0003)
KEY = CostKey("model", "int8", "native", "a machine", 2)
SIZES = (1, 2, 4, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 256, 512)


def costs_of(costs: Costs, scale: Callable[[int], float] = lambda tokens: 1.0) -> CostModel:
    points = (CostPoint(n, 1, 0, costs.verify(n, 1, 0) * scale(n)) for n in SIZES)
    return CostModel(CostTable(KEY, tuple(points)))


def throughput(costs: Costs, **options: object) -> ThroughputPolicy:
    return ThroughputPolicy(ThroughputConfig(K, **options), costs_of(costs))  # type: ignore[arg-type]


def guarded(policy: ThroughputPolicy | FixedPolicy, costs: Costs) -> GuardedPolicy:
    return GuardedPolicy(policy, policy.costs if isinstance(policy, ThroughputPolicy) else costs_of(costs))


def run(policy: SchedulerPolicy, costs: Costs, profile: str, rows: int, seconds: float, **options: object) -> Result:
    temperature = options.pop("temperature", 0.0)
    acceptance = Synthetic([PROFILES[profile]], says=str(options.pop("says", "truth")))
    traffic = Traffic(concurrency=rows, prompt=1, answer=400, temperature=temperature)  # type: ignore[arg-type]
    return simulate(policy, costs, acceptance, traffic, seconds=seconds, seed=1, **options)  # type: ignore[arg-type]
