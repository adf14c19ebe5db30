"""GGUF files that are damaged, or hold what no model has: one clear error each."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from written_gguf import gguf, tiny_model, write_model

from outrider.errors import CheckpointError
from outrider.models.gguf import GGUFFile, read_model


@pytest.fixture(scope="module")
def tiny() -> transformers.PreTrainedModel:
    return tiny_model()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty; expected a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the file itself; run `git lfs"),
        (b"PK\x03\x04" + b"x" * 40, "is a zip archive"),
        (b"Salted__" + b"x" * 40, "is encrypted"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"\x50\0\0\0\0\0\0\0" + b'{"__metadata__"', "is a safetensors file"),
        (b"tjgg\3\0\0\0", "older than GGUF; convert the model again"),
        (b"\0" * 64, "interrupted download"),
        (bytes(range(200, 250)), "is something else .* encrypted, damaged or no model; expected a GGUF file"),
        (b"GGUF\3\0\0\0", "it has 8 bytes, a header takes at least 24"),
        (b"GGUF\0\0\0\3" + b"\0" * 40, "is a big-endian GGUF file; expected little-endian: convert it"),
        (b"GGUF\1\0\0\0" + b"\0" * 40, "has GGUF version 1, expected 2 or 3; convert the model again"),
        (b"GGUF\4\0\0\0" + b"\0" * 40, "has GGUF version 4, expected 2 or 3"),
        (
            struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1) + b"\0" * 40,
            "keys and 1,152,921,504,606,846,976 tensors would",
        ),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 62) + b"x" * 40, "a key's name has 4,611,686,018,427,387,904"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 77) + b"x" * 40, "key 'k' has type 77, expected 0 to 12"),
        (struct.pack("<4sIQQQ1sIB", b"GGUF", 3, 0, 1, 1, b"k", 7, 2), "truth value of 2, expected 0 or 1"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1 << 40), "1,099,511,627,776 values of key 'k'"),
        (
            struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 6 + b"x" * 20,
            "nests arrays deeper than 4",
        ),
    ],
)
def test_files_that_are_no_readable_gguf(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as error:
        GGUFFile(path)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(tmp_path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 70_000), "70,000 keys and 0 tensors, expected at most 65,536 of each"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 3_000_000), "past 2,097,152 items"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 90_000), "past 2,097,152 items"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 0, 65 << 20), "header longer than 64 MiB"),
    ],
)
def test_headers_that_would_take_too_much(head: bytes, message: str, tmp_path: Path) -> None:
    """What the file is large enough for, but no model needs."""
    path = tmp_path / "model.gguf"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(80 << 20)
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)
    assert time.perf_counter() - begin < 1


def info(name: str, **changes: Any) -> Callable[[Any], None]:
    """Change a tensor's info before it is written."""

    def change(writer: Any) -> None:
        for key, value in changes.items():
            setattr(writer.tensors[0][name], key, value)

    return change


def key(name: str, value: Any) -> Callable[[Any], None]:
    """Change a key's value before it is written."""

    def change(writer: Any) -> None:
        kind = writer.kv_data[0][name].type if name in writer.kv_data[0] else gguf.GGUFValueType.get_type(value)
        writer.kv_data[0][name] = gguf.GGUFValue(value, kind)

    return change


def without(name: str) -> Callable[[Any], None]:
    return lambda writer: writer.tensors[0].pop(name, None) or writer.kv_data[0].pop(name)


def quantised_norm(writer: Any) -> None:
    tensor = writer.tensors[0]["blk.0.attn_norm.weight"]
    tensor.dtype = gguf.GGMLQuantizationType.Q8_0
    tensor.tensor = gguf.quantize(tensor.tensor, tensor.dtype)
    tensor.nbytes = tensor.tensor.nbytes


def more(name: str, *shape: int) -> Callable[[Any], None]:
    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            key("general.architecture", "mamba"),
            "has architecture 'mamba'.*expected one of: llama, mistral, qwen2, qwen3, g",
        ),
        (without("general.architecture"), "names no architecture; expected one of"),
        (key("general.type", "adapter"), "is of type 'adapter'; expected a whole model"),
        (key("general.alignment", 3), "general.alignment is 3, expected a power of two"),
        (key("llama.block_count", 4_000_000_000), "block_count is 4000000000, expected a whole number"),
        (key("llama.block_count", 1_000_000), "says that it has 1,000,000 layers, but it holds 20 tensors"),
        (key("llama.block_count", 3), r"tensor 'blk.2.attn_norm.weight' is missing; expected shape \[32\]"),
        (key("llama.block_count", 1), "holds tensor 'blk.1.+', which its keys describe no room for"),
        (without("llama.block_count"), "key llama.block_count is missing"),
        (
            key("llama.attention.head_count", 2),
            r"'blk.0.attn_q.weight' has shape \[32, 32\], but its keys say \[16, 32\]",
        ),
        (key("llama.attention.key_length", 16), "attention.value_length is 8, .*expected 16"),
        (
            key("llama.attention.layer_norm_rms_epsilon", float("nan")),
            "layer_norm_rms_epsilon is nan, expected a number",
        ),
        (key("llama.rope.dimension_count", 4), "rope.dimension_count is 4, .*expected 8"),
        (key("llama.rope.scaling.type", "longrope"), "rope scaling 'longrope' is not supported; expected none, linear"),
        (key("llama.rope.scaling.attn_factor", 1.5), "attn_factor of 1.5 needs rope scaling 'yarn', but it has"),
        (key("llama.rope.freq_base", 0.0), "rope.freq_base is 0, expected a number above 0"),
        (key("llama.vocab_size", 41), "vocab_size is 41, .*expected 40"),
        (key("llama.expert_count", 8), "expert_count is 8, which is not supported"),
        (key("llama.final_logit_softcapping", 30.0), "final_logit_softcapping is not supported"),
        (key("tokenizer.ggml.tokens", ["a"] * 39), "vocabulary has 39 tokens, but its embedding has 40 rows"),
        (key("tokenizer.ggml.eos_token_id", 40), "eos token is 40, expected an id below 40"),
        (without("token_embd.weight"), "'token_embd.weight' is missing"),
        (without("blk.1.ffn_up.weight"), r"tensor 'blk.1.ffn_up.weight' is missing; expected shape \[32, 32\]"),
        (
            more("blk.0.ffn_gate_inp.weight", 4),
            "holds tensor 'blk.0.ffn_gate_inp.weight', which is not known for .*'llama'",
        ),
        (
            quantised_norm,
            "'blk.0.attn_norm.weight' has type Q8_0, but it is no matrix; norms and biases are read as F32",
        ),
        (more("blk.0.attn_q.bias", 32), "it has 'blk.0.attn_q.bias' but no 'blk.0.attn_k.bias'"),
        (info("blk.0.ffn_up.weight", dtype=17), "have 32 values, expected a multiple of 256 .the block of IQ2_XS."),
        (
            info("blk.0.ffn_up.weight", dtype=24),
            "'blk.0.ffn_up.weight' has type I8, which is not read here; use a file",
        ),
    ],
)
def test_models_that_are_refused(change: Any, message: str, tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny, "llama", change=change)
    with pytest.raises(CheckpointError, match=message) as error:
        read_model(GGUFFile(path))
    assert str(path) in str(error.value)


def patched(path: Path, name: str, at: int, layout: str, value: int) -> None:
    """Change a field of a matrix's info: 0 dimensions, 4 first dimension, 20 type, 24 offset."""
    raw = bytearray(path.read_bytes())
    begin = raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    struct.pack_into(layout, raw, begin + at, value)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (0, "<I", 9, "has 9 dimensions, expected 1 to 4"),
        (4, "<Q", 0, r"has shape \[32, 0\]"),
        (4, "<Q", 1 << 60, "has shape"),
        (4, "<Q", 1 << 20, r"F32 \[32, 1048576\]. ends at byte [\d,]+, but the file has"),
        (
            20,
            "<I",
            4,
            r"has type Q4_2 .number 4, which llama.cpp dropped., which is not known here; use a file in another",
        ),
        (20, "<I", 99, "has type number 99, which is not known here"),
        (24, "<Q", 33, "begins at offset 33, expected a multiple of 32"),
        (24, "<Q", 1 << 40, "ends at byte [0-9,]+, but the file has"),
        (24, "<Q", 0, "overlap"),
    ],
)
def test_tensor_infos_that_are_refused(
    at: int, layout: str, value: int, message: str, tmp_path: Path, tiny: Any
) -> None:
    path = write_model(tmp_path / "model.gguf", tiny, "llama")
    patched(path, "blk.0.ffn_up.weight", at, layout, value)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


def test_doubled_names(tmp_path: Path, tiny: Any) -> None:
    path = write_model(tmp_path / "model.gguf", tiny, "llama")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(CheckpointError, match="tensor 'blk.0.ffn_up.weight' is there twice"):
        GGUFFile(path)
    path.write_bytes(raw.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))
    with pytest.raises(CheckpointError, match="key 'tokenizer.ggml.eos_token_id' is there twice"):
        GGUFFile(path)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_values_that_are_not_finite(kind: str, tmp_path: Path, tiny: Any) -> None:
    path = write_model(tmp_path / "model.gguf", tiny, "llama", kind)
    begin = GGUFFile(path).tensors["blk.0.ffn_up.weight"].begin
    raw = bytearray(path.read_bytes())
    raw[begin : begin + 4] = b"\xff\x7f\xff\x7f"
    path.write_bytes(raw)
    _, weights = read_model(GGUFFile(path))
    with pytest.raises(CheckpointError, match="'blk.0.ffn_up.weight' of .* holds values that are NaN or infinite"):
        weights["layers.0.up.weight"]
    if kind == "Q8_0":
        with pytest.raises(CheckpointError, match="'blk.0.ffn_up.weight' of .* holds values that are NaN or infinite"):
            weights.blocks("layers.0.up.weight")


def test_2000_damaged_files(tmp_path: Path, tiny: Any) -> None:
    """Truncations and flipped bits, most of them in the header: an error of ours or a whole model, at once."""
    path = write_model(tmp_path / "model.gguf", tiny, "llama", "Q4_0")
    raw, header = path.read_bytes(), min(info.begin for info in GGUFFile(path).tensors.values())
    choose, counts = random.Random(7), {"read": 0, "refused": 0}
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for trial in range(2000):
        damaged = bytearray(raw)
        if trial % 4 == 0:
            del damaged[choose.randrange(len(raw)) if trial % 8 else choose.randrange(header) :]
        else:
            for _ in range(choose.choice((1, 1, 1, 4, 30))):
                bit = choose.randrange(8 * (header if choose.random() < 0.9 else len(raw)))
                damaged[bit // 8] ^= 1 << bit % 8
        path.unlink()  # some file systems flush a file that is written over
        path.write_bytes(damaged)
        begin = time.perf_counter()
        try:
            _, weights = read_model(GGUFFile(path))
            for name in weights:
                assert weights[name].isfinite().all()
                weights.blocks(name)
            counts["read"] += 1
        except CheckpointError as error:
            counts["refused"] += 1
            assert str(tmp_path) in str(error) and len(str(error)) < 3000
        slowest = max(slowest, time.perf_counter() - begin)
    assert min(counts.values()) > 100  # both happen
    assert slowest < 2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200  # MiB
