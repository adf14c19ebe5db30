"""GGUF files (llama.cpp, Ollama, LM Studio): the container, its block formats, and the models that are read from it."""

from outrider.models.gguf.architecture import ARCHITECTURES
from outrider.models.gguf.blocks import BlockParts
from outrider.models.gguf.container import GGUFFile, TensorInfo, find_gguf, gguf_parts
from outrider.models.gguf.gguf_config import read_config
from outrider.models.gguf.gguf_weights import GGUFWeights, main_type, read_model

__all__ = [
    "ARCHITECTURES",
    "BlockParts",
    "GGUFFile",
    "GGUFWeights",
    "TensorInfo",
    "find_gguf",
    "gguf_parts",
    "main_type",
    "read_config",
    "read_model",
]
