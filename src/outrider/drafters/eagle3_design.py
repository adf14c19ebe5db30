"""What an EAGLE-3 drafter is made of, and how each file format says so.

D draft width, Dt target width, F feature width. Weights beside the stack's:

    fc.weight [D, F]                                            features to a hidden state
    hidden_norm.weight [D]   embed_norm.weight [D]              of the hidden state and the next token's embedding
    feature_norm.weight [F]   feature_norms.{i}.weight [Dt]     before fc, where the design has them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.backends.layers import Shape
from outrider.checkpoints import Design, DraftCheckpoint, Form, Sizes, deepspec, speculators
from outrider.checkpoints.stack_format import refuse_unknown, require, require_layers
from outrider.errors import CheckpointError

__all__ = ["Eagle3Design"]


@dataclass(frozen=True, slots=True)
class Eagle3Design(Design):
    """Autoregressive head on auxiliary features, fed its own hidden states from the second draft on."""

    depth: int = 7
    """Drafts of a round."""
    norm_before_residual: bool = False
    """The residual stream starts from the normalised hidden state."""
    norm_before_fc: bool = False
    """One norm over the concatenated features."""
    norm_each_before_fc: bool = False
    """One norm for each auxiliary layer's features (``fc_norm`` in files)."""
    norm_output: bool = False
    """The hidden state is fed back after the final norm (EAGLE 3.1) instead of before it."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise CheckpointError(f"a drafter must propose at least 1 token, got {self.depth}")
        if self.norm_before_fc and self.norm_each_before_fc:
            raise CheckpointError("norm_before_fc and fc_norm exclude each other, got both")

    @property
    def kind(self) -> str:
        return "eagle3"

    @property
    def drafts(self) -> int:
        return self.depth

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        shapes = {"fc.weight": Shape((sizes.width, sizes.feature_width))}
        shapes |= {f"{name}.weight": Shape((sizes.width,)) for name in ("hidden_norm", "embed_norm")}
        if self.norm_before_fc:
            shapes["feature_norm.weight"] = Shape((sizes.feature_width,))
        if self.norm_each_before_fc:
            shapes |= {f"feature_norms.{i}.weight": Shape((sizes.target_width,)) for i in range(sizes.num_aux_layers)}
        return shapes

    def input_width(self, width: int) -> int:
        """The embedding and the hidden state side by side."""
        return 2 * width

    def file_names(self, names: dict[str, str]) -> dict[str, str]:
        """Its two norms have the names of a plain layer's norms."""
        own = {
            "hidden_norm.weight": "layers.0.hidden_norm.weight",
            "embed_norm.weight": "layers.0.input_layernorm.weight",
        }
        for neutral in names:
            if neutral.startswith("feature_norm"):
                own[neutral] = neutral.replace("feature_norms.", "fc_norm.").replace("feature_norm.", "input_norm.")
        return names | own

    @property
    def default_layer_count(self) -> int:
        return 3

    def default_layers(self, target_layers: int) -> tuple[int, ...]:
        """Low, middle and high, as SpecForge and the authors choose them."""
        return (1, target_layers // 2 - 1, target_layers - 4)

    @classmethod
    def forms(cls) -> Mapping[str, Sequence[Form]]:
        return {"deepspec": [_DEEPSPEC], "speculators": [_SPECULATORS], "specforge": [_SPECFORGE]}


# ------------------------------------------------------------------------------------------------ DeepSpec


def _write_deepspec(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    design = _eagle3(checkpoint)
    if design != Eagle3Design(depth=design.depth):
        raise CheckpointError(
            "DeepSpec's EAGLE-3 has none of this drafter's norm options; it can only be written as speculators"
        )
    return {
        "ttt_length": design.depth,
        "step_loss_decay": checkpoint.extras.get("step_loss_decay", 0.8),
        "draft_num_hidden_layers": require(checkpoint.decoder, "num_hidden_layers"),
        "target_model_name_or_path": checkpoint.target.name or "",
    }


_DEEPSPEC = Form(
    f"Eagle3{deepspec.SUFFIX}",
    lambda config: Eagle3Design(depth=require(config, "ttt_length")),
    keys=frozenset({"ttt_length", "draft_num_hidden_layers", "target_model_name_or_path"}),
    extras=frozenset({"step_loss_decay"}),
    write=_write_deepspec,
)

# ------------------------------------------------------------------------------------------------ speculators

LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"


def _read_speculators(config: Mapping[str, Any]) -> Eagle3Design:
    return Eagle3Design(
        depth=speculators.drafted_tokens(config),
        norm_before_residual=bool(config.get("norm_before_residual")),
        norm_before_fc=bool(config.get("norm_before_fc")),
        norm_each_before_fc=bool(config.get("fc_norm")),
        norm_output=bool(config.get("norm_output")),
    )


def _write_speculators(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    design = _eagle3(checkpoint)
    return {
        LAYERS_KEY: speculators.write_layers(checkpoint),
        "norm_before_residual": design.norm_before_residual,
        "norm_before_fc": design.norm_before_fc,
        "fc_norm": design.norm_each_before_fc,
        "norm_output": design.norm_output,
        "embed_requires_grad": not checkpoint.frozen_embedding,
    }


_SPECULATORS = Form(
    "eagle3",
    _read_speculators,
    keys=frozenset(
        {"norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad", LAYERS_KEY}
    ),
    extras=frozenset({"step_loss_decay"}),
    write=_write_speculators,
    layers=lambda config: speculators.read_layers(config, LAYERS_KEY),
)

# ------------------------------------------------------------------------------------------------ SpecForge


def _read_specforge(config: Mapping[str, Any]) -> Eagle3Design:
    if not config.get("norm_output", True):
        raise CheckpointError("norm_output: false (logits from a state that was not normalised) is not supported")
    return Eagle3Design(norm_each_before_fc=bool(config.get("fc_norm")))


EAGLE_CONFIG = {  # switches of other libraries, with the only value that is EAGLE-3 as it runs here
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
}


def _specforge_layers(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The same key as speculators', counted otherwise: SpecForge and SGLang mean outputs of layers, from 0."""
    section = config.get("eagle_config") or {}
    refuse_unknown(section, {LAYERS_KEY, *EAGLE_CONFIG}, "eagle_config")
    for key, only in EAGLE_CONFIG.items():
        if section.get(key, only) is not only:
            raise CheckpointError(f"eagle_config: {key} = {section[key]!r} is not supported; expected {only}")
    return require_layers(section, LAYERS_KEY) if section.get(LAYERS_KEY) else None


_SPECFORGE = Form(
    "LlamaForCausalLMEagle3",
    _read_specforge,
    # Its layers have no biases, whatever the config says of the target's.
    keys=frozenset({"draft_vocab_size", "target_model_type", "fc_norm", "norm_output", "eagle_config"})
    | {"attention_bias", "mlp_bias"},
    layers=_specforge_layers,
)


def _eagle3(checkpoint: DraftCheckpoint) -> Eagle3Design:
    assert isinstance(checkpoint.design, Eagle3Design)
    return checkpoint.design
