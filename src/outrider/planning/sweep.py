"""Policies over loads, simulated: the rows of ``bench --load`` without the machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.errors import InvalidRequest, nearest
from outrider.files import read_json
from outrider.planning.simulated_drafts import PROFILES, Synthetic
from outrider.planning.simulation import Traffic, simulate
from outrider.planning.step_costs import Costs
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.scheduling.guard import GuardedPolicy
from outrider.scheduling.threshold import ThresholdConfig, ThresholdPolicy
from outrider.scheduling.throughput import ThroughputConfig, ThroughputPolicy
from outrider.types import SchedulerPolicy

__all__ = ["CURVES", "NoDrafter", "make_policy_for", "read_costs", "read_profile", "sweep"]

CURVES: dict[str, Costs] = {
    # A large target on accelerators: weights are read once for up to about a hundred tokens, then arithmetic counts.
    "accelerator": Costs(
        ((1, 0.0150), (32, 0.0155), (64, 0.0162), (128, 0.0185), (256, 0.0260), (512, 0.0430), (2048, 0.1500)),
        draft_fixed=0.0015,
        draft_row=2e-6,
        step=0.0005,
        step_drafting=0.0002,
    ),
    # 110M parameters in int8 on two cores with AVX-512.
    "cpu-110m": Costs(
        ((1, 0.0049), (4, 0.0050), (8, 0.0051), (16, 0.0098), (32, 0.0160), (64, 0.0310), (512, 0.2400)),
        draft_fixed=0.0012,
        draft_row=0.0002,
        step=0.0002,
        step_drafting=0.0003,
    ),
    # Matrix tiles of 16 rows.
    "tiles": Costs(
        ((1, 0.0100), (16, 0.0105), (17, 0.0125), (32, 0.0130), (33, 0.0150), (64, 0.0180), (512, 0.1200)),
        draft_fixed=0.0020,
        step=0.0002,
        step_drafting=0.0003,
    ),
}
"""Cost curves by name. Names in ``--costs``; everything else there is a file."""
KEY = CostKey("simulated", "", "", "", 0)
POLICIES = ("none", "fixed:N", "threshold:N", "threshold:0.5", "throughput", "auto")


class NoDrafter(FixedPolicy):
    """Plain decoding by an engine that has no drafter: nothing is followed, whatever the costs say of it."""

    follows = False

    def __init__(self) -> None:
        super().__init__(FixedConfig(0))


def read_costs(given: str) -> Costs:
    """A name of ``CURVES``, or a JSON file: a kept cost table, what ``outrider profile --json`` wrote of one dtype, or
    an object with the fields of ``Costs``. Raises InvalidRequest."""
    if given in CURVES:
        return CURVES[given]
    path = Path(given)
    if not path.is_file():
        raise InvalidRequest(f"costs: expected a file or one of {', '.join(CURVES)}, got {given!r}")
    try:
        value = read_json(path)
        if "target" in value:  # of one row: what several rows cost more is left out
            table = CostTable.from_json(value)
            context = min(p.context for p in table.target if p.rows == 1)
            alone = {p.tokens: p.seconds for p in table.target if p.rows == 1 and p.context == context}
            return Costs(tuple(sorted(alone.items())))
        if "bandwidth_gb_s" in value:
            return Costs(_profiled(value["rows"]))
        points = tuple((int(n), float(s)) for n, s in value["points"])
        more: dict[str, Any] = {k: v if k == "takes_up" else float(v) for k, v in value.items() if k != "points"}
        return Costs(points, **more)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest(
            f'{path}: expected {{"points": [[tokens, seconds], ...], "draft_fixed": seconds, ...}}, a cost table, or '
            f"the JSON of `outrider profile` for one dtype, got an error: {error}"
        ) from error


def _profiled(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    """(tokens, seconds) of one row over the shortest context that was measured."""
    dtypes = sorted({row["dtype"] for row in rows})
    if len(dtypes) > 1:
        raise ValueError(f"it holds {', '.join(dtypes)}; profile with one --dtype")
    alone = [row for row in rows if row["rows"] == 1]
    context = min(row["context"] for row in alone)
    return tuple(sorted((row["new_tokens"], row["milliseconds"] / 1e3) for row in alone if row["context"] == context))


def read_profile(given: str, drafts: int) -> tuple[float, ...]:
    """A name of ``PROFILES``, or probabilities separated by commas; the last one goes on. Raises InvalidRequest."""
    if given in PROFILES:
        values = PROFILES[given]
    else:
        try:
            values = tuple(float(part) for part in given.split(","))
        except ValueError:
            raise InvalidRequest(
                f"profile: expected {', '.join(PROFILES)} or probabilities like 0.8,0.75,0.7, got {given!r}"
            ) from None
    if any(not 0 <= p <= 1 for p in values):
        raise InvalidRequest(f"profile: probabilities must be between 0 and 1, got {given!r}")
    return (*values, *[values[-1]] * max(0, drafts - len(values)))[:drafts]


def make_policy_for(name: str, costs: Costs, drafts: int) -> SchedulerPolicy:
    """``none``, ``fixed:N``, ``threshold:N`` (N drafts, as in ``generate --policy``), ``threshold:0.5`` (the least
    confidence), ``throughput``, or ``auto``, which is throughput with the guard. The policy is given the true costs of
    passes as its table. Raises InvalidRequest."""
    kind, colon, value = name.partition(":")
    kinds = [policy.split(":")[0] for policy in POLICIES]
    if kind not in kinds:
        raise InvalidRequest(f"unknown policy {name!r}; {nearest(kind, kinds)}")
    if colon and kind not in ("fixed", "threshold"):
        raise InvalidRequest(f"policy {name!r}: {kind} takes no number; leave out {colon + value!r}")
    count = int(value) if value.isascii() and value.isdigit() else None
    if kind == "none":
        return NoDrafter()
    if kind == "fixed":
        if colon and count is None:
            raise InvalidRequest(f"policy {name!r}: expected a number of drafts after the colon, as in fixed:3")
        return FixedPolicy(FixedConfig(drafts if count is None else count))
    if kind == "threshold":
        try:
            confidence = float(value) if colon and count is None else 0.5
        except ValueError:
            raise InvalidRequest(
                f"policy {name!r}: expected a number of drafts after the colon, as in threshold:3, or the least "
                "confidence, as in threshold:0.5"
            ) from None
        return ThresholdPolicy(ThresholdConfig(drafts if count is None else count, confidence))
    sizes = sorted({1, 2, 3, 4, 6, 8, 12, *(n for n, _ in costs.points), *(2**k for k in range(4, 12))})
    model = CostModel(CostTable(KEY, tuple(CostPoint(n, 1, 0, costs.verify(n, 1, 0)) for n in sizes)))
    policy = ThroughputPolicy(ThroughputConfig(drafts), model)
    return GuardedPolicy(policy, model) if kind == "auto" else policy


def sweep(
    costs: Costs,
    profiles: Sequence[Sequence[float]],
    traffics: Mapping[str, Traffic],
    policies: Sequence[str],
    *,
    seconds: float,
    says: str = "truth",
    seed: int = 0,
    noise: float = 0.02,
    progress: Callable[[str, float], None] = lambda text, done: None,
) -> list[dict[str, Any]]:
    """Every policy under every traffic: the fields of ``Result.to_json``, with ``policy``, ``traffic`` and
    ``concurrency`` (0: an open loop). Raises InvalidRequest before anything runs."""
    drafts = min(map(len, profiles))
    if not policies:
        raise InvalidRequest(f"no policy is named; expected some of {', '.join(POLICIES)}")
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"the duration must be a finite number of seconds above 0, got {seconds}")
    for name in policies:
        make_policy_for(name, costs, drafts)
    rows = []
    for i, (label, traffic) in enumerate(traffics.items()):
        for j, name in enumerate(policies):
            progress(f"{label}, {name}", (i * len(policies) + j) / (len(traffics) * len(policies)))
            policy = make_policy_for(name, costs, drafts)
            acceptance = Synthetic(profiles, says=says)
            result = simulate(policy, costs, acceptance, traffic, seconds=seconds, seed=seed, noise=noise)
            rows.append(
                {"policy": name, "traffic": label, "concurrency": traffic.concurrency, "rate": traffic.rate}
                | result.to_json()
            )
    return rows
