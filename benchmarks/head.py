"""Time of a block drafter with a sequential head, in one native call and step by step, with random weights.

    python benchmarks/head.py [--dtype bfloat16] [--rounds 20] [--json FILE]

A round is a draft (DSpark: 2 layers of the target's width, Markov rank 256, 7 drafts) and a pass of the target over
8 tokens. ``bias`` is the spread of the Markov bias; the base logits have spread 1. The bound that makes greedy drafts
cheap depends on it. "step by step": the layers in one call, then a full product and a draw a draft, in Python.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch
from support import add_json, facts, say, table, write_json
from torch import Tensor

from outrider.checkpoints import DraftCheckpoint, TargetFacts
from outrider.config import SamplingParams
from outrider.drafters.dspark import DSparkConfig, DSparkDrafter
from outrider.drafters.dspark_design import BlockDesign
from outrider.models.loading import load_backend
from outrider.models.random import SHAPES, random_target
from outrider.sampling.rng import RowRng
from outrider.types import Context, RaggedBatch, TargetModel

AUX_LAYERS = (2, 6, 10)
RANK, DRAFTS, LAYERS = 256, 7, 2


def checkpoint(shape: str, kind: str, bias: float) -> DraftCheckpoint:
    """Random weights, with base logits of spread 1 and a Markov bias of spread ``bias`` before the head's gates."""
    sizes = SHAPES[shape]
    decoder = {
        "model_type": "qwen3",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "layer_types": ["full_attention"] * LAYERS,
        "tie_word_embeddings": False,
    }
    design = BlockDesign(DRAFTS, 1, markov_rank=RANK, markov_head=kind, confidence=True)  # type: ignore[arg-type]
    facts_ = TargetFacts(sizes.hidden_size, sizes.num_layers, None, "LlamaForCausalLM")
    made = DraftCheckpoint(design, decoder, AUX_LAYERS, facts_, draft_vocab_size=sizes.vocab_size, format="random")
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, tensor in made.shapes().items():
        if not tensor.required or name == "d2t":
            continue
        sizes_ = [size or sizes.vocab_size for size in tensor.sizes]
        rng = torch.randn(sizes_, generator=generator)
        tensors[name] = torch.ones(sizes_) if len(sizes_) == 1 and "bias" not in name else rng * sizes_[-1] ** -0.5
    tensors["markov.w1.weight"] *= RANK**0.5
    tensors["markov.w2.weight"] *= bias
    return replace(made, tensors=tensors)


class Rounds:
    """Draft and verify repeatedly at the same position of one sequence."""

    def __init__(self, target: TargetModel, drafter: DSparkDrafter, context: int, temperature: float) -> None:
        self.target, self.drafter = target, drafter
        self.cache = target.new_cache(1, context + 64)
        self.slot = self.cache.open()
        drafter.open(0, context + 64)
        self.history = torch.randint(5, target.spec.vocab_size, (context + 1,)).tolist()
        batch = RaggedBatch.pack([self.history[:-1]], [0], [self.slot])
        drafter.observe(batch, target.forward(batch, self.cache, drafter.aux_layers).features)
        self.context, self.turn = context, 0
        self.params = SamplingParams(temperature=temperature, seed=1)

    def round(self) -> tuple[float, float]:
        """Seconds of a draft and of the target's pass."""
        self.turn += 1
        rng = RowRng([1], [self.turn], ["rejection"])
        context = Context([self.params], [self.history], [1])
        last = [5 + self.turn * 37 % 1000]  # another anchor each time
        began = perf_counter()
        proposal = self.drafter.propose([0], last, context, [DRAFTS], rng)
        drafted = perf_counter()
        batch = RaggedBatch.pack([[*last, *proposal.tokens[0].tolist()]], [self.context], [self.slot])
        self.target.forward(batch, self.cache, self.drafter.aux_layers)
        end = perf_counter()
        self.cache.rewind(batch.slots, torch.tensor([self.context]))
        return drafted - began, end - drafted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-110m", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--bias", type=float, nargs="+", default=[0.05, 0.2, 1.0])
    parser.add_argument("--rounds", type=int, default=20)
    add_json(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    backend = load_backend("native", options.dtype)
    target = random_target(options.shape, options.dtype, backend)
    rows = []
    for kind in ("vanilla", "gated", "rnn"):
        for bias in options.bias:
            made = checkpoint(options.shape, kind, bias)
            for way in ("one call", "step by step"):
                drafter = DSparkDrafter(made, target, backend, config=DSparkConfig(""), dtype=options.dtype, max_rows=2)
                if way == "step by step":
                    drafter.core = None
                for temperature in (0.0, 1.0):
                    rounds = Rounds(target, drafter, options.context, temperature)
                    drafter_times = [rounds.round() for _ in range(options.rounds + 2)][2:]
                    drafter.close(0)
                    drafts, passes = (list(column) for column in zip(*drafter_times, strict=True))
                    row = {
                        "head": kind,
                        "bias": bias,
                        "way": way,
                        "temperature": temperature,
                        "draft_ms": round(1e3 * median(drafts), 3),
                        "verify_ms": round(1e3 * median(passes), 3),
                        "share": round(median(d / (d + p) for d, p in drafter_times), 4),
                    }
                    say(str(row))
                    rows.append(row)
    if options.json != "-":
        keys = list(rows[0])
        print(f"{options.shape}, {options.dtype}, context {options.context}, {options.rounds} rounds\n")
        print(table([key.replace("_", " ") for key in keys], ([row[key] for key in keys] for row in rows)))
    result = {**facts(), "shape": options.shape, "dtype": options.dtype, "context": options.context, "rows": rows}
    write_json(options.json, result)


if __name__ == "__main__":
    main()
