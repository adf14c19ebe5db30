"""The native core's kernels against PyTorch's, in turns: F.linear, and oneDNN with weights packed beforehand.

    python benchmarks/kernels.py [--rounds 20] [--json FILE]

``linear``   one matrix [outputs, inner] for M rows (the head of a stack without layers)
``layer``    one decoder layer for M new tokens with an empty cache, attention included
``attention``  the time that a context adds to a pass of one layer: that pass minus the same with an empty cache

Bandwidth is the bytes of the weights / the time: a pass over few rows must read the weights once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from support import add_json, facts, interleaved, ratio_of_pairs, say, table, write_json
from torch import Tensor

from outrider.backends.layers import rope_config
from outrider.config import LayerConfig, StackConfig
from outrider.evaluation.pass_times import weight_bytes
from outrider.models.random import RandomWeights
from outrider.registry import find
from outrider.types import RaggedBatch, Stack

LINEARS = {"head": (32_000, 2048), "down": (4096, 14_336)}
"""Outputs and inner width; larger than the caches in every dtype, as a model's weights are."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROPE = rope_config({}, 64)
LAYER = LayerConfig(num_heads=32, num_kv_heads=8, head_dim=64, intermediate_size=8192, rope=ROPE)


class PackedLinear:
    """oneDNN's linear with weights reordered for it beforehand."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class QuantisedLinear:
    """PyTorch's dynamic int8: a scale per output, activations quantised per call (oneDNN or FBGEMM)."""

    def __init__(self, weight: Tensor) -> None:
        scales = weight.abs().amax(1).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantised, None)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, False)


def load(config: StackConfig, dtype: str, backend: str) -> Stack:
    return find("backend", backend)().load(config, RandomWeights(config, tied=False), dtype)


def new_pass(stack: Stack, tokens: int, context: int, width: int) -> Callable[[], None]:
    """A pass over ``tokens`` new tokens after ``context`` cached ones, without logits; the cache is rewound."""
    cache = stack.new_cache(1, context + tokens)
    slot = cache.open()
    for start in range(0, context, 512):
        chunk = [0] * min(512, context - start)
        stack.project(torch.randn(len(chunk), width), RaggedBatch.pack([chunk], [start], [slot]), cache)
    batch = RaggedBatch.pack([[0] * tokens], [context], [slot])
    held, none = torch.tensor([context]), batch.slots[:0]
    hidden = torch.randn(tokens, width)

    def run() -> None:
        stack.forward(batch, cache, hidden=hidden, logits_at=none)
        cache.rewind(batch.slots, held)

    return run


def linears(counts: list[int], rounds: int, dtypes: list[str]) -> Iterator[dict[str, Any]]:
    for shape, (outputs, inner) in LINEARS.items():
        config = StackConfig(outputs, inner, ())
        for dtype in dtypes:
            if dtype == "int4":
                continue  # a head stays int8: int4 is measured by the layer
            native = load(config, dtype, "native")
            weight = torch.randn(outputs, inner)
            for rows in counts:
                x = torch.randn(rows, inner)
                works: dict[str, Callable[[], Any]] = {"native": lambda native=native, x=x: native.unembed(x)}
                if dtype in DTYPES:
                    w, xs = weight.to(DTYPES[dtype]), x.to(DTYPES[dtype])
                    packed = PackedLinear(w, rows)
                    works["F.linear"] = lambda w=w, xs=xs: F.linear(xs, w)
                    works["oneDNN packed"] = lambda packed=packed, xs=xs: packed(xs)
                else:
                    dynamic = QuantisedLinear(weight)
                    works["dynamic int8"] = lambda dynamic=dynamic, x=x: dynamic(x)
                yield figures(f"linear {shape} [{outputs}, {inner}]", dtype, rows, works, rounds, config)


def layers(counts: list[int], rounds: int, dtypes: list[str]) -> Iterator[dict[str, Any]]:
    config = StackConfig(0, 2048, (LAYER,))
    for dtype in dtypes:
        stacks = {"native": load(config, dtype, "native")}
        if dtype in DTYPES:
            stacks["PyTorch (reference)"] = load(config, dtype, "reference")
        for rows in counts:
            works = {name: new_pass(stack, rows, 0, 2048) for name, stack in stacks.items()}
            yield figures("layer of a 1B Llama", dtype, rows, works, rounds, config)


def attentions(counts: list[int], rounds: int, dtypes: list[str], context: int) -> Iterator[dict[str, Any]]:
    """A layer whose matrices are small compared with its cache."""
    config = StackConfig(0, 64, (LayerConfig(32, 8, 64, 64, ROPE),))
    for dtype in dtypes:
        if dtype not in DTYPES:
            continue  # quantised stacks keep their cache in bfloat16
        native, torch_stack = load(config, dtype, "native"), load(config, dtype, "reference")
        for rows in counts:
            works = {
                "native": new_pass(native, rows, context, 64),
                "native, empty": new_pass(native, rows, 0, 64),
                "SDPA": new_pass(torch_stack, rows, context, 64),
                "SDPA, empty": new_pass(torch_stack, rows, 0, 64),
            }
            times = interleaved(works, rounds)
            added = {
                name: [full - empty for full, empty in zip(times[name], times[f"{name}, empty"], strict=True)]
                for name in ("native", "SDPA")
            }
            size = context * 2 * 8 * 64 * (4 if dtype == "float32" else 2)
            yield row(f"attention, context {context}", dtype, rows, added, size)


def figures(
    kernel: str, dtype: str, rows: int, works: dict[str, Callable[[], Any]], rounds: int, config: StackConfig
) -> dict[str, Any]:
    return row(kernel, dtype, rows, interleaved(works, rounds), weight_bytes(config, dtype))


def row(kernel: str, dtype: str, rows: int, times: dict[str, list[float]], size: int) -> dict[str, Any]:
    best = [min(peers) for peers in zip(*(times[name] for name in times if name != "native"), strict=True)]
    return {
        "kernel": kernel,
        "dtype": dtype,
        "rows": rows,
        "microseconds": {name: round(1e6 * median(values), 1) for name, values in times.items()},
        "gb_s": round(size / median(times["native"]) / 1e9, 1),
        "speedup_over_best_peer": round(ratio_of_pairs(best, times["native"]), 3) if best else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--context", type=int, default=4096, help="of the attention kernel")
    add_json(parser)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for measured in (
        linears(options.rows, options.rounds, options.dtype),
        layers(options.rows, options.rounds, options.dtype),
        attentions(options.rows, options.rounds, options.dtype, options.context),
    ):
        for one in measured:
            say(f"{one['kernel']}, {one['dtype']}, {one['rows']} rows: {one['microseconds']}")
            found.append(one)
    header = ["kernel", "dtype", "M", "native us", "GB/s", "peers us", "speed-up over the best"]
    lines = []
    for one in found:
        native = one["microseconds"]["native"]
        peers = ", ".join(f"{name} {value:.0f}" for name, value in one["microseconds"].items() if name != "native")
        lines.append(
            [one["kernel"], one["dtype"], one["rows"], native, one["gb_s"], peers, one["speedup_over_best_peer"]]
        )
    if options.json != "-":
        print(table(header, lines))
    write_json(options.json, {**facts(), "rows": found})


if __name__ == "__main__":
    main()
