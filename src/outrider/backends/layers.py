"""What a decoder stack is made of: the canonical names and shapes of its weights, and its rotary frequencies.

Every file format is translated to these names once, when it is read; backends know no others:

    embed.weight [V, D]   head.weight [V, D]   norm.weight [D]          (no head.weight: tied to embed.weight)
    layers.{i}. input_norm  mlp_norm  attention_out_norm*  mlp_out_norm* .weight [D]       (* sandwich norms)
                q [H Dh, D]  k v [Hkv Dh, D]  o [D, H Dh]  gate up [I, D]  down [D, I] .weight (and .bias, optional)
                q_norm  k_norm .weight [Dh]     scalar [1] (optional)

Matrices are stored as torch's ``Linear`` does, [out, in]. D model width, I intermediate width, H heads, Hkv key/value
heads, Dh head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.config import RopeConfig, StackConfig
from outrider.errors import CheckpointError, nearest

__all__ = ["Shape", "check_config", "check_weights", "rope_config", "shapes_of", "weight_shapes"]


class Shape(NamedTuple):
    """The shape a weight must have (None = any size), and whether a stack can do without it."""

    sizes: tuple[int | None, ...]
    required: bool = True


def weight_shapes(config: StackConfig) -> dict[str, Shape]:
    """Every canonical weight a stack of this config may have."""
    width = config.hidden_size
    shapes = {
        # A drafter's embedding may have more rows than its reduced head; a tied one is checked by check_weights.
        "embed.weight": Shape((None, width), required=False),
        "norm.weight": Shape((width,)),
    }
    if config.vocab_size:
        shapes["head.weight"] = Shape((config.vocab_size, width), required=False)
    for index, layer in enumerate(config.layers):
        first_is_wide = index == 0 and config.input_width > 0
        attention_input = config.input_width if first_is_wide else width
        queries, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        linears = {"q": (queries, attention_input), "k": (keys, attention_input), "v": (keys, attention_input)}
        linears |= {"o": (width, queries)}
        linears |= {"gate": (layer.intermediate_size, width), "up": (layer.intermediate_size, width)}
        linears |= {"down": (width, layer.intermediate_size)}
        norms = {"input_norm": width, "mlp_norm": width}
        if layer.value_is_key:
            del linears["v"]
        if first_is_wide:  # its input arrives normalised
            del norms["input_norm"]
        if layer.qk_norm:
            norms |= {"q_norm": layer.head_dim, "k_norm": layer.head_dim}
        if config.sandwich_norms:
            norms |= {"attention_out_norm": width, "mlp_out_norm": width}
        prefix = f"layers.{index}."
        for name, sizes in linears.items():
            shapes[f"{prefix}{name}.weight"] = Shape(sizes)
            shapes[f"{prefix}{name}.bias"] = Shape(sizes[:1], required=False)
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = Shape((size,))
        shapes[f"{prefix}scalar"] = Shape((1,), required=False)
    return shapes


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, without reading those that are still in a file."""
    known = getattr(weights, "shapes", None)
    return dict(known) if known is not None else {name: tuple(tensor.shape) for name, tensor in weights.items()}


def check_config(config: StackConfig) -> None:
    """Raise CheckpointError for sizes that make no stack."""
    sizes: dict[str, Any] = {"hidden_size": config.hidden_size, "max_positions": config.max_positions}
    if config.vocab_size:
        sizes["vocab_size"] = config.vocab_size
    for index, layer in enumerate(config.layers):
        names = ("num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        sizes |= {f"{name} of layer {index}": getattr(layer, name) for name in names}
        sizes |= {f"sliding window of layer {index}": layer.window} if layer.window is not None else {}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise CheckpointError(f"{name} must be a whole number of at least 1, got {size!r}")
    numbers = {"the embedding's scale": config.embedding_scale, "the logits' soft cap": config.logit_softcap}
    for index, layer in enumerate(config.layers):
        numbers[f"the attention scale of layer {index}"] = layer.scale
        numbers[f"the rotary scale of layer {index}"] = layer.rope.scale
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise CheckpointError(f"{name} must be a finite number of at least 0, got {value!r}")
    if not isinstance(config.norm_eps, float) or not 0 <= config.norm_eps < 1:
        raise CheckpointError(f"the norm's epsilon must be a small number, got {config.norm_eps!r}")
    for index, layer in enumerate(config.layers):
        if layer.num_heads % layer.num_kv_heads:
            raise CheckpointError(
                f"layer {index} has {layer.num_heads} heads, which {layer.num_kv_heads} key/value heads "
                "cannot share evenly"
            )
        if layer.head_dim % 2:
            raise CheckpointError(
                f"head_dim of layer {index} must be even, so that it can be rotated; got {layer.head_dim}"
            )


def check_weights(
    config: StackConfig, weights: Mapping[str, Tensor], shown: Callable[[str], str] = lambda name: name
) -> None:
    """Raise CheckpointError for a weight that is missing, of another shape than the config says, or unknown.

    ``shown`` turns a canonical name into the one a user finds in the file.
    """
    check_config(config)
    expected, got = weight_shapes(config), shapes_of(weights)
    for name, shape in expected.items():
        if name not in got:
            if shape.required:
                raise CheckpointError(f"tensor {shown(name)!r} is missing; expected shape {_text(shape.sizes)}")
        elif not _fits(got[name], shape.sizes):
            raise CheckpointError(
                f"tensor {shown(name)!r} has shape {_text(got[name])}, but the config says {_text(shape.sizes)}"
            )
    for name in got:
        if name not in expected:
            raise CheckpointError(f"unexpected tensor {shown(name)!r}: the config describes no such weight")
    tied = config.vocab_size > 0 and "head.weight" not in got and "embed.weight" in got
    if tied and got["embed.weight"][0] != config.vocab_size:
        raise CheckpointError(
            f"tensor {shown('embed.weight')!r} has shape {_text(got['embed.weight'])} and serves as the head too, "
            f"but the config's vocabulary has {config.vocab_size} tokens"
        )


def _fits(got: tuple[int, ...], sizes: tuple[int | None, ...]) -> bool:
    return len(got) == len(sizes) and all(want in (None, have) for have, want in zip(got, sizes, strict=True))


def _text(sizes: Iterable[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"


# ------------------------------------------------------------------------------------------------ rotary positions


def rope_config(config: Mapping[str, Any], head_dim: int, layer_type: str | None = None) -> RopeConfig:
    """Rotary frequencies of a Hugging Face config, in the new (``rope_parameters``, possibly one per layer type) or
    the old form (``rope_theta``, ``rope_scaling``).

    ``dynamic`` (NTK) changes nothing up to ``max_position_embeddings``, where this project's targets end anyway.
    Raises CheckpointError for a kind that is not known, or one that rotates only the first dimensions of a head.
    """
    options = _rope_options(config, layer_type)
    kind = options["rope_type"]
    if kind not in _ROPES:
        raise CheckpointError(f"rope type {kind!r} is not supported here; {nearest(str(kind), _ROPES)}")
    if kind != "proportional" and (options.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError(f"rope type {kind!r} with a partial_rotary_factor is not supported here")
    _check_rope(kind, options)
    try:
        frequencies, scale = _ROPES[kind](options, head_dim)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"rope type {kind!r} needs numbers that the config lacks: {error}") from error
    if not bool(frequencies.isfinite().all()) or not 0 < scale < math.inf:
        given = {key: value for key, value in options.items() if value is not None}
        raise CheckpointError(f"rope type {kind!r}: no finite frequencies follow from the config's {given}")
    return RopeConfig(tuple(frequencies.tolist()), scale)


def _check_rope(kind: str, options: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a number that no rotation can be made from, by name."""
    for key in _ROPE_NUMBERS:
        value = options.get(key)
        for number in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
            good = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
            least = "at least 0" if key in _MAY_BE_ZERO else "above 0"
            if not good or number < 0 or (number == 0 and key not in _MAY_BE_ZERO):
                raise CheckpointError(f"rope type {kind!r}: {key!r} must be a number {least}, got {number!r}")


def _rope_options(config: Mapping[str, Any], layer_type: str | None) -> dict[str, Any]:
    """One flat dictionary of a layer type's options, with every default filled in."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}  # the former is what people add by hand
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: the rope parameters must be an object, got {given!r}")
    options = dict(given)
    if layer_type is not None and isinstance(options.get(layer_type), Mapping):
        options = dict(options[layer_type])
    kinds = [key for key, value in options.items() if isinstance(value, Mapping)]
    if kinds:
        raise CheckpointError(
            f"config.json gives rope parameters for each kind of layer ({', '.join(kinds)}), and this model has "
            f"{'one rotation for all layers' if layer_type is None else f'none for {layer_type}'}; give all layers' "
            "rope_type and rope_theta without kinds, or compare it with the config.json of the model's source"
        )
    options["rope_type"] = options.get("rope_type") or options.get("type") or "default"
    for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", None)):
        if options.get(key) is None:
            options[key] = default if config.get(key) is None else config[key]
    longest = config.get("max_position_embeddings")
    options["max_position_embeddings"] = longest
    for original in (config.get("original_max_position_embeddings"), options.get("original_max_position_embeddings")):
        if original is not None:
            options["original_max_position_embeddings"] = original
            return options
    return {**options, "original_max_position_embeddings": longest}


def _default(options: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return float(options["rope_theta"]) ** -exponents, 1.0


def _linear(options: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    return _default(options, head_dim)[0] / options["factor"], 1.0


def _factors(options: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """A divisor for each frequency, as GGUF files give them."""
    plain, _ = _default(options, head_dim)
    divisors = torch.tensor(options["factors"], dtype=torch.float64)
    if divisors.shape != plain.shape:
        raise ValueError(f"'factors' must hold {len(plain)} numbers, got {list(divisors.shape)}")
    return plain / divisors, 1.0


def _llama3(options: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    plain, _ = _default(options, head_dim)
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    turns = options["original_max_position_embeddings"] * plain / (2 * math.pi)  # over the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / options["factor"] * (1 - kept), 1.0


def _yarn(options: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """YaRN, arXiv 2309.00071, section 3.2 (NTK by parts) and 3.4 (attention factor)."""
    original, theta = options["original_max_position_embeddings"], options["rope_theta"]
    factor = options.get("factor") or options["max_position_embeddings"] / original  # 0 was refused

    def dimension(turns: float) -> float:  # the dimension that turns this often over the original context
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(options.get("beta_fast") or 32), dimension(options.get("beta_slow") or 1)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0, 1)
    plain, _ = _default(options, head_dim)
    return plain * (1 - stretched) + plain / factor * stretched, _yarn_scale(options, factor)


def _yarn_scale(options: Mapping[str, Any], factor: float) -> float:
    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])
    if options.get("mscale") and options.get("mscale_all_dim"):
        return temperature(options["mscale"]) / temperature(options["mscale_all_dim"])
    return temperature(1.0)


def _proportional(options: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Gemma 4: the slowest frequencies are zero, so those dimensions carry no position."""
    rotated = int((options["partial_rotary_factor"] or 1.0) * head_dim // 2)
    plain, _ = _default(options, head_dim)
    plain[rotated:] = 0
    return plain / (options.get("factor") or 1.0), 1.0


_MAY_BE_ZERO = ("low_freq_factor", "mscale", "mscale_all_dim", "partial_rotary_factor")
_ROPE_NUMBERS = (
    *("attention_factor", "beta_fast", "beta_slow", "factor", "factors", "high_freq_factor", "rope_theta"),
    *("original_max_position_embeddings", *_MAY_BE_ZERO),
)
_ROPES = {
    "default": _default,
    "dynamic": _default,
    "factors": _factors,
    "linear": _linear,
    "llama3": _llama3,
    "proportional": _proportional,
    "yarn": _yarn,
}
