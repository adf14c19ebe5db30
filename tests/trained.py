"""Small trained drafters made on the spot: random weights in every format's shapes, and a random target for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu

from outrider.backends.layers import weight_shapes
from outrider.backends.reference import ReferenceBackend
from outrider.checkpoints import DraftCheckpoint, TargetFacts
from outrider.checkpoints.stack_format import decoder_stack, file_name
from outrider.config import SamplingParams
from outrider.drafters.dspark_design import BlockDesign
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.drafters.mtp_design import MTPDesign
from outrider.models.decoder import DecoderTarget, make_spec
from outrider.sampling.rng import RowRng
from outrider.types import Backend, Context, Drafter, Proposal, RaggedBatch, TargetModel

VOCABULARY, WIDTH, LAYERS = 64, 32, 5
DECODER: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "layer_types": ["full_attention", "full_attention"],
    "tie_word_embeddings": False,
}
GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "layer_types": ["full_attention", "full_attention"],
    "tie_word_embeddings": False,
}
SAMPLED = SamplingParams(temperature=0.8)
BLOCK = BlockDesign(5, 63, markov_rank=6, confidence=True, confidence_with_markov=True)
DESIGNS = {
    "vanilla": BLOCK,
    "gated": replace(BLOCK, markov_head="gated", confidence_with_markov=False),
    "rnn": replace(BLOCK, markov_head="rnn"),
    "dflash": BlockDesign(5, 63),
    "masks-only": BlockDesign(5, 63, sample_from_anchor=False),
    "eagle3": Eagle3Design(4),
    "eagle3-residual": Eagle3Design(4, norm_before_residual=True, norm_before_fc=True),
    "eagle3.1": Eagle3Design(4, norm_each_before_fc=True, norm_output=True),
    "mtp": MTPDesign(3),
}


def make_target(seed: int = 0, dtype: torch.dtype = torch.float32, backend: Backend | None = None) -> DecoderTarget:
    """A random Qwen3 of LAYERS layers."""
    config = decoder_stack({**DECODER, "num_hidden_layers": LAYERS, "layer_types": None}, vocab_size=VOCABULARY)
    weights = _random({name: s.sizes for name, s in weight_shapes(config).items() if s.required}, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    weights["embed.weight"] = torch.randn(VOCABULARY, WIDTH, generator=generator)
    weights["head.weight"] = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.5
    stack = (backend or ReferenceBackend()).load(config, weights, dtype)
    target = DecoderTarget(
        make_spec({"model_type": "qwen3"}, config, dtype, "tiny"), stack, backend or ReferenceBackend()
    )
    target.tensors = weights  # type: ignore[attr-defined]
    return target


def make_checkpoint(
    design: Any, *, seed: int = 1, drafted: int = VOCABULARY, decoder: dict[str, Any] = DECODER, target: Any = None
) -> DraftCheckpoint:
    """Random weights for a design; embedding and head are the target's, where one is given."""
    decoder = dict(decoder)
    if not isinstance(design, BlockDesign):
        decoder |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    checkpoint = DraftCheckpoint(
        design=design,
        decoder=decoder,
        target_layers=(3,) if isinstance(design, MTPDesign) else (0, 2, 3),
        target=TargetFacts(WIDTH, LAYERS, None, "Qwen3ForCausalLM"),
        draft_vocab_size=drafted,
        format="test",
    )
    own_head = {"head.weight"} if drafted < VOCABULARY else set()
    shapes = {name: s.sizes for name, s in checkpoint.shapes().items() if s.required or name in own_head}
    shapes.pop("d2t", None)
    tensors = _random(shapes, seed)
    if target is not None:
        tensors["embed.weight"] = target.tensors["embed.weight"].clone()
    if drafted < VOCABULARY:
        ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:drafted].sort().values
        tensors["d2t"] = ids - torch.arange(drafted)
        tensors["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
    elif target is not None:
        tensors["head.weight"] = target.tensors["head.weight"].clone()
    return replace(checkpoint, tensors=tensors)


def _random(shapes: dict[str, tuple[int | None, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, sizes in shapes.items():
        shape = [size or VOCABULARY for size in sizes]
        rng = torch.randn(shape, generator=generator)
        tensors[name] = rng * 0.1 + 1 if len(shape) == 1 and "bias" not in name else rng * shape[-1] ** -0.5
    return tensors


# ------------------------------------------------------------------------------------------------ driving a drafter


def context_of(histories: Sequence[Sequence[int]], params: SamplingParams | None = None) -> Context:
    return Context([params or SamplingParams()] * len(histories), [list(h) for h in histories], [1] * len(histories))


def rng_of(rows: int, *, round: int = 0, seed: int = 7) -> RowRng:
    return RowRng([seed + i for i in range(rows)], [round] * rows, ["rejection"] * rows)


def propose(
    drafter: Drafter,
    slots: Sequence[int],
    histories: Sequence[Sequence[int]],
    *,
    limit: Sequence[int] | None = None,
    params: SamplingParams | None = None,
    rng: RowRng | None = None,
) -> Proposal:
    return drafter.propose(
        slots,
        [h[-1] for h in histories],
        context_of(histories, params),
        limit if limit is not None else [drafter.block] * len(slots),
        rng or rng_of(len(slots)),
    )


class Session:
    """Rows of one target and one drafter, fed with given tokens as the engine would."""

    def __init__(self, target: TargetModel, drafter: Drafter, rows: int, capacity: int = 128) -> None:
        self.target, self.drafter, self.capacity = target, drafter, capacity
        self.cache = target.new_cache(rows, capacity)
        self.slots = [self.cache.open() for _ in range(rows)]
        for slot in self.slots:
            drafter.open(slot, capacity)

    def observe(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int] | None = None
    ) -> None:
        """Run tokens through the target, and show them to the drafter."""
        batch = RaggedBatch.pack(tokens, starts, self.slots if slots is None else slots)
        output = self.target.forward(batch, self.cache, self.drafter.aux_layers)
        self.drafter.observe(batch, output.features)


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def features_of(target: TargetModel, tokens: list[int], aux_layers: tuple[int, ...]) -> Tensor:
    cache = target.new_cache(1, len(tokens))
    output = target.forward(RaggedBatch.pack([tokens], [0], [cache.open()]), cache, aux_layers)
    assert output.features is not None
    return output.features


# ------------------------------------------------------------------------------------------------ direct computation


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain.to(x)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """[T, H, Dh]"""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None].to(x), angles.sin()[:, None].to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def dense_layer(w: dict[str, Tensor], wide: Tensor, residual: Tensor) -> Tensor:
    """One causal decoder layer on [T, in] -> [T, D], no cache."""
    heads, groups, width, count = 4, 2, 8, len(wide)
    positions = torch.arange(count)
    q = rotate(
        norm((wide @ w["layers.0.q.weight"].T).view(count, heads, width), w["layers.0.q_norm.weight"]), positions
    )
    k = rotate(
        norm((wide @ w["layers.0.k.weight"].T).view(count, groups, width), w["layers.0.k_norm.weight"]), positions
    )
    v = (wide @ w["layers.0.v.weight"].T).view(count, groups, width)
    k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * width**-0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
    seen = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(count, -1)
    x = residual + seen @ w["layers.0.o.weight"].T
    inner = norm(x, w["layers.0.mlp_norm.weight"])
    return (
        x
        + (silu(inner @ w["layers.0.gate.weight"].T) * (inner @ w["layers.0.up.weight"].T))
        @ w["layers.0.down.weight"].T
    )


def save_target(folder: Path, target: DecoderTarget) -> Path:
    """The target's weights as a Hugging Face directory without a tokenizer."""
    folder.mkdir(parents=True)
    config = {**DECODER, "num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLM"]}))
    names = {name: file_name(name, sandwich=False) for name in target.tensors}  # type: ignore[attr-defined]
    files = {n if n.startswith("lm_head") else f"model.{n}": target.tensors[name] for name, n in names.items()}
    save_file(files, folder / "model.safetensors")
    return folder
