"""A trained drafter's network on a backend, with the embedding and the head it shares with its target or has itself.

n rows, V target vocabulary, Vd draft vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.checkpoints import DraftCheckpoint
from outrider.checkpoints.packed_tensors import FourBitWeights
from outrider.config import StackConfig
from outrider.errors import IncompatibleDrafter, InvalidRequest
from outrider.types import Backend, HasStack, Stack, StackOutput, TargetModel, TiedHead

__all__ = ["DraftNet", "head_rows", "linear", "load_net", "measured_softcap", "rms_norm", "rowwise"]

EQUAL = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2**-7, "int8": 0.03, "int4": 0.2}
"""Relative difference up to which two matrices are the same one, by the dtype the target was loaded in."""
BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "int8": 8, "file": 8, "int4": 8}
"""Of a value of a head in each dtype; int4 keeps heads in int8."""
UNIT = 2.0**-6  # length of the vectors that a head is read with: so short that a soft cap changes nothing
LARGE = 2.0**14  # a logit that any soft cap is far below
STRANGE = 0.5  # relative difference above which a frozen copy of the embedding is another target's
PROBES = 4
LANES = 64  # a multiple of the elements of any processor's vectors
CHUNK = 8192  # rows of a matrix compared at a time


@dataclass(frozen=True, slots=True)
class DraftNet:
    """A drafter's layers on a backend, with the embedding and the head it uses: its own, or the target's."""

    stack: Stack
    embed: Callable[[Tensor], Tensor]  # int64 [...] -> [..., D]
    unembed: Callable[[Tensor], Tensor]  # [..., D] -> [..., Vd]
    target_ids: Tensor | None  # int64 [Vd]: target id of each draft id; None: the same
    vocab_size: int
    backend: Backend
    embedding: Stack | None  # the stacks that embed and unembed; None: the target is no stack
    head: Stack | None

    def logits(self, output: StackOutput) -> Tensor:
        """[R, Vd] of a pass through ``stack``, which has made them already where the head is its own."""
        return self.unembed(output.hidden) if output.logits is None else output.logits

    def spread(self, logits: Tensor) -> Tensor:
        """[n, Vd] -> [n, V]: no mass on tokens that cannot be drafted."""
        if self.target_ids is None:
            return logits
        rows = logits.new_full((len(logits), self.vocab_size), -torch.inf)
        rows[:, self.target_ids] = logits
        return rows


def load_net(checkpoint: DraftCheckpoint, target: TargetModel, backend: Backend, dtype: torch.dtype | str) -> DraftNet:
    """Load a drafter's stack, without an embedding or a head that equals the target's.

    A reduced vocabulary has a head of its own, made of the target's rows where the checkpoint holds none; and so has a
    drafter whose dtype has fewer bits than the target's, because a draft reads the whole head. Matrices that the
    checkpoint has in 4 bits stay as they are with the dtypes int8 and int4. Raises IncompatibleDrafter where a frozen
    copy of the embedding is clearly not this target's.
    """
    tensors, weights = checkpoint.tensors, checkpoint.stack_weights()
    rounded_head = "head.weight" in checkpoint.four_bits  # made of the target's rows
    config = checkpoint.stack(head=True)
    if not config.layers:
        weights["norm.weight"] = torch.ones(config.hidden_size)  # an empty stack, which is never run
    equal = EQUAL[_name(dtype)]
    own_embed = False
    if "embed.weight" in tensors:
        difference = _embedding_difference(tensors["embed.weight"], config.embedding_scale, target)
        if checkpoint.frozen_embedding and difference > STRANGE:
            raise IncompatibleDrafter(
                f"the drafter was made for another target: its copy of the embedding differs from that of "
                f"{target.spec.name or 'this one'} by {difference:.0%}"
            )
        own_embed = difference > equal
    if own_embed:
        weights["embed.weight"] = tensors["embed.weight"]
    theirs = target.stack if isinstance(target, HasStack) else None
    ids = tensors["d2t"].long() + torch.arange(checkpoint.draft_vocab_size) if checkpoint.reduced else None
    fewer_bits = theirs is not None and BITS[_name(dtype)] < BITS[_name(theirs.dtype)]
    head = tensors.get("head.weight")
    copied_head = head is None or rounded_head or _head_difference(head, ids, target) <= equal
    own_head = checkpoint.reduced or fewer_bits or rounded_head or not copied_head
    stack_config = checkpoint.stack(head=own_head)
    if own_head:
        weights["head.weight"] = rows = head_rows(target, ids) if head is None else head
        if copied_head:
            cap = measured_softcap(rows, ids, target) if theirs is None else theirs.config.logit_softcap
            stack_config = replace(stack_config, logit_softcap=cap)
    if checkpoint.four_bits and backend.name == "native" and _name(dtype) in ("int8", "int4"):
        stack = backend.load(stack_config, FourBitWeights(weights, checkpoint.four_bits), "file")
    else:
        stack = backend.load(stack_config, weights, dtype)
    return DraftNet(
        stack,
        stack.embed if own_embed else target.embed,
        stack.unembed if own_head else target.unembed,
        ids,
        checkpoint.vocab_size,
        backend,
        embedding=stack if own_embed else theirs,
        head=stack if own_head else theirs,
    )


def head_rows(target: TargetModel, ids: Tensor | None) -> Tensor:
    """The target's head as a matrix in float32, or the rows of some tokens: those of its embedding where that is the
    same matrix, else what the target makes of unit vectors.

    int64 [n] -> [n, D]; None -> [V, D]
    """
    stack = target.stack if isinstance(target, HasStack) else None
    if isinstance(stack, TiedHead) and stack.tied:
        chosen = torch.arange(target.spec.vocab_size) if ids is None else ids
        return stack.embed(chosen) / stack.config.embedding_scale
    units = torch.eye(target.spec.hidden_size, dtype=target.spec.dtype) * UNIT
    rows = torch.empty(target.spec.vocab_size if ids is None else len(ids), len(units))
    for first, part in enumerate(units.split(LANES)):
        logits = target.unembed(part).float()
        columns = slice(first * LANES, first * LANES + len(part))
        rows[:, columns] = (logits if ids is None else logits[:, ids]).T / UNIT
    return rows


def measured_softcap(head: Tensor, ids: Tensor | None, target: TargetModel) -> float:
    """What a target caps its logits at, 0 where it does not: it shows where a logit would be ``LARGE``.

    ``head``: rows of the target's head [n, D], of the tokens ``ids`` (int64 [n]) or of all
    """
    row = int(head.norm(dim=1).argmax())
    state = head[row].float() * (LARGE / head[row].float().square().sum())
    logits = target.unembed(state[None].to(target.spec.dtype))[0]
    logit = float(logits[row if ids is None else ids[row]])
    return logit if logit < LARGE / 2 else 0.0


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _embedding_difference(weight: Tensor, scale: float, target: TargetModel) -> float:
    """|target's - own| / |own|."""
    off = total = 0.0
    for begin in range(0, len(weight), CHUNK):
        own = weight[begin : begin + CHUNK].double() * scale
        theirs = target.embed(torch.arange(begin, begin + len(own)))
        if theirs.shape != own.shape:
            return torch.inf
        off += float((theirs.double() - own).square().sum())
        total += float(own.square().sum())
    return (off / total) ** 0.5 if total else torch.inf


def _head_difference(weight: Tensor, ids: Tensor | None, target: TargetModel) -> float:
    """|target's - own| / |own| of the logits of a few random states, which no soft cap changes. [Vd, D], int64 [Vd]"""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5 * UNIT**2
    if target.spec.hidden_size != weight.shape[1]:
        return torch.inf
    try:
        theirs = target.unembed(probes.to(target.spec.dtype)).float()
    except InvalidRequest:  # its logits are more than a head and a cap
        return torch.inf
    own = torch.cat([probes @ part.float().T for part in weight.split(CHUNK)], 1)
    return float(((theirs if ids is None else theirs[:, ids]) - own).norm() / own.norm())


def linear(
    backend: Backend, weight: Tensor, dtype: torch.dtype | str, bias: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """``weight`` [out, in] as a product on the backend, so that a row's bits do not depend on its neighbours:
    [n, in] -> [n, out], float32 at least."""
    out, width = weight.shape
    config = StackConfig(vocab_size=out, hidden_size=width, layers=())
    stack = backend.load(config, {"head.weight": weight, "norm.weight": torch.ones(width)}, dtype)
    if bias is None:
        return stack.unembed
    added = bias.float()
    return lambda x: stack.unembed(x) + added


def rowwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function on [..., n], each row padded to the SIMD width, so that the vector tail cannot change a
    row's bits with the number of rows."""
    n = x.shape[-1]
    return function(pad(x, (0, -n % LANES)))[..., :n].contiguous()


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """[..., D], computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)
