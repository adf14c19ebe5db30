"""A new, untrained drafter: its shape follows from the target's config."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from outrider import registry
from outrider.checkpoints import Design, DraftCheckpoint, TargetFacts
from outrider.config import build
from outrider.errors import CheckpointError, InvalidRequest, nearest
from outrider.models.locations import public_name
from outrider.types import TargetSpec

__all__ = [
    "Counts",
    "check_weights",
    "draft_decoder",
    "mask_token",
    "new_checkpoint",
    "spread_aux_layers",
    "training_of",
    "with_draft_vocabulary",
]

Counts = Callable[[], Tensor]
"""How often the target wrote each token: -> int64 [V]."""
SPARE = re.compile(
    r"<\|?[a-z0-9_:-]*(reserved|unused|extra_id|file|repo|issue|jupyter|empty|gh_)[a-z0-9_:-]*\|?>", re.I
)
"""Names of control tokens that no conversation holds."""
COPIED = ("rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings", "hidden_act")


def draft_decoder(
    config: Mapping[str, Any], spec: TargetSpec, *, layers: int, intermediate: int | None
) -> dict[str, Any]:
    """Hugging Face config of the drafter's layers: Qwen3's, in the target's width, as in other libraries.

    ``config`` is the target's. Raises InvalidRequest.
    """
    if layers < 1:
        raise InvalidRequest(f"layers of a drafter must be at least 1, got {layers}")
    own = {**config, **config.get("text_config", {})}
    heads = own.get("num_attention_heads") or max(1, spec.hidden_size // 64)
    decoder = {key: own[key] for key in COPIED if own.get(key) is not None}
    if "rope_parameters" in decoder and "rope_theta" not in decoder["rope_parameters"]:  # one set a layer type
        sets = decoder["rope_parameters"]
        decoder["rope_parameters"] = sets.get("full_attention") or next(iter(sets.values()))
    rope = decoder.get("rope_parameters")
    if rope and rope.get("rope_type") != "proportional":  # the drafter's heads are rotated whole
        decoder["rope_parameters"] = {key: value for key, value in rope.items() if key != "partial_rotary_factor"}
    return decoder | {
        "model_type": "qwen3",
        "hidden_act": decoder.get("hidden_act", "silu"),
        "hidden_size": spec.hidden_size,
        "intermediate_size": intermediate or own.get("intermediate_size") or 4 * spec.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("num_key_value_heads") or heads,
        "head_dim": own.get("head_dim") or spec.hidden_size // heads,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def new_checkpoint(
    design: Design, decoder: dict[str, Any], spec: TargetSpec, target_layers: tuple[int, ...] | None, aux_layers: int
) -> DraftCheckpoint:
    """Without tensors: embedding and head are the target's, the rest is initialised when training starts.

    ``target_layers`` it reads, None: ``aux_layers`` of them, evenly spread.
    """
    return DraftCheckpoint(
        design=design,
        decoder=decoder,
        target_layers=spread_aux_layers(spec.num_layers, aux_layers) if target_layers is None else target_layers,
        target=TargetFacts(
            hidden_size=spec.hidden_size, num_layers=spec.num_layers, name=public_name(spec.name) if spec.name else None
        ),
        draft_vocab_size=spec.vocab_size,
        format="fresh",
    )


def with_draft_vocabulary(checkpoint: DraftCheckpoint, size: int | None, counts: Counts | None) -> DraftCheckpoint:
    """The checkpoint with a draft vocabulary of the ``size`` most frequent tokens; None: unchanged.

    Raises InvalidRequest for a size that does not fit the vocabulary.
    """
    if size is None or size == checkpoint.vocab_size:
        return checkpoint
    if not 1 <= size <= checkpoint.vocab_size:
        raise InvalidRequest(f"draft_vocab must be between 1 and the vocabulary's {checkpoint.vocab_size}, got {size}")
    if counts is None:
        raise InvalidRequest("draft_vocab needs answers to count tokens in, and there are none")
    ids = counts().argsort(descending=True, stable=True)[:size].sort().values
    tensors = {**checkpoint.tensors, "d2t": ids - torch.arange(size)}
    return replace(checkpoint, draft_vocab_size=size, tensors=tensors)


def spread_aux_layers(layers: int, aux_layers: int) -> tuple[int, ...]:
    """``aux_layers`` layers spread evenly from the second to the one before the last (which cannot be auxiliary)."""
    low, high = min(1, layers - 2), layers - 2
    if aux_layers < 1 or high < 0:
        raise InvalidRequest(f"a target of {layers} layers cannot give features of {aux_layers} layers")
    spread = (round(low + i * (high - low) / max(1, aux_layers - 1)) for i in range(aux_layers))
    return tuple(dict.fromkeys(spread))


def mask_token(given: int | None, spec: TargetSpec, tokens: Mapping[str, int]) -> int:
    """The token that stands for what is not known yet: given, one named like a mask, an id that no text uses, or a
    control token that no conversation holds.

    ``tokens``: the tokenizer's entries. Raises InvalidRequest.
    """
    if given is not None:
        if not 0 <= given < spec.vocab_size:
            raise InvalidRequest(f"mask_token_id must be a token id between 0 and {spec.vocab_size - 1}, got {given}")
        return given
    named = [token for token in ("<|mask|>", "<|MASK|>", "[MASK]", "<mask>") if token in tokens]
    if named:
        return tokens[named[0]]
    unused = set(range(spec.vocab_size)) - set(tokens.values())
    spare = [token for text, token in tokens.items() if SPARE.fullmatch(text) and token not in spec.eos_token_ids]
    if not unused and not spare:
        raise InvalidRequest(
            "the tokenizer uses every id and names no mask token; name one that texts hardly use: "
            "--set run.drafter.mask_token_id=... of `outrider train RECIPE`, or drafter.mask_token_id of `train run`"
        )
    return min(unused or spare)


def training_of(kind: str, drafter: Mapping[str, Any], where: str = "") -> Any:
    """The trainer of a kind of drafter, with the options of a run's ``drafter``. Errors begin with ``where``.

    Raises InvalidRequest.
    """
    registry.find("drafter", kind)  # an unknown name has an error of its own
    trained = registry.names("trainer")
    if kind not in trained:
        raise InvalidRequest(f"{where}drafter {kind!r} cannot be trained; {nearest(kind, trained)}")
    what = f"{where}drafter {kind!r}"
    try:
        options = build(registry.find("trainer", kind), drafter, what)
        _check_sizes(options)
        return options
    except (CheckpointError, InvalidRequest) as error:  # an option's own check does not know where it was given
        raise (error if str(error).startswith(what) else InvalidRequest(f"{what}: {error}")) from None


def _check_sizes(options: Any) -> None:
    """Raise InvalidRequest for sizes that no target allows, where a trainer has such options."""
    for name in ("layers", "aux_layers", "depth", "hidden_size", "intermediate_size", "draft_vocab"):
        size = getattr(options, name, None)
        if isinstance(size, int) and size < 1:
            raise InvalidRequest(f"{name} must be at least 1, got {size}")
    layers = getattr(options, "target_layers", None)
    if layers is not None and (not layers or len(set(layers)) < len(layers) or min(layers) < -1):
        raise InvalidRequest(
            f"target_layers must be different layers of the target, counted from 0 (-1 is the embedding), "
            f"got {list(layers)}"
        )


def check_weights(loss: Any, names: Sequence[str]) -> None:
    """Raise InvalidRequest for weights of loss terms that are below 0 or not finite, or all 0."""
    weights = {name: getattr(loss, name) for name in names}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise InvalidRequest(f"loss: {name} is the weight of a term and must be 0 or above, got {weight}")
    if not any(weights.values()):
        raise InvalidRequest(f"loss: all weights are 0; one of {', '.join(names)} must be above 0")
