"""Artefacts: what a training stage makes, how it says where it came from, and what survives an interruption.

An artefact is a directory. While it is made it holds ``begun.json`` (what was asked for) and whatever the stage keeps
in order to go on; when it is finished, ``provenance.json``. Both say what it depends on, so a stage that is asked for
again goes on where it stopped, does nothing where it is finished, and refuses where something has changed since.

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

from outrider import __version__
from outrider.errors import ArtefactError, InvalidRequest
from outrider.files import read_json, read_json_lines, replace_file, resolve_model, write_json

try:
    import fcntl
except ImportError:  # not Unix: two processes on one artefact are not told apart there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Artefact",
    "Journal",
    "Work",
    "begin",
    "content_hash",
    "file_hash",
    "open_artefact",
    "read_lines",
    "settings",
    "target_hash",
    "write_lines",
    "write_state",
]

PROVENANCE, BEGUN, LOCK = "provenance.json", "begun.json", ".lock"
TARGET_FILES = ("config.json", "generation_config.json", "tokenizer.json", "*.safetensors")


# ------------------------------------------------------------------------------------------------ hashes


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, remembered for this process while its size and time do not change."""
    status = path.stat()
    return _file_hash(path.resolve(), status.st_size, status.st_mtime_ns)


def _hash_of(named: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(named):
        digest.update(f"{name}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def content_hash(folder: Path, content: Sequence[str]) -> str:
    """SHA-256 over names and bytes of an artefact's ``content``: files, and all files below directories.

    Raises ArtefactError for one that is missing.
    """
    files: list[tuple[str, Path]] = []
    for name in content:
        path = folder / name
        if not path.exists():
            raise ArtefactError(f"{folder} has lost {name}; delete the directory and make it again")
        found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        files += [(file.relative_to(folder).as_posix(), file) for file in found]
    return _hash_of(files)


def target_hash(target: str) -> str:
    """SHA-256 over a model's configuration, tokenizer and weights. Raises CheckpointError where there is none."""
    folder = resolve_model(target)
    return _hash_of((path.name, path) for pattern in TARGET_FILES for path in folder.glob(pattern))


# ------------------------------------------------------------------------------------------------ artefacts


@dataclass(frozen=True, slots=True)
class Artefact:
    """A finished stage's directory and what its provenance says."""

    folder: Path
    stage: str
    sha256: str
    target: Mapping[str, str] | None
    """``name`` and ``sha256`` of the model it was made with or for; None where it depends on none."""
    provenance: Mapping[str, Any]

    @property
    def lineage(self) -> dict[str, Any]:
        """What is known of it and of everything that it was made from, by stage; no paths, so it can be published."""
        told = ("sha256", "settings", "sources", "facts", "seconds", "versions")
        return {**self.provenance["lineage"], self.stage: {name: self.provenance[name] for name in told}}


def open_artefact(folder: str | Path, stage: str | Sequence[str] | None = None, target: str | None = None) -> Artefact:
    """A finished artefact, checked: it is of ``stage``, its files are those it was finished with, and ``target``, where
    it depends on one, is still the same.

    Raises ArtefactError.
    """
    path = Path(folder)
    wanted = (stage,) if isinstance(stage, str) else stage
    kinds = f"an artefact of `outrider train {' or '.join(wanted)}`" if wanted else "an artefact"
    if not (path / PROVENANCE).is_file():
        if (path / BEGUN).is_file():
            made = read_json(path / BEGUN)["stage"]
            raise ArtefactError(f"{path} is not finished: run `{made}` again, it goes on where it stopped")
        raise ArtefactError(f"{path} has no {PROVENANCE}: expected {kinds}")
    record = read_json(path / PROVENANCE)
    try:
        made, sha256, content = str(record["stage"]), str(record["sha256"]), list(record["content"])
    except (KeyError, TypeError):
        raise ArtefactError(f"{path / PROVENANCE} says nothing of a training stage: expected {kinds}") from None
    if wanted and made not in wanted:
        raise ArtefactError(f"{path} was made by the stage {made!r}; expected {kinds}")
    if content_hash(path, content) != sha256:
        raise ArtefactError(
            f"{path} is not what it was finished as: its files ({', '.join(content)}) were changed since. "
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
    """What decides a stage's result: its config without the fields that its class lists as ``free`` (speed only)."""
    free: frozenset[str] = getattr(type(config), "free", frozenset())
    return config.model_dump(mode="json", exclude=set(free))


class Work:
    """An artefact on its way, held by this process alone. Use as a context; see ``begin``."""

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
            self._keep_time()
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ArtefactError(
                f"cannot write to {self.folder}: {error.strerror}. What was written is intact: "
                "make room, then the same command goes on"
            ) from error

    @property
    def record(self) -> Mapping[str, Any]:
        """What provenance will say, and once finished says: stage, arguments, parents, target, facts."""
        return self._record

    def finish(self, content: Sequence[str], facts: Mapping[str, Any] | None = None) -> Artefact:
        """Hash ``content`` (names in the directory) and write ``provenance.json``, the stage's very last act."""
        self._record["seconds"] = round(self._seconds, 1)
        self._record |= {"facts": dict(facts or {}), "content": list(content)}
        self._record["sha256"] = content_hash(self.folder, content)
        write_json(self.folder / PROVENANCE, self._record)
        (self.folder / BEGUN).unlink(missing_ok=True)
        self.finished = True
        return open_artefact(self.folder)

    @property
    def _seconds(self) -> float:
        """Time spent so far, sittings that were interrupted (not killed) included."""
        return float(self._record["seconds"]) + time.monotonic() - self._began

    def _keep_time(self) -> None:
        with suppress(OSError):  # a full disk: the error under way says so
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
    """Take up a stage: new, resumed, or finished already (``work.finished``; then there is nothing to do).

    ``parents``: artefacts it reads, checked against their own provenance and against ``target``. ``sources``: hashes
    of what else it reads. Raises ArtefactError where a parent does not fit, another process is at work on the
    directory, or it was begun or finished with other arguments, parents or another target: the message names the
    first difference.
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
    path.mkdir(parents=True, exist_ok=True)
    lock = _lock(path)
    try:
        return _take_up(path, stage, record, lock)
    except BaseException:
        if lock is not None:
            lock.close()
        raise


def _take_up(path: Path, stage: str, record: dict[str, Any], lock: BinaryIO | None) -> Work:
    """What the directory holds already decides: nothing, something begun, something finished, or something else."""
    others = sorted(file.name for file in path.iterdir() if file.name not in (LOCK, BEGUN, PROVENANCE))
    if (path / PROVENANCE).is_file():
        before = read_json(path / PROVENANCE)
        _refuse_differences(path, before, record, finished=True)
        open_artefact(path, stage)
        return Work(path, before, True, lock)
    if (path / BEGUN).is_file() and others:  # with nothing made yet, nothing has to fit
        before = read_json(path / BEGUN)
        _refuse_differences(path, before, record, finished=False)
        record["seconds"] = before.get("seconds", 0.0)
    elif others:
        raise ArtefactError(f"{path} holds other files ({', '.join(others[:3])}); {stage} needs a directory of its own")
    write_json(path / BEGUN, record)
    return Work(path, record, False, lock)


def _lock(folder: Path) -> BinaryIO | None:
    """Held until it is closed, or its process ends however it ends."""
    if fcntl is None:
        return None
    file = (folder / LOCK).open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ArtefactError(f"another process is at work on {folder}; wait for it, or stop it") from None
    return file


def _refuse_differences(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], finished: bool) -> None:
    verb = "made" if finished else "begun"
    advice = "Delete the directory to make it anew, or give another one"
    if before.get("stage") != now["stage"]:
        raise ArtefactError(f"{folder} was {verb} by the stage {before.get('stage')!r}, not {now['stage']!r}. {advice}")
    for group, what in (("settings", "{}"), ("parents", "another {}"), ("sources", "another {}")):
        old, new = before.get(group) or {}, now[group]
        for name in [*new, *(n for n in old if n not in new)]:
            if old.get(name) != new.get(name):
                change = f": {_short(old.get(name))}, now {_short(new.get(name))}"
                raise ArtefactError(
                    f"{folder} was {verb} with {what.format(name)}{change if group == 'settings' else ''}. {advice}"
                )
    old_model, new_model = before.get("target"), now["target"]
    if (old_model or {}).get("sha256") != (new_model or {}).get("sha256"):
        names = [model and model["name"] for model in (old_model, new_model)]
        raise ArtefactError(
            f"{folder} was {verb} with another target: {names[0]!r} as it was then, now {names[1]!r}. {advice}"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ------------------------------------------------------------------------------------------------ files


class Journal:
    """A JSON Lines file that only grows, and loses nothing but a line that was being written when the process died.

    ``records`` are those that were there when it was opened. Appended lines reach the system at once (a killed process
    keeps them) and the disk every ``every`` seconds (a power failure costs that much).
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
        """Write lines, all of them in one go."""
        self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
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
    """A JSON Lines file, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    replace_file(path, write)


def write_state(path: Path, state: Any) -> None:
    """A resumable state (tensors in plain containers), whole or not at all; read it with ``weights_only=True``."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(state, file)

    replace_file(path, write)
