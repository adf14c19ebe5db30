"""What the steps of a simulated engine cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from outrider.errors import InvalidRequest

__all__ = ["Costs", "FollowCosts", "ReadCosts", "StepCosts"]

Floats = npt.NDArray[np.float64]


class StepCosts(Protocol):
    """Seconds of the parts of a step."""

    def draft(self, rows: int, drafts: int) -> float: ...
    def verify(self, tokens: int, rows: int, context: int) -> float: ...
    def bookkeeping(self, rows: int, drafting: bool) -> float: ...


@runtime_checkable
class FollowCosts(Protocol):
    """Step costs of a drafter that costs something in steps without drafts too. Rows are followed as in an engine: all
    of them until the policy steps aside (``types.StepsAside``), then none; afterwards those that begin."""

    takes_up: bool
    """The drafter can take up a row in the middle of its text, by being shown it."""
    features: float
    """Share that a pass takes longer while any row is followed."""

    def follow(self, tokens: int) -> float:
        """Seconds of showing the drafter so many tokens."""
        ...


@runtime_checkable
class ReadCosts(Protocol):
    """Step costs that tell the tokens of prompts apart: of a chunk, only the prompt's last token has logits."""

    def read(self, prompts: int, tokens: int, rows: int, context: int) -> float:
        """Seconds of a pass over ``tokens``, so many of which are of prompts: at least 1."""
        ...


@dataclass(frozen=True)
class Costs:
    """Seconds from curves: straight between the points; beyond, the last slope. A pass is never shorter than one over
    fewer tokens: measured times that fall are noise, and are taken to be level.

    Raises InvalidRequest for bad points.
    """

    points: tuple[tuple[int, float], ...]
    """(tokens, seconds) of a target pass."""
    per_context: float = 0.0
    """Seconds that each cached token adds."""
    draft_fixed: float = 0.0
    """Seconds of drafting at all."""
    draft_each: float = 0.0
    """Seconds that each drafted position adds (autoregressive drafters; 0 for a block)."""
    draft_row: float = 0.0
    """Seconds that each row adds."""
    draft_share: float = 0.0
    """Of a target pass over as many tokens as are drafted, what drafting them costs (a draft model)."""
    step: float = 0.0
    """Seconds of bookkeeping."""
    step_drafting: float = 0.0
    """More of it, in a step that drafts."""
    follow_each: float = 0.0
    """Seconds of showing the drafter a committed token."""
    features: float = 0.0
    """See ``FollowCosts``."""
    takes_up: bool = True
    """See ``FollowCosts``."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.type == "float"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InvalidRequest(f"step costs: {name} must be 0 or more, and finite, got {value:g}")
        tokens = [m for m, _ in self.points]
        if (
            not tokens
            or sorted(set(tokens)) != tokens
            or tokens[0] < 1
            or any(not 0 < s < math.inf for _, s in self.points)
        ):
            raise InvalidRequest(
                f"a cost curve needs (tokens, seconds) with tokens rising from 1 on and seconds above 0, "
                f"got {list(self.points)[:6]}"
            )
        known = np.array(self.points, dtype=float)
        known[:, 1] = np.maximum.accumulate(known[:, 1])
        size = max(4096, 2 * tokens[-1])
        n = np.arange(size)
        curve = np.interp(n, known[:, 0], known[:, 1])
        if len(known) > 1:
            slope = (known[-1, 1] - known[-2, 1]) / (known[-1, 0] - known[-2, 0])
            beyond = n > known[-1, 0]
            curve[beyond] = known[-1, 1] + slope * (n[beyond] - known[-1, 0])
        object.__setattr__(self, "_curve", curve)

    def verify(self, tokens: int, rows: int, context: int) -> float:
        curve: Floats = self.__dict__["_curve"]
        last = len(curve) - 1
        seconds = curve[tokens] if tokens <= last else curve[last] * tokens / last
        return float(seconds) + self.per_context * context

    def draft(self, rows: int, drafts: int) -> float:
        if not rows or not drafts:
            return 0.0
        model = self.draft_share * sum(self.verify(rows, rows, 0) for _ in range(drafts)) if self.draft_share else 0.0
        return self.draft_fixed + self.draft_each * drafts + self.draft_row * rows + model

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return self.step + (self.step_drafting if drafting else 0.0)

    def follow(self, tokens: int) -> float:
        return self.follow_each * tokens
