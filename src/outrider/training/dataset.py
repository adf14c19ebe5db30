"""Training texts: reading answered prompts, and sampling them per step independently of the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from outrider.errors import InvalidRequest
from outrider.files import read_json_lines
from outrider.training.networks.batch import TokenBatch

__all__ = ["Text", "TextSampler", "pack", "read_texts"]


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and the target's answer to it."""

    id: str
    domain: str
    tokens: tuple[int, ...]
    prompt_length: int

    @property
    def key(self) -> int:
        """Seed of the text's random choices: the same in any batch and on any machine."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:7], "big")


def read_texts(path: Path, *, length: int, vocab_size: int, required: bool = True) -> list[Text]:
    """Answers of ``train regenerate``: lines of {id, domain, prompt, answer}, cut to ``length`` tokens.

    Texts whose answer has fewer than two tokens within ``length`` are left out. Raises InvalidRequest with the line's
    number, and where none is left but is ``required``.
    """
    texts = []
    expected = "an object with id, prompt and answer (token ids)"
    for number, row in read_json_lines(path, expected, "answers"):
        try:
            prompt, answer = [int(t) for t in row["prompt"]], [int(t) for t in row["answer"]]
            name, domain = str(row["id"]), str(row.get("domain", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{path}, line {number}: expected {expected}: {error!r}") from error
        wrong = [token for token in (*prompt, *answer) if not 0 <= token < vocab_size]
        if wrong:
            raise InvalidRequest(
                f"{path}, line {number}: token {wrong[0]} is outside the target's vocabulary of {vocab_size}; "
                "the answers were made by another target"
            )
        tokens = tuple((prompt + answer)[:length])
        if len(prompt) >= 1 and len(tokens) >= len(prompt) + 2:
            texts.append(Text(name, domain, tokens, len(prompt)))
    if required and not texts:
        raise InvalidRequest(f"{path} holds no text with an answer of at least 2 tokens within {length} tokens")
    return texts


def pack(texts: Sequence[Text]) -> TokenBatch:
    """Concatenate texts into one batch."""
    lengths = np.array([len(text.tokens) for text in texts])
    offsets = np.concatenate([[0], lengths.cumsum()])
    answered = np.repeat(offsets[:-1] + [text.prompt_length for text in texts], lengths)
    tokens = np.array([token for text in texts for token in text.tokens], dtype=np.int64)
    return TokenBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(offsets),
        torch.from_numpy(np.arange(len(tokens)) >= answered),
        tuple(text.key for text in texts),
    )


@dataclass(frozen=True)
class TextSampler:
    """The texts of each training step, in packs. A function of the step alone, so a run can resume at any step."""

    texts: Sequence[Text]
    batch: int  # texts per step, over all processes
    pack_tokens: int  # most tokens of a pack; a longer text gets a pack of its own
    seed: int

    def epoch(self, step: int) -> int:
        """Full passes over the texts before this step."""
        return step * self.batch // len(self.texts)

    def packs(self, step: int, rank: int = 0, world: int = 1) -> list[list[Text]]:
        """This process's packs. Every process gets the same number, as collectives require; missing ones are empty and
        come last."""
        shares = [self._split(self._chosen(step)[r::world]) for r in range(world)]
        most = max(len(share) for share in shares)
        return shares[rank] + [[] for _ in range(most - len(shares[rank]))]

    def _chosen(self, step: int) -> list[Text]:
        """``batch`` texts; every text appears once per epoch."""
        count = len(self.texts)
        indices = range(step * self.batch, (step + 1) * self.batch)
        return [self.texts[_order(self.seed, index // count, count)[index % count]] for index in indices]

    def _split(self, texts: Sequence[Text]) -> list[list[Text]]:
        return list(_fill(sorted(texts, key=lambda text: len(text.tokens)), self.pack_tokens))


@lru_cache(maxsize=4)  # steps follow each other, and a large order takes milliseconds
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    return order


def _fill(texts: Sequence[Text], most: int) -> Iterator[list[Text]]:
    part: list[Text] = []
    size = 0
    for text in texts:
        if part and size + len(text.tokens) > most:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text.tokens)
    if part:
        yield part
