"""Quantised weights on disk, as the core packed them, so that a model is quantised once and not at every start.

Only what took a while is kept (SLOW seconds). A file belongs to one state of the model's files, one dtype, one
instruction set and one build of the core; it appears whole or not at all, and a damaged one is replaced.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from outrider.core import native
from outrider.files import cache_folder, replace_file

__all__ = ["PackedFile"]

SLOW = 0.3  # seconds of packing from which a file pays
DTYPES = ("int8", "int4", "file")


class PackedFile:
    """Where one model's packed weights are kept, if they are."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: str, isa: str) -> None:
        identity = getattr(weights, "identity", None)
        self.path: Path | None = None
        if identity is not None and dtype in DTYPES:
            key = json.dumps([identity, dtype, isa, _build()])
            self.path = cache_folder("packed") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def read_into(self, regions: Sequence[Tensor]) -> bool:
        """Fill a stack's memory. False, and all of it zero as before, where there is no such file or a damaged one."""
        if self.path is None or not self.path.is_file():
            return False
        with suppress(SafetensorError, OSError, ValueError):
            if self._read(self.path, regions):
                return True
        for region in regions:
            region.zero_()
        return False

    @staticmethod
    def _read(path: Path, regions: Sequence[Tensor]) -> bool:
        with safe_open(path, framework="pt") as file:
            names = [_name(i) for i in range(len(regions))]
            if sorted(file.keys()) != sorted(names):
                return False
            for name, region in zip(names, regions, strict=True):
                kept = file.get_tensor(name)
                if kept.shape != region.shape:
                    return False
                region.copy_(kept)
            return bool((file.metadata() or {}).get("sha256") == _digest(regions))

    def write(self, regions: Sequence[Tensor], seconds: float) -> None:
        """Keep what took ``seconds`` to pack. A disk that is full or not writable costs a warning."""
        if self.path is None or seconds < SLOW:
            return
        tensors = {_name(i): region for i, region in enumerate(regions)}
        try:
            metadata = {"format": "pt", "sha256": _digest(regions)}
            replace_file(self.path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        except (OSError, SafetensorError) as error:
            warnings.warn(f"quantised weights could not be kept in {self.path.parent}: {error}", stacklevel=2)


def _digest(regions: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for region in regions:
        digest.update(region.numpy().data)
    return digest.hexdigest()


def _name(region: int) -> str:
    return f"region.{region}"


@cache
def _build() -> str:
    """A hash of the compiled core: another build may pack in another way."""
    with open(native.__file__, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
