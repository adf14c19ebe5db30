"""Which format of the core each matrix of a stack is packed in.

Most dtypes use one format for all layers. ``file`` takes each matrix as its file stores it: block formats that the core
multiplies are repacked with the values they have; others take the nearest format that loses nothing that matters, which
is blocks of 32 8-bit values for any quantised or 8-bit one. Matrices that are packed together (q, k and v; gate and up)
share a format: one that holds the values of all of them, where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from outrider.config import StackConfig
from outrider.errors import InvalidRequest

__all__ = ["BLOCKS", "FILE", "FORMATS", "GROUPS", "BlockWeights", "Formats", "Parts", "choose_formats", "takes_blocks"]

FILE = "file"
"""The dtype that takes every matrix as the file stores it."""
FORMATS = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "int4": "i4"}
"""Dtypes that use one format for all layers, with the core's name of it."""
GROUPS = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Matrices that are packed together."""
BLOCKS = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1"}
"""Tensor types that the core multiplies, with its name of each."""
FLOATS = {"F64": "f32", "F32": "f32", "F16": "bf16", "BF16": "bf16"}


class Parts(Protocol):
    """What rows of a matrix [N, K] in a block format are made of, as ``models.gguf.BlockParts`` is."""

    @property
    def kind(self) -> str:
        """Q8_0, Q4_0 or Q4_1."""

    @property
    def values(self) -> Tensor:
        """[N, K]: int8 for Q8_0, uint8 of 0 to 15 for the others."""

    @property
    def scale(self) -> Tensor:
        """float32 [N, K / 32], exactly the file's fp16."""

    @property
    def minimum(self) -> Tensor | None:
        """The same; what Q4_1 adds."""


@runtime_checkable
class BlockWeights(Protocol):
    """Weights that know their tensor types and give their parts, as ``models.gguf.GGUFWeights`` does."""

    kinds: Mapping[str, str]
    """Canonical name -> tensor type, such as Q4_1."""

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows of a weight, dequantised."""

    def blocks(self, name: str, begin: int = 0, end: int | None = None) -> Parts | None:
        """The parts of rows of a matrix; None for a type without."""


@dataclass(frozen=True, slots=True)
class Formats:
    """The core's format of every matrix of a stack."""

    layers: Sequence[Mapping[str, str]]
    """Per layer: format of qkv, out, gate_up and down."""
    head: str
    embedding: str
    tied: bool
    """The embedding's rows are read from the head."""
    cache: str
    """Of keys and values."""
    kinds: Sequence[tuple[str, str]] = ()
    """With ``file``: each tensor type of the matrices, and a format that matrices of it took."""


def choose_formats(config: StackConfig, weights: Mapping[str, Tensor], dtype: str) -> Formats:
    """The formats of a stack. ``dtype``: one of FORMATS, or FILE.

    Raises InvalidRequest for FILE where the weights come from no file that has tensor types.
    """
    if dtype == FILE:
        return _formats_of_file(config, weights)
    one = FORMATS[dtype]
    layers = [dict.fromkeys(GROUPS, one)] * len(config.layers)
    cache = "f32" if one == "f32" else "bf16"
    # With int4 weights the head stays int8: int4 would cost far more accuracy than it saves time.
    return Formats(layers, head="i8" if one == "i4" else one, embedding=cache, tied=False, cache=cache)


def _formats_of_file(config: StackConfig, weights: Mapping[str, Tensor]) -> Formats:
    if not isinstance(weights, BlockWeights):
        raise InvalidRequest(f"dtype {FILE!r} is for GGUF files; expected one of {', '.join(FORMATS)} for this model")
    kinds = weights.kinds
    used: set[tuple[str, str]] = set()

    def together(names: Sequence[str]) -> str:
        present = [kinds[name] for name in names if name in kinds]
        chosen = _common([_nearest(kind) for kind in present])
        used.update((kind, chosen) for kind in present)
        return chosen

    layers = [
        {group: together([f"layers.{i}.{name}.weight" for name in names]) for group, names in GROUPS.items()}
        for i in range(len(config.layers))
    ]
    head_name = "head.weight" if "head.weight" in kinds else "embed.weight"
    head = together([head_name]) if config.vocab_size else "f32"
    embedding = together(["embed.weight"]) if "embed.weight" in kinds else "f32"
    tied = config.vocab_size > 0 and head_name == "embed.weight" and head not in FLOATS.values()
    floats = all(chosen == "f32" for layer in layers for chosen in layer.values())
    return Formats(layers, head, embedding, tied, "f32" if floats else "bf16", tuple(sorted(used)))


def _nearest(kind: str) -> str:
    return BLOCKS.get(kind) or FLOATS.get(kind) or "q8_0"


def _common(formats: Sequence[str]) -> str:
    """One format that holds the values of all."""
    if len(set(formats)) == 1:
        return formats[0]
    return "f32" if set(formats) & set(FLOATS.values()) else "q8_min"


def takes_blocks(chosen: str, kind: str) -> bool:
    """Whether a matrix of that format takes the parts of a tensor of that type as they are."""
    return kind in BLOCKS and chosen in (BLOCKS[kind], "q8_min")
