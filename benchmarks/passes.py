"""One forward pass over M new tokens: Outrider's backends, transformers eager, and llama.cpp, in turns in one process.

    python benchmarks/passes.py --dtype float32 [--shape llama-110m] [--context 256] [--json FILE]

Weights are random and of one shape; every engine runs M tokens after ``--context`` cached ones, computes all M rows
of logits, and removes the tokens from its cache. The ratio to one token is the median of ratios within a round.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from support import add_json, facts, interleaved, ratio_of_pairs, say, table, write_json

from outrider.evaluation.pass_times import Cell, cache_bytes, read_probe, weight_bytes
from outrider.models.loading import load_backend
from outrider.models.random import SHAPES, random_target
from outrider.types import RaggedBatch

Pass = Callable[[], Any]
Contender = tuple[str, Callable[[int], Pass]]  # name, and a function that makes a pass of M tokens


def outrider(shape: str, dtype: str, context: int, backend: str) -> Iterator[Contender]:
    target = random_target(shape, dtype, load_backend(backend, dtype))
    cache = target.new_cache(1, context + 64)
    slot = cache.open()
    for start in range(0, context, 512):
        chunk = [0] * min(512, context - start)
        hidden = torch.randn(len(chunk), target.spec.hidden_size)
        target.stack.project(hidden, RaggedBatch.pack([chunk], [start], [slot]), cache)
    held = torch.tensor([context])

    def of(tokens: int) -> Pass:
        batch = RaggedBatch.pack([list(range(1, tokens + 1))], [context], [slot])

        def run() -> None:
            target.forward(batch, cache)
            cache.rewind(batch.slots, held)

        return run

    yield f"outrider {backend}", of


def transformers(shape: str, dtype: str, context: int) -> Iterator[Contender]:
    if dtype not in ("float32", "bfloat16"):
        return say(f"transformers: no {dtype} here")
    model = hugging_face(shape, dtype)
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        for start in range(0, context, 512):
            ids = torch.arange(1, min(512, context - start) + 1)[None]
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def of(tokens: int) -> Pass:
        ids = torch.arange(1, tokens + 1)[None]

        @torch.inference_mode()
        def run() -> None:
            model(ids, past_key_values=cache, use_cache=True)
            cache.crop(-tokens)

        return run

    yield "transformers eager", of


def hugging_face(shape: str, dtype: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=sizes.tied,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def llama_cpp(shape: str, dtype: str, context: int) -> Iterator[Contender]:
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        return say("llama-cpp-python or gguf is not installed: left out")
    from gguf_file import write_random_gguf
    from llama_cpp import GGML_TYPE_F32, Llama

    threads = facts()["machine"]["threads"]
    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32} if dtype == "float32" else {}
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_gguf(SHAPES[shape], Path(folder) / "random.gguf", dtype)
        model = Llama(str(path), n_ctx=context + 64, n_threads=threads, n_threads_batch=threads, verbose=False, **cache)
    model.eval([1 + i % 100 for i in range(context)])

    def of(tokens: int) -> Pass:
        ids = list(range(1, tokens + 1))

        def run() -> None:
            model._ctx.kv_cache_seq_rm(-1, context, -1)
            model._batch.set_batch(batch=ids, n_past=context, logits_all=True)
            model._ctx.decode(model._batch)

        return run

    yield "llama.cpp", of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-110m", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=20)
    add_json(parser)
    options = parser.parse_args()
    shape, dtype, context = options.shape, options.dtype, options.context
    counts = sorted({1, *options.new_tokens})
    makers = [
        outrider(shape, dtype, context, "native"),
        transformers(shape, dtype, context),
        llama_cpp(shape, dtype, context),
    ]
    if dtype in ("float32", "bfloat16"):
        makers.insert(1, outrider(shape, dtype, context, "reference"))
    contenders = [contender for maker in makers for contender in maker]
    works = {f"{name}|{tokens}": of(tokens) for name, of in contenders for tokens in counts}
    probe = read_probe("native")
    probes: list[float] = []
    times = interleaved({"probe": lambda: probes.append(probe()), **works}, options.rounds)
    bandwidths = probes[-2 * options.rounds :: 2]
    config = SHAPES[shape].stack_config()
    size = weight_bytes(config, dtype) + cache_bytes(config, dtype, Cell(1, 1, context))
    own = "outrider native"
    rows = []
    for name, _ in contenders:
        for tokens in counts:
            mine = times[f"{name}|{tokens}"]
            rows.append(
                {
                    "contender": name,
                    "new_tokens": tokens,
                    "milliseconds": round(1e3 * median(mine), 3),
                    "ratio_to_one": round(ratio_of_pairs(mine, times[f"{name}|1"]), 3),
                    "bandwidth_share": round(median(size / s / b for s, b in zip(mine, bandwidths, strict=True)), 3),
                    "outrider_is_faster_by": round(ratio_of_pairs(mine, times[f"{own}|{tokens}"]), 2),
                }
            )
    gb_s = round(median(bandwidths) / 1e9, 1)
    result = {**facts(), "shape": shape, "dtype": dtype, "context": context, "bandwidth_gb_s": gb_s, "rows": rows}
    if options.json != "-":
        keys = list(rows[0])
        print(f"{shape}, {dtype}, context {context}, read bandwidth {gb_s} GB/s, {options.rounds} rounds\n")
        print(table([key.replace("_", " ") for key in keys], ([row[key] for key in keys] for row in rows)))
    write_json(options.json, result)


if __name__ == "__main__":
    main()
