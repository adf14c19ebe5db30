"""From what a user names to what runs: a target with its tokenizer, and a drafter that fits it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from outrider import registry
from outrider.checkpoints import load_calibration
from outrider.config import build, required, whole_number
from outrider.drafters.base import CalibratedDrafter, SeveralDrafters
from outrider.errors import CheckpointError, IncompatibleDrafter, InvalidRequest, nearest, reading_config
from outrider.files import read_json
from outrider.models.loading import (
    QUANTISED,
    load_backend,
    load_target,
    load_tokenizer,
    load_with_tokenizer,
    runs_natively,
)
from outrider.models.locations import EMBEDDED as MODELS
from outrider.models.locations import PACKAGED_DRAFTERS, SMOLLM2, resolve_model
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.guard import GuardedPolicy
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import Drafter, ReadsHidden, SchedulerPolicy, TargetModel

__all__ = ["EMBEDDED", "LoadedModel", "check_draft_tokens", "load_drafter", "load_model", "load_policy", "suggesting"]

EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A target, its tokenizer, and how it was asked for, so that a draft model can be loaded alike."""

    target: TargetModel
    tokenizer: Tokenizer
    name: str = ""  # "" for a target that the caller made
    dtype: str = "auto"
    backend: str = "auto"


def load_model(
    model: str | Path | TargetModel, *, dtype: str = "auto", backend: str = "auto", tokenizer: Tokenizer | None = None
) -> LoadedModel:
    """Raises CheckpointError for files that cannot be used, InvalidRequest for a ready target without a tokenizer."""
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise InvalidRequest(
            f"tokenizer must be an outrider.tokenization.tokenizer.Tokenizer, got {type(tokenizer).__name__}; "
            "Tokenizer(DIRECTORY) reads a model's own"
        )
    if isinstance(model, (str, Path)):
        with suggesting(str(model), "model", [*MODELS, SMOLLM2]):
            if tokenizer is not None:
                target = load_target(str(model), dtype=dtype, backend=backend)
            else:
                target, tokenizer = load_with_tokenizer(str(model), dtype=dtype, backend=backend)
        if not target.spec.eos_token_ids:  # the model's files name none
            ends = tuple(token for token in tokenizer.eos_token_ids if token < target.spec.vocab_size)
            target.spec = replace(target.spec, eos_token_ids=ends)
        return LoadedModel(target, tokenizer, str(model), dtype, backend)
    if not isinstance(model, TargetModel):
        raise InvalidRequest(f"model must be a name, a path or a loaded target, got {model!r}")
    if tokenizer is None:
        raise InvalidRequest("a loaded target needs its tokenizer: LLM(target, tokenizer=...)")
    return LoadedModel(model, tokenizer, "", dtype, backend)


@contextmanager
def suggesting(name: str, what: str, known: Iterable[str]) -> Iterator[None]:
    """An error about a name that is close to a known one suggests it: it was looked up on the hub as any other.

    Raises InvalidRequest for an empty name.
    """
    if not name.strip():
        raise InvalidRequest(f"the name of a {what} is empty; {nearest('', known)}, a directory or a hub id")
    try:
        yield
    except CheckpointError as error:
        hint = nearest(name.lower(), known)
        if "/" in name or name in known or Path(name).exists() or not hint.startswith("did you mean"):
            raise
        raise type(error)(f"there is no {what} {name!r}; {hint} ({error})") from error


def load_policy(
    name: str, options: Mapping[str, Any], drafter: Drafter, costs: CostModel | None = None, *, guard: bool = False
) -> SchedulerPolicy:
    """A policy by name, which drafts as much as the drafter can where the options do not say; ``auto`` is
    ``throughput``. ``costs``: what steps cost. ``guard``: never slower than plain decoding."""
    kind = registry.find("policy", "throughput" if name == "auto" else name)
    config = build(kind.Config, {"draft_tokens": drafter.block, **options}, f"policy {name!r}")
    costs = costs or CostModel()
    policy: SchedulerPolicy = kind.from_config(config, costs=costs)
    if not guard or not drafter.block:
        return policy
    return GuardedPolicy(policy, costs, takes_up=not drafter.aux_layers and not isinstance(drafter, ReadsHidden))


def load_drafter(
    drafter: str | Path | Drafter | Sequence[str | Path | Drafter],
    model: LoadedModel,
    options: Mapping[str, Any],
    *,
    max_rows: int,
) -> tuple[str, Drafter]:
    """A drafter by name, by the directory of a draft model or a trained drafter, or as it is: its name, and itself.
    Of several, each row takes the one that is best for it.

    ``options``: fields of the kind's ``Config``, and ``calibration``, a directory whose calibration.json its
    confidences go through; of several drafters, each one's by its name, and ``draft_tokens`` of all. Raises
    CheckpointError, IncompatibleDrafter, InvalidRequest, UnknownKind.
    """
    if isinstance(drafter, Drafter):
        return type(drafter).__name__, drafter
    if isinstance(drafter, (list, tuple)):
        return _load_several(drafter, model, options, max_rows=max_rows)
    if not isinstance(drafter, (str, Path)):
        raise InvalidRequest(f"drafter must be a name, a path or a drafter, got {drafter!r}; 'none' drafts nothing")
    options = dict(options)
    calibration = options.pop("calibration", None)
    if calibration is not None and not isinstance(calibration, (str, Path)):
        raise InvalidRequest(f"calibration must be a directory with a calibration.json, got {calibration!r}")
    name = str(drafter)
    packaged = PACKAGED_DRAFTERS.get(model.name, {})
    if name in packaged:
        options.setdefault("model", packaged[name])
    known = registry.names("drafter")
    if name not in known:
        with suggesting(name, "drafter", [*known, *MODELS, "auto"]):
            options["model"], name = name, _recognise(name)
    check_draft_tokens(options.get("draft_tokens"), model.target)
    if options.get("draft_tokens") == 0:
        name, options = "none", {}
    if name == "none":
        options.pop("draft_tokens", None)
    kind = registry.find("drafter", name)
    if "model" not in options and "model" in required(kind.Config):
        there = f"the packaged ones are {', '.join(packaged)}" if packaged else "it has no packaged drafters"
        raise InvalidRequest(
            f"{model.name or 'this target'} has no packaged {name} drafter: give the directory of a trained one "
            f"(--drafter DIRECTORY); {there}"
        )
    shared = "model" in options and _shares_tokenizer(str(options["model"]), model.tokenizer)
    made: Drafter = kind.from_config(
        build(kind.Config, options, f"drafter {name!r}"),
        model.target,
        load_target=lambda path, dtype: _load_draft_model(path, dtype, model),
        backend=load_backend(model.backend, model.dtype),
        max_rows=max_rows,
        tokens=model.tokenizer.vocab_size if shared else None,
    )
    return name, made if calibration is None else _calibrated(made, Path(calibration))


def check_draft_tokens(draft_tokens: Any, target: TargetModel) -> None:
    """Raises InvalidRequest for drafts that are no whole number, or more than the target's context; None is none."""
    if draft_tokens is not None and whole_number("draft_tokens", draft_tokens, 0) > target.spec.max_positions:
        raise InvalidRequest(
            f"draft_tokens must be at most the target's context of {target.spec.max_positions} tokens, "
            f"got {draft_tokens}; a handful is usual"
        )


def _load_several(
    drafters: Sequence[str | Path | Drafter], model: LoadedModel, options: Mapping[str, Any], *, max_rows: int
) -> tuple[str, Drafter]:
    names, own = [str(drafter) for drafter in drafters], dict(options)
    if not names:
        raise InvalidRequest("the list of drafters is empty; 'none' drafts nothing")
    if "auto" in names:
        raise InvalidRequest("'auto' chooses one drafter by itself; give it alone, or name the others alone")
    twice = [name for name in names if name and names.count(name) > 1]  # an empty name is refused as such
    if twice:
        raise InvalidRequest(f"drafter {twice[0]!r} was given twice")
    shared = {"draft_tokens": own.pop("draft_tokens")} if "draft_tokens" in own else {}
    unknown = [name for name, given in own.items() if name not in names or not isinstance(given, Mapping)]
    if unknown:
        raise InvalidRequest(
            f"several drafters share draft_tokens alone, got {unknown[0]!r}; options of one of them go under its name, "
            f"as in {{{names[0]!r}: {{...}}}}"
        )
    loaded = [
        load_drafter(drafter, model, {**shared, **own.get(name, {})}, max_rows=max_rows)
        for name, drafter in zip(names, drafters, strict=True)
    ]
    useful = [(name, made) for name, made in loaded if made.block]
    if len(useful) < 2:
        return useful[0] if useful else load_drafter("none", model, {}, max_rows=max_rows)
    return "+".join(name for name, _ in useful), SeveralDrafters([made for _, made in useful])


@runtime_checkable
class _Recognises(Protocol):
    """A kind of drafter that is told by the config.json of its directory."""

    def recognises(self, config: Mapping[str, Any]) -> bool: ...


def _recognise(path: str) -> str:
    """Which kind of drafter a directory holds, by the content of its config.json."""
    folder = resolve_model(path)
    if folder.is_file():  # a GGUF file
        return "draft_model"
    try:
        config = read_json(folder / "config.json")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: expected a drafter's name or a directory with config.json: {error}") from error
    with reading_config():
        for name in registry.names("drafter"):
            kind = registry.find("drafter", name)
            if isinstance(kind, _Recognises) and kind.recognises(config):
                return name
    raise CheckpointError(
        f"{path}: config.json, with architectures {config.get('architectures')!r}, describes no drafter this version "
        "knows; see `outrider models`. A trained drafter is told by its architectures, such as DFlashDraftModel, "
        "LlamaForCausalLMEagle3 or Qwen3DSparkModel, or by speculators_model_type; add them where they are missing"
    )


def _shares_tokenizer(path: str, tokenizer: Tokenizer) -> bool:
    """Whether a draft model has a tokenizer, which must be the target's; trained drafters come without one.

    Raises IncompatibleDrafter for another one.
    """
    folder = resolve_model(path)
    if not folder.is_file() and not (folder / "tokenizer.json").exists():
        return False
    if not load_tokenizer(path).same_as(tokenizer):
        raise IncompatibleDrafter(
            f"{path} has another vocabulary than the target; a draft model must share its tokenizer"
        )
    return True


def _load_draft_model(path: str, dtype: str, model: LoadedModel) -> TargetModel:
    if dtype == "auto" and runs_natively(path):
        dtype = "int8" if load_backend(model.backend, model.dtype).name == "native" else model.dtype
    elif dtype == "auto":  # Transformers runs it, which has no quantised dtypes
        dtype = "float32" if model.dtype in QUANTISED else model.dtype
    return load_target(path, dtype=dtype, backend=model.backend)


def _calibrated(drafter: Drafter, folder: Path) -> CalibratedDrafter:
    found = load_calibration(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no calibration.json; `outrider calibrate` makes one")
    return CalibratedDrafter(drafter, found)
