"""Perplexity on held-out text by domain, in each dtype, compared with float32.

    python benchmarks/perplexity.py [--model embedded] [--text prose=book.txt ...] [--json FILE]

Without ``--text`` the packaged prompts are used: documents that the embedded models were not trained on. A text file is
split into windows of ``--window`` tokens; in JSON Lines every ``text`` or first turn is a document. All dtypes read the
same tokens, each predicted from those before it in its window; the intervals resample documents.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import add_json, facts, say, table, write_json

from outrider.errors import InvalidRequest
from outrider.evaluation.recording import read_prompts
from outrider.models.loading import load_target
from outrider.models.locations import EMBEDDED_PROMPTS, resolve_model
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import RaggedBatch, TargetModel

DTYPES = ["float32", "bfloat16", "int8", "int4"]
DRAWS = 2000  # resamples of an interval


def documents(path: Path, tokenizer: Tokenizer, window: int) -> list[list[int]]:
    """Token ids of each document of a file, in pieces of at most ``window``; pieces of one token are dropped."""
    if path.suffix == ".jsonl":
        prompts = [question.prompt for question in read_prompts(path)]
    else:
        try:
            prompts = [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"cannot read {path} as text: {error}") from error
    encoded = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    pieces = [ids[start : start + window] for ids in encoded for start in range(0, len(ids), window)]
    kept = [piece for piece in pieces if len(piece) > 1]
    if not kept:
        raise InvalidRequest(f"{path} holds no text of at least two tokens")
    return kept


@torch.inference_mode()
def surprise(target: TargetModel, pieces: Sequence[Sequence[int]]) -> np.ndarray:
    """-log p of each piece's tokens but the first, summed, in nats: float64 [pieces]."""
    cache = target.new_cache(1, max(map(len, pieces)))
    sums = []
    for piece in pieces:
        slot = cache.open()
        logits = target.forward(RaggedBatch.pack([piece[:-1]], [0], [slot]), cache).logits
        cache.release(slot)
        sums.append(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(piece[1:]), reduction="sum").item())
    return np.array(sums)


def compare(nats: dict[str, np.ndarray], counts: np.ndarray) -> list[dict[str, Any]]:
    """Perplexity of each dtype, and its ratio to the first one's with a 95 % interval over documents (pairs stay)."""
    picks = np.random.default_rng(0).integers(0, len(counts), (DRAWS, len(counts)))
    first = next(iter(nats.values()))
    rows = []
    for dtype, mine in nats.items():
        more = mine - first
        low, high = np.percentile(np.expm1(more[picks].sum(1) / counts[picks].sum(1)), [2.5, 97.5])
        rows.append(
            {
                "dtype": dtype,
                "perplexity": round(math.exp(mine.sum() / counts.sum()), 4),
                "bits_per_token": round(mine.sum() / counts.sum() / math.log(2), 4),
                "change": round(math.expm1(more.sum() / counts.sum()), 6),
                "change_ci95": [round(float(low), 6), round(float(high), 6)],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", action="append", help="may be repeated; the first is what others are compared with")
    parser.add_argument("--text", action="append", metavar="DOMAIN=FILE", help="a text or JSON Lines; may be repeated")
    parser.add_argument("--window", type=int, default=512, help="most tokens of a piece")
    parser.add_argument("--backend", default="auto")
    add_json(parser)
    options = parser.parse_args()
    if options.window < 2:
        raise SystemExit(f"--window must be at least 2, got {options.window}")
    files = {path.stem: path for path in sorted(EMBEDDED_PROMPTS.glob("*.jsonl"))}
    if options.text:
        if any("=" not in given for given in options.text):
            raise SystemExit(f"--text: expected DOMAIN=FILE, got {' '.join(options.text)}")
        files = {domain: Path(file) for domain, _, file in (given.partition("=") for given in options.text)}
    try:
        tokenizer = Tokenizer(resolve_model(options.model))
        texts = {domain: documents(path, tokenizer, options.window) for domain, path in files.items()}
        texts["all"] = list(chain.from_iterable(texts.values()))
        nats: dict[str, dict[str, np.ndarray]] = {}
        for dtype in options.dtype or DTYPES:
            say(f"{options.model}, {dtype}")
            target = load_target(options.model, dtype=dtype, backend=options.backend)
            nats[dtype] = {domain: surprise(target, pieces) for domain, pieces in texts.items()}
    except InvalidRequest as error:
        raise SystemExit(str(error)) from None
    rows = []
    for domain, pieces in texts.items():
        counts = np.array([len(piece) - 1 for piece in pieces])
        for row in compare({dtype: mine[domain] for dtype, mine in nats.items()}, counts):
            rows.append({"domain": domain, "documents": len(pieces), "tokens": int(counts.sum()), **row})
    if options.json != "-":
        header = ["domain", "tokens", "dtype", "perplexity", "bits a token", "change, %", "95 %"]
        shown = (
            [
                *(row[key] for key in ("domain", "tokens", "dtype")),
                f"{row['perplexity']:.2f}",
                f"{row['bits_per_token']:.4f}",
                f"{100 * row['change']:+.2f}",
                " to ".join(f"{100 * bound:+.2f}" for bound in row["change_ci95"]),
            ]
            for row in rows
        )
        print(table(header, shown))
    write_json(options.json, {**facts(), "model": options.model, "window": options.window, "rows": rows})


if __name__ == "__main__":
    main()
