"""Paired benchmark: a drafter against plain decoding, alternating in one process (A B A B)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from outrider.config import SamplingParams
from outrider.engine.cost_tables import machine
from outrider.engine.llm import LLM
from outrider.evaluation.recording import read_prompts
from outrider.models.locations import EMBEDDED_PROMPTS
from outrider.types import Output, StepRecord

__all__ = [
    "BenchRow",
    "Prompt",
    "bootstrap_ratio",
    "default_prompt_files",
    "embedded_prompt_sets",
    "repeated_ngrams",
    "run_bench",
]


EMBEDDED_QUESTIONS = EMBEDDED_PROMPTS.parent / "questions"
T = TypeVar("T")
Prompt = str | list[int]
"""Text, or token ids."""


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One drafter on one prompt set at one temperature."""

    drafter: str
    prompts: str
    temperature: float
    concurrency: int
    baseline_tokens_per_second: float
    tokens_per_second: float
    speedup: float
    speedup_ci95: tuple[float, float] | None
    acceptance_length: float
    accepted_per_position: list[float]  # share of rounds that drafted position j and accepted it
    identical: float  # share of prompts with the same text as plain decoding
    repeated_8grams: float  # share of 8-grams that occurred before in the text: repetitive text is easy to draft
    generated: int
    drafted_per_round: float  # verified drafts
    step_ms: dict[str, float]  # mean milliseconds of a step: draft, verify, bookkeeping; those with prompts left out
    plain_step_ms: float | None  # the same of plain decoding, all in all


class _Steps:
    """A ``StepObserver``: the seconds of steps that read no prompt."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float, float]] = []

    def step(self, record: StepRecord) -> None:
        if record.rows and not any(row.first for row in record.rows):
            self.seconds.append((record.cost.draft, record.cost.verify, record.cost.bookkeeping))

    def means(self) -> dict[str, float]:
        """In milliseconds; empty where there was no such step."""
        if not self.seconds:
            return {}
        means = (1e3 * np.mean(np.array(self.seconds), axis=0)).tolist()
        return {name: round(one, 4) for name, one in zip(("draft", "verify", "bookkeeping"), means, strict=True)}


def default_prompt_files(chat: bool) -> list[Path]:
    """The packaged prompt sets: questions for chat models, or beginnings of documents that the embedded models were not
    trained on."""
    return sorted((EMBEDDED_QUESTIONS if chat else EMBEDDED_PROMPTS).glob("*.jsonl"))


def embedded_prompt_sets(chat: bool = False) -> dict[str, list[str]]:
    """The packaged prompts by domain: see ``default_prompt_files``."""
    sets = {path.stem: read_prompts(path) for path in default_prompt_files(chat)}
    return {name: [str(prompt.prompt) for prompt in prompts] for name, prompts in sets.items()}


def repeated_ngrams(tokens: Sequence[int], n: int = 8) -> float:
    """Share of n-grams that occurred earlier in the same text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def bootstrap_ratio(
    plain: Sequence[float], fast: Sequence[float], draws: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float] | None]:
    """Ratio of summed seconds (plain / fast) and its 95 % interval to three digits, resampling prompts (pairs stay
    together); a single pair has none."""
    a, b = np.asarray(plain), np.asarray(fast)
    ratio = float(a.sum() / b.sum())
    if len(a) < 2:
        return ratio, None
    picks = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    ratios = a[picks].sum(1) / b[picks].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return ratio, (round(float(low), 3), round(float(high), 3))


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run_bench(
    model: str,
    drafters: Mapping[str, LLM],
    plain: LLM,
    prompt_sets: Mapping[str, Sequence[Prompt]],
    *,
    temperatures: Sequence[float] = (0.0, 1.0),
    concurrency: int = 1,
    max_tokens: int = 64,
    repeats: int = 2,
    seed: int = 1,
    ignore_eos: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time every drafter against ``plain`` on the same prompts, alternating; sampled text is seeded and coupled.

    Each prompt (or group of ``concurrency`` prompts) is answered by plain decoding, then with the drafter; the whole
    set is repeated ``repeats`` times. The time of a prompt is the median of its repeats. Stored text and prefixes are
    dropped on both sides before each repeat. The share of identical texts is measured, not assumed. With ``ignore_eos``
    answers go on past the end of the text; without it their lengths may differ, and seconds count for each token.
    """
    rows: list[BenchRow] = []
    for temperature in temperatures:
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
        for set_name, prompts in prompt_sets.items():
            groups = list(_chunks(prompts, concurrency))
            for name, llm in drafters.items():
                progress(f"{name}, {set_name}, temperature {temperature:g}")
                for one in (plain, llm):  # warm up; the first call is not timed
                    one.generate(groups[0], params)
                sides = {"plain": plain, "fast": llm}
                times: dict[str, list[list[float]]] = {side: [[] for _ in groups] for side in sides}
                outputs: dict[str, list[Output]] = {}
                steps = {side: _Steps() for side in sides}
                for side, one in sides.items():
                    one.observers.append(steps[side])
                for _ in range(repeats):
                    outputs = {side: [] for side in sides}
                    for one in sides.values():  # a repeated prompt would be too easy, and need not be read again
                        one.forget()
                    for index, group in enumerate(groups):
                        for side, one in sides.items():
                            done = one.generate(group, params)
                            times[side][index].append(max(output.stats.seconds for output in done))
                            outputs[side].extend(done)
                for side, one in sides.items():
                    one.observers.remove(steps[side])
                seconds = {side: [float(np.median(t)) for t in times[side]] for side in sides}
                rows.append(_row(name, set_name, temperature, concurrency, seconds, outputs, steps))
    return {"model": model, "machine": machine(), "max_tokens": max_tokens, "rows": [asdict(row) for row in rows]}


def _row(
    name: str,
    prompts: str,
    temperature: float,
    concurrency: int,
    seconds: dict[str, list[float]],
    outputs: dict[str, list[Output]],
    steps: Mapping[str, _Steps],
) -> BenchRow:
    lengths = {
        side: [sum(len(output.token_ids) for output in group) for group in _chunks(outputs[side], concurrency)]
        for side in outputs
    }
    alike = [s * a / b for s, a, b in zip(seconds["fast"], lengths["plain"], lengths["fast"], strict=True)]
    speedup, interval = bootstrap_ratio(seconds["plain"], alike)  # seconds for as many tokens as plain decoding wrote
    stats = [output.stats for output in outputs["fast"]]
    rounds = sum(s.rounds for s in stats)
    depth = max((len(s.drafted_per_position) for s in stats), default=0)

    def total(counts: list[list[int]], j: int) -> int:
        return sum(c[j] for c in counts if j < len(c))

    per_position = [
        total([s.accepted_per_position for s in stats], j) / max(1, total([s.drafted_per_position for s in stats], j))
        for j in range(depth)
    ]
    generated = {side: sum(lengths[side]) for side in outputs}
    same = [a.token_ids == b.token_ids for a, b in zip(outputs["plain"], outputs["fast"], strict=True)]
    repeated = [repeated_ngrams(output.token_ids) for output in outputs["fast"]]
    return BenchRow(
        drafter=name,
        prompts=prompts,
        temperature=temperature,
        concurrency=concurrency,
        baseline_tokens_per_second=round(generated["plain"] / sum(seconds["plain"]), 2),
        tokens_per_second=round(generated["fast"] / sum(seconds["fast"]), 2),
        speedup=round(speedup, 3),
        speedup_ci95=interval,
        acceptance_length=round(1 + sum(s.accepted for s in stats) / rounds, 3) if rounds else 1.0,
        accepted_per_position=[round(share, 3) for share in per_position],
        identical=round(float(np.mean(same)), 3),
        repeated_8grams=round(float(np.mean(repeated)), 3),
        generated=generated["fast"],
        drafted_per_round=round(sum(s.drafted for s in stats) / rounds, 3) if rounds else 0.0,
        step_ms=steps["fast"].means(),
        plain_step_ms=round(sum(plain.values()), 4) if (plain := steps["plain"].means()) else None,
    )
