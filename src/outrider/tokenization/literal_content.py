"""Special tokens that the content of a message spells: marked before the chat template runs, text again after it.

The template's own special tokens cannot be told from a message's once the text is rendered. So every one in a message
is replaced by a mark that occurs nowhere else, and afterwards the stretches of text with marks are encoded without
looking for special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["mark_special_tokens", "split_at_marks"]

KEPT = ("role", "type")  # of a message and its parts: the template compares them


def mark_special_tokens(given: Any, special: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Messages and template variables with a mark in place of each special token, and the token of each mark; the same
    values and nothing where there is none."""
    if not special:
        return given, {}
    pattern = re.compile("|".join(map(re.escape, special)))
    if not any(pattern.search(text) for text in _texts(given)):
        return given, {}
    stem = "\ue000"
    while any(stem in text for text in _texts(given)):
        stem += "\ue000"
    marks = {f"{stem}{number}\ue001": token for number, token in enumerate(special)}
    mark_of = {token: mark for mark, token in marks.items()}
    changed = _replaced(given, lambda text: pattern.sub(lambda m: mark_of[m[0]], text))
    return changed, marks


def split_at_marks(text: str, marks: Mapping[str, str], special: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Stretches of the rendered text between the template's own special tokens: those with marks, which are spelt out
    again, and whether it is such a one; the others together with the special tokens around them."""
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text)
    find = re.compile("|".join(map(re.escape, marks)))
    ordinary = ""
    for piece in pieces:
        if find.search(piece):
            if ordinary:
                yield ordinary, False
            ordinary = ""
            yield find.sub(lambda m: marks[m[0]], piece), True
        else:
            ordinary += piece
    if ordinary:
        yield ordinary, False


def _texts(value: Any, key: str = "") -> Iterator[str]:
    """Every text in messages that may reach the prompt."""
    if isinstance(value, str):
        if key not in KEPT:
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, change: Any, key: str = "") -> Any:
    if isinstance(value, str):
        return value if key in KEPT else change(value)
    if isinstance(value, Mapping):
        return {name: _replaced(item, change, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, change) for item in value]
    return value
