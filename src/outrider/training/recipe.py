"""Recipes: one TOML file that describes how a drafter is made, from prompts to the exported folder.

    target = "my-model"                       # a directory, a hub id, or "embedded"
    out = "runs/my-model"                     # one directory per stage; paths are relative to this file
    shared = "runs/my-answers"                # optional: prompts and answers shared by several recipes

    [prompts]
    sources = [{ path = "questions.jsonl" }]

    [run]
    kind = "dspark"

Every section holds fields of its stage's ``Config`` and may be left out where the defaults suffice; ``skip`` lists
stages to leave out. Finished stages are not run again, an interrupted one resumes.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.console import Console

from outrider.errors import InvalidRequest, nearest
from outrider.models.loading import model_config
from outrider.models.locations import beside, resolve_model
from outrider.models.weights import load_dtype
from outrider.training.artefact import Artefact, is_finished, read_lines
from outrider.training.fit_calibration import LEAST_PROMPTS
from outrider.training.networks import training_of
from outrider.training.prompts import Config as Prompts
from outrider.training.prompts import count_turns, expected_turns, from_files
from outrider.training.regenerate import sampling
from outrider.training.stages import STAGES, make, opened, sources_of
from outrider.types import readable_layers

__all__ = ["Recipe", "changed", "check_held_out", "check_target", "configure", "read_recipe", "run_recipe"]

SKIPPABLE = ("calibrate", "eval", "export")
ON_REQUEST = ("features",)  # stages that run only if the recipe has their section
SHARED = ("prompts", "regenerate")  # stages that do not depend on the drafter
KEYS = ("target", "out", "shared", "skip", "eval_prompts", *STAGES)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe."""

    target: str
    out: Path
    configs: Mapping[str, BaseModel]
    """By stage, in order, without the skipped ones."""
    eval_prompts: tuple[Path, ...] = ()
    """Prompt sets of ``eval``; empty: the held-out prompts."""
    shared: Path | None = None
    """Directory of prompts and answers, if not ``out``."""

    def path(self, name: str) -> Path:
        """A stage's directory."""
        return (self.shared if self.shared is not None and name in SHARED else self.out) / name

    def stages(self, until: str | None = None) -> list[str]:
        """Names in order, up to ``until``. Raises InvalidRequest for an unknown or skipped one."""
        names = list(self.configs)
        if until is not None and until not in names:
            raise InvalidRequest(f"--until: the recipe makes no stage {until!r}; {nearest(until, names)}")
        return names if until is None else names[: names.index(until) + 1]

    def folders(self, name: str) -> dict[str, Path]:
        """The directories that a stage reads, by role: of the preferred stage that is part of the recipe."""
        stage = STAGES[name]
        chosen = {role: next((k for k in kinds if k in self.configs), None) for role, kinds in stage.parents.items()}
        return {role: self.path(kind) for role, kind in chosen.items() if kind is not None}

    def finished(self, name: str) -> bool:
        """Whether a stage is finished. Raises ArtefactError where it was begun with other settings."""
        config, prompts = self.configs[name], self.eval_prompts if name == "eval" else ()
        parents, sources = self.folders(name), sources_of(name, config, prompts)
        return is_finished(self.path(name), name, config, target=self.target, parents=parents, sources=sources)


def configure(name: str, values: Mapping[str, Any], where: str, folder: Path | None = None) -> BaseModel:
    """A stage's ``Config``; ``where`` begins error messages.

    Raises InvalidRequest, for an unknown key with the nearest known one.
    """
    kind = STAGES[name].config
    try:
        config = kind.model_validate(dict(values), context=None if folder is None else {"folder": folder})
    except ValidationError as error:
        raise InvalidRequest(f"{where}: {_explain(kind, error)}") from None
    _check_drafter(config, where)
    if name != "export":  # whose dtype is how the drafter is stored
        _check_dtype(getattr(config, "dtype", "auto"), where)
    return config


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first error, in one line."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a misspelt key is also missing
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model: Any = kind
        for part in first["loc"][:-1]:
            if isinstance(part, str):
                model = next((a for a in _models(model.model_fields[part].annotation)), model)
        return f"unknown key {key!r}; {nearest(str(first['loc'][-1]), model.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message[:1].lower()}{message[1:]}, got {_short(first['input'])}" if key else message


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Pydantic models inside a type such as ``tuple[Source, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_drafter(config: BaseModel, where: str) -> None:
    """Refuse wrong drafter options now, not after hours of generating answers."""
    kind, options = getattr(config, "kind", None), getattr(config, "drafter", None)
    if isinstance(kind, str) and isinstance(options, Mapping):
        training_of(kind, options, f"{where} ")


def _check_dtype(dtype: str, where: str) -> None:
    if dtype != "auto":
        try:
            load_dtype(dtype)
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: dtype: {error}") from None


def _layers_read(drafter: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The option that names target layers of a drafter, and those it names."""
    if drafter.get("target_layer") is not None:
        return "target_layer", (drafter["target_layer"],)
    return "target_layers", tuple(drafter.get("target_layers") or ())


def _check_features(configs: Mapping[str, Any], path: Path) -> None:
    """Refuse features that training cannot read, where the recipe names what it reads."""
    if "features" not in configs:
        return
    option, layers = _layers_read(configs["run"].drafter)
    if layers and configs["features"].layers != layers:
        raise InvalidRequest(
            f"{path}: [features] layers are {list(configs['features'].layers)}, but the drafter of [run] reads "
            f"{option} {list(layers)}; give the same"
        )
    lengths = [configs[name].length for name in ("features", "run")]
    if lengths[0] != lengths[1]:
        raise InvalidRequest(
            f"{path}: [features] length is {lengths[0]}, but [run] reads texts of length {lengths[1]}; give the same"
        )


def read_recipe(path: Path, changes: Iterable[str] = (), out: Path | None = None) -> Recipe:
    """Read and check a whole recipe. ``changes`` are ``section.key=value`` with TOML values (bare words are strings).

    Raises InvalidRequest, CheckpointError for a target that is not there.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read the recipe {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{path} is not TOML: {error}") from None
    values = changed(values, changes)
    for key, value in values.items():
        if key not in KEYS:
            raise InvalidRequest(f"{path}: unknown key {key!r}; {nearest(key, KEYS)}")
        if (key in STAGES) != isinstance(value, dict):
            raise InvalidRequest(f"{path}: {key} must be {'a section' if key in STAGES else 'no section'}")
    skip = values.get("skip", [])
    if not isinstance(skip, list) or any(name not in SKIPPABLE for name in skip):
        raise InvalidRequest(f"{path}: skip may list {', '.join(SKIPPABLE)}, got {_short(skip)}")
    for key, kind in (("target", str), ("out", str), ("shared", str), ("eval_prompts", list)):
        if not isinstance(values.get(key, kind()), kind):
            raise InvalidRequest(f"{path}: {key} must be a {kind.__name__}, got {_short(values[key])}")
    if not values.get("target") or "prompts" not in values or not (out or values.get("out")):
        raise InvalidRequest(f"{path}: a recipe needs target, out (or --out), and a [prompts] section with sources")
    configs = {
        name: configure(name, values.get(name, {}), f"{path} [{name}]", path.parent)
        for name in STAGES
        if name not in skip and (name in values or name not in ON_REQUEST)
    }
    _check_features(configs, path)
    target = beside(values["target"], path.parent)
    resolve_model(target)
    prompts = tuple(path.parent / str(file) for file in values.get("eval_prompts", []))
    for file in prompts:
        if not file.is_file():
            raise InvalidRequest(f"{path}: eval_prompts: no such file: {file}")
    shared = path.parent / values["shared"] if "shared" in values else None
    return Recipe(target, out or path.parent / values["out"], configs, prompts, shared)


def changed(values: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """A copy of ``values`` with ``key.key=value`` changes applied. Raises InvalidRequest."""
    copy = deepcopy(dict(values))
    for change in changes:
        _change(copy, change)
    return copy


def _change(values: dict[str, Any], change: str) -> None:
    name, separator, text = change.partition("=")
    keys = name.strip().split(".")
    if not separator or not all(keys):
        raise InvalidRequest(f"--set: expected KEY=VALUE, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise InvalidRequest(f"--set {change}: {key} is not a section")
    values[keys[-1]] = value


def check_target(recipe: Recipe) -> None:
    """Refuse what does not fit the target, as far as its config says. Raises InvalidRequest, CheckpointError."""
    configs: Mapping[str, Any] = recipe.configs
    sampling(configs["regenerate"], recipe.target)
    config = model_config(recipe.target)
    count: Any = (config.get("text_config") or config).get("num_hidden_layers")
    vocabulary: Any = (config.get("text_config") or config).get("vocab_size")
    for option, least, most in (("mask_token_id", 0, -1), ("draft_vocab", 1, 0)):
        value = configs["run"].drafter.get(option)
        if value is not None and vocabulary is not None and not least <= value <= vocabulary + most:
            raise InvalidRequest(
                f"[run] {option} must be {least} to {vocabulary + most}, as the target has {vocabulary} tokens; "
                f"got {value}"
            )
    option, read = _layers_read(configs["run"].drafter)
    named = {f"[run] {option}": read}
    if "features" in configs:
        named["[features] layers"] = configs["features"].layers
    for where, layers in named.items():
        wrong = [layer for layer in layers if count is not None and layer not in readable_layers(count)]
        if wrong:
            raise InvalidRequest(
                f"{where}: layer {wrong[0]} cannot be read; of the target's {count} layers those from 0 to {count - 2} "
                "can, and -1, the embedding"
            )


def check_held_out(recipe: Recipe, stages: Sequence[str]) -> None:
    """Refuse prompts of which too few are held out for stages to come, before they are made where that can be told,
    so that other settings can still be given; else before training.

    Raises InvalidRequest, and the errors of reading the prompts.
    """
    needed = {"calibrate": LEAST_PROMPTS, "eval": 0 if recipe.eval_prompts else 1}
    if not any(needed.get(name) for name in stages):
        return
    made, config = recipe.finished("prompts"), recipe.configs["prompts"]
    assert isinstance(config, Prompts)
    if made:
        count = count_turns(read_lines(recipe.path("prompts") / "held_out.jsonl")).total()
    else:
        count = expected_turns(config, from_files(config))["held_out"].total()
    short = [name for name in stages if count < needed.get(name, 0)]
    if short:
        first = f"remove {recipe.path('prompts')}, then " if made else ""
        raise InvalidRequest(
            f"{' and '.join(short)} need at least {needed[short[0]]} held-out prompts, there are {count}: "
            f"{first}give more prompts, a larger share (prompts.held_out), or a source with split = 'held_out'; or "
            f"leave the stages out (skip = {json.dumps(short)})"
        )


def run_recipe(recipe: Recipe, until: str | None = None, console: Console | None = None) -> dict[str, Artefact]:
    """Run every stage in order. Raises a stage's errors; the same call then resumes."""
    check_target(recipe)  # refused now, not after prompts
    check_held_out(recipe, recipe.stages(until))
    made: dict[str, Artefact] = {}
    for name in recipe.stages(until):
        out = recipe.path(name)
        parents = opened(name, recipe.folders(name), recipe.target)
        prompts: Sequence[Path] = recipe.eval_prompts if name == "eval" else ()
        if console is not None:
            console.print(f"[bold]{name}[/bold]  {out}")
        made[name] = make(
            name, recipe.configs[name], parents, out, recipe.target, prompts=tuple(prompts), console=console
        )
        if name == "prompts":
            check_held_out(recipe, recipe.stages(until))
    return made
