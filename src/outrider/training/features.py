"""Stage ``features``: cache the target's features of its answers on disk. Optional.

By default training runs the target itself. The cache pays when the same answers are used for many epochs and the disk
is faster than the target. It takes D + F numbers a token (D model width, F feature width); the estimate shows the size.
Logits are not stored: the target's head
recomputes them from the last hidden state at the positions that a loss needs (DSpark paper, section 5.1).

Files: ``train-00000.safetensors``, ... with ``features`` [N, F] and ``hidden`` [N, D] (after the final norm) of
consecutive texts, and ``index.json`` with the file and offset of each text. Files are written atomically, so a killed
stage resumes after the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.files import read_json, write_json
from outrider.models.weights import write_tensors
from outrider.training.artefact import Artefact, begin, open_artefact
from outrider.training.dataset import Text, pack, read_texts
from outrider.training.networks.batch import FeatureBatch, TrainableDrafter
from outrider.training.progress import Progress
from outrider.types import RaggedBatch, TargetModel

__all__ = ["CachedFeatures", "Config", "features"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Config(BaseModel):
    """What is cached, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    layers: tuple[int, ...] = Field(min_length=1)
    """The target's layers that the drafter reads, counted from 0."""
    length: int = Field(512, ge=4)
    """Tokens of a text, prompt included, as for ``run``."""
    keep: Literal["float32", "bfloat16"] = "bfloat16"
    """bfloat16 takes half the disk space and rounds the features; float32 does not."""
    dtype: str = "auto"
    """Precision of the target."""
    part_texts: int = Field(256, ge=1)
    """Texts per file."""


def features(config: Config, answers: Path, out: Path, target: str, *, console: Console | None = None) -> Artefact:
    """Run the target over an artefact of answers, resuming an interrupted run.

    Raises ArtefactError for answers that do not fit; InvalidRequest for a layer that cannot be auxiliary, or a target
    that does not return its last hidden state.
    """
    parent = open_artefact(answers, "regenerate", target)
    with begin(out, "features", config, parents={"answers": parent}, target=target) as work:
        if not work.finished:
            llm = LLM(target, "none", dtype=config.dtype)
            vocab, length = llm.target.spec.vocab_size, min(config.length, llm.target.spec.max_positions)
            texts = read_texts(answers / "train.jsonl", length=length, vocab_size=vocab)
            parts = [texts[i : i + config.part_texts] for i in range(0, len(texts), config.part_texts)]
            names = [f"train-{number:05d}.safetensors" for number in range(len(parts))]
            done = sum(len(part) for part, name in zip(parts, names, strict=True) if (out / name).exists())
            with Progress(console, "features, texts", len(texts), done) as progress:
                for part, name in zip(parts, names, strict=True):
                    if not (out / name).exists():
                        read = list(_read(llm.target, part, config))
                        tensors = {key: torch.cat([one[key] for one in read]) for key in read[0]}
                        write_tensors(out / name, tensors)
                        progress.advance(len(part), sum(len(text.tokens) for text in part))
            index: dict[str, list[str | int]] = {}
            for part, name in zip(parts, names, strict=True):
                begins = pack(part).offsets.tolist()
                index |= {text.id: [name, begin] for text, begin in zip(part, begins, strict=False)}
            write_json(out / "index.json", {"layers": list(config.layers), "length": length, "places": index})
            size = sum((out / name).stat().st_size for name in names)
            work.finish([*names, "index.json"], {"texts": len(texts), "bytes": size})
    return Artefact(out, "features", work.record["sha256"], work.record["target"], work.record)


@torch.inference_mode()
def _read(target: TargetModel, texts: Sequence[Text], config: Config) -> Iterator[dict[str, Tensor]]:
    cache = target.new_cache(1, max(len(text.tokens) for text in texts))
    slot, dtype = cache.open(), DTYPES[config.keep]
    for text in texts:
        batch = RaggedBatch.pack([text.tokens], [0], [slot])
        output = target.forward(batch, cache, config.layers)
        cache.rewind(torch.tensor([slot]), torch.tensor([0]))
        if output.hidden is None or output.features is None:
            raise InvalidRequest(
                f"{target.spec.name}: this target does not return its last hidden state; train without cached features"
            )
        yield {"features": output.features.to(dtype), "hidden": output.hidden.to(dtype)}


class CachedFeatures:
    """A ``FeatureSource`` that reads an artefact of ``features`` instead of running the target."""

    def __init__(self, target: TargetModel, folder: Path, aux_layers: tuple[int, ...], length: int) -> None:
        """Raises InvalidRequest for a cache of other layers or another text length."""
        self._target, self._folder = target, folder
        index: dict[str, Any] = read_json(folder / "index.json")
        if tuple(index["layers"]) != aux_layers or index["length"] != length:
            raise InvalidRequest(
                f"{folder} holds features of layers {index['layers']}, {index['length']} tokens a text; the drafter "
                f"reads layers {list(aux_layers)}, {length} tokens; make the features again, or train without them"
            )
        self._index: dict[str, tuple[str, int]] = {key: (name, at) for key, (name, at) in index["places"].items()}
        self._files: dict[str, Any] = {}

    def batch(self, texts: Sequence[Text], drafter: TrainableDrafter, epoch: int) -> FeatureBatch:
        """See ``FeatureSource.batch``."""
        packed = pack(texts)
        anchors, rows = drafter.wanted(packed, epoch)
        kept = torch.cat([self._get(text, "features") for text in texts])
        hidden = torch.cat([self._get(text, "hidden") for text in texts])[rows]
        logits = self._target.unembed(hidden.to(self._target.spec.dtype)).float().clone()
        return FeatureBatch(packed, anchors, rows, kept.float(), logits, hidden.float())

    def _get(self, text: Text, name: str) -> Tensor:
        if text.id not in self._index:
            raise InvalidRequest(f"{self._folder} has no features of the text {text.id!r}; make the features again")
        file, begin = self._index[text.id]
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt").__enter__()
        part: Tensor = self._files[file].get_slice(name)[begin : begin + len(text.tokens)]
        return part
