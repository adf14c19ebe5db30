"""speculators' files, the form that vLLM loads: the decoder's config apart, layers counted with the embedding as 0.

https://github.com/vllm-project/speculators, ``src/speculators/models/{dflash,dspark,eagle3,mtp}/config.py``. A form's
tag is the ``speculators_model_type``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import DraftCheckpoint, TargetFacts
from outrider.checkpoints.forms import form_to_write, forms
from outrider.checkpoints.stack_format import known_keys, layer_kinds, refuse_unknown, require, require_layers
from outrider.errors import CheckpointError, nearest

__all__ = ["drafted_tokens", "matches", "named_layers", "read", "read_layers", "slides", "write", "write_layers"]

VERSION = "0.9.0"  # of the package whose files these are
CLASSES = {"dflash": "DFlash", "dspark": "DSpark", "eagle3": "Eagle3", "mtp": "MTP"}
SHARED_KEYS = {"architectures", "speculators_model_type", "speculators_version", "speculators_config"}
SHARED_KEYS |= {"transformer_layer_config", "draft_vocab_size", "target_hidden_size", "tie_word_embeddings"}
EXTRAS = {"auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "num_target_layers"}
EXTRAS |= {"target_model_type", "target_text_model_type", "speculators_version", "use_cache"}
EXTRAS |= {"has_no_defaults_at_init", "base_model_ep_plan", "base_model_pp_plan", "base_model_tp_plan"}
"""Keys that change nothing in the computation; some are DeepSpec's, kept so that nothing is lost on the way back."""


def matches(config: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in config


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    kind, known = require(config, "speculators_model_type", str), forms("speculators")
    if kind not in known:
        raise CheckpointError(f"speculators_model_type {kind!r} is not supported; {nearest(kind, known)}")
    form = known[kind]
    extras = EXTRAS | form.extras
    refuse_unknown(config, SHARED_KEYS | form.keys | extras)
    decoder = require(config, "transformer_layer_config", dict)
    refuse_unknown(decoder, known_keys(require(decoder, "model_type", str)), "transformer_layer_config")
    verifier = require(config, "speculators_config", dict).get("verifier") or {}
    vocabulary, width = require(decoder, "vocab_size"), require(decoder, "hidden_size")
    layers = form.layers(config)
    architectures = verifier.get("architectures") or [None]
    return DraftCheckpoint(
        design=form.read(config),
        decoder=dict(decoder),
        target_layers=layers,
        target=TargetFacts(
            hidden_size=config.get("target_hidden_size") or width,
            num_layers=config.get("num_target_layers"),
            name=verifier.get("name_or_path"),
            architecture=architectures[0],
        ),
        draft_vocab_size=config.get("draft_vocab_size") or vocabulary,
        format="speculators",
        frozen_embedding=not config.get("embed_requires_grad", False),
        extras={key: config[key] for key in sorted(extras & set(config))},
    )


def write(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    """Raises CheckpointError for a design that speculators has no form for, and where the target's layers are not
    known."""
    form, target = form_to_write("speculators", checkpoint.design), checkpoint.target
    extras = EXTRAS | form.extras
    config: dict[str, Any] = {key: value for key, value in checkpoint.extras.items() if key in extras}
    if target.num_layers is not None:
        config["num_target_layers"] = target.num_layers
    assert form.write is not None
    return config | form.write(checkpoint) | _envelope(checkpoint, form.tag)


def _envelope(checkpoint: DraftCheckpoint, kind: str) -> dict[str, Any]:
    """What the files of all designs hold."""
    target = checkpoint.target
    return {
        "architectures": [f"{CLASSES.get(kind, kind.title())}DraftModel"],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": checkpoint.design.drafts,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": target.name,
                "architectures": [target.architecture] if target.architecture else [],
            },
        },
        "transformer_layer_config": dict(checkpoint.decoder),
        "draft_vocab_size": checkpoint.draft_vocab_size,
        "target_hidden_size": None if target.hidden_size == checkpoint.hidden_size else target.hidden_size,
        "tie_word_embeddings": False,
    }


# ------------------------------------------------------------------------------------------------ what designs use


def named_layers(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Target layers counted from 0, from a list that counts the embedding as 0. Raises CheckpointError without one."""
    return tuple(layer - 1 for layer in require_layers(config, key))


def read_layers(config: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """The same; None where there is no list."""
    return None if config.get(key) is None else named_layers(config, key)


def write_layers(checkpoint: DraftCheckpoint) -> list[int]:
    """The checkpoint's target layers, the embedding counted as 0. Raises CheckpointError where they are not known."""
    if checkpoint.target_layers is None:
        raise CheckpointError(
            "speculators' config names the target's layers, which this checkpoint does not; name the target"
        )
    return [layer + 1 for layer in checkpoint.target_layers]


def drafted_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that a round proposes."""
    methods = require(config, "speculators_config", dict).get("proposal_methods")
    if not methods:
        raise CheckpointError("speculators_config has no proposal_methods; the number of drafted tokens is not known")
    return int(require(methods[0], "speculative_tokens"))


def slides(decoder: Mapping[str, Any]) -> bool:
    """Whether a decoder has sliding-window layers."""
    return "sliding_attention" in layer_kinds(decoder)
