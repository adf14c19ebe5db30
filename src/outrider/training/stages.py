"""The stages by name, and the one way in which all of them are made: checked parents, one artefact, provenance."""

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

__all__ = ["STAGES", "Order", "Stage", "checkpoint_of", "make", "opened"]

DRAFTER = "drafter"  # where a stage's checkpoint lies in its artefact
SHARES = 1000  # steps of a bar that is told shares


@dataclass(frozen=True, slots=True)
class Order:
    """What one stage is to be made of."""

    config: Any
    parents: Mapping[str, Artefact]
    out: Path
    target: str
    console: Console | None
    prompts: tuple[Path, ...] = ()
    """Prompt sets for ``eval``; none: the held-out answers."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a stage's ``Config`` and function are, what it reads, and what it leaves in its directory."""

    place: str
    """module:function"""
    call: Callable[[Callable[..., Any], Order], dict[str, Any]]
    """Calls the function; returns facts for provenance."""
    parents: Mapping[str, tuple[str, ...]]
    """Role -> stages whose artefact can play it, the preferred one first."""
    leaves: tuple[str, ...] = ()
    """Its result; empty where the function keeps its artefact itself."""
    aside: bool = False
    """The function makes a new directory of its own; what is in there then moves to the stage's."""
    optional: frozenset[str] = frozenset()
    """Roles that may be missing."""

    @property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.place.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found

    @property
    def config(self) -> type[BaseModel]:
        found: type[BaseModel] = import_module(self.place.partition(":")[0]).Config
        return found


def checkpoint_of(artefact: Artefact) -> Path:
    """The drafter's checkpoint in an artefact of ``run``, ``calibrate`` or ``export``."""
    return artefact.folder / DRAFTER


# ------------------------------------------------------------------------------------------------ how each is called


def _prompts(function: Callable[..., Any], order: Order) -> dict[str, Any]:
    function(order.config, order.out)
    return {}


def _regenerate(function: Callable[..., Any], order: Order) -> dict[str, Any]:
    function(order.config, order.parents["prompts"].folder, order.out, order.target, console=order.console)
    return {}


def _features(function: Callable[..., Any], order: Order) -> dict[str, Any]:
    function(order.config, order.parents["answers"].folder, order.out, order.target, console=order.console)
    return {}


def _run(function: Callable[..., Any], order: Order) -> dict[str, Any]:
    kept = order.parents.get("features")
    features, answers = None if kept is None else kept.folder, order.parents["answers"].folder
    function(order.config, answers, order.out, order.target, features=features, console=order.console)
    return {}


def _calibrate(function: Callable[..., Any], order: Order) -> dict[str, Any]:
    drafter, answers = checkpoint_of(order.parents["drafter"]), order.parents["answers"].folder
    with Progress(order.console, "calibrating", SHARES) as progress:
        report = function(order.config, drafter, [answers], order.out, order.target, progress=_shares(progress))
    buckets = [(b.title, b.pooled_before, b.pooled_after) for b in report.buckets]
    return {
        "signal": report.signal,
        "buckets": [{"title": t, "rounds": a.rounds, "before": b.ece, "after": a.ece} for t, b, a in buckets],
    }


def _evaluate(function: Callable[..., Any], order: Order) -> dict[str, Any]:
    drafter = str(checkpoint_of(order.parents["drafter"]))
    prompts = order.prompts or (order.parents["answers"].folder / "held_out.jsonl",)
    with Progress(order.console, "evaluating", SHARES) as progress:
        found = function(order.config, [drafter], list(prompts), order.target, order.out, progress=_shares(progress))
    told = ("temperature", "domain", "prompts", "acceptance_length", "speedup")
    return {"rows": [{name: row[name] for name in told} for row in found.to_json()["rows"]]}


def _export(function: Callable[..., Any], order: Order) -> dict[str, Any]:
    evaluation = order.parents.get("evaluation")
    function(order.config, order.parents["drafter"], order.out, order.target, evaluation=evaluation)
    return {}


def _shares(progress: Progress) -> Callable[[str, float], None]:
    return lambda text, done: progress.advance(int(done * SHARES) - progress.done, note=text)


CALIBRATED = ("calibrate", "run")
STAGES: dict[str, Stage] = {  # in the order of a whole run
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
        aside=True,
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
        aside=True,
        optional=frozenset({"evaluation"}),
    ),
}


# ------------------------------------------------------------------------------------------------ one stage


def opened(name: str, folders: Mapping[str, Path], target: str | None) -> dict[str, Artefact]:
    """The artefacts a stage reads, by role, checked. Raises ArtefactError."""
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
    """Make one stage's artefact, or go on with it, or find it finished. Raises ArtefactError and what the stage
    raises."""
    stage = STAGES[name]
    order = Order(config, parents, out, target, console, prompts)
    if not stage.leaves:
        stage.call(stage.function, order)
        return open_artefact(out, name)
    sources = {f"prompts {path.name}": file_hash(path) for path in prompts}
    with begin(out, name, config, parents=parents, sources=sources, target=target) as work:
        if not work.finished:
            facts = _aside(stage, order) if stage.aside else stage.call(stage.function, order)
            work.finish(stage.leaves, facts)
    return open_artefact(out, name)


def _aside(stage: Stage, order: Order) -> dict[str, Any]:
    """Let the function make its new directory beside what is there already, then move what it made."""
    making = order.out / ".making"
    shutil.rmtree(making, ignore_errors=True)  # what a killed process left
    facts = stage.call(stage.function, replace(order, out=making))
    for made in sorted(making.iterdir()):
        place = order.out / made.name
        if made.name == "provenance.json":
            continue  # the stage's own says the same and more
        if place.is_dir():
            shutil.rmtree(place)
        made.replace(place)
    shutil.rmtree(making)
    return facts
