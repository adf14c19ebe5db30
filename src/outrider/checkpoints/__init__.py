"""Trained drafters on disk: everybody's formats read into one ``DraftCheckpoint``, two of them written."""

from outrider.checkpoints.draft import BlockDesign, ChainDesign, DraftCheckpoint, ModuleDesign, TargetFacts
from outrider.checkpoints.files import FORMATS, load, load_calibration, read_header, recognise, save, tensor_names

__all__ = [
    "FORMATS",
    "BlockDesign",
    "ChainDesign",
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
