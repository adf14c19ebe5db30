"""llama.cpp: a GGUF draft model as it is; a directory for llama.cpp's own converter where the drafter is trained.

https://github.com/ggml-org/llama.cpp, read in the sources that llama-cpp-python 0.3.36 is built from:
``conversion/{qwen,llama}.py``, ``src/models/{dflash,eagle3}.cpp``, ``common/{arg,speculative}.cpp``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outrider.errors import CheckpointError
from outrider.files import read_json, write_json
from outrider.models.locations import resolve_model
from outrider.training.handover import DRAFTER, Handover, Source, copied, saved

__all__ = ["LlamaCpp"]

GGUF = "drafter.gguf"
TARGET = "target"
SPEC_TYPES = {"dspark": "draft-dspark", "dflash": "draft-dspark", "eagle3": "draft-eagle3"}
BLOCK_CLASS = "DSparkDraftModel"  # whose converter reads speculators' form of all blocks, with heads or without
AUX_LAYERS = 3
CHECKED = (
    "The form follows llama.cpp's converter and loader; converter and server are llama.cpp's own and were not run by "
    "this export."
)


class LlamaCpp:
    """Writes what ``llama-server`` loads, or what its converter reads."""

    def write(self, source: Source, folder: Path) -> Handover:
        spec: list[str] = []
        advice: list[str] = []
        prepare: list[list[str]] = []
        if source.checkpoint is None:
            prepare = _target_conversion(source, advice)[1]
            if not source.folder.is_file():
                prepare.append(_convert(DRAFTER, GGUF))
            copied(source, folder)
        else:
            _check(source)
            own = ("head.weight",) if source.checkpoint.reduced else ()
            path = saved(source, source.with_heads(*own), folder, "speculators")
            if source.block:
                config = path / "config.json"
                write_json(config, read_json(config) | {"architectures": [BLOCK_CLASS]})
            where, prepare = _target_conversion(source, advice, reads=True)
            prepare.append(_convert(DRAFTER, GGUF, "--target-model-dir", where))
            spec = ["--spec-type", SPEC_TYPES[source.kind]]
            if source.threshold is not None and source.kind == "dspark":
                spec += ["--spec-draft-p-min", f"{source.threshold:g}"]
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


def _convert(folder: str, file: str, *options: str) -> list[str]:
    return ["python", "convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile", file, *options]


def _target_conversion(source: Source, advice: list[str], reads: bool = False) -> tuple[str, list[list[str]]]:
    """The target's directory, and the commands that make its GGUF file where it is none. A hub id is loaded into the
    directory first, also where the converter ``reads`` tokenizer and sizes there for the drafter."""
    commands, folder, there = [], TARGET, Path(_gguf(source.target)).is_file()
    if Path(source.served).is_dir():
        folder = source.served
    elif Path(source.served).is_file():
        if reads:
            advice.append(f"The converter reads the target's Hugging Face directory at ./{TARGET}: put it there.")
    elif reads or not there:
        commands.append(["hf", "download", source.served, "--local-dir", TARGET])
    if not there:
        commands.append(_convert(folder, _gguf(source.target)))
    return folder, commands


def _check(source: Source) -> None:
    checkpoint = source.checkpoint
    assert checkpoint is not None
    design: Any = checkpoint.design
    if source.kind not in SPEC_TYPES:
        raise source.without("llama.cpp reads multi-token prediction from the target's own GGUF file only")
    head = getattr(design, "markov_head", "vanilla")
    if head != "vanilla":
        raise source.without(f"llama.cpp has the vanilla Markov head only, this one is {head}")
    stack = checkpoint.stack(head=False)
    if source.block and not all(layer.qk_norm for layer in stack.layers):
        raise source.without("llama.cpp's blocks have Qwen3's norms of queries and keys, these have none")
    if source.kind == "eagle3":
        if len(stack.layers) != 1 or stack.layers[0].qk_norm:
            raise source.without(
                "llama.cpp's EAGLE-3 is one Llama layer; this one has norms of queries and keys, or more layers"
            )
        if len(checkpoint.target_layers or ()) != AUX_LAYERS:
            raise source.without(f"llama.cpp's EAGLE-3 reads {AUX_LAYERS} layers of the target")
        if design.norm_output or design.norm_each_before_fc:
            raise source.without("llama.cpp's EAGLE-3 has no norm of what is fed back, and none of single layers")


def _gguf(target: str) -> str:
    """The target's GGUF file, or the name under which it is expected."""
    try:
        path = resolve_model(target)
    except (CheckpointError, OSError):
        return f"{Path(target).name}.gguf"
    return str(path.resolve()) if path.is_file() else f"{path.name}.gguf"
