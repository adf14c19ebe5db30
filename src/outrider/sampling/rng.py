"""Counter-based random numbers: each is a function of (request seed, round, position, purpose), never of state.

The mixer is SplitMix64's (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)::

    mix64(x):  x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;  x ^= x >> 27;  x *= 0x94D049BB133111EB;  x ^= x >> 31
    absorb(h, x) = mix64((h + GAMMA) ^ x)                    GAMMA = 0x9E3779B97F4A7C15, all modulo 2**64

A key absorbs round, purpose and position, in that order, into a word made of the seed. From a key come

    uniform         k = key >> 12;                           u = (k + 0.5) * 2**-52, float64, never 0 or 1
    Gumbel value    x = mix64(key + (v + 1) * GAMMA) of token id v
                    u = min((double(x) + 0.5) * 2**-64, 1 - 2**-53);  E = -log1p(-u);  g = -log(E), float64

so the value of token v depends on the key and on v alone: a distribution truncated to its top k meets the same values
as the full one. E is a unit exponential, and ``argmax(logit + g)`` is the token with the smallest E / p. That token has
a small E, so the *relative* precision of u near 0 matters: x keeps all its bits (a float holds them at any magnitude),
and log1p(-u) is used instead of log(u). With 32 bits tokens of p < 1e-10 would be drawn too rarely; with 64 the
distribution is exact to float64 for every token that can occur.

**A draw is defined in float64**: the largest ``double(logit) + g``, the lowest id on ties. It is *found* in float32,
and only scores within float32's error of the largest are compared in float64, so that another implementation (C++,
CUDA) finds the same token, whatever the last bits of its logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import Rule
from outrider.core import native
from outrider.errors import OutriderError

__all__ = ["GAMMA", "RowRng", "gumbel", "gumbel_argmax", "mix64", "purpose_word"]

GAMMA = 0x9E3779B97F4A7C15
MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_G, _M1, _M2 = np.uint64(GAMMA), np.uint64(MIX1), np.uint64(MIX2)
_MASK, _ONE = 2**64 - 1, np.uint64(1)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
_CHUNK = 16384  # values mixed at a time: the buffers stay in the second-level cache

_Words = npt.NDArray[np.uint64]


# ------------------------------------------------------------------------------------------------ keys


def mix64(x: _Words) -> _Words:
    """SplitMix64's finaliser, elementwise on a uint64 array (at least 1-d: numpy scalars warn when they wrap)."""
    x = (x ^ (x >> _S30)) * _M1
    x = (x ^ (x >> _S27)) * _M2
    return x ^ (x >> _S31)


def _absorb(key: _Words, x: _Words) -> _Words:
    return mix64((key + _G) ^ x)


def _absorb_one(key: int, x: int) -> int:
    x ^= (key + GAMMA) & _MASK
    x = (x ^ x >> 30) * MIX1 & _MASK
    x = (x ^ x >> 27) * MIX2 & _MASK
    return x ^ x >> 31


@lru_cache(maxsize=4096)
def _word(value: int | str) -> int:
    """64 bits that stand for any Python int (negative or huge) or for a purpose."""
    if isinstance(value, str):
        data = value.encode()
    else:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


@lru_cache(maxsize=64)
def purpose_word(purpose: str, tokens: bool = False) -> int:
    """The word of a purpose in the keys of ``RowRng``: of its uniform numbers, or of its token keys. The empty purpose
    of token keys is the one that rows under ``coupled`` share."""
    kind = "tokens" if tokens else "uniform"
    return _word(f"{kind} {purpose}".rstrip())


class RowRng:
    """The random numbers of one step's rows (``types.Rng``).

    seeds, rounds, rules: one per row. A row's numbers depend on its own three alone, never on its neighbours.

    ``rejection`` and ``block`` put the round into the key: the rng of a rejected tail must not come back at the same
    positions, since what was accepted depended on it. There, token keys of different purposes ("draft": the drafter's
    own draws, "own": the target's) are independent streams.

    ``coupled`` leaves out the round, and its token keys leave out the purpose as well: drafter and target meet the same
    Gumbel values at a position, today and whenever the position is visited again (Daliri, Musco, Suresh 2024,
    arXiv 2408.07978, section 3).
    """

    def __init__(self, seeds: Sequence[int], rounds: Sequence[int], rules: Sequence[Rule]) -> None:
        self._seeds, self._rounds, self.rules = seeds, rounds, rules
        self._rows: list[tuple[int, int]] | None = None
        self._streams: dict[int, _Words] = {}

    @property
    def rows(self) -> list[tuple[int, int]]:
        """Of each row the word of its seed and what is absorbed of its round."""
        if self._rows is None:  # cached_property would take a lock, in every step
            self._rows = [
                (_word(seed), 0 if rule == "coupled" else round + 1)
                for seed, round, rule in zip(self._seeds, self._rounds, self.rules, strict=True)
            ]
        return self._rows

    def uniform(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        """float64 in (0, 1), one for each (row, position): odd multiples of 2**-53. int64 [n], int64 [n] -> [n]."""
        word = purpose_word(purpose)
        bits = self._words(word, word, rows, positions) >> np.uint64(12)
        return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)

    def token_keys(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        """int64 [n]: the keys of ``gumbel``, one for each (row, position). int64 [n], int64 [n] -> [n]."""
        return torch.from_numpy(self._words(purpose_word(purpose, True), _SHARED, rows, positions).view(np.int64))

    def token_keys_after(self, rows: Sequence[int], starts: Sequence[int], count: int, purpose: str) -> list[list[int]]:
        """``token_keys`` of ``count`` positions of each of n rows, from its start on. -> n lists of ``count``"""
        own = purpose_word(purpose, True)
        if native is None:
            owners = np.repeat(np.array(rows, np.int64), count)
            positions = (np.array(starts, np.int64)[:, None] + np.arange(count)).ravel()
            words = self._words(own, _SHARED, torch.from_numpy(owners), torch.from_numpy(positions))
            return words.view(np.int64).reshape(len(rows), count).tolist()
        streams = [(*self.rows[b], _SHARED if self.rules[b] == "coupled" else own) for b in rows]
        keys: list[list[int]] = native.token_keys(streams, starts, count)
        return keys

    def _words(self, own: int, shared: int, rows: Tensor, positions: Tensor) -> _Words:
        """One word for each (row, position) of the stream ``own``; of ``shared`` in rows under ``coupled``."""
        stream = self._streams.get(own)
        if stream is None:  # Python's integers are quicker than arrays of so few
            starts = [
                _absorb_one(_absorb_one(seed, round), shared if rule == "coupled" else own)
                for (seed, round), rule in zip(self.rows, self.rules, strict=True)
            ]
            stream = self._streams[own] = np.array(starts, np.uint64)
        owner, at = rows.cpu().numpy(), positions.cpu().numpy()
        if native is None:
            return _absorb(stream[owner], at.view(np.uint64))
        words = np.empty(len(owner), np.uint64)
        native.absorb_positions(stream, np.ascontiguousarray(owner), np.ascontiguousarray(at), words)
        return words


_SHARED = purpose_word("", True)


# ------------------------------------------------------------------------------------------------ Gumbel values


def _signed(word: np.uint64) -> int:
    return int(word.astype(np.int64))


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 words taken as unsigned; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(keys: Tensor, ids: Tensor | None, vocab_size: int) -> Tensor:
    """Gumbel values as the module defines them, on any device: the reference, and the path of other devices.

    keys int64 [n]; ids int64 [n, S] or [S], None = all of ``range(vocab_size)`` -> float64 [n, S].
    """
    if ids is None:
        ids = torch.arange(vocab_size, device=keys.device)
    x = keys[:, None] + (ids + 1) * _signed(_G)  # int64 arithmetic wraps: the same words as unsigned
    x = (x ^ _logical_shift(x, 30)) * _signed(_M1)
    x = (x ^ _logical_shift(x, 27)) * _signed(_M2)
    x = x ^ _logical_shift(x, 31)
    word = _logical_shift(x, 32).double() * 2.0**32 + (x & 0xFFFFFFFF).double()  # one rounding: double(x)
    u = ((word + 0.5) * 2.0**-64).clamp_max_(1 - 2.0**-53)
    return u.neg_().log1p_().neg_().log_().neg_()


def gumbel_argmax(logits: Tensor, keys: Tensor, ids: Tensor | None = None) -> Tensor:
    """One exact draw per row from softmax(logits): the column of the largest logit + Gumbel value.

    logits float32 or float64 [n, S]; keys int64 [n]; ids int64 [n, S], ascending in each row: the token of each
    column, None when column v is token v. -> int64 [n]. Raises OutriderError for a row with NaN or +inf, or with
    -inf for every token.
    """
    if logits.device.type != "cpu":
        return _largest_anywhere(logits, keys.to(logits.device), ids)
    if native is not None and logits.dtype == torch.float32:
        out = torch.empty(len(keys), dtype=torch.int64)
        try:
            native.gumbel_argmax(logits.contiguous(), keys, out, None, None if ids is None else ids.contiguous())
        except ValueError as error:
            raise OutriderError(str(error)) from error
        return out
    tokens = None if ids is None else ids.numpy().view(np.uint64)
    scores, words = logits.numpy(), keys.numpy().view(np.uint64)
    n, width = scores.shape
    rows = max(1, _CHUNK // max(width, 1))
    if n <= rows:
        return torch.from_numpy(_largest_score(scores, words, tokens))
    groups = [slice(r, r + rows) for r in range(0, n, rows)]
    winners = [_largest_score(scores[g], words[g], None if tokens is None else tokens[g]) for g in groups]
    return torch.from_numpy(np.concatenate(winners))


def _largest_anywhere(logits: Tensor, keys: Tensor, ids: Tensor | None) -> Tensor:
    """``gumbel_argmax`` on any device, all scores in float64."""
    if not bool(logits.amax(-1).isfinite().all()):  # amax of a row with NaN is NaN
        raise OutriderError(_NO_NUMBERS)
    return (logits.double() + gumbel(keys, ids, logits.shape[1])).argmax(-1)


_NO_NUMBERS = "logits must be numbers, got NaN or +inf, or -inf for every token; the weights or the input are damaged"
_STEPS = np.arange(1, _CHUNK + 1, dtype=np.uint64)[None] * _G  # of columns that are tokens: one piece serves them all


def _largest_score(logits: npt.NDArray[np.floating], keys: _Words, ids: _Words | None) -> npt.NDArray[np.int64]:
    """Winners of a few rows: scores in float32, a piece of the columns at a time, then the close ones in float64."""
    n, width = logits.shape
    peak = logits.max(1)
    if not np.isfinite(peak).all():
        raise OutriderError(_NO_NUMBERS)
    best = np.full(n, -np.inf, np.float32)
    lines: list[npt.NDArray[np.int64]] = []  # row and column of each score that may still be the largest
    for c in range(0, width, _CHUNK):
        piece = logits[:, c : c + _CHUNK]
        if ids is None:
            x = (keys + np.uint64(c * GAMMA & _MASK))[:, None] + _STEPS[:, : piece.shape[1]]
        else:
            x = keys[:, None] + (ids[:, c : c + _CHUNK] + _ONE) * _G
        scores = _scores(piece, x)
        leader = scores.max(1)
        best = np.maximum(best, leader)
        # Error of a score: under 1e-5 from u and the logarithms while g > -1.9, but up to 1 past that, where 1 - u has
        # few bits left (such a value matters only where a logit stands that far above the best score); and the rounding
        # of the sum, 2**-24 of its size, and of a float64 logit.
        floor = best - np.where(peak > best + 1.8, 2.5, 1e-4) - np.abs(best) * 5e-7
        if (leader >= floor).any():
            row, column = np.divmod(np.flatnonzero(scores >= floor[:, None]), scores.shape[1])
            lines.append(np.stack([row, column + c]))
    row, column = np.concatenate(lines, 1)
    if len(row) == n and len(lines) == 1:
        return column
    token = column.view(np.uint64) if ids is None else ids[row, column]
    word = mix64(keys[row] + (token + _ONE) * _G).astype(np.float64)
    exponential = -np.log1p(-np.minimum((word + 0.5) * 2.0**-64, 1 - 2.0**-53))
    exact = logits[row, column].astype(np.float64) - np.log(exponential)
    order = np.lexsort((column, -exact, row))
    return column[order[np.flatnonzero(np.diff(row[order], prepend=-1))]]


def _scores(logits: npt.NDArray[np.floating], x: _Words) -> npt.NDArray[np.float32]:
    """logits + Gumbel values in float32, in as few passes as possible; x (overwritten) = key + counter."""
    shifted = x >> _S30
    x ^= shifted
    x *= _M1
    np.right_shift(x, _S27, out=shifted)
    x ^= shifted
    x *= _M2  # mix64's last step moves x by less than one part in 2**30: not visible in float32
    out = x.astype(np.float32)
    out *= np.float32(-(1 - 2.0**-24) * 2.0**-64)  # -u; the factor keeps u below 1 where x rounds up to 2**64
    np.log1p(out, out=out)
    np.negative(out, out=out)
    np.log(out, out=out)
    return np.subtract(logits, out, out=out, casting="same_kind")
