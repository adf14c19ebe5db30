"""The catalogues: a name, and where its class is, imported on use.

Outside packages add kinds through entry points named ``outrider.targets``, ``outrider.drafters``,
``outrider.policies``, ``outrider.backends`` and ``outrider.memories``; a built-in name cannot be replaced.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from outrider.errors import UnknownKind, nearest

__all__ = ["BACKENDS", "DRAFTERS", "MEMORIES", "POLICIES", "TARGETS", "find", "names"]

TARGETS = {  # Hugging Face's model_type -> class
    "llama": "outrider.targets.llama:LlamaTarget",
    "mistral": "outrider.targets.llama:LlamaTarget",
    "qwen2": "outrider.targets.llama:LlamaTarget",
    "qwen3": "outrider.targets.llama:LlamaTarget",
    "gemma3": "outrider.targets.gemma3:Gemma3Target",
    "gemma3_text": "outrider.targets.gemma3:Gemma3Target",
    "gemma4": "outrider.targets.gemma4:Gemma4Target",
    "gemma4_text": "outrider.targets.gemma4:Gemma4Target",
    "huggingface": "outrider.targets.huggingface:HuggingFaceTarget",
    "toy": "outrider.targets.toy:ToyTarget",
}
DRAFTERS = {
    "none": "outrider.drafters.none:NoDrafter",
    "ngram": "outrider.drafters.ngram:NgramDrafter",
    "suffix": "outrider.drafters.suffix:SuffixDrafter",
    "draft_model": "outrider.drafters.draft_model:DraftModelDrafter",
    "eagle3": "outrider.drafters.eagle3:Eagle3Drafter",
    "mtp": "outrider.drafters.mtp:MTPDrafter",
    "dspark": "outrider.drafters.dspark:DSparkDrafter",
    "dflash": "outrider.drafters.dspark:DFlashDrafter",
}
POLICIES = {
    "fixed": "outrider.policies.fixed:FixedPolicy",
    "threshold": "outrider.policies.threshold:ThresholdPolicy",
}
BACKENDS = {
    "reference": "outrider.backends.reference:ReferenceBackend",
    "native": "outrider.backends.native:NativeBackend",
}
MEMORIES = {
    "contiguous": "outrider.memory.contiguous:ContiguousMemory",
}
_CATALOGUES = {"target": TARGETS, "drafter": DRAFTERS, "policy": POLICIES, "backend": BACKENDS, "memory": MEMORIES}
_GROUPS = {
    "target": "targets",
    "drafter": "drafters",
    "policy": "policies",
    "backend": "backends",
    "memory": "memories",
}


@cache
def _outside(catalogue: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=f"outrider.{_GROUPS[catalogue]}")}


def names(catalogue: str) -> list[str]:
    """Known names of one catalogue: ``target``, ``drafter``, ``policy``, ``backend`` or ``memory``."""
    return sorted({**_outside(catalogue), **_CATALOGUES[catalogue]})


def find(catalogue: str, name: str) -> Any:
    """The class of a kind. Raises UnknownKind."""
    place = _CATALOGUES[catalogue].get(name) or _outside(catalogue).get(name)
    if place is None:
        raise UnknownKind(f"unknown {catalogue} {name!r}; {nearest(name, names(catalogue))}")
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
