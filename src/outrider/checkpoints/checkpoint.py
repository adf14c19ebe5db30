"""A trained drafter in memory, free of any file format: what it is made of, its weights by neutral names, its target.

Neutral names are the canonical ones of a decoder stack (``outrider.backends.layers``) for everything the stack runs, and:

    embed.weight [V, D]   head.weight [Vd, D]                        absent where the target's are meant
    fc.weight [D, aux_layers Dt]  (block, chain)   [D, 2 D]  (module)      features, or embedding and hidden state, to D
    hidden_norm.weight [D]                                           block: after fc; chain, module: of the hidden state
    embed_norm.weight [D]                                            chain, module: of the next token's embedding
    feature_norm.weight [aux_layers Dt]   feature_norms.{i}.weight [Dt]    chain, before fc, where the design says so
    markov.w1.weight [V, r]  markov.w2.weight [Vd, r]  markov.gate.{weight,bias}  markov.joint.{weight,bias}
    confidence.{weight,bias}
    d2t int64 [Vd]  t2d bool [V]                                     reduced vocabulary: target id = draft id + d2t

V target vocabulary, Vd draft vocabulary, D draft width, Dt target width, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from outrider.backends.layers import Shape, weight_shapes
from outrider.checkpoints.stack_format import decoder_stack, require
from outrider.config import StackConfig
from outrider.errors import CheckpointError, IncompatibleDrafter, nearest
from outrider.scheduling.calibration import Calibration
from outrider.types import TargetSpec

__all__ = [
    "AutoregressiveDesign",
    "BlockDesign",
    "Design",
    "DraftCheckpoint",
    "MarkovHead",
    "ModuleDesign",
    "Sizes",
    "TargetFacts",
]

MarkovHead = Literal["vanilla", "gated", "rnn"]
MARKOV_HEADS: tuple[MarkovHead, ...] = ("vanilla", "gated", "rnn")


class Sizes(NamedTuple):
    """What the shapes of a drafter's weights depend on."""

    vocabulary: int
    drafted: int  # draft vocabulary
    width: int
    aux_layers: int
    tap_width: int


@dataclass(frozen=True, slots=True)
class BlockDesign:
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
    """The confidence head reads W1 of the token before, too."""

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
        """Weights beside the stack's."""
        width, rank = sizes.width, self.markov_rank
        shapes = {"fc.weight": (width, sizes.aux_layers * sizes.tap_width), "hidden_norm.weight": (width,)}
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


@dataclass(frozen=True, slots=True)
class AutoregressiveDesign:
    """Autoregressive head on auxiliary features, fed its own hidden states from the second draft on (EAGLE-3)."""

    depth: int = 7
    """Drafts a round."""
    norm_before_residual: bool = False
    """The residual stream starts from the normalised hidden state."""
    norm_before_fc: bool = False
    """One norm over the concatenated features."""
    norm_each_before_fc: bool = False
    """One norm for each auxiliary layer's features (``fc_norm`` in files)."""
    norm_output: bool = False
    """The hidden state is fed back after the final norm (EAGLE 3.1) instead of before it."""
    kind: ClassVar[str] = "eagle3"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise CheckpointError(f"a drafter must propose at least 1 token, got {self.depth}")
        if self.norm_before_fc and self.norm_each_before_fc:
            raise CheckpointError("norm_before_fc and fc_norm exclude each other, got both")

    @property
    def drafts(self) -> int:
        return self.depth

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        width, features = sizes.width, sizes.aux_layers * sizes.tap_width
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (width, features)}
        shapes |= {f"{name}.weight": (width,) for name in ("hidden_norm", "embed_norm")}
        if self.norm_before_fc:
            shapes["feature_norm.weight"] = (features,)
        if self.norm_each_before_fc:
            shapes |= {f"feature_norms.{i}.weight": (sizes.tap_width,) for i in range(sizes.aux_layers)}
        return {name: Shape(sizes) for name, sizes in shapes.items()}


@dataclass(frozen=True, slots=True)
class ModuleDesign:
    """One multi-token-prediction module, applied once or to its own output (DeepSeek-V3 report, section 2.2)."""

    depth: int = 1
    kind: ClassVar[str] = "mtp"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise CheckpointError(f"a drafter must propose at least 1 token, got {self.depth}")

    @property
    def drafts(self) -> int:
        return self.depth

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        width = sizes.width
        norms = {f"{name}.weight": Shape((width,)) for name in ("hidden_norm", "embed_norm")}
        return {"fc.weight": Shape((width, 2 * width))} | norms


Design = BlockDesign | AutoregressiveDesign | ModuleDesign


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """What a checkpoint says of the target it was trained for."""

    hidden_size: int
    num_layers: int | None = None
    name: str | None = None
    architecture: str | None = None


@dataclass(frozen=True, slots=True)
class DraftCheckpoint:
    """A drafter, its weights (None of them before the file is read), and what its file says beside them."""

    design: Design
    decoder: Mapping[str, Any]
    """Hugging Face config of the decoder layers; its ``vocab_size`` is the target's."""
    target_layers: tuple[int, ...] | None
    """Tapped layers, counted from 0, -1 the embedding output; None where the file does not say."""
    target: TargetFacts
    draft_vocab_size: int
    format: str
    frozen_embedding: bool = True
    """The embedding was copied from the target and not trained, so another one betrays another target."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Keys that change nothing in the computation, kept for the next file."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    calibration: Calibration | None = None
    """What its confidences need, where it was measured."""

    @property
    def kind(self) -> str:
        return self.design.kind

    @property
    def vocab_size(self) -> int:
        return int(require(self.decoder, "vocab_size"))

    @property
    def hidden_size(self) -> int:
        return int(require(self.decoder, "hidden_size"))

    @property
    def reduced(self) -> bool:
        """Whether it can only draft some of the target's tokens."""
        return self.draft_vocab_size != self.vocab_size

    @property
    def aux_layers(self) -> int:
        """How many layers it reads; three where the file does not say (EAGLE-3's low, middle, high)."""
        return 3 if self.target_layers is None else len(self.target_layers)

    def stack(self, head: bool) -> StackConfig:
        """Its decoder stack, with or without a head of its own."""
        wide = 2 * self.hidden_size if isinstance(self.design, AutoregressiveDesign) else 0
        decoder = dict(self.decoder)
        if isinstance(self.design, ModuleDesign):  # its config may be the whole target's
            decoder |= {"num_hidden_layers": 1, "layer_types": None}
        return decoder_stack(decoder, vocab_size=self.draft_vocab_size if head else 0, input_width=wide)

    def shapes(self) -> dict[str, Shape]:
        """Every weight by its neutral name."""
        sizes = Sizes(
            self.vocab_size, self.draft_vocab_size, self.hidden_size, self.aux_layers, self.target.hidden_size
        )
        shapes = weight_shapes(self.stack(head=True)) | self.design.shapes(sizes)
        shapes["embed.weight"] = Shape((self.vocab_size, self.hidden_size), required=self._own_width)
        shapes["head.weight"] = Shape(
            (self.draft_vocab_size, self.hidden_size), required=self.reduced or self._own_width
        )
        shapes["d2t"] = Shape((self.draft_vocab_size,), required=self.reduced)
        shapes["t2d"] = Shape((self.vocab_size,), required=False)
        return shapes

    @property
    def _own_width(self) -> bool:
        return self.hidden_size != self.target.hidden_size

    def stack_weights(self) -> dict[str, Tensor]:
        """The weights that the stack itself runs, without embedding and head."""
        names = weight_shapes(self.stack(head=False))
        return {name: tensor for name, tensor in self.tensors.items() if name in names and name != "embed.weight"}

    def layers_for(self, spec: TargetSpec) -> tuple[int, ...]:
        """The target's layers it reads, with EAGLE-3's convention where the file is silent."""
        if self.target_layers is not None:
            return self.target_layers
        return (1, spec.num_layers // 2 - 1, spec.num_layers - 4)

    def check_target(self, spec: TargetSpec, layers: tuple[int, ...]) -> None:
        """Raise IncompatibleDrafter where this drafter cannot read or speak to that target."""
        facts = self.target

        def differ(what: str, got: Any, expected: Any) -> None:
            if got != expected:
                name = f" {spec.name!r}" if spec.name else ""
                raise IncompatibleDrafter(
                    f"the drafter was made for another target: its {what} is {got}, the target{name} has {expected}"
                )

        differ("vocabulary size", self.vocab_size, spec.vocab_size)
        differ("target hidden size", facts.hidden_size, spec.hidden_size)
        if facts.num_layers is not None:
            differ("number of target layers", facts.num_layers, spec.num_layers)
        if len(layers) != self.aux_layers:
            raise IncompatibleDrafter(
                f"the drafter reads {self.aux_layers} target layers, got {len(layers)}: {list(layers)}"
            )
        last = spec.num_layers - 1
        if last in layers:
            raise IncompatibleDrafter(
                f"the drafter aux_layers the target's last layer ({last}), which is ambiguous: libraries report it before or "
                "after the final norm; a drafter must be trained on earlier layers"
            )
        outside = [layer for layer in layers if not -1 <= layer < last]
        if outside or len(set(layers)) < len(layers):
            raise IncompatibleDrafter(
                f"the drafter aux_layers layers {list(layers)}; expected different ones from -1 (the embedding) to {last - 1}"
            )

    def check_tensors(self, names: Mapping[str, str]) -> None:
        """Raise CheckpointError for weights that no healthy drafter has. ``names``: neutral name -> name in the file"""
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise CheckpointError(f"tensor {names.get(name, name)!r} holds {bad} values that are NaN or infinite")
        design = self.design
        if isinstance(design, BlockDesign) and not 0 <= design.mask_token_id < self.vocab_size:
            largest = self.vocab_size - 1
            raise CheckpointError(
                f"mask_token_id must be a token id between 0 and {largest}, got {design.mask_token_id}"
            )
        if "d2t" in self.tensors:
            self._check_vocabulary(self.tensors["d2t"])

    def _check_vocabulary(self, d2t: Tensor) -> None:
        ids = d2t + torch.arange(len(d2t))
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise CheckpointError(
                f"d2t points to target ids {int(ids.min())} to {int(ids.max())} in a vocabulary of {self.vocab_size}; "
                "it must hold offsets: target id = draft id + d2t[draft id]"
            )
        if len(ids.unique()) != len(ids):
            raise CheckpointError(
                "d2t maps two draft ids to one target id; it must hold offsets: target id = draft id + d2t[draft id]"
            )
        if "t2d" in self.tensors:
            mask = torch.zeros(self.vocab_size, dtype=torch.bool)
            mask[ids] = True
            if not torch.equal(mask, self.tensors["t2d"].bool()):
                raise CheckpointError("t2d and d2t disagree on which target tokens can be drafted")
