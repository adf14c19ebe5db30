"""A finished drafter for another engine: the files that it loads, the command that starts it, and what to know.

An exporter refuses what its engine cannot load, because an engine that loads it all the same drafts badly without a
word. ``handover.json`` says against what the form was checked, and what was not run.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.errors import CheckpointError, InvalidRequest
from outrider.files import new_folder, read_json, write_json
from outrider.models.loading import load_target, load_tokenizer
from outrider.models.locations import PACKAGED_DRAFTERS, SMOLLM2, drafter_location, public_name, resolve_model
from outrider.registry import find
from outrider.scheduling.calibration import sigmoid
from outrider.training.networks import Frozen
from outrider.version import __version__

__all__ = ["DRAFTER", "FORM_FILE", "Exporter", "Handover", "Source", "as_json", "copied", "hand_over", "saved"]

DRAFTER = "drafter"
FORM_FILE = "model.safetensors"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose GGUF file the package holds


@dataclass(frozen=True)
class Source:
    """A drafter that is handed over."""

    folder: Path
    """Its directory; of a draft model perhaps a GGUF file."""
    target: str
    """As the user named it."""
    checkpoint: DraftCheckpoint | None
    """None: a draft model, that is, a language model of its own."""
    drafts: int
    """Tokens of a round."""
    plain_from: int | None = None
    """Requests at once from which plain decoding is faster, where a plan says so."""
    threshold: float | None = None
    """Confidence below which a draft is not worth verifying."""

    @property
    def kind(self) -> str:
        return "draft_model" if self.checkpoint is None else self.checkpoint.kind

    @property
    def served(self) -> str:
        """The target as the other engine finds it, from any directory: a hub id, or an absolute path."""
        if self.target == SMOLLM2:
            return SMOLLM2_HUB
        return str(resolve_model(self.target).resolve()) if self.is_here else self.target

    @property
    def is_here(self) -> bool:
        """Whether the target's files are on this machine; else they are a hub's."""
        return self.target in PACKAGED_DRAFTERS or Path(self.target).expanduser().exists()

    @property
    def block(self) -> bool:
        """Whether the number of drafts is that of a block."""
        return self.kind in ("dspark", "dflash")

    def with_heads(self, *names: str) -> DraftCheckpoint:
        """The checkpoint with the target's embedding or head (``embed.weight``, ``head.weight``) where it has none; a
        reduced head holds the target's rows of the tokens that can be drafted."""
        assert self.checkpoint is not None
        missing = [name for name in names if name not in self.checkpoint.tensors]
        if not missing:
            return self.checkpoint
        filled = Frozen(self.checkpoint, load_target(self.target, dtype="float32")).filled(self.checkpoint)
        dtype = next(t.dtype for t in self.checkpoint.tensors.values() if t.is_floating_point())
        kept = {n: t for n, t in filled.tensors.items() if n in self.checkpoint.tensors}

        return replace(self.checkpoint, tensors=kept | {n: filled.tensors[n].to(dtype) for n in missing})

    def without(self, reason: str) -> CheckpointError:
        """The refusal of an engine."""
        return CheckpointError(f"this {self.kind} drafter cannot be handed over: {reason}")


@dataclass(frozen=True)
class Handover:
    """What was written for an engine."""

    engine: str
    kind: str
    command: list[str]
    """Starts the server, in the folder of the files."""
    prepare: list[list[str]] = field(default_factory=list)
    """Commands of the engine's own tools that come first."""
    speculative_config: dict[str, Any] | None = None
    advice: list[str] = field(default_factory=list)
    checked: str = ""
    """Against what the form was checked, and what was not run."""

    def script(self) -> str:
        """A shell script. The server replaces the shell, so that signals reach it, and gets the script's arguments."""
        comments = "".join(f"# {line}\n" for line in (*self.advice, self.checked) if line)
        lines = [*map(shlex.join, self.prepare), f'exec {shlex.join(self.command)} "$@"']
        return f'#!/bin/sh\n{comments}set -e\ncd "$(dirname "$0")"\n' + "\n".join(lines) + "\n"


class Exporter(Protocol):
    """One engine's."""

    def write(self, source: Source, folder: Path) -> Handover:
        """Write the drafter below ``folder``, as ``drafter`` or ``drafter.gguf``. Raises CheckpointError for what the
        engine cannot load."""
        ...


def hand_over(
    drafter: str, engine: str, out: Path, target: str, *, plan: Mapping[str, Any] | None = None, rule: str = "rejection"
) -> Handover:
    """Write ``out`` for an engine. ``plan``: JSON of ``outrider plan``, for the number of drafts and the load.

    Raises CheckpointError for what the engine cannot load, InvalidRequest for an unreadable plan.
    """
    exporter: Exporter = find("exporter", engine)()
    if out.exists():
        raise CheckpointError(f"{out} exists already; give a new directory")
    folder = resolve_model(drafter_location(drafter, target))
    config = None if folder.is_file() else read_json(folder / "config.json")
    trained = config is not None and checkpoints.recognise(config) is not None
    checkpoint = checkpoints.load(folder).in_floating_point() if trained else None
    if checkpoint is not None:
        _check_layers(checkpoint)
    else:
        _check_tokenizer(folder, target)
    drafts, plain_from = _planned(plan, checkpoint.design.drafts if checkpoint else 4, checkpoint)
    source = Source(folder, target, checkpoint, drafts, plain_from, _threshold(checkpoint, rule))
    with new_folder(out) as partial:
        made = exporter.write(source, partial)
        if plan is not None:
            planned = [plan.get("target"), plan["advised"].get("drafter"), plan.get("machine")]
            made = replace(made, advice=[*made.advice, f"Planned for: {', '.join(map(str, filter(None, planned)))}."])
        script = partial / "launch.sh"
        script.write_text(made.script(), encoding="utf-8")
        script.chmod(0o755)
        if made.speculative_config is not None:
            write_json(partial / "speculative_config.json", made.speculative_config)
        facts = {"made_by": f"outrider {__version__}", "target": public_name(target), "drafts": drafts}
        write_json(partial / "handover.json", asdict(made) | facts)
    return made


def copied(source: Source, folder: Path) -> Path:
    """A draft model's own files, unchanged."""
    if source.folder.is_file():
        return Path(shutil.copy(source.folder, folder / "drafter.gguf"))
    return Path(shutil.copytree(source.folder, folder / DRAFTER))


def saved(source: Source, checkpoint: DraftCheckpoint, folder: Path, form: str) -> Path:
    """The drafter in a checkpoint format."""
    provenance = {"made_by": f"outrider {__version__} export", "source": source.folder.name}
    return checkpoints.save(checkpoint, folder / DRAFTER, form, provenance)


def as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _check_layers(checkpoint: DraftCheckpoint) -> None:
    count = checkpoint.target.num_layers
    if count is not None and checkpoint.target_layers and count - 1 in checkpoint.target_layers:
        raise CheckpointError(
            f"the drafter reads the target's last layer ({count - 1}): SGLang cannot capture it, and others report it "
            "before or after the final norm; train a drafter on earlier layers"
        )


def _check_tokenizer(folder: Path, target: str) -> None:
    """Of a draft model, where the target is on this machine."""
    if not Source(folder, target, None, 0).is_here:
        return
    try:
        mine, other = load_tokenizer(folder), load_tokenizer(target)
    except CheckpointError:  # files without a tokenizer: the engine compares sizes
        return
    if not mine.same_as(other):
        raise CheckpointError(
            f"the draft model {folder.name} has another vocabulary ({mine.vocab_size:,} tokens) than the target "
            f"{public_name(target)} ({other.vocab_size:,}): no engine can verify its drafts; use a smaller model with "
            "the target's tokenizer"
        )


def _planned(plan: Mapping[str, Any] | None, most: int, checkpoint: DraftCheckpoint | None) -> tuple[int, int | None]:
    if plan is None:
        return most, None
    try:
        advised, by_rows = plan["advised"]["drafts"], plan["by_rows"]
        plain = [rows for rows, one in by_rows if one["drafts"] == 0]
    except (KeyError, TypeError, ValueError):
        raise InvalidRequest("--plan: expected the JSON of `outrider plan --json`") from None
    if not advised:
        raise InvalidRequest(
            "--plan: it advises plain decoding, so no drafter is handed over; leave --plan out to insist"
        )
    return (min(advised, most) if checkpoint else advised), min(plain, default=None)


def _threshold(checkpoint: DraftCheckpoint | None, rule: str) -> float | None:
    """What a drafter's own confidence says where the calibrated one is a half, at the first position: engines cut by a
    threshold on uncalibrated confidences."""
    if checkpoint is None or checkpoint.calibration is None:
        return None
    scaling = checkpoint.calibration.scaling(rule, 0.0)
    if scaling is None:
        return None
    return round(sigmoid(-scaling.shifts[0] * scaling.temperatures[0]), 3)
