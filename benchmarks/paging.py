"""Blocks of keys and values: what a shared prefix saves, what waiting requests cost, and what 8 bits change.

    python benchmarks/paging.py prefix|queue|precision [--model smollm2] [--tokens 1024] [--json FILE]

``prefix``: time to the first token of a prompt, computed and taken over, in turns. ``queue``: time of a step with 5 and
with 5,000 waiting requests. ``precision``: perplexity of the packaged prompts' text, joined and cut into windows, with
keys and values in 16 and in 8 bits, of the same weights and tokens.
"""

from __future__ import annotations

import argparse
import math
from statistics import median
from time import perf_counter
from typing import Any

import torch
from support import add_json, facts, table, write_json

from outrider import LLM, SamplingParams
from outrider.evaluation.recording import read_prompts
from outrider.models.locations import EMBEDDED_PROMPTS, resolve_model
from outrider.types import PagedTarget, RaggedBatch

WINDOW = 1024


def text_of(llm: LLM, count: int) -> list[int]:
    """Tokens of the packaged prompts, one text after the other."""
    tokens: list[int] = []
    for path in sorted(resolve_model(EMBEDDED_PROMPTS).glob("*.jsonl")):
        for prompt in read_prompts(path):
            if len(tokens) >= count:
                return tokens[:count]
            tokens += llm.encode(prompt.prompt)
    return tokens


def prefix(llm: LLM, count: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds to the first token."""
    tokens, params = text_of(llm, count), SamplingParams(max_tokens=1)
    llm.generate([[1, 2, 3]], params)
    seconds: dict[str, list[float]] = {"computed": [], "taken over": []}
    cached = 0
    for _ in range(rounds):
        llm.forget()
        for way in seconds:
            began = perf_counter()
            output = llm.generate([tokens], params)[0]
            seconds[way].append(perf_counter() - began)
        cached = output.stats.cached_tokens
    return [
        {"prompt": way, "tokens": len(tokens), "cached": cached * (way != "computed"), "ms": round(1e3 * median(s), 2)}
        for way, s in seconds.items()
    ]


def queue(llm: LLM, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a step outside the target's pass."""
    rows = []
    for waiting in (5, 5000):
        engine = llm.with_drafter("none").engine
        engine.admission.max_rows = 1
        long = engine.submit([1], SamplingParams(max_tokens=10 * rounds, ignore_eos=True), 0)
        requests = [engine.submit([1, 2], SamplingParams(max_tokens=1), 0) for _ in range(waiting)]
        engine.step()
        seconds = []
        for _ in range(8 * rounds):
            began = perf_counter()
            engine.step()
            seconds.append(perf_counter() - began)
        began = perf_counter()
        for request in requests:
            engine.cancel(request)
        cancels = (perf_counter() - began) / waiting
        engine.cancel(long)
        row = {"waiting": waiting, "step_us": round(1e6 * median(seconds), 1), "cancel_us": round(1e6 * cancels, 1)}
        rows.append(row)
    return rows


@torch.inference_mode()
def precision(llm: LLM, count: int) -> list[dict[str, Any]]:
    """Perplexity of the text by what keys and values are kept as."""
    assert isinstance(llm.target, PagedTarget)
    tokens = text_of(llm, count)
    pieces = [tokens[at : at + WINDOW] for at in range(0, len(tokens) - 1, WINDOW)]
    rows: list[dict[str, Any]] = []
    for kv_dtype in ("auto", "int8"):
        cache = llm.target.paged_cache(1, WINDOW, kv_dtype=kv_dtype)
        nats = 0.0
        for piece in pieces:
            slot = cache.open()
            logits = llm.target.forward(RaggedBatch.pack([piece[:-1]], [0], [slot]), cache).logits  # type: ignore[arg-type]
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
            cache.release(slot)
        predicted = sum(len(piece) - 1 for piece in pieces)
        perplexity = math.exp(nats / predicted)
        change = 100 * (perplexity / rows[0]["perplexity"] - 1) if rows else 0.0
        token = cache.block_bytes / cache.block_tokens / 1024
        rows.append(
            {
                "keys and values": kv_dtype,
                "tokens": predicted,
                "perplexity": round(perplexity, 4),
                "change, %": round(change, 3),
                "KiB a token": round(token, 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prefix", "queue", "precision"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt, or of the text")
    parser.add_argument("--rounds", type=int, default=5)
    add_json(parser)
    options = parser.parse_args()
    llm = LLM(options.model, "none", policy="fixed", guard=False)
    if options.what == "prefix":
        rows = prefix(llm, options.tokens, options.rounds)
    elif options.what == "queue":
        rows = queue(llm, options.rounds)
    else:
        rows = precision(llm, options.tokens)
    if options.json != "-":
        print(table(list(rows[0]), (list(row.values()) for row in rows)))
    write_json(options.json, {**facts(), "what": options.what, "model": options.model, "rows": rows})


if __name__ == "__main__":
    main()
