"""Outrider's own files, which hold every design of the catalogue by its fields. Tensors are named as elsewhere.

    {"outrider_drafter": kind, "design": {...}, "decoder": {...}, "target": {...}, "target_layers": [0, ...] | null,
     "draft_vocab_size": n, "frozen_embedding": bool, "extras": {...}}

``decoder`` is the Hugging Face config of the drafter's layers, or of its target's where it has none. Layers are counted
from 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, TypeVar, cast

from outrider import registry
from outrider.checkpoints.checkpoint import Design, DraftCheckpoint, TargetFacts
from outrider.checkpoints.stack_format import known_keys, refuse_unknown, require
from outrider.errors import CheckpointError, nearest

__all__ = ["matches", "read", "write"]

KEY = "outrider_drafter"
KEYS = {KEY, "design", "decoder", "target", "target_layers", "draft_vocab_size", "frozen_embedding", "extras"}

T = TypeVar("T")


def matches(config: Mapping[str, Any]) -> bool:
    return KEY in config


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    """Raises CheckpointError, for a kind that is not in the catalogue with the nearest one that is."""
    kind, known = require(config, KEY, str), registry.names("design")
    if kind not in known:
        raise CheckpointError(f"{KEY} {kind!r} is not installed here; {nearest(kind, known)}")
    refuse_unknown(config, KEYS)
    decoder = require(config, "decoder", dict)
    refuse_unknown(decoder, known_keys(require(decoder, "model_type", str)), "decoder")
    layers = config.get("target_layers")
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise CheckpointError(f"config.json: target_layers must be a list of layer numbers or null, got {layers!r}")
    return DraftCheckpoint(
        design=_build(cast(type[Design], registry.find("design", kind)), require(config, "design", dict), "design"),
        decoder=dict(decoder),
        target_layers=None if layers is None else tuple(layers),
        target=_build(TargetFacts, require(config, "target", dict), "target"),
        draft_vocab_size=require(config, "draft_vocab_size"),
        format="outrider",
        frozen_embedding=require(config, "frozen_embedding", bool),
        extras=require(config, "extras", dict),
    )


def write(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    design: Any = checkpoint.design
    return {
        KEY: design.kind,
        "design": asdict(design),
        "decoder": dict(checkpoint.decoder),
        "target": asdict(checkpoint.target),
        "target_layers": None if checkpoint.target_layers is None else list(checkpoint.target_layers),
        "draft_vocab_size": checkpoint.draft_vocab_size,
        "frozen_embedding": checkpoint.frozen_embedding,
        "extras": dict(checkpoint.extras),
    }


def _build(kind: type[T], values: Mapping[str, Any], section: str) -> T:
    """A dataclass from JSON values of exactly its fields' types. Raises CheckpointError."""
    from pydantic import TypeAdapter, ValidationError

    assert is_dataclass(kind), f"{kind.__name__} must be a dataclass"
    refuse_unknown(values, [field.name for field in fields(kind)], section)
    for field in fields(kind):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise CheckpointError(f"config.json: {section} has no {field.name!r}")
    try:
        made: T = TypeAdapter(kind).validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(problem := first.get("ctx", {}).get("error"), CheckpointError):
            raise problem from None
        name = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"config.json: {section}.{name}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}"
        ) from None
    return made
