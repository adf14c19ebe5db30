"""What a DSpark or DFlash drafter is made of, and how each file format says so.

r Markov rank, V target vocabulary, Vd draft vocabulary, D draft width, F feature width. Weights beside the stack's:

    fc.weight [D, F]   hidden_norm.weight [D]                      features to the context's hidden states
    markov.w1.weight [V, r]   markov.w2.weight [Vd, r]             equations 4 to 6 of the DSpark paper
    markov.gate.{weight,bias}   markov.joint.{weight,bias}         gated and recurrent heads
    confidence.{weight,bias}                                       equation 7
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from outrider.backends.layers import Shape
from outrider.checkpoints import Design, DraftCheckpoint, Form, Sizes, deepspec, specforge, speculators
from outrider.checkpoints.stack_format import refuse_unknown, require
from outrider.errors import CheckpointError, nearest

__all__ = ["BlockDesign", "MarkovHead"]

MarkovHead = Literal["vanilla", "gated", "rnn"]
MARKOV_HEADS: tuple[MarkovHead, ...] = ("vanilla", "gated", "rnn")


@dataclass(frozen=True, slots=True)
class BlockDesign(Design):
    """Semi-autoregressive drafter: a parallel block, then a sequential head (DSpark; DFlash with both heads off)."""

    block_size: int
    """Slots of a block, the anchor's included."""
    mask_token_id: int
    sample_from_anchor: bool = True
    """Whether the anchor's slot predicts too: block_size drafts instead of block_size - 1."""
    markov_rank: int = 0
    """0: no Markov head."""
    markov_head: MarkovHead = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False
    """The confidence head also reads W1 of the token before."""

    def __post_init__(self) -> None:
        first = 1 if self.sample_from_anchor else 2
        if self.block_size < first:
            raise CheckpointError(f"block_size must be at least {first}, got {self.block_size}")
        if self.markov_rank < 0:
            raise CheckpointError(f"markov_rank must be at least 0, got {self.markov_rank}")
        if self.markov_head not in MARKOV_HEADS:
            raise CheckpointError(
                f"unknown markov_head_type {self.markov_head!r}; {nearest(self.markov_head, MARKOV_HEADS)}"
            )
        if self.confidence_with_markov and not self.markov_rank:
            raise CheckpointError("confidence_head_with_markov needs a markov_rank above 0, got 0")

    @property
    def kind(self) -> str:
        return "dspark" if self.markov_rank or self.confidence else "dflash"

    @property
    def drafts(self) -> int:
        """Tokens one block proposes."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        width, rank = sizes.width, self.markov_rank
        shapes = {"fc.weight": (width, sizes.feature_width), "hidden_norm.weight": (width,)}
        if rank:
            shapes |= {"markov.w1.weight": (sizes.vocabulary, rank), "markov.w2.weight": (sizes.drafted, rank)}
        if rank and self.markov_head == "gated":
            shapes |= {"markov.gate.weight": (rank, width + rank), "markov.gate.bias": (rank,)}
        if rank and self.markov_head == "rnn":
            shapes |= {"markov.joint.weight": (3 * rank, 2 * rank + width), "markov.joint.bias": (3 * rank,)}
        if self.confidence:
            reads = width + (rank if self.confidence_with_markov else 0)
            shapes |= {"confidence.weight": (1, reads), "confidence.bias": (1,)}
        return {name: Shape(sizes) for name, sizes in shapes.items()}

    def file_names(self, names: dict[str, str]) -> dict[str, str]:
        heads = {
            "markov.w1": "markov_head.markov_w1",
            "markov.w2": "markov_head.markov_w2",
            "markov.gate": "markov_head.gate_proj",
            "markov.joint": "markov_head.joint_proj",
            "confidence": "confidence_head.proj",
        }
        own = {f"{neutral}.{end}": f"{file}.{end}" for neutral, file in heads.items() for end in ("weight", "bias")}
        return names | {neutral: file for neutral, file in own.items() if neutral in names}

    def check(self, vocab_size: int) -> None:
        if not 0 <= self.mask_token_id < vocab_size:
            raise CheckpointError(
                f"mask_token_id must be a token id between 0 and {vocab_size - 1}, got {self.mask_token_id}"
            )

    @classmethod
    def forms(cls) -> Mapping[str, Sequence[Form]]:
        return {
            "deepspec": [_DEEPSPEC],
            "speculators": [_speculators("dflash"), _speculators("dspark")],
            "specforge": [_specforge("DFlashDraftModel"), _specforge("DSparkDraftModel")],
            "zlab": [Form("DFlashDraftModel", _read_zlab)],
        }


HEAD_KEYS = frozenset({"markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"})

# ------------------------------------------------------------------------------------------------ DeepSpec


def _read_deepspec(config: Mapping[str, Any]) -> BlockDesign:
    """Its DFlash is a DSpark with ``markov_rank`` 0 and no confidence head; the anchor's slot predicts in both."""
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


def _write_deepspec(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    design = _block(checkpoint)
    if not design.sample_from_anchor:
        raise CheckpointError(
            "DeepSpec's blocks draft from the anchor's slot, this drafter's do not; write it as speculators"
        )
    config: dict[str, Any] = {
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


_DEEPSPEC = Form(
    f"DSpark{deepspec.SUFFIX}",
    _read_deepspec,
    keys=HEAD_KEYS | {"block_size", "mask_token_id"},
    extras=frozenset({"num_anchors"}),
    write=_write_deepspec,
)

# ------------------------------------------------------------------------------------------------ speculators

LAYERS_KEY = "aux_hidden_state_layer_ids"
SLIDES = "sliding-window layers that are causal inside the block are not supported"


def _speculators(tag: str) -> Form:
    """vLLM's dflash never samples from the anchor: a block without heads that does is written as a dspark."""
    own = {"block_size", "mask_token_id", "sample_from_anchor", "sliding_window_non_causal", LAYERS_KEY}
    return Form(
        tag,
        lambda config: _read_speculators(config, tag == "dspark"),
        keys=frozenset(own) | (HEAD_KEYS if tag == "dspark" else frozenset()),
        extras=frozenset({"num_anchors"}),
        write=_write_speculators,
        holds=lambda design: (design.kind == "dspark" or design.sample_from_anchor) == (tag == "dspark"),
        layers=lambda config: speculators.named_layers(config, LAYERS_KEY),
    )


def _read_speculators(config: Mapping[str, Any], dspark: bool) -> BlockDesign:
    if speculators.slides(config["transformer_layer_config"]) and not config.get("sliding_window_non_causal"):
        raise CheckpointError(SLIDES)
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


def _write_speculators(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    design = _block(checkpoint)
    config: dict[str, Any] = {
        LAYERS_KEY: speculators.write_layers(checkpoint),
        "block_size": design.block_size,
        "mask_token_id": design.mask_token_id,
        "sample_from_anchor": design.sample_from_anchor,
        "sliding_window_non_causal": speculators.slides(checkpoint.decoder),
    }
    if design.kind == "dspark" or design.sample_from_anchor:
        config |= {
            "markov_rank": design.markov_rank,
            "markov_head_type": design.markov_head,
            "enable_confidence_head": design.confidence,
            "confidence_head_with_markov": design.confidence_with_markov,
        }
    return config


# ------------------------------------------------------------------------------------------------ SpecForge, z-lab

SECTION = "dflash_config"
SECTION_KEYS = HEAD_KEYS | {"attention_mode", "mask_token_id", "target_layer_ids", "projector_type"}
SECTION_KEYS |= {"confidence_head_alpha"}
PROJECTORS = ("dflash", "dspark")


def _specforge(tag: str) -> Form:
    """Everything in ``dflash_config``. Its DSpark is trained like DeepSpec's, the anchor's slot predicting; its DFlash
    like z-lab's, in which only masks predict."""
    return Form(
        tag,
        _read_specforge,
        keys=frozenset({"auto_map", "block_size", SECTION, "num_target_layers"}),
        layers=lambda config: specforge.spread_or_named(config, config[SECTION]),
        section=SECTION,
    )


def _read_specforge(config: Mapping[str, Any]) -> BlockDesign:
    own = config[SECTION]
    refuse_unknown(own, SECTION_KEYS, SECTION)
    projector = own.get("projector_type") or ("dspark" if "DSparkDraftModel" in config["architectures"] else "dflash")
    if projector not in PROJECTORS:
        raise CheckpointError(f"projector_type {projector!r} is not supported; {nearest(projector, PROJECTORS)}")
    dspark = projector == "dspark"
    confidence = dspark and bool(own.get("enable_confidence_head", (own.get("confidence_head_alpha") or 0.0) > 0))
    return BlockDesign(
        block_size=require(config, "block_size"),
        mask_token_id=require(own, "mask_token_id"),
        sample_from_anchor=dspark,
        markov_rank=(own.get("markov_rank") or 0) if dspark else 0,
        markov_head=own.get("markov_head_type", "vanilla"),
        confidence=confidence,
        confidence_with_markov=confidence and bool(own.get("confidence_head_with_markov")),
    )


def _read_zlab(config: Mapping[str, Any]) -> BlockDesign:
    """Newer files have the size of a block in the section. Layers that slide are causal unless the config says not."""
    own, causal = config[SECTION], config.get("is_causal")
    if causal or (causal is None and speculators.slides(config)):
        raise CheckpointError(f"{SLIDES}; z-lab's are, unless the config has is_causal = false (got {causal!r})")
    return BlockDesign(require({**config, **own}, "block_size"), require(own, "mask_token_id"), False)


def _block(checkpoint: DraftCheckpoint) -> BlockDesign:
    assert isinstance(checkpoint.design, BlockDesign)
    return checkpoint.design
