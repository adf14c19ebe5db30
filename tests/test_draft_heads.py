"""Which head a drafter uses, its own or the target's, and whether its logits are capped as the target's are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trained import DESIGNS, VOCABULARY, WIDTH, make_checkpoint, make_target

from outrider.backends.reference import ReferenceBackend
from outrider.drafters.base import load_net
from outrider.errors import InvalidRequest
from outrider.models.decoder import DecoderTarget
from outrider.models.huggingface import HuggingFaceTarget

CAP = 5.0
BACKEND = ReferenceBackend()
STATES = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)) * 20


def capped(stack: bool) -> Any:
    """A target with a soft cap: a stack of a backend, or known by its functions alone, as Transformers' models are."""
    given = make_target()
    config = replace(given.stack.config, logit_softcap=CAP)
    weights = given.tensors  # type: ignore[attr-defined]
    target = DecoderTarget(given.spec, BACKEND.load(config, weights, torch.float32), BACKEND)
    target.tensors = weights  # type: ignore[attr-defined]
    if stack:
        return target
    return SimpleNamespace(spec=target.spec, embed=target.embed, unembed=target.unembed, tensors=weights)


def expected(head: Tensor) -> Tensor:
    return torch.tanh(STATES @ head.T / CAP) * CAP


@pytest.mark.parametrize("stack", [True, False])
def test_a_copy_of_a_capped_head_is_the_targets(stack: bool) -> None:
    target = capped(stack)
    net = load_net(make_checkpoint(DESIGNS["dflash"], target=target), target, BACKEND, torch.float32)
    assert net.head is (target.stack if stack else None)
    torch.testing.assert_close(net.unembed(STATES), expected(target.tensors["head.weight"]))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("stack", [True, False])
def test_a_reduced_head_of_the_targets_rows_is_capped(stack: bool, stored: bool) -> None:
    target = capped(stack)
    given = make_checkpoint(DESIGNS["dflash"], target=target, drafted=20)
    rows = target.tensors["head.weight"][given.tensors["d2t"] + torch.arange(20)]
    tensors = {name: tensor for name, tensor in given.tensors.items() if name != "head.weight"}
    tensors |= {"head.weight": rows} if stored else {}
    net = load_net(replace(given, tensors=tensors), target, BACKEND, torch.float32)
    torch.testing.assert_close(net.unembed(STATES), expected(rows), atol=1e-3, rtol=1e-4)


def test_another_head_has_no_cap_but_its_own() -> None:
    target = capped(False)
    for drafted in (20, VOCABULARY):
        given = make_checkpoint(DESIGNS["dflash"], target=target, drafted=drafted)
        head = torch.randn(drafted, WIDTH, generator=torch.Generator().manual_seed(2))
        net = load_net(replace(given, tensors={**given.tensors, "head.weight": head}), target, BACKEND, torch.float32)
        torch.testing.assert_close(net.unembed(STATES), STATES @ head.T)


def test_a_target_that_gives_no_head_leaves_a_drafter_its_own() -> None:
    target = capped(False)

    def refuse(hidden: Tensor) -> Tensor:
        raise InvalidRequest("choose a drafter with a head of its own")

    given = make_checkpoint(DESIGNS["dflash"], target=target)
    net = load_net(given, SimpleNamespace(**vars(target) | {"unembed": refuse}), BACKEND, torch.float32)  # type: ignore[arg-type]
    torch.testing.assert_close(net.unembed(STATES), STATES @ given.tensors["head.weight"].T)


def test_what_to_choose_for_a_target_whose_head_cannot_be_shared() -> None:
    target = object.__new__(HuggingFaceTarget)
    target.spec, target._plain_head = make_target().spec, False
    with pytest.raises(InvalidRequest, match="choose a draft model, or a drafter with a head of its own"):
        target.unembed(STATES)
