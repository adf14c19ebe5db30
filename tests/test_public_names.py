"""Artefacts name models by name and hash, never by a path of the machine that made them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trained import make_target

from outrider.models.locations import EMBEDDED, public_name, resolve_model
from outrider.training.artefact import target_hash
from outrider.training.networks.initial import draft_decoder, new_checkpoint

PACKAGED = Path(__file__).parents[1] / "src" / "outrider" / "embedded"


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


def test_a_model_is_named_without_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "my-model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder.parent)
    for given in (folder, str(folder), f"{folder}/", "my-model", "./my-model", "../models/my-model"):
        assert public_name(given) == "my-model"
    assert public_name("owner/name") == "owner/name"
    assert public_name("/home/x/.cache/huggingface/hub/models--owner--name/snapshots/0123abc") == "owner/name"
    for name in EMBEDDED:
        assert public_name(name) == public_name(resolve_model(name)) == name


def test_a_new_drafter_does_not_name_a_path() -> None:
    from dataclasses import replace

    from outrider.drafters.eagle3_design import Eagle3Design

    spec = replace(make_target().spec, name="/home/somebody/models/my-model")
    decoder = draft_decoder({"num_attention_heads": 4}, spec, layers=1, intermediate=None)
    assert new_checkpoint(Eagle3Design(), decoder, spec, None, 3).target.name == "my-model"


@pytest.mark.parametrize("file", sorted(PACKAGED.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_packaged_artefacts_hold_no_paths(file: Path) -> None:
    if file.name == "tokenizer.json":
        return  # its tokens may look like anything
    paths = [text for text in strings(json.loads(file.read_text())) if text.startswith(("/", "~", "\\"))]
    assert not paths


def test_the_packaged_calibration_names_its_target_by_hash() -> None:
    facts = json.loads((PACKAGED / "dspark" / "calibration.json").read_text())["facts"]
    assert (facts["target"], facts["target_sha256"]) == ("embedded", target_hash("embedded"))
