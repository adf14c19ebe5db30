"""DeepSpec's files: the target's Hugging Face config with the drafter's keys among its own.

https://github.com/deepseek-ai/DeepSpec, ``deepspec/modeling/{dspark,eagle3}/{qwen3,gemma4}/config.py``. Its DFlash is a
DSpark with ``markov_rank`` 0 and no confidence head; the anchor's slot predicts in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import AutoregressiveDesign, BlockDesign, DraftCheckpoint, TargetFacts
from outrider.checkpoints.stack_format import GEMMA4, known_keys, refuse_unknown, require, require_layers
from outrider.errors import CheckpointError

__all__ = ["matches", "read", "write"]

BLOCKS = ("Qwen3DSparkModel", "Gemma4DSparkModel")
CHAINS = ("Qwen3Eagle3Model", "Gemma4Eagle3Model")
SHARED_KEYS = {"architectures", "num_target_layers", "target_layer_ids", "target_model_type", "target_text_model_type"}
BLOCK_KEYS = {"block_size", "mask_token_id", "num_anchors", "enable_confidence_head", "markov_rank"}
BLOCK_KEYS |= {"confidence_head_with_markov", "markov_head_type"}
CHAIN_KEYS = {"ttt_length", "step_loss_decay", "draft_num_hidden_layers", "target_model_name_or_path"}
EXTRAS = {
    "target_model_type",
    "target_text_model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
}
"""Keys that change nothing in the computation, beside one of each kind's own."""
BLOCK_EXTRAS, CHAIN_EXTRAS = EXTRAS | {"num_anchors"}, EXTRAS | {"step_loss_decay"}


def matches(config: Mapping[str, Any]) -> bool:
    return bool({*BLOCKS, *CHAINS} & set(config.get("architectures") or ()))


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    chain = config["architectures"][0] in CHAINS
    own, extras = (CHAIN_KEYS, CHAIN_EXTRAS) if chain else (BLOCK_KEYS, BLOCK_EXTRAS)
    own = own | SHARED_KEYS
    refuse_unknown(config, own | known_keys(require(config, "model_type", str)))
    design = _chain(config) if chain else _block(config)
    return DraftCheckpoint(
        design=design,
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


def _block(config: Mapping[str, Any]) -> BlockDesign:
    rank, confidence = require(config, "markov_rank"), require(config, "enable_confidence_head", bool)
    return BlockDesign(
        block_size=require(config, "block_size"),
        mask_token_id=require(config, "mask_token_id"),
        sample_from_anchor=True,
        markov_rank=rank,
        markov_head=require(config, "markov_head_type", str) if rank else "vanilla",
        confidence=confidence,
        confidence_with_markov=require(config, "confidence_head_with_markov", bool) if confidence else False,
    )


def _chain(config: Mapping[str, Any]) -> AutoregressiveDesign:
    return AutoregressiveDesign(depth=require(config, "ttt_length"))


def write(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    """Raises CheckpointError for a reduced vocabulary, options or an anchor layout that DeepSpec has no key for, and
    without the embedding and the head, which it would otherwise make up at random."""
    design, decoder, target = checkpoint.design, dict(checkpoint.decoder), checkpoint.target
    missing = [name for name in ("embed.weight", "head.weight") if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"DeepSpec's files hold embedding and head; here the target has {' and '.join(missing)}: name the target"
        )
    if checkpoint.reduced:
        raise CheckpointError(
            "DeepSpec has no reduced draft vocabulary; this drafter can only be written as speculators"
        )
    if checkpoint.target_layers is None or target.num_layers is None:
        raise CheckpointError(
            "DeepSpec's config names the target's layers, which this checkpoint does not; name the target"
        )
    family = _family(decoder)
    extras = BLOCK_EXTRAS if isinstance(design, BlockDesign) else CHAIN_EXTRAS
    config = {**decoder, **{key: value for key, value in checkpoint.extras.items() if key in extras}}
    config |= {"num_target_layers": target.num_layers, "target_layer_ids": list(checkpoint.target_layers)}
    if isinstance(design, BlockDesign):
        if not design.sample_from_anchor:
            raise CheckpointError(
                "DeepSpec's blocks draft from the anchor's slot, this drafter's do not; write it as speculators"
            )
        config |= {
            "architectures": [f"{family}DSparkModel"],
            "block_size": design.block_size,
            "mask_token_id": design.mask_token_id,
            "num_anchors": checkpoint.extras.get("num_anchors", 512),
            "markov_rank": design.markov_rank,
            "enable_confidence_head": design.confidence,
        }
        if design.markov_rank:
            config["markov_head_type"] = design.markov_head
        if design.confidence:
            config["confidence_head_with_markov"] = design.confidence_with_markov
        return config
    if design != AutoregressiveDesign(depth=design.depth):
        raise CheckpointError(
            "DeepSpec's EAGLE-3 has none of this drafter's norm options; it can only be written as speculators"
        )
    return config | {
        "architectures": [f"{family}Eagle3Model"],
        "ttt_length": design.depth,
        "step_loss_decay": checkpoint.extras.get("step_loss_decay", 0.8),
        "draft_num_hidden_layers": require(decoder, "num_hidden_layers"),
        "target_model_name_or_path": target.name or "",
    }


def _family(decoder: Mapping[str, Any]) -> str:
    kind = require(decoder, "model_type", str)
    if kind == "qwen3":
        return "Qwen3"
    if kind in GEMMA4:
        return "Gemma4"
    raise CheckpointError(
        f"DeepSpec's decoders are qwen3 and gemma4_text, this drafter's is {kind!r}; write it as speculators"
    )
