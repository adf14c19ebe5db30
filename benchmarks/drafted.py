"""Drafters' speed over plain decoding on prompt sets, fixed draft lengths beside the product's default.

    python benchmarks/drafted.py --model smollm2 --drafter dspark dspark,suffix --prompts mt-bench.jsonl gsm8k.jsonl \\
        [--arms fixed:3 fixed:4 auto] [--temperature 0 1] [--limit 10] [--rule block] [--drafter-dtype int4] \\
        [--json FILE]

Each prompt is answered once by every arm, plain decoding among them, in a random order, with the same number of tokens
(the end-of-text token is ignored); at temperature 1 with the same seed. A set's ratio is that of the summed seconds,
the prompt included, with a 95 % interval from resampling prompts; `macro` is the mean of the sets' ratios.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from support import add_json, facts, interval_text, prompt_sets, say, seconds_of, settle, table, write_json

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.engine.loader import load_model
from outrider.evaluation.speedup import bootstrap_ratio

PLAIN = "none"


def engines(options: argparse.Namespace) -> dict[str, LLM]:
    """One engine an arm; all share the target's weights."""
    loaded = load_model(options.model)
    found = {PLAIN: LLM(loaded, "none", max_rows=1)}
    for drafter in options.drafter:
        names = drafter.split(",")
        for arm in options.arms:
            kind, _, drafts = arm.partition(":")
            more: dict[str, Any] = {"draft_tokens": int(drafts)} if drafts else {}
            if options.drafter_dtype:
                own = {"dtype": options.drafter_dtype}
                more["drafter_options"] = own if len(names) == 1 else {names[0]: own}
            found[f"{drafter} {arm}"] = LLM(
                loaded, names if len(names) > 1 else drafter, policy=kind, guard=not drafts, max_rows=1, **more
            )
    return found


def answer(llm: LLM, ids: list[int], params: SamplingParams) -> None:
    llm.forget()
    assert len(llm.generate([ids], params)[0].token_ids) == params.max_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--drafter", nargs="+", default=["dspark"], help="of several, separated by commas, each round has one"
    )
    parser.add_argument("--drafter-dtype", help="precision of a trained drafter: int8 (the default), int4, ...")
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSON Lines with `turns`; default: packaged prompts")
    parser.add_argument("--arms", nargs="+", default=["fixed:3", "fixed:4", "auto"], help="fixed:DRAFTS, or a policy")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rule", default="block", help="verification rule")
    parser.add_argument("--limit", type=int, default=10, help="prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=128)
    add_json(parser)
    options = parser.parse_args()
    found = engines(options)
    tokenizer = found[PLAIN].tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    sets = {
        name: [encode(text) for text in texts] for name, texts in prompt_sets(options.prompts, options.limit).items()
    }
    order, rng = list(found), random.Random(1)
    rows = []
    for temperature in options.temperature:
        params = SamplingParams(
            max_tokens=options.max_tokens, temperature=temperature, seed=1, rule=options.rule, ignore_eos=True
        )
        for llm in found.values():  # warm up
            answer(llm, next(iter(sets.values()))[0], params)
        times: dict[str, dict[str, list[float]]] = {arm: {name: [] for name in sets} for arm in found}
        for name, prompts in sets.items():
            for ids in prompts:
                rng.shuffle(order)
                for arm in order:
                    settle()
                    times[arm][name].append(seconds_of(partial(answer, found[arm], ids, params)))
            say(f"  temperature {temperature:g}, {name}: {len(prompts)} prompts")
        for arm in [name for name in found if name != PLAIN]:
            row: dict[str, Any] = {"arm": arm, "temperature": temperature, "sets": {}}
            for name in sets:
                ratio, interval = bootstrap_ratio(times[PLAIN][name], times[arm][name])
                row["sets"][name] = {
                    "over_plain": round(ratio, 3),
                    "ci95": interval,
                    "plain_tokens_per_second": round(options.max_tokens * len(sets[name]) / sum(times[PLAIN][name]), 1),
                }
            row["macro"] = round(mean(one["over_plain"] for one in row["sets"].values()), 3)
            rows.append(row)
    if options.json != "-":
        shown = [
            [
                row["temperature"],
                row["arm"],
                *(f"{one['over_plain']:.2f} ({interval_text(one['ci95'])})" for one in row["sets"].values()),
                row["macro"],
            ]
            for row in rows
        ]
        print(table(["temperature", "arm", *sets, "macro"], shown))
        first = rows[0]["sets"].values()
        print("\nplain:", ", ".join(f"{one['plain_tokens_per_second']:g}" for one in first), "tokens/s")
    write_json(options.json, {**facts(), "rows": rows})


if __name__ == "__main__":
    main()
