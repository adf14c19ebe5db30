"""Artefacts: the output directory of a training stage, with its provenance, resumable after an interruption.

An unfinished artefact holds ``begun.json`` (its settings and inputs) and the stage's intermediate files, a finished
one ``provenance.json``. Both record what the artefact depends on. Running a stage again resumes an unfinished artefact,
does nothing for a finished one, and raises ArtefactError if settings or inputs have changed since.

    with begin(out, "regenerate", config, parents={"prompts": prompts}, target=target) as work:
        if not work.finished:
            ...
            work.finish(["train.jsonl", "held_out.jsonl"], {"answers": 6000})
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel

from outrider.errors import ArtefactError, InvalidRequest
from outrider.files import read_json, read_json_lines, replace_file, write_json
from outrider.models.gguf import gguf_parts
from outrider.models.locations import resolve_model
from outrider.version import __version__

try:
    import fcntl
except ImportError:  # not Unix: no lock against a second process
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Artefact",
    "Journal",
    "Work",
    "begin",
    "content_hash",
    "file_hash",
    "is_finished",
    "open_artefact",
    "read_lines",
    "settings",
    "target_hash",
    "write_lines",
    "write_state",
]

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PROVENANCE, BEGUN, LOCK = "provenance.json", "begun.json", ".lock"
TARGET_FILES = ("config.json", "generation_config.json", "tokenizer.json", "*.safetensors")


# ------------------------------------------------------------------------------------------------ hashes


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, cached in this process by path, size and modification time."""
    status = path.stat()
    return _file_hash(path.resolve(), status.st_size, status.st_mtime_ns)


def _hash_of(named: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(named):
        digest.update(f"{name}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def content_hash(folder: Path, content: Sequence[str]) -> str:
    """SHA-256 over names and bytes of an artefact's ``content``: files, and all files below directories.

    Raises ArtefactError for a missing one.
    """
    files: list[tuple[str, Path]] = []
    for name in content:
        path = folder / name
        if not path.exists():
            raise ArtefactError(f"{folder} no longer has {name}; delete the directory and make it again")
        found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        files += [(file.relative_to(folder).as_posix(), file) for file in found]
    return _hash_of(files)


def target_hash(target: str) -> str:
    """SHA-256 over a model's configuration, tokenizer and weights. Raises CheckpointError where there is none."""
    path = resolve_model(target)
    if path.is_file():
        return _hash_of((part.name, part) for part in gguf_parts(path))
    return _hash_of((file.name, file) for pattern in TARGET_FILES for file in path.glob(pattern))


# ------------------------------------------------------------------------------------------------ artefacts


@dataclass(frozen=True, slots=True)
class Artefact:
    """A finished stage's directory and its provenance."""

    folder: Path
    stage: str
    sha256: str
    target: Mapping[str, str] | None
    """``name`` and ``sha256`` of the target; None for a stage that needs none."""
    provenance: Mapping[str, Any]

    @property
    def lineage(self) -> dict[str, Any]:
        """Provenance of this stage and all stages before it, by stage. Without paths, so it can be published."""
        fields = ("sha256", "settings", "sources", "facts", "seconds", "versions")
        return {**self.provenance["lineage"], self.stage: {name: self.provenance[name] for name in fields}}


def open_artefact(folder: str | Path, stage: str | Sequence[str] | None = None, target: str | None = None) -> Artefact:
    """Open a finished artefact and check it: its stage, the hash of its files, and the hash of its target's files.

    Raises ArtefactError.
    """
    path = Path(folder)
    wanted = (stage,) if isinstance(stage, str) else stage
    kinds = f"an artefact of `outrider train {' or '.join(wanted)}`" if wanted else "an artefact"
    if not (path / PROVENANCE).is_file():
        if (path / BEGUN).is_file():
            made = read_json(path / BEGUN)["stage"]
            raise ArtefactError(f"{path} is not finished: run `{made}` again, it resumes where it stopped")
        raise ArtefactError(f"{path} has no {PROVENANCE}: expected {kinds}")
    record = read_json(path / PROVENANCE)
    try:
        made, sha256, content = str(record["stage"]), str(record["sha256"]), list(record["content"])
    except (KeyError, TypeError):
        raise ArtefactError(f"{path / PROVENANCE} does not describe a training stage: expected {kinds}") from None
    if wanted and made not in wanted:
        raise ArtefactError(f"{path} was made by the stage {made!r}; expected {kinds}")
    if content_hash(path, content) != sha256:
        raise ArtefactError(
            f"{path}: its files ({', '.join(content)}) were changed since it was finished. "
            "Delete the directory and make it again"
        )
    found = Artefact(path, made, sha256, record.get("target"), record)
    if target is not None and found.target is not None and target_hash(target) != found.target["sha256"]:
        raise ArtefactError(
            f"{path} was made with the target {found.target['name']!r}, whose files differ from those of {target!r} "
            "now; use the same target, or make the stage again in a new directory"
        )
    return found


def settings(config: BaseModel) -> dict[str, Any]:
    """The settings that decide a stage's result: its config without the fields that its class lists as ``free``."""
    free: frozenset[str] = getattr(type(config), "free", frozenset())
    return config.model_dump(mode="json", exclude=set(free))


class Work:
    """An artefact in progress, locked by this process. Use as a context manager; see ``begin``."""

    def __init__(self, folder: Path, record: dict[str, Any], finished: bool, lock: BinaryIO | None) -> None:
        self.folder, self.finished = folder, finished
        self._record, self._lock = record, lock
        self._began = time.monotonic()

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            self._save_time()
        if self._lock is not None:
            self._lock.close()
        if error is not None and (reason := _disk_full(error)):
            raise _cannot_write(self.folder, reason) from error

    @property
    def record(self) -> Mapping[str, Any]:
        """The entries of provenance.json: stage, arguments, parents, target, facts."""
        return self._record

    def finish(self, content: Sequence[str], facts: Mapping[str, Any] | None = None) -> Artefact:
        """Hash ``content`` (names in the directory) and write ``provenance.json``: always the last step of a stage."""
        self._record["seconds"] = round(self._seconds, 1)
        self._record |= {"facts": dict(facts or {}), "content": list(content)}
        self._record["sha256"] = content_hash(self.folder, content)
        write_json(self.folder / PROVENANCE, self._record)
        (self.folder / BEGUN).unlink(missing_ok=True)
        self.finished = True
        return open_artefact(self.folder)

    @property
    def _seconds(self) -> float:
        """Time spent so far, including earlier runs that were interrupted (not killed)."""
        return float(self._record["seconds"]) + time.monotonic() - self._began

    def _save_time(self) -> None:
        with suppress(OSError):  # a full disk is reported by the error that is being raised
            write_json(self.folder / BEGUN, {**self._record, "seconds": round(self._seconds, 1)})


def begin(
    folder: str | Path,
    stage: str,
    config: BaseModel,
    *,
    parents: Mapping[str, str | Path | Artefact] | None = None,
    sources: Mapping[str, str] | None = None,
    target: str | None = None,
) -> Work:
    """Start or resume a stage; ``work.finished`` is true if it is finished already and there is nothing to do.

    ``parents``: artefacts that it reads; they are checked against their own provenance and against ``target``.
    ``sources``: hashes of other inputs. Raises ArtefactError where a parent does not fit, the directory cannot be one,
    another process works on it, or it was begun or finished with other settings, parents, sources or another target:
    the message names the first difference.
    """
    path = Path(folder)
    read = {name: p if isinstance(p, Artefact) else open_artefact(p) for name, p in (parents or {}).items()}
    model = None if target is None else {"name": target, "sha256": target_hash(target)}
    for name, parent in read.items():
        if model is not None and parent.target is not None and parent.target["sha256"] != model["sha256"]:
            raise ArtefactError(
                f"{stage}: the {name} in {parent.folder} belong to the target {parent.target['name']!r}, whose files "
                f"differ from those of {target!r} now; use the same target, or make them again in a new directory"
            )
    record: dict[str, Any] = {
        "stage": stage,
        "versions": {"outrider": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "arguments": config.model_dump(mode="json"),
        "settings": settings(config),
        "parents": {name: parent.sha256 for name, parent in read.items()},
        "sources": dict(sources or {}),
        "target": model,
        "lineage": {stage: facts for parent in read.values() for stage, facts in parent.lineage.items()},
        "seconds": 0.0,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((p for p in (path, *path.parents) if p.is_file()), path)
        raise ArtefactError(f"{file} is a file; {stage} needs a directory of its own, give another one") from None
    lock = _lock(path)
    try:
        return _resume_or_start(path, stage, record, lock)
    except BaseException as error:
        if lock is not None:
            lock.close()
        if reason := _disk_full(error):
            raise _cannot_write(path, reason) from error
        raise


def _disk_full(error: BaseException) -> str | None:
    """What the system said where the disk is full."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number in DISK_FULL else None


def _cannot_write(folder: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"cannot write to {folder}: {reason}. The files written so far are intact: "
        "free disk space and run the same command again"
    )


def _resume_or_start(path: Path, stage: str, record: dict[str, Any], lock: BinaryIO | None) -> Work:
    """Depending on the directory: finished, begun, empty, or with files of something else (an error)."""
    others = _others(path)
    if (path / PROVENANCE).is_file():
        before = read_json(path / PROVENANCE)
        _refuse_differences(path, before, record, finished=True)
        open_artefact(path, stage)
        return Work(path, before, True, lock)
    if (path / BEGUN).is_file() and others:  # with no output yet, other settings are fine
        before = read_json(path / BEGUN)
        _refuse_differences(path, before, record, finished=False)
        record["seconds"] = before.get("seconds", 0.0)
    elif others:
        raise ArtefactError(f"{path} holds other files ({', '.join(others[:3])}); {stage} needs a directory of its own")
    write_json(path / BEGUN, record)
    return Work(path, record, False, lock)


def _others(path: Path) -> list[str]:
    """Names in a stage's directory, without its records, and what a killed process left while it wrote those."""
    names = sorted(file.name for file in path.iterdir() if file.name not in (LOCK, BEGUN, PROVENANCE))
    return [name for name in names if not name.startswith((f".{BEGUN}.", f".{PROVENANCE}."))]


def _lock(folder: Path) -> BinaryIO | None:
    """Held until it is closed or its process ends."""
    if fcntl is None:
        return None
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ArtefactError(f"another process works on {folder}; wait for it, or stop it") from None
    return file


def is_finished(
    folder: Path,
    stage: str,
    config: BaseModel,
    *,
    target: str | None,
    parents: Mapping[str, Path] | None = None,
    sources: Mapping[str, str] | None = None,
) -> bool:
    """Whether a stage is finished, read from its records without hashing its files or locking it.

    ``parents``: the directories it reads; only finished ones are compared. ``sources``: as for ``begin``; None: they
    are not compared. Raises ArtefactError, as ``begin`` does, where the directory was begun or finished with other
    settings, parents, sources or another target.
    """
    finished = (folder / PROVENANCE).is_file()
    begun = (folder / BEGUN).is_file() and bool(_others(folder))
    if not finished and not begun:
        return False
    before = read_json(folder / (PROVENANCE if finished else BEGUN))
    now: dict[str, Any] = {"stage": stage, "settings": settings(config)}
    ready = {role: path / PROVENANCE for role, path in (parents or {}).items() if (path / PROVENANCE).is_file()}
    if parents is not None and len(ready) == len(parents):
        now["parents"] = {role: read_json(path)["sha256"] for role, path in ready.items()}
    if sources is not None:
        now["sources"] = dict(sources)
    if before.get("target") is not None and target is not None:
        now["target"] = {"name": target, "sha256": target_hash(target)}
    _refuse_differences(folder, before, now, finished)
    return finished


def _refuse_differences(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], finished: bool) -> None:
    """Raise ArtefactError for the first difference in stage, settings, parents, sources or target. Only what ``now``
    contains is compared."""
    verb = "made" if finished else "begun"
    advice = "Delete the directory to make it again, or give another one"
    if before.get("stage") != now["stage"]:
        raise ArtefactError(f"{folder} was {verb} by the stage {before.get('stage')!r}, not {now['stage']!r}. {advice}")
    for group, what in (("settings", "{}"), ("parents", "another {}"), ("sources", "another {}")):
        if group not in now:
            continue
        old, new = before.get(group) or {}, now[group]
        for name in [*new, *(n for n in old if n not in new)]:
            if old.get(name) != new.get(name):
                change = f": {_short(old.get(name))}, now {_short(new.get(name))}"
                raise ArtefactError(
                    f"{folder} was {verb} with {what.format(name)}{change if group == 'settings' else ''}. {advice}"
                )
    if "target" not in now:
        return
    old_model, new_model = before.get("target"), now["target"]
    if (old_model or {}).get("sha256") != (new_model or {}).get("sha256"):
        names = [model and model["name"] for model in (old_model, new_model)]
        raise ArtefactError(
            f"{folder} was {verb} with another target: {names[0]!r} with other files, now {names[1]!r}. {advice}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------ files


class Journal:
    """An append-only JSON Lines file that survives kills: at most the line being written is lost.

    ``records``: those present when it was opened. Appended lines are flushed to the system at once (they survive a
    killed process) and to the disk every ``every`` seconds (a power failure loses at most these).
    """

    def __init__(self, path: Path, every: float = 5.0) -> None:
        self.path, self.records = path, []
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n"):
                        break
                    self.records.append(json.loads(line))
                except ValueError:
                    break
                whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)  # a last line cut short by a kill or a full disk
        self._every, self._synced = every, time.monotonic()

    records: list[dict[str, Any]]

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write lines with a single call."""
        self._file.write("".join(map(_json_line, records)).encode())
        self._file.flush()
        if time.monotonic() - self._synced >= self._every:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                self._file.flush()
                self._sync()
        finally:
            self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file of an artefact. Raises ArtefactError naming the line."""
    try:
        for _, record in read_json_lines(path):
            yield record
    except InvalidRequest as error:
        raise ArtefactError(f"{error}; delete the artefact and make it again") from None


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON Lines file atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_json_line, records))

    replace_file(path, write)


def _json_line(record: Mapping[str, Any]) -> str:
    """One line; lone surrogates, which UTF-8 cannot hold, are escaped as JSON can."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(record)
    return line + "\n"


def write_state(path: Path, state: Any) -> None:
    """Write a resumable state (tensors in plain containers) atomically; read it with ``weights_only=True``."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(state, file)

    replace_file(path, write)
