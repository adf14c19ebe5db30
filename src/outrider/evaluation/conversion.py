"""Convert a drafter from one checkpoint format to another, and verify the result.

A wrong conversion does not crash: it drafts badly. So the copy is read back, compared bit for bit, and its acceptance
on text of the target is compared with the original's before the directory gets its final name.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.errors import CheckpointError
from outrider.evaluation.replay import Acceptance, Prompts, least_score, replay, transcribe
from outrider.files import read_json
from outrider.models.loading import load_layers, model_config
from outrider.models.locations import resolve_model
from outrider.models.weights import TensorFiles
from outrider.registry import find
from outrider.types import Backend, TargetModel
from outrider.version import __version__

__all__ = ["Conversion", "convert", "named_target"]

TOLERANCE = 1e-3  # largest difference in accepted drafts per round (rounding of a shared head)


@dataclass(frozen=True, slots=True)
class Conversion:
    """The written checkpoint, and its acceptance."""

    folder: Path
    kind: str
    source_format: str
    format: str
    acceptance: Acceptance | None  # None: not measured

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        measured = self.acceptance
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "from": self.source_format,
            "to": self.format,
            "verified": measured is not None,
            "greedy_acceptance_length": None if measured is None else round(measured.greedy_length, 4),
            "expected_acceptance_length": None if measured is None else round(measured.expected_length, 4),
        }


def named_target(source: str | Path) -> Path | None:
    """The directory of the target that a checkpoint names, if it is found beside the checkpoint or as a path."""
    folder = resolve_model(source)
    name = checkpoints.read_header(read_json(folder / "config.json")).target.name
    if not name:
        return None
    found = [path for path in (folder.parent / name, Path(name)) if (path / "config.json").exists()]
    return found[0] if found else None


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    target: TargetModel | None = None,
    target_folder: Path | None = None,
    target_layers: tuple[int, ...] | None = None,
    prompts: Prompts | None = None,
    backend: Backend | None = None,
    new_tokens: int = 48,
) -> Conversion:
    """Write ``source`` as ``to`` (deepspec or speculators). With ``target`` and ``prompts`` its acceptance is measured.

    ``target_folder`` supplies what the source takes from its target: name, layers, embedding and head.
    Raises CheckpointError for a drafter that the format cannot represent, for a copy that drafts differently, and (on
    natural prompts) for an original that drafts no better than guessing.
    """
    original = checkpoints.load(source)
    if target_layers is not None:
        original = replace(original, target_layers=target_layers)
    if to != "outrider":
        original = original.in_floating_point()
    filled = original if target_folder is None else _fill_from_target(original, target_folder, to, target)
    measured: list[Acceptance] = []

    def check(written: Path) -> None:
        copy = checkpoints.load(written)
        _compare(filled, copy)
        if target is not None and prompts is not None:
            measured.append(_compare_acceptance(filled, copy, target, prompts, backend, new_tokens))

    folder = resolve_model(source)
    provenance = {
        "made_by": f"outrider {__version__} convert",
        "source": str(source),
        "source_format": original.format,
        "source_sha256": {name: _digest(folder / name) for name in ("config.json", "model.safetensors")},
        "arguments": {
            "to": to,
            "target": str(target_folder) if target_folder else None,
            "target_layers": target_layers,
        },
        "verified_by_acceptance": target is not None and prompts is not None,
    }
    path = checkpoints.save(filled, destination, to, provenance, check)
    return Conversion(path, original.kind, original.format, to, measured[0] if measured else None)


def _fill_from_target(
    checkpoint: DraftCheckpoint, folder: Path, to: str, target: TargetModel | None
) -> DraftCheckpoint:
    """Add what the file takes from the target: its name and sizes, and for DeepSpec also embedding and head."""
    config = model_config(folder)
    text = config.get("text_config") or config
    facts = checkpoint.target
    facts = replace(
        facts,
        num_layers=facts.num_layers or text.get("num_hidden_layers"),
        name=facts.name or folder.name,
        architecture=facts.architecture or (config.get("architectures") or [None])[0],
    )
    layers = checkpoint.target_layers
    if layers is None and target is not None:
        layers = checkpoint.layers_for(target.spec)
    checkpoint = replace(checkpoint, target=facts, target_layers=layers)
    if to == "deepspec" and not {"embed.weight", "head.weight"} <= checkpoint.tensors.keys():
        copies = _embedding_and_head(checkpoint, folder)
        checkpoint = replace(checkpoint, tensors={**copies, **checkpoint.tensors})
    return checkpoint


def _embedding_and_head(checkpoint: DraftCheckpoint, folder: Path) -> dict[str, Tensor]:
    """The target's, in the drafter's dtype, the embedding as the drafter's layers are to see it. Raises
    CheckpointError."""
    dtype = next(iter(checkpoint.tensors.values())).dtype
    native = load_layers(folder)
    if native is not None:
        stack, weights = native
        embedding = weights["embed.weight"]
        scale = stack.embedding_scale / checkpoint.stack(head=False).embedding_scale
        head = weights.get("head.weight", embedding)  # the latter where they are tied
        return {"embed.weight": (embedding * scale).to(dtype), "head.weight": head.to(dtype)}
    files = TensorFiles(folder)

    def read(*endings: str) -> Tensor:
        found = [file for ending in endings for file in files.shapes if file.endswith(ending)]
        if not found:
            raise CheckpointError(f"{folder} has no tensor named like {endings[0]!r}, which DeepSpec's files copy")
        return files.read(found[0], dtype)

    return {
        "embed.weight": read("embed_tokens.weight"),
        "head.weight": read("lm_head.weight", "embed_tokens.weight"),
    }


def _compare(wanted: DraftCheckpoint, copy: DraftCheckpoint) -> None:
    """Raise CheckpointError for any difference between the checkpoints."""
    for what in ("design", "target_layers", "draft_vocab_size", "decoder", "calibration"):
        if getattr(wanted, what) != getattr(copy, what):
            raise CheckpointError(
                f"the copy's {what} is {getattr(copy, what)} when read back, expected {getattr(wanted, what)}"
            )
    for name, tensor in wanted.tensors.items():
        other = copy.tensors.get(name)
        if other is None or other.dtype != tensor.dtype or not torch.equal(other, tensor):
            raise CheckpointError(f"the copy's tensor {name!r} differs from the original's")


def _compare_acceptance(
    original: DraftCheckpoint,
    copy: DraftCheckpoint,
    target: TargetModel,
    prompts: Prompts,
    backend: Backend | None,
    new_tokens: int,
) -> Acceptance:
    """Draft with both along the target's text.

    Raises CheckpointError where acceptance differs, or is no better than guessing.
    """
    layers = original.layers_for(target.spec)
    texts = transcribe(target, prompts.ids, layers, new_tokens)
    kind = find("drafter", original.kind)
    engine = backend or find("backend", "reference")()
    measured = []
    for checkpoint in (original, copy):
        options = kind.Config(model="", target_layers=layers)
        drafter = kind(checkpoint, target, engine, config=options, dtype=target.spec.dtype, max_rows=len(texts))
        measured.append(replay(drafter, texts))
    before, after = measured
    if abs(before.score - after.score) > TOLERANCE:
        raise CheckpointError(
            f"the copy drafts differently: {after.score:.3f} accepted drafts a round, the original {before.score:.3f}"
        )
    if prompts.natural and after.score < least_score(texts, original.design.drafts):
        raise CheckpointError(
            f"almost no draft is accepted ({after.score:.2f} a round, no better than guessing), for the original too: "
            "nothing was written; `outrider doctor` finds the reason, --unverified converts without this check"
        )
    return after


def _digest(path: Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
