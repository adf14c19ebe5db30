"""The forms that the designs of the catalogue have in each file format."""

from __future__ import annotations

from outrider import registry
from outrider.checkpoints.checkpoint import Design, Form
from outrider.errors import CheckpointError

__all__ = ["form_to_write", "forms", "writable"]


def forms(format: str) -> dict[str, Form]:
    """Every form in one format, by its tag."""
    found: dict[str, Form] = {}
    for name in registry.names("design"):
        design: type[Design] = registry.find("design", name)
        found |= {form.tag: form for form in design.forms().get(format, ())}
    return found


def form_to_write(format: str, design: Design) -> Form:
    """The form in which a format holds a design. Raises CheckpointError where it holds none."""
    for form in design.forms().get(format, ()):
        if form.write is not None and form.holds(design):
            return form
    others = ", ".join((*writable(design), "outrider"))
    raise CheckpointError(
        f"{format} files cannot hold a drafter of kind {design.kind!r}; it can be written as: {others}"
    )


def writable(design: Design) -> list[str]:
    """The formats beside Outrider's own in which a design can be written."""
    return sorted(name for name, found in design.forms().items() if any(form.write is not None for form in found))
