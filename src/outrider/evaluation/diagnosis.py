"""Find errors in a drafter's checkpoint, by checking the file and by measuring acceptance.

A wrong value in a drafter's config does not crash: acceptance falls. So each alternative reading of the file that is
often confused (layers counted from 0 or from 1, whether the anchor's slot predicts, another mask token, the target's
rotary positions, where the residual starts) drafts along the same text, and the report names the one that works.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from outrider import checkpoints
from outrider.backends.layers import rope_config
from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base import CachedDrafter
from outrider.drafters.dspark_design import BlockDesign
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.errors import CheckpointError, IncompatibleDrafter, InvalidRequest
from outrider.evaluation.replay import Acceptance, Prompts, Transcript, least_score, replay, transcribe
from outrider.files import read_json
from outrider.models.locations import resolve_model
from outrider.registry import find
from outrider.types import Backend, TargetModel, readable_layers

__all__ = ["Finding", "Measured", "Report", "examine", "measure"]

Level = Literal["fault", "suspicious"]

BETTER = 3.0  # another reading must beat the file's own by so many standard errors ...
WORTH = 0.02  # ... and by so many accepted drafts per round
SMALL_VOCABULARY = 1024  # up to this size every token is tried as the mask token
NO_PROMPTS = Prompts([], "", natural=True)
MASKS = (151669, 4)  # mask tokens of released drafters (Qwen3, Gemma 4)


@dataclass(frozen=True, slots=True)
class Finding:
    """An error, or something suspicious."""

    level: Level
    about: str
    """tensors, config, vocabulary, layers, last layer, anchor, mask token, rope, dtype, ..."""
    message: str


@dataclass(frozen=True, slots=True)
class Measured:
    """The acceptance of one reading of the checkpoint."""

    reading: str
    about: str  # the field that is wrong in the file if this reading works
    checkpoint: DraftCheckpoint
    acceptance: Acceptance


@dataclass(frozen=True, slots=True)
class Report:
    """What a checkpoint contains and expects, the findings, and which reading of it works."""

    checkpoint: DraftCheckpoint | None  # None: not readable
    findings: tuple[Finding, ...]
    measured: tuple[Measured, ...] = ()
    best: Measured | None = None
    prompts: str = ""

    @property
    def healthy(self) -> bool:
        return not any(finding.level == "fault" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain data, readings in the order they were measured."""
        return {
            "healthy": self.healthy,
            "is": None if self.checkpoint is None else _identity(self.checkpoint),
            "expects": None if self.checkpoint is None else _expectations(self.checkpoint),
            "findings": [{"level": f.level, "about": f.about, "message": f.message} for f in self.findings],
            "prompts": self.prompts,
            "measured": [
                {
                    "reading": m.reading,
                    "greedy_acceptance_length": round(m.acceptance.greedy_length, 4),
                    "expected_acceptance_length": round(m.acceptance.expected_length, 4),
                    "positions": len(m.acceptance.greedy),
                }
                for m in self.measured
            ],
            "works": None if self.best is None else self.best.reading,
        }


def examine(
    folder: str | Path,
    target: TargetModel | None = None,
    *,
    target_config: Mapping[str, Any] | None = None,
    prompts: Prompts = NO_PROMPTS,
    target_layers: tuple[int, ...] | None = None,
    backend: Backend | None = None,
    new_tokens: int = 48,
) -> Report:
    """Check a drafter's directory; with a target and prompts also measure acceptance. Errors found are not raised.

    ``target_config``: the target's config.json, for its rotary positions. ``target_layers``: for files that name none.
    Raises InvalidRequest for ``target_layers`` that the file names itself, or that no drafter can read. On prompts that
    are not natural text a measured fault is only suspicious: any drafter may fail on them.
    """
    try:
        checkpoint = checkpoints.load(folder)
    except CheckpointError as error:
        return Report(None, (Finding("fault", _about(str(error)), str(error)),))
    findings = [*_check_file(checkpoint, read_json(resolve_model(folder) / "config.json"))]
    if target_layers is not None:
        num_layers = checkpoint.target.num_layers if target is None else target.spec.num_layers
        _check_given(checkpoint, target_layers, num_layers)
        checkpoint = replace(checkpoint, target_layers=target_layers)
    if target is None:
        return Report(checkpoint, tuple(findings))
    if checkpoint.target_layers is None:
        checkpoint = replace(checkpoint, target_layers=checkpoint.layers_for(target.spec))
    if target_config is not None:
        findings += _check_rope(checkpoint, target_config)
    readings = _readings(checkpoint, target, target_config)
    wanted = {layer for _, _, reading in readings for layer in reading.target_layers or ()}
    layers = sorted(wanted & set(readable_layers(target.spec.num_layers)))
    if not layers:
        findings.append(Finding("fault", "layers", f"none of the layers {checkpoint.target_layers} can be auxiliary"))
        return Report(checkpoint, tuple(findings))
    transcripts = transcribe(target, prompts.ids, layers, new_tokens)
    longest = max(candidate.design.drafts for _, _, candidate in readings)
    measured: list[Measured] = []
    for reading, about, candidate in readings:
        try:
            acceptance = measure(candidate, target, transcripts, backend, longest)
        except IncompatibleDrafter as error:
            if reading == AS_WRITTEN:
                findings.append(Finding("fault", _about(str(error)), str(error)))
            continue
        measured.append(Measured(reading, about, candidate, acceptance))
    if measured and measured[0].reading == AS_WRITTEN and isinstance(checkpoint.design, BlockDesign):
        measured += _other_masks(measured[0], target, transcripts, backend, longest)
    best = _best(measured, least_score(transcripts, longest))
    findings += _measured_findings(measured, best, "fault" if prompts.natural else "suspicious")
    return Report(checkpoint, tuple(findings), tuple(measured), best, prompts.source)


def _check_given(checkpoint: DraftCheckpoint, layers: tuple[int, ...], num_layers: int | None) -> None:
    """Raises InvalidRequest."""
    if checkpoint.target_layers is not None:
        raise InvalidRequest(
            f"target layers are given for a file that names its own, {list(checkpoint.target_layers)}; leave them out"
        )
    highest = "" if num_layers is None else f" to {num_layers - 2}"
    outside = [n for n in layers if n < -1 or (num_layers is not None and n not in readable_layers(num_layers))]
    if outside or len(set(layers)) < len(layers) or len(layers) != checkpoint.num_aux_layers:
        raise InvalidRequest(
            f"the drafter reads {checkpoint.num_aux_layers} different target layers, from -1 (the embedding){highest}; "
            f"got {list(layers)}"
        )


def measure(
    checkpoint: DraftCheckpoint,
    target: TargetModel,
    transcripts: Sequence[Transcript],
    backend: Backend | None = None,
    longest: int = 0,
) -> Acceptance:
    """Acceptance of one checkpoint along transcripts (see ``replay``). Raises IncompatibleDrafter."""
    return replay(_drafter(checkpoint, target, backend, len(transcripts)), transcripts, longest)


def _drafter(checkpoint: DraftCheckpoint, target: TargetModel, backend: Backend | None, rows: int) -> CachedDrafter:
    kind: type[CachedDrafter] = find("drafter", checkpoint.kind)
    engine = backend or find("backend", "reference")()
    return kind(checkpoint, target, engine, config=kind.Config(model=""), dtype=target.spec.dtype, max_rows=rows)


# ------------------------------------------------------------------------------------------------ reading


def _identity(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    tensors = checkpoint.tensors
    return {
        "kind": checkpoint.kind,
        "format": checkpoint.format,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "layers": len(checkpoint.stack(head=False).layers),
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}),
        "own_embedding": "embed.weight" in tensors,
        "own_head": "head.weight" in tensors,
        "design": asdict(checkpoint.design),  # type: ignore[call-overload]  # designs are dataclasses
    }


def _expectations(checkpoint: DraftCheckpoint) -> dict[str, Any]:
    facts = checkpoint.target
    return {
        "target": facts.name,
        "architecture": facts.architecture,
        "hidden_size": facts.hidden_size,
        "num_layers": facts.num_layers,
        "vocab_size": checkpoint.vocab_size,
        "draft_vocab_size": checkpoint.draft_vocab_size,
        "target_layers": None if checkpoint.target_layers is None else list(checkpoint.target_layers),
        "drafts": checkpoint.design.drafts,
    }


def _about(message: str) -> str:
    """The subject of an error message, for sorting reports."""
    for word, about in (
        ("last layer", "last layer"),
        ("embedding differs", "target"),
        ("vocabulary", "vocabulary"),
        ("d2t", "vocabulary"),
        ("mask_token_id", "mask token"),
        ("rope", "rope"),
        ("layer", "layers"),
        ("another target", "target"),
        ("tensor", "tensors"),
        ("safetensors", "tensors"),
    ):
        if word in message:
            return about
    return "config"


def _check_file(checkpoint: DraftCheckpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Suspicious values that are visible without a target."""
    design, facts, layers = checkpoint.design, checkpoint.target, checkpoint.target_layers
    if layers is None:
        yield Finding("suspicious", "layers", "the file names no target layers: EAGLE-3's convention is assumed")
    else:
        if facts.num_layers is not None and facts.num_layers - 1 in layers:
            yield Finding(
                "fault",
                "last layer",
                f"it reads the target's last layer ({facts.num_layers - 1}), which libraries report before or after "
                "the final norm: either this file counts layers from 1, or its training data was ambiguous",
            )
        if list(layers) != sorted(set(layers)):
            yield Finding("suspicious", "layers", f"its target layers are not in increasing order: {list(layers)}")
    if isinstance(design, BlockDesign) and checkpoint.format == "speculators" and "sample_from_anchor" not in config:
        yield Finding(
            "suspicious",
            "anchor",
            f"no sample_from_anchor: {design.sample_from_anchor} is assumed, other tools say false",
        )
    claimed = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    stored = {str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values() if t.is_floating_point()}
    if claimed and stored != {claimed}:
        yield Finding(
            "suspicious", "dtype", f"config.json says {claimed}, the tensors are {' and '.join(sorted(stored))}"
        )
    elif len(stored) > 1:
        yield Finding("suspicious", "dtype", f"its tensors are of several dtypes: {' and '.join(sorted(stored))}")
    rope = {**checkpoint.decoder, **(checkpoint.decoder.get("rope_parameters") or {})}
    if "rope_theta" not in rope and "full_attention" not in rope:
        yield Finding("suspicious", "rope", "the config names no rope_theta: 10000 is assumed")
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_floating_point() and tensor.ndim == 2 and not bool(tensor.any()):
            yield Finding("suspicious", "tensors", f"{name} is all zeros: was it ever trained?")


def _check_rope(checkpoint: DraftCheckpoint, target_config: Mapping[str, Any]) -> Iterator[Finding]:
    own, theirs = _rope(checkpoint.decoder, checkpoint), _rope(target_config, checkpoint)
    if theirs is not None and own != theirs:
        yield Finding("suspicious", "rope", "its rotary frequencies are not the target's")


def _rope(config: Mapping[str, Any], checkpoint: DraftCheckpoint) -> tuple[float, ...] | None:
    """Rotary frequencies of a config for the drafter's head width."""
    config = config.get("text_config") or config
    layers = checkpoint.stack(head=False).layers
    if not layers:
        return None
    try:
        found = rope_config(config, layers[0].head_dim, "full_attention")
    except CheckpointError:
        return None
    return (*found.inverse_frequencies, found.scale)


# ------------------------------------------------------------------------------------------------ measuring

AS_WRITTEN = "as the file says"


def _readings(
    checkpoint: DraftCheckpoint, target: TargetModel, target_config: Mapping[str, Any] | None
) -> list[tuple[str, str, DraftCheckpoint]]:
    """The file's own reading first, then the alternatives: (description, field that differs, checkpoint)."""
    last, layers = target.spec.num_layers - 1, checkpoint.target_layers or ()
    shifts = []
    for step, words in ((0, ""), (-1, "layers one lower"), (1, "layers one higher")):
        moved = tuple(layer + step for layer in layers)
        if step == 0 or all(-1 <= layer < last for layer in moved):
            shifts.append((words, replace(checkpoint, target_layers=moved)))
    readings = [(words or AS_WRITTEN, "layers", shifted) for words, shifted in shifts]
    design = checkpoint.design
    if isinstance(design, BlockDesign) and design.block_size > 1:
        other = replace(design, sample_from_anchor=not design.sample_from_anchor)
        layout = "the anchor's slot predicts" if other.sample_from_anchor else "only masks predict"
        for words, shifted in shifts:
            about = "anchor and layers" if words else "anchor"
            readings.append((f"{layout}, {words}" if words else layout, about, replace(shifted, design=other)))
    if isinstance(design, Eagle3Design):
        other_residual = replace(design, norm_before_residual=not design.norm_before_residual)
        words = "the residual starts " + ("after" if other_residual.norm_before_residual else "before") + " the norm"
        readings.append((words, "norm_before_residual", replace(checkpoint, design=other_residual)))
    if target_config is not None:
        theirs = dict(target_config.get("text_config") or target_config)
        if _rope(theirs, checkpoint) not in (None, _rope(checkpoint.decoder, checkpoint)):
            keys = ("rope_parameters", "rope_theta", "rope_scaling")
            decoder = {key: value for key, value in checkpoint.decoder.items() if key not in keys}
            decoder |= {key: theirs[key] for key in keys if key in theirs}
            readings.append(("the target's rotary positions", "rope", replace(checkpoint, decoder=decoder)))
    return readings


def _other_masks(
    written: Measured, target: TargetModel, transcripts: Sequence[Transcript], backend: Backend | None, longest: int
) -> list[Measured]:
    """Other mask tokens: all tokens of a small vocabulary, else those of released drafters and the last one."""
    checkpoint, design = written.checkpoint, written.checkpoint.design
    assert isinstance(design, BlockDesign)
    size = checkpoint.vocab_size
    few = [token for token in (*MASKS, size - 1) if token < size]
    tokens = [t for t in dict.fromkeys(range(size) if size <= SMALL_VOCABULARY else few) if t != design.mask_token_id]
    drafter: Any = _drafter(checkpoint, target, backend, len(transcripts))
    quick = transcripts if len(tokens) <= len(few) else [_shortened(t, drafter.block) for t in transcripts[:2]]
    scores = []
    for token in tokens:
        drafter.design = replace(design, mask_token_id=token)
        scores.append((replay(drafter, quick).score, token))
    found = []
    for _, token in sorted(scores, reverse=True)[:2]:
        drafter.design = other = replace(design, mask_token_id=token)
        masked = replace(checkpoint, design=other)
        found.append(Measured(f"mask token {token}", "mask token", masked, replay(drafter, transcripts, longest)))
    return found


def _shortened(transcript: Transcript, drafts: int) -> Transcript:
    """The first few positions only: enough to rank candidates."""
    kept = transcript.prompt_length + drafts + 4
    return replace(transcript, tokens=transcript.tokens[:kept])


def _best(measured: Sequence[Measured], least: float) -> Measured | None:
    """The reading that works: the file's own unless another is clearly better; None if none is better than guessing."""
    if not measured:
        return None
    first, *others = measured
    best = max(measured, key=lambda m: m.acceptance.score)
    if first.reading == AS_WRITTEN and best is not first:
        gain, errors = best.acceptance.advantage(first.acceptance)
        if errors < BETTER or gain < WORTH:
            best = first
    return best if best.acceptance.score > least else None


def _measured_findings(measured: Sequence[Measured], best: Measured | None, level: Level) -> Iterator[Finding]:
    if not measured:
        return
    first = measured[0]
    if best is None:
        yield Finding(
            level,
            "target",
            f"almost no draft is accepted ({first.acceptance.score:.2f} per round) under any reading of the file, no "
            "better than guessing: it was made for another target, or it is damaged",
        )
    elif best.reading != AS_WRITTEN:
        was = f"{first.acceptance.score:.2f}" if first.reading == AS_WRITTEN else "none"
        yield Finding(
            level,
            best.about,
            f"the file says otherwise, but it works with: {best.reading} ({best.acceptance.score:.2f} accepted drafts "
            f"per round instead of {was}); {_correct_values(best.checkpoint)}",
        )


def _correct_values(checkpoint: DraftCheckpoint) -> str:
    design, layers = checkpoint.design, list(checkpoint.target_layers or ())
    parts = [f"target layers {layers}, counted from 0"]
    if isinstance(design, BlockDesign):
        parts += [
            f"sample_from_anchor {str(design.sample_from_anchor).lower()}",
            f"mask_token_id {design.mask_token_id}",
        ]
    return "correct values: " + ", ".join(parts)
