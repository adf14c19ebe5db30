"""Targets: one file for each kind of model, and the function that picks the right one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from outrider.config import StackConfig
from outrider.errors import CheckpointError, InvalidRequest
from outrider.files import read_config, resolve_model
from outrider.models.weights import load_dtype
from outrider.registry import find, names
from outrider.types import Backend, TargetModel

__all__ = ["load_backend", "load_layers", "load_target"]

WITHOUT_FILES = ("huggingface", "toy")  # kinds that are no ``model_type``
QUANTISED = ("int8", "int4")


def load_target(model: str | Path, *, dtype: str = "auto", backend: str = "auto") -> TargetModel:
    """Load a model: a local directory, ``embedded``, ``embedded-draft`` or a hub id.

    ``dtype``: float32 (``auto``), bfloat16, float64, int8 or int4. ``backend``: a name of the catalogue, or ``auto``:
    the native core where it is built and runs this dtype, else plain PyTorch.
    Raises CheckpointError, InvalidRequest, UnknownKind.
    """
    dtype = "float32" if dtype == "auto" else dtype
    load_dtype(dtype)
    engine = load_backend(backend, dtype)
    path = resolve_model(model)
    config = read_config(path)
    target: TargetModel = find("target", _kind(path, config)).load(path, config, dtype=dtype, backend=engine)
    return target


def load_layers(model: str | Path) -> tuple[StackConfig, Mapping[str, Tensor]] | None:
    """A model's stack and its weights by the canonical names of ``outrider.backends.layers``, read when they are asked for.

    None for a model that Transformers runs. Raises CheckpointError.
    """
    path = resolve_model(model)
    config = read_config(path)
    kind = find("target", _kind(path, config))
    found: tuple[StackConfig, Mapping[str, Tensor]] | None = None
    if hasattr(kind, "layers_of"):
        found = kind.layers_of(path, config)
    return found


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
