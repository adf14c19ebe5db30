"""Write a Hugging Face directory of Llama or Qwen3 shape as one GGUF file for llama.cpp, with the ``gguf`` package.

python benchmarks/gguf_file.py embedded out.gguf --dtype int8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from outrider.files import read_config, read_json
from outrider.models.decoder import PARTS
from outrider.models.locations import resolve_model
from outrider.models.random import RandomWeights, Shape
from outrider.models.weights import TensorFiles

__all__ = ["TYPES", "write_gguf", "write_random_gguf"]

Type = gguf.GGMLQuantizationType
TYPES = {"float32": Type.F32, "float16": Type.F16, "bfloat16": Type.BF16, "int8": Type.Q8_0, "int4": Type.Q4_0}
"""llama.cpp's type of the same precision class."""
FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "int8": 7, "int4": 2}

NAMES = {
    "input_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
TOPS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def write_gguf(model: str | Path, path: Path, dtype: str) -> Path:
    """Write ``model`` with its matrices in ``TYPES[dtype]``; norms stay float32. Llama and Qwen3 shapes only."""
    folder = resolve_model(model)
    config = read_config(folder)
    kind = config["model_type"]
    if kind not in ("llama", "qwen3"):
        raise SystemExit(f"{model} is a {kind}; only llama and qwen3 are written as GGUF here")
    writer = gguf.GGUFWriter(path, kind)
    _add_shape(writer, config)
    writer.add_file_type(FILE_TYPES[dtype])
    _add_tokenizer(writer, folder, config)
    files = TensorFiles(folder)
    for name in files.shapes:
        target = _name(name)
        if target is not None and not (target == "output.weight" and config.get("tie_word_embeddings")):
            tensor = files.read(name, torch.float32)
            if kind == "llama" and (".attn_q." in target or ".attn_k." in target):
                heads = config["num_attention_heads" if ".attn_q." in target else "num_key_value_heads"]
                tensor = _interleaved(tensor, heads)
            _add(writer, target, tensor, dtype)
    return _finish(writer, path)


def write_random_gguf(shape: Shape, path: Path, dtype: str) -> Path:
    """A Llama of random weights, for timing."""
    writer = gguf.GGUFWriter(path, "llama")
    config = {
        "max_position_embeddings": 8192,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "vocab_size": shape.vocab_size,
    }
    _add_shape(writer, config)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in RandomWeights(shape.stack_config(), shape.tied).items():
        _add(writer, _name(_hugging_face(name)) or name, tensor, dtype)
    return _finish(writer, path)


def _hugging_face(name: str) -> str:
    tops = {
        "embed.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
    }
    if name in tops:
        return tops[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{next(theirs for theirs, ours in PARTS.items() if ours == part)}.{kind}"


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """A byte-level BPE under the pre-tokenizer that llama.cpp calls qwen2. Comparisons pass token ids anyway."""
    tokenizer = read_json(folder / "tokenizer.json")
    ids = dict(tokenizer["model"]["vocab"])
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids |= special
    words = {number: word for word, number in ids.items()}
    count = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words.get(i, f"[unused {i}]") for i in range(count)])
    control, unused, normal = gguf.TokenType.CONTROL, gguf.TokenType.UNUSED, gguf.TokenType.NORMAL
    kinds = [control if words.get(i) in special else normal if i in words else unused for i in range(count)]
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    end = config.get("eos_token_id")
    if end is not None:
        writer.add_eos_token_id(end[0] if isinstance(end, list) else end)
    writer.add_add_bos_token(False)


def _name(name: str) -> str | None:
    """Hugging Face's tensor name to llama.cpp's; None for a tensor that GGUF does not store."""
    parts = name.removeprefix("model.").split(".")
    if parts[0] in TOPS:
        return f"{TOPS[parts[0]]}.weight"
    if parts[0] != "layers":
        return None
    return f"blk.{parts[1]}.{NAMES[PARTS['.'.join(parts[2:-1])]]}.{parts[-1]}"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rotary layout of llama.cpp's llama architecture: adjacent pairs, where Transformers pairs the two halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, dtype: str) -> None:
    data: np.ndarray = tensor.numpy()
    kind = TYPES[dtype] if data.ndim == 2 else Type.F32
    writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, or 'embedded'")
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=sorted(TYPES), default="bfloat16")
    options = parser.parse_args()
    write_gguf(options.model, options.file, options.dtype)
    print(json.dumps({"file": str(options.file), "bytes": options.file.stat().st_size}))


if __name__ == "__main__":
    main()
