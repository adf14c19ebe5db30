"""llama.cpp: a GGUF draft model as it is; a directory for llama.cpp's own converter where the drafter is trained.

https://github.com/ggml-org/llama.cpp, ``docs/speculative.md``; DSpark since pull request 25173, in speculators' form
since 26275.
"""

from __future__ import annotations

from pathlib import Path

from outrider.errors import CheckpointError
from outrider.models.locations import resolve_model
from outrider.training.handover import DRAFTER, Handover, Source, copied, saved

__all__ = ["LlamaCpp"]

GGUF = "drafter.gguf"
SPEC_TYPES = {"dspark": "draft-dspark", "dflash": "draft-dflash", "eagle3": "draft-eagle3"}
CHECKED = "The converter and the server are llama.cpp's own and were not run by this export."


class LlamaCpp:
    """Writes what ``llama-server`` loads, or what its converter reads."""

    def write(self, source: Source, folder: Path) -> Handover:
        spec: list[str] = []
        advice: list[str] = []
        prepare: list[list[str]] = []
        convert = ["python", "convert_hf_to_gguf.py", DRAFTER, "--outtype", "bf16", "--outfile", GGUF]
        if source.checkpoint is None:
            if not source.folder.is_file():
                prepare = [convert]
            copied(source, folder)
        else:
            if source.kind not in SPEC_TYPES:
                raise source.without("llama.cpp reads multi-token prediction from the target's own GGUF file only")
            head = getattr(source.checkpoint.design, "markov_head", "vanilla")
            if head != "vanilla":
                raise source.without(f"llama.cpp has the vanilla Markov head only, this one is {head}")
            own = ("head.weight",) if source.checkpoint.reduced else ()
            saved(source, source.with_heads(*own), folder, "speculators")
            prepare = [[*convert, "--target-model-dir", source.served]]
            spec = ["--spec-type", SPEC_TYPES[source.kind]]
            if source.threshold is not None and source.kind == "dspark":
                spec += ["--spec-draft-conf-min", f"{source.threshold:g}"]
                advice.append(
                    f"Calibrated confidence 0.5 is {source.threshold:g} of the head's own, at the first position."
                )
        drafts = source.drafts
        if source.checkpoint is not None and source.block:
            drafts = source.checkpoint.design.drafts
            advice.append(f"A block drafter: --spec-draft-n-max is its block's {drafts}.")
        if prepare:
            advice.append("convert_hf_to_gguf.py is in llama.cpp's sources; run this where they are, or give its path.")
        command = ["llama-server", "-m", _gguf(source.target), "-md", GGUF, *spec, "--spec-draft-n-max", str(drafts)]
        return Handover("llama.cpp", source.kind, command, prepare, None, advice, CHECKED)


def _gguf(target: str) -> str:
    """The target's GGUF file, or the name under which it is expected."""
    try:
        path = resolve_model(target)
    except (CheckpointError, OSError):
        return f"{Path(target).name}.gguf"
    return str(path.resolve()) if path.is_file() else f"{path.name}.gguf"
