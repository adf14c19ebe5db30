"""Every error a user can meet. Each message says what was got, what was expected, and what to do.

OutriderError
├── InvalidRequest       sampling values, prompts, options           (also a ValueError; HTTP 400)
├── CheckpointError      files, configs, tensors, tokenizers         (also a ValueError)
│   └── IncompatibleDrafter  a drafter that does not fit its target
├── ArtefactError        a training stage's result that does not fit, or cannot be written
├── CacheFull            no free slot, or a sequence past its capacity
├── DraftsFailed         a drafter that states probabilities which are no numbers
├── RowsFailed           logits that cannot be sampled from (NaN, infinite, or every token forbidden)
└── UnknownKind          a name that no catalogue holds
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

__all__ = [
    "ArtefactError",
    "CacheFull",
    "CheckpointError",
    "DraftsFailed",
    "IncompatibleDrafter",
    "InvalidRequest",
    "OutriderError",
    "RowsFailed",
    "UnknownKind",
    "closest",
    "nearest",
    "reading_config",
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


class DraftsFailed(OutriderError):
    """A drafter states probabilities that are no numbers."""

    def __init__(self, first: Mapping[int, int]) -> None:
        """``first``: of each row concerned the first such draft."""
        self.first = dict(first)
        super().__init__(
            "the drafter's logits hold NaN or infinity, expected numbers: its weights are damaged, or its dtype is too "
            "narrow for it; check its files, or use another drafter"
        )


class RowsFailed(OutriderError):
    """Some rows of logits are no distribution: NaN, +inf, or -inf for every token."""

    def __init__(self, rows: Iterable[int]) -> None:
        """``rows`` of the logits, as they were given."""
        self.rows = sorted(rows)
        super().__init__(
            f"the logits of rows {self.rows} hold NaN or infinity, or forbid every token; expected numbers. The "
            "weights or the model's configuration are damaged, or sampling options overflow"
        )


class UnknownKind(OutriderError, ValueError):
    """A name that is in no catalogue."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: the closest known one, else all of them."""
    names = sorted(known)
    return closest(word, names).removeprefix("; ") or f"expected one of: {', '.join(names)}"


def closest(word: str, known: Iterable[str]) -> str:
    """The end of a message that lists all known words already: the closest one, where there is one."""
    close = get_close_matches(str(word), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextmanager
def reading_config(name: str = "config.json") -> Iterator[None]:
    """What a file's values of an unexpected kind raise becomes a CheckpointError: a list for a number, an object for a
    name. Keys that are often wrong are better checked by name."""
    try:
        yield
    except OutriderError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name} holds a value of another kind than is expected there ({type(error).__name__}: {error}); compare "
            "it with the one of the model's source"
        ) from error
