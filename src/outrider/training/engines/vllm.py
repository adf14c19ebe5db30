"""vLLM: speculators' form, or a draft model's directory; ``--speculative-config``.

Checked against vLLM 0.32: ``vllm/config/speculative.py``, ``vllm/transformers_utils/configs/speculators/algos.py``,
``vllm/model_executor/models/{qwen3_dspark,qwen3_dflash,qwen3_eagle3,llama_eagle3}.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from outrider.checkpoints import DraftCheckpoint
from outrider.files import read_json, write_json
from outrider.training.handover import DRAFTER, Handover, Source, as_json, copied, saved

__all__ = ["VLLM"]

CHECKED = (
    "The files have the form that vLLM 0.32 reads, whose CPU build has served a draft model, an EAGLE-3 and a DFlash "
    "written so; this server was not started."
)
ON_A_GPU = "vLLM runs DSpark's blocks on a GPU only (its second model runner)."
DECODERS = ("qwen3", "llama")


class VLLM:
    """Writes what ``vllm serve`` loads."""

    def write(self, source: Source, folder: Path) -> Handover:
        _check(source)
        config: dict[str, Any] = {"method": _method(source), "model": DRAFTER, "num_speculative_tokens": source.drafts}
        advice = []
        if source.checkpoint is None:
            copied(source, folder)
        else:
            # a full vocabulary is shared with the target; a reduced head, and all of EAGLE-3, has to be in the file
            own = ["head.weight"] if source.checkpoint.reduced or source.kind == "eagle3" else []
            own += ["embed.weight"] if source.kind == "eagle3" else []
            checkpoint = source.with_heads(*own)
            if config["method"] == "dspark":
                checkpoint = _with_markov_head(checkpoint)
            path = saved(source, checkpoint, folder, "speculators")
            if config["method"] == "dflash":
                _not_causal(path / "config.json")
        if source.checkpoint is not None and source.block:
            config["num_speculative_tokens"] = source.checkpoint.design.drafts
            advice.append(
                f"A block drafter: num_speculative_tokens stays {source.checkpoint.design.drafts}, its block."
            )
        if config["method"] == "dspark":
            config["draft_sample_method"] = "probabilistic"
            advice.append(ON_A_GPU)
            if getattr(source.checkpoint.design if source.checkpoint else None, "confidence", False):
                config["enable_adaptive_verification"] = True
                if source.threshold is not None:
                    advice.append(
                        "vLLM schedules by uncalibrated confidences (calibration.json is ours): where ours says 0.5, "
                        f"the head says {source.threshold:g}."
                    )
        command = ["vllm", "serve", source.served, "--speculative-config", as_json(config)]
        if source.plain_from is not None:
            command += ["--max-num-seqs", str(source.plain_from)]
            advice.append(f"From {source.plain_from} requests at once plain decoding is faster: add replicas instead.")
        if source.served.endswith(".gguf"):
            advice.append("Serve the target from its Hugging Face directory: vLLM's GGUF reader is experimental.")
        return Handover("vllm", source.kind, command, [], config, advice, CHECKED)


def _method(source: Source) -> str:
    """A block without heads whose anchor drafts is a DSpark to vLLM: in its DFlash only masks predict."""
    anchored = source.checkpoint is not None and getattr(source.checkpoint.design, "sample_from_anchor", False)
    return "dspark" if source.kind == "dflash" and anchored else source.kind


def _with_markov_head(checkpoint: DraftCheckpoint) -> DraftCheckpoint:
    """vLLM's DSpark always has a Markov head, and one of rank 0 breaks its loader: one of rank 1 that adds nothing."""
    design: Any = checkpoint.design
    if design.markov_rank:
        return checkpoint
    like = checkpoint.tensors["fc.weight"]
    sizes = {"markov.w1.weight": checkpoint.decoder["vocab_size"], "markov.w2.weight": checkpoint.draft_vocab_size}
    zeros = {name: like.new_zeros((size, 1)) for name, size in sizes.items()}
    return replace(checkpoint, design=replace(design, markov_rank=1), tensors={**checkpoint.tensors, **zeros})


def _check(source: Source) -> None:
    if source.checkpoint is None:
        if source.folder.is_file():
            raise source.without("vLLM takes a draft model as a Hugging Face directory, got a GGUF file")
        return
    if source.kind == "mtp":
        raise source.without("vLLM reads multi-token prediction from the target's own checkpoint only")
    head = getattr(source.checkpoint.design, "markov_head", "vanilla")
    if head != "vanilla":
        raise source.without(f"vLLM has the vanilla Markov head only, this one is {head}")
    kind = source.checkpoint.decoder.get("model_type")
    if source.block and kind != "qwen3":
        raise source.without(f"vLLM's blocks have Qwen3's layers, these are {kind}")
    if kind not in DECODERS:
        raise source.without(f"vLLM's {source.kind} has the layers of Qwen3 or Llama, these are {kind}")


def _not_causal(path: Path) -> None:
    """vLLM takes false here for a causal mask in every layer; speculators reads it for sliding-window layers only."""
    config = read_json(path)
    write_json(path, config | {"sliding_window_non_causal": True})
