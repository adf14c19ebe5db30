"""Stage ``export``: a folder that others load, with a card that says what the drafter is made of, and how good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from outrider import __version__, checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.files import public_name, read_json, write_json
from outrider.models.loading import load_target
from outrider.training.artefact import Artefact
from outrider.training.networks import Frozen
from outrider.training.progress import duration

__all__ = ["Config", "card", "export"]

CHECKPOINT = "drafter"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Config(BaseModel):
    """The folder's form, and what its card cannot know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    form: Literal["auto", "speculators", "deepspec", "outrider"] = "auto"
    """speculators is what vLLM loads; deepspec holds copies of the target's embedding and head, too; outrider holds
    every kind. auto: speculators where it can hold the kind, else outrider."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """What weights are stored in."""
    name: str = "drafter"
    """The card's title."""
    target_name: str | None = None
    """What others know the target by, such as its hub id. Default: as it was called here."""
    licence: str | None = None
    """The weights' licence, such as `apache-2.0`. Mind the licences of the target and of the prompts."""


def export(config: Config, drafter: Artefact, out: Path, target: str, *, evaluation: Artefact | None = None) -> Path:
    """Write ``out/drafter`` (it must not exist) from an artefact of ``run`` or ``calibrate``.

    A model of its own (``draft_model``) is copied as it is. Raises CheckpointError for what the format cannot hold.
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
        checkpoint = _prepared(config, checkpoints.load(source), target)
        form = checkpoints.default_format(checkpoint.design) if config.form == "auto" else config.form
        checkpoints.save(checkpoint, folder, form, provenance)
        shape = _shape(checkpoint)
    name = config.target_name or (made_for or {}).get("name", public_name(target))
    (folder / "README.md").write_text(card(config, name, shape, history), encoding="utf-8")
    return folder


def _prepared(config: Config, checkpoint: DraftCheckpoint, target: str) -> DraftCheckpoint:
    if config.target_name is not None:
        checkpoint = replace(checkpoint, target=replace(checkpoint.target, name=config.target_name))
    if config.form == "deepspec":
        checkpoint = Frozen(checkpoint, load_target(target)).filled(checkpoint)
    if config.dtype != "keep":
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


# ------------------------------------------------------------------------------------------------ the card


def card(config: Config, target: str, shape: Mapping[str, Any], history: Mapping[str, Any]) -> str:
    """A model card in Markdown: facts from the stages' provenance, and nothing that was not measured."""
    head = f"---\nlicense: {config.licence}\n---\n\n" if config.licence else ""
    kind = shape["kind"]
    rows = [("target", target), *((name, _plain(value)) for name, value in shape.items())]
    rows += _data(history) + _budget(history)
    parts = [
        f"# {config.name}",
        f"A `{kind}` drafter for `{target}`. It proposes tokens which the target then checks, so the text stays the "
        "target's own and only comes sooner; for another target it is of no use.",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows),
        _acceptance(history),
        _calibration(history),
        "## Use\n\n```python\nfrom outrider import LLM, SamplingParams\n\n"
        f'llm = LLM("{target}", drafter="path/to/this/folder")\n'
        'for event in llm.stream("Once upon a time", SamplingParams(max_tokens=128)):\n'
        '    print(event.text, end="", flush=True)\n```',
        f"## Licence\n\n{config.licence or 'None is given yet: ask whoever published these weights.'}",
        "provenance.json holds every stage's settings, versions and hashes.",
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
        rows.append(("sampled with", ", ".join(f"{name} {value:g}" for name, value in sampling.items())))
    return rows


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
        "## Acceptance\n\nTokens a round on held-out prompts, the target's own token included, and speed over plain "
        "decoding on the machine that measured it; 95 % intervals.\n\n"
        "| temperature | prompts | number | acceptance length | speed-up |\n|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _calibration(history: Mapping[str, Any]) -> str:
    buckets = _facts(history, "calibrate").get("buckets", [])
    if not buckets:
        return ""
    lines = [f"| {b['title']} | {b['rounds']:,} | {b['before']:.1%} | {b['after']:.1%} |" for b in buckets]
    return (
        "## Calibration\n\nExpected calibration error of the survival of drafts, on prompts that the scaling was not "
        "fitted on.\n\n| | survivals | before | after |\n|---|---|---|---|\n" + "\n".join(lines)
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
