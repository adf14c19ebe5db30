"""Trained drafters against what the peers' own code computes (skipped where the golden folder is absent).

``OUTRIDER_GOLDEN`` names the folder; every size, layer list and format is read from the files in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from outrider import checkpoints
from outrider.backends.native import available
from outrider.config import SamplingParams
from outrider.drafters.dspark import DSparkConfig, DSparkDrafter
from outrider.drafters.dspark_design import BlockDesign
from outrider.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.models.loading import load_backend, load_target
from outrider.sampling.distribution import Categorical
from outrider.sampling.rng import RowRng
from outrider.sampling.verification import (
    DraftRound,
    acceptance_probabilities,
    bonus_distribution,
    count_accepted,
)
from outrider.types import Context, Drafter, Proposal, RaggedBatch, TargetModel

ROOT = Path(os.environ.get("OUTRIDER_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
TOLERANCE = 1e-4
BACKENDS = ["reference", *(["native"] if available() else [])]


def _folders() -> list[Path]:
    if not ROOT.is_dir():
        return []
    found = []
    for folder in sorted(ROOT.iterdir()):
        config = folder / "config.json"
        if config.exists() and (folder / "golden.safetensors").exists():
            found.append(folder)
    return found


def _of_kind(design: type) -> list[Any]:
    kinds = [f for f in _folders() if isinstance(checkpoints.read_header(_json(f / "config.json")).design, design)]
    return [pytest.param(folder, id=folder.name) for folder in kinds] or [
        pytest.param(None, marks=pytest.mark.skipif(True, reason=f"no golden folder at {ROOT}"), id="absent")
    ]


@cache
def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@cache
def _target(folder: Path, backend: str) -> TargetModel:
    return load_target(ROOT / _json(folder / "golden.json")["target"], dtype="float32", backend=backend)


@cache
def _tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Case -> name -> tensor."""
    cases: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "golden.safetensors").items():
        case, _, rest = name.partition(".")
        cases.setdefault(case, {})[rest] = tensor
    return cases


def _context(history: Sequence[int]) -> Context:
    return Context([SamplingParams()], [list(history)], [len(history)])


def _rng() -> RowRng:
    return RowRng([0], [0], ["rejection"])


def _draft(drafter: Drafter, history: Sequence[int], limit: int | None = None):
    return drafter.propose(
        [0],
        [history[-1]],
        _context(history),
        [drafter.block if limit is None else limit],
        _rng(),
    )


def _observe(drafter: Drafter, tokens: Sequence[int], start: int, features: Tensor) -> None:
    drafter.observe(RaggedBatch.pack([list(tokens)], [start], [0]), features)


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.float(), expected.float(), atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------------------------ blocks


@cache
def _block_drafter(folder: Path, backend: str) -> DSparkDrafter:
    return DSparkDrafter.from_config(
        DSparkConfig(str(folder)), _target(folder, backend), backend=load_backend(backend), dtype="float32"
    )


def _rounds(folder: Path, case: dict[str, Tensor]):
    """(context tokens, features, anchor, expected) of each block a case holds, ``context`` from position 0."""
    if "anchor_positions" in case:
        for i, position in enumerate(case["anchor_positions"].tolist()):
            ids = case["input_ids"].tolist()
            expected = {name: tensor[i] for name, tensor in case.items() if tensor.shape[:1] == (2,)}
            yield ids[:position], case["target_features"][:position], ids[position], ids[position:], expected
        return
    ids, features = case["context_ids"].tolist(), case["target_features"]
    anchor = int(case["block_input_ids"][0])
    forced = case["forced_prev_tokens"].tolist() if "forced_prev_tokens" in case else None
    yield ids, features, anchor, forced, case
    second = {name.removeprefix("round2."): tensor for name, tensor in case.items() if name.startswith("round2.")}
    new = second.get("new_target_features", second.get("target_features"))
    drafts = case["greedy_tokens"].tolist()
    committed = [anchor, *drafts[: len(new) - 1]]
    anchor = int(second["block_input_ids"][0] if "block_input_ids" in second else second["anchor_token"][0])
    yield ids + committed, torch.cat([features, new]), anchor, None, second


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", _of_kind(BlockDesign))
def test_block(folder: Path, backend: str) -> None:
    """Hidden states, logits, confidences and greedy drafts; the second round on the cache of the first."""
    drafter = _block_drafter(folder, backend)
    first = 0 if drafter.design.sample_from_anchor else 1
    count = drafter.design.drafts
    for case in _tensors(folder).values():
        drafter.open(0, 256)
        for context, features, anchor, forced, expected in _rounds(folder, case):
            held = drafter.cache.end_of(0)
            if held > len(context):
                held = 0
            _observe(drafter, context[held:], held, features[held:])
            hidden, logits = drafter.run_block([0], torch.tensor([anchor]), [count])
            _close(hidden[0], expected["block_hidden"][first:])
            base = logits[0]
            if "base_logits" in expected:
                _close(base, expected["base_logits"][first:])
            if "draft_logits" in expected:
                _close(base, expected["draft_logits"])
            if forced is not None:
                logits, confidence = drafter.follow([0], torch.tensor([forced[:count]]))
                for name in ("forced_corrected_logits", "teacher_forced_logits"):
                    if name in expected:
                        _close(logits[0], expected[name][first:])
                for name in ("forced_confidence_logits", "teacher_forced_confidence_logits"):
                    if name in expected:
                        assert confidence is not None
                        _close(confidence[0], expected[name][first:])
            proposal = _draft(drafter, [*context, anchor])
            assert proposal.tokens[0].tolist() == expected["greedy_tokens"].tolist()
            if "greedy_confidence_logits" in expected:
                assert proposal.confidence is not None
                _close(proposal.confidence[0].logit(), expected["greedy_confidence_logits"][first:])
        drafter.close(0)


# ------------------------------------------------------------------------------------------------ targets' features


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", _of_kind(BlockDesign) + _of_kind(Eagle3Design))
def test_features(folder: Path, backend: str) -> None:
    """The target's features at the drafter's aux_layers are those that the drafter was given."""
    target = _target(folder, backend)
    header = checkpoints.read_header(_json(folder / "config.json"))
    golden = _json(folder / "golden.json")
    layers = header.target_layers or tuple(golden["target_layer_ids_of_features"])
    for case in _tensors(folder).values():
        if "context_ids" not in case:
            continue
        ids = case["context_ids"].tolist()
        cache = target.new_cache(1, len(ids))
        output = target.forward(RaggedBatch.pack([ids], [0], [cache.open()]), cache, layers)
        assert output.features is not None
        _close(output.features, case["target_features"])


# ------------------------------------------------------------------------------------------------ whole runs


def _runs(folder: Path) -> list[dict[str, Any]]:
    """Each recorded run: its options and one prompt's record."""
    generation = _json(folder / "golden.json").get("generation", {})
    if isinstance(generation, list):  # z-lab's own loop
        return [{"confidence_threshold": 0.0, **sample} for sample in generation]
    return [{**run, **sample} for run in generation.values() for sample in run["samples"]]


def _generate(
    drafter: Drafter, target: TargetModel, prompt: list[int], run: dict[str, Any], new: int
) -> dict[str, Any]:
    """Greedy speculative decoding, counted as the record counts: a round that ends on a stop id among its drafts has
    no token of the target's own (DeepSpec), or keeps it (z-lab)."""
    stops = set(run["stop_token_ids"] or ())
    threshold = run["confidence_threshold"]
    cut_at_stop = "accepted_draft_lengths" in run
    cache = target.new_cache(1, len(prompt) + new + 2 * drafter.block)
    slot = cache.open()
    drafter.open(0, len(prompt) + new + drafter.block)
    output = target.forward(RaggedBatch.pack([prompt], [0], [slot]), cache, drafter.aux_layers)
    assert output.features is not None
    _observe(drafter, prompt, 0, output.features)
    history = [*prompt, int(output.logits[-1].argmax())]
    record: dict[str, Any] = {
        "acceptance_lengths": [],
        "proposal_lengths": [],
        "accepted_draft_lengths": [],
        "rounds": [],
    }
    done = history[-1] in stops
    while len(history) - 1 < len(prompt) + new and not done:
        start = len(history) - 1
        proposal = _draft(drafter, history)
        keep = int(proposal.lengths[0])
        if threshold > 0:
            assert proposal.confidence is not None
            keep = int((proposal.confidence[0, :keep] >= threshold).long().cumprod(0).sum())
        drafts = proposal.tokens[0, :keep].tolist()
        output = target.forward(RaggedBatch.pack([[history[-1], *drafts]], [start], [slot]), cache, drafter.aux_layers)
        own = output.logits.argmax(-1).tolist()
        accepted = 0
        while accepted < keep and drafts[accepted] == own[accepted]:
            accepted += 1
        committed = [*drafts[:accepted], own[accepted]]
        stopped = next((i for i, token in enumerate(drafts[:accepted]) if token in stops), None)
        if stopped is not None and cut_at_stop:
            accepted = keep = stopped + 1
            committed = drafts[:accepted]
        record["rounds"].append([history[-1], *drafts])
        record["proposal_lengths"].append(keep)
        record["accepted_draft_lengths"].append(accepted)
        record["acceptance_lengths"].append(len(committed))
        history += committed
        cache.rewind(torch.tensor([slot]), torch.tensor([start + accepted + 1]))
        _observe(drafter, [history[start], *drafts[:accepted]], start, output.features[: accepted + 1])
        done = any(token in stops for token in committed)
    drafter.close(0)
    ids = history[len(prompt) :][:new]
    record["new_ids"] = next((ids[: i + 1] for i, token in enumerate(ids) if token in stops), ids)
    return record


def _reproduces(drafter: Drafter, target: TargetModel, folder: Path) -> None:
    golden = _json(folder / "golden.json")
    prompts = _json(ROOT / golden["target"] / "target_golden.json")["prompts"]
    for run in _runs(folder):
        new = run.get("max_new_tokens") or max(len(r["new_ids"]) for r in _runs(folder))
        got = _generate(drafter, target, prompts[run["prompt_case"]], run, new)
        assert got["new_ids"] == run["new_ids"]
        assert got["acceptance_lengths"] == run["acceptance_lengths"]
        if "accepted_draft_lengths" in run:
            assert got["accepted_draft_lengths"] == run["accepted_draft_lengths"]
        for mine, theirs in zip(got["rounds"], run.get("rounds", ()), strict=False):
            assert mine[: len(theirs["verify_input_ids"])] == theirs["verify_input_ids"]


@pytest.mark.parametrize("folder", _of_kind(BlockDesign))
def test_runs_of_blocks(folder: Path) -> None:
    _reproduces(_block_drafter(folder, "reference"), _target(folder, "reference"), folder)


# ------------------------------------------------------------------------------------------------ EAGLE-3


@cache
def _eagle3_drafter(folder: Path, backend: str) -> Eagle3Drafter:
    named = _json(folder / "golden.json").get("target_layer_ids_of_features")
    config = Eagle3Config(str(folder), target_layers=None if named is None else tuple(named))
    target = _target(folder, backend)
    return Eagle3Drafter.from_config(config, target, backend=load_backend(backend), dtype="float32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", _of_kind(Eagle3Design))
def test_eagle3(folder: Path, backend: str) -> None:
    """Fused features, hidden states, logits and drafts."""
    drafter = _eagle3_drafter(folder, backend)
    for case in _tensors(folder).values():
        if "fc_output" in case:
            _close(drafter.condition(case["target_features"]), case["fc_output"])
        drafter.open(0, 256)
        if "context_ids" in case:
            _recurrent(drafter, case)
        else:
            _training_time_test(drafter, case)
        drafter.close(0)


def _recurrent(drafter: Eagle3Drafter, case: dict[str, Tensor]) -> None:
    """DeepSpec: drafting from the prompt's end, and again after the next committed tokens."""
    ids = case["context_ids"].tolist()
    last = int(case["shifted_ids"][-1])
    _observe(drafter, ids, 0, case["target_features"])
    _check_drafts(drafter, last, case)
    assert _draft(drafter, [*ids, last]).tokens[0].tolist() == case["greedy_tokens"].tolist()
    second = {name.removeprefix("round2."): tensor for name, tensor in case.items() if name.startswith("round2.")}
    committed = second["committed_tokens"].tolist()
    _observe(drafter, [last, *committed[:-1]], len(ids), second["new_target_features"])
    _check_drafts(drafter, committed[-1], second)
    history = [*ids, last, *committed]
    assert _draft(drafter, history).tokens[0].tolist() == second["greedy_tokens"].tolist()


def _check_drafts(drafter: Eagle3Drafter, last: int, expected: dict[str, Tensor]) -> None:
    state = drafter.begin([0], [last])
    for k, token in enumerate(expected["greedy_tokens"]):
        _close(state.hidden[0], expected["step_hidden"][k])
        _close(state.logits[0], expected["logits"][k])
        if k + 1 < len(expected["greedy_tokens"]):
            state = drafter.feed(state, token[None])
    drafter.rewind([0])


def _training_time_test(drafter: Eagle3Drafter, case: dict[str, Tensor]) -> None:
    """speculators, SpecForge: three steps at every position, and the last six drafts of each."""
    tokens, features = case["input_ids_shifted"].tolist(), case["target_features"]
    own = "hidden_last6" in {name.partition(".")[2] for name in case}  # fed its own argmax, else the true tokens
    for i, position in enumerate(range(len(tokens) - 6, len(tokens))):
        _observe(drafter, [0, *tokens[:position]], 0, features[: position + 1])
        state = drafter.begin([0], [tokens[position]])
        for step in range(3):
            _close(state.logits[0], case[f"step{step}.logits_last6"][i])
            if f"step{step}.hidden_last6" in case:
                _close(state.hidden[0], case[f"step{step}.hidden_last6"][i])
            best = int(drafter.net.spread(state.logits).argmax())
            assert best == int(case[f"step{step}.argmax_target_ids"][position])
            following = position + step + 1
            token = best if own else tokens[following] if following < len(tokens) else 0
            state = drafter.feed(state, torch.tensor([token]))
        drafter.rewind([0])
        drafter.close(0)
        drafter.open(0, 256)


@pytest.mark.parametrize("folder", _of_kind(Eagle3Design))
def test_runs_of_eagle3(folder: Path) -> None:
    _reproduces(_eagle3_drafter(folder, "reference"), _target(folder, "reference"), folder)


# ------------------------------------------------------------------------------------------------ sampled verification


def _verifications() -> list[Any]:
    found = []
    for file in sorted(ROOT.glob("*/verify_golden.safetensors")) if ROOT.is_dir() else []:
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(file).items():
            case, _, rest = name.rpartition(".")
            tensors.setdefault(case, {})[rest] = tensor
        found += [pytest.param(case, id=f"{file.parent.name}-{name}") for name, case in tensors.items()]
    return found or [
        pytest.param(None, marks=pytest.mark.skipif(True, reason=f"no golden folder at {ROOT}"), id="absent")
    ]


@pytest.mark.parametrize("case", _verifications())
def test_sampled_verification(case: dict[str, Tensor]) -> None:
    """The rejection rule keeps what the peer's keeps under the same uniforms, and draws from the same residual."""
    drafts = case["draft_tokens"]
    size = case["target_probs"].shape[1]
    distribution = Categorical(size, probabilities=case["draft_probs"])
    proposal = Proposal(drafts[None], torch.tensor([len(drafts)]), distribution)
    target = Categorical(size, probabilities=case["target_probs"])
    checked = DraftRound.of(target, proposal, [len(drafts)])
    probabilities = acceptance_probabilities(checked, np.array([False]))
    accepted = count_accepted(probabilities, case["uniforms"].double().numpy()[None])
    assert accepted.tolist() == case["accepted"].tolist()
    own = bonus_distribution(checked, probabilities, accepted).dense(torch.tensor([0]))[0]
    _close(own, case["next_token_distribution"])
