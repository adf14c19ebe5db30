"""The target every natively read architecture shares: a spec, and a decoder stack on some backend."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from outrider.backends.layers import check_weights, weight_shapes
from outrider.config import MOST_LAYERS, StackConfig
from outrider.errors import CheckpointError, InvalidRequest, nearest, reading_config
from outrider.models.weights import LazyWeights, TensorFiles, load_dtype, reading_dtype
from outrider.types import (
    Backend,
    DraftLoop,
    KVCache,
    PagedTarget,
    RaggedBatch,
    Stack,
    TargetOutput,
    TargetSpec,
    finds_largest,
    readable_layers,
)

__all__ = [
    "PARTS",
    "SANDWICH_PARTS",
    "DecoderTarget",
    "TensorNames",
    "activation",
    "biases",
    "check_aux_layers",
    "check_finite",
    "end_tokens",
    "layer_types",
    "make_spec",
    "optional",
    "positive",
    "refuse_quantised",
    "refuse_set",
    "required",
    "sampling_defaults",
]

MOST = {"num_hidden_layers": MOST_LAYERS}
MOST_ANYWHERE = (1 << 31) - 1
"""Sizes beyond these are mistakes, and would take all memory before a missing tensor tells."""
MAY_BE_INFINITE = ("time_step_limit",)  # of state-space layers
SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

PARTS = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
SANDWICH_PARTS = {
    **PARTS,
    "post_attention_layernorm": "attention_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}
"""Part of a layer in Hugging Face's files -> canonical part, without and with sandwich norms (Gemma)."""
_OTHER_TOWERS = tuple(
    prefix + tower
    for prefix in ("", "model.")
    for tower in ("audio_tower.", "embed_audio.", "embed_vision.", "multi_modal_projector.", "vision_tower.")
)
_TOPS = {"embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight", "norm.weight": "norm.weight"}


@dataclass(frozen=True)
class TensorNames:
    """Names in Hugging Face's files to canonical ones, and back (for messages)."""

    parts: Mapping[str, str]
    tied: bool
    """The config says that the embedding is the head. A file may hold a head all the same: see ``LazyWeights.tie``."""
    ignored: tuple[str, ...] = ()
    """Beginnings of names that are no part of the text model."""

    def canonical(self, name: str) -> str | None:
        """The canonical name; None for a tensor that is not wanted; ``name`` itself where it is unknown."""
        if name.endswith("rotary_emb.inv_freq") or name.startswith(self.ignored):
            return None  # old checkpoints store what follows from the config
        inner = re.sub(r"^(model\.|language_model\.)+", "", name)
        if inner in _TOPS:
            return _TOPS[inner]
        match = re.fullmatch(r"(layers\.\d+\.)(.+)\.(weight|bias)", inner)
        if match and match[2] in self.parts:
            return f"{match[1]}{self.parts[match[2]]}.{match[3]}"
        return re.sub(r"^(layers\.\d+\.)layer_scalar$", r"\1scalar", inner) if "layer_scalar" in inner else name

    def original(self, canonical: str) -> str:
        """The name that Transformers writes."""
        tops = {ours: theirs for theirs, ours in _TOPS.items()}
        if canonical in tops:
            return tops[canonical] if canonical == "head.weight" else f"model.{tops[canonical]}"
        match = re.fullmatch(r"(layers\.\d+\.)(\w+)\.(weight|bias)", canonical)
        theirs = {ours: theirs for theirs, ours in self.parts.items()}
        if match and match[2] in theirs:
            return f"model.{match[1]}{theirs[match[2]]}.{match[3]}"
        return canonical


class DecoderTarget:
    """A target whose layers run on a backend. An architecture says how its config and tensor names are read."""

    spec: TargetSpec
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What the architecture assumes where a config is silent."""

    def __init__(self, spec: TargetSpec, stack: Stack, backend: Backend) -> None:
        self.spec, self.stack, self.backend = spec, stack, backend
        if isinstance(stack, DraftLoop):
            self.draft_loop = stack.draft_loop
        if isinstance(stack, PagedTarget):
            self.paged_cache = stack.paged_cache
        self.finds_largest = finds_largest(stack)

    @classmethod
    def stack_config(cls, config: Mapping[str, Any]) -> StackConfig:
        """The stack that a Hugging Face config describes. Raises CheckpointError for what is not supported."""
        raise TypeError(f"{cls.__name__} reads no config")

    @classmethod
    def tensor_names(cls, config: Mapping[str, Any]) -> TensorNames:
        """How the tensors are called in the files."""
        return TensorNames(PARTS, tied=bool(config.get("tie_word_embeddings")))

    @classmethod
    def optional_weights(cls, config: Mapping[str, Any]) -> set[str]:
        """Canonical names of weights that this model has and others of its kind lack (embedding and head aside)."""
        return biases(config, "qkvo") if config.get("attention_bias") else set()

    @classmethod
    def load(cls, path: Path, config: Mapping[str, Any], *, dtype: str, backend: Backend) -> Self:
        """Read a Hugging Face directory. Raises CheckpointError."""
        with reading_config():
            config, names = cls._text_part(config)
            stack_config = cls.stack_config(config)
        weights = cls._weights(path, names, reading_dtype(dtype, backend))
        check_weights(stack_config, weights, lambda name: weights.names.get(name) or names.original(name))
        expected = {"embed.weight", *([] if names.tied else ["head.weight"]), *cls.optional_weights(config)}
        for name, shape in weight_shapes(stack_config).items():
            own_head = name == "head.weight" and name in weights  # a tied one that differs from the embedding
            if not shape.required and not own_head and (name in weights) != (name in expected):
                state = "is in the files, but not" if name in weights else "is missing, but"
                raise CheckpointError(
                    f"tensor {names.original(name)!r} {state} in the model that config.json describes"
                )
        return cls.from_weights(config, weights, dtype=dtype, backend=backend, name=str(path))

    @classmethod
    def from_weights(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], *, dtype: str, backend: Backend, name: str
    ) -> Self:
        """``config`` with the architecture's defaults, ``weights`` by canonical name. Raises CheckpointError."""
        stack_config = cls.stack_config(config)
        stack = backend.load(stack_config, weights, dtype)  # type: ignore[arg-type]
        return cls(make_spec(config, stack_config, load_dtype(dtype), name), stack, backend)

    @classmethod
    def layers_of(cls, path: Path, config: Mapping[str, Any]) -> tuple[StackConfig, Mapping[str, Tensor]]:
        """A directory's stack, and its weights by canonical name in float32, each read on access."""
        config, names = cls._text_part(config)
        return cls.stack_config(config), cls._weights(path, names, torch.float32)

    @staticmethod
    def _weights(path: Path, names: TensorNames, dtype: torch.dtype) -> LazyWeights:
        weights = LazyWeights(TensorFiles(path), names.canonical, dtype)
        if names.tied:
            weights.tie()
        return weights

    @classmethod
    def _text_part(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], TensorNames]:
        """The config of the text model with its defaults, and how its tensors are called."""
        refuse_quantised(config)
        names = cls.tensor_names({**cls.defaults, **config})
        if config.get("text_config") is not None:
            names, config = replace(names, ignored=_OTHER_TOWERS), _text_part(config)
        if config.get("is_causal") is False:
            raise CheckpointError(
                "config.json sets is_causal to False: tokens see later ones, so this is no causal language model (an "
                "encoder?); choose one that writes text"
            )
        return {**cls.defaults, **config}, names

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """A cache for ``slots`` sequences of up to ``capacity`` tokens."""
        return self.stack.new_cache(slots, capacity)

    def forward(
        self,
        batch: RaggedBatch,
        cache: KVCache,
        aux_layers: Sequence[int] = (),
        logits_at: Tensor | None = None,
        largest: bool = False,
    ) -> TargetOutput:
        """One pass; see ``outrider.types.TargetModel``, and for ``largest`` ``outrider.types.FindsLargest``. Raises
        InvalidRequest for a layer there is not."""
        check_aux_layers(aux_layers, self.spec.num_layers)
        more: dict[str, Any] = {"largest": True} if largest else {}
        return TargetOutput.of_stack(
            self.stack.forward(batch, cache, aux_layers=aux_layers, logits_at=logits_at, **more)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., D], as the first layer sees it."""
        return self.stack.embed(tokens)

    def unembed(self, hidden: Tensor) -> Tensor:
        """[..., D] after the final norm -> [..., V]."""
        return self.stack.unembed(hidden)


# ------------------------------------------------------------------------------------------------ reading configs


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text model inside a multimodal one, with the keys that stay outside."""
    outside = {
        key: config[key] for key in ("generation_config", "eos_token_id", "tie_word_embeddings") if key in config
    }
    return {**config["text_config"], **outside, "model_type": config.get("model_type")}


def refuse_set(config: Mapping[str, Any], *keys: str) -> None:
    """Raise CheckpointError where a config switches on what is not supported."""
    for key in keys:
        if config.get(key):
            raise CheckpointError(
                f"config.json sets {key} to {config[key]!r}, which is not supported for this model_type"
            )


def required(config: Mapping[str, Any], key: str) -> int:
    """A size that every config of the kind has. Raises CheckpointError."""
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"config.json has no {key!r}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key!r} must be a whole number of at least 1, got {value!r}")
    most = MOST.get(key, MOST_ANYWHERE)
    if value > most:
        raise CheckpointError(f"config.json: {key!r} must be at most {most}, got {value}")
    return value


def optional(config: Mapping[str, Any], key: str, default: int) -> int:
    """A size that a config may leave out. Raises CheckpointError for one that is there and is none."""
    return default if config.get(key) is None else required(config, key)


def positive(config: Mapping[str, Any], key: str) -> float:
    """A number above 0. Raises CheckpointError."""
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key!r} must be a number above 0, got {value!r}")
    return float(value)


def check_finite(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a number anywhere in a config that is NaN or infinite, with its key."""
    for key, value in _numbers(config):
        if not math.isfinite(value) and key.split(".")[-1] not in MAY_BE_INFINITE:
            file = "generation_config" if key.startswith("generation_config.") else "config"
            shown = key.removeprefix("generation_config.")
            raise CheckpointError(f"{file}.json: {shown!r} is {value}; expected a finite number")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float in nested objects and lists, with its key in dots."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)


def biases(config: Mapping[str, Any], parts: Iterable[str]) -> set[str]:
    """Canonical names of the biases of these parts of every layer."""
    return {f"layers.{index}.{part}.bias" for index in range(required(config, "num_hidden_layers")) for part in parts}


def layer_types(config: Mapping[str, Any], slides: Callable[[int], bool]) -> list[str]:
    """``sliding_attention`` or ``full_attention`` for each layer; where the config is silent, ``slides(layer)`` says.

    Raises CheckpointError.
    """
    count, kinds = required(config, "num_hidden_layers"), ("sliding_attention", "full_attention")
    named = config.get("layer_types")
    if named is None:
        return [kinds[0] if slides(index) else kinds[1] for index in range(count)]
    if not isinstance(named, list) or len(named) != count or not set(named) <= set(kinds):
        raise CheckpointError(f"config.json: 'layer_types' must hold {count} of {' or '.join(kinds)}, got {named!r}")
    return named


def refuse_quantised(config: Mapping[str, Any]) -> None:
    """Packed weights of other tools are not read. Raises CheckpointError."""
    given = config.get("quantization_config")
    if given:
        method = given.get("quant_method", "unknown") if isinstance(given, Mapping) else "unknown"
        raise CheckpointError(
            f"this checkpoint is quantised ({method}), which is not read; "
            "load the original weights, with dtype='int8' or 'int4' to quantise them when they are loaded"
        )


def activation(name: str) -> Literal["silu", "gelu_tanh", "gelu"]:
    """Transformers' name of an activation to ours. Raises CheckpointError."""
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(f"activation {name!r} is not supported; {nearest(str(name), _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def make_spec(config: Mapping[str, Any], stack: StackConfig, dtype: torch.dtype, name: str) -> TargetSpec:
    """What a drafter and the engine may know of a model: ids that end a text and sampling defaults included."""
    return TargetSpec(
        architecture=str(config.get("model_type", "")),
        vocab_size=stack.vocab_size,
        hidden_size=stack.hidden_size,
        num_layers=len(stack.layers),
        max_positions=stack.max_positions,
        dtype=dtype,
        name=name,
        eos_token_ids=end_tokens(config),
        defaults=sampling_defaults(config),
    )


def end_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text: generation_config.json's, else config.json's. -1 means none, as in old configs.

    An id that is written as text ("256") or as a float without a fraction is read as the number. Raises
    CheckpointError for anything else.
    """
    ids = config.get("generation_config", {}).get("eos_token_id")
    if ids is None:
        ids = config.get("eos_token_id")
    read = [_token_id(value, ids) for value in (ids if isinstance(ids, list) else [] if ids is None else [ids])]
    return tuple(dict.fromkeys(value for value in read if value != -1))


def _token_id(value: Any, given: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]+\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < -1:
        raise CheckpointError(f"eos_token_id must be a token id or a list of them, got {given!r}; mend config.json")
    return value


def sampling_defaults(config: Mapping[str, Any]) -> dict[str, float]:
    """What generation_config.json says of sampling; nothing where it asks for greedy decoding."""
    generation = config.get("generation_config", {})
    if not generation.get("do_sample"):
        return {}
    found = {key: generation[key] for key in SAMPLING_DEFAULTS if generation.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise CheckpointError(f"generation_config.json: {key!r} must be a number, got {value!r}")
    return found


def check_aux_layers(aux_layers: Sequence[int], layers: int) -> None:
    """Raise InvalidRequest for a layer that cannot be auxiliary."""
    for aux_layer in aux_layers:
        if aux_layer == layers - 1:
            raise InvalidRequest(
                f"layer {aux_layer} is the last one and cannot be auxiliary: tools disagree whether its features are "
                f"taken before or after the final norm; choose one of -1 (the embedding) to {layers - 2}"
            )
        if aux_layer not in readable_layers(layers):
            raise InvalidRequest(
                f"auxiliary layer {aux_layer} is no layer of this target; expected -1 (the embedding) to {layers - 2}"
            )
