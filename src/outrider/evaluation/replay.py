"""Acceptance of a trained drafter along recorded text of the target, without decoding again.

The target generates greedy text once; its logits and features are kept. Any number of drafters, or readings of one
checkpoint, then draft at the same positions of this text. Two measures of acceptance per position:

greedy    number of drafts equal to the text: what greedy decoding would accept
expected  sum_j prod_{i<=j} (1 - TV(p_i, q_i)) at temperature 1: what rejection sampling would accept on average. It
          depends on every logit, so it also separates readings that draft the same tokens.

The acceptance length is 1 + either, for the bonus token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from outrider.drafters.base import CachedDrafter
from outrider.errors import CheckpointError, InvalidRequest
from outrider.files import read_json_lines
from outrider.models.loading import load_tokenizer
from outrider.models.locations import EMBEDDED_PROMPTS
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import RaggedBatch, TargetModel

__all__ = ["Acceptance", "Prompts", "Transcript", "least_score", "replay", "sample_prompts", "transcribe"]

PROMPT_TOKENS = 128  # longer prompts are cut: they do not improve drafting
RANDOM_PROMPTS = (8, 12, 16, 24)  # lengths of random prompts, for targets without a tokenizer
MARGIN = 1.25
EXPECTED = '{"turns": ["..."]} or {"ids": [...]}'
POSITIONS = 40  # most drafted positions per text


@dataclass(frozen=True, slots=True)
class Transcript:
    """The target's greedy text after one prompt."""

    tokens: list[int]
    prompt_length: int
    features: dict[int, Tensor]  # layer -> [N, D]
    logits: Tensor  # [N - prompt_length + 1, V]: row i follows token prompt_length - 1 + i


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Accepted drafts at each drafted position, in the same order for every drafter on the same transcripts."""

    greedy: Tensor  # float32 [positions]
    expected: Tensor  # float32 [positions]

    @property
    def greedy_length(self) -> float:
        """Acceptance length of greedy decoding, bonus token included."""
        return 1 + float(self.greedy.mean())

    @property
    def expected_length(self) -> float:
        """Acceptance length at temperature 1, bonus token included."""
        return 1 + float(self.expected.mean())

    @property
    def score(self) -> float:
        """Accepted drafts per round: the mean of the two measures."""
        return float((self.greedy + self.expected).mean()) / 2

    def advantage(self, other: Acceptance) -> tuple[float, float]:
        """Difference of the scores, and the same in standard errors (paired by position)."""
        gain = (self.greedy + self.expected - other.greedy - other.expected) / 2
        error = float(gain.std()) / len(gain) ** 0.5
        return float(gain.mean()), float(gain.mean()) / error if error else 0.0


class Prompts(NamedTuple):
    """Token ids of prompts, and their source."""

    ids: list[list[int]]
    source: str
    natural: bool  # real text, not random tokens


def sample_prompts(target: Path, file: Path | None = None, count: int = 4) -> Prompts:
    """Prompts from a JSON Lines file (``turns`` of text, or ``ids``), else the packaged prompts, else random ids for a
    target without a tokenizer.

    Raises InvalidRequest for any other file.
    """
    tokenizer = load_tokenizer(target) if target.is_file() or (target / "tokenizer.json").exists() else None
    if file is not None:
        prompts = [_prompt(entry, number, file, tokenizer) for number, entry in _lines(file)]
        if not prompts:
            raise InvalidRequest(f"{file} holds no prompts; expected JSON Lines with `turns` or `ids`")
        return Prompts(prompts[:count], f"{min(count, len(prompts))} prompts of {file.name}", natural=True)
    if tokenizer is not None:
        sets = [_lines(path) for path in sorted(EMBEDDED_PROMPTS.glob("*.jsonl"))]
        mixed = [lines[i] for i in range(count) for lines in sets if i < len(lines)][:count]
        ids = [_prompt(entry, number, target, tokenizer) for number, entry in mixed]
        return Prompts(ids, f"{len(ids)} packaged prompts", natural=True)
    config = json.loads((target / "config.json").read_text())
    size = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, size, (n,), generator=generator).tolist() for n in RANDOM_PROMPTS[:count]]
    source = f"{len(ids)} random prompts (the target has no tokenizer; give better ones with --prompts)"
    return Prompts(ids, source, natural=False)


def _lines(file: Path) -> list[tuple[int, Any]]:
    return list(read_json_lines(file, EXPECTED, "prompts"))


def _prompt(entry: Any, number: int, file: Path, tokenizer: Tokenizer | None) -> list[int]:
    try:
        ids = entry.get("ids")
        text = "" if ids is not None else entry["turns"][0]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{file} line {number}: expected {EXPECTED}, got {str(entry)[:60]!r}") from error
    if ids is None:
        if tokenizer is None:
            raise InvalidRequest(f'{file} line {number}: the target has no tokenizer; give {{"ids": [...]}}')
        ids = tokenizer.encode(text)
    if not ids or not all(isinstance(token, int) for token in ids):
        raise InvalidRequest(f"{file} line {number}: expected token ids, got {str(ids)[:60]}")
    return ids[:PROMPT_TOKENS]


@torch.inference_mode()
def transcribe(
    target: TargetModel, prompts: Sequence[Sequence[int]], layers: Sequence[int], new_tokens: int = 48
) -> list[Transcript]:
    """Greedy text of the target after each prompt, with the features of ``layers`` at every position.

    Raises CheckpointError for a prompt with ids the target does not have.
    """
    size = target.spec.vocab_size
    for prompt in prompts:
        if not 0 <= min(prompt) <= max(prompt) < size:
            raise CheckpointError(f"a prompt has token {max(prompt)}; the target's last token is {size - 1}")
    cache = target.new_cache(len(prompts), max(len(p) for p in prompts) + new_tokens + 1)
    slots = [cache.open() for _ in prompts]
    tokens, parts = [list(prompt) for prompt in prompts], [[] for _ in prompts]  # type: ignore[var-annotated]
    chunks, logits = [list(prompt) for prompt in prompts], [[] for _ in prompts]  # type: ignore[var-annotated]
    for _ in range(new_tokens):
        starts = [len(text) - len(chunk) for text, chunk in zip(tokens, chunks, strict=True)]
        batch = RaggedBatch.pack(chunks, starts, slots)
        output = target.forward(batch, cache, layers, batch.offsets[1:] - 1)
        assert output.features is not None
        chunks = []
        for row, features in enumerate(output.features.split(batch.lengths.tolist())):
            parts[row].append(features.clone())
            logits[row].append(output.logits[row].clone())
            chunks.append([int(output.logits[row].argmax())])
            tokens[row] += chunks[-1]
    transcripts = []
    for row, prompt in enumerate(prompts):
        by_layer = torch.cat(parts[row]).chunk(len(layers), -1)
        features = dict(zip(layers, by_layer, strict=True))
        transcripts.append(Transcript(tokens[row], len(prompt), features, torch.stack(logits[row])))
    return transcripts


@torch.inference_mode()
def replay(drafter: CachedDrafter, transcripts: Sequence[Transcript], longest: int = 0) -> Acceptance:
    """Draft along the transcripts. ``drafter.aux_layers`` must be among their layers; its slots 0, 1, ... must be free.

    ``longest``: the most drafts of any drafter to be compared, so that all draft at the same positions.
    """
    drafts = drafter.block
    positions = [_positions(transcript, max(longest, drafts)) for transcript in transcripts]
    if not any(positions):
        raise InvalidRequest(f"the texts are too short to draft {drafts} tokens; ask for more new tokens")
    greedy, expected = [], []
    features = [torch.cat([t.features[layer] for layer in drafter.aux_layers], -1) for t in transcripts]
    for slot, transcript in enumerate(transcripts):
        drafter.open(slot, len(transcript.tokens))
    for step in range(max(len(p) for p in positions)):
        slots = [slot for slot, p in enumerate(positions) if step < len(p)]
        ends = [positions[slot][step] for slot in slots]
        starts = [drafter.cache.end_of(slot) for slot in slots]
        rows = [(transcripts[slot], start, end) for slot, start, end in zip(slots, starts, ends, strict=True)]
        batch = RaggedBatch.pack([t.tokens[start:end] for t, start, end in rows], starts, slots)
        parts = [features[slot][start:end] for slot, (_, start, end) in zip(slots, rows, strict=True)]
        drafter.observe(batch, torch.cat(parts))
        path = torch.tensor([t.tokens[end : end + drafts + 1] for t, _, end in rows])
        logits = drafter.follow(slots, path[:, :drafts])[0]
        for (t, _, end), drafted, tokens in zip(rows, logits, path, strict=True):
            drafted = drafter.net.spread(drafted).float()
            target = t.logits[end - t.prompt_length + 1 :][:drafts].float()
            shared = torch.minimum(drafted.softmax(-1), target.softmax(-1)).sum(-1)
            expected.append(shared.cumprod(0).sum())
            greedy.append((drafted.argmax(-1) == tokens[1:]).float().cumprod(0).sum())
    for slot in range(len(transcripts)):
        drafter.close(slot)
    return Acceptance(torch.stack(greedy), torch.stack(expected))


def least_score(transcripts: Sequence[Transcript], drafts: int) -> float:
    """The least score of a working drafter: MARGIN times the score of drafting every token from the texts' mean
    distribution, whatever the position."""
    distributions = [t.logits.float().softmax(-1) for t in transcripts]
    mean = torch.cat(distributions).mean(0)
    shared = float(torch.cat([torch.minimum(distribution, mean).sum(-1) for distribution in distributions]).mean())
    tokens = torch.tensor([token for t in transcripts for token in t.tokens[t.prompt_length :]])
    guessed = float((tokens == mean.argmax()).float().mean())
    return MARGIN * sum(guessed**j + shared**j for j in range(1, drafts + 1)) / 2


def _positions(transcript: Transcript, drafts: int) -> list[int]:
    """Positions of the last token before a draft, where the text is long enough to compare every draft."""
    first, last = transcript.prompt_length, len(transcript.tokens) - drafts - 1
    return list(range(first, last + 1, max(1, (last + 1 - first) // POSITIONS)))
