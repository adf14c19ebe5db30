"""Prompts from anybody's data sets: every form is read, every fault names its line, no document is on both sides."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ArtefactError, InvalidRequest
from outrider.training.artefact import read_lines
from outrider.training.prompts import Config, Source, make_prompts, read_source


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def split(out: Path, *sources: Source, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    make_prompts(Config(sources=sources, **options), out)
    return list(read_lines(out / "train.jsonl")), list(read_lines(out / "held_out.jsonl"))


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"text": "Once"}, {"text": "Once"}),
    ({"prompt": "Once", "answer": "x"}, {"text": "Once"}),
    ({"turns": ["a", "b"]}, {"turns": ["a", "b"]}),
    (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant"}]},
        {"turns": ["a"], "system": "s"},
    ),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}, {"turns": ["a"]}),
    (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "x"},
                {"from": "human", "value": "b"},
            ]
        },
        {"turns": ["a", "b"]},
    ),
    (
        {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}]},
        {"turns": ["a"], "system": "s"},
    ),
    (
        {
            "conversations": [
                {"from": "System", "value": "s"},
                {"from": "Developer", "value": "t"},
                {"from": "Human", "value": "a"},
                {"from": "GPT", "value": "x"},
                {"from": " USER ", "value": "b"},
                {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "1"},
                {"from": "chatgpt", "value": "y"},
            ]
        },
        {"turns": ["a", "b"], "system": "s\n\nt"},
    ),
    ({"conversations": [{"role": "User", "content": ["a", {"text": None}]}]}, {"turns": ["a"]}),
    ({"system": "s", "conversations": [{"from": "human", "value": "a"}]}, {"turns": ["a"], "system": "s"}),
    ({"turns": ["a"], "system": "s"}, {"turns": ["a"], "system": "s"}),
    (
        {"system": "s", "messages": [{"role": "system", "content": "t"}, {"role": "user", "content": ["a", "b"]}]},
        {"turns": ["ab"], "system": "s\n\nt"},
    ),
]


@pytest.mark.parametrize(("line", "expected"), FORMS)
def test_every_form_is_read_and_answers_are_not(line: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [line])
    assert list(read_source(Source(path=path))) == [({"domain": "set", **expected}, None)]
    packed = tmp_path / "set.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_source(Source(path=packed))) == [({"domain": "set", **expected}, None)]


def test_a_source_may_say_what_its_lines_are(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", [{"turns": ["a\u2028b", "c"], "domain": "d", "document": 7, "question": "q"}])

    def read(**options: Any) -> Any:
        return next(read_source(Source(path=path, **options)))

    assert read() == ({"domain": "d", "turns": ["a\u2028b", "c"]}, "7")
    assert read(form="text", domain="own") == ({"domain": "own", "text": "a\u2028b"}, "7")
    assert read(field="question") == ({"domain": "d", "text": "q"}, "7")
    assert read(field="question", form="chat") == ({"domain": "d", "turns": ["q"]}, "7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2: got a JSON list, expected an object with `text`"),
        ('{"question": "x", "answer": "y"}', "line 2: got the keys 'question', 'answer', expected"),
        ('{"turns": "x"}', 'line 2: turns is "x", expected a list of texts'),
        ('{"text": 5}', "line 2: text is 5, expected a text"),
        ('{"id": 1, "prompt": null}', "line 2: prompt is null, expected a text or a list of messages"),
        ('{"messages": [{"content": "x"}]}', "line 2: messages: message 1 needs 'role'"),
        ('{"messages": [{"role": "usr", "content": ""}]}', "line 2: messages: message 1 has the role 'usr'; did you"),
        ('{"conversations": [{"from": "narrator", "value": ""}]}', "line 2: conversations: message 1 has the role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2: messages: message 1 has no text"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InvalidRequest, match=f"{path.name} {message}".replace("[", r"\[")):
        make_prompts(Config(sources=(Source(path=path),)), tmp_path / "out")
    assert not (tmp_path / "out" / "provenance.json").exists()


def test_bad_files_are_named(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InvalidRequest, match=message):
            make_prompts(Config(sources=(Source(path=path),)), tmp_path / "out")

    refused(tmp_path / "missing.jsonl", "no such file")
    refused(write(tmp_path / "empty.jsonl", []), "empty.jsonl holds no prompts")
    refused(write(tmp_path / "blank.jsonl", [{"text": "  "}]), r"no training prompts are left of 1 sources \(1 empty\)")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-30])
    refused(cut, "cut.jsonl.gz cannot be read after line")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    refused(tmp_path / "latin.jsonl", "latin.jsonl line 1 is not JSON")


def test_duplicates_and_lengths_are_filtered_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in ("One two", "one  TWO ", "x", "three", "y" * 50)])
    again = write(tmp_path / "b.jsonl", [{"text": "Three"}, {"text": "four"}])
    options: dict[str, Any] = {"min_characters": 2, "max_characters": 20, "held_out": 0}
    train, held_out = split(tmp_path / "out", Source(path=path), Source(path=again), **options)
    assert sorted((p["text"], p["domain"]) for p in train) == [("One two", "a"), ("four", "b"), ("three", "a")]
    assert held_out == []
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())["facts"]
    assert facts["dropped"] == {"duplicates": 2, "too short or too long": 2} and facts["train"] == {"a": 2, "b": 1}


def test_documents_stay_on_one_side(tmp_path: Path) -> None:
    lines = [{"text": f"line {i} of book {i % 40}", "document": f"book {i % 40}"} for i in range(400)]
    train, held_out = split(tmp_path / "a", Source(path=write(tmp_path / "x.jsonl", lines)), held_out=0.3)
    books = [{p["text"].split(" of ")[1] for p in part} for part in (train, held_out)]
    assert not books[0] & books[1] and 5 < len(books[1]) < 20
    again = split(tmp_path / "b", Source(path=write(tmp_path / "x.jsonl", lines[::-1])), held_out=0.3)
    assert again == (train, held_out)  # neither split nor order depends on the file's order
    other, _ = split(tmp_path / "c", Source(path=tmp_path / "x.jsonl"), held_out=0.3, seed=1)
    assert other != train and sorted(p["id"] for p in other) == sorted(p["id"] for p in train)


def test_what_is_held_out_by_hand_is_never_trained_on(tmp_path: Path) -> None:
    trained = write(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "c", "document": "d"}])
    kept = write(tmp_path / "kept.jsonl", [{"text": "B"}, {"text": "z", "document": "d"}])
    sources = Source(path=trained, split="train"), Source(path=kept, split="held_out")
    train, held_out = split(tmp_path / "out", *sources)
    assert [p["text"] for p in train] == ["a"]
    assert sorted(p["text"] for p in held_out) == ["B", "c", "z"]


def test_another_system_message_makes_another_prompt(tmp_path: Path) -> None:
    lines = [{"turns": ["a"], "system": system} for system in ("s", "t", "S")] + [{"turns": ["a"]}]
    train, _ = split(tmp_path / "out", Source(path=write(tmp_path / "x.jsonl", lines)), held_out=0)
    assert sorted(prompt.get("system", "") for prompt in train) == ["", "s", "t"]
    again, _ = split(tmp_path / "text", Source(path=tmp_path / "x.jsonl", form="text"), held_out=0)
    assert [(prompt["text"], "system" in prompt) for prompt in again] == [("a", False)]


def test_all_turns_count_as_a_prompts_length(tmp_path: Path) -> None:
    lines = [{"turns": ["a" * 5, "b" * size]} for size in (4, 5, 6)]
    path, limits = write(tmp_path / "x.jsonl", lines), {"min_characters": 10, "max_characters": 10, "held_out": 0.0}
    train, _ = split(tmp_path / "out", Source(path=path), **limits)
    assert [prompt["turns"][1] for prompt in train] == ["bbbbb"]


def test_a_source_read_with_other_options_is_another_source(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "a"}])
    for _ in range(2):
        split(tmp_path / "out", Source(path=path), held_out=0)
    with pytest.raises(ArtefactError, match="made with another source 1: x"):
        split(tmp_path / "out", Source(path=path, form="chat"), held_out=0)


def test_limits_are_by_domain(tmp_path: Path) -> None:
    sources = [
        Source(path=write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(30)])) for name in "ab"
    ]
    train, held_out = split(tmp_path / "out", *sources, limit=5, held_out_limit=2, held_out=0.3)
    assert sorted(p["domain"] for p in train) == ["a"] * 5 + ["b"] * 5
    assert sorted(p["domain"] for p in held_out) == ["a"] * 2 + ["b"] * 2


def test_conversations_are_cut_to_the_turns_that_are_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"turns": ["a", "b", "c"]}])
    train, _ = split(tmp_path / "out", Source(path=path), held_out=0, turns=1)
    assert train[0]["turns"] == ["a"]


def test_text_that_utf8_cannot_hold_is_kept(tmp_path: Path) -> None:
    """A lone surrogate, as JSON may hold it."""
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"text": "a \udce9"}) + "\n" + json.dumps({"text": "é"}))
    make_prompts(Config(sources=(Source(path=path),), held_out=0.0), tmp_path / "out")
    assert {line["text"] for line in read_lines(tmp_path / "out" / "train.jsonl")} == {"a \udce9", "é"}
