"""The catalogues: a name, and where its class is, imported on use.

Outside packages add kinds through entry points named ``outrider.targets``, ``outrider.drafters``,
``outrider.designs``, ``outrider.trainers``, ``outrider.exporters``, ``outrider.policies``, ``outrider.backends`` and
``outrider.kv_caches``; a built-in name cannot be replaced.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from outrider.errors import UnknownKind, nearest

__all__ = [
    "BACKENDS",
    "DESIGNS",
    "DRAFTERS",
    "EXPORTERS",
    "KV_CACHES",
    "POLICIES",
    "TARGETS",
    "TRAINERS",
    "find",
    "names",
]

TARGETS = {  # Hugging Face's model_type -> class
    "llama": "outrider.models.llama:LlamaTarget",
    "mistral": "outrider.models.llama:LlamaTarget",
    "qwen2": "outrider.models.llama:LlamaTarget",
    "qwen3": "outrider.models.llama:LlamaTarget",
    "gemma3": "outrider.models.gemma3:Gemma3Target",
    "gemma3_text": "outrider.models.gemma3:Gemma3Target",
    "gemma4": "outrider.models.gemma4:Gemma4Target",
    "gemma4_text": "outrider.models.gemma4:Gemma4Target",
    "huggingface": "outrider.models.huggingface:HuggingFaceTarget",
    "toy": "outrider.models.toy:ToyTarget",
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
DESIGNS = {  # kind of trained drafter -> what it is made of, and how file formats hold it
    "eagle3": "outrider.drafters.eagle3_design:Eagle3Design",
    "mtp": "outrider.drafters.mtp_design:MTPDesign",
    "dspark": "outrider.drafters.dspark_design:BlockDesign",
    "dflash": "outrider.drafters.dspark_design:BlockDesign",
}
TRAINERS = {  # drafter -> how a new one starts, and its network with gradients; inference never imports these
    "draft_model": "outrider.training.networks.draft_model_network:DraftModelTraining",
    "eagle3": "outrider.training.networks.autoregressive_network:Eagle3Training",
    "mtp": "outrider.training.networks.autoregressive_network:MTPTraining",
    "dspark": "outrider.training.networks.block_network:DSparkTraining",
    "dflash": "outrider.training.networks.block_network:DFlashTraining",
}
EXPORTERS = {  # other engines -> what writes a drafter for them; inference never imports these either
    "vllm": "outrider.training.engines.vllm:VLLM",
    "sglang": "outrider.training.engines.sglang:SGLang",
    "llama.cpp": "outrider.training.engines.llama_cpp:LlamaCpp",
}
POLICIES = {
    "fixed": "outrider.scheduling.fixed:FixedPolicy",
    "threshold": "outrider.scheduling.threshold:ThresholdPolicy",
    "throughput": "outrider.scheduling.throughput:ThroughputPolicy",
}
BACKENDS = {
    "reference": "outrider.backends.reference:ReferenceBackend",
    "native": "outrider.backends.native:NativeBackend",
}
KV_CACHES = {
    "contiguous": "outrider.kv_cache.contiguous:ContiguousCache",
    "gathered": "outrider.kv_cache.gathered:GatheredCache",
    "native": "outrider.backends.native:NativeCache",
    "transformers": "outrider.models.huggingface:TransformersCache",
}
_CATALOGUES = {
    "target": TARGETS,
    "drafter": DRAFTERS,
    "design": DESIGNS,
    "trainer": TRAINERS,
    "exporter": EXPORTERS,
    "policy": POLICIES,
    "backend": BACKENDS,
    "kv_cache": KV_CACHES,
}
_GROUPS = {
    "target": "targets",
    "drafter": "drafters",
    "design": "designs",
    "trainer": "trainers",
    "exporter": "exporters",
    "policy": "policies",
    "backend": "backends",
    "kv_cache": "kv_caches",
}


@cache
def _outside(catalogue: str) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=f"outrider.{_GROUPS[catalogue]}")}


def names(catalogue: str) -> list[str]:
    """Known names of one catalogue: ``target``, ``drafter``, ``design``, ``trainer``, ``exporter``, ``policy``,
    ``backend``, ``kv_cache``."""
    return sorted({**_outside(catalogue), **_CATALOGUES[catalogue]})


def find(catalogue: str, name: str) -> Any:
    """The class of a kind. Raises UnknownKind."""
    place = _CATALOGUES[catalogue].get(name) or _outside(catalogue).get(name)
    if place is None:
        raise UnknownKind(f"unknown {catalogue} {name!r}; {nearest(name, names(catalogue))}")
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
