"""The reference backend against a slow, literal reading of what a stack is, and its cache against no cache."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from outrider.backends.layers import check_weights, rope_config, weight_shapes
from outrider.backends.reference import ReferenceBackend, ReferenceStack
from outrider.config import LayerConfig, RopeConfig, StackConfig
from outrider.errors import CheckpointError
from outrider.types import RaggedBatch

ROPE = RopeConfig((1.0, 0.3, 0.05, 0.0), scale=1.1)
PLAIN = LayerConfig(num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=20, rope=ROPE)
RICH = LayerConfig(
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=12,
    rope=replace(ROPE, inverse_frequencies=(0.5, 0.1, 0.0, 0.0)),
    window=4,
    attention_scale=0.7,
    qk_norm=True,
    v_norm=True,
    value_is_key=True,
    layer_scalar=0.8,
)
STACKS = {
    "plain": StackConfig(vocab_size=17, hidden_size=24, layers=(PLAIN, PLAIN)),
    "rich": StackConfig(
        vocab_size=17,
        hidden_size=24,
        layers=(replace(PLAIN, window=3), RICH),
        norm_eps=1e-3,
        norm_offset=1.0,
        activation="gelu_tanh",
        sandwich_norms=True,
        embedding_scale=24**0.5,
        logit_softcap=3.0,
    ),
    "wide": StackConfig(vocab_size=9, hidden_size=24, layers=(PLAIN,), input_width=48),
}


def random_weights(config: StackConfig, biases: bool = True) -> dict[str, Tensor]:
    """float64, every optional weight included."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn([size or 19 for size in shape.sizes], generator=generator, dtype=torch.float64) * 0.4
        for name, shape in weight_shapes(config).items()
        if shape.required or biases or name in ("embed.weight", "head.weight")
    }


def make(name: str, dtype: str = "float64", **options: Any) -> tuple[ReferenceStack, dict[str, Tensor]]:
    weights = random_weights(STACKS[name], **options)
    return ReferenceBackend().load(STACKS[name], weights, dtype), weights


def naive(
    config: StackConfig,
    weights: dict[str, Tensor],
    x: Tensor,
    sees: Tensor,
    context: Tensor | None = None,
    wide: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Final hidden states, logits and every layer's output of the tokens ``x`` [n, D], head by head, without a cache.

    ``sees`` bool [n, C + n]; ``context`` [C, D] are hidden states with keys and values before the tokens'.
    """

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(y: Tensor, gain: Tensor | None) -> Tensor:
        unit = y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return unit if gain is None else unit * (gain + config.norm_offset)

    def rotate(y: Tensor, rope: RopeConfig, first: int) -> Tensor:  # [n, Dh], one head
        turned = y.clone()
        half = y.shape[1] // 2
        for t in range(len(y)):
            for i, frequency in enumerate(rope.inverse_frequencies):
                cos, sin = math.cos((first + t) * frequency), math.sin((first + t) * frequency)
                turned[t, i] = (y[t, i] * cos - y[t, i + half] * sin) * rope.scale
                turned[t, i + half] = (y[t, i + half] * cos + y[t, i] * sin) * rope.scale
        return turned

    outputs = []
    cached = 0 if context is None else len(context)
    for index, layer in enumerate(config.layers):
        name, size = f"layers.{index}.", layer.head_dim
        norms = {n: weights.get(f"{name}{n}.weight") for n in ("input_norm", "q_norm", "k_norm", "mlp_norm")}
        y = wide if wide is not None and index == 0 else norm(x, norms["input_norm"])
        everything = y if context is None else torch.cat([context, y])
        q, k = linear(f"{name}q", y), linear(f"{name}k", everything)
        v = k if layer.value_is_key else linear(f"{name}v", everything)
        heads = []
        for head in range(layer.num_heads):
            group = head * layer.num_kv_heads // layer.num_heads
            own, shared = slice(head * size, head * size + size), slice(group * size, group * size + size)
            query, key, value = q[:, own], k[:, shared], v[:, shared]
            if layer.qk_norm:
                query, key = norm(query, norms["q_norm"]), norm(key, norms["k_norm"])
            query, key = rotate(query, layer.rope, cached), rotate(key, layer.rope, 0)
            visible = sees.clone()
            if layer.window is not None:
                distance = torch.arange(cached, cached + len(x))[:, None] - torch.arange(cached + len(x))
                visible &= distance < layer.window
            scores = (query @ key.T * layer.scale).masked_fill(~visible, -torch.inf)
            heads.append(scores.softmax(-1) @ (norm(value, None) if layer.v_norm else value))
        attended = linear(f"{name}o", torch.cat(heads, 1))
        x = x + (norm(attended, weights[f"{name}attention_out_norm.weight"]) if config.sandwich_norms else attended)
        y = norm(x, norms["mlp_norm"])
        gate, up = linear(f"{name}gate", y), linear(f"{name}up", y)
        gate = torch.nn.functional.silu(gate) if config.activation == "silu" else _gelu_tanh(gate)
        mlp = linear(f"{name}down", gate * up)
        x = x + (norm(mlp, weights[f"{name}mlp_out_norm.weight"]) if config.sandwich_norms else mlp)
        x = x * layer.layer_scalar * weights.get(f"{name}scalar", 1.0)
        outputs.append(x)
    hidden = norm(x, weights["norm.weight"])
    logits = hidden @ weights["head.weight"].T
    cap = config.logit_softcap
    return hidden, cap * torch.tanh(logits / cap) if cap else logits, outputs


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def close(mine: Tensor | None, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name", ["plain", "rich"])
def test_a_causal_pass(name: str, biases: bool) -> None:
    stack, weights = make(name, biases=biases)
    cache = stack.new_cache(2, 16)
    cache.open()
    batch = RaggedBatch.pack([TOKENS.tolist()], [0], [cache.open()])
    output = stack.forward(batch, cache, aux_layers=(1, -1, 0))
    x = weights["embed.weight"][TOKENS] * stack.config.embedding_scale
    hidden, logits, layers = naive(stack.config, weights, x, torch.ones(11, 11, dtype=torch.bool).tril())
    close(output.hidden, hidden)
    close(output.logits, logits)
    close(output.features, torch.cat([layers[1], x, layers[0]], -1))
    close(stack.embed(TOKENS), x)
    close(stack.unembed(hidden), logits)


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_a_block_sees_itself_whole_and_the_projected_context(name: str) -> None:
    """DSpark's pass: keys and values of given hidden states, then a block whose attention is not causal; twice."""
    stack, weights = make(name)
    cache = stack.new_cache(1, 16)
    slot = cache.open()
    context = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = weights["embed.weight"][TOKENS[:4]] * stack.config.embedding_scale
    for begin, end in ((0, 3), (3, 5)):
        stack.project(context[begin:end], RaggedBatch.pack([[0] * (end - begin)], [begin], [slot]), cache)
        assert cache.lengths.tolist() == [end]
        block = RaggedBatch.pack([TOKENS[:4].tolist()], [end], [slot])
        output = stack.forward(block, cache, mask="block")
        hidden, logits, _ = naive(
            stack.config, weights, x, torch.ones(4, end + 4, dtype=torch.bool), context=context[:end]
        )
        close(output.hidden, hidden)
        close(output.logits, logits)
        cache.rewind(torch.tensor([slot]), torch.tensor([end]))  # the block's own keys were scratch


def test_a_double_width_input() -> None:
    """EAGLE-3's pass: layer 0 attends with an input of its own, and the residual stream is given besides."""
    stack, weights = make("wide")
    cache = stack.new_cache(1, 16)
    generator = torch.Generator().manual_seed(2)
    wide, residual = (torch.randn(6, width, dtype=torch.float64, generator=generator) for width in (48, 24))
    batch = RaggedBatch.pack([[0] * 6], [0], [cache.open()])
    output = stack.forward(batch, cache, hidden=wide, residual=residual, aux_layers=(0, -1))
    hidden, logits, layers = naive(
        stack.config, weights, residual, torch.ones(6, 6, dtype=torch.bool).tril(), wide=wide
    )
    close(output.hidden, hidden)
    close(output.logits, logits)
    close(output.features, torch.cat([layers[0], residual], -1))


def test_logits_only_where_they_are_asked_for() -> None:
    stack, _ = make("plain")
    cache = stack.new_cache(1, 16)
    slot = cache.open()
    batch = RaggedBatch.pack([TOKENS.tolist()], [0], [slot])
    whole = stack.forward(batch, cache)
    some = stack.forward(batch, cache, logits_at=torch.tensor([10, 2]))
    none = stack.forward(batch, cache, logits_at=torch.empty(0, dtype=torch.int64))
    close(some.logits, whole.logits[[10, 2]])
    assert none.logits is not None and none.logits.shape == (0, 17) and none.hidden.shape == (0, 24)
    given = stack.forward(batch, cache, hidden=stack.embed(batch.tokens))
    assert torch.equal(given.logits, whole.logits)


def test_empty_batches_and_rows() -> None:
    stack, _ = make("rich")
    cache = stack.new_cache(2, 16)
    slots = [cache.open(), cache.open()]
    assert stack.forward(RaggedBatch.pack([], [], []), cache, aux_layers=(0,)).logits.shape == (0, 17)
    assert stack.forward(RaggedBatch.pack([[]], [0], slots[:1]), cache).logits.shape == (0, 17)
    stack.project(torch.empty(0, 24), RaggedBatch.pack([[], []], [0, 0], slots), cache)
    one = stack.forward(RaggedBatch.pack([[], [1, 2]], [0, 0], slots), cache)
    assert cache.lengths.tolist() == [0, 2] and one.logits.shape == (2, 17)


@pytest.mark.parametrize("length", [31, 32, 33, 600])
def test_long_passes_equal_single_steps(length: int) -> None:
    """Few, many and very many new tokens take different ways through attention."""
    stack, _ = make("rich")
    tokens = torch.randint(17, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    cache = stack.new_cache(2, 640)
    a, b = cache.open(), cache.open()
    whole = stack.forward(RaggedBatch.pack([tokens], [0], [a]), cache).logits
    stack.forward(RaggedBatch.pack([tokens[: length - 2]], [0], [b]), cache)
    for position in (length - 2, length - 1):
        step = stack.forward(RaggedBatch.pack([[tokens[position]]], [position], [b]), cache)
        close(step.logits[0], whole[position])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(["plain", "rich"]))
def test_any_order_of_passes_and_rewinds_equals_no_cache(data: st.DataObject, name: str) -> None:
    """Rows grow by chunks of any size and forget any tail; logits are always those of the sequence from scratch."""
    stack, _ = SHARED[name]
    cache = stack.new_cache(3, 12)
    slots = [cache.open() for _ in range(3)]
    held: list[list[int]] = [[], [], []]
    for _ in range(data.draw(st.integers(1, 4))):
        rows = data.draw(st.lists(st.sampled_from(range(3)), min_size=1, unique=True))
        kept = [data.draw(st.integers(0, len(held[row]))) for row in rows]
        cache.rewind(torch.tensor([slots[row] for row in rows]), torch.tensor(kept))
        new = [data.draw(st.lists(st.integers(0, 16), max_size=12 - n)) for n in kept]
        output = stack.forward(RaggedBatch.pack(new, kept, [slots[row] for row in rows]), cache)
        done = 0
        for row, n, chunk in zip(rows, kept, new, strict=True):
            held[row] = held[row][:n] + chunk
            close(output.logits[done : done + len(chunk)], from_scratch(stack, held[row])[n:])
            done += len(chunk)
        assert cache.lengths.tolist() == [len(row) for row in held]


SHARED = {name: make(name) for name in ("plain", "rich")}


def from_scratch(stack: ReferenceStack, tokens: list[int]) -> Tensor:
    cache = stack.new_cache(1, 12)
    logits = stack.forward(RaggedBatch.pack([tokens], [0], [cache.open()]), cache).logits
    assert logits is not None
    return logits


def test_a_slot_that_is_used_again_starts_empty() -> None:
    stack, _ = SHARED["plain"]
    cache = stack.new_cache(1, 12)
    slot = cache.open()
    stack.forward(RaggedBatch.pack([[1, 2, 3, 4, 5]], [0], [slot]), cache)
    cache.release(slot)
    assert cache.open() == slot and cache.lengths.tolist() == [0]
    again = stack.forward(RaggedBatch.pack([[7, 8]], [0], [slot]), cache)
    close(again.logits, from_scratch(stack, [7, 8]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_stays_near(dtype: str) -> None:
    exact, weights = make("rich")
    stack = ReferenceBackend().load(exact.config, weights, dtype)
    cache, other = stack.new_cache(1, 16), exact.new_cache(1, 16)
    batch = RaggedBatch.pack([TOKENS.tolist()], [0], [cache.open()])
    other.open()
    mine, theirs = stack.forward(batch, cache).logits, exact.forward(batch, other).logits
    assert mine.dtype is torch.float32
    assert (mine - theirs).norm() < theirs.norm() * (1e-6 if dtype == "float32" else 0.03)


# ------------------------------------------------------------------------------------------------ weights and rope


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.k.weight": None}, "'layers.1.k.weight' is missing; expected shape .16, 24."),
        (
            {"layers.0.o.weight": torch.ones(24, 31)},
            "'layers.0.o.weight' has shape .24, 31., but the config says .24, 32.",
        ),
        ({"layers.0.q.bias": torch.ones(3)}, "'layers.0.q.bias' has shape .3."),
        ({"layers.2.q.weight": torch.ones(1)}, "unexpected tensor 'layers.2.q.weight'"),
        ({"head.weight": None}, "serves as the head too, but the config's vocabulary has 17 tokens"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    weights = {**random_weights(STACKS["plain"]), **change}
    with pytest.raises(CheckpointError, match=message):
        check_weights(STACKS["plain"], {name: tensor for name, tensor in weights.items() if tensor is not None})


@pytest.mark.parametrize(
    "options",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 20, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.9},
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
        {"rope_type": "proportional", "partial_rotary_factor": 0.6, "factor": 2.0},
    ],
)
def test_rope_equals_transformers(options: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 5e5, **options},
    )
    theirs, scale = ROPE_INIT_FUNCTIONS[options["rope_type"]](config, "cpu")
    mine = rope_config(config.to_dict(), 32)
    torch.testing.assert_close(torch.tensor(mine.inverse_frequencies).float(), theirs, rtol=2e-6, atol=0)
    assert mine.scale == pytest.approx(scale)
