"""Compare the tokens of speculative and plain decoding over many prompts, and count the differences.

    python benchmarks/lossless.py --prompts prompts/*.jsonl --limit 200 --dtype float32 --dtype int8 [--json FILE]

Every prompt is answered by plain decoding, one at a time, and with every drafter, ``--rows`` prompts in a batch:
greedily, and at temperature 1 under the ``coupled`` rule with a seed per prompt. Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

from support import add_json, facts, prompt_sets, say, table, write_json

from outrider import LLM, SamplingParams


def choose(llm: LLM, sets: dict[str, list[str]], limit: int, max_tokens: int) -> list[tuple[str, list[int]]]:
    """(set, prompt), alternating between sets, of prompts that fit the model's context; ``limit`` in all."""
    named = ([(name, text) for text in texts] for name, texts in sets.items())
    in_turns = [one for one in chain.from_iterable(zip_longest(*named)) if one is not None]
    encoded = [(name, llm.encode(text)) for name, text in in_turns]
    room = llm.target.spec.max_positions - max_tokens
    return [(name, ids) for name, ids in encoded if 0 < len(ids) <= room][:limit]


def answers(llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams], name: str) -> list[list[int]]:
    """Token ids of every answer. Prints progress."""
    given: list[list[int]] = []
    group, began, printed = 8 * llm.max_rows, perf_counter(), perf_counter()
    for start in range(0, len(prompts), group):
        outputs = llm.generate(prompts[start : start + group], params[start : start + group])
        given += [output.token_ids for output in outputs]
        if perf_counter() - printed > 10 or len(given) == len(prompts):
            rate = sum(map(len, given)) / (perf_counter() - began)
            say(f"  {name}: {len(given)}/{len(prompts)} prompts, {rate:.0f} tokens/s")
            printed = perf_counter()
    return given


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first difference of two answers; None if they are equal."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--drafter", action="append", help="may be repeated; default: ngram, suffix, draft_model")
    parser.add_argument("--dtype", action="append", help="may be repeated; default: float32, bfloat16, int8")
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSON Lines with `turns`; default: packaged prompts")
    parser.add_argument("--limit", type=int, default=1000, help="prompts in all, taken from the files in turns")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="prompts answered together when speculating")
    parser.add_argument("--backend", default="auto")
    add_json(parser)
    options = parser.parse_args()
    sets = prompt_sets(options.prompts, options.limit)
    found: list[dict[str, Any]] = []
    for dtype in options.dtype or ["float32", "bfloat16", "int8"]:
        plain = LLM(options.model, "none", dtype=dtype, backend=options.backend, max_rows=1)
        together = LLM(options.model, "none", dtype=dtype, backend=options.backend, max_rows=options.rows)
        chosen = choose(plain, sets, options.limit, options.max_tokens)
        ids = [prompt for _, prompt in chosen]
        drafters = {name: together.with_drafter(name) for name in options.drafter or ["ngram", "suffix", "draft_model"]}
        for temperature in (0.0, 1.0):
            params = [
                SamplingParams(max_tokens=options.max_tokens, temperature=temperature, seed=seed, ignore_eos=True)
                for seed in range(len(ids))
            ]
            say(f"{dtype}, temperature {temperature:g}, {len(ids)} prompts")
            expected = answers(plain, ids, params, "plain")
            for name, llm in {"none": together, **drafters}.items():
                before = llm.stats()
                got = answers(llm, ids, params, name)
                places = [first_difference(a, b) for a, b in zip(expected, got, strict=True)]
                after = llm.stats()
                rounds = after["rounds"] - before["rounds"]
                found.append(
                    {
                        "dtype": dtype,
                        "temperature": temperature,
                        "drafter": name,
                        "prompts": len(ids),
                        "tokens": sum(map(len, got)),
                        "different": sum(place is not None for place in places),
                        "first_differences": [
                            {"prompt": i, "set": chosen[i][0], "token": place}
                            for i, place in enumerate(places)
                            if place is not None
                        ],
                        "acceptance_length": round(1 + (after["accepted"] - before["accepted"]) / max(1, rounds), 3),
                    }
                )
                write_json(options.json if options.json != "-" else None, {**facts(), "rows": found})
    header = ["dtype", "temperature", "drafter", "prompts", "tokens", "different answers", "acceptance length"]
    keys = ["dtype", "temperature", "drafter", "prompts", "tokens", "different", "acceptance_length"]
    if options.json == "-":
        write_json("-", {**facts(), "rows": found})
    else:
        print(table(header, ([one[key] for key in keys] for one in found)))
    sys.exit(any(one["different"] for one in found))


if __name__ == "__main__":
    main()
