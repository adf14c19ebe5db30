"""``calibrate``: fit a scaling of a drafter's confidences on held-out prompts, and store it with the checkpoint.

For every rule and temperature the target answers the prompts with all drafts verified. The scaling is fitted on half of
the prompts (every second one of a domain); its error before and after is measured on the other half. At temperature 0
all rules are the same, so they share one measurement.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from outrider import registry
from outrider.config import RULES, Rule, SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.evaluation import plots
from outrider.evaluation.recording import (
    EvalPrompt,
    Observed,
    Recorder,
    Round,
    answer,
    observed,
    read_prompts,
    recorded,
    runnable,
)
from outrider.files import new_folder, write_json
from outrider.models.locations import EMBEDDED_PROMPTS, public_name, resolve_model
from outrider.scheduling import calibration
from outrider.scheduling.calibration import Calibration, Quality, Scaling
from outrider.training.artefact import content_hash, file_hash, target_hash
from outrider.version import __version__

__all__ = ["LEAST_PROMPTS", "Bucket", "Config", "Report", "calibrate"]

LEAST_PROMPTS = 4
Progress = Callable[[str, float], None]
"""Called with the current activity and the finished share."""


class Config(BaseModel):
    """Options of the measurement and of the fit."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rules: tuple[Rule, ...] = Field(default=RULES, min_length=1)
    """Verification rules to fit for."""
    temperatures: tuple[float, ...] = Field(default=(0.0, 0.7, 1.0), min_length=1)
    """Temperatures to fit for; a request uses the nearest one."""
    rounds: int = Field(default=10_000, ge=60)
    """Rounds for each rule and temperature: prompts are answered again with other seeds until there are so many.
    Greedy answers do not vary, so at temperature 0 each prompt is answered once."""
    max_tokens: int = Field(default=128, ge=2)
    """Most new tokens of an answer."""
    draft_tokens: int | None = Field(default=None, ge=1)
    """Drafts per round; by default as many as the drafter's block."""
    bins: int = Field(default=calibration.BINS, ge=2)
    """Bins of equal mass for the calibration error."""
    shift: bool | None = None
    """Fit a shift beside each temperature. None: only at positions where a temperature alone leaves more than 1 % of
    calibration error, and more than twice what chance explains."""
    chat: bool = False
    """Write the turns of prompts into the target's chat template."""
    seed: int = 0
    """Other seeds give other sampled answers."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The result for one temperature and the rules that share it."""

    rules: tuple[Rule, ...]
    temperature: float
    scaling: Scaling
    fitted_on: int  # rounds
    before: list[Quality]  # of the survival at each position, on the other half of the prompts
    after: list[Quality]
    conditional_before: list[Quality]  # of the confidence itself, where all earlier drafts were accepted
    conditional_after: list[Quality]
    pooled_before: Quality  # survival at all positions together
    pooled_after: Quality
    curves: Mapping[str, plots.Curve]  # of all positions together, for the diagram

    @property
    def title(self) -> str:
        return f"{'any rule' if self.temperature == 0 else ', '.join(self.rules)}, temperature {self.temperature:g}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Report:
    """A drafter's calibration, and its quality."""

    drafter: str
    target: str
    signal: str
    calibration: Calibration
    buckets: list[Bucket]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "drafter": self.drafter,
            "target": self.target,
            "signal": self.signal,
            "seconds": round(self.seconds, 1),
            "buckets": [bucket.to_json() for bucket in self.buckets],
        }


def calibrate(
    config: Config,
    drafter: str | Path,
    prompts: Sequence[Path],
    out: Path,
    target: str = "embedded",
    *,
    dtype: str = "auto",
    backend: str = "auto",
    progress: Progress = lambda text, done: None,
) -> Report:
    """Write ``out``: ``drafter/`` (a copy of the checkpoint with calibration.json), report.json, reliability.png and
    provenance.json. For a drafter without a checkpoint, such as ``ngram``, ``drafter/`` has calibration.json only.

    ``prompts``: files of prompts or answers (see ``recording.read_prompts``), or directories with ``held_out.jsonl``;
    default: the packaged prompts.
    Raises InvalidRequest for too few prompts, a drafter without confidences, or an ``out`` that exists.
    """
    began = perf_counter()
    if out.exists():
        raise InvalidRequest(f"{out} exists already; give a new directory")
    plain = LLM(target, "none", dtype=dtype, backend=backend, max_rows=1)
    llm = plain.with_drafter(drafter, draft_tokens=config.draft_tokens)  # drafts in every round
    if hasattr(llm.drafter, "calibration"):
        llm.drafter.calibration = None  # measure the raw confidences
    files = _files(prompts)
    read = [prompt for file in files for prompt in read_prompts(file)]
    chosen, _ = runnable(llm, read, SamplingParams(max_tokens=config.max_tokens), chat=config.chat, fail_fast=True)
    if len(chosen) < LEAST_PROMPTS:
        raise InvalidRequest(
            f"calibration needs at least {LEAST_PROMPTS} prompts, to fit on half of them; got {len(chosen)}"
        )
    halves = _halves(chosen)
    recorder = recorded(llm)
    signal = _signal(llm)
    kinds: list[tuple[tuple[Rule, ...], float]] = []
    for temperature in config.temperatures:
        kinds += [(config.rules, 0.0)] if temperature == 0 else [((rule,), temperature) for rule in config.rules]
    buckets = []
    for number, (rules, temperature) in enumerate(kinds):

        def report_share(share: float, at: int = number, rules: Sequence[str] = rules, t: float = temperature) -> None:
            progress(f"{', '.join(rules)} at temperature {t:g}", (at + share) / len(kinds))

        params = SamplingParams(max_tokens=config.max_tokens, temperature=temperature, rule=rules[0], seed=config.seed)
        fitting, held_out = _collect(llm, recorder, halves, params, config.rounds, report_share)
        buckets.append(_bucket(rules, temperature, fitting, held_out, config.shift, config.bins))
    made_by = f"outrider {__version__} calibrate"
    found = Calibration(
        {(rule, bucket.temperature): bucket.scaling for bucket in buckets for rule in bucket.rules},
        {
            "made_by": made_by,
            "signal": signal,
            "target": public_name(target),
            "target_sha256": target_hash(target),
            "drafts": llm.drafter.block,
        },
    )
    report = Report(public_name(drafter), public_name(target), signal, found, buckets, perf_counter() - began)
    _write(report, drafter, target, files, config, out)
    return report


# ------------------------------------------------------------------------------------------------ measuring


def _files(prompts: Sequence[Path]) -> list[Path]:
    if not prompts:
        return sorted(EMBEDDED_PROMPTS.glob("*.jsonl"))
    return [path / "held_out.jsonl" if path.is_dir() else path for path in prompts]


def _halves(prompts: Sequence[EvalPrompt]) -> list[tuple[EvalPrompt, bool]]:
    """Prompts of all domains in turns, and whether each is one to fit on: every second one of its domain."""
    domains: dict[str, list[tuple[EvalPrompt, bool]]] = {}
    for prompt in prompts:
        own = domains.setdefault(prompt.domain, [])
        own.append((prompt, len(own) % 2 == 0))
    return [entry for turn in zip_longest(*domains.values()) for entry in turn if entry is not None]


def _signal(llm: LLM) -> str:
    """Where the confidences come from: ``head`` for a trained confidence head, else ``training-free``."""
    design = getattr(llm.drafter, "design", None)
    return "head" if getattr(design, "confidence", False) else "training-free"


def _collect(
    llm: LLM,
    recorder: Recorder,
    halves: Sequence[tuple[EvalPrompt, bool]],
    params: SamplingParams,
    wanted: int,
    report_share: Callable[[float], None],
) -> tuple[Observed, Observed]:
    """Rounds for fitting, and rounds for measuring. Prompts are repeated with other seeds; greedily they run once.

    Raises InvalidRequest for too few rounds with confidences.
    """
    rounds: dict[bool, list[Round]] = {True: [], False: []}
    turn, before, least = 0, -1, 0
    while least < wanted / 2 and before < least and not (turn and params.temperature == 0):
        before = least
        for number, (prompt, fitting) in enumerate(halves):
            seed = ((params.seed or 0) << 40) + (turn << 20) + number
            found = answer(llm, recorder, prompt.prompt, replace(params, seed=seed))
            rounds[fitting] += [one for one in found.rounds if one.verified and one.confidence]
            least = min(map(len, rounds.values()))
            report_share(min(1.0, 2 * least / wanted))
            if least >= wanted / 2:
                break
        turn += 1
    if least < calibration.BINS:
        raise InvalidRequest(
            f"{llm.drafter_name}: half of the prompts gave only {least} rounds with confidences, expected at least "
            f"{calibration.BINS}; give more prompts, or a drafter that has confidences (`none` drafts nothing)"
        )
    return observed(rounds[True]), observed(rounds[False])


def _bucket(
    rules: tuple[Rule, ...], temperature: float, fitting: Observed, held_out: Observed, shift: bool | None, bins: int
) -> Bucket:
    scaling = calibration.fit(
        calibration.logits_of(fitting.confidence), fitting.verified, fitting.accepted, shift=shift, bins=bins
    )
    both = {
        "before": held_out.confidence,
        "after": scaling.apply(calibration.logits_of(held_out.confidence)),
    }
    pooled = {
        when: calibration.pooled(confidence, held_out.verified, held_out.accepted) for when, confidence in both.items()
    }
    survival, conditional = (
        {when: measure(confidence, held_out.verified, held_out.accepted, bins) for when, confidence in both.items()}
        for measure in (calibration.survival_quality, calibration.conditional_quality)
    )
    curves = {}
    for when, (probabilities, outcomes) in pooled.items():
        found = calibration.reliability(probabilities, outcomes, bins)
        label = f"{when}, ECE {found.error:.1%}"
        curves[label] = (found.predicted.tolist(), found.observed.tolist())
    return Bucket(
        rules,
        temperature,
        scaling,
        len(fitting.verified),
        survival["before"],
        survival["after"],
        conditional["before"],
        conditional["after"],
        calibration.quality(*pooled["before"], bins),
        calibration.quality(*pooled["after"], bins),
        curves,
    )


# ------------------------------------------------------------------------------------------------ writing


def _write(report: Report, drafter: str | Path, target: str, files: Sequence[Path], config: Config, out: Path) -> None:
    """Write the artefact atomically: it appears under its name when it is complete."""
    with new_folder(out) as partial:
        folder = partial / "drafter"
        folder.mkdir()
        parents = {}
        if str(drafter) not in registry.names("drafter"):
            source = resolve_model(drafter)
            for file in sorted(path for path in source.iterdir() if path.is_file()):
                shutil.copyfile(file, folder / file.name)
            parents["drafter"] = content_hash(
                source, [path.name for path in source.iterdir() if path.name != calibration.FILE]
            )
        write_json(folder / calibration.FILE, report.calibration.to_json())
        write_json(partial / "report.json", report.to_json())
        if plots.available():
            plots.draw_reliability({b.title: b.curves for b in report.buckets}, partial / "reliability.png")
        provenance = {
            "stage": "calibrate",
            "outrider": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "arguments": {"drafter": str(drafter), "target": target, **config.model_dump(mode="json")},
            "seconds": round(report.seconds, 1),
            "parents": parents | {file.name: file_hash(file) for file in files},
            "content": content_hash(folder, [path.name for path in folder.iterdir()]),
        }
        write_json(partial / "provenance.json", provenance)
