"""vLLM: speculators' form, or a draft model's directory; ``--speculative-config``.

https://docs.vllm.ai, ``vllm/config/speculative.py`` and ``vllm/transformers_utils/configs/speculators``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outrider.training.handover import DRAFTER, Handover, Source, as_json, copied, saved

__all__ = ["VLLM"]

CHECKED = (
    "The files have the form of speculators 0.9.0, as its published checkpoints have it; the server was not started."
)


class VLLM:
    """Writes what ``vllm serve`` loads."""

    def write(self, source: Source, folder: Path) -> Handover:
        config: dict[str, Any] = {"method": source.kind, "model": DRAFTER, "num_speculative_tokens": source.drafts}
        advice = []
        if source.checkpoint is None:
            if source.folder.is_file():
                raise source.without("vLLM takes a draft model as a Hugging Face directory, got a GGUF file")
            copied(source, folder)
        else:
            # a full vocabulary is shared with the target; a reduced head, and all of EAGLE-3, has to be in the file
            own = ["head.weight"] if source.checkpoint.reduced or source.kind == "eagle3" else []
            own += ["embed.weight"] if source.kind == "eagle3" else []
            saved(source, source.with_heads(*own), folder, "speculators")
        if source.checkpoint is not None and source.block:
            config["num_speculative_tokens"] = source.checkpoint.design.drafts
            advice.append(
                f"A block drafter: num_speculative_tokens stays {source.checkpoint.design.drafts}, its block."
            )
        if source.kind == "dspark":
            config["draft_sample_method"] = "probabilistic"
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
