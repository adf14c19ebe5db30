"""Perplexity of a GGUF file's own precision against llama.cpp's on the very same file.

    python benchmarks/perplexity_peers.py --text FILE [--model smollm2] [--tokens 20000] [--dtype file int8]

The text is cut into windows of ``--window`` tokens; the second half of each window is scored, in both engines alike.
The ratio's standard error is over windows. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from support import add_json, facts, say, table, write_json

from outrider import LLM
from outrider.models.locations import resolve_model
from outrider.types import RaggedBatch


def scored(logits: torch.Tensor, tokens: list[int]) -> float:
    """Mean negative log-likelihood of the second half of a window. logits [T, V] of its first T tokens."""
    half = len(tokens) // 2
    logits, following = logits[half - 1 : -1].float(), torch.tensor(tokens[half:])
    return float(torch.nn.functional.cross_entropy(logits, following))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True, help="a text file, plain or .xz")
    parser.add_argument("--tokens", type=int, default=20_000, help="scored tokens")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", nargs="+", default=["file"])
    add_json(parser)
    options = parser.parse_args()
    raw = options.text.read_bytes()
    text = (lzma.decompress(raw) if options.text.suffix == ".xz" else raw).decode("utf-8", "replace")
    windows_wanted = -(-options.tokens // (options.window // 2))
    stride = len(text) // windows_wanted  # windows from all over the text
    models = {dtype: LLM(options.model, "none", dtype=dtype) for dtype in options.dtype}
    tokenizer = next(iter(models.values())).tokenizer
    pieces = [text[i * stride : i * stride + 12 * options.window] for i in range(windows_wanted)]
    windows = [tokenizer.encode(piece, add_special_tokens=False)[: options.window] for piece in pieces]
    windows = [window for window in windows if len(window) == options.window]
    losses: dict[str, list[float]] = {}
    for dtype, llm in models.items():
        cache = llm.target.new_cache(1, options.window)
        slot = cache.open()
        losses[f"outrider {dtype}"] = []
        for window in windows:
            cache.rewind(torch.tensor([slot]), torch.tensor([0]))
            logits = llm.target.forward(RaggedBatch.pack([window], [0], [slot]), cache).logits
            losses[f"outrider {dtype}"].append(scored(logits, window))
        say(f"outrider {dtype}: done")
    from llama_cpp import Llama

    path = str(resolve_model(options.model))
    peer = Llama(path, n_ctx=options.window, n_batch=options.window, n_threads=2, logits_all=True, verbose=False)
    losses["llama.cpp"] = []
    for window in windows:
        peer.reset()
        peer.eval(window)
        losses["llama.cpp"].append(scored(torch.from_numpy(np.array(peer.scores[: len(window)])), window))
    rows = []
    for name, values in losses.items():
        differences = [a - b for a, b in zip(values, losses["llama.cpp"], strict=True)]
        rows.append(
            {
                "engine": name,
                "perplexity": round(float(np.exp(mean(values))), 3),
                "against_llama_cpp": round(float(np.expm1(mean(differences))), 5),
                "standard_error": round(stdev(differences) / len(differences) ** 0.5, 5),
            }
        )
    scored_tokens = len(windows) * (options.window - options.window // 2)
    print(table(list(rows[0]), (list(row.values()) for row in rows)))
    write_json(options.json, {**facts(), "model": options.model, "scored_tokens": scored_tokens, "rows": rows})


if __name__ == "__main__":
    main()
