"""The GGUF container: header, keys and tensor infos of one file or of all its parts, checked before they are used.

Layout, little-endian: magic ``GGUF``, version u32 (2 or 3), tensor count u64, key count u64; the keys (name, type,
value); the tensor infos (name, number of dimensions, dimensions from the innermost out, type, offset); the data, from
the next multiple of ``general.alignment`` (32 where the key is absent). A string is its length in bytes (u64) and
UTF-8.

Every count, length and offset is compared with what is left of the file before anything of that size is read or
allocated, so a damaged file costs no more than its own header. Tensor data are only mapped, and read on access.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.errors import CheckpointError
from outrider.models.gguf.blocks import BLOCK_TYPES, BlockType, type_name
from outrider.models.gguf.header import MAGIC, U32, Reader, damaged, what_else

__all__ = ["GGUFFile", "TensorInfo", "find_gguf", "gguf_parts"]

VERSIONS = (2, 3)
ALIGNMENT_LIMIT = 1 << 20
COUNT_LIMIT = 1 << 16  # keys, and tensors, in one file

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is, and what it is made of."""

    name: str
    shape: tuple[int, ...]
    """In PyTorch's order: [rows, columns] for a matrix."""
    kind: BlockType
    part: int
    """Which of the file's parts holds it."""
    begin: int
    """Its first byte in that part."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) // self.kind.values * self.kind.size


class GGUFFile:
    """An open GGUF file, or all parts ``NAME-00001-of-0000N.gguf`` of one, given any of them.

    ``keys``: metadata by name, numbers and strings as Python's, arrays of numbers as numpy arrays, other arrays as
    lists (strings that are no UTF-8 have U+FFFD for the bytes that are not). ``tensors``: infos by name.
    Raises CheckpointError for a file that is missing, damaged, of another kind, version or byte order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.paths = gguf_parts(self.path)
        parts = [_Part(path, index) for index, path in enumerate(self.paths)]
        _check_split(parts)
        self.version = parts[0].version
        self.keys: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            self.keys = {**part.keys, **self.keys}
            for name, info in part.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{part.path} holds tensor {name!r}, which {self.paths[self.tensors[name].part].name} holds "
                        "too; these are not the parts of one model"
                    )
                self.tensors[name] = info
        self._maps = [part.map for part in parts]
        self._identity = repr([part.state for part in parts])

    @property
    def identity(self) -> str:
        """Changes whenever one of the files does: their paths, sizes and times when they were opened."""
        return self._identity

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(len(data) for data in self._maps)

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """A tensor's blocks, uint8 [number, bytes of one], in the memory map: read-only, nothing copied."""
        info = self.tensors[name]
        flat = np.frombuffer(self._maps[info.part], np.uint8, info.size, info.begin)
        return flat.reshape(-1, info.kind.size)

    def release(self, name: str) -> None:
        """Let the pages of a tensor leave this process; they are read again when they are needed."""
        info = self.tensors[name]
        begin = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and info.size:
            self._maps[info.part].madvise(mmap.MADV_DONTNEED, begin, info.begin + info.size - begin)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or the only one (or first part of the only one) in the directory that it is.

    None where there is none. Projectors of vision models (``mmproj``) do not count. Raises CheckpointError for a
    directory with several models.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or _starts_with(path, MAGIC) else None
    found: dict[str, Path] = {}
    for file in sorted(path.glob("*.[gG][gG][uU][fF]")) if path.is_dir() else []:
        split = _PART.fullmatch(file.name)
        if "mmproj" not in file.name.lower() and not file.is_dir():
            found.setdefault(f"{split[1]}-of-{split[3]}" if split else file.name, file)
    if len(found) > 1:
        names = ", ".join(file.name for file in found.values())
        raise CheckpointError(f"{path} holds {len(found)} GGUF models; name one of them: {names}")
    return next(iter(found.values()), None)


# ------------------------------------------------------------------------------------------------ parts


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """A file alone, or all parts of the model that it is a part of. Raises CheckpointError where one is missing."""
    split = _PART.fullmatch(path.name)
    if split is None:
        return (path,)
    count = int(split[3])
    if not 1 <= int(split[2]) <= count:
        raise CheckpointError(f"{path} says by its name that it is part {int(split[2])} of {count}; rename it")
    paths = []
    for number in range(1, count + 1):
        part = path.with_name(f"{split[1]}-{number:05d}-of-{split[3]}{split[4]}")
        if not part.exists():
            raise CheckpointError(
                f"{path} is one of {count} parts, and {part.name} is missing beside it; download all parts"
            )
        paths.append(part)
    return tuple(paths)


def _check_split(parts: list[_Part]) -> None:
    """The parts' own keys must say what their names say."""
    for index, part in enumerate(parts):
        count, number = part.count("split.count"), part.count("split.no")
        if len(parts) == 1 and count not in (0, 1):
            raise CheckpointError(
                f"{part.path} is one of {count} parts; expected a name like NAME-{number + 1:05d}-of-{count:05d}.gguf "
                "with the other parts beside it"
            )
        if len(parts) > 1 and (count, number) != (len(parts), index):
            raise CheckpointError(
                f"{part.path} is part {number + 1} of {count or 'one'} by its keys, but part {index + 1} of "
                f"{len(parts)} by its name; download the parts again"
            )
    expected, got = parts[0].count("split.tensors.count"), sum(len(part.tensors) for part in parts)
    if len(parts) > 1 and expected not in (0, got):
        raise CheckpointError(
            f"{parts[0].path} and its other parts hold {got} tensors, expected {expected}; download them again"
        )


class _Part:
    """One file: mapped, and its header read."""

    def __init__(self, path: Path, index: int) -> None:
        self.path, self.index = path, index
        self.map, self.state = _mapped(path)
        self.keys: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.version = self._read_version()
        read = Reader(path, self.map, 8)
        tensors, keys = read.u64("the number of tensors"), read.u64("the number of keys")
        # The least that a key (name of 1 byte, type, value of 1) and a tensor info (with 1 dimension) take.
        read.require(keys * 14 + tensors * 33, f"{keys:,} keys and {tensors:,} tensors")
        if max(keys, tensors) > COUNT_LIMIT:
            damaged(path, f"it has {keys:,} keys and {tensors:,} tensors, expected at most {COUNT_LIMIT:,} of each")
        for _ in range(keys):
            self._read_key(read)
        self._read_infos(read, tensors)

    def count(self, key: str) -> int:
        """A count among the keys; 0 where it is absent."""
        value = self.keys.get(key, 0)
        if not isinstance(value, int) or value < 0:
            damaged(self.path, f"{key} is {value!r}, expected a whole number")
        return value

    def _read_version(self) -> int:
        head = bytes(self.map[:64])
        if head[:4] != MAGIC:
            raise CheckpointError(f"{self.path} is {what_else(head)}; expected a GGUF file, which begins with 'GGUF'")
        if len(self.map) < 24:
            damaged(self.path, f"it has {len(self.map)} bytes, a header takes at least 24")
        (version,) = U32.unpack_from(head, 4)
        if version not in VERSIONS and int.from_bytes(head[4:8], "big") in (1, *VERSIONS):
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file; expected little-endian: convert it with "
                "`gguf-convert-endian FILE little` from the gguf package"
            )
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path} has GGUF version {version}, expected 2 or 3; "
                + ("convert the model again with a current llama.cpp" if version < 2 else "is it damaged, or newer?")
            )
        return int(version)

    def _read_key(self, read: Reader) -> None:
        name = read.name("a key's name")
        if name in self.keys:
            damaged(self.path, f"key {name!r} is there twice")
        self.keys[name] = read.value(read.u32(f"the type of key {name!r}"), f"key {name!r}")

    def _read_infos(self, read: Reader, count: int) -> None:
        raw: list[tuple[str, tuple[int, ...], BlockType, int]] = []
        alignment = self._alignment()
        for _ in range(count):
            name = read.name("a tensor's name")
            what = f"tensor {name!r}"
            dimensions = read.u32(f"the number of dimensions of {what}")
            if not 1 <= dimensions <= 4:
                damaged(self.path, f"{what} has {dimensions} dimensions, expected 1 to 4")
            shape = tuple(reversed([read.u64(f"a dimension of {what}") for _ in range(dimensions)]))
            kind = self._kind(what, read.u32(f"the type of {what}"))
            offset = read.u64(f"the offset of {what}")
            if min(shape) < 1 or math.prod(shape) >= 1 << 50:
                damaged(self.path, f"{what} has shape {list(shape)}")
            if shape[-1] % kind.values:
                problem = f"expected a multiple of {kind.values} (the block of {kind.name})"
                damaged(self.path, f"rows of {what} have {shape[-1]:,} values, {problem}")
            if offset % alignment:
                damaged(self.path, f"{what} begins at offset {offset}, expected a multiple of {alignment}")
            raw.append((name, shape, kind, offset))
        begin = -(-read.at // alignment) * alignment
        for name, shape, kind, offset in raw:
            if name in self.tensors:
                damaged(self.path, f"tensor {name!r} is there twice")
            self.tensors[name] = TensorInfo(name, shape, kind, self.index, begin + offset)
        self._check_extents()

    def _alignment(self) -> int:
        alignment = self.keys.get("general.alignment", 32)
        good = isinstance(alignment, int) and not isinstance(alignment, bool) and 1 <= alignment <= ALIGNMENT_LIMIT
        if not good or alignment & (alignment - 1):
            damaged(self.path, f"general.alignment is {alignment!r}, expected a power of two")
        return int(alignment)

    def _kind(self, what: str, number: int) -> BlockType:
        if number not in BLOCK_TYPES:
            raise CheckpointError(
                f"{self.path}: {what} has type {type_name(number)}, which is not known here; "
                "use a file in another quantisation, such as Q4_0, Q4_K_M or Q8_0 (or is it damaged?)"
            )
        return BLOCK_TYPES[number]

    def _check_extents(self) -> None:
        """Every tensor must lie inside the file and apart from the others."""
        end, before = 0, ""
        for info in sorted(self.tensors.values(), key=lambda info: info.begin):
            if info.begin + info.size > len(self.map):
                damaged(
                    self.path,
                    f"tensor {info.name!r} ({info.kind.name} {list(info.shape)}) ends at byte "
                    f"{info.begin + info.size:,}, but the file has {len(self.map):,}",
                )
            if info.begin < end:
                damaged(self.path, f"tensors {before!r} and {info.name!r} overlap")
            end, before = info.begin + info.size, info.name


def _mapped(path: Path) -> tuple[mmap.mmap, tuple[str, int, int]]:
    """A read-only map of a file, and its path, size and time."""
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            if state.st_size == 0:
                raise CheckpointError(f"{path} is empty; expected a GGUF file: download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), (
                str(path.resolve()),
                state.st_size,
                state.st_mtime_ns,
            )
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _starts_with(path: Path, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False
