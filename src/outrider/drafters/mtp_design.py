"""What a multi-token-prediction module is made of, and how speculators' files say so.

D draft width. Weights beside the stack's: fc.weight [D, 2 D] (embedding's columns first), hidden_norm.weight [D],
embed_norm.weight [D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.backends.layers import Shape
from outrider.checkpoints import Design, DraftCheckpoint, Form, Sizes, speculators
from outrider.errors import CheckpointError

__all__ = ["MTPDesign"]

LAYERS_KEY = "aux_hidden_state_layer_ids"


@dataclass(frozen=True, slots=True)
class MTPDesign(Design):
    """One multi-token-prediction module, applied once or to its own output (DeepSeek-V3 report, section 2.2)."""

    depth: int = 1
    """Drafts of a round."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise CheckpointError(f"a drafter must propose at least 1 token, got {self.depth}")

    @property
    def kind(self) -> str:
        return "mtp"

    @property
    def drafts(self) -> int:
        return self.depth

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        norms = {f"{name}.weight": Shape((sizes.width,)) for name in ("hidden_norm", "embed_norm")}
        return {"fc.weight": Shape((sizes.width, 2 * sizes.width))} | norms

    def layers_of(self, decoder: Mapping[str, Any]) -> Mapping[str, Any]:
        """One layer: the config in the file may be the whole target's."""
        return {**decoder, "num_hidden_layers": 1, "layer_types": None}

    def file_names(self, names: dict[str, str]) -> dict[str, str]:
        own = {
            "fc": "input_proj",
            "hidden_norm": "hidden_layernorm",
            "embed_norm": "token_layernorm",
            "norm": "final_layernorm",
        }
        names = {neutral: file.replace("layers.0.", "mtp_layers.0.") for neutral, file in names.items()}
        return names | {f"{neutral}.weight": f"mtp_layers.0.{file}.weight" for neutral, file in own.items()}

    @classmethod
    def forms(cls) -> Mapping[str, Sequence[Form]]:
        return {
            "speculators": [
                Form(
                    "mtp",
                    lambda config: MTPDesign(depth=speculators.drafted_tokens(config)),
                    keys=frozenset({"num_nextn_predict_layers", LAYERS_KEY}),
                    write=_write_speculators,
                    layers=_speculators_layers,
                )
            ]
        }


def _speculators_layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    if config.get(LAYERS_KEY) is None:
        raise CheckpointError(
            "this MTP module reads the target's last hidden state, which is ambiguous (before or after the last norm); "
            f"expected {LAYERS_KEY} to name an earlier layer"
        )
    return speculators.read_layers(config, LAYERS_KEY)


def _write_speculators(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    return {LAYERS_KEY: speculators.write_layers(checkpoint), "num_nextn_predict_layers": 1}
