"""A loaded drafter, whatever its file format: its design, its weights by neutral names, its target.

Neutral names: the canonical ones of a decoder stack (``outrider.backends.layers``), and

    embed.weight [V, D]   head.weight [Vd, D]    absent where the target's are used
    d2t int64 [Vd]   t2d bool [V]                reduced vocabulary: target id = draft id + d2t
    the design's own (``Design.shapes``)

V target vocabulary, Vd draft vocabulary, D draft width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.backends.layers import Shape, weight_shapes
from outrider.checkpoints.stack_format import decoder_stack, named_biases, require
from outrider.config import StackConfig
from outrider.errors import CheckpointError, IncompatibleDrafter
from outrider.scheduling.calibration import Calibration
from outrider.types import TargetSpec, readable_layers

__all__ = ["Design", "DraftCheckpoint", "Form", "Sizes", "TargetFacts"]


class Sizes(NamedTuple):
    """What the shapes of a drafter's weights depend on."""

    vocabulary: int
    drafted: int  # draft vocabulary
    width: int
    num_aux_layers: int
    target_width: int

    @property
    def feature_width(self) -> int:
        return self.num_aux_layers * self.target_width


class Design(ABC):
    """What one kind of trained drafter is made of: a frozen dataclass whose fields are JSON values.

    The catalogue of designs names its class. Every design can be written in Outrider's own format; ``forms`` says in
    which other formats it exists.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def kind(self) -> str:
        """The drafter that runs it, and the name of this class in the catalogue of designs."""

    @property
    @abstractmethod
    def drafts(self) -> int:
        """The most tokens one round proposes."""

    @abstractmethod
    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        """Its weights by neutral name, without those of its decoder layers, embedding and head."""

    def layers_of(self, decoder: Mapping[str, Any]) -> Mapping[str, Any]:
        """The Hugging Face config of its decoder layers, from the one in its file."""
        return decoder

    def input_width(self, width: int) -> int:
        """Width of the first layer's attention input, 0: the drafter's ``width`` (see ``StackConfig.input_width``)."""
        return 0

    def file_names(self, names: dict[str, str]) -> dict[str, str]:
        """Neutral name -> name in files, from the names that most drafters use."""
        return names

    @property
    def default_layer_count(self) -> int:
        """How many target layers it reads where its file names none; 0: the file must name them."""
        return 0

    def default_layers(self, target_layers: int) -> tuple[int, ...]:
        """The target layers it reads where its file names none. Raises CheckpointError where that is not known."""
        raise CheckpointError("config.json names no layers of the target; give target_layers")

    def check(self, vocab_size: int) -> None:  # noqa: B027 (most designs have nothing to check)
        """Raise CheckpointError for values that do not fit the target's vocabulary."""

    @classmethod
    def forms(cls) -> Mapping[str, Sequence[Form]]:
        """How each file format beside Outrider's own holds this design, by the format's name."""
        return {}


@dataclass(frozen=True, slots=True)
class Form:
    """How one design appears in the config.json of one file format. The format's module adds what all designs share."""

    tag: str
    """What names the design there: an architecture, or the value of the format's own key."""
    read: Callable[[Mapping[str, Any]], Design]
    """The design of a config.json. Raises CheckpointError."""
    keys: frozenset[str] = frozenset()
    """The design's own keys."""
    extras: frozenset[str] = frozenset()
    """Keys of this design that change nothing in the computation and are kept for the next file."""
    write: Callable[[DraftCheckpoint], dict[str, Any]] | None = None
    """The design's own keys of a checkpoint, None where the format is only read. Raises CheckpointError."""
    holds: Callable[[Any], bool] = lambda design: True
    """Whether a design is written under this tag."""
    layers: Callable[[Mapping[str, Any]], tuple[int, ...] | None] = lambda config: None
    """The target layers a config.json names, counted from 0, where each design of the format has a key of its own."""
    section: str | None = None
    """The object in config.json that such a file must have."""


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
    """Layers of the target it reads, counted from 0, -1 the embedding output; None where the file does not say."""
    target: TargetFacts
    draft_vocab_size: int
    format: str
    frozen_embedding: bool = True
    """The embedding is an untrained copy of the target's: a mismatch means that this is another target."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Keys that change nothing in the computation, kept for the next file."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    four_bits: Mapping[str, Tensor] = field(default_factory=dict)
    """float16 [rows, columns / 32]: the scales of those matrices among the tensors that are in 4 bits, as
    ``packed_tensors`` stores them. Whoever changes such a matrix removes its scales."""
    calibration: Calibration | None = None
    """The scaling of its confidences, where one was fitted."""

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
        """Whether its draft ids are not the target's: they are fewer, or in another order."""
        return self.draft_vocab_size != self.vocab_size or ("d2t" in self.tensors and bool(self.tensors["d2t"].any()))

    @property
    def drafted(self) -> Tensor:
        """Whether each token of the target can be drafted, int64 0 or 1 [V]."""
        ids = torch.arange(self.draft_vocab_size)
        if self.reduced:
            ids = ids + self.tensors["d2t"].long()
        return torch.zeros(self.vocab_size, dtype=torch.int64).index_fill(0, ids, 1)

    @property
    def num_aux_layers(self) -> int:
        """How many layers of the target it reads."""
        return self.design.default_layer_count if self.target_layers is None else len(self.target_layers)

    def stack(self, head: bool) -> StackConfig:
        """Its decoder stack, with or without a head of its own. A design without layers has an empty one."""
        return decoder_stack(
            self.design.layers_of(self.decoder),
            vocab_size=self.draft_vocab_size if head else 0,
            input_width=self.design.input_width(self.hidden_size),
        )

    def shapes(self) -> dict[str, Shape]:
        """Every weight by its neutral name."""
        sizes = Sizes(
            self.vocab_size, self.draft_vocab_size, self.hidden_size, self.num_aux_layers, self.target.hidden_size
        )
        stack = self.stack(head=True)
        layers = weight_shapes(stack) if stack.layers else {}
        biases = named_biases(self.design.layers_of(self.decoder))
        layers |= {name: layers[name]._replace(required=True) for name in biases if name in layers}
        shapes = layers | self.design.shapes(sizes)
        shapes["embed.weight"] = Shape((self.vocab_size, self.hidden_size), required=self._own_width)
        shapes["head.weight"] = Shape(
            (self.draft_vocab_size, self.hidden_size),
            required=self._own_width,  # a reduced one is made of the target's rows
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

    def in_floating_point(self) -> DraftCheckpoint:
        """Without anything in 4 bits, as other formats have it. A head in 4 bits is the target's, rounded: it goes, so
        that the target's own serves again, with the cap of its logits."""
        tensors = {name: t for name, t in self.tensors.items() if name != "head.weight" or name not in self.four_bits}
        return replace(self, tensors=tensors, four_bits={})

    def layers_for(self, spec: TargetSpec) -> tuple[int, ...]:
        """The target's layers it reads, by its design's convention where the file names none."""
        return self.design.default_layers(spec.num_layers) if self.target_layers is None else self.target_layers

    def check_target(self, spec: TargetSpec, layers: tuple[int, ...]) -> None:
        """Raise IncompatibleDrafter where this drafter was trained for another target, or cannot read these layers."""
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
        if len(layers) != self.num_aux_layers:
            raise IncompatibleDrafter(
                f"the drafter reads {self.num_aux_layers} target layers, got {len(layers)}: {list(layers)}"
            )
        last = spec.num_layers - 1
        if last in layers:
            raise IncompatibleDrafter(
                f"the drafter reads the target's last layer ({last}), which is ambiguous: libraries report it before "
                "or after the final norm; train a drafter on earlier layers"
            )
        outside = set(layers) - set(readable_layers(spec.num_layers))
        if outside or len(set(layers)) < len(layers):
            raise IncompatibleDrafter(
                f"the drafter reads the target's layers {list(layers)}; expected different ones from -1 (the "
                f"embedding) to {last - 1}; the drafter's option target_layers gives others"
            )

    def check_tensors(self, names: Mapping[str, str]) -> None:
        """Raise CheckpointError for values that no trained drafter has. ``names``: neutral name -> name in the file"""
        for name, tensor in self.tensors.items():
            # A sum meets every value once and keeps NaN and infinity; it may also overflow, hence the second look.
            if tensor.is_floating_point() and not (tensor.sum().isfinite() or tensor.isfinite().all()):
                bad = int((~torch.isfinite(tensor)).sum())
                raise CheckpointError(f"tensor {names.get(name, name)!r} holds {bad} values that are NaN or infinite")
        self.design.check(self.vocab_size)
        if "d2t" in self.tensors:
            self._check_vocabulary(self.tensors["d2t"])

    def _check_vocabulary(self, d2t: Tensor) -> None:
        if d2t.is_floating_point() or d2t.is_complex():
            raise CheckpointError(f"d2t is {str(d2t.dtype).removeprefix('torch.')}; expected whole numbers")
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
