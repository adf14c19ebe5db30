"""What a pass costs: measured seconds as a function of new tokens, rows and context.

The scheduler's SPS(B) (DSpark paper, Algorithm 1) is the inverse of ``CostTable.seconds``. Tables are measured when
an engine starts (``engine.cost_tables``) or by ``outrider profile``, and are plain data here: a JSON object and back.

Units everywhere: ``tokens`` new tokens of a pass over all its rows, ``context`` cached tokens over all its rows (as in
``StepCost``), seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from outrider.errors import InvalidRequest

__all__ = ["CostCurve", "CostKey", "CostPoint", "CostTable", "isotonic"]

VERSION = 2


@dataclass(frozen=True, slots=True)
class CostKey:
    """What a measurement is valid for."""

    model: str
    dtype: str
    backend: str
    machine: str
    threads: int
    instruction_set: str = ""


@dataclass(frozen=True, slots=True)
class CostPoint:
    """One measured kind of pass. Raises InvalidRequest for impossible sizes."""

    tokens: int
    rows: int
    context: int
    seconds: float

    def __post_init__(self) -> None:
        if not (1 <= self.rows <= self.tokens and self.context >= 0 and 0 < self.seconds < float("inf")):
            raise InvalidRequest(
                f"a cost point needs 1 <= rows <= tokens, context >= 0 and seconds > 0, got {asdict(self)}"
            )


class CostCurve:
    """Seconds between and beyond the measured points.

    Never less for more tokens, more rows or more context: medians are noisy, so steps down are pooled (``isotonic``).
    It is straight between points, and the slope of the upper half goes on beyond them. Passes of one row give a curve
    over tokens at the least context they were measured at, and what each greater context adds to it; what several rows
    cost more than one row with as many tokens is a term of its own, in rows and context of each row.

    Raises InvalidRequest where no pass of a single row was measured.
    """

    def __init__(self, points: Iterable[CostPoint]) -> None:
        single: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        several: dict[int, dict[float, list[CostPoint]]] = defaultdict(lambda: defaultdict(list))
        for point in points:
            if point.rows == 1:
                single[point.context][point.tokens].append(point.seconds)
            else:
                several[point.rows][point.context / point.rows].append(point)
        if not single:
            raise InvalidRequest("a cost curve needs passes of one row; measure those too")
        self._tokens = sorted({tokens for curve in single.values() for tokens in curve})
        self._contexts = sorted(single)
        self._curves: list[list[float]] = []  # by context: seconds at each of ``_tokens``
        for context in self._contexts:
            known = sorted((tokens, fmean(seconds)) for tokens, seconds in single[context].items())
            xs, ys = [tokens for tokens, _ in known], [seconds for _, seconds in known]
            curve = [_line(xs, ys, tokens) for tokens in self._tokens]
            below = self._curves[-1] if self._curves else [0.0] * len(curve)
            added = isotonic([max(0.0, high - low) for high, low in zip(curve, below, strict=True)])
            self._curves.append([low + more for low, more in zip(below, added, strict=True)])
        self._excess = {rows: self._excess_of(by_context) for rows, by_context in sorted(several.items())}

    def seconds(self, tokens: int, rows: int = 1, context: int = 0) -> float:
        """Seconds of a pass over ``tokens`` new tokens; 0 for an empty one."""
        if tokens <= 0:
            return 0.0
        rows = max(1, min(rows, tokens))
        each = context / rows
        excess = isotonic([0.0, *(_line(*curve, each) for curve in self._excess.values())])
        return self._one_row(tokens, each) + _line([1, *self._excess], excess, rows)

    def _one_row(self, tokens: int, context: float) -> float:
        return _line(self._contexts, [_line(self._tokens, curve, tokens) for curve in self._curves], context)

    def _excess_of(self, by_context: Mapping[float, Sequence[CostPoint]]) -> tuple[list[float], list[float]]:
        """Contexts of each row, and seconds more than one row with as many tokens (mean over tokens)."""
        contexts = sorted(by_context)
        excess = [
            fmean(p.seconds - self._one_row(p.tokens, context) for p in by_context[context]) for context in contexts
        ]
        return contexts, isotonic([max(0.0, seconds) for seconds in excess])


@dataclass(frozen=True)
class CostTable:
    """Measured costs of one target's passes on one machine."""

    key: CostKey
    target: tuple[CostPoint, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_curve", CostCurve(self.target))

    def seconds(self, tokens: int, rows: int = 1, context: int = 0) -> float:
        """Seconds of a pass."""
        curve: CostCurve = self.__dict__["_curve"]
        return curve.seconds(tokens, rows, context)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that ``from_json`` reads."""
        return {
            "version": VERSION,
            "key": asdict(self.key),
            "target": [asdict(point) for point in self.target],
        }

    @classmethod
    def from_json(cls, value: Any) -> CostTable:
        """What ``to_json`` wrote; other keys beside it are ignored. Raises InvalidRequest for anything else."""
        try:
            if value["version"] != VERSION:
                raise InvalidRequest(
                    f"the cost table has version {value['version']!r}, expected {VERSION}; run `outrider profile` again"
                )
            return cls(CostKey(**value["key"]), _points(value["target"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"this is no cost table: {error!r}; run `outrider profile` again") from error


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest sequence, in squares, that never falls: neighbours that do are pooled (Ayer et al., 1955)."""
    pools: list[tuple[float, int]] = []  # mean, members
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean = (before * members + mean * count) / (members + count)
            count += members
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _points(values: Iterable[Mapping[str, Any]]) -> tuple[CostPoint, ...]:
    return tuple(CostPoint(**value) for value in values)


def _line(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Straight between the points, flat before the first; beyond the last goes on the slope of the upper half of them,
    as two neighbours may differ by noise alone."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    right = bisect_right(xs, x)
    left = right - 1
    if right == len(xs):
        right = len(xs) - 1
        left = max(0, bisect_right(xs, xs[-1] / 2, 0, right) - 1)
        return ys[right] + (ys[right] - ys[left]) * (x - xs[right]) / (xs[right] - xs[left])
    return ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / (xs[right] - xs[left])
