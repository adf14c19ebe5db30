"""Stage ``export``: the finished drafter in a common checkpoint format, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.files import read_json, write_json
from outrider.models.loading import load_target
from outrider.models.locations import public_name
from outrider.training.artefact import Artefact
from outrider.training.networks import Frozen
from outrider.training.progress import duration
from outrider.version import __version__

__all__ = ["Config", "card", "export"]

CHECKPOINT = "drafter"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Config(BaseModel):
    """Format of the checkpoint, and entries of the model card that are not measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    form: Literal["auto", "speculators", "deepspec", "outrider"] = "auto"
    """speculators is the format that vLLM loads; deepspec also contains copies of the target's embedding and head;
    outrider holds every kind, and 4 bits. auto: speculators where it can hold the drafter, else outrider."""
    dtype: Literal["keep", "float32", "bfloat16", "int8"] = "keep"
    """Stored precision of the weights; int8 (in the form `outrider` alone) is what the native core drafts in."""
    name: str = "drafter"
    """Title of the model card."""
    target_name: str | None = None
    """Public name of the target, such as its hub id. Default: its name in the recipe."""
    licence: str | None = None
    """The weights' licence, such as `apache-2.0`. Respect the licences of the target and of the prompts."""


def export(config: Config, drafter: Artefact, out: Path, target: str, *, evaluation: Artefact | None = None) -> Path:
    """Write ``out/drafter`` (it must not exist) from an artefact of ``run`` or ``calibrate``.

    A ``draft_model`` is copied unchanged. Raises CheckpointError for a drafter that the format cannot represent.
    """
    source, folder = drafter.folder / CHECKPOINT, out / CHECKPOINT
    history = drafter.lineage | ({} if evaluation is None else evaluation.lineage)
    made_for = None if drafter.target is None else {**drafter.target, "name": public_name(drafter.target["name"])}
    provenance = {"made_by": f"outrider {__version__}", "target": made_for, "lineage": history}
    if checkpoints.recognise(read_json(source / "config.json")) is None:
        shutil.copytree(source, folder)
        write_json(folder / "provenance.json", provenance)
        shape = {"kind": "draft_model"}
    else:
        checkpoint = checkpoints.load(source)
        form = checkpoints.default_format(checkpoint) if config.form == "auto" else config.form
        checkpoint = _prepared(config, checkpoint, form, target)
        checkpoints.save(checkpoint, folder, form, provenance, int8=config.dtype == "int8")
        shape = _shape(checkpoint)
    name = config.target_name or (made_for or {}).get("name", public_name(target))
    (folder / "README.md").write_text(card(config, name, shape, history), encoding="utf-8")
    return folder


def _prepared(config: Config, checkpoint: DraftCheckpoint, form: str, target: str) -> DraftCheckpoint:
    if form != "outrider" or config.dtype in DTYPES:
        checkpoint = checkpoint.in_floating_point()
    if config.target_name is not None:
        checkpoint = replace(checkpoint, target=replace(checkpoint.target, name=config.target_name))
    if form == "deepspec":
        checkpoint = Frozen(checkpoint, load_target(target)).filled(checkpoint)
    if config.dtype in DTYPES:
        dtype = DTYPES[config.dtype]
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
    return checkpoint


def _shape(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    return {
        "kind": checkpoint.kind,
        "layers": len(checkpoint.stack(head=False).layers),
        "width": checkpoint.hidden_size,
        "drafts": checkpoint.design.drafts,
        "target layers read": list(checkpoint.target_layers or ()),
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values() if tensor.is_floating_point()),
    }


# ------------------------------------------------------------------------------------------------ model card


def card(config: Config, target: str, shape: Mapping[str, Any], history: Mapping[str, Any]) -> str:
    """A model card in Markdown, written from the provenance of the stages."""
    head = f"---\nlicense: {config.licence}\n---\n\n" if config.licence else ""
    kind = shape["kind"]
    rows = [("target", target), *((name, _plain(value)) for name, value in shape.items())]
    rows += _data(history) + _budget(history)
    parts = [
        f"# {config.name}",
        f"A `{kind}` drafter for `{target}`: it proposes tokens that the target verifies, so what is written is the "
        "target's own. It works with this target only.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows),
        _acceptance(history),
        _calibration(history),
        "## Use\n\n```python\nfrom outrider import LLM, SamplingParams\n\n"
        f'llm = LLM("{target}", drafter="path/to/this/folder")\n'
        'for event in llm.stream("Once upon a time", SamplingParams(max_tokens=128)):\n'
        '    print(event.text, end="", flush=True)\n```',
        f"## Licence\n\n{config.licence or 'None was given.'}",
        "provenance.json has the settings, versions and hashes of every stage.",
    ]
    return head + "\n\n".join(part for part in parts if part) + "\n"


def _facts(history: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return (history.get(stage) or {}).get("facts") or {}


def _data(history: Mapping[str, Any]) -> list[tuple[str, str]]:
    prompts, answers = _facts(history, "prompts"), _facts(history, "regenerate")
    rows = []
    for part in ("train", "held_out"):
        if part in prompts:
            rows.append((f"prompts, {part.replace('_', ' ')}", _counts(prompts[part])))
    if "train" in answers:
        train, sampling = answers["train"], answers.get("sampling", {})
        rows.append(("the target's answers", f"{train['answers']:,} with {train['tokens']:,} tokens"))
        rows.append(("sampled with", ", ".join(f"{name} {_numbers(value)}" for name, value in sampling.items())))
    return rows


def _numbers(value: float | Sequence[float]) -> str:
    """One number, or the several temperatures that answers share out."""
    return " / ".join(f"{one:g}" for one in (value if isinstance(value, Sequence) else [value]))


def _budget(history: Mapping[str, Any]) -> list[tuple[str, str]]:
    run = _facts(history, "run")
    if not run:
        return []
    seen = f"{run['steps']:,} steps, {run['tokens']:,} tokens seen, {duration(run['seconds'])}"
    return [("training", seen), ("options", json.dumps(history["run"]["settings"].get("drafter", {})))]


def _acceptance(history: Mapping[str, Any]) -> str:
    rows = _facts(history, "eval").get("rows", [])
    if not rows:
        return ""
    lines = [
        f"| {row['temperature']:g} | {row['domain']} | {row['prompts']} | {_range(row['acceptance_length'])} | "
        f"{_range(row['speedup'])} |"
        for row in rows
    ]
    return (
        "## Acceptance\n\nTokens per round on held-out prompts, bonus token included, and speed-up over plain "
        "decoding on the machine it was measured on; 95 % intervals.\n\n"
        "| temperature | prompts | number | acceptance length | speed-up |\n|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _calibration(history: Mapping[str, Any]) -> str:
    buckets = _facts(history, "calibrate").get("buckets", [])
    if not buckets:
        return ""
    lines = [f"| {b['title']} | {b['rounds']:,} | {b['before']:.1%} | {b['after']:.1%} |" for b in buckets]
    return (
        "## Calibration\n\nExpected calibration error of survivals (the probability that all drafts up to a position "
        "are accepted), on prompts that the scaling was not fitted on.\n\n"
        "| | survivals | before | after |\n|---|---|---|---|\n" + "\n".join(lines)
    )


def _counts(domains: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in domains.items()) or "none"


def _range(one: Mapping[str, float | None]) -> str:
    if one["value"] is None:
        return "-"
    return f"{one['value']:.2f}" + (f" ({one['low']:.2f} to {one['high']:.2f})" if one["low"] is not None else "")


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
