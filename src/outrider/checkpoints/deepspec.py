"""DeepSpec's files: the target's Hugging Face config with the drafter's keys among its own.

https://github.com/deepseek-ai/DeepSpec, ``deepspec/modeling/{dspark,eagle3}/{qwen3,gemma4}/config.py``. A form's tag is
the architecture without its family: ``DSparkModel`` for ``Qwen3DSparkModel`` and ``Gemma4DSparkModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import DraftCheckpoint, Form, TargetFacts
from outrider.checkpoints.forms import form_to_write, forms
from outrider.checkpoints.stack_format import GEMMA4, known_keys, refuse_unknown, require, require_layers
from outrider.errors import CheckpointError

__all__ = ["SUFFIX", "matches", "read", "write"]

SUFFIX = "Model"
FAMILIES = ("Qwen3", "Gemma4")
SHARED_KEYS = {"architectures", "num_target_layers", "target_layer_ids", "target_model_type", "target_text_model_type"}
EXTRAS = {
    "target_model_type",
    "target_text_model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
}
"""Keys that change nothing in the computation."""


def matches(config: Mapping[str, Any]) -> bool:
    return _form(config) is not None


def _form(config: Mapping[str, Any]) -> Form | None:
    kinds = {kind for kind in config.get("architectures") or () if isinstance(kind, str)}
    return next((form for tag, form in forms("deepspec").items() if kinds & {f + tag for f in FAMILIES}), None)


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    form = _form(config)
    assert form is not None
    own, extras = form.keys | form.extras | SHARED_KEYS, EXTRAS | form.extras
    refuse_unknown(config, own | known_keys(require(config, "model_type", str)))
    return DraftCheckpoint(
        design=form.read(config),
        decoder={key: value for key, value in config.items() if key not in own | extras},
        target_layers=require_layers(config, "target_layer_ids"),
        target=TargetFacts(
            hidden_size=require(config, "hidden_size"),
            num_layers=require(config, "num_target_layers"),
            name=config.get("target_model_name_or_path"),
            architecture="Gemma4ForCausalLM" if config["model_type"] in GEMMA4 else "Qwen3ForCausalLM",
        ),
        draft_vocab_size=require(config, "vocab_size"),
        format="deepspec",
        extras={key: config[key] for key in sorted(extras & set(config))},
    )


def write(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    """Raises CheckpointError for a design, a vocabulary or options that DeepSpec has no key for, and without embedding
    and head, which DeepSpec would fill with random values."""
    decoder, target = dict(checkpoint.decoder), checkpoint.target
    form = form_to_write("deepspec", checkpoint.design)
    if checkpoint.reduced:
        raise CheckpointError(
            "DeepSpec has no reduced draft vocabulary; this drafter can only be written as speculators"
        )
    missing = [name for name in ("embed.weight", "head.weight") if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"DeepSpec's files hold embedding and head; here the target has {' and '.join(missing)}: name the target"
        )
    if checkpoint.target_layers is None or target.num_layers is None:
        raise CheckpointError(
            "DeepSpec's config names the target's layers, which this checkpoint does not; name the target"
        )
    family, extras = _family(decoder), EXTRAS | form.extras
    config = {**decoder, **{key: value for key, value in checkpoint.extras.items() if key in extras}}
    config |= {"num_target_layers": target.num_layers, "target_layer_ids": list(checkpoint.target_layers)}
    assert form.write is not None
    return config | {"architectures": [family + form.tag]} | form.write(checkpoint)


def _family(decoder: Mapping[str, Any]) -> str:
    kind = require(decoder, "model_type", str)
    if kind == "qwen3":
        return "Qwen3"
    if kind in GEMMA4:
        return "Gemma4"
    raise CheckpointError(
        f"DeepSpec's decoders are qwen3 and gemma4_text, this drafter's is {kind!r}; write it as speculators"
    )
