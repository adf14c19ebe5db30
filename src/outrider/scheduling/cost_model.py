"""What a step costs now: a measured table, corrected by the steps that are observed.

T_verify(tokens, rows, context) is a table's value (``scheduling.costs``; a nominal curve where there is none), times
the present speed of the machine, times a correction of that number of tokens, which is where a jagged curve shows: the
edge of a tile at 16 rows costs what it was observed to cost, not what a line through its neighbours says.
T_draft(rows, k) and bookkeeping are learnt from observed steps alone.

All estimates are of logarithms and robust: an observation moves them by a bounded step, so a pass that a neighbour on
the machine made ten times slower counts like one that was a little slower. Where most of the latest observations are
far off to the same side, it is the machine or the table that changed, and the estimate moves there at once.

A table that does not fit what is observed, one of another machine for instance, is dropped (``trusted``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from outrider.scheduling.costs import CostTable

__all__ = ["CostModel"]

Floats = npt.NDArray[np.float64]

EXACT = 256  # up to here each number of tokens has a correction of its own; beyond, 32 to an octave
OCTAVE = 32
NOMINAL, SLOPE = 0.005, 0.03  # seconds of a pass over one token, and what another one adds, where nothing is known
MOVE = 0.15  # the most that one observation counts for, in log seconds
CELL_RATE, DRAFT_RATE, BOOKKEEPING_RATE = 0.05, 0.1, 0.05
FIRST = 6  # observations of which the least counts
LATEST = 5  # observations of which the median shows that times have changed,
FAR = math.log(1.3)  # and by how much at least
ALIKE = 0.5  # of what an estimate of some drafts moves, what those of other numbers do
LINE_WEIGHT, MOST_WEIGHT = 32, 64  # observations that a line through draft costs is worth, and that one of them can be
VISIBLE = 0.004  # a correction that moved by less is not worth a new curve
CHECKED = 96  # observations in which a table is checked
OTHER_SHAPE, OTHER_SPEED = math.log(1.7), math.log(6.0)  # differences that no busy machine explains
KEPT_CURVES = 64


@dataclass(slots=True)
class _Change:
    """Whether times have changed at once."""

    latest: list[float] = field(default_factory=list)  # errors of the latest observations, in log seconds

    def by(self, error: float) -> float:
        """How much, by this error and those before it; 0 = not."""
        self.latest.append(error)
        if len(self.latest) > LATEST:
            del self.latest[0]
        if abs(error) < FAR or len(self.latest) < LATEST:
            return 0.0
        middle = median(self.latest)
        if abs(middle) < FAR:
            return 0.0
        self.latest.clear()
        return middle


@dataclass(slots=True)
class _Estimate:
    """A robust running mean of log seconds."""

    value: float = 0.0
    count: int = 0
    change: _Change = field(default_factory=_Change)

    def add(self, seconds: float, rate: float, first: int = FIRST) -> None:
        observed = math.log(max(seconds, 1e-9))
        if self.count < max(first, 1):  # the first calls of anything are slow, and none is too quick
            self.value = min(self.value, observed) if self.count else observed
        else:
            error = observed - self.value
            change = self.change.by(error)
            self.value += change or max(rate, 1 / (self.count + 1)) * min(max(error, -MOVE), MOVE)
        self.count += 1

    @property
    def seconds(self) -> float:
        return math.exp(self.value)


@dataclass(slots=True)
class _Cell:
    """How long passes over so many tokens take beside those over others."""

    value: float = 0.0  # log ratio to the table and the speed
    count: int = 0  # of passes
    compared: int = 0  # with those around them


@dataclass(slots=True)
class _Check:
    """What a table said against what was observed, until it is believed."""

    ratios: dict[int, list[float]] = field(default_factory=dict)  # by tokens: the first few log ratios
    seen: int = 0

    def wrong(self, tokens: int, ratio: float) -> bool:
        """Whether the table is of another machine or model, by this observation and those before it."""
        self.seen += 1
        found = self.ratios.setdefault(tokens, [])
        if len(found) < 9:
            found.append(ratio)
        known = [median(values) for values in self.ratios.values() if len(values) >= 4]
        return bool(known) and (max(known) - min(known) > OTHER_SHAPE or abs(median(known)) > OTHER_SPEED)


class CostModel:
    """Seconds of passes, drafts and bookkeeping, as they are now."""

    def __init__(self, table: CostTable | None = None, features: float = 0.0) -> None:
        """``features``: the share that a pass takes longer when it also gives the features that the drafter reads."""
        self.table, self.features = table, features
        self.trusted = True
        """False once a table was dropped because it did not fit."""
        self._check = _Check()
        self._bases: dict[tuple[int, int], Floats] = {}
        self._curves: dict[tuple[int, ...], Floats] = {}  # as long as nothing new is observed
        self._speed = 0.0  # log
        self._pace = 0.0  # log: how much slower the machine has become, so that what was not seen since is right too
        self._steady = False  # as many passes were seen as speed and pace are made of
        self._latest: list[tuple[int, float]] = []  # passes: cell, log ratio to the table
        self._size(1024)
        self._cells: dict[int, _Cell] = {}
        self._drawn: dict[int, float] = {}  # the values that ``_correction`` was made of
        self._dirty = False
        self._drafts: dict[int, dict[int, _Estimate]] = {}  # by rows, by drafts
        self._drawn_drafts: dict[tuple[int, int], float] = {}  # as long as nothing new is observed
        self._bookkeeping: dict[tuple[str, int], _Estimate] = {}  # by kind of step, by rows

    # ------------------------------------------------------------------------------------------ what it says

    def verify(self, tokens: int, rows: int = 1, context: int = 0) -> float:
        """Seconds of a target pass."""
        if self._dirty or tokens >= len(self._cell_of):
            return float(self.verify_curve(tokens, 0, rows, context)[0])
        return float(self._base(rows, context)[tokens] * self._correction[tokens]) * math.exp(self._speed)

    def verify_curve(self, tokens: int, more: int, rows: int = 1, context: int = 0) -> Floats:
        """float64 [more + 1]: seconds of passes over ``tokens``, ``tokens + 1``, ... new tokens; to read."""
        key = (tokens, more, *self._alike(rows, context))
        found = self._curves.get(key)
        if found is None:
            end = tokens + more + 1
            if end > len(self._cell_of):
                self._size(end)
            base = self._base(rows, context)
            if self._dirty:
                self._draw()
            if len(self._curves) >= KEPT_CURVES:
                self._curves.clear()
            found = self._curves[key] = base[tokens:end] * self._correction[tokens:end] * math.exp(self._speed)
            found.setflags(write=False)  # it is kept
        return found

    def draft(self, rows: int, drafts: int) -> float:
        """Seconds in which up to ``drafts`` tokens are proposed for ``rows`` rows; a guess where never seen."""
        if rows <= 0 or drafts <= 0:
            return 0.0
        if not self._drafts:
            return 0.2 * self.verify(rows, rows)
        wanted = _bucket(rows)
        seconds = self._drawn_drafts.get((wanted, drafts))
        if seconds is None:
            nearest = wanted if wanted in self._drafts else min(self._drafts, key=lambda key: abs(key - wanted))
            seconds = _along(self._drafts[nearest], drafts)
            if nearest != wanted:
                seconds *= 0.5 * (1 + _rows_of(wanted) / _rows_of(nearest))
            self._drawn_drafts[wanted, drafts] = seconds
        return seconds * math.exp(self._pace)

    def known_drafts(self, rows: int) -> int:
        """How many numbers of drafts were proposed for about so many rows."""
        return len(self._drafts.get(_bucket(rows), ()))

    def seen(self, tokens: int) -> int:
        """How many passes over about so many tokens were observed."""
        key = tokens if tokens <= EXACT else int(self._cell_of[tokens]) if tokens < len(self._cell_of) else -1
        cell = self._cells.get(key)
        return cell.count if cell is not None else 0

    def bookkeeping(self, rows: int, drafting: bool, *, asked: bool = True) -> float:
        """Seconds of a step outside the two passes; nothing until it was seen. ``asked``: with the work of a policy
        that was asked whether to draft."""
        wanted = _bucket(rows)
        for kind in dict.fromkeys((_kind(drafting, asked), _kind(False, True), _kind(False, False))):
            found = self._bookkeeping.get((kind, wanted))
            if found is None:  # the nearest number of rows
                near = [(abs(known - wanted), known) for there, known in self._bookkeeping if there == kind]
                if not near:
                    continue
                found = self._bookkeeping[kind, min(near)[1]]
            return found.seconds * math.exp(self._pace)
        return 0.0

    def deciding(self, rows: int) -> float:
        """Seconds by which a step without drafts is longer because a policy was asked; nothing until both are known."""
        with_it, without = (self._bookkeeping.get((_kind(False, asked), _bucket(rows))) for asked in (True, False))
        if with_it is None or without is None:
            return 0.0
        return max(0.0, with_it.seconds - without.seconds) * math.exp(self._pace)

    # ------------------------------------------------------------------------------------------ what it is told

    def observe_verify(self, tokens: int, rows: int, context: int, seconds: float, *, features: bool = False) -> None:
        """A pass in which every row's logits were computed; passes with chunks of prompts are left out.
        ``features``: it gave those too, which estimates leave out."""
        if tokens <= 0 or not 0 < seconds < math.inf:
            return
        self._curves.clear()
        if features:
            seconds /= 1 + self.features
        if tokens >= len(self._cell_of):
            self._size(tokens + 1)
        ratio = math.log(seconds / float(self._base(rows, context)[tokens]))
        if self.table is not None and self._check.seen < CHECKED and self._check.wrong(tokens, ratio):
            self._drop_table()
            ratio = math.log(seconds / float(self._base(rows, context)[tokens]))
        key = int(self._cell_of[tokens])
        self._cells.setdefault(key, _Cell()).count += 1
        self._latest.append((key, ratio))
        if len(self._latest) > LATEST:
            del self._latest[0]
        speeds = [ratio - self._cells[key].value for key, ratio in self._latest]
        before, self._speed = self._speed, median(speeds)
        if len(speeds) < LATEST:  # the machine's speed comes first, or single numbers of tokens would stand for it
            return
        if self._steady:
            self._pace += self._speed - before
        self._steady = True
        # The one in the middle against those around it, which met the same machine: its clock may change every second.
        key, own = self._latest[LATEST // 2][0], speeds.pop(LATEST // 2)
        cell = self._cells[key]
        move = MOVE if cell.compared > 4 else 4 * MOVE  # what was never seen may be far off
        cell.value += max(CELL_RATE, 1 / (cell.compared + 3)) * min(max(own - median(speeds), -move), move)
        cell.compared += 1
        self._dirty = self._dirty or abs(cell.value - self._drawn.get(key, math.inf)) > VISIBLE

    def observe_draft(self, rows: int, drafts: int, seconds: float, *, cold: bool = False) -> None:
        """One ``propose`` of up to ``drafts`` tokens for ``rows`` rows. ``cold``: the step before it did not draft, so
        that weights and code were not in the processor's caches: it says what trying costs, not what drafting costs."""
        if rows > 0 and drafts > 0 and seconds > 0:  # nothing is proposed where a text is about to end
            known = self._drafts.setdefault(_bucket(rows), {})
            found = known.setdefault(drafts, _Estimate())
            if not cold or found.count < FIRST:
                certain, before = found.count >= FIRST, found.value
                found.add(seconds * math.exp(-self._pace), DRAFT_RATE)
                if certain:  # the machine is slower or quicker for other numbers of drafts too
                    moved = found.value - before
                    for other in known.values():
                        if other is not found:
                            other.value += moved if abs(moved) > MOVE else ALIKE * moved
                self._drawn_drafts.clear()

    def observe_bookkeeping(
        self, rows: int, drafting: bool, seconds: float, *, asked: bool = True, cold: bool = False
    ) -> None:
        """The rest of a step; ``asked`` as of ``bookkeeping``, ``cold`` as of ``observe_draft``."""
        if rows > 0:
            found = self._bookkeeping.setdefault((_kind(drafting, asked), _bucket(rows)), _Estimate())
            if not cold or found.count < FIRST:
                # Steps without drafts are told apart by little, so the least of the first ones would not do.
                found.add(seconds * math.exp(-self._pace), BOOKKEEPING_RATE, FIRST if drafting else 1)

    # ------------------------------------------------------------------------------------------ parts

    def _size(self, tokens: int) -> None:
        """Arrays for passes of up to so many tokens."""
        size = 1 << max(10, tokens.bit_length())
        n = np.arange(size)
        beyond = EXACT + np.floor(OCTAVE * np.log2(np.maximum(n, EXACT) / EXACT)).astype(np.int64)
        self._cell_of = np.where(n <= EXACT, n, beyond)
        self._bases, self._curves = {}, {}
        self._correction = np.ones(size)
        self._drawn, self._dirty = {}, True

    def _base(self, rows: int, context: int) -> Floats:
        """Seconds by tokens, as the table has them; kept for rows and contexts that are alike."""
        key = self._alike(rows, context)
        found = self._bases.get(key)
        if found is None:
            if len(self._bases) >= KEPT_CURVES:
                self._bases.clear()
            found = self._bases[key] = self._new_base(*key)
        return found

    def _alike(self, rows: int, context: int) -> tuple[int, int]:
        """The same for rows and contexts that are not told apart."""
        if self.table is None:
            return 0, 0
        rows = max(rows, 1)
        return _bucket(rows), round(4 * math.log2(64 + context / rows))

    def _new_base(self, rows_key: int, context_key: int) -> Floats:
        n = np.arange(len(self._cell_of))
        if self.table is None:
            return np.asarray(NOMINAL * (1 + SLOPE * (n - 1.0)))
        rows = round(_rows_of(rows_key))
        context = max(0, round((2 ** (context_key / 4) - 64) * rows))
        last = len(n) - 1
        knots = sorted({1, *(p.tokens for p in self.table.target if p.rows == 1 and p.tokens < last), last})
        return np.interp(n, knots, [self.table.seconds(k, rows, context) for k in knots])

    def _draw(self) -> None:
        """The correction by tokens: observed cells, and straight lines between them."""
        if self._cells:
            known = sorted(self._cells)
            values = [self._cells[key].value for key in known]
            self._correction = np.exp(np.interp(self._cell_of, known, values))
            self._drawn = dict(zip(known, values, strict=True))
        self._dirty = False

    def use(self, table: CostTable) -> None:
        """Take a table that was measured since; how far passes are from it is learnt anew, what drafts cost is not."""
        self._check = _Check()
        self._put(table)

    def _drop_table(self) -> None:
        self.trusted = False
        self._put(None)

    def _put(self, table: CostTable | None) -> None:
        self.table = table
        self._bases, self._curves, self._cells, self._drawn = {}, {}, {}, {}
        self._correction = np.ones(len(self._cell_of))
        self._latest, self._steady, self._speed = [], False, 0.0


def _bucket(rows: int) -> int:
    """Numbers of rows that cost alike: each up to 16, then four to an octave."""
    return rows if rows <= 16 else round(4 * math.log2(rows))


def _rows_of(bucket: int) -> float:
    return float(bucket) if bucket <= 16 else 2 ** (bucket / 4)


def _kind(drafting: bool, asked: bool) -> str:
    return "drafting" if drafting else "asked" if asked else "plain"


def _along(known: dict[int, _Estimate], drafts: int) -> float:
    """Seconds for a number of drafts: between what was observed of it and a line through all numbers, never falling,
    the more to the former the more often it was observed. By themselves, numbers seen seldom differ by chance, and the
    one that came off worst would not be seen again. Half of it in proportion where only one is known."""
    own = known.get(drafts)
    if len(known) == 1:
        ((first, found),) = known.items()
        return found.seconds if own is not None else found.seconds * 0.5 * (1 + drafts / first)
    points = [(k, found.seconds, min(found.count, MOST_WEIGHT)) for k, found in known.items()]
    total = sum(n for _, _, n in points)
    middle, mean = sum(n * k for k, _, n in points) / total, sum(n * y for _, y, n in points) / total
    slope = sum(n * (k - middle) * (y - mean) for k, y, n in points) / sum(n * (k - middle) ** 2 for k, _, n in points)
    line = max(mean + max(0.0, slope) * (drafts - middle), 0.1 * mean)
    if own is None:
        return line
    weight = min(own.count, MOST_WEIGHT)
    return (weight * own.seconds + LINE_WEIGHT * line) / (weight + LINE_WEIGHT)
