"""Trained drafters on disk: every known format read into one ``DraftCheckpoint``, three of them written.

What differs between kinds of drafters is their ``Design``'s, which the catalogue of designs finds.
"""

from outrider.checkpoints.checkpoint import Design, DraftCheckpoint, Form, Sizes, TargetFacts
from outrider.checkpoints.directory import (
    FORMATS,
    default_format,
    load,
    load_calibration,
    read_header,
    recognise,
    save,
    tensor_names,
)

__all__ = [
    "FORMATS",
    "Design",
    "DraftCheckpoint",
    "Form",
    "Sizes",
    "TargetFacts",
    "default_format",
    "load",
    "load_calibration",
    "read_header",
    "recognise",
    "save",
    "tensor_names",
]
