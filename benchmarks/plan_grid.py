"""Predicted against measured speed-ups: ``outrider plan`` over targets, drafters, dtypes, loads, temperatures, domains.

    python benchmarks/plan_grid.py --out grid.json                    all cells; begins nothing after twelve minutes
    python benchmarks/plan_grid.py --targets embedded --domains code  some of them

Prediction and measurement share no run: each drafter is planned with first, then plain decoding and all drafters, each
with the number of drafts that was predicted for, answer all prompts in turns. With --held-out they answer other
prompts, whose texts may be easier or harder to draft: the error is then also that of a small sample.

On a machine that does other work, OUTRIDER_THREADS=1 and --processor-time compare seconds of the processor instead,
which leaves out waiting, and with it what a second thread gains.

Cells are written to --out as they are measured, and those that are there already are not measured again: the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from math import exp, log
from pathlib import Path
from random import Random
from statistics import fmean, median, quantiles, stdev
from time import perf_counter, process_time

from scipy.special import stdtrit
from support import table

from outrider import LLM, SamplingParams
from outrider.cli.common import is_chat_model
from outrider.engine.cost_tables import machine
from outrider.evaluation.recording import read_prompts, runnable
from outrider.evaluation.speedup import default_prompt_files
from outrider.planning.advice import make_plan
from outrider.planning.forecast import Workload
from outrider.planning.measuring import measure
from outrider.types import Output, RequestStats

DRAFTERS = {
    "embedded": ("ngram", "suffix", "dspark", "dflash", "eagle3", "draft_model"),
    "smollm2": ("ngram", "suffix", "dspark"),
}
DTYPES = {"embedded": ("float32", "int8"), "smollm2": ("file",)}
PROMPTS = {"embedded": 6, "smollm2": 4}  # of a domain; with several rows at least four times as many as rows
TOKENS = {"embedded": 64, "smollm2": 48}
CAPACITY = 1024  # tokens of a sequence
NEAR = 0.1
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
    temperature: float = 0.0
    noise: float = 0.0
    """Of the machine: quartiles of plain decoding's seconds a token, their distance over the median."""

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def error_of_costs(self) -> float:
        """The same where acceptance had been known."""
        return self.predicted * self.measured_length / self.predicted_length / self.measured - 1

    @property
    def covered(self) -> bool:
        """Whether the intervals of prediction and measurement meet."""
        return self.low <= self.measured_high and self.measured_low <= self.high


@dataclass(frozen=True)
class Timed:
    """Plain decoding and a drafter answered the same prompts in turns."""

    speedup: float
    low: float
    high: float
    acceptance_length: float


def in_turns(
    plain: LLM,
    drafters: Mapping[str, LLM],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    repeats: int,
    clock: Callable[[], float] = perf_counter,
) -> tuple[dict[str, Timed], list[float]]:
    """Groups of prompts, twice as many as rows, answered by plain decoding and all drafters before the next group; each
    drafter runs between two runs of plain decoding. Also plain decoding's seconds a token.

    A repeat's ratio is that of all seconds, the drafter's neighbours against its own; the speed-up is the geometric
    mean over repeats, its interval Student's of 95 %.
    """
    size = 1 if plain.max_rows == 1 else 2 * plain.max_rows
    groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    order, shuffle = list(drafters), Random(0)
    ratios: dict[str, list[float]] = {name: [] for name in drafters}
    every: list[float] = []
    stats: dict[str, list[RequestStats]] = {name: [] for name in drafters}

    def run(llm: LLM, group: Sequence[Prompt]) -> tuple[float, list[Output]]:
        """Seconds, and the answers."""
        began = clock()
        done = llm.generate(list(group), params)
        return clock() - began, done

    for llm in (plain, *drafters.values()):
        llm.generate(list(groups[0]), params)  # warm up
    for _ in range(repeats):
        seconds = {name: [0.0, 0.0] for name in drafters}  # the neighbours' mean and its own
        written, spent = 0, [0.0] * (1 + len(drafters))  # by plain decoding, in each of its runs
        for llm in (plain, *drafters.values()):
            llm.forget()  # a repeated prompt would be too easy, and need not be read again
        for group in groups:
            before, done = run(plain, group)
            plain.forget()
            tokens = sum(len(output.token_ids) for output in done)
            written += tokens
            spent[0] += before
            for i, name in enumerate(order):
                mine, outputs = run(drafters[name], group)
                stats[name] += [output.stats for output in outputs]
                after, _ = run(plain, group)
                plain.forget()
                ours = sum(len(output.token_ids) for output in outputs)
                seconds[name][0] += (before + after) / 2
                seconds[name][1] += mine * tokens / ours
                spent[i + 1] += after
                before = after
            shuffle.shuffle(order)  # no setting always runs after the same one
        every += [one / written for one in spent]
        for name, (neighbours, mine) in seconds.items():
            ratios[name].append(neighbours / mine)
    return {name: timed(ratios[name], stats[name]) for name in drafters}, every


def timed(ratios: Sequence[float], stats: Sequence[RequestStats]) -> Timed:
    logs = [log(ratio) for ratio in ratios]
    half = float(stdtrit(len(logs) - 1, 0.975)) * stdev(logs) / len(logs) ** 0.5
    length = 1 + sum(s.accepted for s in stats) / max(1, sum(s.rounds for s in stats))
    return Timed(exp(fmean(logs)), exp(fmean(logs) - half), exp(fmean(logs) + half), length)


class Loaded:
    """One target for so many rows, and its drafters by name and number of drafts: loading takes longer than a cell."""

    def __init__(self, target: str, dtype: str, rows: int) -> None:
        self.plain = LLM(target, drafter="none", dtype=dtype, max_rows=rows, capacity=CAPACITY)
        self._made: dict[tuple[str, int | None], LLM] = {}

    def maker(self, name: str) -> Callable[[int | None], LLM]:
        def make(drafts: int | None) -> LLM:
            if (name, drafts) not in self._made:
                self._made[name, drafts] = self.plain.with_drafter(name, draft_tokens=drafts)
            return self._made[name, drafts]

        return make


def cells_of(
    loaded: Loaded, dtype: str, path: Path, temperature: float, names: Sequence[str], options: argparse.Namespace
) -> Iterator[Cell]:
    """The cells of all drafters on one domain."""
    plain, maker = loaded.plain, loaded.maker
    clock = process_time if options.processor_time else perf_counter
    target, rows = plain.model, plain.max_rows
    chat = is_chat_model(target, plain.tokenizer)
    params = SamplingParams(
        max_tokens=TOKENS[target], temperature=temperature, seed=1 if temperature else None, ignore_eos=not chat
    )
    count = max(options.limit or PROMPTS[target], 4 * rows if rows > 1 else 1)
    good, _ = runnable(plain, read_prompts(path)[: count * (1 + options.held_out)], params, chat=chat)
    prompts = [prompt.prompt for prompt in good]
    seen = prompts[: len(prompts) // 2] if options.held_out else prompts
    asked = prompts[len(prompts) // 2 :] if options.held_out else prompts

    read = fmean(len(plain.encode(prompt)) for prompt in asked)
    written = fmean(len(output.token_ids) for output in plain.generate(list(asked), params))
    work = Workload(max(1, round(read)), max(1, round(written)), rows)
    costs, candidates = measure(plain, {name: maker(name) for name in names}, seen, params, work, clock=clock)
    plans = {candidate.name: make_plan([candidate], costs, work) for candidate in candidates}
    bests = {name: plan.forecasts[0] for name, plan in plans.items()}
    chosen = {name: maker(name)(best.drafts) for name, best in bests.items()}
    timed, every = in_turns(plain, chosen, asked, params, options.repeats, clock)
    first, middle, third = quantiles(every, n=4)
    for name, best in bests.items():
        yield Cell(
            target,
            dtype,
            name,
            path.stem,
            rows,
            best.drafts,
            best.speedup,
            best.low,
            best.high,
            timed[name].speedup,
            timed[name].low,
            timed[name].high,
            best.acceptance_length,
            timed[name].acceptance_length,
            plans[name].pays,
            temperature,
            (third - first) / middle,
        )


def summary(cells: Sequence[Cell]) -> str:
    if not cells:
        return "no cells"
    near = sum(abs(cell.error) <= NEAR for cell in cells)
    costs = sum(abs(cell.error_of_costs) <= NEAR for cell in cells)
    covered = sum(cell.covered for cell in cells)
    advised = [cell for cell in cells if cell.advised]
    slower = [cell for cell in advised if cell.measured < 1]
    certainly = [cell for cell in slower if cell.measured_high < 1]
    missed = sum(not cell.advised and cell.measured_low > 1 for cell in cells)
    lines = [
        f"{near} of {len(cells)} cells within 10 % ({near / len(cells):.0%}), {costs} had acceptance been known; "
        f"median error {median(abs(cell.error) for cell in cells):.1%}; {covered} within the intervals",
        f"advised: {len(advised)}, of which slower than plain decoding: {len(slower)}, certainly: {len(certainly)}; "
        f"certainly faster and not advised: {missed}",
        f"noise: plain decoding's quartiles are {median(cell.noise for cell in cells):.1%} apart",
    ]
    return "\n".join(lines)


def by_part(cells: Sequence[Cell]) -> str:
    """The share within 10 % of each target, dtype, drafter, load and temperature."""
    lines = []
    for name in ("target", "dtype", "drafter", "concurrency", "temperature", "domain"):
        parts = []
        for value in dict.fromkeys(getattr(cell, name) for cell in cells):
            mine = [cell for cell in cells if getattr(cell, name) == value]
            parts.append(f"{value} {sum(abs(cell.error) <= NEAR for cell in mine)}/{len(mine)}")
        lines.append(f"{name}: {', '.join(parts)}")
    return "\n".join(lines)


def read_cells(paths: Sequence[Path]) -> list[Cell]:
    names = {field.name for field in fields(Cell)}
    rows = [row for path in paths for row in json.loads(path.read_text())["cells"]]
    return [Cell(**{name: value for name, value in row.items() if name in names}) for row in rows]


def write_cells(path: Path, cells: Sequence[Cell]) -> None:
    """Whole or not at all: the command may be stopped at any time."""
    rows = [asdict(cell) | {"error": cell.error, "error_of_costs": cell.error_of_costs} for cell in cells]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"machine": machine(), "cells": rows}, indent=2) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(DRAFTERS), choices=DRAFTERS)
    parser.add_argument("--dtypes", nargs="+", default=[], help="default: all of the target")
    parser.add_argument("--drafters", nargs="+", default=[], help="default: all of the target")
    parser.add_argument("--domains", nargs="+", default=[], help="default: all")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--limit", type=int, default=0, help="prompts of a domain; default: by target")
    parser.add_argument("--repeats", type=int, default=5, help="at least 2")
    parser.add_argument("--minutes", type=float, default=12, help="begin nothing more after so long")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count seconds of the processor; with OUTRIDER_THREADS=1, on a machine that does other work too",
    )
    parser.add_argument("--held-out", action="store_true", help="measure on other prompts than those planned with")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", nargs="+", type=Path, help="nothing is measured: the table of these results")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {options.repeats}")
    if options.table:
        cells = read_cells(options.table)
        print(markdown(cells), summary(cells), by_part(cells), sep="\n\n")
        return
    cells = read_cells([options.out]) if options.out and options.out.exists() else []
    done = {key(cell) for cell in cells}
    began, left = perf_counter(), 0
    models: dict[tuple[str, str, int], Loaded] = {}
    for temperature, target in product(options.temperatures, options.targets):
        for dtype, rows, path in product(
            options.dtypes or DTYPES[target], options.concurrency, default_prompt_files(target != "embedded")
        ):
            if options.domains and path.stem not in options.domains:
                continue
            names = options.drafters or DRAFTERS[target]
            names = [n for n in names if (target, dtype, n, path.stem, rows, temperature) not in done]
            if perf_counter() - began > 60 * options.minutes:
                left += len(names)
            elif names:
                if (target, dtype, rows) not in models:
                    models[target, dtype, rows] = Loaded(target, dtype, rows)
                for cell in cells_of(models[target, dtype, rows], dtype, path, temperature, names, options):
                    print(said(cell), flush=True)
                    cells.append(cell)
                if options.out:
                    write_cells(options.out, cells)
    print(summary(cells), by_part(cells), sep="\n")
    print(f"{perf_counter() - began:.0f} s" + (f"; {left} cells were left: run the command again" if left else ""))


def key(cell: Cell) -> tuple[str, str, str, str, int, float]:
    return cell.target, cell.dtype, cell.drafter, cell.domain, cell.concurrency, cell.temperature


def said(cell: Cell) -> str:
    return (
        f"{cell.target} {cell.dtype} {cell.drafter} {cell.domain}, {cell.concurrency} rows, temperature "
        f"{cell.temperature:g}: k {cell.drafts}, {cell.predicted:.2f} ({cell.low:.2f} to {cell.high:.2f}) predicted, "
        f"{cell.measured:.2f} ({cell.measured_low:.2f} to {cell.measured_high:.2f}) measured: {cell.error:+.1%}, of "
        f"costs {cell.error_of_costs:+.1%}{', advised' if cell.advised else ''}"
    )


def markdown(cells: Sequence[Cell]) -> str:
    """A row for each target, dtype, drafter, load and temperature; predicted and measured by domain."""
    domains = list(dict.fromkeys(cell.domain for cell in cells))
    rows: dict[tuple[str, str, str, int, float], dict[str, Cell]] = {}
    for cell in cells:
        group = cell.target, cell.dtype, cell.drafter, cell.concurrency, cell.temperature
        rows.setdefault(group, {})[cell.domain] = cell
    body = [[*map(str, group), *(_shown(by_domain.get(d)) for d in domains)] for group, by_domain in rows.items()]
    return table(["target", "dtype", "drafter", "rows", "temperature", *domains], body)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    mark = "*" if cell.advised else ""
    return f"{cell.drafts}{mark}: {cell.predicted:.2f}, {cell.measured:.2f} ({cell.error:+.0%})"


if __name__ == "__main__":
    main()
