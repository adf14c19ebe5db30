"""Trained drafters on disk: everybody's formats read into one ``DraftCheckpoint``, two of them written."""

from outrider.checkpoints.checkpoint import (
    AutoregressiveDesign,
    BlockDesign,
    DraftCheckpoint,
    ModuleDesign,
    TargetFacts,
)
from outrider.checkpoints.directory import FORMATS, load, load_calibration, read_header, recognise, save, tensor_names

__all__ = [
    "FORMATS",
    "AutoregressiveDesign",
    "BlockDesign",
    "DraftCheckpoint",
    "ModuleDesign",
    "TargetFacts",
    "load",
    "load_calibration",
    "read_header",
    "recognise",
    "save",
    "tensor_names",
]
