"""speculators' files, the form that vLLM loads: the decoder's config apart, layers counted with the embedding as 0.

https://github.com/vllm-project/speculators, ``src/speculators/models/{dflash,dspark,eagle3,mtp}/config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import (
    AutoregressiveDesign,
    BlockDesign,
    Design,
    DraftCheckpoint,
    ModuleDesign,
    TargetFacts,
)
from outrider.checkpoints.stack_format import known_keys, refuse_unknown, require, require_layers
from outrider.errors import CheckpointError, nearest

__all__ = ["matches", "read", "write"]

VERSION = "0.9.0"  # of the package whose files these are
KINDS = ("dflash", "dspark", "eagle3", "mtp")
CLASSES = {"dflash": "DFlash", "dspark": "DSpark", "eagle3": "Eagle3", "mtp": "MTP"}
SHARED_KEYS = {"architectures", "speculators_model_type", "speculators_version", "speculators_config"}
SHARED_KEYS |= {"transformer_layer_config", "draft_vocab_size", "target_hidden_size", "tie_word_embeddings"}
BLOCK_KEYS = {
    "block_size",
    "aux_hidden_state_layer_ids",
    "mask_token_id",
    "sample_from_anchor",
    "sliding_window_non_causal",
}
HEAD_KEYS = {"markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"}
CHAIN_KEYS = {
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "eagle_aux_hidden_state_layer_ids",
    "embed_requires_grad",
}
MODULE_KEYS = {"num_nextn_predict_layers", "aux_hidden_state_layer_ids"}
OWN_KEYS = {
    "dflash": BLOCK_KEYS,
    "dspark": BLOCK_KEYS | HEAD_KEYS,
    "eagle3": CHAIN_KEYS,
    "mtp": MODULE_KEYS,
}
EXTRAS = {
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "num_target_layers",
    "num_anchors",
}
EXTRAS |= {"step_loss_decay", "target_model_type", "target_text_model_type", "speculators_version"}
"""Keys that change nothing in the computation; some are DeepSpec's, carried so that nothing is lost on the way back."""


def matches(config: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in config


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    kind = require(config, "speculators_model_type", str)
    if kind not in KINDS:
        raise CheckpointError(f"speculators_model_type {kind!r} is not supported; {nearest(kind, KINDS)}")
    refuse_unknown(config, SHARED_KEYS | OWN_KEYS[kind] | EXTRAS)
    decoder = require(config, "transformer_layer_config", dict)
    refuse_unknown(decoder, known_keys(require(decoder, "model_type", str)), "transformer_layer_config")
    section = require(config, "speculators_config", dict)
    verifier = section.get("verifier") or {}
    vocabulary, width = require(decoder, "vocab_size"), require(decoder, "hidden_size")
    layers_key = "eagle_aux_hidden_state_layer_ids" if kind == "eagle3" else "aux_hidden_state_layer_ids"
    if kind == "mtp" and config.get(layers_key) is None:
        raise CheckpointError(
            "this MTP module reads the target's last hidden state, which is ambiguous (before or after the last norm); "
            f"expected {layers_key} to name an earlier layer"
        )
    layers = (
        None if config.get(layers_key) is None else tuple(layer - 1 for layer in require_layers(config, layers_key))
    )
    architectures = verifier.get("architectures") or [None]
    return DraftCheckpoint(
        design=_design(kind, config, section, decoder),
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
        extras={key: config[key] for key in sorted(EXTRAS & set(config))},
    )


def _design(kind: str, config: Mapping[str, Any], section: Mapping[str, Any], decoder: Mapping[str, Any]) -> Design:
    if kind == "eagle3":
        return AutoregressiveDesign(
            depth=_speculative_tokens(section),
            norm_before_residual=bool(config.get("norm_before_residual")),
            norm_before_fc=bool(config.get("norm_before_fc")),
            norm_each_before_fc=bool(config.get("fc_norm")),
            norm_output=bool(config.get("norm_output")),
        )
    if kind == "mtp":
        return ModuleDesign(depth=_speculative_tokens(section))
    if "sliding_attention" in (decoder.get("layer_types") or ()) and not config.get("sliding_window_non_causal"):
        raise CheckpointError("sliding-window layers that are causal inside the block are not supported")
    dspark = kind == "dspark"
    confidence = dspark and bool(config.get("enable_confidence_head", True))
    return BlockDesign(
        block_size=require(config, "block_size"),
        mask_token_id=require(config, "mask_token_id"),
        sample_from_anchor=bool(config.get("sample_from_anchor", dspark)),
        markov_rank=config.get("markov_rank", 256) if dspark else 0,
        markov_head=config.get("markov_head_type", "vanilla"),
        confidence=confidence,
        confidence_with_markov=confidence and bool(config.get("confidence_head_with_markov", True)),
    )


def _speculative_tokens(section: Mapping[str, Any]) -> int:
    methods = section.get("proposal_methods")
    if not methods:
        raise CheckpointError("speculators_config has no proposal_methods; the number of drafted tokens is not known")
    return int(require(methods[0], "speculative_tokens"))


def write(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    """Raises CheckpointError where the target's layers are not known."""
    design, target = checkpoint.design, checkpoint.target
    if checkpoint.target_layers is None:
        raise CheckpointError(
            "speculators' config names the target's layers, which this checkpoint does not; name the target"
        )
    kind = design.kind
    if isinstance(design, BlockDesign) and design.sample_from_anchor:
        kind = "dspark"  # vLLM's dflash never samples from the anchor
    layers = [layer + 1 for layer in checkpoint.target_layers]
    config: dict[str, Any] = {key: value for key, value in checkpoint.extras.items() if key in EXTRAS}
    if target.num_layers is not None:
        config["num_target_layers"] = target.num_layers
    config |= {
        "architectures": [f"{CLASSES[kind]}DraftModel"],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": design.drafts,
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
    if isinstance(design, AutoregressiveDesign):
        return config | {
            "eagle_aux_hidden_state_layer_ids": layers,
            "norm_before_residual": design.norm_before_residual,
            "norm_before_fc": design.norm_before_fc,
            "fc_norm": design.norm_each_before_fc,
            "norm_output": design.norm_output,
            "embed_requires_grad": not checkpoint.frozen_embedding,
        }
    config["aux_hidden_state_layer_ids"] = layers
    if isinstance(design, ModuleDesign):
        return config | {"num_nextn_predict_layers": 1}
    config |= {
        "block_size": design.block_size,
        "mask_token_id": design.mask_token_id,
        "sample_from_anchor": design.sample_from_anchor,
        "sliding_window_non_causal": "sliding_attention" in (checkpoint.decoder.get("layer_types") or ()),
    }
    if kind == "dspark":
        config |= {
            "markov_rank": design.markov_rank,
            "markov_head_type": design.markov_head,
            "enable_confidence_head": design.confidence,
            "confidence_head_with_markov": design.confidence_with_markov,
        }
    return config
