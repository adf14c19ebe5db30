"""Prompts that the target writes itself: what follows the header of a user's message (Magpie, arXiv 2406.08464).

A chat model has learnt what users ask. Given the beginning of a conversation up to where the user's text starts, it
goes on with such a text. Nobody then needs a data set to train a drafter. What is kept ended by itself, is neither
repetitive nor nearly the same as another, and no topic has far more than its share.
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.cluster.vq import kmeans2

from outrider.errors import InvalidRequest, OutriderError
from outrider.tokenization.tokenizer import Tokenizer
from outrider.training.artefact import Journal, write_lines
from outrider.training.conversations import Answerer, ChatTurn
from outrider.training.progress import Progress

__all__ = ["balanced", "header", "write_self_prompts"]

MARK = "\u241fuser text\u241f"
TRIES = 4  # attempts for each prompt asked for, at most
SIMILAR = 0.7  # Jaccard similarity of word triples above which two prompts are nearly the same
ROUND = 32  # attempts made at least before they are looked at
MARGIN = 1.1  # attempts made beyond those that the share kept so far asks for
PERMUTATIONS = 64  # of a MinHash
VARIED = 0.5  # least share of a text's word triples that are different ones
BUCKETS = 512  # hashed words of a topic vector
PER_TOPIC = 200  # prompts of a topic, on average
EXCESS = 2.0  # times that average that a topic may keep


def header(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of a conversation up to where the user's text begins, and those that end this text.

    Raises CheckpointError where there is no chat template; InvalidRequest where it does not show the user's text.
    """
    text = tokenizer.apply_chat([{"role": "user", "content": MARK}], add_generation_prompt=False)
    before, found, after = text.partition(MARK)
    if not found:
        raise InvalidRequest("the chat template does not hold the user's text as it is; give files of prompts instead")
    ends = tokenizer.encode(after, add_special_tokens=False)[:1]
    return tokenizer.encode(before, add_special_tokens=False), [*ends, *tokenizer.eos_token_ids]


def write_self_prompts(
    count: int,
    openings: Sequence[str],
    script: str | None,
    tokenizer: Tokenizer,
    answer: Callable[[Sequence[int]], Answerer],
    path: Path,
    progress: Progress,
    characters: tuple[int, int],
) -> Counter[str]:
    """Write up to ``count`` prompts to ``path``, lines ``{"turns": [text]}``; returns how many attempts were dropped,
    why. Attempts are kept in a journal beside it, from which an interrupted run goes on.

    ``openings``: how prompts begin, taken in turns; "" leaves it to the target. ``script``: the writing system of the
    letters, such as LATIN; None: any. ``answer`` makes an answerer that stops at the given tokens.
    """
    start, ends = header(tokenizer)
    attempts = path.with_suffix(".attempts.jsonl")
    kept, dropped = _Kept(), Counter[str]()

    with Journal(attempts) as journal:
        found = {record["number"]: record for record in journal.records}
        number = 0
        while len(kept.texts) < count and number < TRIES * count:
            wanted = range(number, min(number + _attempts(count, len(kept.texts), number), TRIES * count))
            number = wanted.stop
            todo = deque(_turns((i for i in wanted if i not in found), openings, start, tokenizer))
            for answers in answer(ends)(todo):
                records = [_record(turn, tokens, openings, ends, tokenizer) for turn, tokens in answers]
                journal.append(records)
                found |= {record["number"]: record for record in records}
                progress.advance(0, sum(len(tokens) for _, tokens in answers), f"{len(found)} attempts")
            before = len(kept.texts)
            for attempt in (found[i] for i in wanted):  # in their order, so that an interruption changes nothing
                reason = _refused(attempt, characters, script) or kept.add(attempt["text"])
                if reason is not None:
                    dropped[reason] += 1
            progress.advance(min(count, len(kept.texts)) - min(count, before))
    if not kept.texts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise OutriderError(f"the target wrote no usable prompt in {number} attempts ({reasons}); give files instead")
    texts = balanced(kept.texts[:count])
    dropped["of a topic with many others"] = min(count, len(kept.texts)) - len(texts)
    write_lines(path, ({"turns": [text]} for text in texts))  # whole: that it exists means that it is complete
    return dropped


def _attempts(count: int, kept: int, number: int) -> int:
    """Attempts of the next round, where ``number`` have given ``kept`` of ``count`` prompts."""
    share = max(kept, 1) / number if number else 1.0
    return max(ROUND, math.ceil(MARGIN * (count - kept) / share))


def _turns(
    numbers: Iterable[int], openings: Sequence[str], start: list[int], tokenizer: Tokenizer
) -> Iterator[ChatTurn]:
    begun = [tokenizer.encode(opening, add_special_tokens=False) if opening else [] for opening in openings]
    for number in numbers:
        yield ChatTurn(str(number), "self", start + begun[number % len(begun)], (), ())


def _record(
    turn: ChatTurn, tokens: list[int], openings: Sequence[str], ends: Sequence[int], tokenizer: Tokenizer
) -> dict[str, Any]:
    ended = bool(tokens) and tokens[-1] in ends
    text = openings[int(turn.id) % len(openings)] + tokenizer.decode_after(
        turn.tokens, tokens[:-1] if ended else tokens
    )
    special = any(token in tokenizer.special_ids for token in tokens[: -1 if ended else None])
    return {"number": int(turn.id), "text": text.strip(), "ended": ended, "special": special}


def _refused(record: dict[str, Any], characters: tuple[int, int], script: str | None) -> str | None:
    """Why an attempt is no prompt; None: it is one."""
    text = record["text"]
    if not record["ended"] or record["special"]:
        return "without an end"
    if not characters[0] <= len(text) <= characters[1]:
        return "too short or too long"
    letters = [char for char in text if char.isalpha()]
    if len(letters) < len(text) / 3:
        return "with hardly a letter"
    if script and sum(unicodedata.name(char, "").startswith(script) for char in letters) < 0.9 * len(letters):
        return f"not in {script.title()} letters"
    triples = _triples(text)
    if len(set(triples)) < VARIED * len(triples):
        return "repetitive"
    return None


def _triples(text: str) -> list[str]:
    words = text.casefold().split()
    return [" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))]


class _Kept:
    """Texts of which no two are nearly the same."""

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise OutriderError(
                "prompts that the target writes are compared by MinHash, which the package datasketch provides; "
                "install it: pip install 'outrider[train]'"
            ) from None
        self.texts: list[str] = []
        self._empty = MinHash(num_perm=PERMUTATIONS)  # copied, since making one draws its permutations anew
        self._index: Any = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)

    def add(self, text: str) -> str | None:
        """Keep a text; the reason where it is not kept."""
        sketch = self._empty.copy()
        sketch.update_batch([triple.encode() for triple in set(_triples(text))])
        if self._index.query(sketch):
            return "nearly the same as another"
        self._index.insert(len(self.texts), sketch)
        self.texts.append(text)
        return None


def balanced(texts: Sequence[str]) -> list[str]:
    """Texts without the excess of topics that have far more than their share, in their order."""
    topics = max(1, len(texts) // PER_TOPIC)
    if topics < 2:
        return list(texts)
    _, labels = kmeans2(_vectors(texts), topics, minit="++", seed=0, missing="warn")
    most, counts, kept = EXCESS * len(texts) / topics, Counter[int](), []
    for text, label in zip(texts, labels.tolist(), strict=True):
        counts[label] += 1
        if counts[label] <= most:
            kept.append(text)
    return kept


def _vectors(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Hashed words weighted by their rarity (TF-IDF), of unit length. [n, BUCKETS]"""
    vectors = np.zeros((len(texts), BUCKETS), np.float32)
    for row, text in zip(vectors, texts, strict=True):
        for word in set(text.casefold().split()):
            row[zlib.crc32(word.encode("utf-8", "surrogatepass")) % BUCKETS] += 1
    seen = (vectors > 0).sum(0)
    vectors *= np.log((1 + len(texts)) / (1 + seen)).astype(np.float32)
    return vectors / np.maximum(1e-6, np.linalg.norm(vectors, axis=1, keepdims=True))
