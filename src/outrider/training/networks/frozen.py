"""The target's embedding and head for a drafter in training, which stay frozen; weights from a checkpoint and back.

n rows, D width, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base import head_rows, measured_softcap
from outrider.errors import CheckpointError, InvalidRequest
from outrider.types import TargetModel

__all__ = ["Frozen", "fill"]

COPY = 2.0**-7  # relative difference up to which a matrix is a copy of the target's: bfloat16's
LENGTHS = ("block_size", "depth")  # of a round: all else in a design is part of what was learnt


class Frozen:
    """Embedding, head and vocabulary, which are no parameters: the optimiser and the run's state do not hold them."""

    def __init__(self, checkpoint: DraftCheckpoint, target: TargetModel) -> None:
        self._given, self._target = checkpoint, target
        tensors = checkpoint.tensors
        self._softcap = checkpoint.stack(head=True).logit_softcap
        self._embedding = tensors["embed.weight"].float() if "embed.weight" in tensors else None
        self._scale = checkpoint.stack(head=False).embedding_scale
        self._ids: Tensor | None = None
        self._draft_id: Tensor | None = None
        if checkpoint.reduced:
            if "d2t" not in tensors:
                raise CheckpointError("a reduced draft vocabulary needs d2t, which the drafter to be trained lacks")
            self._ids = tensors["d2t"].long() + torch.arange(checkpoint.draft_vocab_size)
            self._draft_id = torch.full((checkpoint.vocab_size,), -1).scatter_(
                0, self._ids, torch.arange(checkpoint.draft_vocab_size)
            )
        if "head.weight" in tensors:
            self.head = tensors["head.weight"].float()
        else:
            self.head = head_rows(target, self._ids)
            self._softcap = measured_softcap(self.head, self._ids, target)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [n] -> [n, D]"""
        if self._embedding is None:
            return self._target.embed(tokens).float().clone()
        return F.embedding(tokens, self._embedding) * self._scale

    def unembed(self, hidden: Tensor) -> Tensor:
        """States after the final norm to base logits. [n, D] -> [n, Vd]"""
        logits = F.linear(hidden, self.head)
        return torch.tanh(logits.float() / self._softcap) * self._softcap if self._softcap else logits

    def distribution(self, logits: Tensor) -> Tensor:
        """The target's distribution at temperature 1 of the tokens that can be drafted. [n, V] -> [n, Vd]"""
        distribution = logits.float().softmax(-1)
        return distribution if self._ids is None else distribution[:, self._ids]

    def draft_ids(self, tokens: Tensor) -> Tensor:
        """Draft ids of target ids, -1 where there is none, and for -1. int64 [n] -> [n]"""
        return tokens if self._draft_id is None else torch.where(tokens < 0, -1, self._draft_id[tokens])

    # -------------------------------------------------------------------------------------------- weights

    def starting_from(self, checkpoint: DraftCheckpoint) -> Frozen:
        """With the order of the checkpoint's draft vocabulary, and its embedding and head where they are no copies of
        the target's."""
        device = self.head.device
        given = replace(self._given, tensors={**self._given.tensors, **_some(checkpoint, "d2t", device=device)})
        ordered = Frozen(given, self._target)
        theirs = ordered.filled(replace(given, tensors={})).tensors
        own = {
            name: tensor
            for name, tensor in _some(checkpoint, "embed.weight", "head.weight", device=device).items()
            if name not in checkpoint.four_bits and (theirs[name] - tensor).norm() > COPY * tensor.norm()
        }
        if not own:
            return ordered
        kept = replace(given, tensors={**given.tensors, **own}, frozen_embedding=checkpoint.frozen_embedding)
        return Frozen(kept, self._target)

    def fill(self, module: nn.Module) -> None:
        """Copy the checkpoint's weights into the module; a new checkpoint has none."""
        tensors = self._given.tensors
        parameters = {_neutral(name): parameter for name, parameter in module.named_parameters()}
        if not parameters.keys() & tensors.keys():
            return
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def checkpoint(self, module: nn.Module) -> DraftCheckpoint:
        """The module's weights instead of the given checkpoint's; its frozen tensors stay."""
        learnt = {_neutral(name): _whole(parameter) for name, parameter in module.named_parameters()}
        return replace(self._given, tensors={**self._given.tensors, **learnt})

    def filled(self, checkpoint: DraftCheckpoint) -> DraftCheckpoint:
        """With the target's embedding and head among the tensors, as DeepSpec's files have them."""
        every = torch.arange(checkpoint.vocab_size, device=self.head.device)
        frozen = {"embed.weight": self.embed(every) / self._scale, "head.weight": self.head}
        return replace(checkpoint, tensors={**frozen, **checkpoint.tensors})


def fill(module: nn.Module, checkpoint: DraftCheckpoint, name: str) -> None:
    """Copy a checkpoint's weights into a network of the same kind, target layers and shape, which then also has the
    checkpoint's own embedding and head. Raises InvalidRequest naming the first difference; ``name`` is the
    checkpoint's."""
    trained: DraftCheckpoint = module.snapshot()  # type: ignore[operator]
    if checkpoint.kind != trained.kind:
        raise InvalidRequest(
            f"{name} is a drafter of kind {checkpoint.kind!r}, the drafter to be trained of kind {trained.kind!r}; "
            "start from one of the same kind"
        )
    if checkpoint.target_layers not in (None, module.aux_layers):  # the same shapes, but other features
        raise InvalidRequest(
            f"{name} reads layers {list(checkpoint.target_layers or ())} of the target, the drafter to be trained "
            f"{list(trained.target_layers or ())}; give the options it was trained with"
        )
    known = {_neutral(parameter_name) for parameter_name, _ in module.named_parameters()}
    lost = sorted(checkpoint.tensors.keys() - known - {"embed.weight", "head.weight", "d2t", "t2d"})
    if lost:
        raise InvalidRequest(
            f"{name} holds {lost[0]}, which the drafter to be trained has no place for; start from another"
        )
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            given = checkpoint.tensors.get(_neutral(parameter_name))
            if given is None or given.shape != parameter.shape:
                got = "none" if given is None else f"one of shape {list(given.shape)}"
                raise InvalidRequest(
                    f"{name} does not have the shape that is trained: {_neutral(parameter_name)} should have shape "
                    f"{list(parameter.shape)}, it has {got}; give the options it was trained with"
                )
            parameter.copy_(given)
    _check_same(trained, checkpoint, name)
    module.frozen = module.frozen.starting_from(checkpoint)  # type: ignore[operator, union-attr]


def _check_same(trained: DraftCheckpoint, checkpoint: DraftCheckpoint, name: str) -> None:
    """Raise InvalidRequest where the same weights would draft something else."""
    facts = [
        {"draft_vocab": one.draft_vocab_size, **asdict(one.design)}  # type: ignore[call-overload]
        for one in (checkpoint, trained)
    ]
    for what, got in facts[0].items():
        if what not in LENGTHS and got != (expected := facts[1][what]):
            raise InvalidRequest(
                f"{name} has {what} {got}, the drafter to be trained {expected}; give the options it was trained with"
            )
    mine, theirs = (one.stack(head=False) for one in (trained, checkpoint))
    if (mine.layers, mine.norm_eps, mine.activation) != (theirs.layers, theirs.norm_eps, theirs.activation):
        raise InvalidRequest(
            f"{name} has layers of another rotary embedding, window, norm or activation than those to be trained, "
            "which follow the target's config.json; start from another"
        )


def _some(checkpoint: DraftCheckpoint, *names: str, device: torch.device) -> Mapping[str, Tensor]:
    """Those of the tensors that the checkpoint has."""
    return {name: checkpoint.tensors[name].to(device) for name in names if name in checkpoint.tensors}


def _neutral(name: str) -> str:
    return name.removeprefix("stack.")


def _whole(parameter: Tensor) -> Tensor:
    """A copy, gathered where it is sharded."""
    gather = getattr(parameter, "full_tensor", None)
    return (parameter if gather is None else gather()).detach().clone()
