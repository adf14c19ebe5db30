"""Predicted against measured speed-ups: ``outrider plan`` over targets, drafters, dtypes, concurrency and domains.

    python benchmarks/plan_grid.py --out grid.json                    the whole grid, about half an hour
    python benchmarks/plan_grid.py --targets embedded --limit 2       a few cells

Prediction and measurement share no run: costs and acceptance are measured first, then the paired benchmark runs with
the number of drafts that was predicted for. With --held-out it runs on other prompts, whose texts may be easier or
harder to draft: the error is then also that of a small sample. A machine that does other work at the same time gives
errors that say nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from outrider import LLM, SamplingParams
from outrider.cli.common import is_chat_model
from outrider.engine.cost_tables import machine
from outrider.evaluation.recording import read_prompts, runnable
from outrider.evaluation.speedup import default_prompt_files, run_bench
from outrider.planning.advice import make_plan
from outrider.planning.forecast import Workload
from outrider.planning.measuring import measure_drafter, measure_plain

DRAFTERS = {"embedded": ("ngram", "suffix", "dspark", "draft_model"), "smollm2": ("ngram", "suffix", "dspark")}
DTYPES = {"embedded": ("float32", "int8"), "smollm2": ("file", "int8")}
TOKENS = 64


@dataclass(frozen=True)
class Cell:
    target: str
    dtype: str
    drafter: str
    domain: str
    concurrency: int
    drafts: int
    predicted: float
    low: float
    high: float
    measured: float
    measured_low: float
    measured_high: float
    predicted_length: float
    measured_length: float
    advised: bool
    """Whether it was advised over plain decoding."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def error_of_costs(self) -> float:
        """The same where acceptance had been known."""
        return self.predicted * self.measured_length / self.predicted_length / self.measured - 1


def cells_of(target: str, dtype: str, concurrency: int, limit: int, repeats: int, held_out: bool) -> list[Cell]:
    plain = LLM(target, drafter="none", dtype=dtype, max_rows=concurrency)
    chat = is_chat_model(target, plain.tokenizer)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=not chat)
    found = []
    for path in default_prompt_files(chat):
        good, _ = runnable(plain, read_prompts(path)[: 2 * limit], params, chat=chat)
        prompts = [prompt.prompt for prompt in good]
        half = len(prompts) // 2
        count = max(half, concurrency) // concurrency * concurrency
        seen, asked = ([part[i % half] for i in range(count)] for part in (prompts, prompts[half * held_out :]))
        lengths = [len(plain.encode(prompt)) for prompt in asked]
        work = Workload(max(1, sum(lengths) // len(lengths)), TOKENS, concurrency)
        loaded = {name: plain.with_drafter(name) for name in DRAFTERS[target]}
        costs = measure_plain(plain, seen, params, work, max(llm.drafter.block for llm in loaded.values()))
        for name, llm in loaded.items():

            def make(drafts: int | None, name: str = name, llm: LLM = llm) -> LLM:
                return llm if drafts is None else plain.with_drafter(name, draft_tokens=drafts)

            plan = make_plan([measure_drafter(make, name, costs, seen, params, work)], costs, work)
            best = plan.forecasts[0]
            row = run_bench(
                target,
                {name: plain.with_drafter(name, draft_tokens=best.drafts)},
                plain,
                {path.stem: asked},
                temperatures=(0.0,),
                concurrency=concurrency,
                max_tokens=TOKENS,
                repeats=repeats,
                ignore_eos=not chat,
            )["rows"][0]
            measured = row["speedup"], *row["speedup_ci95"]
            figures = (
                best.drafts,
                best.speedup,
                best.low,
                best.high,
                *measured,
                best.acceptance_length,
                row["acceptance_length"],
            )
            found.append(Cell(target, dtype, name, path.stem, concurrency, *figures, plan.pays))
            one = found[-1]
            print(
                f"{target} {dtype} {name} {path.stem} {concurrency}: k {one.drafts}, {one.predicted:.2f} predicted, "
                f"{one.measured:.2f} measured: {one.error:+.1%}, of costs {one.error_of_costs:+.1%}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(DRAFTERS), choices=DRAFTERS)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--limit", type=int, default=6, help="prompts of each half")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--held-out", action="store_true", help="measure on other prompts than those planned with")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cells = [
        cell
        for target in options.targets
        for dtype in DTYPES[target]
        for rows in options.concurrency
        for cell in cells_of(target, dtype, rows, options.limit, options.repeats, options.held_out)
    ]
    near = sum(abs(cell.error) <= 0.1 for cell in cells)
    slower = [cell for cell in cells if cell.advised and cell.measured_high < 1]
    costs = sum(abs(cell.error_of_costs) <= 0.1 for cell in cells)
    print(
        f"{near} of {len(cells)} cells within 10 %, {costs} had acceptance been known; "
        f"advised and certainly slower: {len(slower)}"
    )
    if options.out:
        rows = [asdict(cell) | {"error": cell.error, "error_of_costs": cell.error_of_costs} for cell in cells]
        options.out.write_text(json.dumps({"machine": machine(), "cells": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
