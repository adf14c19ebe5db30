"""Tokenizers of a few tokens, and random JSON schemas, for tests of grammars."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from outrider import SamplingParams
from outrider.config import Grammar
from outrider.sampling.grammar import GrammarMatcher, Grammars
from outrider.tokenization.tokenizer import Tokenizer

END = "<end>"
LETTERS = ["{", "}", "[", "]", '"', ":", ",", ".", "-", " ", "\n", *"0123456789", *"abcdefghijklmnopqrstuvwxyz"]
MERGED = ['{"', '":', '",', "tr", "fa", "nu", "ab", "en", "ame", "12", "1.", '"a', "se"]
TOKENS = ["a", "b", "ab", "c"]
REGEX = Grammar("regex", "(ab|ba|c)*")


def tokenizer_of(tokens: Sequence[str], ends: bool = True) -> Tokenizer:
    """A byte-level tokenizer of exactly these tokens; the last id is the end, if there is one."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = ["".join(piece for piece, _ in byte_level.pre_tokenize_str(token)) for token in tokens]
    fast = FastTokenizer(models.BPE(vocab={token: i for i, token in enumerate(written)}, merges=[]))
    fast.pre_tokenizer, fast.decoder = byte_level, decoders.ByteLevel()
    if ends:
        fast.add_special_tokens([AddedToken(END, special=True)])
    return Tokenizer(Path("."), fast, {"eos_token": END} if ends else {})


def grammars_of(tokens: Sequence[str], ends: bool = True) -> Grammars:
    tokenizer = tokenizer_of(tokens, ends)
    size = len(tokens) + ends
    return Grammars(lambda: tokenizer.definition, size, (len(tokens),) if ends else ())


def matcher_of(grammars: Grammars, grammar: Grammar, committed: Sequence[int] = (), **options: Any) -> GrammarMatcher:
    matcher = GrammarMatcher(grammars, SamplingParams(grammar=grammar, **options))
    assert all(map(matcher.consume, committed))
    return matcher


def allowed(mask: np.ndarray | None, size: int) -> set[int] | None:
    return None if mask is None else {t for t in range(size) if mask[t // 32] >> (t % 32) & 1}


# ------------------------------------------------------------------------------------------------ random schemas


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema all of whose texts are short."""
    kinds = ["integer", "string", "enum", "boolean", "null"] + (["object", "array"] if depth < 2 else [])
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "integer":
        low = rng.randrange(-20, 20)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 900)}
    if kind == "string":
        return (
            {"type": "string", "maxLength": rng.randrange(1, 6), "pattern": "^[a-z ]*$"}
            if rng.random() < 0.3
            else {
                "type": "string",
                "maxLength": rng.randrange(0, 6),
            }
        )
    if kind == "enum":
        return {"enum": rng.sample(["abc", "ab", "b", 12, 7, None, True, "new name"], rng.randrange(1, 4))}
    if kind == "array":
        low = rng.randrange(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 2}
    if kind == "object":
        names = rng.sample(["a", "ab", "name", "x1", "long name"], rng.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        fits = isinstance(value, str) and len(value) <= schema["maxLength"]
        return fits and re.fullmatch(schema.get("pattern", "(?s).*"), value) is not None
    if kind == "array":
        fits = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(is_valid(one, schema["items"]) for one in value)
    if kind == "object":
        parts = schema["properties"]
        fits = isinstance(value, dict) and set(schema["required"]) <= value.keys() <= parts.keys()
        return fits and all(is_valid(one, parts[name]) for name, one in value.items())
    return {"boolean": type(value) is bool, "null": value is None}[kind]
