"""A smaller causal LM of the same vocabulary drafts, token by token, with a KV cache of its own.

Leviathan, Kalman and Matias (ICML 2023); Chen et al. (arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider import registry
from outrider.config import SamplingParams
from outrider.errors import CacheFull, IncompatibleDrafter, InvalidRequest
from outrider.sampling.distribution import Categorical, Processed
from outrider.sampling.processors import COLD, process
from outrider.types import (
    Context,
    DraftLoop,
    KVCache,
    PagedCache,
    Proposal,
    RaggedBatch,
    Rng,
    SharesPrefixes,
    TargetModel,
    Values,
)

__all__ = ["DraftModelConfig", "DraftModelDrafter"]

DRAFTER_KEYS = {
    *("dflash_config", "dspark_config", "eagle_config", "draft_vocab_size", "markov_rank", "num_target_layers"),
    *("speculators_config", "target_layer_ids", "ttt_length"),
}
"""Keys of trained drafters in several formats, which no whole model has."""
CHUNK = 512  # most tokens of one row in a catch-up pass, so that a long gap needs bounded scratch memory


@dataclass(frozen=True, slots=True)
class DraftModelConfig:
    """Options of the ``draft_model`` drafter. Raises InvalidRequest for values out of range."""

    model: str
    """The smaller model: a directory, a hub id, or a name that stands for an embedded one."""
    draft_tokens: int = 4
    """The most tokens it proposes in a round."""
    dtype: str = "auto"
    """Precision of the draft model alone; auto: int8 where the native core runs, else the target's. Rounding changes
    what it proposes a little, and its speed a lot; never the text."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise InvalidRequest(f"drafter draft_model: draft_tokens must be at least 1, got {self.draft_tokens}")


@dataclass(slots=True)
class _Row:
    capacity: int
    cache_slot: int  # in the draft model's KV cache
    cached: int = 0  # tokens of the row's history that the cache holds
    ahead: int = 0  # drafts it holds after them, until ``observe`` tells which were accepted


class DraftModelDrafter:
    """Samples drafts from the draft model under the row's own sampling options.

    The cache follows the row lazily. After a round it already holds the row's last token and all drafts but the
    final one; what it lacks (an accepted final draft, tokens of plain rounds, a prompt served from a prefix cache)
    is read from the history and folded into the next proposal's first pass.
    """

    Config = DraftModelConfig
    aux_layers: tuple[int, ...] = ()

    def __init__(
        self, model: TargetModel, draft_tokens: int, *, vocabulary: int | None = None, tokens: int | None = None
    ) -> None:
        """``vocabulary``: rows of the target's head (None: as many as the draft model's). ``tokens``: ids from here
        on are in no tokenizer, and are never drafted (None: all are)."""
        rows = model.spec.vocab_size
        self._vocabulary = rows if vocabulary is None else vocabulary
        self._tokens = min(rows, self._vocabulary, rows if tokens is None else tokens)
        self.block = draft_tokens
        self.model = model
        self._rows: dict[int, _Row] = {}
        self._cache: KVCache = model.new_cache(1, 1)
        self._slots = 1
        # The loop draws from all rows of the head, so it is for heads whose rows are all tokens of the target's.
        plain = self._tokens == rows == self._vocabulary
        self._draft_loop = model.draft_loop if plain and isinstance(model, DraftLoop) else None

    @classmethod
    def from_config(
        cls,
        config: DraftModelConfig,
        target: TargetModel,
        *,
        load_target: Callable[[str, str], TargetModel],
        tokens: int | None = None,
        **services: Any,
    ) -> DraftModelDrafter:
        """``load_target(model, dtype)`` makes the draft model; ``tokens``: size of the tokenizer that both models were
        found to share, None where that is not known.

        Heads may be padded to different numbers of rows if both hold all tokens. Raises IncompatibleDrafter.
        """
        model = load_target(config.model, config.dtype)
        rows = (model.spec.vocab_size, target.spec.vocab_size)
        if rows[0] != rows[1] and (tokens is None or tokens > min(rows)):
            raise IncompatibleDrafter(
                f"draft model {config.model!r} has a vocabulary of {model.spec.vocab_size} tokens, the target "
                f"{target.spec.name!r} one of {target.spec.vocab_size}; use a smaller model with the target's tokenizer"
            )
        return cls(model, config.draft_tokens, vocabulary=target.spec.vocab_size, tokens=tokens)

    @staticmethod
    def recognises(config: Mapping[str, Any]) -> bool:
        """Whether a directory with this config.json holds a causal LM, and not the layers of a trained drafter."""
        if DRAFTER_KEYS & config.keys():
            return False
        given = config.get("architectures")
        kinds = [str(kind) for kind in given] if isinstance(given, list) else []
        native = config.get("model_type") in registry.TARGETS
        if not kinds:
            return native
        if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
            return True
        return native and any(kind.endswith("ForConditionalGeneration") for kind in kinds)

    def open(self, slot: int, capacity: int) -> None:
        capacity = min(capacity, self.model.spec.max_positions)
        if capacity > self._cache.capacity:
            self._renew(self._slots, capacity)
        try:
            cache_slot = self._cache.open()
        except CacheFull:
            self._renew(2 * self._slots, self._cache.capacity)
            cache_slot = self._cache.open()
        self._rows[slot] = _Row(capacity, cache_slot)

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        """Rows draft together. A row near the end of the draft model's context drafts less, past it nothing.

        Confidence is the draft model's largest probability before sampling options: it is known before the token is.
        """
        rows = [self._rows[slot] for slot in slots]
        starts = [len(context.history[b]) for b in range(len(rows))]  # position of the first draft
        lengths = [
            max(0, min(most, self.block, row.capacity + 1 - start))
            for row, start, most in zip(rows, starts, limit, strict=True)
        ]
        width = max(lengths, default=0)
        if width == 0:
            return Proposal.empty(len(rows))
        # Longest drafts first: the rows that still draft at depth j are then a prefix.
        order = sorted((b for b, n in enumerate(lengths) if n), key=lambda b: -lengths[b])
        missing = self._catch_up([rows[b] for b in order], [context.history[b] for b in order])
        plain = context.processors is None and all(map(_plain, context.params[: len(rows)]))
        if self._draft_loop is not None and min(lengths) == width and plain:
            return self._draft_at_once(missing, context, width, rng)
        live = [sum(lengths[b] > j for b in order) for j in range(width)]
        index, cache_slots, positions = torch.tensor(
            [order, [rows[b].cache_slot for b in order], [starts[b] for b in order]], dtype=torch.int64
        ).unbind()
        offsets = torch.arange(len(order) + 1)
        seen = torch.zeros(len(rows), width, dtype=torch.int64)  # the drafts so far, for penalties and grammars
        distributions: list[Processed] = []
        drafts: list[Tensor] = []
        confidence: list[Tensor] = []

        logits = self._run(missing, logits=True)
        for j, n in enumerate(live):
            live_index, live_positions = index[:n], positions[:n]
            if j:
                batch = RaggedBatch(drafts[-1][:n], live_positions - 1, cache_slots[:n], offsets[: n + 1])
                logits = self._fit(self.model.forward(batch, self._cache).logits)
            distribution = process(logits, context, live_index, torch.full((n,), j), drafted=seen)
            keys = None if distribution.is_greedy else rng.token_keys(live_index, live_positions, "draft")
            distributions.append(distribution)
            drafts.append(distribution.argmax() if keys is None else self.model.backend.sample(distribution, keys))
            confidence.append(_largest_probability(logits))
            if context.stepwise:
                seen[live_index, j] = drafts[-1]
            positions = positions + 1
        for b in order:
            rows[b].ahead = lengths[b] - 1  # the final draft is never run
        grid = _grid(len(rows), order, live)
        greedy = all(distribution.is_greedy for distribution in distributions)
        return Proposal(
            torch.cat(drafts)[grid],
            torch.tensor(lengths, dtype=torch.int64),
            None if greedy else Categorical.concatenate(distributions).take(grid.flatten()),
            torch.cat(confidence)[grid],
        )

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Note how many drafts were accepted; run prompts as they come.

        A run of several tokens right behind the cache is a prompt's chunk. The single token of a plain round waits,
        since a row that never drafts again should not pay for it.
        """
        tokens, positions, slots, offsets = batch.lists
        chunks: list[tuple[_Row, list[int]]] = []
        for slot, first, end in zip(slots, offsets, offsets[1:], strict=False):
            if first == end:
                continue
            row, start, after = self._rows[slot], positions[first], positions[end - 1] + 1
            if row.ahead:
                row.cached = min(row.cached + row.ahead, after)
                row.ahead = 0
            elif start == row.cached and after - start > 1 and after <= row.capacity:
                chunks.append((row, tokens[first:end]))
        if chunks:
            self._run(chunks)

    def match(self, tokens: Sequence[int]) -> int:
        """See ``outrider.types.SharesPrefixes``."""
        return self._cache.match(tokens) if isinstance(self._cache, SharesPrefixes) else 0

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        row = self._rows[slot]
        if isinstance(self._cache, SharesPrefixes) and count <= row.capacity:
            self._cache.adopt(row.cache_slot, tokens, count)
            row.cached = count

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        row = self._rows[slot]
        if isinstance(self._cache, SharesPrefixes) and row.cached:
            self._cache.publish(row.cache_slot, tokens[: row.cached])

    def forget(self) -> None:
        """Drop what finished sequences have left."""
        if isinstance(self._cache, PagedCache):
            self._cache.forget()

    def reset_rows(self) -> None:
        """Close all slots at once, with a cache made anew."""
        self._rows.clear()
        self._cache = self.model.new_cache(self._slots, self._cache.capacity)

    def close(self, slot: int) -> None:
        self._cache.release(self._rows.pop(slot).cache_slot)

    def _catch_up(self, rows: Sequence[_Row], histories: Sequence[list[int]]) -> list[tuple[_Row, list[int]]]:
        """Rewind rejected drafts. -> the tokens the first pass must run, up to and with the last one"""
        for row, history in zip(rows, histories, strict=True):
            row.cached = min(row.cached, len(history) - 1)  # a round that was not observed
        self._cache.rewind([row.cache_slot for row in rows], [row.cached for row in rows])
        missing = []
        for row, history in zip(rows, histories, strict=True):
            row.ahead = 0
            while len(history) - row.cached > CHUNK:
                self._run([(row, history[row.cached : row.cached + CHUNK])])
            missing.append((row, history[row.cached :]))
        return missing

    def _draft_at_once(
        self, missing: Sequence[tuple[_Row, list[int]]], context: Context, width: int, rng: Rng
    ) -> Proposal:
        """All rows draft ``width`` tokens in one call of the backend; the same drafts, without Python in between."""
        assert self._draft_loop is not None
        count = len(missing)
        rows = torch.arange(count).repeat_interleave(width) if count > 1 else torch.zeros(width, dtype=torch.int64)
        positions = [len(context.history[b]) + j for b in range(count) for j in range(width)]
        temperatures = [p.temperature for p in context.params[:count]]
        if any(temperatures):
            keys = rng.token_keys(rows, torch.tensor(positions, dtype=torch.int64), "draft").view(count, width)
        else:
            keys = torch.zeros(count, width, dtype=torch.int64)
        batch = self._batch(missing)
        tokens, logits = self._draft_loop(batch, self._cache, keys, torch.tensor(temperatures, dtype=torch.float32))
        for row, _ in missing:
            row.ahead = width - 1
        distribution = process(logits, context, rows) if any(temperatures) else None
        lengths = torch.full((count,), width, dtype=torch.int64)
        return Proposal(tokens, lengths, distribution, _largest_probability(logits).view(count, width))

    def _run(self, chunks: Sequence[tuple[_Row, list[int]]], logits: bool = False) -> Tensor:
        """Append tokens to the rows' cache. -> logits [B, V] after each chunk, or none."""
        batch = self._batch(chunks)
        wanted = batch.offsets[1:] - 1 if logits else batch.offsets[:0]
        return self._fit(self.model.forward(batch, self._cache, logits_at=wanted).logits)

    def _fit(self, logits: Tensor) -> Tensor:
        """[R, rows of the draft model's head] -> [R, V] of the target, with -inf for what is never drafted."""
        if self._tokens == logits.shape[1] == self._vocabulary:
            return logits
        fitted = logits.new_full((len(logits), self._vocabulary), -torch.inf)
        fitted[:, : self._tokens] = logits[:, : self._tokens]
        return fitted

    def _batch(self, chunks: Sequence[tuple[_Row, list[int]]]) -> RaggedBatch:
        """The next tokens of each row, which from now on count as cached."""
        starts, most = [row.cached for row, _ in chunks], self.model.spec.vocab_size - 1
        for row, tokens in chunks:
            row.cached += len(tokens)
        # The target may have sampled from its padding: the draft model may have no such row, and reads its last one.
        known = [[min(token, most) for token in tokens] for _, tokens in chunks]
        return RaggedBatch.pack(known, starts, [row.cache_slot for row, _ in chunks])

    def _renew(self, slots: int, capacity: int) -> None:
        """A larger cache. Open rows start empty in it and catch up when they next draft."""
        self._cache, self._slots = self.model.new_cache(slots, capacity), slots
        for row in self._rows.values():
            row.cache_slot, row.cached, row.ahead = self._cache.open(), 0, 0


def _largest_probability(logits: Tensor) -> Tensor:
    """float32 [R]: max softmax(logits). numpy on a CPU: the sum is too small to be worth starting torch's threads."""
    if logits.device.type != "cpu":
        return logits.float().softmax(-1).amax(-1)
    values = logits.float().numpy()
    return torch.from_numpy(1 / np.exp(values - values.max(1, keepdims=True)).sum(1))


def _plain(params: SamplingParams) -> bool:
    """Whether sampling is plain softmax(logits / temperature) or argmax, which a backend can do by itself."""
    processed = params.top_k or params.top_p != 1 or params.min_p or params.penalised or params.logit_bias
    return not processed and (params.temperature == 0 or params.temperature >= COLD)


def _grid(rows: int, order: Sequence[int], live: Sequence[int]) -> Tensor:
    """int64 [B, K]: which draft, counted in the order they were made, is token (b, j).

    Positions without a draft point to the first one: nothing reads them.
    """
    grid = [[0] * len(live) for _ in range(rows)]
    made = 0
    for j, n in enumerate(live):
        for b in order[:n]:
            grid[b][j] = made
            made += 1
    return torch.tensor(grid, dtype=torch.int64)
