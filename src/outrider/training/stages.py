"""The training stages by name, and the function that runs any of them: checked parents, one artefact, provenance."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from outrider.training.artefact import Artefact, begin, file_hash, open_artefact
from outrider.training.progress import Progress

__all__ = ["STAGES", "Stage", "StageInputs", "checkpoint_of", "make", "opened", "sources_of"]

DRAFTER = "drafter"  # folder of the checkpoint inside an artefact
SHARES = 1000  # resolution of a progress bar that is given shares


@dataclass(frozen=True, slots=True)
class StageInputs:
    """What a stage's function is given."""

    config: Any
    parents: Mapping[str, Artefact]
    out: Path
    target: str
    console: Console | None
    prompts: tuple[Path, ...] = ()
    """Prompt sets of ``eval``; empty: the held-out answers."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: its function and ``Config``, the artefacts it reads, and the files it writes."""

    reference: str
    """module:function; the module also has the stage's ``Config``."""
    call: Callable[[Callable[..., Any], StageInputs], dict[str, Any]]
    """Calls the function with its inputs; returns facts for provenance."""
    parents: Mapping[str, tuple[str, ...]]
    """Role -> stages whose artefact can fill it, the preferred one first."""
    outputs: tuple[str, ...] = ()
    """Names of its results in its directory; empty where the function calls ``artefact.begin`` itself."""
    scratch: bool = False
    """The function needs a new directory: it writes to ``scratch_dir``, whose files then move to the stage's."""
    optional: frozenset[str] = frozenset()
    """Roles that may be left out."""

    @property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.reference.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    @property
    def config(self) -> type[BaseModel]:
        found: type[BaseModel] = import_module(self.reference.partition(":")[0]).Config
        return found


def sources_of(name: str, config: Any, prompts: tuple[Path, ...] = ()) -> dict[str, str] | None:
    """Hashes of a stage's inputs that are no artefacts: of prompt sets, and what its module's ``sources`` says. None:
    known only once the stage before has run. Raises InvalidRequest, CheckpointError for inputs that are not there."""
    if name == "regenerate":
        return None  # the chat template, if there are chats among the prompts
    own = getattr(import_module(STAGES[name].reference.partition(":")[0]), "sources", None)
    return {f"prompts {path.name}": file_hash(path) for path in prompts} | ({} if own is None else own(config))


def checkpoint_of(artefact: Artefact) -> Path:
    """The drafter's checkpoint in an artefact of ``run``, ``calibrate`` or ``export``."""
    return artefact.folder / DRAFTER


# ------------------------------------------------------------------------------------------------ calling each stage


def _prompts(function: Callable[..., Any], inputs: StageInputs) -> dict[str, Any]:
    function(inputs.config, inputs.out, inputs.target, console=inputs.console)
    return {}


def _regenerate(function: Callable[..., Any], inputs: StageInputs) -> dict[str, Any]:
    function(inputs.config, inputs.parents["prompts"].folder, inputs.out, inputs.target, console=inputs.console)
    return {}


def _features(function: Callable[..., Any], inputs: StageInputs) -> dict[str, Any]:
    function(inputs.config, inputs.parents["answers"].folder, inputs.out, inputs.target, console=inputs.console)
    return {}


def _run(function: Callable[..., Any], inputs: StageInputs) -> dict[str, Any]:
    cache = inputs.parents.get("features")
    features, answers = None if cache is None else cache.folder, inputs.parents["answers"].folder
    function(inputs.config, answers, inputs.out, inputs.target, features=features, console=inputs.console)
    return {}


def _calibrate(function: Callable[..., Any], inputs: StageInputs) -> dict[str, Any]:
    drafter, answers = checkpoint_of(inputs.parents["drafter"]), inputs.parents["answers"].folder
    with Progress(inputs.console, "calibrating", SHARES) as progress:
        report = function(inputs.config, drafter, [answers], inputs.out, inputs.target, progress=_shares(progress))
    buckets = [(b.title, b.pooled_before, b.pooled_after) for b in report.buckets]
    return {
        "signal": report.signal,
        "buckets": [{"title": t, "rounds": a.rounds, "before": b.ece, "after": a.ece} for t, b, a in buckets],
    }


def _evaluate(function: Callable[..., Any], inputs: StageInputs) -> dict[str, Any]:
    drafter = str(checkpoint_of(inputs.parents["drafter"]))
    prompts = inputs.prompts or (inputs.parents["answers"].folder / "held_out.jsonl",)
    with Progress(inputs.console, "evaluating", SHARES) as progress:
        found = function(inputs.config, [drafter], list(prompts), inputs.target, inputs.out, progress=_shares(progress))
    fields = ("temperature", "domain", "prompts", "acceptance_length", "speedup")
    return {"rows": [{name: row[name] for name in fields} for row in found.to_json()["rows"]]}


def _export(function: Callable[..., Any], inputs: StageInputs) -> dict[str, Any]:
    evaluation = inputs.parents.get("evaluation")
    function(inputs.config, inputs.parents["drafter"], inputs.out, inputs.target, evaluation=evaluation)
    return {}


def _shares(progress: Progress) -> Callable[[str, float], None]:
    return lambda text, done: progress.advance(int(done * SHARES) - progress.done, note=text)


CALIBRATED = ("calibrate", "run")
STAGES: dict[str, Stage] = {  # in the order of a recipe
    "prompts": Stage("outrider.training.prompts:make_prompts", _prompts, {}),
    "regenerate": Stage("outrider.training.regenerate:regenerate", _regenerate, {"prompts": ("prompts",)}),
    "features": Stage("outrider.training.features:features", _features, {"answers": ("regenerate",)}),
    "run": Stage(
        "outrider.training.run:run",
        _run,
        {"answers": ("regenerate",), "features": ("features",)},
        optional=frozenset({"features"}),
    ),
    "calibrate": Stage(
        "outrider.training.fit_calibration:calibrate",
        _calibrate,
        {"drafter": ("run",), "answers": ("regenerate",)},
        (DRAFTER, "report.json"),
        scratch=True,
    ),
    "eval": Stage(
        "outrider.evaluation.drafter_quality:evaluate",
        _evaluate,
        {"drafter": CALIBRATED, "answers": ("regenerate",)},
        ("evaluation.json",),
    ),
    "export": Stage(
        "outrider.training.export:export",
        _export,
        {"drafter": CALIBRATED, "evaluation": ("eval",)},
        (DRAFTER,),
        scratch=True,
        optional=frozenset({"evaluation"}),
    ),
}


# ------------------------------------------------------------------------------------------------ one stage


def opened(name: str, folders: Mapping[str, Path], target: str | None) -> dict[str, Artefact]:
    """Open and check the artefacts that a stage reads, by role. Raises ArtefactError."""
    kinds = STAGES[name].parents
    return {role: open_artefact(folder, kinds[role], target) for role, folder in folders.items()}


def make(
    name: str,
    config: BaseModel,
    parents: Mapping[str, Artefact],
    out: Path,
    target: str,
    *,
    prompts: tuple[Path, ...] = (),
    console: Console | None = None,
) -> Artefact:
    """Run one stage: start, resume, or return the finished artefact.

    Raises ArtefactError and the stage's own errors.
    """
    stage = STAGES[name]
    inputs = StageInputs(config, parents, out, target, console, prompts)
    if not stage.outputs:
        stage.call(stage.function, inputs)
        return open_artefact(out, name)
    with begin(out, name, config, parents=parents, sources=sources_of(name, config, prompts), target=target) as work:
        if not work.finished:
            facts = _call_in_scratch_dir(stage, inputs) if stage.scratch else stage.call(stage.function, inputs)
            work.finish(stage.outputs, facts)
    return open_artefact(out, name)


def _call_in_scratch_dir(stage: Stage, inputs: StageInputs) -> dict[str, Any]:
    """Run the function on a new directory inside the stage's, then move its files to the stage's."""
    scratch_dir = inputs.out / ".scratch"
    shutil.rmtree(scratch_dir, ignore_errors=True)  # left by a killed process
    facts = stage.call(stage.function, replace(inputs, out=scratch_dir))
    for path in sorted(scratch_dir.iterdir()):
        if path.name == "provenance.json":
            continue  # the stage's own has the same entries and more
        destination = inputs.out / path.name
        if destination.is_dir():
            shutil.rmtree(destination)
        path.replace(destination)
    shutil.rmtree(scratch_dir)
    return facts
