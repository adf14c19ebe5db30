"""Matrix tiles, emulated where the processor has none: the bits of AVX-512, and those of their definition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.backends.native import NativeBackend, available
from outrider.config import StackConfig
from outrider.errors import InvalidRequest

if not available():
    pytest.skip("the compiled core is not built", allow_module_level=True)

from test_native_blocks import KINDS, head, random_parts
from test_native_kernels import down_product

from outrider import _native

EMULATED = [isa for isa in _native.emulated_instruction_sets() if isa.startswith("amx")]
HARDWARE = [] if _native.why_no_tiles() else ["amx"]
TILES = [*EMULATED, *(pytest.param(isa, marks=pytest.mark.slow) for isa in HARDWARE)]
needs_tiles = pytest.mark.skipif(not TILES, reason="neither tiles nor what emulates them")
SHAPES = [(1, 1, 1), (5, 33, 96), (16, 95, 130), (17, 64, 1041), (33, 70, 64), (300, 40, 1184)]


def product(weight: Tensor, dtype: str, isa: str, x: Tensor) -> Tensor:
    """x W^T as the core computes it: the head of a stack without layers."""
    config = StackConfig(vocab_size=len(weight), hidden_size=weight.shape[1], layers=())
    weights = {"head.weight": weight, "norm.weight": torch.ones(weight.shape[1])}
    return NativeBackend(isa).load(config, weights, dtype).unembed(x)


@needs_tiles
@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_has_the_bits_of_vnni(isa: str, shape: tuple[int, int, int]) -> None:
    rows, outputs, inner = shape
    x, w = torch.randn(rows, inner), torch.randn(outputs, inner)
    assert torch.equal(product(w, "int8", isa, x), product(w, "int8", "avx512_vnni", x))


@needs_tiles
@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 32, 33, 300])
def test_blocks_have_the_bits_of_vnni(isa: str, kind: str, rows: int) -> None:
    parts, x = random_parts(kind, 81, 1184), torch.randn(rows, 1184)
    assert torch.equal(head(parts, isa).unembed(x), head(parts, "avx512_vnni").unembed(x))


@needs_tiles
@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_int4_has_the_bits_of_avx512(isa: str, rows: int) -> None:
    x, w = torch.randn(rows, 544), torch.randn(96, 544)
    assert torch.equal(down_product(x, w, isa), down_product(x, w, "avx512_bf16"))


def by_definition(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [M, K], w [N, K], float32 that bfloat16 holds -> [M, N] as the tiles sum it, each step rounded to float32.

    A product of two such numbers has 16 bits, so float64 holds its sum with a float32 exactly, or the smaller one is
    far below half a unit of the larger: rounding twice is rounding once.
    """
    inner = -(-x.shape[1] // 32) * 32
    x, w = (np.pad(a, ((0, 0), (0, inner - a.shape[1]))).astype(np.float64) for a in (x, w))
    total = np.zeros((len(x), len(w)), np.float32)
    for begin in range(0, inner, 32):
        chains = [np.zeros_like(total), np.zeros_like(total)]
        for k in range(begin, begin + 32):
            chains[k % 2] = (chains[k % 2] + np.multiply.outer(x[:, k], w[:, k])).astype(np.float32)
        total = total + (chains[0] + chains[1])
    return total


@needs_tiles
@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_sums_in_the_order_of_its_definition(isa: str, shape: tuple[int, int, int]) -> None:
    rows, outputs, inner = shape
    x, w = torch.randn(rows, inner).bfloat16().float(), torch.randn(outputs, inner).bfloat16().float()
    expected = torch.from_numpy(by_definition(x.numpy(), w.numpy()))
    assert torch.equal(product(w, "bfloat16", isa, x), expected)


@needs_tiles
@pytest.mark.parametrize("isa", TILES)
def test_denormals_count_as_zero(isa: str) -> None:
    small = 2.0**-130  # a denormal bfloat16
    w = torch.full((33, 32), small)
    assert not product(w, "bfloat16", isa, torch.full((3, 32), 2.0**20)).any()
    normal = torch.full((33, 32), 2.0**-70)  # products of 2^-140 and their sums are denormal
    assert not product(normal, "bfloat16", isa, torch.full((3, 32), 2.0**-70)).any()


EDGES = (*range(1, 18), 24, 31, 32, 33, 48, 64, 65, 255, 256, 257, 300)


@pytest.mark.parametrize("isa", [*_native.instruction_sets(), *_native.emulated_instruction_sets()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("counts", [EDGES, pytest.param(range(1, 301), marks=pytest.mark.slow)], ids=["edges", "all"])
def test_a_row_has_the_same_bits_beside_any_others(isa: str, dtype: str, counts: Sequence[int]) -> None:
    """As ``test_native_blocks`` has it for block formats."""
    config = StackConfig(vocab_size=65, hidden_size=300, layers=())
    weights = {"head.weight": torch.randn(65, 300), "norm.weight": torch.ones(300)}
    made, x = NativeBackend(isa).load(config, weights, dtype), torch.randn(300, 300)
    alone = torch.cat([made.unembed(row[None]) for row in x])
    for count in counts:
        assert torch.equal(made.unembed(x[:count]), alone[:count]), count


@pytest.fixture
def tile_rows(isa: str) -> Iterator[None]:
    """What was in force is so again afterwards."""
    before = _native.tile_rows(isa)
    yield
    _native.set_tile_rows(isa, before)


@needs_tiles
@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", *KINDS])
def test_bits_do_not_depend_on_where_tiles_begin(isa: str, dtype: str, tile_rows: None) -> None:
    results = []
    x, w = torch.randn(17, 160), torch.randn(70, 160)
    parts = random_parts(dtype, 70, 160) if dtype in KINDS else None
    for least in (1, 4, 1 << 20):
        _native.set_tile_rows(isa, [least] * 3)
        for count in (1, 3, 4, 17):
            some = x[:count]
            results.append(product(w, dtype, isa, some) if parts is None else head(parts, isa).unembed(some))
    for k, result in enumerate(results):
        assert torch.equal(result, results[3][: len(result)]), k
    with pytest.raises(ValueError, match="3 positive numbers"):
        _native.set_tile_rows(isa, [1, 0, 1])


@needs_tiles
def test_a_machines_own_tiles_are_held_against_emulated_ones() -> None:
    """Every format that tiles compute; bfloat16 alone has an order of its own."""
    assert _native.same_products("amx_emulated", "amx_emulated")
    assert not _native.same_products("avx512_bf16", "amx_emulated")
    assert not _native.same_products("portable", "amx_emulated")


def test_why_there_are_no_tiles_is_said() -> None:
    reason = _native.why_no_tiles()
    assert (_native.instruction_sets()[0] == "amx") == (not reason), "tiles are used by themselves where they work"
    if reason:
        assert any(word in reason for word in ("no matrix tiles", "refused", "Linux", "fault"))
        with pytest.raises(InvalidRequest, match="instruction set amx is not one this processor runs") as caught:
            product(torch.randn(3, 4), "int8", "amx", torch.randn(1, 4))
        assert reason in str(caught.value)


@needs_tiles
def test_emulation_is_only_used_when_asked_for() -> None:
    assert not set(_native.emulated_instruction_sets()) & set(_native.instruction_sets())
