"""SGLang: DeepSpec's form for DSpark, z-lab's for DFlash, SpecForge's for EAGLE-3, a directory for a draft model.

Checked against the code of sglang 0.5.23: ``srt/models/{llama_eagle3,dflash,dspark}.py``, ``srt/arg_groups/
speculative_hook.py``, ``srt/speculative/{dflash_utils,standalone_worker_v2}.py``. Its loaders leave out a tensor that
they do not know, without a word, so what they do not know is refused here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from outrider.checkpoints import DraftCheckpoint, tensor_names
from outrider.files import read_json, write_json
from outrider.models.weights import write_tensors
from outrider.training.handover import DRAFTER, FORM_FILE, Handover, Source, copied, saved

__all__ = ["SGLang"]

CHECKED = "Names, shapes and keys were compared with the loaders of sglang 0.5.23; the server was not started."


class SGLang:
    """Writes what ``sglang.launch_server`` loads."""

    def write(self, source: Source, folder: Path) -> Handover:
        options: list[str] = []
        advice: list[str] = []
        if source.kind == "draft_model":
            if source.folder.is_file():
                raise source.without("SGLang takes a draft model as a Hugging Face directory, got a GGUF file")
            _same_vocabulary(source)
            copied(source, folder)
            algorithm, options = "STANDALONE", _steps(source.drafts)
        elif source.kind == "eagle3":
            _eagle3(source, folder)
            algorithm, options = "EAGLE3", _steps(source.drafts)
        elif source.kind == "dspark":
            _dspark(source, folder)
            algorithm = "DSPARK"
            advice.append("A block drafter: its config says how many tokens it drafts.")
        elif source.kind == "dflash":
            _dflash(source, folder)
            algorithm = "DFLASH"
            # Always the block's own: a shorter one is a block that the drafter has not been trained on.
            options = ["--speculative-dflash-block-size", str(_design(source).block_size)]
        else:
            raise source.without("SGLang reads multi-token prediction from the target's own checkpoint only")
        command = ["python", "-m", "sglang.launch_server", "--model-path", source.served]
        command += ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", DRAFTER, *options]
        if source.plain_from is not None:
            command += ["--max-running-requests", str(source.plain_from)]
            advice.append(f"From {source.plain_from} requests at once plain decoding is faster: add replicas instead.")
        return Handover("sglang", source.kind, command, [], None, advice, CHECKED)


def _same_vocabulary(source: Source) -> None:
    """STANDALONE compares the sizes and the tokenizers of the two models when it starts."""
    files = [folder / "config.json" for folder in (source.folder, Path(source.served))]
    sizes = [read_json(file).get("vocab_size") for file in files if file.is_file()]
    if len(set(sizes)) > 1:
        raise source.without(
            f"SGLang's STANDALONE wants the target's vocabulary, got a draft model of {sizes[0]} tokens and a target "
            f"of {sizes[1]}"
        )


def _design(source: Source) -> Any:
    assert source.checkpoint is not None
    return source.checkpoint.design


def _steps(drafts: int) -> list[str]:
    """A chain, not a tree; SGLang counts the last token of the row among those that are verified."""
    return [
        "--speculative-num-steps", str(drafts), "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", str(drafts + 1),
    ]  # fmt: skip


def _write(folder: Path, config: dict[str, Any], checkpoint: DraftCheckpoint, rename: dict[str, str]) -> None:
    """``rename``: beginnings of file names."""
    names = tensor_names(checkpoint)
    (folder / DRAFTER).mkdir()
    write_json(folder / DRAFTER / "config.json", dict(sorted(config.items())))
    tensors = {}
    for neutral, tensor in checkpoint.tensors.items():
        name = names[neutral]
        for old, new in rename.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        tensors[name] = tensor
    write_tensors(folder / DRAFTER / FORM_FILE, tensors)


def _block(source: Source) -> DraftCheckpoint:
    """DSPARK and DFLASH have the same layers: Qwen3's, with full attention within a block."""
    checkpoint = source.checkpoint
    assert checkpoint is not None
    stack = checkpoint.stack(head=False)
    if checkpoint.decoder.get("model_type") != "qwen3" or not all(layer.qk_norm for layer in stack.layers):
        raise source.without("SGLang's blocks have Qwen3's layers, with norms of queries and keys")
    if any(layer.window is not None for layer in stack.layers):
        raise source.without(
            "in SGLang a block's layers with a sliding window attend causally, in this drafter they do not"
        )
    return checkpoint


def _dspark(source: Source, folder: Path) -> None:
    """DeepSpec's files; embedding and head in them are not read, the target's are."""
    if not _block(source).design.markov_rank:  # type: ignore[attr-defined]
        raise source.without("SGLang's DSPARK needs a Markov head; without one it is a DFlash")
    saved(source, source.with_heads("embed.weight", "head.weight"), folder, "deepspec")


def _eagle3(source: Source, folder: Path) -> None:
    """SpecForge's ``LlamaForCausalLMEagle3``: one Llama layer, the target's embedding, a head of its own."""
    checkpoint = source.with_heads("head.weight")
    design: Any = checkpoint.design
    stack = checkpoint.stack(head=False)
    if len(stack.layers) != 1 or stack.layers[0].qk_norm:
        raise source.without(
            "SGLang's EAGLE-3 is one Llama layer; this one has norms of queries and keys, or more layers"
        )
    if design.norm_before_residual or design.norm_before_fc or design.norm_output:
        raise source.without(
            "SGLang's EAGLE-3 has no norm before the residual, and in most versions none before fc or of what is fed "
            "back"
        )
    if not checkpoint.frozen_embedding:
        raise source.without("SGLang's EAGLE-3 takes the target's embedding, and this drafter has trained its own")
    if checkpoint.target_layers is None:
        raise source.without("it names no layers of the target")
    config = {
        **checkpoint.decoder,
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": checkpoint.draft_vocab_size,
        "tie_word_embeddings": False,  # else the head would be the embedding
        "fc_norm": design.norm_each_before_fc,
        "eagle_config": {  # outputs of layers, from 0: SGLang itself adds one
            "eagle_aux_hidden_state_layer_ids": list(checkpoint.target_layers),
            "use_aux_hidden_state": True,
        },
    }
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "embed.weight"}

    _write(folder, config, replace(checkpoint, tensors=kept), {"layers.0.": "midlayer."})


def _dflash(source: Source, folder: Path) -> None:
    """z-lab's files: only masks predict, embedding and head are the target's."""
    checkpoint = _block(source)
    design: Any = checkpoint.design
    if design.sample_from_anchor:
        raise source.without(
            "in SGLang's DFLASH only masks predict, in this one the anchor's slot does too; train it with "
            "sample_from_anchor = false, or use vLLM, which loads it as a DSpark without heads"
        )
    if checkpoint.reduced:
        raise source.without("SGLang's DFLASH drafts with the target's whole head; this one has a reduced vocabulary")
    if checkpoint.target_layers is None or checkpoint.target.num_layers is None:
        raise source.without("it does not say which layers of the target it reads")
    config = {
        **checkpoint.decoder,
        "architectures": ["DFlashDraftModel"],
        "block_size": design.block_size,
        "num_target_layers": checkpoint.target.num_layers,
        "dflash_config": {
            "mask_token_id": design.mask_token_id,
            "target_layer_ids": list(checkpoint.target_layers),
        },
    }
    kept = {n: t for n, t in checkpoint.tensors.items() if n not in ("embed.weight", "head.weight")}

    _write(folder, config, replace(checkpoint, tensors=kept), {})
