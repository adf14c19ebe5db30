"""Block formats of GGUF files in the core: exact repacking, products against float64, and one row's bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.backends.native import NativeBackend, available
from outrider.config import LayerConfig, RopeConfig, StackConfig
from outrider.errors import InvalidRequest
from outrider.models.gguf.blocks import BlockParts
from outrider.types import RaggedBatch

if not available():
    pytest.skip("the compiled core is not built", allow_module_level=True)

from outrider import _native

ISAS = [*_native.instruction_sets(), *_native.emulated_instruction_sets()]
KINDS = ["Q8_0", "Q4_0", "Q4_1"]


class Matrices(Mapping[str, Tensor]):
    """Weights as a GGUF file gives them: some in blocks, others of type Q6_K or F32 in float32."""

    def __init__(self, matrices: Mapping[str, Tensor | BlockParts]) -> None:
        self.matrices = dict(matrices)
        self.kinds = {
            name: m.kind if isinstance(m, BlockParts) else ("F32" if m.ndim == 1 else "Q6_K")
            for name, m in matrices.items()
        }
        self.shapes = {
            name: tuple((m.values if isinstance(m, BlockParts) else m).shape) for name, m in matrices.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        matrix = self.matrices[name]
        return (matrix.dequantise() if isinstance(matrix, BlockParts) else matrix)[begin:end]

    def blocks(self, name: str, begin: int = 0, end: int | None = None) -> BlockParts | None:
        matrix = self.matrices[name]
        if not isinstance(matrix, BlockParts):
            return None
        minimum = None if matrix.minimum is None else matrix.minimum[begin:end]
        return BlockParts(matrix.kind, matrix.values[begin:end], matrix.scale[begin:end], minimum)


def random_parts(kind: str, rows: int, inner: int, seed: int = 0) -> BlockParts:
    """Every value of the format occurs, -128 too; some scales are zero, some are subnormal in fp16."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, inner // 32)
    scale = torch.randn(shape, generator=generator).mul(0.00125 if kind == "Q8_0" else 0.02)
    choice = torch.rand(shape, generator=generator)
    scale[choice < 0.1] = 0.0
    scale[choice > 0.9] = 3e-6
    scale = scale.half().float()
    if kind == "Q8_0":
        values = torch.randint(-128, 128, (rows, inner), generator=generator, dtype=torch.int8)
        return BlockParts(kind, values, scale, None)
    values = torch.randint(0, 16, (rows, inner), generator=generator, dtype=torch.uint8)
    if kind == "Q4_0":
        return BlockParts(kind, values, scale, scale * -8)
    return BlockParts(kind, values, scale, torch.randn(shape, generator=generator).mul(0.1).half().float())


def head(matrix: Tensor | BlockParts, isa: str = "") -> Any:
    """A stack that is only a head, and its embedding."""
    weights = Matrices({"embed.weight": matrix})
    rows, width = weights.shapes["embed.weight"]
    weights = Matrices({**weights.matrices, "norm.weight": torch.ones(width)})
    return NativeBackend(isa).load(StackConfig(vocab_size=rows, hidden_size=width, layers=()), weights, "file")


def rounded(x: Tensor) -> Tensor:
    """Blocks of 32 to 255 levels of their own scale."""
    blocks = x.double().view(len(x), -1, 32)
    scale = blocks.abs().amax(2, keepdim=True).clamp_min(1e-10) / 127
    return ((blocks / scale).round() * scale).view(x.shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "inner"), [(1, 1, 32), (5, 33, 96), (17, 95, 1120), (270, 40, 64)])
def test_a_product_is_exact_but_for_its_activations(isa: str, kind: str, rows: int, outputs: int, inner: int) -> None:
    parts, x = random_parts(kind, outputs, inner), torch.randn(rows, inner)
    x[:, :32] *= 100  # a scale for each block: large values do not cost small ones their accuracy
    got, exact = head(parts, isa).unembed(x).double(), parts.dequantise().double()
    expected = rounded(x) @ exact.t()
    # A value that falls between two levels may be rounded either way, by one float32 division: one level in a row.
    assert (got - expected).norm() <= 2e-3 * expected.norm() + 1e-6
    # No error is above what half a level of every activation allows.
    half = x.double().view(rows, -1, 32).abs().amax(2).repeat_interleave(32, 1) / 254
    bound = (half * 1.001) @ exact.abs().t() + 1e-5 * x.double().abs() @ exact.abs().t()
    # Q4_1 is dequantised with a rounding; the core multiplies without it.
    assert ((got - x.double() @ exact.t()).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_beside_any_others(isa: str, kind: str) -> None:
    made, before = head(random_parts(kind, 81, 1184), isa), _native.threads()
    x = torch.randn(300, 1184)
    try:
        _native.set_threads(1)
        alone = torch.cat([made.unembed(row[None]) for row in x])
        for threads in (1, 2):
            _native.set_threads(threads)
            for count in (*range(1, 41), 300):
                assert torch.equal(made.unembed(x[:count]), alone[:count]), (threads, count)
    finally:
        _native.set_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_repacked_rows_are_the_files(isa: str, kind: str) -> None:
    """Embedding rows, which are read from the packed head, with every finite fp16 number as a scale."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    scale = torch.from_numpy(bits[(bits & 0x7C00) != 0x7C00].view(np.float16).astype(np.float32)).view(-1, 2)
    rows = len(scale)
    parts = random_parts(kind, rows, 64)
    minimum = {"Q8_0": None, "Q4_0": scale * -8, "Q4_1": scale.flip(0)}[kind]
    parts = BlockParts(kind, parts.values, scale, minimum)
    made, ids = head(parts, isa), torch.randperm(rows)
    assert torch.equal(made.embed(ids), parts.dequantise()[ids])
    assert made.formats.tied and made.formats.kinds == ((kind, kind.lower()),)


@pytest.mark.parametrize("isa", ISAS)
def test_other_types_become_blocks_of_8_bits(isa: str) -> None:
    """Within half a level of each block's scale, for widths that are no whole number of blocks too."""
    for width in (40, 96):
        weight = torch.randn(70, width) * torch.logspace(-7, 2, 70)[:, None]
        weight[3] = 0
        made = head(weight, isa)
        assert made.formats.kinds == (("Q6_K", "q8_0"),)
        padded = torch.nn.functional.pad(weight, (0, -width % 32)).view(70, -1, 32)
        step = (padded.abs().amax(2) / 127).repeat_interleave(32, 1)[:, :width]
        # fp16 rounds the scale, by 2^-25 where it is smallest; the block's largest values feel that 127 times.
        allowed = 0.5 * step * 1.001 + 127 * torch.maximum(step * 2**-11, torch.tensor(2**-25))
        assert ((made.embed(torch.arange(70)) - weight).abs() <= allowed).all()


@pytest.fixture(scope="module")
def mixed() -> tuple[StackConfig, Matrices]:
    """A layer in which no two matrices have the same format."""
    layer = LayerConfig(4, 2, 24, 160, RopeConfig((0.3,) * 12))
    config = StackConfig(vocab_size=70, hidden_size=96, layers=(layer, layer))
    weights: dict[str, Tensor | BlockParts] = {"embed.weight": torch.randn(70, 96), "norm.weight": torch.ones(96)}
    weights["head.weight"] = random_parts("Q4_0", 70, 96)
    for i in range(2):
        kinds = {"q": "Q4_1", "k": "Q8_0", "v": "Q4_0", "o": "Q4_1", "gate": "Q4_0", "up": "", "down": "Q8_0"}
        shapes = {"q": (96, 96), "k": (48, 96), "v": (48, 96), "o": (96, 96)}
        shapes |= {"gate": (160, 96), "up": (160, 96), "down": (96, 160)}
        for seed, (name, kind) in enumerate(kinds.items()):
            rows, inner = shapes[name]
            made = random_parts(kind, rows, inner, 10 * i + seed) if kind else torch.randn(rows, inner) * 0.1
            weights[f"layers.{i}.{name}.weight"] = made
        for name in ("input_norm", "mlp_norm"):
            weights[f"layers.{i}.{name}.weight"] = torch.rand(96) + 0.5
    return config, Matrices(weights)


@pytest.mark.parametrize("isa", ISAS)
def test_matrices_that_are_packed_together_may_differ(isa: str, mixed: tuple[StackConfig, Matrices]) -> None:
    config, weights = mixed
    tokens = torch.randint(0, 70, (45,)).tolist()

    def logits(dtype: str, sizes: list[int]) -> Tensor:
        made = NativeBackend(isa).load(config, weights, dtype)
        cache = made.new_cache(1, 64)
        slot, rows, done = cache.open(), [], 0
        for size in sizes:
            rows.append(made.forward(RaggedBatch.pack([tokens[done : done + size]], [done], [slot]), cache).logits)
            done += size
        return torch.cat(rows)

    got, exact = logits("file", [45]), logits("float32", [45])
    assert (got - exact).norm() / exact.norm() < 0.03
    assert torch.equal(logits("file", [1, 2, 3, 4, 5, 6, 7, 17]), got)
    formats = NativeBackend(isa).load(config, weights, "file").formats
    assert formats.layers[0] == {"qkv": "q8_min", "out": "q4_1", "gate_up": "q8_min", "down": "q8_0"}
    assert (formats.head, formats.embedding, formats.tied) == ("q4_0", "q8_0", False)


def test_file_is_for_files_with_tensor_types() -> None:
    config = StackConfig(vocab_size=5, hidden_size=32, layers=())
    weights = {"embed.weight": torch.randn(5, 32), "norm.weight": torch.ones(32)}
    with pytest.raises(InvalidRequest, match=r"dtype 'file' is for GGUF files; expected one of float32, bfloat16"):
        NativeBackend().load(config, weights, "file")


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_same_with_and_without_drafts(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from written_gguf import build, write_model

    from outrider.models.loading import load_target

    path = write_model(tmp_path / "model.gguf", build("llama"), "llama", kind)
    target = load_target(path, dtype="file", backend="native")
    assert target.stack.formats.kinds == ((kind, kind.lower()),)
    plain, drafted = greedy(target, 1), greedy(target, 5)
    assert plain == drafted


def test_packed_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    from written_gguf import build, write_model

    from outrider.models.loading import load_target

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("outrider.backends.packed_weights.SLOW", 0.0)
    path = write_model(tmp_path / "model.gguf", build("llama"), "llama", "Q4_1")
    first = greedy(load_target(path, dtype="file", backend="native"), 1)

    def fail(*given: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr("outrider.backends.native._pack", fail)
    assert greedy(load_target(path, dtype="file", backend="native"), 1) == first


def greedy(target: Any, width: int, length: int = 40) -> list[int]:
    """The target's greedy text, verified ``width`` tokens a pass; drafts repeat what came three tokens before."""
    cache, text = target.new_cache(1, 128), [3, 14, 15, 9, 26]
    slot = cache.open()
    logits = target.forward(RaggedBatch.pack([text], [0], [slot]), cache).logits
    text.append(int(logits[-1].argmax()))
    while len(text) < length:
        given = [text[-1], *(text * width)[3 : 3 + width - 1]]
        at = len(text) - 1
        chosen = target.forward(RaggedBatch.pack([given], [at], [slot]), cache).logits.argmax(1).tolist()
        accepted = next((i for i in range(width - 1) if chosen[i] != given[i + 1]), width - 1)
        text += chosen[: accepted + 1]
        cache.rewind(torch.tensor([slot]), torch.tensor([len(text) - 1]))
    return text[:length]
