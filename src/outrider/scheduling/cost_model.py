"""What a step costs now: a measured table, corrected by the steps that are observed.

T_verify(tokens, rows, context) is a table's value (``scheduling.costs``; a nominal curve where there is none), times
the present speed of the machine, times a correction of that number of tokens, which is where a jagged curve shows: the
edge of a tile at 16 rows costs what it was observed to cost, not what a line through its neighbours says.
Passes in which chunks of prompts run beside the rows are corrected apart: their tokens have no logits. T_draft(rows, k)
and bookkeeping are learnt from observed steps alone, relative to the machine's speed.

The speed is the median over the latest passes, and a pass is compared with those around it: a clock that changes every
second, or a neighbour on the machine, makes all of them slower. All estimates are of logarithms and robust: an
observation moves them by a bounded step, so a pass that was held up counts like one that was a little slower.

A table that does not fit what is observed, one of another machine for instance, is dropped (``trusted``).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from statistics import median, median_low

import numpy as np
import numpy.typing as npt

from outrider.scheduling.costs import CostTable
from outrider.types import StepCost

__all__ = ["CostModel"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

EXACT = 256  # up to here each number of tokens has a correction of its own; beyond, 32 to an octave
OCTAVE = 32
NOMINAL, SLOPE = 0.005, 0.03  # seconds of a pass over one token, and what another one adds, where nothing is known
BESIDE = 8  # cells to an octave of passes with chunks of prompts
MOVE = 0.15  # the most that one observation counts for, in log seconds
CELL_RATE, DRAFT_RATE, BOOKKEEPING_RATE = 0.05, 0.1, 0.05
FIRST = 6  # observations of which the median counts
NEWEST = 3  # passes whose median is the machine's speed
LATEST = 5  # observations of which the median shows that times have changed,
FAR = math.log(1.3)  # and by how much at least
LINE_WEIGHT, MOST_WEIGHT = 32, 64  # observations that a line through draft costs is worth, and that one of them can be
CHECKED = 96  # observations in which a table is checked
OTHER_SHAPE, OTHER_SPEED = math.log(2.2), math.log(6.0)  # differences that no busy machine and no clock explains
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
    first: list[float] = field(default_factory=list)
    change: _Change = field(default_factory=_Change)

    def add(self, seconds: float, rate: float) -> float:
        """How far the estimate has moved, where times have changed at once; else 0."""
        change = 0.0
        observed = math.log(max(seconds, 1e-9))
        if self.count < FIRST:  # the very first calls of anything are slow
            self.first.append(observed)
            self.value = median_low(self.first)
        else:
            error = observed - self.value
            change = self.change.by(error)
            self.value += change or max(rate, 1 / (self.count + 1)) * min(max(error, -MOVE), MOVE)
        self.count += 1
        return change

    @property
    def seconds(self) -> float:
        return math.exp(self.value)


@dataclass(slots=True)
class _Line:
    """Seconds by numbers of drafts: between what was observed of a number and a line through all of them, never
    falling, the more to the former the more often it was observed. By themselves, numbers seen seldom differ by chance,
    and the one that came off worst would not be seen again. Half of it in proportion where only one is known."""

    points: dict[int, tuple[float, int]]  # seconds and weight, by drafts
    middle: float
    mean: float
    slope: float
    scale: float = 1.0

    @staticmethod
    def through(known: dict[int, _Estimate]) -> _Line:
        points = {k: (found.seconds, min(found.count, MOST_WEIGHT)) for k, found in known.items()}
        total = sum(n for _, n in points.values())
        middle = sum(n * k for k, (_, n) in points.items()) / total
        mean = sum(n * y for y, n in points.values()) / total
        if len(points) == 1:
            return _Line(points, middle, mean, 0.5 * mean / middle)
        slope = sum(n * (k - middle) * (y - mean) for k, (y, n) in points.items())
        slope /= sum(n * (k - middle) ** 2 for k, (_, n) in points.items())
        return _Line(points, middle, mean, max(0.0, slope))

    def seconds(self, drafts: int) -> float:
        """Of a number of drafts."""
        line = max(self.mean + self.slope * (drafts - self.middle), 0.1 * self.mean)
        own, weight = self.points.get(drafts, (0.0, 0))
        return self.scale * (weight * own + LINE_WEIGHT * line) / (weight + LINE_WEIGHT)


@dataclass(slots=True)
class _Cell:
    """How long passes over so many tokens take beside those over others."""

    value: float = 0.0  # log ratio to the table and the speed
    count: int = 0  # of passes
    compared: int = 0  # with those around them
    others: int = 0  # of which some were of other sizes


@dataclass(slots=True)
class _Corrections:
    """Logarithms of factors on the table's seconds, by cells."""

    usual: _Corrections | None = None  # what these are added to
    cells: dict[int, _Cell] = field(default_factory=dict)
    known: list[int] = field(default_factory=list)  # their keys, ascending

    def of(self, wanted: Ints) -> Floats:
        """Those of observed cells, and straight lines between them. [n] -> [n]"""
        usual = np.zeros(len(wanted)) if self.usual is None else self.usual.of(wanted)
        if not self.known:
            return usual
        return usual + np.interp(wanted, self.known, [self._added(key) for key in self.known])

    def at(self, key: int) -> float:
        """The same of one cell, without arrays: after a pass each of their operations takes several microseconds."""
        usual = 0.0 if self.usual is None else self.usual.at(key)
        if not self.known:
            return usual
        right = bisect_left(self.known, key)
        before, after = self.known[max(right - 1, 0)], self.known[min(right, len(self.known) - 1)]
        if before >= after:
            return usual + self._added(after)
        share = (key - before) / (after - before)
        return usual + (1 - share) * self._added(before) + share * self._added(after)

    def _added(self, key: int) -> float:
        return self.cells[key].value - (0.0 if self.usual is None else self.usual.at(key))

    def cell(self, key: int) -> _Cell:
        """The one of that key, made when it is first asked for."""
        found = self.cells.get(key)
        if found is None:
            found = self.cells[key] = _Cell()
            insort(self.known, key)
        return found


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
        self._latest: list[tuple[_Cell, float, int]] = []  # passes: of which size, log ratio to the table, worth
        self._alone = _Corrections()
        self._beside = _Corrections(self._alone)
        self._size(1024)
        self._drafts: dict[int, dict[int, _Estimate]] = {}  # by rows, by drafts
        self._lines: dict[int, _Line] = {}  # through them, as long as nothing new is observed
        self._bookkeeping: dict[tuple[str, int], _Estimate] = {}  # by kind of step, by rows

    # ------------------------------------------------------------------------------------------ what it says

    def verify(self, tokens: int, rows: int = 1, context: int = 0, *, beside: bool = False) -> float:
        """Seconds of a target pass. ``beside``: with chunks of prompts beside the rows."""
        return self.usual(tokens, rows, context, beside=beside) * math.exp(self._speed)

    def usual(self, tokens: int, rows: int = 1, context: int = 0, *, beside: bool = False) -> float:
        """The same, as if the machine had never become slower or faster."""
        if tokens >= len(self._cell_of):
            self._size(tokens + 1)
        correction = (self._beside if beside else self._alone).at(self._cell_of.item(tokens))
        return self._base(rows, context).item(tokens) * math.exp(correction)

    def verify_curve(self, tokens: int, more: int, rows: int = 1, context: int = 0, *, beside: bool = False) -> Floats:
        """float64 [more + 1]: seconds of passes over ``tokens``, ``tokens + 1``, ... new tokens; to read."""
        key = (tokens, more, beside, *self._alike(rows, context))
        found = self._curves.get(key)
        if found is None:
            end = tokens + more + 1
            if end > len(self._cell_of):
                self._size(end)
            if len(self._curves) >= KEPT_CURVES:
                self._curves.clear()
            corrections = (self._beside if beside else self._alone).of(self._cell_of[tokens:end])
            found = self._base(rows, context)[tokens:end] * np.exp(corrections + self._speed)
            found.setflags(write=False)  # it is kept
            self._curves[key] = found
        return found

    def draft(self, rows: int, drafts: int) -> float:
        """Seconds in which up to ``drafts`` tokens are proposed for ``rows`` rows; a guess where never seen."""
        if rows <= 0 or drafts <= 0:
            return 0.0
        if not self._drafts:
            return 0.2 * self.verify(rows, rows)
        wanted = _bucket(rows)
        line = self._lines.get(wanted)
        if line is None:
            nearest = wanted if wanted in self._drafts else min(self._drafts, key=lambda key: abs(key - wanted))
            line = self._lines[wanted] = _Line.through(self._drafts[nearest])
            if nearest != wanted:
                more = round(_rows_of(wanted)), round(_rows_of(nearest))
                line.scale = self.verify(more[0], more[0]) / self.verify(more[1], more[1])  # as the target's passes do
        return line.seconds(drafts) * math.exp(self._pace)

    def known_drafts(self, rows: int) -> int:
        """How many numbers of drafts were proposed for about so many rows."""
        return len(self._drafts.get(_bucket(rows), ()))

    def seen(self, tokens: int, *, beside: bool = False) -> int:
        """How many passes over about so many tokens were observed."""
        cell = (self._beside if beside else self._alone).cells.get(self._cell(tokens, beside))
        return cell.count if cell else 0

    def bookkeeping(self, rows: int, drafting: bool, *, asked: bool = True) -> float:
        """Seconds of a step outside the two passes; nothing until it was seen. ``asked``: with the work of a policy
        that was asked whether to draft."""
        wanted = _bucket(rows)
        kinds = _kind(drafting, asked), _kind(drafting, True), _kind(False, True), _kind(False, False)
        for kind in dict.fromkeys(kinds):
            found = self._bookkeeping.get((kind, wanted))
            if found is None:  # the nearest number of rows
                near = [(abs(known - wanted), known) for there, known in self._bookkeeping if there == kind]
                if not near:
                    continue
                found = self._bookkeeping[kind, min(near)[1]]
            return found.seconds * math.exp(self._pace)
        return 0.0

    def deciding(self, rows: int, drafting: bool = False, unknown: float = 0.0) -> float:
        """Seconds by which a step is longer because a policy was asked; ``unknown`` until both are known."""
        with_it, without = (self._bookkeeping.get((_kind(drafting, asked), _bucket(rows))) for asked in (True, False))
        if with_it is None or without is None:
            return unknown
        return max(0.0, with_it.seconds - without.seconds) * math.exp(self._pace)

    # ------------------------------------------------------------------------------------------ what it is told

    def observe_step(
        self,
        cost: StepCost,
        ready: int,
        planned: tuple[int, int],
        *,
        beside: bool,
        asked: bool = True,
        cold: bool = False,
        worth: int = 1,
    ) -> None:
        """All parts of a step with ``ready`` rows past their prompts. ``planned``: rows that were drafted for, and the
        most drafts of one; zeros for a plain step. ``beside``, ``asked``, ``cold``, ``worth``: as of the parts."""
        rows, drafts = planned
        features = cost.follow > 0
        self.observe_verify(
            cost.tokens, cost.rows, cost.context, cost.verify, features=features, beside=beside, worth=worth
        )
        # Plain decoding would not have shown the drafter anything.
        own = cost.bookkeeping - (0.0 if drafts else cost.follow)
        self.observe_bookkeeping(ready, drafts > 0, own, asked=asked, cold=cold)
        if drafts:
            self.observe_draft(rows, cost.drafts or drafts, cost.draft, cold=cold)

    def observe_verify(
        self,
        tokens: int,
        rows: int,
        context: int,
        seconds: float,
        *,
        features: bool = False,
        beside: bool = False,
        worth: int = 1,
    ) -> None:
        """A pass. ``features``: it gave those too, which estimates leave out. ``beside``: as of ``verify``. ``worth``:
        of how many it is the median."""
        if tokens <= 0 or not 0 < seconds < math.inf:
            return
        self._curves.clear()
        if features:
            seconds /= 1 + self.features
        if tokens >= len(self._cell_of):
            self._size(tokens + 1)
        ratio = math.log(seconds / float(self._base(rows, context)[tokens]))
        checked = self.table is not None and self._check.seen < CHECKED and not beside
        if checked and self._check.wrong(tokens, ratio):
            self._drop_table()
            ratio = math.log(seconds / float(self._base(rows, context)[tokens]))
        kind, key = self._beside if beside else self._alone, self._cell(tokens, beside)
        found = kind.cell(key)
        found.count += 1
        self._latest.append((found, ratio, worth))
        if len(self._latest) > LATEST:
            del self._latest[0]
        speeds = [ratio - cell.value for cell, ratio, _ in self._latest]
        before, self._speed = self._speed, median(speeds[-NEWEST:])
        if len(speeds) < LATEST:  # the machine's speed comes first, or single numbers of tokens would stand for it
            return
        if self._steady:
            self._pace += self._speed - before
        self._steady = True
        # The one in the middle against those around it, which met the same machine: its clock may change every second.
        (cell, _, many), own = self._latest[LATEST // 2], speeds.pop(LATEST // 2)
        mixed = any(other is not cell for other, _, _ in self._latest)
        known = cell.others if mixed else cell.compared
        move = MOVE * many if known > 4 else 4 * MOVE  # what was never seen may be far off
        cell.value += max(CELL_RATE * many, 1 / (known + 3)) * min(max(own - median(speeds), -move), move)
        cell.compared += 1
        cell.others += mixed

    def observe_draft(self, rows: int, drafts: int, seconds: float, *, cold: bool = False) -> None:
        """One ``propose`` of up to ``drafts`` tokens for ``rows`` rows. ``cold``: the step before it did not draft, so
        that weights and code were not in the processor's caches: it says the most that drafting costs, not what."""
        if rows > 0 and drafts > 0 and seconds > 0:  # nothing is proposed where a text is about to end
            known = self._drafts.setdefault(_bucket(rows), {})
            found = known.setdefault(drafts, _Estimate())
            seconds *= math.exp(-self._pace)
            if not cold or found.count < FIRST or seconds < found.seconds:
                moved = found.add(seconds, DRAFT_RATE)
                for other in known.values() if moved else ():  # other numbers of drafts cost more or less at once too
                    other.value += moved if other is not found else 0.0
                self._lines.clear()

    def observe_bookkeeping(
        self, rows: int, drafting: bool, seconds: float, *, asked: bool = True, cold: bool = False
    ) -> None:
        """The rest of a step; ``asked`` as of ``bookkeeping``, ``cold`` as of ``observe_draft``."""
        if rows > 0:
            found = self._bookkeeping.setdefault((_kind(drafting, asked), _bucket(rows)), _Estimate())
            if not cold or found.count < FIRST:
                found.add(seconds * math.exp(-self._pace), BOOKKEEPING_RATE)

    # ------------------------------------------------------------------------------------------ parts

    def _size(self, tokens: int) -> None:
        """Arrays for passes of up to so many tokens."""
        size = 1 << max(10, tokens.bit_length())
        n = np.arange(size)
        beyond = EXACT + np.floor(OCTAVE * np.log2(np.maximum(n, EXACT) / EXACT)).astype(np.int64)
        self._cell_of = np.where(n <= EXACT, n, beyond)
        self._bases, self._curves = {}, {}

    def _cell(self, tokens: int, beside: bool) -> int:
        """Passes that count as of one size; with chunks of prompts they are of many, few of which come again."""
        if beside:
            tokens = round(2 ** (round(BESIDE * math.log2(tokens)) / BESIDE))
        return int(self._cell_of[tokens]) if tokens < len(self._cell_of) else -1

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
        # A pass has at least a token of each row: with fewer the table would share the context among fewer rows.
        knots = sorted({1, rows, *(p.tokens for p in self.table.target if p.rows == 1 and p.tokens < last), last})
        return np.interp(n, knots, [self.table.seconds(k, rows, context) for k in knots])

    def use(self, table: CostTable) -> None:
        """Take a table that was measured since; how far passes are from it is learnt anew, what drafts cost is not."""
        self._check = _Check()
        self._put(table)

    def _drop_table(self) -> None:
        self.trusted = False
        self._put(None)

    def _put(self, table: CostTable | None) -> None:
        self.table = table
        self._bases, self._curves = {}, {}
        self._alone = _Corrections()
        self._beside = _Corrections(self._alone)
        self._latest, self._steady, self._speed = [], False, 0.0


def _bucket(rows: int) -> int:
    """Numbers of rows that cost alike: each up to 16, then four to an octave."""
    return rows if rows <= 16 else round(4 * math.log2(rows))


def _rows_of(bucket: int) -> float:
    return float(bucket) if bucket <= 16 else 2 ** (bucket / 4)


def _kind(drafting: bool, asked: bool) -> str:
    if drafting:
        return "drafting" if asked else "repeating"
    return "asked" if asked else "plain"
