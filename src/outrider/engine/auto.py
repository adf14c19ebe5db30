"""What ``drafter="auto"`` means for a target that comes with drafters: the one that measures fastest on this machine.

Each candidate answers for some seconds, greedily and sampled; plain decoding is one of them, and a drafter that is
clearly slower than it in either is not chosen. The result is cached with everything it depends on, and measured again
when that changes. Where an engine is to start at once, nothing is measured: the first drafter of the catalogue is
taken.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import mean
from typing import Any, Protocol

import torch

from outrider.config import SamplingParams
from outrider.engine.turns import Alone, at_once
from outrider.files import cache_folder, read_json, write_json
from outrider.models.locations import PACKAGED_DRAFTERS, resolve_model
from outrider.types import Output
from outrider.version import __version__

__all__ = ["fastest"]

PLAIN = "none"
WITHOUT_FILES = ("suffix",)
TOKENS = 48  # of an answer
TEMPERATURES = (0.0, 1.0)
NOISE = 0.97  # a drafter measured at this share of plain speed, or more, may be as fast


class _LLM(Protocol):
    def forget(self) -> None: ...
    def generate(self, prompts: Any, params: Any = None) -> list[Output]: ...


def fastest(
    target: str,
    prompts: Sequence[str | list[int]],
    load: Callable[[str], _LLM],
    dtype: str,
    backend: str,
    *,
    alone: Alone | None = at_once,
) -> str:
    """A packaged drafter of ``target``, ``suffix`` or ``none``; measured, or remembered from before.

    ``load`` makes an LLM of the target with such a drafter, which answers ``prompts``, one a topic. ``alone`` calls it
    for each answer, where requests may run beside; None: what is not remembered is not measured.
    """
    packaged = {name: _size(model) for name, model in PACKAGED_DRAFTERS[target].items() if _there(model)}
    candidates = [PLAIN, *WITHOUT_FILES, *packaged]
    key = _key(target, packaged, candidates, dtype, backend)
    path = cache_folder("choices") / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    with suppress(ValueError, KeyError):  # missing or damaged: it is only a measurement
        kept = read_json(path)
        if kept["key"] == key and kept["fastest"] in candidates:
            return str(kept["fastest"])
    if alone is None:
        return next(iter(packaged), WITHOUT_FILES[0])
    speedups = _measure(prompts, load, candidates, alone)
    best = max(speedups, key=speedups.__getitem__)
    with suppress(OSError):
        write_json(path, {"key": key, "fastest": best, "speedup_over_plain": speedups})
    return best


def _measure(
    prompts: Sequence[str | list[int]],
    load: Callable[[str], _LLM],
    candidates: Sequence[str],
    alone: Alone,
) -> dict[str, float]:
    """Speed-up over plain decoding: the geometric mean over prompts, and over greedy and sampled answers, or the lesser
    of these two where drafting is slower by more than noise."""
    sides = {name: load(name) for name in candidates}

    def answer(side: _LLM, prompt: str | list[int], params: SamplingParams) -> float:
        side.forget()
        return alone(lambda: side.generate([prompt], params))[0].stats.seconds

    for side in sides.values():  # warm up: the first call is not timed
        answer(side, prompts[0], SamplingParams(max_tokens=8))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for temperature in TEMPERATURES:
        params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=1, ignore_eos=True)
        logarithms = dict.fromkeys(candidates, 0.0)
        for prompt in prompts:
            seconds = {name: answer(side, prompt, params) for name, side in sides.items()}
            for name in candidates:
                logarithms[name] += math.log(seconds[PLAIN] / seconds[name]) / len(prompts)
        for name in candidates:
            found[name].append(logarithms[name])
    return {name: round(math.exp(mean(of) if min(of) >= math.log(NOISE) else min(of)), 3) for name, of in found.items()}


def _there(model: str) -> bool:
    """Whether a packaged drafter's files are installed."""
    with suppress(ValueError):
        return (resolve_model(model) / "config.json").is_file()
    return False


def _key(
    target: str, packaged: Mapping[str, int], candidates: Sequence[str], dtype: str, backend: str
) -> Mapping[str, Any]:
    """What a measurement depends on."""
    return {
        "outrider": __version__,
        "target": target,
        "measured": {
            "temperatures": list(TEMPERATURES),
            "tokens": TOKENS,
            "counts": "the mean, or the least where that is slower",
        },
        "candidates": list(candidates),
        "bytes": dict(packaged),
        "dtype": dtype,
        "backend": backend,
        "machine": [platform.machine(), platform.processor(), os.cpu_count() or 1],
        "threads": [torch.get_num_threads(), os.environ.get("OUTRIDER_THREADS", "")],
    }


def _size(model: str) -> int:
    """Bytes of a drafter's weights: another size means another drafter."""
    return sum(file.stat().st_size for file in resolve_model(model).glob("*.safetensors"))
