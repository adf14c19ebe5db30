"""From a model's name to a target, its layers, its config or its tokenizer, whichever format the files have."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.config import StackConfig
from outrider.errors import CheckpointError, InvalidRequest
from outrider.files import read_config
from outrider.models.decoder import check_finite
from outrider.models.gguf import GGUFFile, read_model
from outrider.models.gguf import read_config as read_gguf_config
from outrider.models.locations import resolve_model
from outrider.models.weights import load_dtype, reading_dtype
from outrider.registry import find, names
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import Backend, TargetModel

__all__ = [
    "QUANTISED",
    "load_backend",
    "load_layers",
    "load_target",
    "load_tokenizer",
    "load_with_tokenizer",
    "model_config",
    "runs_natively",
]

WITHOUT_FILES = ("huggingface", "toy")  # kinds that are no ``model_type``
QUANTISED = ("int8", "int4", "file")


def load_target(model: str | Path, *, dtype: str = "auto", backend: str = "auto") -> TargetModel:
    """Load a model by any name that ``resolve_model`` takes.

    ``dtype``: float32, bfloat16, float64, int8, int4, ``file`` (a GGUF file's own block formats, native core), or
    ``auto``: float32 for a directory, ``file`` for a GGUF file where the native core runs. ``backend``: a name of the
    catalogue, or ``auto``: the native core where it is built and runs this dtype, else plain PyTorch.
    Raises CheckpointError, InvalidRequest, UnknownKind.
    """
    return _load_target(_open(model), dtype, backend)


def load_with_tokenizer(
    model: str | Path, *, dtype: str = "auto", backend: str = "auto"
) -> tuple[TargetModel, Tokenizer]:
    """Both from one reading of a GGUF file's header, which takes a while. See ``load_target``, ``load_tokenizer``."""
    files = _open(model)
    return _load_target(files, dtype, backend), _load_tokenizer(files)


def _open(model: str | Path) -> Path | GGUFFile:
    """A model's directory, or its GGUF file."""
    path = resolve_model(model)
    return GGUFFile(path) if path.is_file() else path


def _load_target(path: Path | GGUFFile, dtype: str, backend: str) -> TargetModel:
    if dtype != "auto":
        load_dtype(dtype)
    if isinstance(path, GGUFFile):
        return _load_gguf(path, dtype, backend)
    dtype = "float32" if dtype == "auto" else dtype
    engine, config = load_backend(backend, dtype), model_config(path)
    target: TargetModel = find("target", _kind(path, config)).load(path, config, dtype=dtype, backend=engine)
    return target


def _load_gguf(file: GGUFFile, dtype: str, backend: str) -> TargetModel:
    if dtype == "auto":
        dtype = "file" if load_backend(backend).name == "native" else "float32"
    engine = load_backend(backend, dtype)
    config, weights = read_model(file, reading_dtype(dtype, engine))
    kind = find("target", config["model_type"])
    target: TargetModel = kind.from_weights(
        {**kind.defaults, **config}, weights, dtype=dtype, backend=engine, name=str(file.path)
    )
    return target


def load_layers(model: str | Path) -> tuple[StackConfig, Mapping[str, Tensor]] | None:
    """A model's stack, and its float32 weights by the canonical names of ``outrider.backends.layers``, each read on
    access.

    None for a model that Transformers runs. Raises CheckpointError.
    """
    path = resolve_model(model)
    if path.is_file():
        config, weights = read_model(GGUFFile(path), torch.float32)
        kind = find("target", config["model_type"])
        return kind.stack_config({**kind.defaults, **config}), weights
    config = model_config(path)
    kind = find("target", _kind(path, config))
    found: tuple[StackConfig, Mapping[str, Tensor]] | None = None
    if hasattr(kind, "layers_of"):
        found = kind.layers_of(path, config)
    return found


def model_config(model: str | Path) -> dict[str, Any]:
    """A model's Hugging Face config, its generation_config.json under ``generation_config``; a GGUF file's keys in the
    same form. Raises CheckpointError, also for a number that is NaN or infinite.
    """
    path = resolve_model(model)
    if path.is_file():
        return read_gguf_config(GGUFFile(path))
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"{path / 'config.json'} is missing, and {path} holds no GGUF file; expected a Hugging Face model "
            "directory or one with a GGUF file"
        )
    config = read_config(path)
    check_finite(config)
    return config


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model by any name that ``resolve_model`` takes. Raises CheckpointError where it has none."""
    return _load_tokenizer(_open(model))


def _load_tokenizer(files: Path | GGUFFile) -> Tokenizer:
    if isinstance(files, Path):
        return Tokenizer(files)
    from outrider.tokenization.gguf_tokenizer import read_gguf_tokenizer

    try:
        found = read_gguf_tokenizer(files.keys)
    except CheckpointError as error:
        raise CheckpointError(f"{files.path}: {error}") from None
    named = {**found.chat_templates, **({"default": found.chat_template} if found.chat_template else {})}
    templates = [{"name": name, "template": template} for name, template in named.items()]
    settings = {**found.special_tokens, "chat_template": templates}
    return Tokenizer(files.path, found.parsing, settings, found.notes)


def runs_natively(model: str | Path) -> bool:
    """Whether a model is read here, tensor by tensor, and not by Transformers. Raises CheckpointError."""
    path = resolve_model(model)
    return path.is_file() or _kind(path, model_config(path)) != "huggingface"


def _kind(path: Path, config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type")
    return kind if kind in names("target") and kind not in WITHOUT_FILES else "huggingface"


def load_backend(name: str, dtype: str = "float32") -> Backend:
    """A backend by name; ``auto`` is the native core where it is built and runs ``dtype``, else plain PyTorch."""
    if name == "auto":
        name = "native" if dtype != "float64" and _has_core() else "reference"
        if name == "reference" and dtype in QUANTISED:
            raise InvalidRequest(
                f"dtype {dtype!r} needs the native core, which is not built here; use float32 or bfloat16"
            )
    backend: Backend = find("backend", name)()
    return backend


def _has_core() -> bool:
    try:
        import_module("outrider._native")
    except ImportError:
        return False
    return True
