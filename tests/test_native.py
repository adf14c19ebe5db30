"""The compiled core against the reference backend in float64, and against itself: equal bits in any batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.backends.layers import weight_shapes
from outrider.backends.native import NativeBackend, available
from outrider.backends.reference import ReferenceBackend
from outrider.config import LayerConfig, RopeConfig, StackConfig
from outrider.errors import CacheFull, InvalidRequest, OutriderError
from outrider.types import RaggedBatch, StackOutput

pytestmark = pytest.mark.skipif(not available(), reason="the compiled core is not built")

DTYPES = ["float32", "bfloat16", "int8", "int4"]


def instruction_sets() -> list[str]:
    if not available():
        return ["portable"]
    from outrider import _native

    return [*_native.instruction_sets(), *_native.emulated_instruction_sets()]


def rope(head_dim: int, theta: float = 10_000.0, scale: float = 1.0) -> RopeConfig:
    return RopeConfig(tuple(theta ** (-i / (head_dim // 2)) for i in range(head_dim // 2)), scale)


def layer(**options: Any) -> LayerConfig:
    plain: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96}
    options = plain | options
    return LayerConfig(rope=options.pop("rope", rope(options["head_dim"])), **options)


def stack(*layers: LayerConfig, **options: Any) -> StackConfig:
    plain: dict[str, Any] = {"vocab_size": 203, "hidden_size": 64}
    return StackConfig(layers=layers or (layer(), layer()), **plain | options)


def random_weights(config: StackConfig, bias: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep activations near one, so that errors can be told from each other."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        if (name.endswith(".bias") and not bias) or name.endswith(".scalar"):
            continue
        sizes = [config.vocab_size if size is None else size for size in shape.sizes]
        draw = torch.randn(sizes, generator=generator)
        if "norm" in name:
            draw = (1 - config.norm_offset) + 0.1 * draw
        elif name != "embed.weight":
            draw = draw * (sizes[-1] ** -0.5 if len(sizes) > 1 else 0.3)
        weights[name] = draw
    return weights


PROMPTS = [list(range(1, 71)), [5], [7, 9, 11, 13, 150]]
STEPS = [[3, 4], [100], [1, 2, 3, 4, 5, 6, 7, 8]]


def two_passes(made: Any, aux_layers: Sequence[int] = (-1, 0, 1)) -> tuple[Tensor, Tensor, Tensor]:
    """A ragged prefill and a ragged step: logits, hidden states and features of all tokens."""
    cache = made.new_cache(3, 130)
    slots = [cache.open() for _ in PROMPTS]
    first = made.forward(RaggedBatch.pack(PROMPTS, [0, 0, 0], slots), cache, aux_layers=aux_layers)
    second = made.forward(RaggedBatch.pack(STEPS, [len(p) for p in PROMPTS], slots), cache, aux_layers=aux_layers)
    assert cache.lengths.tolist() == [len(p) + len(s) for p, s in zip(PROMPTS, STEPS, strict=True)]
    return tuple(torch.cat([getattr(o, part) for o in (first, second)]) for part in ("logits", "hidden", "features"))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


CONFIGS = {
    "plain": (stack(), False),
    "biases, q and k norms, groups of three": (
        stack(layer(num_heads=6, qk_norm=True), layer(num_heads=6, qk_norm=True), hidden_size=80),
        True,
    ),
    "gemma 3": (
        stack(
            layer(window=24, qk_norm=True, attention_scale=0.3),
            layer(qk_norm=True, attention_scale=0.3, rope=rope(16, 1e6)),
            norm_offset=1.0,
            activation="gelu_tanh",
            sandwich_norms=True,
            embedding_scale=8.0,
        ),
        False,
    ),
    "gemma 4": (
        stack(
            layer(qk_norm=True, v_norm=True, window=9, attention_scale=1.0),
            layer(num_kv_heads=1, head_dim=32, qk_norm=True, v_norm=True, value_is_key=True, layer_scalar=0.7),
            sandwich_norms=True,
            activation="gelu",
            logit_softcap=3.0,
        ),
        False,
    ),
    "head width 64, odd widths": (stack(layer(head_dim=64, intermediate_size=117), hidden_size=52), False),
    "head width 80": (stack(layer(head_dim=80, num_kv_heads=4), hidden_size=48), False),
    "head width 96": (stack(layer(head_dim=96, num_kv_heads=1)), False),
    "head width 128": (stack(layer(head_dim=128, num_heads=3, num_kv_heads=3)), False),
    "head width 256": (stack(layer(head_dim=256, num_heads=2, num_kv_heads=1)), False),
    "yarn": (stack(layer(rope=rope(16, scale=1.2))), False),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("isa", instruction_sets())
def test_float32_is_as_exact_as_torch(name: str, isa: str) -> None:
    config, bias = CONFIGS[name]
    weights = random_weights(config, bias)
    aux_layers = range(-1, len(config.layers))
    exact = two_passes(ReferenceBackend().load(config, weights, torch.float64), aux_layers)
    torch32 = two_passes(ReferenceBackend().load(config, weights, torch.float32), aux_layers)
    ours = two_passes(NativeBackend(isa).load(config, weights, torch.float32), aux_layers)
    for got, baseline, truth in zip(ours, torch32, exact, strict=True):
        assert error(got, truth) <= 2 * error(baseline, truth) + 1e-7


def rows_of(made: Any, tokens: list[int], cuts: Sequence[int], crowd: bool) -> Tensor:
    """Logits of every token, prefilled in pieces that end at ``cuts``; ``crowd`` adds other rows to every pass."""
    cache = made.new_cache(3, len(tokens) + 8)
    slots = [cache.open() for _ in range(3)]
    logits = []
    for begin, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        if not crowd:
            batch = RaggedBatch.pack([tokens[begin:end]], [begin], [slots[1]])
            logits.append(made.forward(batch, cache).logits)
            continue
        held = int(cache.lengths[slots[0]])
        batch = RaggedBatch.pack([[9], tokens[begin:end], [1, 2, 3]], [held, begin, 0], slots)
        logits.append(made.forward(batch, cache).logits[1 : 1 + end - begin])
    return torch.cat(logits)


@pytest.fixture(scope="module", params=[(isa, dtype) for isa in instruction_sets() for dtype in DTYPES], ids="-".join)
def made(request: pytest.FixtureRequest) -> Any:
    isa, dtype = request.param
    config = stack(layer(head_dim=32, window=40), layer(num_heads=6, num_kv_heads=3, qk_norm=True), hidden_size=80)
    return NativeBackend(isa).load(config, random_weights(config, bias=True), dtype)


@pytest.fixture
def threads() -> Iterator[Any]:
    from outrider import _native

    before = _native.threads()
    yield _native.set_threads
    _native.set_threads(before)


def test_bits_do_not_depend_on_rows_chunks_neighbours_or_threads(made: Any, threads: Any) -> None:
    """Issue: logits for M = 1 equal those for M = 2 to 300, whatever the chunking and the batch."""
    tokens = torch.randint(0, 203, (301,), generator=torch.Generator().manual_seed(3)).tolist()
    threads(1)
    whole = rows_of(made, tokens, [], crowd=False)
    assert whole.isfinite().all()
    one_by_one = [*range(1, 41), *range(250, 301)]
    for cuts in (one_by_one, [150], [7, 9, 25, 26, 41, 300], range(14, 301, 14)):
        assert torch.equal(rows_of(made, tokens, cuts, crowd=cuts is not one_by_one), whole), list(cuts)
    for count in (2, 3):
        threads(count)
        for cuts in ([], [7, 150, 151, 165]):
            assert torch.equal(rows_of(made, tokens, cuts, crowd=bool(cuts)), whole), (count, cuts)


@given(data=st.data())
def test_bits_do_not_depend_on_any_cut(data: st.DataObject) -> None:
    made = small()
    tokens = data.draw(st.lists(st.integers(0, 202), min_size=1, max_size=90))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(tokens) - 1)), max_size=5)) - {len(tokens)})
    whole = rows_of(made, tokens, [], crowd=False)
    assert torch.equal(rows_of(made, tokens, cuts, crowd=data.draw(st.booleans())), whole)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[StackConfig, bool]:
    """Stacks of odd sizes, one or two layers that differ, with any of the options; and whether linears have biases."""
    sandwich, v_norm = draw(st.booleans()), draw(st.booleans())

    def some_layer() -> LayerConfig:
        kv_heads = draw(st.integers(1, 3))
        head_dim = 2 * draw(st.integers(1, 37))
        return layer(
            num_kv_heads=kv_heads,
            num_heads=kv_heads * draw(st.integers(1, 5)),
            head_dim=head_dim,
            intermediate_size=draw(st.integers(1, 150)),
            window=draw(st.none() | st.integers(1, 40)),
            qk_norm=draw(st.booleans()),
            v_norm=v_norm,
            value_is_key=draw(st.booleans()),
        )

    layers = [some_layer() for _ in range(draw(st.integers(1, 2)))]
    config = stack(
        *layers,
        vocab_size=draw(st.integers(1, 99)),
        hidden_size=draw(st.integers(3, 99)),
        sandwich_norms=sandwich,
        activation=draw(st.sampled_from(["silu", "gelu_tanh", "gelu"])),
        logit_softcap=draw(st.sampled_from([0.0, 2.0])),
    )
    return config, draw(st.booleans())


@settings(max_examples=25)
@given(shape=shapes(), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3), data=st.data())
def test_stacks_of_any_shape(shape: tuple[StackConfig, bool], lengths: list[int], data: st.DataObject) -> None:
    """As exact as torch in float32 and, in every dtype, the same bits in one pass and in two."""
    config, bias = shape
    weights = random_weights(config, bias)
    isa, dtype = data.draw(st.sampled_from(instruction_sets())), data.draw(st.sampled_from(DTYPES))
    prompts = [[(5 * i + 3 * b) % config.vocab_size for i in range(n)] for b, n in enumerate(lengths)]

    def run(made: Any, cut: int) -> Tensor:
        cache = made.new_cache(len(prompts), 48)
        slots = [cache.open() for _ in prompts]
        heads, tails = [p[:cut] for p in prompts], [p[cut:] for p in prompts]
        first = made.forward(RaggedBatch.pack(heads, [0] * len(prompts), slots), cache).logits
        second = made.forward(RaggedBatch.pack(tails, [len(h) for h in heads], slots), cache).logits
        pieces = zip(first.split([len(h) for h in heads]), second.split([len(t) for t in tails]), strict=True)
        return torch.cat([part for pair in pieces for part in pair])

    exact, torch32 = (run(ReferenceBackend().load(config, weights, d), 40) for d in (torch.float64, torch.float32))
    assert (
        error(run(NativeBackend(isa).load(config, weights, "float32"), 40), exact) <= 2 * error(torch32, exact) + 1e-6
    )
    made = NativeBackend(isa).load(config, weights, dtype)
    whole = run(made, 40)
    assert whole.isfinite().all() and torch.equal(run(made, data.draw(st.integers(0, 39))), whole)


_SMALL: list[Any] = []


def small() -> Any:
    if not _SMALL:
        config = stack(layer(window=20), layer(num_kv_heads=1))
        _SMALL.append(NativeBackend().load(config, random_weights(config), "int8"))
    return _SMALL[0]


# ------------------------------------------------------------------------------------------------ what drafters need


def pair(config: StackConfig, dtype: str = "float32") -> tuple[Any, Any]:
    weights = random_weights(config)
    return ReferenceBackend().load(config, weights, torch.float64), NativeBackend().load(config, weights, dtype)


def test_block_attention_projected_context_and_hidden_input() -> None:
    """DSpark: a context written from hidden states, then a block that attends to it and to itself, both ways."""
    config = stack(layer(qk_norm=True, window=12), layer(), vocab_size=0)
    context, block = torch.randn(2, 23, 64), torch.randn(1, 7, 64)
    outputs = []
    for made in pair(config):
        cache = made.new_cache(2, 64)
        slots = [cache.open(), cache.open()]
        lengths = [20, 3]
        given = torch.cat([context[0, :20], context[1, :3]])
        made.project(given, RaggedBatch.pack([[0] * n for n in lengths], [0, 0], slots), cache)
        assert cache.lengths.tolist() == lengths
        batch = RaggedBatch.pack([[0] * 4, [0] * 3], lengths, slots)
        output = made.forward(batch, cache, hidden=block[0], mask="block")
        assert output.logits is None and cache.lengths.tolist() == [24, 6]
        outputs.append(output.hidden)
    assert error(outputs[1], outputs[0].double()) < 1e-6


def test_wide_input() -> None:
    """EAGLE-3: the first layer's attention reads twice the width, the residual stream is given apart."""
    config = stack(layer(), input_width=128)
    hidden, residual = torch.randn(5, 128), torch.randn(5, 64)
    outputs = []
    for made in pair(config):
        cache = made.new_cache(1, 16)
        batch = RaggedBatch.pack([[0] * 5], [0], [cache.open()])
        outputs.append(made.forward(batch, cache, hidden=hidden, residual=residual, aux_layers=(0,)))
    assert error(outputs[1].logits, outputs[0].logits) < 1e-6
    assert error(outputs[1].features, outputs[0].features) < 1e-6


def test_embed_and_unembed_are_the_ends_of_a_pass() -> None:
    config = stack(embedding_scale=3.0, logit_softcap=5.0)
    reference, made = pair(config)
    tokens = torch.tensor([[3, 202], [0, 7]])
    assert error(made.embed(tokens), reference.embed(tokens)) < 1e-7
    cache = made.new_cache(1, 8)
    output = made.forward(RaggedBatch.pack([[3, 202, 0]], [0], [cache.open()]), cache)
    assert torch.equal(made.unembed(output.hidden), output.logits)
    assert made.unembed(output.hidden.view(1, 3, 64)).shape == (1, 3, 203)


def test_logits_only_where_asked() -> None:
    made = small()
    cache = made.new_cache(1, 8)
    slot = cache.open()
    batch = RaggedBatch.pack([[3, 4, 5, 6]], [0], [slot])
    everything = made.forward(batch, cache)
    cache.rewind(torch.tensor([slot]), torch.tensor([0]))
    some = made.forward(batch, cache, logits_at=torch.tensor([3, 0, 0]))
    assert torch.equal(some.logits, everything.logits[[3, 0, 0]])
    cache.rewind(torch.tensor([slot]), torch.tensor([0]))
    none = made.forward(batch, cache, logits_at=torch.tensor([], dtype=torch.int64), aux_layers=(1,))
    assert none.logits.shape == (0, 203) and none.hidden.shape == (0, 64) and none.features.shape == (4, 64)


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_largest_logits_are_found_in_the_pass(isa: str) -> None:
    """Over all panels and threads; of equal ones the first; with a last panel that is not full."""
    config = stack(logit_softcap=2.0)
    weights = {name: tensor.clone() for name, tensor in random_weights(config).items()}
    for first, second in [(7, 150), (31, 32), (5, 202)]:  # equal logits, of the same and of other panels
        weights["head.weight"][first] *= 3  # so that some of them are the largest
        weights["head.weight"][second] = weights["head.weight"][first]
    made = NativeBackend(isa).load(config, weights, "int8")
    for rows in (1, 5, 40, 300):
        batch = RaggedBatch.pack([[(7 * i) % 203 for i in range(rows)]], [0], [0])
        wanted = None if rows == 5 else torch.arange(rows - 1, -1, -2)
        outputs = []
        for largest in (False, True):
            cache = made.new_cache(1, 300)
            cache.open()
            outputs.append(made.forward(batch, cache, aux_layers=(0,), logits_at=wanted, largest=largest))
        logits, found = outputs
        assert found.largest == logits.logits.numpy().argmax(1).tolist() and found.logits is None
        assert torch.equal(found.hidden, logits.hidden) and torch.equal(found.features, logits.features)
    assert {7, 31, 5} <= set(found.largest)
    cache = made.new_cache(1, 8)
    batch = RaggedBatch.pack([[1]], [0], [cache.open()])
    assert made.forward(batch, cache, logits_at=torch.tensor([], dtype=torch.int64), largest=True).largest == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_whose_largest_logit_is_no_number_is_told(value: float) -> None:
    config = stack()
    weights = {name: tensor.clone() for name, tensor in random_weights(config).items()}
    made = NativeBackend().load(config, weights, "float32")
    hidden = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden[1, 5] = value
    outputs = []
    for largest in (True, False):
        cache = made.new_cache(3, 8)
        batch = RaggedBatch.pack([[0]] * 3, [0] * 3, [cache.open() for _ in range(3)])
        outputs.append(made.forward(batch, cache, hidden=hidden, largest=largest))
    found, logits = outputs[0].largest, outputs[1].logits
    assert [token < 0 for token in found] == (~logits.amax(1).isfinite()).tolist() == [False, True, False]


def test_rewound_tokens_leave_no_trace() -> None:
    made = small()
    cache = made.new_cache(2, 64)
    slot = cache.open()
    made.forward(RaggedBatch.pack([[3, 4, 5, 6, 7, 8, 9]], [0], [slot]), cache)
    cache.rewind(torch.tensor([slot]), torch.tensor([2]))
    again = made.forward(RaggedBatch.pack([[50, 51]], [2], [slot]), cache)
    fresh = cache.open()
    assert fresh != slot
    clean = made.forward(RaggedBatch.pack([[3, 4, 50, 51]], [0], [fresh]), cache)
    assert torch.equal(again.logits, clean.logits[2:])
    cache.release(slot)
    assert cache.open() == slot and cache.lengths.tolist() == [0, 4]


# ------------------------------------------------------------------------------------------------ edges


def test_empty_batches_and_rows() -> None:
    made = small()
    cache = made.new_cache(2, 8)
    slots = [cache.open(), cache.open()]
    nothing = made.forward(RaggedBatch.pack([], [], []), cache)
    assert nothing.logits.shape == (0, 203)
    output = made.forward(RaggedBatch.pack([[], [5]], [0, 0], slots), cache, aux_layers=(0,))
    assert output.logits.shape == (1, 203) and cache.lengths.tolist() == [0, 1]
    made.project(torch.empty(0, 64), RaggedBatch.pack([], [], []), cache)
    assert made.embed(torch.empty(0, dtype=torch.int64)).shape == (0, 64)
    assert made.unembed(torch.empty(0, 64)).shape == (0, 203)


def test_a_slot_can_be_filled_to_the_brim() -> None:
    made = small()
    cache = made.new_cache(1, 70)
    slot = cache.open()
    tokens = list(range(70))
    whole = made.forward(RaggedBatch.pack([tokens], [0], [slot]), cache)
    cache.rewind(torch.tensor([slot]), torch.tensor([69]))
    last = made.forward(RaggedBatch.pack([[69]], [69], [slot]), cache)
    assert torch.equal(last.logits[0], whole.logits[69])
    with pytest.raises(CacheFull, match="capacity of 70"):
        made.forward(RaggedBatch.pack([[1]], [70], [slot]), cache)
    with pytest.raises(CacheFull, match="slots are in use"):
        cache.open()


def bad(batch: RaggedBatch, **parts: Tensor) -> RaggedBatch:
    fields = {name: getattr(batch, name) for name in ("tokens", "positions", "slots", "offsets")}
    return RaggedBatch(**fields | parts)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"tokens": torch.tensor([1, 203, 3])}, {}, "token id 203"),
        ({"tokens": torch.tensor([1, -1, 3])}, {}, "token id -1"),
        ({"tokens": torch.tensor([1.0, 2.0, 3.0])}, {}, "tokens is float32"),
        ({"positions": torch.tensor([0, 2, 3])}, {}, "consecutive"),
        ({"positions": torch.tensor([1, 2, 3])}, {}, "holds 0 tokens"),
        ({"positions": torch.tensor([-1, 0, 1])}, {}, "position -1"),
        ({"positions": torch.tensor([0, 1])}, {}, "as many positions"),
        ({"slots": torch.tensor([1])}, {}, "slot 1 is not open"),
        ({"slots": torch.tensor([7])}, {}, "slot 7 is not open"),
        ({"offsets": torch.tensor([0, 2])}, {}, "offsets"),
        ({"slots": torch.tensor([0, 0]), "offsets": torch.tensor([0, 2, 3])}, {}, "twice"),
        ({}, {"aux_layers": (2,)}, "auxiliary layer 2"),
        ({}, {"logits_at": torch.tensor([3])}, "logits_at holds 3"),
        ({}, {"hidden": torch.zeros(3, 65)}, r"hidden has shape \[3, 65\], expected \[3, 64\]"),
        ({}, {"hidden": torch.zeros(64, 3).t()}, "hidden is float32 .* not contiguous"),
        ({}, {"residual": torch.zeros(3, 64)}, "residual"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    made = small()
    cache = made.new_cache(2, 8)
    batch = RaggedBatch.pack([[1, 2, 3]], [0], [cache.open()])
    with pytest.raises(InvalidRequest, match=message):
        made.forward(bad(batch, **change), cache, **options)
    assert cache.lengths.tolist() == [0, 0]


def test_unknown_dtype_and_instruction_set() -> None:
    config = stack()
    with pytest.raises(InvalidRequest, match="did you mean 'int8'"):
        NativeBackend().load(config, random_weights(config), "int9")
    with pytest.raises(InvalidRequest, match="instruction set mmx"):
        NativeBackend("mmx").load(config, random_weights(config), "int8")
    with pytest.raises(OutriderError, match="missing"):
        NativeBackend().load(config, {}, "int8")


def test_outputs_are_plain_float32() -> None:
    made = small()
    cache = made.new_cache(1, 8)
    output: StackOutput = made.forward(RaggedBatch.pack([[1]], [0], [cache.open()]), cache, aux_layers=(0,))
    for tensor in (output.hidden, output.logits, output.features):
        assert tensor is not None and tensor.dtype is torch.float32 and tensor.is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_weights_that_overflow_give_logits_that_are_not_numbers(dtype: str, isa: str) -> None:
    """Not zeros, of which token 0 would be chosen for ever: the engine refuses NaN."""
    config = stack()
    weights = {name: tensor.clone() for name, tensor in random_weights(config).items()}
    weights["layers.0.down.weight"].fill_(3e38)
    made = NativeBackend(isa).load(config, weights, dtype)
    cache = made.new_cache(1, 8)
    logits = made.forward(RaggedBatch.pack([[1, 2, 3]], [0], [cache.open()]), cache).logits
    assert logits is not None and bool(logits.isnan().all())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_threads_that_lose_their_core_change_no_bit(dtype: str) -> None:
    """Workers that are late, missing or dropped, in passes of one and of several jobs."""
    from outrider import _native

    config = stack(*[layer(num_heads=8, head_dim=32, intermediate_size=1024) for _ in range(6)], hidden_size=256)
    made = NativeBackend().load(config, random_weights(config), dtype)
    batches = [RaggedBatch.pack([[i % 200 for i in range(rows)]], [0], [0]) for rows in (1, 3, 16, 40)]

    def run(batch: RaggedBatch) -> StackOutput:
        cache = made.new_cache(1, 64)
        cache.open()
        return made.forward(batch, cache, aux_layers=[0, 5])

    threads = _native.threads()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        _native.set_threads(1)
        expected = [run(batch) for batch in batches]
        _native.set_threads(3)
        for _ in range(25):
            for batch, alone in zip(batches, expected, strict=True):
                together = run(batch)
                assert torch.equal(together.logits, alone.logits)
                assert torch.equal(together.features, alone.features)
    finally:
        _native.set_threads(threads)
        for process in busy:
            process.kill()
            process.wait()
