"""Directories and files: where the cache is, JSON read with clear errors, and files that are written whole."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outrider.errors import CheckpointError, InvalidRequest

__all__ = [
    "cache_folder",
    "new_folder",
    "read_config",
    "read_json",
    "read_json_lines",
    "replace_file",
    "write_json",
    "write_result",
]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for a file that is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{path} is not readable as JSON: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_json_lines(path: Path, expected: str = "a JSON value", holds: str = "lines") -> Iterator[tuple[int, Any]]:
    """Line number (from 1) and value of each line of a JSON Lines file, plain or gzipped (``.gz``).

    Blank lines are skipped, and UTF-8 byte order marks too, wherever files with one were joined. ``expected`` and
    ``holds`` are words for the messages: what a line should be, and what the file is read for.
    Raises InvalidRequest naming the line, or the file where it cannot be read.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):  # bytes end at \n alone: U+2028 may stand in a string
                line = raw
                while line.startswith(codecs.BOM_UTF8):
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, _parse(line, f"{path} line {number}", expected)
    except (OSError, EOFError, zlib.error) as error:  # what a damaged gzip file raises, and when
        if number:
            raise InvalidRequest(f"{path} cannot be read after line {number}: {error}") from error
        raise InvalidRequest(f"cannot read {holds} from {path}: {error}") from error


def _parse(line: bytes, where: str, expected: str) -> Any:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidRequest(f"{where} is UTF-16; expected UTF-8: save the file in that encoding")
    try:
        return json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # broken UTF-8, broken JSON, brackets thousands deep
        raise InvalidRequest(f"{where} is not JSON ({error}): expected {expected}, got {line[:60]!r}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``, with ``generation_config.json`` (empty where there is none) under ``generation_config``."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    return {**config, "generation_config": read_json(generation) if generation.exists() else {}}


def cache_folder(name: str) -> Path:
    """The folder that caches measurements and converted files of this machine: ``$XDG_CACHE_HOME/outrider/NAME``, by
    default under ``~/.cache``; a relative path there is ignored, as XDG says. It may not exist yet."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "outrider" / name


# ------------------------------------------------------------------------------------------------ writing


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees either the old file or the complete new one."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary path, then rename that file to ``path`` once it is completely on the disk.

    Raises OSError, which names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        write(temporary)
        os.fsync(handle)
        temporary.chmod(0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


def write_result(path: Path, content: bytes) -> None:
    """Write a file that a user named. Raises InvalidRequest where that fails; an earlier file then stays as it was."""
    try:
        place = path.resolve()
        if (place.is_file() or not place.exists()) and os.access(place.parent, os.W_OK):
            replace_file(place, lambda temporary: temporary.write_bytes(content))
        else:  # a pipe, a device, or a file whose directory takes no other
            path.write_bytes(content)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InvalidRequest(
            f"{path} cannot be written: {error.strerror}; free some space, or give another path"
        ) from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A directory to fill under a temporary name, which is renamed to ``path`` at the end; an exception removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes private folders
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
