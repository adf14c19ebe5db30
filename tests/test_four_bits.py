"""Drafters in 4 bits: how matrices are rounded, how they are stored, and that they draft as they were stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained import DECODER, DESIGNS, WIDTH, make_checkpoint, make_target

from outrider import LLM, SamplingParams, checkpoints
from outrider.backends.reference import ReferenceBackend
from outrider.checkpoints import DraftCheckpoint
from outrider.core import native
from outrider.drafters.base import load_net
from outrider.errors import CheckpointError, InvalidRequest
from outrider.evaluation.conversion import convert
from outrider.models.decoder import DecoderTarget
from outrider.training.artefact import Artefact
from outrider.training.export import Config as ExportConfig
from outrider.training.export import export
from outrider.training.handover import hand_over
from outrider.training.networks.four_bits import rounded
from outrider.training.run import Config, learn

WIDE = {**DECODER, "intermediate_size": 64}
SMALL: dict[str, Any] = {
    "steps": 2,
    "pack_tokens": 64,
    "length": 48,
    "sanity": False,
    "eval_every": 0,
    "bfloat16": False,
    "tensorboard": False,
    "four_bits": True,
}
OWN: dict[str, dict[str, Any]] = {
    "dspark": {"markov_rank": 8, "intermediate_size": 64, "target_layers": [2, 5], "draft_vocab": 1000},
    "dflash": {"intermediate_size": 64, "target_layers": [2, 5]},
    "eagle3": {"depth": 3, "intermediate_size": 64, "target_layers": [2, 5]},
    "mtp": {"depth": 2, "intermediate_size": 64},
}


def seen(columns: int, rows: int = 400) -> Tensor:
    """States whose components depend on each other, as those of a network do. float32 [rows, columns]"""
    generator = torch.Generator().manual_seed(2)
    few = torch.randn(rows, columns // 8, generator=generator) @ torch.randn(columns // 8, columns, generator=generator)
    return few + 0.3 * torch.randn(rows, columns, generator=generator)


def in_four_bits(checkpoint: DraftCheckpoint) -> DraftCheckpoint:
    """Its layers' matrices rounded for no states in particular."""
    tensors, scales = dict(checkpoint.tensors), {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("layers.") and tensor.ndim == 2:
            tensors[name], scales[name] = rounded(tensor.float(), torch.eye(tensor.shape[1]).double())
    return replace(checkpoint, tensors=tensors, four_bits=scales)


def test_what_matrices_make_of_real_states_changes_less_than_by_rounding_to_the_nearest() -> None:
    states, matrix = seen(96), torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    matrix[3] = 0
    made, scales = rounded(matrix, (states.T @ states).double())
    nearest, _ = rounded(matrix, torch.eye(96).double())
    numbers = made.view(40, 3, 32) / torch.where(scales == 0, 1, scales).float()[:, :, None]
    assert torch.equal(numbers, numbers.round()) and numbers.min() >= -8 and numbers.max() <= 7
    assert (made[3] == 0).all() and scales.dtype == torch.float16 and scales.isfinite().all()

    def error(rounded_matrix: Tensor) -> float:
        return float((states @ (rounded_matrix - matrix).T).norm() / (states @ matrix.T).norm())

    assert error(made) < 0.6 * error(nearest) < 0.1
    unseen, _ = rounded(matrix, torch.zeros(96, 96).double())  # no state at all: the nearest values
    assert torch.equal(unseen, nearest)


def test_stored_and_read_again_nothing_changes(tmp_path: Path) -> None:
    checkpoint = in_four_bits(make_checkpoint(DESIGNS["vanilla"], decoder=WIDE))
    assert len(checkpoint.four_bits) == 14
    folder = checkpoints.save(checkpoint, tmp_path / "a", "outrider", {}, int8=True)
    read = checkpoints.load(folder)
    for name, scales in checkpoint.four_bits.items():
        assert torch.equal(read.tensors[name], checkpoint.tensors[name]) and torch.equal(read.four_bits[name], scales)
    stored = load_file(folder / "model.safetensors")
    gate = stored["layers.0.mlp.gate_proj.weight"]
    assert gate.dtype == torch.uint8 and gate.shape == (64, 16) and stored["fc.weight"].dtype == torch.int8

    again = load_file(checkpoints.save(read, tmp_path / "b", "outrider", {}, int8=True) / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items() if "scale" not in name)
    other = checkpoints.load(
        checkpoints.save(read, tmp_path / "c", "speculators", {})
    )  # no 4 bits there: floating point
    assert not other.four_bits and all(torch.equal(other.tensors[n], read.tensors[n]) for n in read.tensors)


def test_files_in_four_bits_are_checked(tmp_path: Path) -> None:
    checkpoint = in_four_bits(make_checkpoint(DESIGNS["vanilla"], decoder=WIDE))
    file = checkpoints.save(checkpoint, tmp_path / "a", "outrider", {}) / "model.safetensors"
    name = "layers.0.mlp.gate_proj.weight"
    stored = load_file(file)
    for changes, message in (
        ({f"{name}_scale": None}, r"uint8 and needs '.*_scale', float16 of shape \[64, 1\]; there is none"),
        ({f"{name}_scale": torch.ones(64, 2)}, r"of shape \[64, 1\]; it is torch.float32 of shape \[64, 2\]"),
        ({name: stored[name][:, :8]}, r"of shape \[64, 0\]"),
        ({name: stored[name][:32], f"{name}_scale": stored[f"{name}_scale"][:32]}, r"\[32, 32\], but the config says"),
    ):
        changed = {key: value for key, value in {**stored, **changes}.items() if value is not None}
        save_file({key: value.contiguous() for key, value in changed.items()}, file)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(tmp_path / "a")
    moved = {name: value + 1e-4 for name, value in checkpoint.tensors.items() if name in checkpoint.four_bits}
    moved_checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **moved})
    with pytest.raises(CheckpointError, match="holds other values than whole numbers of -8 to 7 times its scales"):
        checkpoints.save(moved_checkpoint, tmp_path / "no", "outrider", {})
    assert not (tmp_path / "no").exists()


def test_a_rounded_head_caps_its_logits_as_the_target_does() -> None:
    backend, given = ReferenceBackend(), make_target()
    capped = replace(given.stack.config, logit_softcap=5.0)
    target = DecoderTarget(given.spec, backend.load(capped, given.tensors, torch.float32), backend)  # type: ignore[attr-defined]
    checkpoint = in_four_bits(make_checkpoint(DESIGNS["dflash"], decoder=WIDE))
    head, scales = rounded(given.tensors["head.weight"], torch.eye(WIDTH).double())  # type: ignore[attr-defined]
    tensors, four_bits = {**checkpoint.tensors, "head.weight": head}, {**checkpoint.four_bits, "head.weight": scales}
    net = load_net(replace(checkpoint, tensors=tensors, four_bits=four_bits), target, backend, torch.float32)
    states = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)) * 20
    torch.testing.assert_close(net.unembed(states), torch.tanh(states @ head.T / 5) * 5)


def test_other_forms_have_the_targets_own_head_again(tmp_path: Path) -> None:
    """A stored head would draft without the cap of the target's logits, and from rounded rows."""
    checkpoint = in_four_bits(make_checkpoint(DESIGNS["dflash"], decoder=WIDE))
    head, scales = rounded(torch.randn(checkpoint.vocab_size, WIDTH), torch.eye(WIDTH).double())
    tensors, four_bits = {**checkpoint.tensors, "head.weight": head}, {**checkpoint.four_bits, "head.weight": scales}
    folder = tmp_path / "run" / "drafter"
    checkpoints.save(replace(checkpoint, tensors=tensors, four_bits=four_bits), folder, "outrider", {})
    nothing: dict[str, Any] = {"sha256": "", "settings": {}, "sources": {}, "facts": {}, "seconds": 0, "versions": {}}
    made = Artefact(tmp_path / "run", "run", "", None, {"lineage": {}} | nothing)
    hand_over(str(folder), "vllm", tmp_path / "handed over", "a/target")
    written = [
        convert(folder, tmp_path / "converted", "speculators").folder,
        tmp_path / "handed over" / "drafter",
        export(ExportConfig(form="speculators"), made, tmp_path / "exported", "a/target"),
        export(ExportConfig(form="outrider", dtype="float32"), made, tmp_path / "wide", "a/target"),
    ]
    for copy in map(checkpoints.load, written):
        assert "head.weight" not in copy.tensors and not copy.four_bits
    kept = export(ExportConfig(), made, tmp_path / "kept", "a/target")
    assert "head.weight" in checkpoints.load(kept).four_bits


@pytest.mark.skipif(native is None, reason="needs the compiled core")
@pytest.mark.parametrize("kind", sorted(OWN))
def test_a_run_ends_with_a_drafter_in_four_bits(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, 4096, (30,), generator=generator).tolist() for _ in range(4)]
    lines = [f'{{"id": "{i}", "domain": "x", "prompt": {t[:6]}, "answer": {t[6:]}}}\n' for i, t in enumerate(texts)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    config = Config(**SMALL | {"kind": kind, "drafter": OWN[kind]})
    learn(config, tmp_path, tmp_path / "out", "embedded", dtype="float32")
    folder = tmp_path / "out" / "drafter"
    checkpoint = checkpoints.load(folder)
    assert {"head.weight", "layers.0.down.weight"} <= checkpoint.four_bits.keys()

    plain = LLM("embedded", "none")
    llm = plain.with_drafter(str(folder))
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=3)
    assert llm.generate("def f(", params)[0].token_ids == plain.generate("def f(", params)[0].token_ids
    wide = LLM("embedded", str(folder), drafter_options={"dtype": "float32"})
    mine, theirs = (one.drafter.net.stack for one in (llm, wide))  # type: ignore[attr-defined]
    assert (mine.dtype, theirs.dtype) == ("file", "float32")
    states = torch.randn(3, 256, generator=generator)
    expected = states @ checkpoint.tensors["head.weight"].T
    torch.testing.assert_close(mine.unembed(states), expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    torch.testing.assert_close(theirs.unembed(states), expected, rtol=1e-4, atol=1e-4)


def test_four_bits_need_a_form_and_shapes_that_have_them(tmp_path: Path) -> None:
    for options in ({"form": "speculators"}, {"kind": "draft_model"}):
        with pytest.raises(ValidationError, match="the form outrider, the only one that has 4 bits"):
            Config(**{"four_bits": True, **options})
    (tmp_path / "train.jsonl").write_text('{"id": "a", "domain": "x", "prompt": [5, 6, 7], "answer": [8, 9, 10, 11]}\n')
    config = Config(**SMALL | {"drafter": OWN["dspark"] | {"intermediate_size": 48}})
    with pytest.raises(InvalidRequest, match="columns are a multiple of 32; layers.0.down.weight has 48"):
        learn(config, tmp_path, tmp_path / "out", "embedded", dtype="float32")
