"""Targets against the logits, hidden states and greedy text that Transformers computed on small saved models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outrider.models.loading import load_target
from outrider.registry import TARGETS
from outrider.types import RaggedBatch

GOLDEN = Path(os.environ.get("OUTRIDER_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden")
FOLDERS = sorted(
    path.parent
    for path in GOLDEN.glob("*/target_golden.safetensors")
    if json.loads((path.parent / "config.json").read_text()).get("model_type") in TARGETS
)
pytestmark = pytest.mark.skipif(not FOLDERS, reason="no golden targets here; OUTRIDER_GOLDEN names their folder")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_target_gives_its_golden_numbers(folder: Path) -> None:
    golden = load_file(folder / "target_golden.safetensors")
    target = load_target(folder, backend="reference")
    layers = target.spec.num_layers
    cases = sorted({name.split(".")[0] for name in golden})
    assert cases
    for case in cases:
        ids, greedy = (golden[f"{case}.{name}"].tolist() for name in ("input_ids", "greedy_ids"))
        cache = target.new_cache(1, len(ids) + len(greedy))
        slot = cache.open()
        output = target.forward(RaggedBatch.pack([ids], [0], [slot]), cache, aux_layers=range(-1, layers - 1))
        torch.testing.assert_close(output.logits, golden[f"{case}.logits"], atol=1e-4, rtol=0)
        assert output.features is not None
        hidden = output.features.view(len(ids), layers, -1).transpose(0, 1)  # the last layer's row is not auxiliary
        torch.testing.assert_close(hidden, golden[f"{case}.hidden"][:-1], atol=1e-4, rtol=0)
        unembedded = target.unembed(golden[f"{case}.final_norm"])
        torch.testing.assert_close(unembedded, golden[f"{case}.logits"], atol=1e-4, rtol=0)
        text, logits = [], output.logits[-1]
        while len(text) < len(greedy):
            text.append(int(logits.argmax()))
            step = RaggedBatch.pack([text[-1:]], [len(ids) + len(text) - 1], [slot])
            logits = target.forward(step, cache).logits[-1]
        assert text == greedy
