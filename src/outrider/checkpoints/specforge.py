"""SpecForge's files: a Hugging Face config of the drafter's own layers; a form's tag is the architecture.

https://github.com/sgl-project/SpecForge, ``specforge/modeling/draft/{llama3_eagle,dflash,dspark}.py``. None holds an
embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import DraftCheckpoint, Form, TargetFacts
from outrider.checkpoints.forms import forms
from outrider.checkpoints.stack_format import known_keys, refuse_unknown, require, require_layers, spread_layers

__all__ = ["matches", "read", "spread_or_named"]

SHARED_KEYS = {"architectures", "target_hidden_size"}
EXTRAS = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def matches(config: Mapping[str, Any]) -> bool:
    return _form(config) is not None


def _form(config: Mapping[str, Any]) -> Form | None:
    kinds = config.get("architectures") or ()
    for tag, form in forms("specforge").items():
        if tag in kinds and (form.section is None or isinstance(config.get(form.section), Mapping)):
            return form
    return None


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    form = _form(config)
    assert form is not None
    own = SHARED_KEYS | form.keys
    refuse_unknown(config, own | known_keys(require(config, "model_type", str)))
    return DraftCheckpoint(
        design=form.read(config),
        decoder={key: value for key, value in config.items() if key not in own | EXTRAS},
        target_layers=form.layers(config),
        target=TargetFacts(
            hidden_size=config.get("target_hidden_size") or require(config, "hidden_size"),
            num_layers=config.get("num_target_layers"),
        ),
        draft_vocab_size=config.get("draft_vocab_size") or require(config, "vocab_size"),
        format="specforge",
        extras={key: config[key] for key in sorted(EXTRAS & set(config))},
    )


def spread_or_named(config: Mapping[str, Any], section: Mapping[str, Any]) -> tuple[int, ...]:
    """The ``target_layer_ids`` of a section, counted from 0; where it has none, layers spread over the target."""
    count = require(config, "num_target_layers")
    if "target_layer_ids" in section:
        return require_layers(section, "target_layer_ids")
    return spread_layers(count, require(config, "num_hidden_layers"))
