"""Prompts that the target writes itself: filters, near duplicates, topics, and an interruption that changes nothing."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.errors import InvalidRequest, OutriderError
from outrider.models.loading import load_tokenizer
from outrider.tokenization.tokenizer import Tokenizer
from outrider.training.conversations import Answerer, ChatTurn
from outrider.training.progress import Progress
from outrider.training.prompts import Config, make_prompts
from outrider.training.self_prompts import _refused, balanced, header, write_self_prompts

TEXTS = (
    "How do I bake bread without an oven at home?",
    "how do I bake bread without an oven at HOME?",  # nearly the same
    "no no no no no no no no no no no no",  # repetitive
    "12345 67890 12345 678 90 1",  # hardly a letter
    "What is the boiling point of water on a mountain?",
    "Hi",  # too short
    "Как испечь хлеб без духовки дома быстро?",  # other letters
    "Write a poem about the sea and its many ships.",
)


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_dir)


def scripted(tokenizer: Tokenizer, stop_after: int | None = None) -> tuple[list[int], Answerer]:
    """An answerer that writes TEXTS by the number of the attempt, and the numbers it was asked for."""
    asked: list[int] = []
    end = header(tokenizer)[1][0]

    def answer(todo: deque[ChatTurn]) -> Iterator[list[tuple[ChatTurn, list[int]]]]:
        while todo:
            turn = todo.popleft()
            if stop_after is not None and len(asked) == stop_after:
                raise KeyboardInterrupt
            asked.append(int(turn.id))
            tokens = tokenizer.encode(TEXTS[int(turn.id) % len(TEXTS)], add_special_tokens=False)
            yield [(turn, [*tokens, end] if int(turn.id) != 7 else tokens)]  # the last one does not end

    return asked, answer


def write(tokenizer: Tokenizer, path: Path, answer: Answerer, count: int = 2) -> Sequence[str]:
    progress = Progress(None, "", count)
    dropped = write_self_prompts(count, [""], "LATIN", tokenizer, lambda ends: answer, path, progress, (8, 500))
    assert dropped["nearly the same as another"] and dropped["repetitive"] and dropped["with hardly a letter"]
    assert dropped["too short or too long"] and dropped["not in Latin letters"] and dropped["without an end"]
    return [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_no_prompt_is_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, answer = scripted(tokenizer)
    assert write(tokenizer, tmp_path / "own.jsonl", answer) == [TEXTS[0], TEXTS[4]]


def test_a_users_text_ends_at_the_first_token_behind_it() -> None:
    template: Any = SimpleNamespace(
        apply_chat=lambda messages, add_generation_prompt: f"u:{messages[0]['content']};\n",
        encode=lambda text, add_special_tokens: list(map(ord, text)),
        eos_token_ids=[0],
    )
    assert header(template) == ([ord("u"), ord(":")], [ord(";"), 0])


def test_openings_take_turns_and_belong_to_the_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Texts of two words are compared too; a control token inside a text is no end."""
    openings, begun = ["", "Tell me"], []
    end = header(tokenizer)[1][0]
    special = next(token for token in sorted(tokenizer.special_ids) if token != end)

    def answer(todo: deque[ChatTurn]) -> Iterator[list[tuple[ChatTurn, list[int]]]]:
        while todo:
            turn = todo.popleft()
            begun.append(tokenizer.decode(turn.tokens))
            tokens = tokenizer.encode(f" secret{turn.id} recipe{turn.id}", add_special_tokens=False)
            yield [(turn, [*tokens, *([special] if turn.id == "2" else []), end])]

    path = tmp_path / "own.jsonl"
    dropped = write_self_prompts(
        4, openings, None, tokenizer, lambda ends: answer, path, Progress(None, "", 4), (8, 500)
    )
    texts = [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()]
    assert texts == [f"{openings[i % 2]} secret{i} recipe{i}".strip() for i in (0, 1, 3, 4)]
    assert [text.endswith("Tell me") for text in begun[:4]] == [False, True, False, True]
    assert dropped["without an end"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("half of these ещё русские слова here", "not in Latin letters"),
        ("a1b2 3456 c7 89", "with hardly a letter"),
        ("one two three one two three one two three", "repetitive"),
        ("one two three four one two three", None),
    ],
)
def test_what_keeps_a_text_from_being_a_prompt(text: str, reason: str | None) -> None:
    record = {"text": text, "ended": True, "special": False}
    assert _refused(record, (8, 500), "LATIN") == reason


def test_an_interruption_changes_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    first, broken = scripted(tokenizer, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        write(tokenizer, path, broken)
    then, answer = scripted(tokenizer)
    assert write(tokenizer, path, answer) == [TEXTS[0], TEXTS[4]]
    assert not set(first) & set(then), "attempts of the first run are not made again"


def test_a_file_of_prompts_is_whole_or_not_there(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*paths: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tokenizer, tmp_path / "own.jsonl", scripted(tokenizer)[1])
    assert not (tmp_path / "own.jsonl").exists()


def test_few_attempts_more_than_prompts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked = []
    end = header(tokenizer)[1][0]

    def answer(todo: deque[ChatTurn]) -> Iterator[list[tuple[ChatTurn, list[int]]]]:
        while todo:
            turn = todo.popleft()
            asked.append(int(turn.id))
            text = " ".join(f"question{asked[-1]}word{i}" for i in range(4))
            tokens = tokenizer.encode(text, add_special_tokens=False)
            yield [(turn, [*tokens, end] if asked[-1] % 5 else tokens)]  # every fifth does not end

    path, progress = tmp_path / "own.jsonl", Progress(None, "", 100)
    write_self_prompts(100, [""], None, tokenizer, lambda ends: answer, path, progress, (8, 500))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 100
    assert asked == list(range(len(asked))) and 125 <= len(asked) <= 145


def test_a_topic_keeps_twice_its_share_at_most() -> None:
    words = ["bread oven flour yeast", "engine wheel brake road", "poem verse rhyme line", "star moon planet comet"]
    common = [f"{words[0]} {i}" for i in range(700)]
    rare = [f"{word} {i}" for word in words[1:] for i in range(100)]
    kept = balanced([*common, *rare])
    assert set(rare) <= set(kept) and 300 < sum(text in set(common) for text in kept) < 700
    assert balanced(rare[:50]) == rare[:50]  # too few for topics


def test_a_target_that_writes_nothing_usable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def silent(todo: deque[ChatTurn]) -> Iterator[list[tuple[ChatTurn, list[int]]]]:
        while todo:
            yield [(todo.popleft(), [])]

    with pytest.raises(OutriderError, match=r"no usable prompt in 4 attempts \(4 without an end\)"):
        write_self_prompts(
            1, [""], None, tokenizer, lambda ends: silent, tmp_path / "x.jsonl", Progress(None, "", 1), (8, 500)
        )


def test_options(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="need the target"):
        make_prompts(Config.model_validate({"sources": [{"self": 3}]}), tmp_path / "prompts")
    for source in ({}, {"self": 3, "path": "a.jsonl"}):
        with pytest.raises(ValueError, match="either `path` or `self`"):
            Config.model_validate({"sources": [source]})
