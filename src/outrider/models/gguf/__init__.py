"""GGUF files (llama.cpp, Ollama, LM Studio): the container, its block formats, and the models that are read from it."""

from outrider.models.gguf.architecture import ARCHITECTURES
from outrider.models.gguf.blocks import BlockParts
from outrider.models.gguf.config import read_config
from outrider.models.gguf.container import GGUFFile, TensorInfo, find_gguf
from outrider.models.gguf.weights import GGUFWeights, read_model

__all__ = [
    "ARCHITECTURES",
    "BlockParts",
    "GGUFFile",
    "GGUFWeights",
    "TensorInfo",
    "find_gguf",
    "read_config",
    "read_model",
]
