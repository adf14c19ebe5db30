"""Every error a user can meet. Each message says what was got, what was expected, and what to do.

OutriderError
├── InvalidRequest       sampling values, prompts, options           (also a ValueError; HTTP 400)
├── CheckpointError      files, configs, tensors, tokenizers         (also a ValueError)
│   └── IncompatibleDrafter  a drafter that does not fit its target
├── ArtefactError        a training stage's result that does not fit, or cannot be written
├── CacheFull            no free slot, or a sequence past its capacity
└── UnknownKind          a name that no catalogue holds
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ArtefactError",
    "CacheFull",
    "CheckpointError",
    "IncompatibleDrafter",
    "InvalidRequest",
    "OutriderError",
    "UnknownKind",
    "nearest",
]


class OutriderError(Exception):
    """Base of all errors that are the input's fault, not ours."""


class InvalidRequest(OutriderError, ValueError):
    """A request that cannot be served as asked."""


class CheckpointError(OutriderError, ValueError):
    """A model directory that cannot be loaded as it is."""


class IncompatibleDrafter(CheckpointError):
    """A drafter that was made for another target."""


class ArtefactError(OutriderError):
    """A training stage whose parents, arguments or files do not fit; what was finished stays as it is."""


class CacheFull(OutriderError):
    """No slot, or no room in a slot."""


class UnknownKind(OutriderError, ValueError):
    """A name that is in no catalogue."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: the closest known one, else all of them."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(names)}"
