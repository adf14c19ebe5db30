"""``eval``: compare drafters and plain decoding on the same prompts.

Every prompt is answered by plain decoding and by each drafter, alternating (A B C A B C), one request at a time, with
empty drafter caches. A text ends at its end-of-text token. ``evaluation.recording`` defines which rounds count.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from outrider import registry
from outrider.config import Rule, SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import ArtefactError, CheckpointError, InvalidRequest
from outrider.evaluation import plots
from outrider.evaluation.comparison import (
    MACRO,
    Counts,
    Evaluation,
    Sample,
    Samples,
    SweepPoint,
    confidence_of,
    difference_of,
    row_of,
)
from outrider.evaluation.recording import (
    EvalPrompt,
    FailedPrompt,
    Recorder,
    Round,
    answer,
    read_prompts,
    recorded,
    runnable,
)
from outrider.files import read_json, write_json
from outrider.models.locations import EMBEDDED_PROMPTS, resolve_model
from outrider.version import __version__

__all__ = ["Config", "evaluate"]

PLAIN = "plain"
WARM_UP = 8  # tokens of the warm-up, which is not timed
Progress = Callable[[str, float], None]
"""Called with the current activity and the finished share."""
T = TypeVar("T")


class Config(BaseModel):
    """Options of the measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    temperatures: tuple[float, ...] = Field(default=(0.0, 1.0), min_length=1)
    """0 is greedy."""
    rule: Rule = "rejection"
    """Verification rule; published acceptance lengths use ``rejection``."""
    max_tokens: int = Field(default=128, ge=2)
    """Most new tokens of an answer."""
    draft_tokens: int | None = Field(default=None, ge=1)
    """Drafts per round; by default as many as each drafter's block."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts of each set; None: all."""
    repeats: int = Field(default=1, ge=1)
    """Times each prompt is answered, with another seed each time."""
    thresholds: tuple[float, ...] = ()
    """Thresholds of a sweep: drafts are truncated at the first confidence under the threshold."""
    chat: bool = False
    """Write the turns of prompts into the target's chat template."""
    seed: int = 1
    """Other seeds give other sampled answers."""
    draws: int = Field(default=2000, ge=100)
    """Resamples of a bootstrap interval."""


# ------------------------------------------------------------------------------------------------ measuring


Side = tuple[LLM, Recorder]


def _measure(
    sides: Mapping[str, Side],
    prompts: Sequence[EvalPrompt],
    params: SamplingParams,
    repeats: int,
    report_share: Callable[[float], None],
) -> Samples:
    """Every side answers every prompt, alternating."""
    for llm, recorder in sides.values():  # warm up; the first call is not timed
        answer(llm, recorder, prompts[0].prompt, replace(params, max_tokens=min(WARM_UP, params.max_tokens)))
    samples: Samples = {name: [Sample(0, 0.0, [])] * len(prompts) for name in sides}
    for turn in range(repeats):
        for number, prompt in enumerate(prompts):
            seeded = replace(params, seed=((params.seed or 0) << 40) + (turn << 20) + number)
            for name, (llm, recorder) in sides.items():
                found = answer(llm, recorder, prompt.prompt, seeded)
                samples[name][number] += Sample(len(found.token_ids), found.seconds, found.rounds)
            report_share((turn * len(prompts) + number + 1) / (repeats * len(prompts)))
    return samples


class _Parts:
    """Finished measurements in a directory, so that an interrupted evaluation resumes."""

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self._folder, self._facts = folder, facts

    def get(self, what: Mapping[str, Any], measure: Callable[[], Samples]) -> Samples:
        """The stored measurement of ``what``; measures it first if there is none. Raises ArtefactError for a damaged
        file."""
        key = hashlib.sha256(json.dumps({**self._facts, **what}, sort_keys=True).encode()).hexdigest()[:16]
        file = None if self._folder is None else self._folder / f"{key}.json"
        if file is not None and file.exists():
            try:
                stored = {
                    name: [Sample(s["tokens"], s["seconds"], [_round(r) for r in s["rounds"]]) for s in samples]
                    for name, samples in read_json(file).items()
                }
                if stored.keys() == set(what["sides"]):
                    return stored
                reason = f"it holds {sorted(stored)}, expected {sorted(what['sides'])}"
            except (CheckpointError, LookupError, TypeError) as error:
                reason = str(error)
            raise ArtefactError(
                f"{file} is damaged: {reason}. Delete it and run the same command: it is measured again"
            )
        samples = measure()
        if file is not None:
            write_json(file, {name: [asdict(sample) for sample in own] for name, own in samples.items()})
        return samples


def _round(value: dict[str, Any]) -> Round:
    confidence = value.pop("confidence")
    return Round(None if confidence is None else tuple(confidence), **value)


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    config: Config,
    drafters: Sequence[str],
    prompts: Sequence[Path],
    target: str = "embedded",
    out: Path | None = None,
    *,
    dtype: str = "auto",
    backend: str = "auto",
    machine: Mapping[str, Any] | None = None,
    fail_fast: bool = False,
    progress: Progress = lambda text, done: None,
) -> Evaluation:
    """Compare drafters (names or directories) on prompt sets; default: the packaged prompts.

    ``out`` is given evaluation.json, the diagrams, and ``parts/``: what was measured, which a second call with the same
    arguments does not measure again. A prompt that cannot be answered (too long, refused by the chat template) is
    listed under ``errors``; with ``fail_fast`` it raises. Raises InvalidRequest for a drafter that is named twice, and
    where no prompt can be answered.
    """
    plain = LLM(target, "none", dtype=dtype, backend=backend, max_rows=1)
    sides: dict[str, Side] = {PLAIN: (plain, recorded(plain))}
    for drafter in drafters:
        name = _label(drafter)
        if name in sides:
            raise InvalidRequest(f"drafter {name} was given twice; two drafters need two names")
        llm = plain.with_drafter(drafter, draft_tokens=config.draft_tokens)
        sides[name] = llm, recorded(llm)
    files = prompts or sorted(EMBEDDED_PROMPTS.glob("*.jsonl"))
    domains, failed = _domains(files, plain, config, fail_fast)
    facts = {
        "outrider": __version__,
        "target": target,
        "drafters": {_label(drafter): _content(drafter) for drafter in drafters},
        "dtype": dtype,
        "backend": backend,
        "machine": dict(machine or {}),
        "prompts": len(failed) + sum(map(len, domains.values())),
        "config": config.model_dump(mode="json"),
    }
    parts = _Parts(None if out is None else out / "parts", {k: v for k, v in facts.items() if k != "config"})
    names = [name for name in sides if name != PLAIN]
    found = Evaluation(facts, [], [], [], [], [asdict(one) for one in failed])
    jobs = len(config.temperatures) * len(domains) * (1 + len(names) * bool(config.thresholds))
    done = 0

    def measured(temperature: float, domain: str, who: str, those: Mapping[str, Side], repeats: int) -> Samples:
        nonlocal done
        at, chosen = done, domains[domain]
        params = SamplingParams(
            max_tokens=config.max_tokens, temperature=temperature, rule=config.rule, seed=config.seed
        )
        what = {
            "params": asdict(params),
            "repeats": repeats,
            "draft_tokens": config.draft_tokens,
            "prompts": [{"id": one.id, "domain": one.domain, "prompt": one.prompt} for one in chosen],
            "sides": list(those),
            "who": who,
        }
        text = f"{who}, {domain}, temperature {temperature:g}"
        samples = parts.get(
            what,
            lambda: _measure(those, chosen, params, repeats, lambda share: progress(text, (at + share) / jobs)),
        )
        done += 1
        progress(text, done / jobs)
        return samples

    for temperature in config.temperatures:
        samples = {domain: measured(temperature, domain, "drafters", sides, config.repeats) for domain in domains}
        counts = {name: _counts(samples, name) for name in names}
        for name in names:
            for domain, own in _groups(counts[name]):
                found.rows.append(row_of(name, temperature, domain, own, config.draws))
            rounds = [r for of_domain in samples.values() for sample in of_domain[name] for r in sample.rounds]
            confidence = confidence_of(name, temperature, rounds)
            if confidence is not None:
                found.confidences.append(confidence)
        for i, name in enumerate(names):
            for other in names[i + 1 :]:
                both = {domain: (counts[name][domain], counts[other][domain]) for domain in domains}
                for domain, pairs in _groups(both):
                    found.differences.append(difference_of((name, other), temperature, domain, pairs, config.draws))
        for name in (one.drafter for one in found.confidences if one.temperature == temperature):
            if config.thresholds:
                found.sweep.extend(_sweep(name, temperature, sides, list(domains), config, measured))
    if out is not None:
        _write(found, out)
    return found


def _sweep(
    name: str,
    temperature: float,
    sides: Mapping[str, Side],
    domains: Sequence[str],
    config: Config,
    measured: Callable[[float, str, str, Mapping[str, Side], int], Samples],
) -> list[SweepPoint]:
    """The same drafter under the ``threshold`` policy, alternating with plain decoding."""
    plain, drafter = sides[PLAIN][0], sides[name][0].drafter
    those = {PLAIN: sides[PLAIN]}
    for threshold in config.thresholds:
        llm = plain.with_drafter(drafter, policy="threshold", policy_options={"threshold": threshold})
        those[f"{threshold:g}"] = llm, recorded(llm)
    samples = {domain: measured(temperature, domain, f"thresholds of {name}", those, 1) for domain in domains}
    points = []
    for threshold in config.thresholds:
        row = row_of(name, temperature, MACRO, list(_counts(samples, f"{threshold:g}").values()), config.draws)
        points.append(
            SweepPoint(
                name,
                temperature,
                threshold,
                row.acceptance_length,
                row.verify_rate,
                row.acceptance_rate,
                row.speedup,
            )
        )
    return points


def _counts(samples: Mapping[str, Samples], name: str) -> dict[str, Counts]:
    """One side's counts by domain, over the most positions that any of its rounds verified."""
    depth = max((r.verified for own in samples.values() for sample in own[name] for r in sample.rounds), default=0)
    return {domain: Counts.of(own[name], own[PLAIN], depth) for domain, own in samples.items()}


def _groups(of_domains: Mapping[str, T]) -> Iterator[tuple[str, list[T]]]:
    """Each domain alone, then all domains together if there are several."""
    for domain, one in of_domains.items():
        yield domain, [one]
    if len(of_domains) > 1:
        yield MACRO, list(of_domains.values())


# ------------------------------------------------------------------------------------------------ names and files


def _label(drafter: str) -> str:
    """Name of a drafter in tables. A checkpoint in a folder ``drafter`` is named by the parent folder."""
    path = Path(drafter)
    return (path.resolve().parent.name if path.name == "drafter" else path.name) if path.is_dir() else drafter


def _content(drafter: str) -> str | None:
    """A hash of a checkpoint's files; None for a drafter without a checkpoint."""
    if drafter in (*registry.names("drafter"), "auto"):
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in resolve_model(drafter).iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _domains(
    files: Sequence[Path], llm: LLM, config: Config, fail_fast: bool
) -> tuple[dict[str, list[EvalPrompt]], list[FailedPrompt]]:
    """Prompts by domain, at most ``limit`` of each, and those of them that cannot be answered.

    Raises InvalidRequest where none can.
    """
    domains: dict[str, list[EvalPrompt]] = {}
    for file in files:
        for prompt in read_prompts(file):
            domains.setdefault(prompt.domain, []).append(prompt)
    chosen = [prompt for prompts in domains.values() for prompt in prompts[: config.limit]]
    params = SamplingParams(max_tokens=config.max_tokens)
    good, failed = runnable(llm, chosen, params, chat=config.chat, fail_fast=fail_fast)
    if not good:
        first = failed[0]
        raise InvalidRequest(f"no prompt can be answered; {first.file} line {first.line}: {first.error}")
    return {d: of_domain for d in domains if (of_domain := [p for p in good if p.domain == d])}, failed


def _write(found: Evaluation, out: Path) -> None:
    """Write the figures, and diagrams of acceptance by position, the threshold sweep and reliability."""
    write_json(out / "evaluation.json", found.to_json())
    if not plots.available():
        return
    positions: dict[str, dict[str, list[plots.Band]]] = {}
    for row in found.rows:
        shares = [(_value(one.value), _value(one.low), _value(one.high)) for one in row.conditional]
        positions.setdefault(f"{row.domain}, temperature {row.temperature:g}", {})[row.drafter] = shares
    plots.draw_positions(positions, out / "positions.png")
    reliable: dict[str, dict[str, plots.Curve]] = {}
    for one in found.confidences:
        label = f"{one.drafter}, ECE {one.pooled.ece:.1%}"
        reliable.setdefault(f"temperature {one.temperature:g}", {})[label] = (one.predicted, one.observed)
    if reliable:
        plots.draw_reliability(reliable, out / "reliability.png")
    swept: dict[str, dict[str, dict[str, list[float]]]] = {}
    for point in found.sweep:
        curve = swept.setdefault(f"temperature {point.temperature:g}", {}).setdefault(point.drafter, {})
        for name, value in (
            ("threshold", point.threshold),
            ("acceptance_length", _value(point.acceptance_length.value)),
            ("acceptance_rate", _value(point.acceptance_rate.value)),
            ("verify_rate", _value(point.verify_rate.value)),
            ("speedup", _value(point.speedup.value)),
        ):
            curve.setdefault(name, []).append(value)
    if swept:
        plots.draw_sweep(swept, out / "sweep.png")


def _value(one: float | None) -> float:
    return math.nan if one is None else one
