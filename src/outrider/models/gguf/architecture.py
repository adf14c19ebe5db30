"""What runs of GGUF's architectures, and how their tensors are called in a file and canonically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outrider.errors import CheckpointError
from outrider.models.gguf.container import GGUFFile

__all__ = ["ARCHITECTURES", "QK_NORMS", "ROPE_FACTORS", "TOPS", "Architecture", "architecture_of"]

TOPS = {"token_embd.weight": "embed.weight", "output.weight": "head.weight", "output_norm.weight": "norm.weight"}
_PARTS = {
    "attn_norm": "input_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
QK_NORMS = {"attn_q_norm": "q_norm", "attn_k_norm": "k_norm"}
_SANDWICH = {"post_attention_norm": "attention_out_norm", "post_ffw_norm": "mlp_out_norm"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of one ``general.architecture`` are read."""

    model_type: str
    parts: Mapping[str, str]
    """Part of a layer in the file -> canonical part."""
    permuted: bool = False
    """Rows of q and k are in the order of interleaved rotation."""
    norm_shift: float = 0.0
    """What was added to the norms' weights."""
    biases: tuple[str, ...] | None = None
    """Canonical parts that have a bias; None: attention's four all have one, or none has, and MLP's three likewise."""
    ignored: tuple[str, ...] = ()
    """Beginnings of names that are no part of the text model."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _PARTS, permuted=True, ignored=("mm.", "v.")),
    "mistral": Architecture("mistral", _PARTS, permuted=True, biases=()),
    "qwen2": Architecture("qwen2", _PARTS, biases=("q", "k", "v")),
    "qwen3": Architecture("qwen3", _PARTS | QK_NORMS),
    "gemma3": Architecture(
        "gemma3_text", _PARTS | QK_NORMS | _SANDWICH, norm_shift=1.0, biases=(), ignored=("mm.", "v.")
    ),
}
"""What runs, by ``general.architecture``."""


def architecture_of(file: GGUFFile) -> tuple[str, Architecture]:
    """A file's ``general.architecture`` and how it is read. Raises CheckpointError for one that does not run."""
    name = file.keys.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        runs = ", ".join(ARCHITECTURES)
        what = "names no architecture" if name is None else f"has architecture {name!r}, which does not run here"
        raise CheckpointError(f"{file.path} {what}; expected one of: {runs}")
    return name, ARCHITECTURES[name]
