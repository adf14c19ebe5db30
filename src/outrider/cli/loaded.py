"""What was loaded, in one line: model, dtype, threads, instruction set, drafter; and which dtype measured faster."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from outrider.errors import CheckpointError

if TYPE_CHECKING:
    from outrider.engine.llm import LLM

__all__ = ["describe_loaded", "dtype_hint"]

FASTER = 1.1  # ratio from which another dtype is worth a line
LARGE = 256 << 20  # bytes of float32 weights that no processor cache holds
CONTEXT = 256  # cached tokens of the pass that dtypes are compared by


def describe_loaded(llm: LLM, drafters: Iterable[str] = ()) -> str:
    """Model, dtype (of a GGUF file also its tensor types), threads, instruction set and drafter.

    ``drafters``: those that are compared, instead of the LLM's own.
    """
    names = ", ".join(drafters) or llm.drafter_name
    drafter = "no drafter" if names == "none" else f"drafter {names}"
    return f"{llm.model} {_weights(llm)}, {_engine(llm)}, {drafter}"


def dtype_hint(llm: LLM) -> str | None:
    """A dtype that ``outrider profile`` measured faster here than the one in use, by one row's pass over one token.

    Without a measurement: the expectation for float32 weights that no processor cache holds, told as such. Else None.
    """
    from outrider.backends.file_formats import FORMATS
    from outrider.backends.native import NativeStack
    from outrider.evaluation.pass_times import weight_bytes
    from outrider.models.decoder import DecoderTarget

    target = llm.target
    if not isinstance(target, DecoderTarget) or not isinstance(target.stack, NativeStack):
        return None
    used = target.stack.dtype
    seconds = _measured(llm, {used, *FORMATS})
    if used in seconds and len(seconds) > 1:
        best = min(seconds, key=lambda dtype: seconds[dtype])
        ratio = seconds[used] / seconds[best]
        if ratio < FASTER:
            return None
        return f"measured here: {best} is {ratio:.1f} x as fast as {used} (--dtype {best})"
    if used == "float32" and weight_bytes(target.stack.config, used) > LARGE:
        return (
            "int8 reads a quarter of the bytes that float32 reads, so it should be faster (expected, not measured: "
            "`outrider profile` measures): --dtype int8"
        )
    return None


def _engine(llm: LLM) -> str:
    """Threads and instruction set."""
    from outrider.backends.native import NativeStack
    from outrider.engine.cost_tables import threads

    stack = getattr(llm.target, "stack", None)
    isa = stack.core.isa if isinstance(stack, NativeStack) else "PyTorch"
    count = threads("native" if isinstance(stack, NativeStack) else "reference")
    return f"{count} {'thread' if count == 1 else 'threads'}, {isa}"


def _weights(llm: LLM) -> str:
    """The dtype of the weights: ``in int8``; of a GGUF file also its type, or what became of each of its types."""
    from outrider.backends.file_formats import BLOCKS, FILE
    from outrider.backends.native import NativeStack
    from outrider.models.gguf import GGUFFile, main_type
    from outrider.models.locations import resolve_model

    stack = getattr(llm.target, "stack", None)
    if isinstance(stack, NativeStack) and stack.dtype == FILE:
        stored = BLOCKS | {"F32": "f32", "BF16": "bf16"}
        kinds = [kind if stored.get(kind) == chosen else f"{kind} as {chosen}" for kind, chosen in stack.formats.kinds]
        return f"as its file stores it ({', '.join(kinds)})"
    dtype = stack.dtype if isinstance(stack, NativeStack) else str(llm.target.spec.dtype).removeprefix("torch.")
    with suppress(CheckpointError, OSError):
        path = resolve_model(llm.model)
        if path.is_file():
            return f"({main_type(GGUFFile(path))} file) in {dtype}"
    return f"in {dtype}"


def _measured(llm: LLM, dtypes: Iterable[str]) -> dict[str, float]:
    """Dtype -> seconds of a pass of one token in one row; of those measured on this machine."""
    from outrider.engine.cost_tables import cost_key, load_costs

    tables = {dtype: load_costs(cost_key(llm.target, dtype)) for dtype in dtypes}
    return {dtype: table.seconds(1, 1, CONTEXT) for dtype, table in tables.items() if table is not None}
