"""Where a text ends: stop ids, stop strings and budgets, decided before anything is committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.engine.finisher import Finisher
from outrider.tokenization.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("accepted", "given", "stop", "budget", "kept", "tokens", "reason"),
    [
        (2, [5, 6, 7], {9}, 10, 2, [5, 6, 7], None),
        (2, [5, 9, 7], {9}, 10, 2, [5, 9], "stop"),  # an accepted draft ends the text: no bonus token
        (2, [9, 9, 7], {9}, 10, 1, [9], "stop"),
        (2, [5, 6, 9], {9}, 10, 2, [5, 6, 9], "stop"),  # the bonus token ends it
        (0, [9, 6, 7], {9}, 10, 0, [9], "stop"),
        (1, [5, 6, 9], {9}, 10, 1, [5, 6], None),  # what follows the bonus token is padding
        (2, [5, 6, 7], {9}, 2, 2, [5, 6], "length"),
        (2, [5, 6, 9], {9}, 1, 1, [5], "length"),
        (2, [5, 6, 9], {9}, 3, 2, [5, 6, 9], "stop"),  # a stop id as the last token of the budget stops
        (2, [5, 9, 7], set(), 10, 2, [5, 9, 7], None),
    ],
)
def test_stop_ids_and_budgets(
    accepted: int, given: list[int], stop: set[int], budget: int, kept: int, tokens: list[int], reason: str | None
) -> None:
    end = Finisher(stop).take(given, accepted, budget)
    assert (end.tokens, end.accepted, end.reason) == (tokens, kept, reason)
    assert [piece.token_id for piece in end.pieces] == tokens
    assert [piece.drafted for piece in end.pieces] == [i < accepted for i in range(len(tokens))]


def test_a_stop_string_ends_the_text_wherever_a_round_is_cut(tiny_model_dir: Path) -> None:
    """The ids up to the token that completes the string, its text up to where it begins; in rounds of any size."""
    tokenizer = Tokenizer(tiny_model_dir)
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog and runs on.", add_special_tokens=False)
    whole = tokenizer.decode(ids)
    stop = "x jumps ov"
    for size in (1, 2, 3, 5, 50):
        finisher, text, kept, reason = Finisher((), (stop,), tokenizer), "", [], None
        for at in range(0, len(ids), size):
            part = ids[at : at + size]
            end = finisher.take(part, len(part) - 1, 1000)
            text += "".join(piece.text for piece in end.pieces)
            kept += end.tokens
            if (reason := end.reason) is not None:
                break
        assert reason == "stop" and text == whole[: whole.index(stop)]
        assert stop in tokenizer.decode(kept) and stop not in tokenizer.decode(kept[:-1])


def test_what_may_become_a_stop_string_is_told_at_the_end(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_model_dir)
    ids = tokenizer.encode("over the lazy", add_special_tokens=False)
    finisher = Finisher((), ("lazy dog",), tokenizer)
    text, budget = "", len(ids)
    for token in ids:
        end = finisher.take([token], 0, budget)
        text, budget = text + end.pieces[0].text, budget - 1
    assert end.reason == "length" and text == tokenizer.decode(ids)


def test_a_fresh_finisher_replays_to_the_same_state(tiny_model_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_model_dir)
    ids = tokenizer.encode("naïve café, 你好 🙂 and on", add_special_tokens=False)
    for cut in range(1, len(ids)):
        one = Finisher((), ("on!",), tokenizer)
        one.take(ids[:cut], cut, cut + 1)
        other = one.fresh()
        other.take(ids[:cut], cut, cut + 1)
        texts = ["".join(p.text for p in f.take(ids[cut:], len(ids) - cut - 1, 1000).pieces) for f in (one, other)]
        assert texts[0] == texts[1]
