"""Time of a round outside the two models: the loop around a target pass, and verification over a large vocabulary.

    python benchmarks/bookkeeping.py rounds | drafts | verification [--count 100] [--vocabulary 152000] [--json FILE]

Rounds: the time of each engine step minus the calls of drafter and target, on the embedded target and on random weights
of 110M parameters (vocabulary 32,000). Drafts are sampled from distributions prepared beforehand, so that no second
model disturbs the processor caches; nearly all are rejected.

Drafts: the time of a trained drafter's ``propose`` at one row and a context of 256 tokens, of which the last three wait
as features; the time that reading its weights takes at the bandwidth probed just before; and the difference.

Verification: ``process`` and ``verify`` over eight rows of logits, with new logits and distributions each time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from head import checkpoint
from support import add_json, facts, table, write_json
from torch import Tensor

from outrider.config import SamplingParams
from outrider.core import native
from outrider.drafters.dspark import DSparkConfig, DSparkDrafter
from outrider.drafters.dspark_design import BlockDesign
from outrider.engine.engine import Engine
from outrider.engine.loader import load_drafter, load_model
from outrider.models.loading import load_backend, load_target
from outrider.models.random import random_target
from outrider.sampling.processors import process
from outrider.sampling.rng import RowRng
from outrider.sampling.verification import verify
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.types import Context, Proposal, RaggedBatch, Rng, StepCost, TargetModel, Values

K = 7  # drafts of a round
PROMPT = 64  # tokens
SAMPLED = SamplingParams(temperature=1.0, rule="rejection", ignore_eos=True)
SAMPLING = {
    "greedy": replace(SAMPLED, temperature=0.0),
    "rejection": SAMPLED,
    "rejection, top-k 50": replace(SAMPLED, top_k=50),
    "rejection, top-p 0.9": replace(SAMPLED, top_p=0.9),
    "block": replace(SAMPLED, rule="block"),
    "coupled": replace(SAMPLED, rule="coupled"),
    "coupled, top-p 0.9": replace(SAMPLED, rule="coupled", top_p=0.9),
}


# ------------------------------------------------------------------------------------------------ rounds


class Guesses:
    """A drafter without a model: samples every draft from one distribution prepared beforehand."""

    aux_layers: tuple[int, ...] = ()

    def __init__(self, vocabulary: int, params: SamplingParams, drafts: int) -> None:
        self.block = drafts
        context = Context([params], [[0]], [1])
        logits = peaked(max(1, drafts), vocabulary, torch.Generator().manual_seed(1))
        self._law = process(logits, context, torch.zeros(len(logits), dtype=torch.int64))

    def open(self, slot: int, capacity: int) -> None:
        """Nothing to reserve."""

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        count = int(limit[0])
        places = torch.arange(count)
        distribution = (
            self._law if count == len(self._law) else self._law.take(places)
        )  # an index would wake PyTorch's threads
        start = len(context.history[0])
        tokens = distribution.draw(rng.token_keys(torch.zeros_like(places), places + start, "draft"))
        return Proposal(tokens[None], list(limit), None if distribution.is_greedy else distribution)

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Nothing to learn."""

    def close(self, slot: int) -> None:
        """Nothing to free."""


class Costs(FixedPolicy):
    """The fixed policy; it keeps the cost of each step."""

    def __init__(self, drafts: int) -> None:
        super().__init__(FixedConfig(draft_tokens=drafts))
        self.seen: list[StepCost] = []

    def observe(self, cost: StepCost, accepted: Any) -> None:
        self.seen.append(cost)


def rounds(target: TargetModel, params: SamplingParams, drafts: int, count: int) -> dict[str, float]:
    """Medians over rounds of one request: microseconds inside the target's pass and outside both models."""
    policy = Costs(drafts)
    drafter = Guesses(target.spec.vocab_size, params, drafts)
    capacity = PROMPT + 1 + (count + 1) * (drafts + 1)
    engine = Engine(target, drafter, policy, max_rows=1, capacity=capacity)
    engine.submit(list(range(1, PROMPT + 1)), replace(params, max_tokens=capacity - PROMPT), seed=1)
    outside = []
    while len(outside) < count and engine.busy:
        began = perf_counter()
        engine.step()
        seconds, cost = perf_counter() - began, policy.seen[-1]
        outside.append(seconds - cost.draft - cost.verify)
    forward = median(cost.verify for cost in policy.seen[1:])
    return {"pass": 1e6 * forward, "outside": 1e6 * median(outside[1:])}


def measure_rounds(count: int) -> Iterator[dict[str, Any]]:
    backend = load_backend("auto")
    targets = {
        "embedded": load_target("embedded"),
        "llama-110m": random_target("llama-110m", "float32", backend),
    }
    for name, target in targets.items():
        for way, params in SAMPLING.items():
            for drafts in (0, K):
                figures = rounds(target, params, drafts, count)
                yield {
                    "target": name,
                    "sampling": way,
                    "drafts": drafts,
                    "pass_us": round(figures["pass"], 1),
                    "outside_us": round(figures["outside"], 1),
                    "share": round(figures["outside"] / (figures["pass"] + figures["outside"]), 4),
                }


# ------------------------------------------------------------------------------------------------ drafts

CONTEXT, WAITING = 256, 3  # tokens


def weight_bytes(drafter: Any) -> int:
    """Bytes that a draft reads: layers, head and fusion, and the rows of W2 in the shortlists of a block."""
    core, design = drafter.net.stack.core, drafter.design
    width, features = drafter.net.stack.config.hidden_size, len(drafter.aux_layers)
    size = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 1}[drafter.net.stack.dtype]
    read = int(core.weight_bytes)
    if drafter.net.head is not drafter.net.stack:
        read += drafter.net.head.config.vocab_size * width * size
    read += features * width * width * size
    if not isinstance(design, BlockDesign):
        read += (drafter.block - 1) * int(core.weight_bytes)  # a pass for every draft
    elif rank := design.markov_rank:
        read += drafter.block * drafter.core.core.width * rank * (4 if size == 4 else 2)
    return read


def drafts(target: TargetModel, drafter: Any, temperature: float, count: int) -> dict[str, float]:
    """Medians in microseconds: of a draft of seven (or the drafter's block), and of a plain pass of the target."""
    cache = target.new_cache(1, CONTEXT + 64)
    slot = cache.open()
    drafter.open(0, CONTEXT + 64)
    history = torch.randint(
        5, target.spec.vocab_size, (CONTEXT + 1,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    context = Context([replace(SAMPLED, temperature=temperature)], [history], [1])
    whole = RaggedBatch.pack([history[:-1]], [0], [slot])
    drafter.observe(whole, target.forward(whole, cache, drafter.aux_layers).features)
    slots, last, limit = [0], history[-1:], [drafter.block]
    start = CONTEXT - WAITING
    times: dict[str, list[float]] = {"draft": [], "pass": []}
    for turn in range(count):
        cache.rewind(torch.tensor([slot]), torch.tensor([start]))
        again = RaggedBatch.pack([history[start:-1]], [start], [slot])
        drafter.observe(again, target.forward(again, cache, drafter.aux_layers).features)
        rng = RowRng([1], [turn], ["rejection"])
        began = perf_counter()
        drafter.propose(slots, last, context, limit, rng)
        times["draft"].append(perf_counter() - began)
        plain = RaggedBatch.pack([history[-1:]], [CONTEXT], [slot])
        began = perf_counter()
        target.forward(plain, cache)
        times["pass"].append(perf_counter() - began)
    drafter.close(0)
    return {name: 1e6 * median(seconds[1:]) for name, seconds in times.items()}


def measure_drafts(count: int) -> Iterator[dict[str, Any]]:
    embedded = load_model("embedded")
    backend = load_backend("native", "int8")
    large = random_target("llama-110m", "int8", backend)
    cases = [
        ("embedded", name, embedded.target, load_drafter(name, embedded, {}, max_rows=1)[1])
        for name in ("dspark", "dflash", "eagle3")
    ]
    block = DSparkDrafter(
        checkpoint("llama-110m", "vanilla", 0.2), large, backend, config=DSparkConfig(""), dtype="int8", max_rows=1
    )
    cases.append(("llama-110m", "dspark", large, block))
    for name, kind, target, drafter in cases:
        for temperature in (0.0, 1.0):
            bandwidth = read_bandwidth()
            with torch.inference_mode():
                figures = drafts(target, drafter, temperature, count)
            read = weight_bytes(drafter)
            reading = 1e6 * read / bandwidth
            yield {
                "target": name,
                "drafter": kind,
                "temperature": temperature,
                "tokens": drafter.block,
                "draft_us": round(figures["draft"], 1),
                "weights_MB": round(read / 1e6, 2),
                "GB_s": round(bandwidth / 1e9, 1),
                "reading_us": round(reading, 1),
                "beyond_us": round(figures["draft"] - reading, 1),
                "plain_pass_us": round(figures["pass"], 1),
            }


def read_bandwidth() -> float:
    """Bytes per second that all threads read from fresh memory."""
    assert native is not None, "drafts are measured on the compiled core"
    return float(native.read_bandwidth(256 << 20))


# ------------------------------------------------------------------------------------------------ verification


def peaked(places: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Peaked logits: 90 % of the probability on a few hundred tokens."""
    return 4 * torch.randn(places, vocabulary, generator=generator)


def flat(places: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Flat logits: 90 % of the probability on half of the vocabulary."""
    return torch.randn(places, vocabulary, generator=generator)


def verification(
    vocabulary: int, make: Callable[[int, int, torch.Generator], Tensor], params: SamplingParams, count: int
) -> dict[str, float]:
    """Median milliseconds of ``process`` and of ``verify`` over K + 1 positions."""
    generator = torch.Generator().manual_seed(0)
    context = Context([params], [list(range(PROMPT))], [PROMPT])
    places = torch.zeros(K + 1, dtype=torch.int64), torch.arange(K + 1)
    times: dict[str, list[float]] = {"process": [], "verify": []}
    keep = [K]
    for turn in range(count):
        logits = make(K + 1, vocabulary, generator)
        near = logits[:K] + 0.3 * torch.randn(K, vocabulary, generator=generator)
        rng = RowRng([turn], [1], [params.effective_rule])
        distribution = process(near, context, *(place[:K] for place in places))
        drafts = distribution.draw(rng.token_keys(places[0][:K], PROMPT + places[1][:K], "draft"))[None]
        again = process(near, context, *(place[:K] for place in places))  # drop anything cached by sampling the drafts
        proposal = Proposal(drafts, keep, None if distribution.is_greedy else again)
        began = perf_counter()
        distributions = process(logits, context, *places, drafted=drafts)
        processed = perf_counter()
        verify(distributions, proposal, keep, context, rng)
        times["verify"].append(perf_counter() - processed)
        times["process"].append(processed - began)
    return {name: 1e3 * median(seconds) for name, seconds in times.items()}


def measure_verification(vocabulary: int, count: int) -> Iterator[dict[str, Any]]:
    for shape in (peaked, flat):
        for way, params in SAMPLING.items():
            with torch.inference_mode():
                figures = verification(vocabulary, shape, params, count)
            yield {
                "logits": shape.__name__,
                "sampling": way,
                **{f"{name}_ms": round(ms, 3) for name, ms in figures.items()},
                "both_ms": round(sum(figures.values()), 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rounds", "drafts", "verification"])
    parser.add_argument("--count", type=int, default=100, help="measurements of each kind")
    parser.add_argument("--vocabulary", type=int, default=152_000, help="of the verification")
    add_json(parser)
    options = parser.parse_args()
    if options.what == "rounds":
        rows = list(measure_rounds(options.count))
    elif options.what == "drafts":
        rows = list(measure_drafts(options.count))
    else:
        rows = list(measure_verification(options.vocabulary, options.count))
    if options.json != "-":
        print(table([key.replace("_", " ") for key in rows[0]], (list(row.values()) for row in rows)))
    write_json(options.json, {**facts(), "vocabulary": options.vocabulary, "rows": rows})


if __name__ == "__main__":
    main()
