"""GGUF files (llama.cpp, Ollama, LM Studio): the container, its block formats, and the models that are read from it."""

from outrider.models.gguf.architecture import ARCHITECTURES, GGUFWeights, read_model
from outrider.models.gguf.blocks import BlockParts
from outrider.models.gguf.container import GGUFFile, TensorInfo, find_gguf

__all__ = ["ARCHITECTURES", "BlockParts", "GGUFFile", "GGUFWeights", "TensorInfo", "find_gguf", "read_model"]
