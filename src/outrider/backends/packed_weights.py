"""Quantised weights on disk, as the core packed them, so that a model is quantised once and not at every start.

Only what took a while is kept (SLOW seconds). A file belongs to one state of the model's files, one dtype, one
instruction set and one build of the core; it appears whole or not at all, and a damaged one is replaced. It is a
safetensors file, read and written straight from and to the stack's memory, by two threads.

All files together keep within ``OUTRIDER_CACHE_LIMIT`` (8 GiB by default): a new one drops those that were not used for
the longest time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

from torch import Tensor

from outrider.config import memory_bytes
from outrider.core import native
from outrider.files import cache_folder, replace_file

__all__ = ["PackedFile", "cache_limit", "prune", "stored"]

SLOW = 0.3  # seconds of packing from which a file pays
DTYPES = ("int8", "int4", "file")
LIMIT = 8 << 30  # bytes of all files, unless OUTRIDER_CACHE_LIMIT says otherwise
CHUNK = 8 << 20  # bytes that a thread reads and checks at a time: they are still in the cache when they are checked


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
        with suppress(OSError, ValueError, KeyError, TypeError):
            if self._read(self.path, regions):
                _used_now(self.path)
                return True
        for region in regions:
            region.zero_()
        return False

    @staticmethod
    def _read(path: Path, regions: Sequence[Tensor]) -> bool:
        parts = _parts(regions)
        with open(path, "rb", buffering=0) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > 1 << 24:
                return False
            head = json.loads(file.read(size))
            sums = json.loads(head.pop("__metadata__")["crc32"])
            if head != _header(regions) or path.stat().st_size != 8 + size + sum(len(part) for part in parts):
                return False
            begins = [8 + size]
            for part in parts:
                begins.append(begins[-1] + len(part))

            def read(index: int) -> int:
                filled, part = 0, parts[index]
                while filled < len(part):
                    got = os.preadv(file.fileno(), [part[filled:]], begins[index] + filled)
                    if got == 0:
                        return -1
                    filled += got
                return zlib.crc32(part)

            with ThreadPoolExecutor(2) as threads:
                return list(threads.map(read, range(len(parts)))) == sums

    def write(self, regions: Sequence[Tensor], seconds: float) -> None:
        """Keep what took ``seconds`` to pack. A disk that is full or not writable costs a warning."""
        if self.path is None or seconds < SLOW:
            return
        size, limit = sum(region.nbytes for region in regions), cache_limit()
        if size > limit:
            return
        parts = _parts(regions)
        with ThreadPoolExecutor(2) as threads:
            sums = list(threads.map(zlib.crc32, parts))
        metadata = {"format": "pt", "crc32": json.dumps(sums)}
        head = json.dumps({"__metadata__": metadata, **_header(regions)}).encode()
        head += b" " * (-len(head) % 8)

        def write(temporary: Path) -> None:
            with open(temporary, "wb", buffering=0) as file:
                for rest in (memoryview(len(head).to_bytes(8, "little") + head), *parts):
                    while rest:
                        rest = rest[file.write(rest) :]

        try:
            _drop_to(limit - size, self.path)
            replace_file(self.path, write)
        except OSError as error:
            warnings.warn(f"quantised weights could not be kept in {self.path.parent}: {error}", stacklevel=2)


# ------------------------------------------------------------------------------------------------ all files together


def cache_limit() -> int:
    """Bytes that all files may take; 0: nothing is kept. Raises InvalidRequest for a limit that is no size."""
    text = os.environ.get("OUTRIDER_CACHE_LIMIT", "").strip()
    if not text:
        return LIMIT
    return memory_bytes("OUTRIDER_CACHE_LIMIT", text, least=0)


def stored() -> tuple[int, int]:
    """How many files are kept, and their bytes."""
    sizes = [file.stat().st_size for file in cache_folder("packed").glob("*.safetensors")]
    return len(sizes), sum(sizes)


def prune() -> int:
    """Remove all of them, and what interrupted writes left. -> bytes that were freed."""
    freed, folder = 0, cache_folder("packed")
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        size = file.stat().st_size
        file.unlink()
        freed += size
    return freed


def _drop_to(limit: int, replaced: Path) -> None:
    """Remove the files that were not used for the longest time, until the rest takes at most ``limit`` bytes."""
    files = {file: file.stat() for file in cache_folder("packed").glob("*.safetensors") if file != replaced}
    left = sum(stat.st_size for stat in files.values())
    for file in sorted(files, key=lambda file: files[file].st_atime_ns):
        if left <= limit:
            break
        file.unlink(missing_ok=True)
        left -= files[file].st_size


def _used_now(path: Path) -> None:
    """Set the time of the last use, which many file systems do not keep up to date; the file's own time stays."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


# ------------------------------------------------------------------------------------------------ one file


def _parts(regions: Sequence[Tensor]) -> list[memoryview]:
    """The bytes of all regions, in chunks."""
    views = [region.numpy().data.cast("B") for region in regions]
    return [view[begin : begin + CHUNK] for view in views for begin in range(0, len(view), CHUNK)]


def _header(regions: Sequence[Tensor]) -> dict[str, object]:
    """What a safetensors file says of these bytes."""
    head: dict[str, object] = {}
    begin = 0
    for index, region in enumerate(regions):
        end = begin + region.nbytes
        head[f"region.{index}"] = {"dtype": "U8", "shape": [region.nbytes], "data_offsets": [begin, end]}
        begin = end
    return head


@cache
def _build() -> str:
    """A hash of the compiled core: another build may pack in another way."""
    with open(native.__file__, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
