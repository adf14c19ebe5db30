"""JSON Lines: what every reader of prompts and answers accepts, and what it says about the rest."""

from __future__ import annotations

import codecs
import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from outrider.errors import InvalidRequest
from outrider.evaluation import plots
from outrider.evaluation.recording import read_prompts
from outrider.evaluation.replay import sample_prompts
from outrider.files import cache_folder, read_json_lines, write_json
from outrider.training.artefact import Journal, read_lines
from outrider.training.dataset import read_texts
from outrider.training.prompts import Source, read_source
from outrider.training.report import read_log


def test_byte_order_marks_blank_lines_and_gzip(tmp_path: Path) -> None:
    raw = 2 * codecs.BOM_UTF8 + b'{"a": "\xe2\x80\xa8"}\r\n\n' + codecs.BOM_UTF8 + b"\n" + codecs.BOM_UTF8 + b"[1]"
    for name, content in (("x.jsonl", raw), ("x.jsonl.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        assert list(read_json_lines(tmp_path / name)) == [(1, {"a": "\u2028"}), (4, [1])]
    (tmp_path / "none.jsonl").write_bytes(codecs.BOM_UTF8)
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1}\n{', "line 2 is not JSON .*: expected an object"),
        (b'{"a": 1}\n{"b": "\xe9"}', "line 2 is not JSON .*utf-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "line 1 is UTF-16; expected UTF-8"),
    ],
)
def test_bad_lines_are_named(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(raw)
    with pytest.raises(InvalidRequest, match=f"x.jsonl {message}"):
        list(read_json_lines(tmp_path / "x.jsonl", "an object"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read prompts from .*none"):
        list(read_json_lines(tmp_path / "none", "text", "prompts"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"[1]\n" * 5000)[:-20])
    with pytest.raises(InvalidRequest, match="cut.gz cannot be read after line"):
        list(read_json_lines(tmp_path / "cut.gz"))


def test_every_reader_accepts_a_byte_order_mark(tmp_path: Path, tiny_model_dir: Path) -> None:
    line = {"id": "a", "domain": "d", "turns": ["It\u2028was"], "prompt": [5, 6], "answer": [7, 8], "ids": [5]}

    def write(*keys: str) -> Path:
        path = tmp_path / f"{'-'.join(keys)}.jsonl"
        text = json.dumps({key: line[key] for key in keys}, ensure_ascii=False) + "\n"
        path.write_bytes(codecs.BOM_UTF8 + text.encode())
        return path

    assert [prompt.prompt for prompt in read_prompts(write("turns"))] == ["It\u2028was"]
    assert sample_prompts(tiny_model_dir, write("ids")).ids == [[5]]
    assert next(read_source(Source(path=write("turns"))))[0]["turns"] == ["It\u2028was"]
    answers = write("id", "domain", "prompt", "answer")
    assert read_texts(answers, length=9, vocab_size=512)[0].tokens == (5, 6, 7, 8)
    assert next(read_lines(answers))["id"] == "a" == read_log(answers)[0]["id"]
    with Journal(answers) as journal:
        assert journal.records[0]["id"] == "a"


def test_a_full_disk_is_named_and_earlier_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    figures, diagram = tmp_path / "evaluation.json", tmp_path / "reliability.png"
    figures.write_text("[]")
    diagram.write_text("earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*evaluation.json'"):
        write_json(figures, {"rows": []})
    if plots.available():
        with pytest.raises(InvalidRequest, match="reliability.png cannot be written: No space left on device"):
            plots.draw_reliability({"temperature 0": {"ngram": ([0.0, 1.0], [0.0, 1.0])}}, diagram)
    assert (figures.read_text(), diagram.read_text()) == ("[]", "earlier")
    assert sorted(tmp_path.iterdir()) == [figures, diagram]


def test_a_relative_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "here"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder("costs") == tmp_path / ".cache" / "outrider" / "costs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert cache_folder("costs") == tmp_path / "there" / "outrider" / "costs"
