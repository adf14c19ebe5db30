"""Block formats of GGUF tensors: their sizes, their values in float32, and the parts of those that kernels multiply.

A tensor is a run of blocks along its rows; a block holds 1, 32 or 256 values in a fixed number of bytes, little-endian.
Notation below: d and m (or dmin) are the block's fp16 scale and minimum, q an unpacked integer. Each decoder takes
blocks as uint8 [n, bytes] and writes float32 [n, values], with the roundings of the format's reference (one for the
product, one for the sum), so values equal it bit for bit.

Source: the definition of the formats in ggml (ggml-common.h); checked in the tests against the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.errors import CheckpointError

__all__ = [
    "BLOCK_TYPES",
    "MULTIPLIABLE",
    "REMOVED_TYPES",
    "BlockParts",
    "BlockType",
    "block_parts",
    "decodable",
    "decode",
    "type_name",
]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHUNK = 1 << 17  # values decoded at a time: input, output and temporaries stay in the second-level cache


@dataclass(frozen=True, slots=True)
class BlockType:
    """A tensor type of GGUF files."""

    name: str
    values: int
    """Values in a block."""
    size: int
    """Bytes of a block."""
    decoder: Callable[[Bytes, Floats], None] | None = None
    """uint8 [n, size] -> float32 [n, values]; None: a type that is known but not read here."""


@dataclass(frozen=True, slots=True)
class BlockParts:
    """What a matrix [N, K] in a directly multipliable format is made of.

    ``values[n, k] * scale[n, k // 32] + minimum[n, k // 32]`` is the weight; both products of Q8_0 and Q4_0 are exact
    in float32, Q4_1's sum is rounded once.
    """

    kind: str
    """Q8_0, Q4_0 or Q4_1."""
    values: Tensor
    """[N, K]: int8 for Q8_0, uint8 of 0 to 15 for Q4_0 and Q4_1."""
    scale: Tensor
    """float32 [N, K / 32], exactly the file's fp16."""
    minimum: Tensor | None
    """float32 [N, K / 32]: -8 d for Q4_0, m for Q4_1; None for Q8_0."""

    def dequantise(self) -> Tensor:
        """float32 [N, K]."""
        rows, columns = self.values.shape
        weight = self.values.float().view(rows, -1, 32) * self.scale[..., None]
        if self.minimum is not None:
            weight += self.minimum[..., None]
        return weight.view(rows, columns)


# ------------------------------------------------------------------------------------------------ decoders


def _half(blocks: Bytes, at: int) -> Floats:
    """The fp16 at byte ``at`` of every block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _float32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f4")


def _float64(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f8")


def _float16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f2")


def _bfloat16(blocks: Bytes, out: Floats) -> None:
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    """d, 32 int8: q d."""
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


def _nibbles(packed: Bytes, out: Floats) -> None:
    """16 bytes -> 32 values: byte j holds value j (low four bits) and value j + 16 (high)."""
    np.bitwise_and(packed, 15, out=out[:, :16], casting="unsafe", dtype=np.uint8)
    np.right_shift(packed, 4, out=out[:, 16:], casting="unsafe", dtype=np.uint8)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    """d, 16 bytes: (q - 8) d."""
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    """d, m, 16 bytes: q d + m."""
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _fifth_bits(packed: Bytes) -> Bytes:
    """4 bytes -> 32 times 0 or 16: bit j belongs to value j."""
    bits: Bytes = np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)
    return bits


def _q5_0(blocks: Bytes, out: Floats) -> None:
    """d, 4 bytes of fifth bits, 16 bytes: (q - 16) d."""
    _nibbles(blocks[:, 6:], out)
    out += _fifth_bits(blocks[:, 2:6])
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    """d, m, 4 bytes of fifth bits, 16 bytes: q d + m."""
    _nibbles(blocks[:, 8:], out)
    out += _fifth_bits(blocks[:, 4:8])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(blocks: Bytes, out: Floats) -> None:
    """d, 16 bytes: table[q] d."""
    np.take(_IQ4_NL, blocks[:, 2:] & 15, out=out[:, :16], mode="clip")
    np.take(_IQ4_NL, blocks[:, 2:] >> 4, out=out[:, 16:], mode="clip")
    out *= _half(blocks, 0)


def _fields(packed: Bytes, run: int, bits: int, count: int) -> Bytes:
    """Fields of ``bits`` bits: within each ``run`` bytes, field f of every byte comes before field f + 1 of any.

    uint8 [n, bytes] -> uint8 [n, bytes / run, count, run].
    """
    shifts = np.arange(0, bits * count, bits, dtype=np.uint8)[:, None]
    fields: Bytes = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return fields


def _q2_k(blocks: Bytes, out: Floats) -> None:
    """16 bytes (scale in the low, minimum in the high four bits), 64 bytes, d, dmin: q (d scale) - dmin minimum, in
    16 sub-blocks of 16 values."""
    scales = blocks[:, :16]
    step = _half(blocks, 80) * (scales & 15)
    minimum = _half(blocks, 82) * (scales >> 4)
    values = out.reshape(-1, 16, 16)
    np.multiply(_fields(blocks[:, 16:80], 32, 2, 4).reshape(values.shape), step[:, :, None], out=values)
    values -= minimum[:, :, None]


def _q3_k(blocks: Bytes, out: Floats) -> None:
    """32 bytes of third bits (inverted), 64 bytes, 12 bytes of 6-bit scales, d: (q - 4) d (scale - 32), in 16
    sub-blocks of 16 values."""
    low = _fields(blocks[:, 96:104], 8, 4, 2).reshape(-1, 16)
    high = _fields(blocks[:, 104:108], 4, 2, 4).reshape(-1, 16)
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    step = _half(blocks, 108) * scales
    third = _fields(blocks[:, :32], 32, 1, 8).reshape(-1, 16, 16) << 2
    quants = (_fields(blocks[:, 32:96], 32, 2, 4).reshape(-1, 16, 16) | third).view(np.int8) - np.int8(4)
    np.multiply(quants, step[:, :, None], out=out.reshape(-1, 16, 16))


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """d, dmin and 12 bytes with 8 scales and 8 minima of 6 bits -> d scale and dmin minimum, float32 [n, 8] each.

    Bytes 0 to 3 and 4 to 7: the first four scales and minima, with the upper two bits of the last four above them;
    bytes 8 to 11: the lower four bits of the last four scales, and of the last four minima above those.
    """
    scale, minimum, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scale & 63, (rest & 15) | ((scale >> 6) << 4)], axis=1)
    minima = np.concatenate([minimum & 63, (rest >> 4) | ((minimum >> 6) << 4)], axis=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """d, dmin, 12 bytes of scales and minima, 128 bytes: q (d scale) - dmin minimum, in 8 sub-blocks of 32 values."""
    step, minimum = _scales_and_minima(blocks)
    values = out.reshape(-1, 8, 32)
    np.multiply(_fields(blocks[:, 16:], 32, 4, 2).reshape(values.shape), step[:, :, None], out=values)
    values -= minimum[:, :, None]


def _q5_k(blocks: Bytes, out: Floats) -> None:
    """Q4_K with 32 bytes of fifth bits before the 128."""
    step, minimum = _scales_and_minima(blocks)
    values = out.reshape(-1, 8, 32)
    quants = _fields(blocks[:, 48:], 32, 4, 2).reshape(values.shape)
    quants |= _fields(blocks[:, 16:48], 32, 1, 8).reshape(values.shape) << 4
    np.multiply(quants, step[:, :, None], out=values)
    values -= minimum[:, :, None]


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """128 bytes of lower four bits, 64 bytes of upper two, 16 int8 scales, d: (q - 32) (d scale), in 16 sub-blocks of
    16 values."""
    step = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    quants = _fields(blocks[:, :128], 64, 4, 2).reshape(-1, 256)
    quants |= _fields(blocks[:, 128:192], 32, 2, 4).reshape(-1, 256) << 4
    signed = quants.view(np.int8).reshape(-1, 16, 16) - np.int8(32)
    np.multiply(signed, step[:, :, None], out=out.reshape(-1, 16, 16))


BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, _float32),
    1: BlockType("F16", 1, 2, _float16),
    2: BlockType("Q4_0", 32, 18, _q4_0),
    3: BlockType("Q4_1", 32, 20, _q4_1),
    6: BlockType("Q5_0", 32, 22, _q5_0),
    7: BlockType("Q5_1", 32, 24, _q5_1),
    8: BlockType("Q8_0", 32, 34, _q8_0),
    9: BlockType("Q8_1", 32, 36),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8, _float64),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2, _bfloat16),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
    41: BlockType("Q1_0", 128, 18),
}
"""Type number in a file -> type. Those without a decoder are known by size only, so that a file can be listed."""

REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Types that llama.cpp wrote once and dropped."""

MULTIPLIABLE = ("Q8_0", "Q4_0", "Q4_1")
"""Types whose parts ``block_parts`` gives."""


def decodable() -> list[str]:
    """Names of the types that are read here."""
    return [kind.name for kind in BLOCK_TYPES.values() if kind.decoder is not None]


def type_name(number: int) -> str:
    """A type's name, for messages."""
    if number in BLOCK_TYPES:
        return BLOCK_TYPES[number].name
    if number in REMOVED_TYPES:
        return f"{REMOVED_TYPES[number]} (number {number}, which llama.cpp dropped)"
    return f"number {number}"


def decode(kind: BlockType, blocks: Bytes, out: Floats) -> None:
    """Blocks uint8 [n, size] to float32 [n, values], a chunk at a time. Raises CheckpointError for a type that is not
    read here."""
    if kind.decoder is None:
        raise CheckpointError(f"tensor type {kind.name} is not read here; expected one of: {', '.join(decodable())}")
    count = max(1, CHUNK // kind.values)
    with np.errstate(all="ignore"):  # what is not finite is found by who asked
        for begin in range(0, len(blocks), count):
            kind.decoder(blocks[begin : begin + count], out[begin : begin + count])


def block_parts(kind: BlockType, blocks: Bytes, rows: int) -> BlockParts:
    """The parts of ``rows`` whole rows in a multipliable format, from blocks uint8 [n, size].

    Raises CheckpointError for another format.
    """
    if kind.name not in MULTIPLIABLE:
        raise CheckpointError(f"tensor type {kind.name} has no parts to multiply; expected {', '.join(MULTIPLIABLE)}")
    scale = torch.from_numpy(_half(blocks, 0)).view(rows, -1)
    if kind.name == "Q8_0":
        values = torch.from_numpy(blocks[:, 2:].copy().view(np.int8)).view(rows, -1)
        return BlockParts(kind.name, values, scale, None)
    begin = kind.size - 16
    quants = np.empty((len(blocks), 32), np.uint8)
    np.bitwise_and(blocks[:, begin:], 15, out=quants[:, :16])
    np.right_shift(blocks[:, begin:], 4, out=quants[:, 16:])
    minimum = torch.from_numpy(_half(blocks, 2)).view(rows, -1) if kind.name == "Q4_1" else scale * -8
    return BlockParts(kind.name, torch.from_numpy(quants).view(rows, -1), scale, minimum)
