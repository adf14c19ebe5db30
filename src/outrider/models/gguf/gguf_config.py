"""From a GGUF file's keys to a Hugging Face config, as it was before llama.cpp's converter.

float32 keys are read as the shortest decimal that gives them: 1e-05, not 9.999999747378752e-06. Llama 3.1's rope
scaling is stored as the tensor ``rope_freqs.weight``, a divisor for every frequency; it becomes ``rope_type: llama3``
again where that formula gives the same divisors, else ``rope_type: factors`` with the list ``factors``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from outrider.errors import CheckpointError
from outrider.models.gguf.architecture import ROPE_FACTORS, architecture_of
from outrider.models.gguf.blocks import decode
from outrider.models.gguf.container import GGUFFile, TensorInfo
from outrider.tokenization.gguf_tokenizer import end_of_generation

__all__ = ["read_config"]

_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Option of a generation_config -> key ``general.sampling.*``."""
_CHUNK = 1 << 20  # bytes compared at a time

_NEUTRAL: dict[str, tuple[Any, ...]] = {  # keys that change the computation, and the values that do not
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face config of a file's model: ``model_type`` llama, mistral, qwen2, qwen3 or gemma3_text.

    Raises CheckpointError for keys that are missing, wrong, or switch on what is not supported.
    """
    return _Keys(file).read()


class _Keys:
    """Reads a file's keys, each checked."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.name, self.architecture = architecture_of(file)

    def read(self) -> dict[str, Any]:
        """The config. Raises CheckpointError."""
        self.refuse_others()
        layers, width, heads = (
            self.whole("block_count"),
            self.whole("embedding_length"),
            self.each("attention.head_count"),
        )
        if layers > len(self.file.tensors):
            self.fail(f"it says that it has {layers:,} layers, but it holds {len(self.file.tensors)} tensors")
        head_dim = self.whole("attention.key_length", width // heads)
        self.same("attention.value_length", head_dim)
        self.same("rope.dimension_count", head_dim)
        vocabulary = self.vocabulary()
        config: dict[str, Any] = {
            "model_type": self.architecture.model_type,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": self.each("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.each("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.whole("context_length"),
            "rms_norm_eps": self.real("attention.layer_norm_rms_epsilon", None, below=1.0),
            "tie_word_embeddings": not self.has_own_head(),
            "attention_bias": self.has_biases(layers, "attn_q", "attn_k", "attn_v", "attn_output"),
            "mlp_bias": self.has_biases(layers, "ffn_gate", "ffn_up", "ffn_down"),
            **self.tokens(vocabulary),
        }
        self.scale(config)
        return {**config, **(self.gemma3(config) if self.name == "gemma3" else self.llama(config))}

    def llama(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the Llama family."""
        if self.real("final_logit_softcapping", 0.0):
            self.fail("its final_logit_softcapping is not supported for this architecture")
        window = self.whole("attention.sliding_window", 0)
        slides = 0 < window < config["max_position_embeddings"]
        if slides and self.name.startswith("qwen"):
            self.fail(f"its sliding window of {window} is not supported for this architecture")
        fields: dict[str, Any] = {"hidden_act": "silu", "rope_parameters": self.rope(config["head_dim"], 10_000.0)}
        if slides or self.name == "mistral":
            fields |= {"model_type": "mistral", "sliding_window": window if slides else None}
        return fields

    def gemma3(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of Gemma 3."""
        layers, window = config["num_hidden_layers"], self.whole("attention.sliding_window", 0)
        full = self.rope(config["head_dim"], self.real("rope.global.freq_base", 1_000_000.0))
        local = self.real("rope.freq_base_swa", self.real("rope.local.freq_base", 10_000.0))
        # The 27B model is the only one whose scale does not follow from the heads' width, and no key says so.
        scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"]
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": self.real("final_logit_softcapping", 0.0) or None,
            "sliding_window": window or config["max_position_embeddings"],
            "layer_types": self.layer_types(layers) if window else ["full_attention"] * layers,
            "rope_parameters": {
                "full_attention": full,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }

    def layer_types(self, layers: int) -> list[str]:
        """Gemma's windows: on every layer but each n-th (6), or as an array of truth values says."""
        pattern = self.key("attention.sliding_window_pattern", 6)
        if isinstance(pattern, np.ndarray) and len(pattern) == layers:
            slides = [bool(value) for value in pattern]
        elif isinstance(pattern, int) and pattern >= 1:
            slides = [(index + 1) % pattern != 0 for index in range(layers)]
        else:
            self.fail(f"its attention.sliding_window_pattern is {pattern!r}")
        return ["sliding_attention" if slide else "full_attention" for slide in slides]

    def rope(self, head_dim: int, theta: float) -> dict[str, Any]:
        """Rotary parameters, in the form of Transformers 5."""
        theta = self.real("rope.freq_base", theta)
        if not theta:
            self.fail("its rope.freq_base is 0, expected a number above 0")
        plain = {"rope_type": "default", "rope_theta": theta}
        factor = self.real("rope.scaling.factor", self.real("rope.scale_linear", 0.0)) or 1.0
        kind = self.key("rope.scaling.type", "linear")
        if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
            self.fail(f"its rope scaling {kind!r} is not supported; expected none, linear or yarn")
        scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
        if kind != "yarn" and (attention := self.real("rope.scaling.attn_factor", 0.0)) not in (0.0, 1.0):
            self.fail(f"its rope.scaling.attn_factor of {attention} needs rope scaling 'yarn', but it has {kind!r}")
        if ROPE_FACTORS in self.file.tensors:
            if scaled:
                self.fail(f"it has both rope scaling {kind!r} and {ROPE_FACTORS!r}")
            return {**plain, **self.rope_factors(head_dim, theta)}
        if not scaled:
            return plain
        return {**plain, "rope_type": kind, "factor": factor, **(self.yarn(factor) if kind == "yarn" else {})}

    def yarn(self, factor: float) -> dict[str, Any]:
        """YaRN's options; what the file leaves out keeps its usual default. Its attention factor multiplies the usual
        one, as llama.cpp's ``rope_yarn`` has it."""
        found = {
            "beta_fast": self.real("rope.scaling.yarn_beta_fast", 0.0),
            "beta_slow": self.real("rope.scaling.yarn_beta_slow", 0.0),
            "attention_factor": self.real("rope.scaling.yarn_attn_factor", self.real("rope.scaling.attn_factor", 0.0))
            * (1.0 + 0.1 * math.log(max(factor, 1.0))),
        }
        original = self.whole("rope.scaling.original_context_length", self.whole("context_length"))
        return {"original_max_position_embeddings": original} | {key: value for key, value in found.items() if value}

    def rope_factors(self, head_dim: int, theta: float) -> dict[str, Any]:
        """``rope_freqs.weight`` as Llama 3's scaling where it is that, else as it is."""
        info = self.file.tensors[ROPE_FACTORS]
        if info.shape != (head_dim // 2,):
            self.fail(f"tensor {ROPE_FACTORS!r} has shape {list(info.shape)}, expected [{head_dim // 2}]")
        factors = _values(self.file, info)
        if not np.isfinite(factors).all() or (factors <= 0).any():
            self.fail(f"tensor {ROPE_FACTORS!r} holds values that are no positive numbers")
        context, largest = self.whole("context_length"), float(factors.max())
        for original in (
            self.whole("rope.scaling.original_context_length", 8192),
            8192,
            round(context / largest),
            context,
        ):
            if np.allclose(_llama3_factors(head_dim, theta, largest, original), factors, rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": largest,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
        return {"rope_type": "factors", "factors": factors.tolist()}

    def vocabulary(self) -> int:
        """Rows of the embedding, with which the tokenizer and the keys must agree."""
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            self.fail("tensor 'token_embd.weight' is missing, or is no matrix")
        rows = embedding.shape[0]
        tokens = self.file.keys.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, list):
            self.fail(f"its tokenizer.ggml.tokens is no list of strings, but {tokens!r}")
        if len(tokens) not in (0, rows):
            self.fail(f"its vocabulary has {len(tokens):,} tokens, but its embedding has {rows:,} rows")
        self.same("vocab_size", rows)
        return rows

    def tokens(self, vocabulary: int) -> dict[str, Any]:
        """Ids that begin and end a text."""

        def identifier(name: str) -> int | None:
            value = self.file.keys.get(f"tokenizer.ggml.{name}_token_id")
            if value is None or (isinstance(value, int) and value in (-1, 0xFFFFFFFF)):
                return None
            if not isinstance(value, int) or not 0 <= value < vocabulary:
                self.fail(f"its {name} token is {value!r}, expected an id below {vocabulary:,}")
            return value

        named = [value for name in ("eos", "eot", "eom") if (value := identifier(name)) is not None]
        ends = named
        if self.file.keys.get("tokenizer.ggml.tokens"):
            try:
                found = end_of_generation(self.file.keys)
            except CheckpointError as error:
                self.fail(str(error))
            ends = [value for value in named if value in found] + sorted(found - set(named))
        ends = list(dict.fromkeys(ends))
        return {
            "bos_token_id": identifier("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "generation_config": self.sampling(),
        }

    def sampling(self) -> dict[str, Any]:
        """What ``general.sampling.*`` recommends, as a generation_config; empty where the file says nothing."""
        found = {}
        for ours, theirs in _SAMPLING.items():
            value = self.file.keys.get(f"general.sampling.{theirs}")
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                self.fail(f"its general.sampling.{theirs} is {value!r}, expected a number of at least 0")
            found[ours] = value if isinstance(value, int) else float(str(np.float32(value)))
        return {"do_sample": True, **found} if found.get("temperature", 1) and found else {}

    def has_own_head(self) -> bool:
        """Whether the output matrix is there and is not a copy of the embedding."""
        head, embedding = (self.file.tensors.get(name) for name in ("output.weight", "token_embd.weight"))
        if head is None:
            return False
        if embedding is None or (head.kind, head.shape) != (embedding.kind, embedding.shape):
            return True
        ours, theirs = (self.file.blocks(info.name).reshape(-1) for info in (head, embedding))
        same = all(np.array_equal(ours[i : i + _CHUNK], theirs[i : i + _CHUNK]) for i in range(0, len(ours), _CHUNK))
        for info in (head, embedding):
            self.file.release(info.name)
        return not same

    def has_biases(self, layers: int, *parts: str) -> bool:
        """Whether all these parts of all layers have a bias. Fails where only some have."""
        kinds = self.architecture.biases
        if kinds is not None:
            return False
        names = [f"blk.{index}.{part}.bias" for index in range(layers) for part in parts]
        found = [name for name in names if name in self.file.tensors]
        if found and len(found) != len(names):
            missing = next(name for name in names if name not in self.file.tensors)
            self.fail(f"it has {found[0]!r} but no {missing!r}; expected a bias on all of these parts, or on none")
        return bool(found)

    def refuse_others(self) -> None:
        """Fail for what would change the computation and is not supported."""
        kind = self.file.keys.get("general.type", "model")
        if not isinstance(kind, str) or kind != "model":
            self.fail(f"it is of type {kind!r}; expected a whole model")
        for key, neutral in _NEUTRAL.items():
            value = self.key(key, neutral[0])
            if not isinstance(value, (int, float)) or value not in neutral:
                self.fail(f"its {key} is {value!r}, which is not supported for this architecture")

    def scale(self, config: Mapping[str, Any]) -> None:
        """Fail for scores that are scaled by something else than the heads' width says."""
        usual = config["head_dim"] ** -0.5
        scale = self.real("attention.scale", usual) or usual
        if not math.isclose(scale, usual, rel_tol=1e-5):
            self.fail(f"its attention.scale is {scale}, expected {usual} (the heads' width ** -0.5)")

    # -------------------------------------------------------------------------------------------- keys

    def key(self, name: str, default: Any = None) -> Any:
        return self.file.keys.get(f"{self.name}.{name}", default)

    def whole(self, name: str, default: int | None = None) -> int:
        """A count. Without a default it must be there and at least 1."""
        return self.count(name, self.key(name, default), 1 if default is None else 0)

    def each(self, name: str, default: int | None = None) -> int:
        """A count that may be given for each layer, if all are equal."""
        value = self.key(name, default)
        if isinstance(value, np.ndarray) and len(value):
            if (value != value[0]).any():
                self.fail(f"key {self.name}.{name} differs between layers, which is not supported: {value.tolist()}")
            value = value[0].item()
        return self.count(name, value, 1)

    def count(self, name: str, value: Any, least: int) -> int:
        """``value`` if it is a whole number of at least ``least``."""
        if value is None:
            self.fail(f"key {self.name}.{name} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
            self.fail(f"key {self.name}.{name} is {value!r}, expected a whole number of at least {least}")
        return value

    def real(self, name: str, default: float | None, below: float = math.inf) -> float:
        """A number of at least 0 and less than ``below``, as the shortest decimal that gives the float32."""
        value = self.key(name, default)
        if value is None:
            self.fail(f"key {self.name}.{name} is missing")
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not 0 <= value < below:
            limit = f" and below {below:g}" if math.isfinite(below) else ""
            self.fail(f"key {self.name}.{name} is {value!r}, expected a number of at least 0{limit}")
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else float(value)

    def same(self, name: str, expected: int) -> None:
        """Fail where a key is there and says something else."""
        value = self.whole(name, expected)
        if value != expected:
            self.fail(
                f"its {name} is {value:,}, which is not supported or disagrees with its tensors; expected {expected:,}"
            )

    def fail(self, problem: str) -> NoReturn:
        """Raise CheckpointError."""
        raise CheckpointError(f"{self.file.path}: {problem}")


def _llama3_factors(head_dim: int, theta: float, factor: float, original: int) -> NDArray[np.float64]:
    """Divisors of the frequencies [Dh / 2] in Llama 3.1's scaling, with its usual bounds of 1 and 4 turns."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((original * frequencies / (2 * math.pi) - 1) / 3, 0, 1)
    factors: NDArray[np.float64] = 1 / (kept + (1 - kept) / factor)
    return factors


def _values(file: GGUFFile, info: TensorInfo) -> NDArray[np.float64]:
    """A small tensor, flat."""
    if info.kind.decoder is None:
        raise CheckpointError(f"{file.path}: tensor {info.name!r} has type {info.kind.name}, which is not read here")
    blocks = file.blocks(info.name)
    out = np.empty((len(blocks), info.kind.values), np.float32)
    decode(info.kind, blocks, out)
    return out.reshape(-1).astype(np.float64)
