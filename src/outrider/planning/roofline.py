"""Seconds of passes on a described machine: reading at the memory's bandwidth, multiplying at the processor's rate.

    T(tokens) = (T_read^4 + T_multiply^4)^(1/4) + pass_ms

where the larger one decides and both show where they are alike. Multiplying is done in tiles of tokens, so its time is
a staircase. Where the machine comes with a measured curve, that is used for the target, and the drafter's passes scale
with what they read.
"""

from __future__ import annotations

import math

from outrider.planning.described import BLOCK, LOOKUP, DrafterShape, Machine, TargetShape
from outrider.planning.forecast import chunks
from outrider.planning.step_costs import Costs

__all__ = ["Roofline"]

CORNER = 4.0
LOOKUP_SECONDS = 20e-6  # of a search in the text


class Roofline:
    """``StepCosts`` of a target and a drafter on a described machine."""

    def __init__(self, machine: Machine, target: TargetShape, drafter: DrafterShape | None = None) -> None:
        self.machine, self.target, self.drafter = machine, target, drafter
        self.uncertainty = machine.uncertainty
        curve = tuple((tokens, ms / 1e3) for tokens, ms in machine.curve)
        self._curve = Costs(curve) if curve else None

    def verify(self, tokens: int, rows: int, context: int) -> float:
        """A target pass; ``context``: cached tokens over all rows."""
        if tokens <= 0:
            return 0.0
        shape, cached = self.target, context * self.target.cache_bytes
        if self._curve is not None:
            return self._curve.verify(tokens, rows, 0) + cached / self._rate
        attended = 4 * shape.layers * shape.attention_width * context * tokens / max(rows, 1)
        return self._pass(shape.touched(tokens) * shape.bytes + cached, shape.active(1), tokens, attended)

    def draft(self, rows: int, drafts: int) -> float:
        if self.drafter is None or not rows or not drafts:
            return 0.0
        one, shape = self.drafter, self.target
        if one.draft_ms or one.draft_each_ms:
            return (one.draft_ms + one.draft_each_ms * drafts) / 1e3
        if one.way == LOOKUP:
            return LOOKUP_SECONDS * rows
        weights, size = one.multiplied(shape), one.bytes or shape.bytes
        if one.way != BLOCK:
            return drafts * self._pass(weights * size, weights, rows)
        markov = shape.vocabulary * one.rank()
        steps = drafts * self._pass(markov * size, markov, rows) if markov else 0.0
        return self._pass(weights * size, weights, rows * drafts) + steps

    def draft_cache(self, drafts: int, context: int) -> float:
        """Reading the drafter's own keys and values of ``context`` tokens, in each of its passes; 0 where drafting was
        measured."""
        one = self.drafter
        if one is None or not drafts or one.draft_ms or one.draft_each_ms:
            return 0.0
        passes = 1 if one.way == BLOCK else drafts
        return passes * context * one.cache_bytes(self.target) / self._rate

    def prompt(self, tokens: int, drafting: bool) -> float:
        """A prompt's passes, and the drafter's over the same chunks."""
        return sum(
            self.verify(size, 1, cached) + (self._draft_prompt(size, cached) if drafting else 0.0)
            for size, cached in chunks(tokens)
        )

    def _draft_prompt(self, tokens: int, context: int) -> float:
        """The drafter fills its own cache from a chunk: a pass, or projections alone (a block); 0 where its size is not
        known."""
        one, shape = self.drafter, self.target
        weights = one.prompt_parameters(shape) if one is not None else 0.0
        if one is None or not weights:
            return 0.0
        cached = 0.0 if one.way == BLOCK else context * one.cache_bytes(shape)
        attended = cached / shape.cache_bytes * 4 * shape.layers * shape.attention_width * tokens
        return self._pass(weights * (one.bytes or shape.bytes) + cached, weights, tokens, attended)

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return (self.machine.step_ms + (self.machine.drafting_ms if drafting else 0.0)) / 1e3

    @property
    def _rate(self) -> float:
        """Bytes a second. With a curve: as the target's pass over one token shows it."""
        if self._curve is not None:
            return self.target.touched(1) * self.target.bytes / self._curve.verify(1, 1, 0)
        return self.machine.bandwidth * 1e9 * self.machine.bandwidth_share

    def _pass(self, read: float, multiplied: float, tokens: int, attended: float = 0.0) -> float:
        machine = self.machine
        computed = math.ceil(tokens / machine.tile) * machine.tile
        operations = 2 * multiplied * computed + attended
        times = read / self._rate, operations / (machine.tflops * 1e12 * machine.flops_share)
        return float(sum(t**CORNER for t in times) ** (1 / CORNER)) + machine.pass_ms / 1e3
