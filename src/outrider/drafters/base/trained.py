"""Drafters with weights: made from a checkpoint on disk, with or without a KV cache of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base.draft_cache import DraftCache
from outrider.drafters.base.network import load_net
from outrider.errors import CheckpointError, InvalidRequest, nearest
from outrider.registry import find
from outrider.types import Backend, Context, CoreScaling, Proposal, RaggedBatch, Rng, TargetModel, Values

__all__ = ["CachedDrafter", "TrainedConfig", "TrainedDrafter"]


@dataclass(frozen=True, slots=True)
class TrainedConfig:
    """Options that every trained drafter has. Raises InvalidRequest for values out of range."""

    model: str
    """The trained drafter: a directory or a hub id."""
    draft_tokens: int | None = None
    """The most tokens it proposes in a round; None: as many as it was trained for."""
    dtype: str = "auto"
    """Precision of the drafter alone; auto: int8 where the native core runs, else the target's."""

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise InvalidRequest(f"draft_tokens of a trained drafter must be at least 1, got {self.draft_tokens}")


class TrainedDrafter(ABC):
    """A drafter whose weights are read from a checkpoint."""

    Config: ClassVar[type[Any]] = TrainedConfig
    """Its options; ``model`` names the checkpoint, ``dtype`` its precision, and every other has a default."""
    kinds: ClassVar[tuple[str, ...]]
    """Kinds of checkpoint it runs, the one it is listed under first."""

    def __init__(
        self,
        checkpoint: DraftCheckpoint,
        target: TargetModel,
        backend: Backend,
        *,
        config: Any,
        dtype: torch.dtype | str,
        max_rows: int,
        layers: tuple[int, ...] | None = None,
    ) -> None:
        """``layers`` of the target it reads, None: those the checkpoint names. Raises IncompatibleDrafter where the
        checkpoint does not fit the target."""
        self.aux_layers: tuple[int, ...] = layers or checkpoint.layers_for(target.spec)
        checkpoint.check_target(target.spec, self.aux_layers)
        self.block: int = config.draft_tokens or checkpoint.design.drafts
        self.calibration = checkpoint.calibration
        self._scaled: Context | None = None  # whose scalings are at hand
        self._scalings: Sequence[CoreScaling | None] = ()
        self.net = load_net(checkpoint, target, backend, dtype)

    @abstractmethod
    def open(self, slot: int, capacity: int) -> None:
        """See ``outrider.types.Drafter``."""

    @abstractmethod
    def close(self, slot: int) -> None:
        """See ``outrider.types.Drafter``."""

    @abstractmethod
    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        """See ``outrider.types.Drafter``."""

    @abstractmethod
    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """See ``outrider.types.Drafter``."""

    @abstractmethod
    def follow(self, slots: list[int], path: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draft logits along a given path, for measuring and calibrating: position k is what would be drafted after
        ``path[:, :k + 1]``, which begins with the rows' last tokens.

        int64 [n, K] -> [n, K, Vd], and confidence logits [n, K] where the drafter has that head.
        """

    @classmethod
    def from_config(
        cls,
        config: Any,
        target: TargetModel,
        *,
        backend: Backend | None = None,
        dtype: torch.dtype | str | None = None,
        max_rows: int = 8,
        **services: Any,
    ) -> Self:
        """Read the checkpoint ``config.model``. ``backend`` runs it (plain PyTorch by default), in ``dtype`` (what
        the config says), ``max_rows`` sequences at a time.

        Raises CheckpointError, and IncompatibleDrafter where it was not made for this target.
        """
        checkpoint = checkpoints.load(config.model)
        if checkpoint.kind not in cls.kinds:
            raise CheckpointError(
                f"{config.model} holds a drafter of kind {checkpoint.kind!r}; {nearest(checkpoint.kind, cls.kinds)}"
            )
        engine = backend or find("backend", "reference")()
        if dtype is None:
            quantised = "int8" if engine.name == "native" else target.spec.dtype
            dtype = quantised if config.dtype == "auto" else config.dtype
        return cls(checkpoint, target, engine, config=config, dtype=dtype, max_rows=max_rows)

    def calibrated(self, proposal: Proposal, context: Context) -> Proposal:
        """The proposal with its confidences scaled by the checkpoint's calibration, where it has one."""
        return proposal if self.calibration is None else self.calibration.calibrated(proposal, context)

    def core_scalings(self, context: Context, rows: Sequence[int]) -> Sequence[CoreScaling | None]:
        """The same for a backend that scales confidences itself: those of some rows, empty where there are none."""
        if self.calibration is None:
            return ()
        if self._scaled is not context:  # it stays while the same requests go on
            self._scaled, self._scalings = context, self.calibration.core_scalings(context.params)
        return [self._scalings[b] for b in rows]

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a directory with this config.json holds such a drafter. Raises CheckpointError for a damaged one."""
        return checkpoints.recognise(config) is not None and checkpoints.read_header(config).kind == cls.kinds[0]


class CachedDrafter(TrainedDrafter):
    """A trained drafter whose layers keep keys and values of the committed tokens."""

    pairs: ClassVar[bool] = False
    """Whether a position's keys and values depend on the token after it too."""
    core: Any = None
    """Drafts all tokens in one call of the backend, where it can; a drafter sets it when it is made."""

    def __init__(
        self,
        checkpoint: DraftCheckpoint,
        target: TargetModel,
        backend: Backend,
        *,
        config: Any,
        dtype: torch.dtype | str,
        max_rows: int,
    ) -> None:
        """See ``TrainedDrafter``; ``config.target_layers`` replaces the checkpoint's."""
        layers: tuple[int, ...] | None = config.target_layers
        super().__init__(checkpoint, target, backend, config=config, dtype=dtype, max_rows=max_rows, layers=layers)
        self.cache = DraftCache(self.net.stack, max(self.block, checkpoint.design.drafts) + 1, max_rows, self.pairs)

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        """All rows together. A row with missing features drafts nothing."""
        lengths = self.cache.lengths(slots, context, limit, self.block)
        if not any(lengths):
            return Proposal.empty(len(slots))
        if self.core is not None and not context.changed:  # backends know temperature and truncation
            return self._draft_at_once(slots, last, lengths, context, rng)
        return self.calibrated(self._draft_stepwise(slots, last, lengths, context, rng), context)

    @abstractmethod
    def _draft_at_once(
        self, named: list[int], last: list[int], lengths: list[int], context: Context, rng: Rng
    ) -> Proposal:
        """One call of ``core`` for the rows that draft, ``lengths`` tokens each, with calibrated confidences.
        ``named``: all rows' slots."""

    @abstractmethod
    def _draft_stepwise(
        self, named: list[int], last: list[int], lengths: list[int], context: Context, rng: Rng
    ) -> Proposal:
        """The same in steps, which any processor of logits may change."""

    def open(self, slot: int, capacity: int) -> None:
        self.cache.open(slot, capacity)

    def match(self, tokens: Sequence[int]) -> int:
        """See ``outrider.types.SharesPrefixes``."""
        return self.cache.match(tokens)

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        self.cache.adopt(slot, tokens, count)

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        self.cache.publish(slot, tokens)

    def forget(self) -> None:
        """Drop what finished sequences have left."""
        self.cache.forget()

    def reset_rows(self) -> None:
        """Close all slots at once."""
        self.cache.reset()

    def close(self, slot: int) -> None:
        self.cache.close(slot)
