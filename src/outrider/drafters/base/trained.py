"""How a drafter is made from a checkpoint on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base.draft_cache import DraftCache
from outrider.drafters.base.network import load_net
from outrider.errors import CheckpointError, nearest
from outrider.registry import find
from outrider.types import Backend, Context, Proposal, RaggedBatch, TargetModel

__all__ = ["TrainedDrafter"]


class _Options(Protocol):
    @property
    def model(self) -> str: ...


class TrainedDrafter(ABC):
    """A drafter with weights and a draft memory of its own."""

    Config: ClassVar[type[Any]]
    """Its options; ``model`` names the checkpoint, and every other has a default."""
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
    ) -> None:
        """Raises IncompatibleDrafter where the checkpoint does not fit the target."""
        self.aux_layers: tuple[int, ...] = config.target_layers or checkpoint.layers_for(target.spec)
        checkpoint.check_target(target.spec, self.aux_layers)
        self.block: int = config.draft_tokens or checkpoint.design.drafts
        self.calibration = checkpoint.calibration
        self.net = load_net(checkpoint, target, backend, dtype)
        self.cache = DraftCache(self.net.stack, max(self.block, checkpoint.design.drafts) + 1, max_rows)

    @abstractmethod
    def observe(self, batch: RaggedBatch, features: Tensor | None, hidden: Tensor | None = None) -> None:
        """See ``outrider.types.Drafter``."""

    @abstractmethod
    def follow(self, slots: list[int], path: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draft logits along a given path, for measuring and calibrating: place k is what would be drafted after
        ``path[:, :k + 1]``, which begins with the rows' last tokens.

        int64 [n, K] -> [n, K, Vd], and confidence logits [n, K] where the drafter has that head.
        """

    @classmethod
    def from_config(
        cls,
        config: _Options,
        target: TargetModel,
        *,
        backend: Backend | None = None,
        dtype: torch.dtype | str | None = None,
        max_rows: int = 8,
        **services: Any,
    ) -> Self:
        """Read the checkpoint ``config.model``. ``backend`` runs it (plain PyTorch by default), in ``dtype`` (the
        target's), ``max_rows`` sequences at a time.

        Raises CheckpointError, and IncompatibleDrafter where it was not made for this target.
        """
        checkpoint = checkpoints.load(config.model)
        if checkpoint.kind not in cls.kinds:
            raise CheckpointError(
                f"{config.model} holds a drafter of kind {checkpoint.kind!r}; {nearest(checkpoint.kind, cls.kinds)}"
            )
        engine = backend or find("backend", "reference")()
        return cls(checkpoint, target, engine, config=config, dtype=dtype or target.spec.dtype, max_rows=max_rows)

    def calibrated(self, proposal: Proposal, context: Context) -> Proposal:
        """The proposal with its confidences, a head's or margins, put right where the checkpoint says how."""
        return proposal if self.calibration is None else self.calibration.calibrated(proposal, context)

    def open(self, slot: int, capacity: int) -> None:
        self.cache.open(slot, capacity)

    def reset_rows(self) -> None:
        """Close all slots at once."""
        self.cache.reset()

    def close(self, slot: int) -> None:
        self.cache.close(slot)

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a directory with this config.json holds such a drafter. Raises CheckpointError for a broken one."""
        return checkpoints.recognise(config) is not None and checkpoints.read_header(config).kind == cls.kinds[0]
