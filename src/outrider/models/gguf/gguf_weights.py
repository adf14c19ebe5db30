"""The weights of a GGUF file by canonical name (see ``outrider.backends.layers``), as they were before the conversion.

Architecture ``llama`` stores the rows of q and k in the order of interleaved rotation (dimension pairs 2j, 2j + 1);
they are put back in the order of half-split rotation (j, j + Dh / 2). Rows are whole in every block format, so blocks
are reordered without being decoded. Qwen and Gemma files are not permuted. Gemma's norms are stored as 1 + w; 1 is
subtracted, because the stack adds it again (``norm_offset``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outrider.errors import CheckpointError
from outrider.models.gguf.architecture import QK_NORMS, ROPE_FACTORS, TOPS, Architecture, architecture_of
from outrider.models.gguf.blocks import MULTIPLIABLE, BlockParts, block_parts, decodable, decode
from outrider.models.gguf.container import GGUFFile, TensorInfo
from outrider.models.gguf.gguf_config import read_config

__all__ = ["GGUFWeights", "main_type", "read_model"]

CHUNK = 1 << 17  # values decoded, checked and converted at a time: they stay in the second-level cache


def read_model(file: GGUFFile, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], GGUFWeights]:
    """The Hugging Face config of a file's model, and its weights by canonical name, read on access.

    Tensors are checked against the config: none missing, none unknown, all of the right shape and of a type that is
    read here. ``dtype``: what weights are converted to. Raises CheckpointError.
    """
    config = read_config(file)
    return config, GGUFWeights(file, config, dtype)


def main_type(file: GGUFFile) -> str:
    """The tensor type that holds most bytes of a file's matrices, such as Q4_1; empty where it has none."""
    sizes: Counter[str] = Counter()
    for info in file.tensors.values():
        if len(info.shape) == 2:
            sizes[info.kind.name] += info.size
    return sizes.most_common(1)[0][0] if sizes else ""


class GGUFWeights(Mapping[str, Tensor]):
    """Weights by canonical name, each decoded, checked and converted on access, and not kept.

    Raises CheckpointError for tensors that are missing, unknown, of another shape than the config says, or of a type
    that is not read here.
    """

    def __init__(self, file: GGUFFile, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self.file, self.dtype = file, dtype
        _, self._architecture = architecture_of(file)
        self._tied = bool(config["tie_word_embeddings"])  # an output matrix that is there is then a copy
        self._heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        self.names: dict[str, str] = {}
        """Canonical name -> name in the file."""
        for name in file.tensors:
            canonical = self._canonical(name)
            if canonical is not None:
                self.names[canonical] = name
        self._check(_expected(config, self._architecture))
        self.shapes = {canonical: file.tensors[name].shape for canonical, name in self.names.items()}
        self.kinds = {canonical: file.tensors[name].kind.name for canonical, name in self.names.items()}
        """Canonical name -> tensor type, such as Q4_1."""

    @property
    def identity(self) -> str:
        """Changes whenever one of the files does."""
        return self.file.identity

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows ``begin`` to ``end`` of a weight, in ``dtype``.

        Raises CheckpointError where one holds a value that is not finite.
        """
        info = self.file.tensors[self.names[name]]
        end = info.shape[0] if end is None else end
        width, shift = math.prod(info.shape[1:]), self._architecture.norm_shift if name.endswith("norm.weight") else 0
        out = np.empty((end - begin, width), np.float32)
        rows = max(1, CHUNK // width)
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            part = out[first - begin : last - begin]
            decode(info.kind, self._rows(name, info, first, last), part.reshape(-1, info.kind.values))
            self._check_finite(info, part)
            if shift:
                part -= np.float32(shift)
        self.file.release(info.name)
        return torch.from_numpy(out).view(end - begin, *info.shape[1:]).to(self.dtype)

    def _check_finite(self, info: TensorInfo, values: NDArray[np.float32]) -> None:
        # A sum meets every value once and keeps NaN and infinity; it may also overflow, hence the second look.
        with np.errstate(all="ignore"):
            finite = bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
        if not finite:
            raise CheckpointError(
                f"tensor {info.name!r} of {self.file.paths[info.part]} holds values that are NaN or infinite; "
                "it is damaged: download the file again"
            )

    def blocks(self, name: str, begin: int = 0, end: int | None = None) -> BlockParts | None:
        """The parts of rows ``begin`` to ``end`` of a matrix in a directly multipliable format; None for another."""
        info = self.file.tensors[self.names[name]]
        if info.kind.name not in MULTIPLIABLE:  # which `_check` allows matrices only
            return None
        end = info.shape[0] if end is None else end
        parts = block_parts(info.kind, self._rows(name, info, begin, end), end - begin)
        self.file.release(info.name)
        for numbers in (parts.scale, parts.minimum):
            if numbers is not None:
                self._check_finite(info, numbers.numpy())
        return parts

    def _rows(self, name: str, info: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """The blocks of some rows, uint8 [n, bytes], rows in canonical order."""
        rows = self.file.blocks(info.name).reshape(info.shape[0], -1)
        match = re.fullmatch(r"layers\.\d+\.([qk])\.(?:weight|bias)", name) if self._architecture.permuted else None
        if match is None:
            chosen = rows[begin:end]
        else:
            order = np.arange(info.shape[0]).reshape(self._heads[match[1]], -1, 2).swapaxes(1, 2).reshape(-1)
            chosen = rows[order[begin:end]]
        return chosen.reshape(-1, info.kind.size)

    def _canonical(self, name: str) -> str | None:
        """The canonical name; None for what is not wanted. Raises CheckpointError for an unknown one."""
        if name == ROPE_FACTORS or name.startswith(self._architecture.ignored):
            return None
        match = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", name)
        if match and match[2] in self._architecture.parts:
            return f"layers.{match[1]}.{self._architecture.parts[match[2]]}.{match[3]}"
        if name in TOPS:
            return None if self._tied and TOPS[name] == "head.weight" else TOPS[name]
        raise CheckpointError(
            f"{self.file.path} holds tensor {name!r}, which is not known for architecture "
            f"{self.file.keys['general.architecture']!r}; is it a variant that does not run here?"
        )

    def _check(self, expected: Mapping[str, Sequence[int]]) -> None:
        for canonical, shape in expected.items():
            if canonical not in self.names:
                raise CheckpointError(
                    f"{self.file.path}: tensor {self._original(canonical)!r} is missing; expected shape {list(shape)}"
                )
        for canonical, name in self.names.items():
            info = self.file.tensors[name]
            if canonical not in expected:
                raise CheckpointError(f"{self.file.path} holds tensor {name!r}, which its keys describe no room for")
            if info.shape != tuple(expected[canonical]):
                raise CheckpointError(
                    f"{self.file.path}: tensor {name!r} has shape {list(info.shape)}, "
                    f"but its keys say {list(expected[canonical])}"
                )
            if len(info.shape) == 1 and info.kind.values > 1:
                raise CheckpointError(
                    f"{self.file.path}: tensor {name!r} has type {info.kind.name}, but it is no matrix; norms and "
                    "biases are read as F32, F16 or BF16: convert the model again"
                )
            if info.kind.decoder is None:
                raise CheckpointError(
                    f"{self.file.path}: tensor {name!r} has type {info.kind.name}, which is not read here; use a file "
                    f"in another quantisation: {', '.join(decodable())}"
                )

    def _original(self, canonical: str) -> str:
        """The name that a canonical one has in files."""
        tops = {ours: theirs for theirs, ours in TOPS.items()}
        if canonical in tops:
            return tops[canonical]
        _, index, part, kind = canonical.split(".")
        theirs = {ours: theirs for theirs, ours in self._architecture.parts.items()}
        return f"blk.{index}.{theirs[part]}.{kind}"


def _expected(config: Mapping[str, Any], architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight that a file of this config holds, with its shape."""
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    parts = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    parts |= {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    biased = set(architecture.biases or ())
    biased |= set("qkvo") if config["attention_bias"] else set()
    biased |= {"gate", "up", "down"} if config["mlp_bias"] else set()
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config["vocab_size"], width), "norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["head.weight"] = (config["vocab_size"], width)
    for index in range(config["num_hidden_layers"]):
        for part in architecture.parts.values():
            shape = parts.get(part, (head_dim,) if part in QK_NORMS.values() else (width,))
            shapes[f"layers.{index}.{part}.weight"] = shape
            if part in biased:
                shapes[f"layers.{index}.{part}.bias"] = shape[:1]
    return shapes
