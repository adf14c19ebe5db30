"""Directories and files: where the cache is, JSON read with clear errors, and files that are written whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outrider.errors import CheckpointError

__all__ = [
    "cache_folder",
    "new_folder",
    "read_config",
    "read_json",
    "replace_file",
    "write_json",
]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file that is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``, with ``generation_config.json`` (empty where there is none) under ``generation_config``."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    return {**config, "generation_config": read_json(generation) if generation.exists() else {}}


def cache_folder(name: str) -> Path:
    """Where what was measured or made once on this machine is kept: ``$XDG_CACHE_HOME/outrider/NAME``, by default
    under ``~/.cache``. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider" / name


# ------------------------------------------------------------------------------------------------ writing


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under a temporary name, and give it its own when it is on the disk, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        write(temporary)
        os.fsync(handle)
        temporary.chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A directory that is filled under a temporary name and gets its own when it is complete; where filling it raises,
    nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes private folders
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
