"""The core's samplers and its quantised products, each against plain torch in float64, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from outrider.backends.native import NativeBackend, available
from outrider.config import StackConfig
from outrider.sampling import rng as rng_module

if not available():
    pytest.skip("the compiled core is not built", allow_module_level=True)

from outrider import _native

ISAS = [*_native.instruction_sets(), *_native.emulated_instruction_sets()]
DTYPES = ["float32", "bfloat16", "int8", "int4"]


# ------------------------------------------------------------------------------------------------ products


def product(weight: Tensor, dtype: str, isa: str) -> Callable[[Tensor], Tensor]:
    """x W^T as the core computes it: the head of a stack without layers."""
    config = StackConfig(vocab_size=len(weight), hidden_size=weight.shape[1], layers=())
    weights = {"head.weight": weight, "norm.weight": torch.ones(weight.shape[1])}
    return NativeBackend(isa).load(config, weights, dtype).unembed


def rounded_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def rounded_int8(x: Tensor) -> Tensor:
    """Each row to 255 levels of its own scale."""
    scale = x.abs().amax(1, keepdim=True).double() / 127
    return (x.double() / scale).round() * scale


@pytest.mark.skipif("avx2" not in ISAS, reason="no AVX2")
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.startswith("avx_vnni")])
@pytest.mark.parametrize("rows", [1, 5, 6, 8, 33])
def test_dot_products_of_bytes_have_the_bits_of_avx2(isa: str, rows: int) -> None:
    """Their sums are exact, so AVX-VNNI and what emulates it give what AVX2 gives in other steps."""
    x, w = torch.randn(rows, 544), torch.randn(96, 544)
    assert torch.equal(product(w, "int8", isa)(x), product(w, "int8", "avx2")(x))
    assert torch.equal(down_product(x, w, isa), down_product(x, w, "avx2"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("rows", "outputs", "inner"), [(1, 1, 1), (3, 33, 7), (16, 95, 130), (37, 64, 1041), (270, 40, 64)]
)
def test_a_product_is_exact_but_for_its_format(isa: str, dtype: str, rows: int, outputs: int, inner: int) -> None:
    x, w = torch.randn(rows, inner), torch.randn(outputs, inner)
    got = product(w, dtype, isa)(x).double()
    if dtype == "float32":
        exact = x.double() @ w.double().t()
        allowed = 2 * ((x @ w.t()).double() - exact).norm() + 1e-6 * exact.norm()
        assert (got - exact).norm() <= allowed
        return
    rounded = rounded_bf16 if dtype == "bfloat16" else rounded_int8
    expected = rounded(x) @ rounded(w).t()
    # A value that falls between two levels may be rounded either way, by one float32 division: one level in a row.
    slack = 1e-6 if dtype == "bfloat16" else 2e-3
    assert (got - expected).norm() <= slack * expected.norm() + 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_int4_is_worth_its_bits(isa: str) -> None:
    """16 levels per 32 normal weights leave an error of about 8 %; per channel it would be over 15 %."""
    config = StackConfig(vocab_size=0, hidden_size=256, layers=())
    assert config.vocab_size == 0
    x, w = torch.randn(64, 512), torch.randn(96, 512)
    got = down_product(x, w, isa)
    exact = x.double() @ w.double().t()
    assert (got.double() - exact).norm() / exact.norm() < 0.09


def down_product(x: Tensor, w: Tensor, isa: str) -> Tensor:
    """x W^T in int4: the projection of given hidden states to the values of one layer, read back by attention.

    With a single cached position the attention's output is that position's value, so the output projection (identity
    by int4: exact powers of two) returns it.
    """
    from outrider.config import LayerConfig, RopeConfig
    from outrider.types import RaggedBatch

    width, inner = w.shape
    rope = RopeConfig((0.0,) * (width // 2))
    layer = LayerConfig(1, 1, width, 32, rope)
    config = StackConfig(vocab_size=0, hidden_size=width, layers=(layer,), input_width=inner)
    zero = torch.zeros
    weights = {
        "norm.weight": torch.ones(width),
        "layers.0.mlp_norm.weight": torch.ones(width),
        "layers.0.q.weight": zero(width, inner),
        "layers.0.k.weight": zero(width, inner),
        "layers.0.v.weight": w,
        "layers.0.o.weight": torch.eye(width),
        "layers.0.gate.weight": zero(32, width),
        "layers.0.up.weight": zero(32, width),
        "layers.0.down.weight": zero(width, 32),
    }
    made = NativeBackend(isa).load(config, weights, "int4")
    cache = made.new_cache(len(x), 1)
    batch = RaggedBatch.pack([[0]] * len(x), [0] * len(x), [cache.open() for _ in x])
    features = made.forward(batch, cache, hidden=x, residual=zero(len(x), width), aux_layers=(0,)).features
    assert features is not None
    return features


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_a_row_does_not_see_its_neighbours(isa: str, dtype: str, data: st.DataObject) -> None:
    inner, outputs, rows = (data.draw(st.integers(1, top)) for top in (200, 90, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x, w = torch.randn(rows, inner, generator=generator), torch.randn(outputs, inner, generator=generator)
    multiply = product(w, dtype, isa)
    together = multiply(x)
    alone = data.draw(st.integers(0, rows - 1))
    assert torch.equal(multiply(x[alone : alone + 1])[0], together[alone])


# ------------------------------------------------------------------------------------------------ choosing tokens


def gumbel_argmax(logits: Tensor, keys: Tensor, **options: Any) -> Tensor:
    out = torch.empty(len(logits), dtype=torch.int64)
    _native.gumbel_argmax(logits, keys, out, **options)
    return out


def random_keys(rows: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,))


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("width", [1, 3, 17, 4096, 5000, 40_000])
def test_races_have_the_winner_that_float64_defines(width: int, scale: float) -> None:
    logits, keys = torch.randn(3, width) * scale, random_keys(3)
    logits[1, ::2] = -torch.inf
    if width == 1:
        logits[:] = 0.0
    expected = (logits.double() + rng_module.gumbel(keys, None, width)).argmax(1)
    assert torch.equal(gumbel_argmax(logits, keys), expected)
    divisors = torch.tensor([0.7, 1.0, 2.5])
    tempered = (logits / divisors[:, None]).double() + rng_module.gumbel(keys, None, width)
    assert torch.equal(gumbel_argmax(logits, keys, temperatures=divisors), tempered.argmax(1))


def test_races_over_some_tokens_meet_the_noise_of_the_full_row() -> None:
    logits, keys = torch.randn(4, 300), random_keys(4)
    ids = torch.stack([torch.randperm(1000)[:300].sort().values for _ in range(4)])
    expected = (logits.double() + rng_module.gumbel(keys, ids, 1000)).argmax(1)
    assert torch.equal(gumbel_argmax(logits, keys, ids=ids), expected)
    assert torch.equal(gumbel_argmax(logits, keys, ids=ids), rng_module.gumbel_argmax(logits, keys, ids))


def test_races_draw_from_the_softmax() -> None:
    """A chi-square of 40,000 draws from 8 tokens stays under the 1e-4 quantile of its 7 degrees of freedom."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 1.5, -torch.inf])
    draws = gumbel_argmax(logits.expand(40_000, 8).contiguous(), random_keys(40_000))
    counts, distribution = torch.bincount(draws, minlength=8).double(), logits.double().softmax(0) * 40_000
    assert counts[7] == 0
    assert float(((counts - distribution)[:7] ** 2 / distribution[:7]).sum()) < 29.9


def test_races_refuse_damaged_logits() -> None:
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(2, 50)
        logits[1, 49] = value
        with pytest.raises(ValueError, match="NaN"):
            gumbel_argmax(logits, random_keys(2))


@pytest.mark.parametrize("width", [1, 5, 33, 4096, 4097, 70_000])
def test_argmax_takes_the_first_of_equals(width: int) -> None:
    logits = torch.randint(-9, 9, (2, width)).float()
    out = torch.empty(2, dtype=torch.int64)
    _native.argmax(logits, out)
    assert torch.equal(out, torch.from_numpy(logits.numpy().argmax(1)))


def test_samplers_check_their_arguments() -> None:
    logits, out = torch.zeros(2, 5), torch.empty(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one column"):
        _native.argmax(torch.zeros(2, 0), out)
    with pytest.raises(ValueError, match="one value per row"):
        _native.argmax(logits, out[:1])
    with pytest.raises(TypeError):
        _native.argmax(logits.t(), out)
    with pytest.raises(TypeError):
        _native.argmax(logits.double(), out)


@pytest.mark.parametrize("isa", [*ISAS, "avx512" if "avx512_vnni" in ISAS else "portable"])
def test_the_environment_names_the_instruction_set(isa: str) -> None:
    code = (  # without torch, whose import takes seconds
        "import numpy as np\nfrom outrider import _native\n"
        "logits = np.random.default_rng(0).standard_normal((2, 3000), np.float32)\n"
        "keys, out = np.array([5, -6]), np.empty(2, np.int64)\n"
        "_native.gumbel_argmax(logits, keys, out)\n"
        "print(_native.Stack(_native.StackSpec()).isa, _native.threads(), *out)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OUTRIDER_ISA": isa, "OUTRIDER_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    name, threads, *drawn = run.stdout.split()
    assert name.startswith(isa) and threads == "1"
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3000), np.float32))
    scores = logits.double() + rng_module.gumbel(torch.tensor([5, -6]), None, 3000)
    assert [int(token) for token in drawn] == scores.argmax(1).tolist()


# ------------------------------------------------------------------------------------------------ threads


def test_thread_counts_are_checked_and_a_forked_child_has_its_own_threads() -> None:
    with pytest.raises(ValueError, match="threads must be"):
        _native.set_threads(0)
    code = (
        "import os\nimport numpy as np\nfrom outrider import _native\n_native.set_threads(2)\n"
        "x = np.random.default_rng(0).standard_normal((40, 4096), np.float32)\n"
        "out, again = np.empty(40, np.int64), np.empty(40, np.int64)\n_native.argmax(x, out)\n"
        "assert (out == x.argmax(1)).all()\nchild = os.fork()\nif child == 0:\n"
        "    _native.argmax(x, again)\n    os._exit(0 if (again == out).all() else 3)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    assert run.returncode == 0, run.stderr


def test_bandwidth_is_a_rate_of_this_world() -> None:
    assert 1e8 < _native.read_bandwidth(8 << 20, 2) < 1e13
