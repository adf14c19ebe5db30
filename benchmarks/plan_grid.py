"""Predicted against measured speed-ups: ``outrider plan`` over targets, drafters, dtypes, concurrency and domains.

    python benchmarks/plan_grid.py --out grid.json                    the whole grid, about half an hour
    python benchmarks/plan_grid.py --targets embedded --limit 2       a few cells

Prediction and measurement share no run: costs and acceptance are measured first, then plain decoding and the drafter
answer all prompts in turns, with the number of drafts that was predicted for. With --held-out they answer other
prompts, whose texts may be easier or harder to draft: the error is then also that of a small sample. A machine that
does other work at the same time gives errors that say nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

from support import table

from outrider import LLM, SamplingParams
from outrider.cli.common import is_chat_model
from outrider.engine.cost_tables import machine
from outrider.evaluation.recording import read_prompts, runnable
from outrider.evaluation.speedup import default_prompt_files
from outrider.planning.advice import make_plan
from outrider.planning.forecast import Workload
from outrider.planning.measuring import measure_drafter, measure_plain

DRAFTERS = {"embedded": ("ngram", "suffix", "dspark", "draft_model"), "smollm2": ("ngram", "suffix", "dspark")}
DTYPES = {"embedded": ("float32", "int8"), "smollm2": ("file", "int8")}
TOKENS = 64
Prompt = str | list[int]


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


@dataclass(frozen=True)
class Timed:
    """Plain decoding and a drafter answered the same prompts in turns."""

    speedup: float
    low: float
    high: float
    acceptance_length: float


def in_turns(plain: LLM, fast: LLM, prompts: Sequence[Prompt], params: SamplingParams, repeats: int) -> Timed:
    """All prompts are handed over at once, so that a row that ends is followed by the next prompt.

    The speed-up is the median over repeats of the ratio of seconds a token, its interval their range.
    """
    ratios: list[float] = []
    stats = []
    for one in (plain, fast):
        one.generate(list(prompts[: one.max_rows]), params)  # warm up
    for _ in range(repeats):
        each = []
        for one in (plain, fast):
            one.forget()  # a repeated prompt would be too easy, and need not be read again
            began = perf_counter()
            done = one.generate(list(prompts), params)
            each.append((perf_counter() - began) / sum(len(output.token_ids) for output in done))
        ratios.append(each[0] / each[1])
        stats = [output.stats for output in done]
    rounds = sum(s.rounds for s in stats)
    return Timed(median(ratios), min(ratios), max(ratios), 1 + sum(s.accepted for s in stats) / max(1, rounds))


def cells_of(
    target: str,
    dtype: str,
    concurrency: int,
    limit: int,
    repeats: int,
    held_out: bool,
    names: Sequence[str],
    domains: Sequence[str],
) -> Iterator[Cell]:
    plain = LLM(target, drafter="none", dtype=dtype, max_rows=concurrency)
    chat = is_chat_model(target, plain.tokenizer)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=not chat)
    loaded = {name: plain.with_drafter(name) for name in names}
    most = max(llm.drafter.block for llm in loaded.values())
    for path in default_prompt_files(chat):
        if domains and path.stem not in domains:
            continue
        good, _ = runnable(plain, read_prompts(path)[: 2 * limit], params, chat=chat)
        prompts = [prompt.prompt for prompt in good]
        half = len(prompts) // 2
        count = max(half, concurrency) // concurrency * concurrency
        seen, asked = ([part[i % half] for i in range(count)] for part in (prompts, prompts[half * held_out :]))
        outputs = plain.generate(asked, params)
        read = fmean(len(plain.encode(prompt)) for prompt in asked)
        written = fmean(len(output.token_ids) for output in outputs)
        work = Workload(max(1, round(read)), max(1, round(written)), concurrency)
        costs = measure_plain(plain, seen, params, work, most)
        for name, llm in loaded.items():

            def make(drafts: int | None, name: str = name, llm: LLM = llm) -> LLM:
                return llm if drafts is None else plain.with_drafter(name, draft_tokens=drafts)

            plan = make_plan([measure_drafter(make, name, costs, seen, params, work)], costs, work)
            best = plan.forecasts[0]
            timed = in_turns(plain, plain.with_drafter(name, draft_tokens=best.drafts), asked, params, repeats)
            cell = Cell(
                target,
                dtype,
                name,
                path.stem,
                concurrency,
                best.drafts,
                best.speedup,
                best.low,
                best.high,
                timed.speedup,
                timed.low,
                timed.high,
                best.acceptance_length,
                timed.acceptance_length,
                plan.pays,
            )
            print(
                f"{target} {dtype} {name} {path.stem} {concurrency}: k {cell.drafts}, {cell.predicted:.2f} predicted, "
                f"{cell.measured:.2f} measured: {cell.error:+.1%}, of costs {cell.error_of_costs:+.1%}",
                flush=True,
            )
            yield cell


def summary(cells: Sequence[Cell]) -> str:
    near = sum(abs(cell.error) <= 0.1 for cell in cells)
    slower = [cell for cell in cells if cell.advised and cell.measured_high < 1]
    costs = sum(abs(cell.error_of_costs) <= 0.1 for cell in cells)
    return (
        f"{near} of {len(cells)} cells within 10 %, {costs} had acceptance been known; "
        f"advised and certainly slower: {len(slower)}"
    )


def read_cells(paths: Sequence[Path]) -> list[Cell]:
    names = {field.name for field in fields(Cell)}
    rows = [row for path in paths for row in json.loads(path.read_text())["cells"]]
    return [Cell(**{name: value for name, value in row.items() if name in names}) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(DRAFTERS), choices=DRAFTERS)
    parser.add_argument("--dtypes", nargs="+", default=[], help="default: all of the target")
    parser.add_argument("--drafters", nargs="+", default=[], help="default: all of the target")
    parser.add_argument("--domains", nargs="+", default=[], help="default: all")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--limit", type=int, default=8, help="prompts of each half")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--held-out", action="store_true", help="measure on other prompts than those planned with")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", nargs="+", type=Path, help="nothing is measured: the table of these results")
    options = parser.parse_args()
    if options.table:
        cells = read_cells(options.table)
        print(markdown(cells), summary(cells), sep="\n\n")
        return
    cells = [
        cell
        for target in options.targets
        for dtype in options.dtypes or DTYPES[target]
        for rows in options.concurrency
        for cell in cells_of(
            target,
            dtype,
            rows,
            options.limit,
            options.repeats,
            options.held_out,
            options.drafters or DRAFTERS[target],
            options.domains,
        )
    ]
    print(summary(cells))
    if options.out:
        rows = [asdict(cell) | {"error": cell.error, "error_of_costs": cell.error_of_costs} for cell in cells]
        options.out.write_text(json.dumps({"machine": machine(), "cells": rows}, indent=2) + "\n")


def markdown(cells: Sequence[Cell]) -> str:
    """A row for each target, dtype, drafter and load; predicted and measured by domain."""
    domains = list(dict.fromkeys(cell.domain for cell in cells))
    rows: dict[tuple[str, str, str, int], dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.target, cell.dtype, cell.drafter, cell.concurrency), {})[cell.domain] = cell
    body = [[*map(str, key), *(_shown(by_domain.get(domain)) for domain in domains)] for key, by_domain in rows.items()]
    return table(["target", "dtype", "drafter", "rows", *domains], body)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.drafts}: {cell.predicted:.2f}, {cell.measured:.2f} ({cell.error:+.0%})"


if __name__ == "__main__":
    main()
