"""How much memory keys and values may take when nobody says, and which dtypes a target keeps them in."""

from __future__ import annotations

from pathlib import Path

from outrider.errors import InvalidRequest
from outrider.types import PagedTarget, TargetModel

__all__ = ["available_bytes", "check_kv_dtype", "default_memory"]

SHARE = 0.5  # of what is available when an engine starts
LEAST = 64 << 20


def default_memory() -> int | None:
    """Bytes for keys and values; None where the system does not say what is available."""
    available = available_bytes()
    return None if available is None else max(LEAST, int(SHARE * available))


def check_kv_dtype(target: TargetModel, kv_dtype: str) -> None:
    """Raise InvalidRequest for a dtype in which a target does not keep keys and values."""
    if kv_dtype == "auto":
        return
    if not isinstance(target, PagedTarget):
        raise InvalidRequest(f"this target keeps keys and values in its own dtype, not as {kv_dtype!r}; use 'auto'")
    target.paged_cache(1, 1, kv_dtype=kv_dtype)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be used without swapping: the system's (Linux), or less where a control group has a limit."""
    found = [_meminfo(root / "proc/meminfo"), _left(root / "sys/fs/cgroup")]
    known = [value for value in found if value is not None]
    return min(known, default=None)


def _meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes) << 10
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _left(group: Path) -> int | None:
    """What a control group (version 2) may still take."""
    try:
        return max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return None
