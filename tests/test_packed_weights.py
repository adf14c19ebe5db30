"""Quantised weights kept on disk: the same bits as packing anew, and damage never trusted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from outrider.backends import packed_weights
from outrider.backends.native import available
from outrider.errors import InvalidRequest
from outrider.models.loading import load_target
from outrider.models.locations import resolve_model
from outrider.types import RaggedBatch

pytestmark = pytest.mark.skipif(not available(), reason="the native core is not built")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a model small enough for tests counts as slow."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_weights, "SLOW", 0.0)
    return tmp_path / "cache" / "outrider" / "packed"


def logits(model: Path | str, dtype: str) -> torch.Tensor:
    target = load_target(model, dtype=dtype, backend="native")
    cache = target.new_cache(1, 16)
    return target.forward(RaggedBatch.pack([[5, 6, 7, 8]], [0], [cache.open()]), cache).logits


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_kept_weights_are_the_packed_ones(dtype: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits("embedded-draft", dtype)
    (file,) = kept.iterdir()
    written = file.stat().st_mtime_ns

    def fail(*given: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr("outrider.backends.native._pack", fail)
    assert torch.equal(logits("embedded-draft", dtype), first)
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign"])
def test_a_damaged_file_is_replaced(damage: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits("embedded-draft", "int8")
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 255]) + whole[-8:])
    else:
        file.write_bytes(b"something else")

    assert torch.equal(logits("embedded-draft", "int8"), first)
    monkeypatch.setattr("outrider.backends.native._pack", lambda *given: pytest.fail("packed again"))
    assert torch.equal(logits("embedded-draft", "int8"), first)


def test_changed_weights_are_packed_anew(kept: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(resolve_model("embedded-draft"), model)
    before = logits(model, "int8")
    shutil.copyfile(model / "model.safetensors", tmp_path / "copy")
    (tmp_path / "copy").replace(model / "model.safetensors")  # another file, another time

    assert torch.equal(logits(model, "int8"), before)
    assert len(list(kept.iterdir())) == 2


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "SLOW", 0.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept"):
        found = logits("embedded-draft", "int8")
    assert bool(found.isfinite().all())


def test_only_quantised_weights_of_files_are_kept(kept: Path) -> None:
    logits("embedded-draft", "float32")
    load_target("embedded-draft", dtype="bfloat16", backend="native")
    assert not kept.exists()


def test_the_least_recently_used_files_are_dropped(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    for name in ("first", "second", "third"):
        shutil.copytree(resolve_model("embedded-draft"), tmp_path / name)
        models.append(tmp_path / name)
    logits(models[0], "int8")
    (first,) = kept.iterdir()
    logits(models[1], "int8")
    (second,) = set(kept.iterdir()) - {first}
    os.utime(first, ns=(1, first.stat().st_mtime_ns))
    logits(models[0], "int8")  # used again: now the second one is the oldest
    monkeypatch.setenv("OUTRIDER_CACHE_LIMIT", str(int(2.5 * first.stat().st_size)))
    logits(models[2], "int8")
    assert first.exists() and not second.exists() and packed_weights.stored()[0] == 2


def test_nothing_is_kept_past_the_limit(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE_LIMIT", "1M")
    logits("embedded-draft", "int8")
    assert packed_weights.stored() == (0, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 8 << 30), ("0", 0), ("1000", 1000), ("1.5G", 3 << 29), ("20 MiB", 20 << 20), ("7gb", 7 << 30)],
)
def test_sizes_of_the_limit(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE_LIMIT", text)
    assert packed_weights.cache_limit() == size


@pytest.mark.parametrize("text", ["lots", "-1", "8X", "G", "1e9", "nan"])
def test_a_limit_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE_LIMIT", text)
    with pytest.raises(InvalidRequest, match="OUTRIDER_CACHE_LIMIT must be a size"):
        packed_weights.cache_limit()
