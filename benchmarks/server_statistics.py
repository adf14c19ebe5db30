"""How soon the statistics of `outrider audit --url` find known biases: power and cost of each, on the packaged model.

    python benchmarks/server_statistics.py [--prompts 24] [--samples 40] [--trials 40] [--json FILE]

Each variant answers every prompt many times; audits are then made of random parts of these answers. The rate of false
alarms of all statistics is 1e-3, shared by five of them as in an audit with a baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from support import add_json, facts, say, table, write_json

from outrider import LLM, SamplingParams
from outrider.evaluation.recording import read_prompts
from outrider.evaluation.speedup import default_prompt_files
from outrider.proof.alternatives import Bets
from outrider.proof.evidence import Budget
from outrider.proof.reference_check import text_logits
from outrider.proof.two_sample import counts, first_token, mmd

VARIANTS: dict[str, dict[str, Any]] = {
    "fair": {},
    "top-p 0.95": {"top_p": 0.95},
    "temperature 1.05": {"temperature": 1.05},
    "every 50th token greedy": {},
    "top-p 0.7": {"top_p": 0.7},
    "temperature 1.5": {"temperature": 1.5},
    "4-bit copy": {},
}
BUDGET = Budget(5)
TOKENS, ANSWERS, TOP = 64, 10, 20
BORDERS, TIED = 12, 20


def sample(llm: LLM, prompts: Sequence[list[int]], samples: int, options: dict[str, Any], seed: int) -> list[list[int]]:
    """``samples`` answers to each prompt, prompt by prompt."""
    asked = [prompt for prompt in prompts for _ in range(samples)]
    params = [
        SamplingParams(**{"max_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True, "seed": seed + i, **options})
        for i in range(len(asked))
    ]
    return [output.token_ids for output in llm.generate(asked, params)]


def partly_greedy(llm: LLM, prompts: Sequence[list[int]], samples: int, seed: int) -> list[list[int]]:
    """The same with every 50th token greedy: here the 50th of 64."""
    first = sample(llm, prompts, samples, {"max_tokens": 49}, seed)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    texts = [[*prompt, *text] for prompt, text in zip(asked, first, strict=True)]
    likeliest = [o.token_ids for o in llm.generate(texts, SamplingParams(max_tokens=1, ignore_eos=True))]
    texts = [[*text, *one] for text, one in zip(texts, likeliest, strict=True)]
    rest = sample(llm, texts, 1, {"max_tokens": TOKENS - 50}, seed + 10**6)
    return [[*a, *b, *c] for a, b, c in zip(first, likeliest, rest, strict=True)]


def told(llm: LLM, prompt: list[int], output: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the server tells of an answer's tokens: probabilities of the likeliest and of the rest, and the columns."""
    log_p = text_logits(llm.target, prompt, output).log_softmax(-1)
    top = log_p.topk(TOP, -1).values.exp().numpy()
    mine = np.array([float(row[token].exp()) for row, token in zip(log_p, output, strict=True)])
    p = np.concatenate([top, np.clip(1 - top.sum(1, keepdims=True), 1e-9, 1)], 1)
    return p, (top > mine[:, None] * (1 + 1e-6)).sum(1)


def own_logprobs(
    answers: Sequence[tuple[np.ndarray, np.ndarray]], trials: int, generator: np.random.Generator
) -> tuple[float, int]:
    """(share of audits that find something, tokens that the middle one of them took; all where none finds anything)."""
    needed = []
    for _ in range(trials):
        bets = Bets()
        for i in generator.permutation(len(answers)):
            p, columns = answers[i]
            bets.add(p, True, columns, np.arange(len(columns)))
            if bets.log_value >= BUDGET.threshold:
                needed.append(bets.samples)
                break
    return len(needed) / trials, int(np.median(needed)) if needed else sum(len(columns) for _, columns in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=24)
    add_json(parser)
    args = parser.parse_args()
    llm = LLM(drafter="none", max_rows=16)
    models = {name: llm for name in VARIANTS} | {"4-bit copy": LLM(drafter="none", dtype="int4", max_rows=16)}
    sets = [read_prompts(path) for path in default_prompt_files(chat=False)]
    prompts = [llm.encode(str(one.prompt)) for group in zip(*sets, strict=False) for one in group][: args.prompts]
    generator = np.random.default_rng(0)
    allowed = BUDGET.alpha / BUDGET.tests

    greedy = [o.token_ids for o in llm.generate(prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True))]
    borders = []
    for prompt, output in zip(prompts, greedy, strict=True):
        best = text_logits(llm.target, prompt, output).log_softmax(-1).topk(2, -1).values
        tied = np.flatnonzero((best[:, 0] - best[:, 1]).numpy() < 0.3)
        borders += [[*prompt, *output[:at]] for at in tied.tolist()]
    borders = borders[:: max(1, len(borders) // BORDERS)][:BORDERS]

    texts: dict[str, list[list[str]]] = {}
    after: dict[str, list[list[str]]] = {}
    results: list[dict[str, Any]] = []
    for number, (name, options) in enumerate(VARIANTS.items()):
        began, model, seed = perf_counter(), models[name], 10**7 * number
        if name == "every 50th token greedy":
            answers = partly_greedy(model, prompts, args.samples, seed)
        else:
            answers = sample(model, prompts, args.samples, options, seed)
        asked = [prompt for prompt in prompts for _ in range(args.samples)]
        words = [model.tokenizer.decode(answer) for answer in answers]
        texts[name] = [words[i : i + args.samples] for i in range(0, len(words), args.samples)]
        short = sample(model, borders, 5 * TIED, {**options, "max_tokens": 2}, seed + 5 * 10**6)
        pairs = [" ".join(map(str, answer)) for answer in short]
        after[name] = [pairs[i : i + 5 * TIED] for i in range(0, len(pairs), 5 * TIED)]
        rate, tokens = own_logprobs(
            [told(model, prompt, answer) for prompt, answer in zip(asked, answers, strict=True)], args.trials, generator
        )
        results.append({"variant": name, "statistic": "own log-probabilities", "found": rate, "tokens": tokens})
        found = []
        for statistic, pool, size in (("mmd", texts, ANSWERS), ("near-tied prompts", after, TIED)):
            p_values = []
            for trial in range(min(args.trials, 20)):
                parts = []
                for owner in (name, "fair"):
                    order = np.random.default_rng([trial, owner == name]).permutation(len(pool[owner][0]))
                    half = order[:size] if owner == name else order[-size:]
                    parts.append([[group[i] for i in half] for group in pool[owner]])
                test = mmd if statistic == "mmd" else counts
                p_values.append(test(parts[0], parts[1], seed=trial)[1])
            found.append(float(np.mean(np.array(p_values) <= allowed)))
            cost = 2 * size * (args.prompts * TOKENS if statistic == "mmd" else 2 * len(borders))
            results.append({"variant": name, "statistic": statistic, "found": found[-1], "tokens": cost})
        logs = [
            [
                [float(text_logits(m.target, p, [g[0]]).log_softmax(-1)[0, g[0]])] * 4
                for p, g in zip(prompts, greedy, strict=True)
            ]
            for m in (model, llm)
        ]
        difference, p = first_token(np.array(logs[0]), np.array(logs[1]))
        results.append(
            {
                "variant": name,
                "statistic": "first token's log-probability",
                "found": float(difference > 0.02 and p <= allowed),
                "tokens": 8 * args.prompts,
                "difference": difference,
            }
        )
        say(f"{name}: {perf_counter() - began:.0f} s, {[(r['found'], r['tokens']) for r in results[-4:]]}")
    rows = [[r["variant"], r["statistic"], f"{r['found']:.0%}", f"{r['tokens']:,}"] for r in results]
    print(table(["variant", "statistic", "found", "tokens"], rows))
    write_json(args.json, {**facts(), "samples": args.samples, "trials": args.trials, "results": results})


if __name__ == "__main__":
    main()
