"""The header of a GGUF file: what a file is by its first bytes, and checked reading of its values.

Every count and length is compared with what is left of the file before anything of that size is read or allocated.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from outrider.errors import CheckpointError

__all__ = ["MAGIC", "U32", "Reader", "damaged", "what_else"]

MAGIC = b"GGUF"
HEADER_LIMIT = 64 << 20  # bytes of keys and tensor infos; vocabularies of 262k tokens take 10 to 20 MB
ITEM_LIMIT = 2 << 20  # strings inside arrays, in one file; 262k tokens and their merges are 0.8 million
NESTED_COST = 32  # how many strings an array inside an array counts for: it takes that much time
NAME_LIMIT = 1 << 16  # bytes of a key's or tensor's name
DEPTH_LIMIT = 4  # arrays of arrays

U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (or a PyTorch checkpoint); unpack it, or convert the model to GGUF"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
    (b"\xfd7zXZ", "an xz archive; unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it"),
    (b"Salted__", "encrypted (OpenSSL); decrypt it"),
    (b"age-encryption", "encrypted (age); decrypt it"),
    (b"-----BEGIN ", "encrypted or signed (PGP or PEM); decrypt it"),
    (b"\x8c\x0d\x04", "encrypted (GnuPG); decrypt it"),
    (b"\x80\x02", "a pickle, which can run code and is never read; convert the model to GGUF"),
    (b"lmgg", "a GGML file, older than GGUF; convert the model again with a current llama.cpp"),
    (b"fmgg", "a GGML file, older than GGUF; convert the model again with a current llama.cpp"),
    (b"tjgg", "a GGML file, older than GGUF; convert the model again with a current llama.cpp"),
    (b"\0\0\0\0", "empty space where its header should be, as an interrupted download leaves; download it again"),
)


def what_else(head: bytes) -> str:
    """What a file is that does not begin with ``GGUF``, and what to do about it."""
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return what
    text = head.lstrip()[:1]
    if text == b"<":
        return "a web page (HTML or XML), as a failed download leaves; download the file again"
    if text == b"{":
        return "JSON text, as a failed download leaves; download the file again"
    if head[8:9] == b"{":
        return "a safetensors file; give the model directory that holds it"
    return f"something else (it begins with {head[:8]!r}): encrypted, damaged or no model"


def damaged(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"{path} is damaged or incomplete: {problem}; download it again")


class Reader:
    """Reads the header from ``at`` on; what would pass the end of the file is refused before it is read."""

    def __init__(self, path: Path, data: mmap.mmap, at: int) -> None:
        self.path, self.data, self.at = path, data, at
        self.end = min(len(data), HEADER_LIMIT)
        self.items = 0  # strings and arrays inside arrays so far

    def require(self, size: int, what: str) -> None:
        """Raise CheckpointError unless ``size`` more bytes are there."""
        if size <= self.end - self.at:
            return
        if self.end == HEADER_LIMIT:
            damaged(self.path, f"{what} would make its header longer than {HEADER_LIMIT >> 20} MiB")
        damaged(self.path, f"{what} would take {size:,} bytes at byte {self.at:,} of {self.end:,}")

    def u32(self, what: str) -> int:
        self.require(4, what)
        self.at += 4
        return int(U32.unpack_from(self.data, self.at - 4)[0])

    def u64(self, what: str) -> int:
        self.require(8, what)
        self.at += 8
        return int(_U64.unpack_from(self.data, self.at - 8)[0])

    def text(self, what: str) -> bytes:
        size = self.u64(f"the length of {what}")
        self.require(size, what)
        self.at += size
        return self.data[self.at - size : self.at]

    def name(self, what: str) -> str:
        self.require(8, what)
        (size,) = _U64.unpack_from(self.data, self.at)
        if not 1 <= size < NAME_LIMIT:
            damaged(self.path, f"{what} has {size:,} bytes, expected 1 to {NAME_LIMIT - 1:,}")
        raw = self.text(what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            damaged(self.path, f"{what} is no UTF-8: {raw[:40]!r}")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value of a type by its number."""
        if kind == _STRING:
            return self.text(what).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self.array(what, depth)
        return self.numbers(kind, 1, what)[0].item()

    def numbers(self, kind: int, count: int, what: str) -> NDArray[Any]:
        """A copy, so that the file's pages can go."""
        if kind != _BOOL and kind not in _NUMBERS:
            damaged(self.path, f"{what} has type {kind}, expected 0 to 12")
        dtype = np.dtype("u1" if kind == _BOOL else _NUMBERS[kind])
        self.require(count * dtype.itemsize, f"{count:,} values of {what}")
        values = np.frombuffer(self.data, dtype, count, self.at).copy()
        self.at += count * dtype.itemsize
        if kind != _BOOL:
            return values
        if (values > 1).any():
            damaged(self.path, f"{what} is a truth value of {values.max()}, expected 0 or 1")
        return values.astype(bool)

    def array(self, what: str, depth: int) -> Any:
        if depth >= DEPTH_LIMIT:
            damaged(self.path, f"{what} nests arrays deeper than {DEPTH_LIMIT}")
        kind, count = self.u32(f"the type of {what}"), self.u64(f"the length of {what}")
        if kind not in (_STRING, _ARRAY):
            return self.numbers(kind, count, what)
        self.require(count * (8 if kind == _STRING else 12), f"{count:,} values of {what}")
        self.items += count * (1 if kind == _STRING else NESTED_COST)
        if self.items > ITEM_LIMIT:
            damaged(self.path, f"{what} brings its arrays of strings and arrays past {ITEM_LIMIT:,} items")
        if kind == _STRING:
            return self.strings(count, what)
        return [self.value(_ARRAY, what, depth + 1) for _ in range(count)]

    def strings(self, count: int, what: str) -> list[str]:
        """``text`` for every item, without a call for each: a vocabulary has 100,000 and more."""
        texts, data, at, end = [], self.data, self.at, self.end
        size_at: Callable[..., tuple[int]] = _U64.unpack_from
        for _ in range(count):
            if at + 8 > end:
                self.at = at
                self.require(8, f"the length of a string of {what}")
            begin = at + 8
            at = begin + size_at(data, at)[0]
            if at > end:
                self.at = begin
                self.require(at - begin, f"a string of {what}")
            texts.append(data[begin:at].decode("utf-8", "replace"))
        self.at = at
        return texts
