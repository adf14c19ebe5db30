"""Files to tensors: Hugging Face model directories, read lazily and checked before anything is computed.

Tensors come from safetensors files only (never from pickles) and no code of a checkpoint is ever run. Each tensor is
read through a memory map that lasts only while it is copied, so loading needs one copy of the weights in memory and
the largest single piece besides.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from outrider.errors import CheckpointError, InvalidRequest, nearest
from outrider.files import read_json, replace_file
from outrider.types import Backend

__all__ = ["DTYPES", "FLOATS", "LazyWeights", "TensorFiles", "load_dtype", "reading_dtype", "write_tensors"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    # Quantised when loaded, by backends that can: they are given float32.
    "int8": torch.float32,
    "int4": torch.float32,
    # GGUF files as they store their matrices; what is no block format that the core multiplies is given in float32.
    "file": torch.float32,
}
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of weights, by safetensors' names
CHUNK = 64 << 20  # bytes read through one memory map


def load_dtype(name: str) -> torch.dtype:
    """The dtype tensors are read in for a ``dtype`` option. Raises InvalidRequest."""
    if name not in DTYPES:
        raise InvalidRequest(f"unknown dtype {name!r}; {nearest(str(name), [*DTYPES, 'auto'])}")
    return DTYPES[name]


def reading_dtype(dtype: str, backend: Backend) -> torch.dtype:
    """The dtype in which a backend takes weights of a ``dtype`` option: the core packs every dtype from float32."""
    return torch.float32 if backend.name == "native" else load_dtype(dtype)


# ------------------------------------------------------------------------------------------------ tensors


class TensorFiles:
    """The safetensors files of a directory: one ``model.safetensors``, or the shards that an index names.

    Raises CheckpointError for files that are missing, truncated or corrupt.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors names them: F32, BF16, I8
        self._files: dict[str, Path] = {}
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if single.exists():
            self._scan(single)
        elif index.exists():
            self._scan_shards(index)
        else:
            raise CheckpointError(f"{directory} holds no model.safetensors and no GGUF file{_pickles(directory)}")

    def _scan_shards(self, index: Path) -> None:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"{index}: expected a weight_map from tensors' names to files' names; copy it again")
        for shard in sorted(set(shards.values())):
            self._scan(self.directory / Path(shard).name)
        for name, shard in shards.items():
            if name not in self._files:
                raise CheckpointError(f"tensor {name!r} is missing: {index.name} says that it is in {shard}")

    def _scan(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointError(f"{path} is missing")
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                self._files[name] = path
                part = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()

    @property
    def identity(self) -> str:
        """Changes whenever one of the files does: their paths, sizes and times."""
        states = [(path.resolve(), path.stat()) for path in sorted(set(self._files.values()))]
        return repr([(str(path), state.st_size, state.st_mtime_ns) for path, state in states])

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A fresh tensor. Raises CheckpointError where it holds a value that is not finite."""
        path, shape = self._files[name], self.shapes[name]
        tensor = torch.empty(shape, dtype=dtype)
        if not shape:
            with _opened(path) as file:
                tensor.copy_(file.get_tensor(name))
        rows = max(1, CHUNK // max(1, 4 * math.prod(shape[1:])))
        for begin in range(0, shape[0] if shape else 0, rows):
            with _opened(path) as file:  # a new memory map, so that pages already copied are freed
                tensor[begin : begin + rows] = file.get_slice(name)[begin : begin + rows]
        if not _is_finite(tensor):
            raise CheckpointError(f"tensor {name!r} of {path} holds values that are NaN or infinite; is it damaged?")
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        if self.shapes[one] != self.shapes[other]:
            return False
        shape = self.shapes[one]
        rows = max(1, CHUNK // max(1, 4 * math.prod(shape[1:])))
        for begin in range(0, shape[0] if shape else 0, rows):
            with _opened(self._files[one]) as first, _opened(self._files[other]) as second:
                mine, theirs = (
                    file.get_slice(name)[begin : begin + rows] for file, name in ((first, one), (second, other))
                )
                wide = torch.promote_types(mine.dtype, theirs.dtype)
                if not torch.equal(mine.to(wide), theirs.to(wide)):
                    return False
        return True


def _is_finite(tensor: Tensor) -> bool:
    """A sum meets every value once and keeps NaN and infinity; it may also overflow, hence the second look."""
    if tensor.dtype == torch.float32:  # numpy: one thread, without the cost of waking torch's
        with np.errstate(all="ignore"):
            if np.isfinite(tensor.numpy().sum()):
                return True
    elif math.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).item()):
        return True
    return bool(tensor.isfinite().all())


class _opened:  # noqa: N801 (used like a function)
    """``safe_open`` that raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}") from error

    def __enter__(self) -> Any:
        return self.file.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.file.__exit__(*exception)


def _pickles(directory: Path) -> str:
    found = sorted(path.name for suffix in ("bin", "pt", "pth") for path in directory.glob(f"*.{suffix}"))
    if not found:
        return ""
    return f", only {found[0]}: pickled weights can run code and are never read; convert them to safetensors"


class LazyWeights(Mapping[str, Tensor]):
    """Weights by canonical name, each read from its file, converted and checked on access, and not kept.

    ``rename`` maps a tensor's name in the file to its canonical name, or to None for one that is not wanted.
    """

    def __init__(self, files: TensorFiles, rename: Callable[[str], str | None], dtype: torch.dtype) -> None:
        self.names: dict[str, str] = {}  # canonical -> in the file
        self._files, self._dtype = files, dtype
        for name in files.shapes:
            canonical = rename(name)
            if canonical is None:
                continue
            if canonical in self.names:
                raise CheckpointError(f"tensors {self.names[canonical]!r} and {name!r} are the same weight")
            if files.dtypes[name] not in FLOATS:
                raise CheckpointError(
                    f"tensor {name!r} is stored as {files.dtypes[name]}, expected one of {', '.join(FLOATS)}: "
                    "weights that other tools have quantised are not read; load the original ones"
                )
            self.names[canonical] = name
        self.shapes = {canonical: files.shapes[name] for canonical, name in self.names.items()}

    def tie(self) -> None:
        """The config says that the embedding is the head. What the file holds decides, as in Transformers: a head that
        equals the embedding is left out, one that differs is kept, and one without an embedding serves as both."""
        if "head.weight" not in self.names:
            return
        if "embed.weight" not in self.names:
            self.names["embed.weight"], self.shapes["embed.weight"] = (
                self.names["head.weight"],
                self.shapes["head.weight"],
            )
        if self._files.equal(self.names["embed.weight"], self.names["head.weight"]):
            del self.names["head.weight"], self.shapes["head.weight"]

    @property
    def identity(self) -> str:
        """Changes whenever one of the files does: their paths, sizes and times."""
        return self._files.identity

    def __getitem__(self, name: str) -> Tensor:
        return self._files.read(self.names[name], self._dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that a reader sees the old one or the whole new one. Raises OSError."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error

    replace_file(path, write)
