"""A GGUF file's weights as a Hugging Face directory in float32, for engines that read no GGUF.

python benchmarks/dequantised.py smollm2 OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from outrider.models.gguf import GGUFFile, read_model
from outrider.models.locations import resolve_model
from outrider.models.weights import write_tensors
from outrider.registry import find

__all__ = ["write_dequantised"]


def write_dequantised(model: str, folder: Path) -> Path:
    """Write config.json and model.safetensors. Transformers loads the directory; there is no tokenizer in it."""
    config, weights = read_model(GGUFFile(resolve_model(model)), torch.float32)
    names = find("target", config["model_type"]).tensor_names(config)
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in config.items() if key != "generation_config"}
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}
    config["architectures"] = [f"{kind[config['model_type']]}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tensors(folder / "model.safetensors", {names.original(name): weights[name] for name in weights})
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, a hub id of one, or 'smollm2'")
    parser.add_argument("folder", metavar="OUT", type=Path, help="the directory to write")
    write_dequantised(**vars(parser.parse_args()))
