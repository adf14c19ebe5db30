"""Reads a drafter's directory into a ``DraftCheckpoint`` and writes one, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor

from outrider.checkpoints.checkpoint import DraftCheckpoint
from outrider.checkpoints.forms import writable
from outrider.checkpoints.packed_tensors import SCALE, dequantised, in_four_bits, quantised
from outrider.checkpoints.stack_format import file_name
from outrider.errors import CheckpointError, nearest, reading_config
from outrider.files import new_folder, read_json, write_json
from outrider.models.locations import resolve_model
from outrider.models.weights import FLOATS, TensorFiles, write_tensors
from outrider.scheduling import calibration
from outrider.scheduling.calibration import Calibration

__all__ = [
    "FORMATS",
    "Format",
    "WritableFormat",
    "default_format",
    "load",
    "load_calibration",
    "read_header",
    "recognise",
    "save",
    "tensor_names",
]

FORMATS = {  # name -> module with the functions of ``Format``
    "outrider": "outrider.checkpoints.outrider_format",
    "speculators": "outrider.checkpoints.speculators",
    "deepspec": "outrider.checkpoints.deepspec",
    "zlab": "outrider.checkpoints.zlab",
    "specforge": "outrider.checkpoints.specforge",
}
PACKED = ("I8", "U8")  # safetensors' names
IDS = ("d2t", "t2d")  # tensors that hold no weights


class Format(Protocol):
    """What a format's module provides."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this format, told by its content."""
        ...

    def read(self, config: Mapping[str, Any]) -> DraftCheckpoint:
        """A checkpoint still without tensors. Raises CheckpointError."""
        ...


class WritableFormat(Format, Protocol):
    """A format that is written too."""

    def write(self, checkpoint: DraftCheckpoint) -> dict[str, Any]:
        """The config.json of a checkpoint. Raises CheckpointError for what the format has no key for."""
        ...


def recognise(config: Mapping[str, Any]) -> str | None:
    """The format of a config.json, None where it is none of these."""
    return next((name for name in FORMATS if _format(name).matches(config)), None)


def read_header(config: Mapping[str, Any]) -> DraftCheckpoint:
    """The checkpoint a config.json describes, without tensors. Raises CheckpointError."""
    with reading_config():
        name = recognise(config)
    if name is None:
        kinds = config.get("architectures") or config.get("model_type")
        raise CheckpointError(
            f"config.json describes {kinds!r}, which is no drafter; expected one of {', '.join(sorted(FORMATS))}"
        )
    with reading_config():
        return _format(name).read(config)


def load(folder: str | Path) -> DraftCheckpoint:
    """Read a drafter's directory (or hub id), tensors in the dtype they are stored in; those in 8 or 4 bits in
    float32.

    Raises CheckpointError for a tensor that is missing, unknown, of another shape, or not finite, and for a
    calibration.json that is not readable as one.
    """
    path = resolve_model(folder)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file; expected the directory of a trained drafter "
            "(--drafter takes a GGUF file as a draft model)"
        )
    checkpoint = read_header(read_json(path / "config.json"))
    stored = _StoredTensors(path)
    with reading_config():
        shapes = checkpoint.shapes()
    in_file: dict[str, str] = {}
    for name in stored.weights():
        if (other := in_file.setdefault(_plain(name), name)) != name:
            raise CheckpointError(f"tensors {other!r} and {name!r} are the same weight; remove one of them")
    names = tensor_names(checkpoint)
    known = {file: neutral for neutral, file in names.items()}
    for plain, name in in_file.items():
        if plain not in known:
            raise CheckpointError(f"unexpected tensor {name!r}; {nearest(plain, known)}")
    tensors, four_bits = {}, {}
    for neutral, shape in shapes.items():
        file = names[neutral]
        if file not in in_file:
            if shape.required:
                raise CheckpointError(f"tensor {file!r} is missing; expected shape {list(shape.sizes)}")
            continue
        name = in_file[file]
        tensor, scales = stored.stored(name)
        if tensor.shape != shape.sizes:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(tensor.shape)}, but the config says {list(shape.sizes)}"
            )
        tensors[neutral] = tensor
        if scales is not None:
            four_bits[neutral] = scales
    checkpoint = replace(checkpoint, tensors=tensors, four_bits=four_bits, calibration=load_calibration(path))
    checkpoint.check_tensors({neutral: in_file.get(file, file) for neutral, file in names.items()})
    return checkpoint


def save(
    checkpoint: DraftCheckpoint,
    folder: str | Path,
    to: str,
    provenance: Mapping[str, Any],
    check: Callable[[Path], None] = lambda written: None,
    int8: bool = False,
) -> Path:
    """Write a directory in a format, whole or not at all: it appears under its name when it is complete.

    ``int8``: matrices in 8 bits, but for those that are in 4. Only Outrider's own format holds either; others are
    given the drafter ``in_floating_point``.

    ``check`` is shown the complete directory before that; where it raises, nothing is left behind.
    Raises CheckpointError where the folder exists, the format is not written here, or it cannot hold this drafter.
    """
    target = Path(folder)
    if target.exists():
        raise CheckpointError(f"{target} exists already; give a new directory")
    writers = [name for name in FORMATS if hasattr(_format(name), "write")]
    if to not in writers:
        raise CheckpointError(f"cannot write format {to!r}; {nearest(to, writers)}")
    if int8 and to != "outrider":
        raise CheckpointError(f"format {to!r} has no 8-bit matrices; write format 'outrider', or another precision")
    if to != "outrider":
        checkpoint = checkpoint.in_floating_point()
    config = cast(WritableFormat, _format(to)).write(checkpoint)
    names = tensor_names(checkpoint)
    tensors = {names[name]: tensor for name, tensor in checkpoint.tensors.items() if name not in checkpoint.four_bits}
    tensors = quantised(tensors) if int8 else tensors
    for name, scales in checkpoint.four_bits.items():
        tensors |= in_four_bits(names[name], checkpoint.tensors[name], scales)
    with new_folder(target) as partial:
        write_json(partial / "config.json", dict(sorted(config.items())))
        write_tensors(partial / "model.safetensors", tensors)
        write_json(partial / "provenance.json", dict(provenance))
        if checkpoint.calibration is not None:
            write_json(partial / calibration.FILE, checkpoint.calibration.to_json())
        check(partial)
    return target


def tensor_names(checkpoint: DraftCheckpoint) -> dict[str, str]:
    """Neutral name -> name in a file, for every weight the checkpoint may hold."""
    sandwich = checkpoint.stack(head=False).sandwich_norms
    names = {neutral: file_name(neutral, sandwich=sandwich) for neutral in checkpoint.shapes()}
    return checkpoint.design.file_names(names)


def default_format(checkpoint: DraftCheckpoint) -> str:
    """The format a new drafter is written in: what vLLM loads, where the design exists there and nothing is in 4 bits,
    else Outrider's own."""
    known = "speculators" in writable(checkpoint.design) and not checkpoint.four_bits
    return "speculators" if known else "outrider"


def load_calibration(folder: Path) -> Calibration | None:
    """The scaling of confidences in a drafter's directory, None where it has none. Raises CheckpointError."""
    file = folder / calibration.FILE
    return Calibration.from_json(read_json(file), str(file)) if file.exists() else None


def _plain(name: str) -> str:
    """A tensor's name without the prefixes that some exporters add."""
    name = name.removeprefix("model.")
    if name.startswith("midlayer."):
        return "layers.0." + name.removeprefix("midlayer.")
    return name.removeprefix("logit_head.")


def _format(name: str) -> Format:
    return cast(Format, import_module(FORMATS[name]))


class _StoredTensors(TensorFiles):
    """Tensors as they are stored, matrices in 8 or 4 bits with their scales as one."""

    def weights(self) -> Iterator[str]:
        """Their names, without those of scales. Raises CheckpointError for one that holds no floating point."""
        for name, dtype in self.dtypes.items():
            if name.endswith(SCALE) and self.dtypes.get(name.removesuffix(SCALE)) in PACKED:
                continue
            if dtype not in (*FLOATS, *PACKED) and _plain(name) not in IDS:
                raise CheckpointError(
                    f"tensor {name!r} is stored as {dtype}; expected one of {', '.join(FLOATS)}: give the original "
                    "weights; the drafter's dtype = int8 or int4 quantises them when it is loaded"
                )
            yield name

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A tensor, and its scales where it is in 4 bits."""
        tensor = self._whole(name)
        if self.dtypes[name] not in PACKED or _plain(name) in IDS:
            return tensor, None
        scale = self._whole(name + SCALE) if name + SCALE in self.shapes else None
        return dequantised(name, tensor, scale), scale if tensor.dtype == torch.uint8 else None

    def _whole(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return cast(Tensor, file.get_tensor(name))
