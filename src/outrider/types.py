"""The values that pass between packages, and the contracts of targets, drafters, policies, backends and caches.

Shape legend, used in names and docstrings everywhere:
B rows in a step   K drafted tokens at most   T packed tokens   R rows of logits   V vocabulary   D model width
F feature width (= auxiliary layers x D)   H heads   Hkv key/value heads   Dh head width   N training tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams, StackConfig

__all__ = [
    "AutoregressiveParts",
    "Backend",
    "BlockDrafter",
    "BlockParts",
    "Context",
    "Distribution",
    "DraftLoop",
    "DraftReport",
    "Drafter",
    "Drafts",
    "DraftsBlocks",
    "DraftsInTurn",
    "Event",
    "Forgets",
    "HasStack",
    "InTurnDrafter",
    "KVCache",
    "MarkovParts",
    "Mask",
    "Output",
    "PagedCache",
    "PagedTarget",
    "Piece",
    "Processor",
    "Proposal",
    "RaggedBatch",
    "ReadsHidden",
    "RequestRows",
    "RequestStats",
    "ResetsRows",
    "Rng",
    "RowRecord",
    "SchedulerPolicy",
    "SharesPrefixes",
    "Stack",
    "StackOutput",
    "StepCost",
    "StepObserver",
    "StepRecord",
    "StepView",
    "StepsAside",
    "TargetModel",
    "TargetOutput",
    "TargetSpec",
    "TiedHead",
    "TokenLogprobs",
    "Verification",
]

Mask = Literal["causal", "block"]
"""Who a new token attends to beside the cached ones: new tokens up to itself, or all new tokens of its row."""


# ------------------------------------------------------------------------------------------------ values


Integers = npt.NDArray[np.int64]


class RaggedBatch:
    """Some new tokens of some rows. Prefill chunk, decode and verify are all this.

    It is not changed once made. Of its forms (lists, and numpy arrays and tensors on the same memory) those that it was
    not made from are made when they are asked for: right after a pass each array or tensor takes several microseconds.
    """

    __slots__ = ("_arrays", "_lists", "_tensors")

    def __init__(self, tokens: Tensor, positions: Tensor, slots: Tensor, offsets: Tensor) -> None:
        """See the properties of these names."""
        self._tensors: tuple[Tensor, Tensor, Tensor, Tensor] | None = (tokens, positions, slots, offsets)
        self._arrays: tuple[Integers, Integers, Integers, Integers] | None = None
        self._lists: tuple[list[int], list[int], list[int], list[int]] | None = None

    @classmethod
    def of_lists(cls, tokens: list[int], positions: list[int], slots: list[int], offsets: list[int]) -> RaggedBatch:
        """The same from Python's integers."""
        batch = cls.__new__(cls)
        batch._lists = tokens, positions, slots, offsets
        batch._arrays = batch._tensors = None
        return batch

    @classmethod
    def pack(cls, rows: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int]) -> RaggedBatch:
        """Pack rows of token ids, row b starting at position ``starts[b]``."""
        tokens = [token for row in rows for token in row]
        positions = [start + i for row, start in zip(rows, starts, strict=True) for i in range(len(row))]
        offsets = [0]
        for row in rows:
            offsets.append(offsets[-1] + len(row))
        return cls.of_lists(tokens, positions, list(slots), offsets)

    @property
    def lists(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens, positions, slots and offsets. Not to be written to."""
        if self._lists is None:
            tokens, positions, slots, offsets = self.tensors
            self._lists = tokens.tolist(), positions.tolist(), slots.tolist(), offsets.tolist()
        return self._lists

    @property
    def arrays(self) -> tuple[Integers, Integers, Integers, Integers]:
        """Tokens, positions, slots and offsets. Raises TypeError for tensors on another device than the CPU."""
        if self._arrays is None and self._lists is not None:
            tokens, positions, slots, offsets = self._lists
            whole = np.array([*tokens, *positions, *slots, *offsets], np.int64)  # one allocation
            t, b = len(tokens), len(slots)
            self._arrays = whole[:t], whole[t : 2 * t], whole[2 * t : 2 * t + b], whole[2 * t + b :]
        elif self._arrays is None:
            given, at, rows, ends = self.tensors
            self._arrays = given.numpy(), at.numpy(), rows.numpy(), ends.numpy()
        return self._arrays

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, positions, slots and offsets."""
        if self._tensors is None:
            tokens, positions, slots, offsets = map(torch.from_numpy, self.arrays)
            self._tensors = tokens, positions, slots, offsets
        return self._tensors

    @property
    def tokens(self) -> Tensor:
        """int64 [T]"""
        return self.tensors[0]

    @property
    def positions(self) -> Tensor:
        """int64 [T]: the absolute position of each token in its sequence; consecutive within a row."""
        return self.tensors[1]

    @property
    def slots(self) -> Tensor:
        """int64 [B]: the memory slot of each row."""
        return self.tensors[2]

    @property
    def offsets(self) -> Tensor:
        """int64 [B+1]: row b owns tokens[offsets[b]:offsets[b+1]]."""
        return self.tensors[3]

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: new tokens of each row."""
        return self.offsets.diff()

    def __len__(self) -> int:
        """T"""
        return len(self.tensors[0] if self._lists is None else self._lists[0])


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What one target pass gives."""

    logits: Tensor  # float [R, V]          of the packed tokens asked for (``logits_at``; all T of them by default)
    features: Tensor | None  # [T, F]       raw residual after each auxiliary layer, before the final norm
    hidden: Tensor | None = None  # [R, D]  what ``unembed`` made the logits of, where the target can tell


@dataclass(frozen=True, slots=True)
class StackOutput:
    """What one pass through a layer stack gives."""

    hidden: Tensor  # [R, D]               after the final norm, at ``logits_at``
    logits: Tensor | None  # float [R, V]  None where the stack has no head
    features: Tensor | None  # [T, F]


class Distribution(Protocol):
    """R distributions of the next token, each as it is really sampled from (float32 or float64)."""

    def __len__(self) -> int: ...
    def at(self, tokens: Tensor) -> Tensor:
        """Probability of ``tokens[r]`` in row r. int64 [R] -> [R]."""
        ...

    def dense(self, rows: Tensor) -> Tensor:
        """Full rows of probabilities. int64 [n] -> [n, V]."""
        ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a drafter proposes for each row."""

    tokens: Tensor  # int64 [B, K]        entries past ``lengths[b]`` are meaningless
    lengths: Tensor  # int64 [B]          0 <= lengths <= limit
    distribution: Distribution | None = None
    # The distribution each token was really drawn from: row b * K + j is token (b, j); None = deterministic.
    # (lengths[b] >= j) may depend on tokens[b, :j] only.
    confidence: Tensor | None = None  # float32 [B, K]  P(token j accepted | those before were); from tokens[b, :j] only
    parents: Tensor | None = None  # int64 [B, K]  a tree: the token each follows, -1 the row's last; None = a chain

    @staticmethod
    def empty(rows: int) -> Proposal:
        """No drafts at all: the step is plain decoding. Not to be written to: one proposal serves every such step."""
        return _empty(rows)

    @staticmethod
    def pack(tokens: Sequence[Sequence[int]], confidence: Sequence[Sequence[float]]) -> Proposal:
        """Pad ragged deterministic drafts, and how sure of each token the drafter is, to the longest row."""
        lengths = [len(row) for row in tokens]
        shape = len(lengths), max(lengths, default=0)
        drafts = np.array([[*row, *[0] * (shape[1] - len(row))] for row in tokens], np.int64)
        sure = np.array([[*row, *[0.0] * (shape[1] - len(row))] for row in confidence], np.float32)
        return Proposal(
            torch.from_numpy(drafts.reshape(shape)),
            torch.from_numpy(np.array(lengths, np.int64)),
            None,
            torch.from_numpy(sure.reshape(shape)),
        )


@cache
def _empty(rows: int) -> Proposal:
    with torch.inference_mode(False):  # ordinary tensors, for callers in any mode
        return Proposal(torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))


class Verification:
    """The result of verifying a proposal. It is not changed once made; the form that it was not made from, tensors or
    lists, is made when it is asked for."""

    __slots__ = ("_lists", "_tensors")

    def __init__(self, accepted: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """See the properties of these names."""
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = (accepted, tokens, lengths)
        self._lists: tuple[list[int], list[list[int]]] | None = None

    @classmethod
    def of_lists(cls, accepted: list[int], tokens: list[list[int]]) -> Verification:
        """The same from Python's integers."""
        made = cls.__new__(cls)
        made._tensors, made._lists = None, (accepted, tokens)
        return made

    @classmethod
    def of(cls, accepted: Tensor, drafted: Tensor, bonus: Tensor) -> Verification:
        """accepted [B], drafted [B, K], bonus [B]: the token after the accepted ones."""
        tokens = torch.cat([drafted, bonus[:, None]], 1).scatter(1, accepted[:, None], bonus[:, None])
        return cls(accepted, tokens, accepted + 1)

    @property
    def lists(self) -> tuple[list[int], list[list[int]]]:
        """``accepted`` and ``tokens``."""
        if self._lists is None:
            accepted, tokens, _ = self.tensors
            self._lists = accepted.tolist(), tokens.tolist()
        return self._lists

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``accepted``, ``tokens`` and ``lengths``."""
        if self._tensors is None:
            accepted, tokens = (torch.from_numpy(np.array(part, np.int64)) for part in self.lists)
            self._tensors = accepted, tokens, accepted + 1
        return self._tensors

    @property
    def accepted(self) -> Tensor:
        """int64 [B]: drafted tokens kept."""
        return self.tensors[0]

    @property
    def tokens(self) -> Tensor:
        """int64 [B, K+1]: accepted tokens, then the bonus token (the recovered one after a rejection)."""
        return self.tensors[1]

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: accepted + 1."""
        return self.tensors[2]


@dataclass(frozen=True, slots=True)
class Context:
    """What sampling depends on besides logits: each row's request and its committed tokens."""

    params: Sequence[SamplingParams]  # B
    history: Sequence[list[int]]  # B lists: prompt and output so far, the last committed token included
    prompt_lengths: Sequence[int]  # B
    processors: Sequence[Sequence[Processor]] | None = None  # B: applied after the request's own (a grammar's mask)

    @property
    def stepwise(self) -> bool:
        """Whether the distribution of some row depends on the tokens before it by other ways than the model."""
        return self.processors is not None or any(p.penalised for p in self.params)


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of logits that belong to one request."""

    index: npt.NDArray[np.int64]  # [n] in the logits
    depth: npt.NDArray[np.int64]  # [n] drafted tokens each row follows
    tokens: list[int]  # the request's history, then its drafts up to the largest depth
    prompt_length: int


class Processor(Protocol):
    """Changes the logits of one request's rows in place; a row may depend on the tokens it follows alone."""

    def __call__(self, logits: Tensor, rows: RequestRows) -> None:
        """logits [R, V]"""
        ...


@dataclass(slots=True)
class RequestStats:
    """Counts of one request. The token that prefill gives belongs to no round."""

    rounds: int = 0  # target passes after prefill
    drafted: int = 0  # drafted tokens that were verified
    accepted: int = 0
    generated: int = 0  # committed tokens
    seconds: float = 0.0  # from the first prefill to the last commit
    accepted_per_position: list[int] = field(default_factory=list)  # rounds that accepted at least j + 1 drafts
    drafted_per_position: list[int] = field(default_factory=list)  # rounds that verified at least j + 1 drafts
    cached_tokens: int = 0  # of the prompt: taken over from an earlier request instead of computed

    @property
    def acceptance_length(self) -> float:
        """Mean tokens a round commits: accepted drafts plus the bonus token."""
        return (self.generated - 1) / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the target's probabilities at one position: softmax of its logits as they are."""

    logprob: float  # of the committed token
    top: tuple[tuple[int, float], ...]  # token ids with theirs, the likeliest first; on ties the lowest id


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What the drafter said of a draft."""

    probability: float | None  # with which it was drawn; None: it was not sampled
    confidence: float | None  # that it would be accepted; None: the drafter reports none


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one committed token (may be empty while a character is incomplete)."""

    token_id: int
    text: str
    drafted: bool  # the drafter proposed it and the target accepted it
    logprobs: TokenLogprobs | None = None  # where the request asked for them
    draft: DraftReport | None = None  # of an accepted draft, where the request asked for log-probabilities


@dataclass(frozen=True, slots=True)
class Event:
    """New text of one request."""

    request: int  # index of the prompt
    pieces: tuple[Piece, ...]
    finish_reason: str | None = None  # "stop" | "length" | "cancelled"; set on the last event

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Output:
    """One finished request."""

    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RequestStats


@dataclass(frozen=True, slots=True)
class StepCost:
    """Measured seconds of one step, for the policy."""

    draft: float
    verify: float
    bookkeeping: float
    rows: int
    tokens: int  # in the target pass: prompt chunks, each row's last token and its drafts
    context: int  # cached tokens over all rows
    follow: float = 0.0  # of bookkeeping: showing the drafter what was committed


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """All that a drafter may know of a target besides its tensors."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    dtype: torch.dtype
    name: str = ""
    eos_token_ids: tuple[int, ...] = ()
    defaults: dict[str, float] = field(default_factory=dict)  # sampling defaults of generation_config.json


@dataclass(frozen=True, slots=True)
class StepView:
    """What a policy may know before drafting: the past of each of the B rows that are ready to draft."""

    contexts: Sequence[int]  # B: committed tokens, the prompt included
    stats: Sequence[RequestStats]  # B: rounds, drafts and accepted drafts so far; read only
    params: Sequence[SamplingParams]  # B
    slots: Sequence[int] = ()  # B: the row's slot; empty: 0, 1, ...
    requests: Sequence[int] = ()  # B: the number of the row's request; empty: unknown
    can_draft: int = -1  # only so many rows, the first ones, can be drafted for; -1: all
    tokens: int = 0  # of the target pass without drafts: B, and chunks of prompts beside them; 0: B
    rows: int = 0  # of the target pass; 0: B
    context: int = 0  # cached tokens over all rows of the pass; 0: those of the B rows

    def __len__(self) -> int:
        return len(self.contexts)


@dataclass(frozen=True, slots=True)
class RowRecord:
    """One row of a step, as it was committed."""

    request: int  # the request's number, unique in its engine
    limit: int  # drafts the policy allowed
    drafted: int
    verified: int
    accepted: int  # drafts that are part of the text: none behind its end
    committed: tuple[int, ...]  # new tokens: the accepted drafts, then the bonus token unless the text ended before it
    confidence: tuple[float, ...] | None  # of each draft; None: the drafter reports none
    first: bool  # the token that follows the prompt's own pass: it belongs to no round


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, after its commit."""

    rows: tuple[RowRecord, ...]  # those that committed tokens
    cost: StepCost


# ------------------------------------------------------------------------------------------------ contracts


class Rng(Protocol):
    """Randomness as an argument, keyed by (request seed, round, position, purpose); see ``outrider.sampling.rng``.

    ``position`` counts the sequence's tokens from 0, so the token that follows ``history`` has position
    ``len(history)``. A row never depends on its neighbours.
    """

    def uniform(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        """float64 in (0, 1), one for each (row, position). int64 [n], int64 [n] -> [n]."""
        ...

    def token_keys(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        """int64 [n]: the key from which a Gumbel value for every token id is derived (``rng.gumbel``)."""
        ...


@runtime_checkable
class KVCache(Protocol):
    """The keys and values of a layer stack: append, then take back exactly."""

    capacity: int  # tokens a slot can hold
    lengths: Tensor  # int64 [slots]   tokens each slot holds

    def open(self) -> int:
        """Take a free slot. Raises CacheFull."""
        ...

    def reserve(self, slot: int, tokens: int) -> bool:
        """Make room for ``tokens`` in a slot, those it holds included. False: there is no memory for them now; what
        the slot holds is untouched, and the caller may release another slot and ask again."""
        ...

    def rewind(self, slots: Tensor, lengths: Tensor) -> None:
        """Forget everything past ``lengths[b]`` tokens of slot ``slots[b]``."""
        ...

    def release(self, slot: int) -> None:
        """Give a slot and its memory back. A preempted row is released and computed again later."""
        ...


@runtime_checkable
class SharesPrefixes(Protocol):
    """A KV cache, or a drafter that has one, in which sequences that begin alike share what they hold, during their
    lives and afterwards."""

    def match(self, tokens: Sequence[int]) -> int:
        """How many tokens from the beginning of a sequence are held."""
        ...

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """Begin an empty slot with the first ``count`` tokens of a sequence, at most as many as ``match`` has found."""
        ...

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """Let others take over what a slot holds; ``tokens`` of the sequence, from its start."""
        ...


@runtime_checkable
class PagedCache(KVCache, SharesPrefixes, Protocol):
    """A cache whose slots share blocks of one pool, so that ``reserve`` says what memory there really is."""

    block_bytes: int
    block_tokens: int
    blocks: int  # in all

    @property
    def free_blocks(self) -> int: ...  # that ``reserve`` can still get

    def forget(self) -> None:
        """Drop what finished sequences have left."""
        ...

    def reset(self) -> None:
        """Release every slot; what was published stays."""
        ...


@runtime_checkable
class PagedTarget(Protocol):
    """A stack or target with such a cache."""

    def paged_cache(
        self, slots: int, capacity: int, memory: int | None = None, kv_dtype: str = "auto", ahead: int = 0
    ) -> PagedCache:
        """``capacity``: most tokens of a sequence (less, where ``memory`` holds no such). ``memory``: bytes for all
        slots together; None: as much as all of them can need. ``kv_dtype``: what keys and values are kept as.
        ``ahead``: tokens after a position that its keys and values depend on."""
        ...


class Stack(Protocol):
    """A decoder stack on one kind of hardware."""

    config: StackConfig

    @property
    def dtype(self) -> torch.dtype | str: ...  # of its weights, as it was loaded
    def new_cache(self, slots: int, capacity: int) -> KVCache: ...
    def forward(
        self,
        batch: RaggedBatch,
        cache: KVCache,
        *,
        hidden: Tensor | None = None,
        residual: Tensor | None = None,
        aux_layers: Sequence[int] = (),
        logits_at: Tensor | None = None,
        mask: Mask = "causal",
    ) -> StackOutput:
        """Run the batch through all layers; keys and values land at its positions, and each slot's length
        becomes its last position + 1.

        ``hidden`` [T, D] replaces the embedding of ``batch.tokens``. Where the config sets ``input_width``
        (EAGLE-3), ``hidden`` [T, input width] is layer 0's attention input as it is, already normalised, and
        ``residual`` [T, D] the residual stream. ``aux_layers`` are 0-based layers (any of them here), -1 the input.
        ``logits_at`` int64 [R] indexes the packed tokens; None = all, empty = none.
        """
        ...

    def project(self, hidden: Tensor, batch: RaggedBatch, cache: KVCache) -> None:
        """Write every layer's keys and values of ``hidden`` [T, D] without running the layers (DSpark's context)."""
        ...

    def embed(self, tokens: Tensor) -> Tensor: ...  # int64 [...] -> [..., D]
    def unembed(self, hidden: Tensor) -> Tensor: ...  # [..., D] after the final norm -> [..., V]


class Backend(Protocol):
    """Runs layer stacks on one kind of hardware, and what follows a pass on the tensors it makes."""

    name: str
    device: torch.device  # where its logits, features and hidden states are

    def load(self, config: StackConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | str) -> Stack:
        """``weights`` by the canonical names of ``outrider.backends.layers``; may keep or repack them."""
        ...

    def verify(
        self, target: Distribution, proposal: Proposal, keep: Tensor, context: Context, rng: Rng
    ) -> Verification:
        """``sampling.verification.verify`` on this hardware: the same tokens from the same arguments."""
        ...

    def sample(self, distribution: Distribution, keys: Tensor) -> Tensor:
        """One token a row by Gumbel-max with the keys of ``Rng.token_keys``. int64 [R] -> [R]."""
        ...


@runtime_checkable
class DraftLoop(Protocol):
    """A stack or target that drafts several tokens in one call: run the batch, then a token a row at a time."""

    def draft_loop(
        self, batch: RaggedBatch, cache: KVCache, keys: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        """keys int64 [B, K], temperatures float32 [B] (0 = greedy) -> tokens int64 [B, K], logits [B * K, V]."""
        ...


@dataclass(frozen=True, slots=True)
class MarkovParts:
    """The sequential head of a block drafter (DSpark, equations 4 to 6). r: its rank."""

    kind: str  # vanilla, gated or rnn
    w1: Tensor  # [V, r]
    w2: Tensor  # [Vd, r]
    mix: Tensor | None  # the part of the product that reads no hidden states: [r, r] gated, [3 r, 2 r] rnn
    mix_hidden: Tensor | None  # the part that does: [r, D] gated, [3 r, D] rnn
    mix_bias: Tensor | None  # [r] gated, [3 r] rnn
    shortlist: int  # tokens that a sampled draft is drawn from, those of the largest base logits


@dataclass(frozen=True, slots=True)
class BlockParts:
    """What a block drafter is made of. Vd: tokens it can draft."""

    layers: Stack
    embedding: Stack  # the stack whose embedding it reads, and the one whose head it uses: its own or the target's
    head: Stack
    block_size: int
    first: int  # slot of the first draft: 0 or 1
    mask_token_id: int
    vocab_size: int  # V
    fusion: Tensor  # [D, F]: features to the context's hidden states, before ``fusion_norm`` [D]
    fusion_norm: Tensor
    markov: MarkovParts | None
    confidence: tuple[Tensor, Tensor] | None  # weight [D], or [D + r] where it reads W1 of the token before; bias [1]
    ids: Tensor | None  # int64 [Vd]: target id of each draft id; None: the same


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafts of n rows, K each."""

    tokens: Tensor  # int64 [n, K]
    confidence: Tensor  # float32 [n, K]
    ids: Tensor | None  # int64 [n K, S], ascending, filled up with V: tokens of the distributions; None: all of them
    logits: Tensor | None  # float32 [n K, S] after temperature; None: all rows are greedy


@runtime_checkable
class DraftsBlocks(Protocol):
    """A backend that drafts a whole block in one call."""

    def block_drafter(self, parts: BlockParts, dtype: torch.dtype | str) -> BlockDrafter | None:
        """None where it cannot: a part is on another backend, for instance."""
        ...


class BlockDrafter(Protocol):
    """A block drafter on one kind of hardware. Rows whose features wait come in order, ``counts`` tokens each."""

    def absorb(self, cache: KVCache, slots: Sequence[int], counts: Sequence[int], features: Sequence[Tensor]) -> None:
        """Append the keys and values of waiting features, [tokens, F] in pieces, row after row."""
        ...

    def draft(
        self,
        cache: KVCache,
        slots: Sequence[int],
        counts: Sequence[int],
        features: Sequence[Tensor],
        anchors: Sequence[int],
        drafts: int,
        keys: Tensor | None,
        params: Sequence[SamplingParams],
    ) -> Drafts:
        """The same, then K ``drafts`` for each of n rows; nothing of them stays in the cache. anchors [n]: the rows'
        last tokens; keys int64 [n, K] of ``Rng.token_keys``, None where all rows are greedy; ``params`` [n]: of which
        temperature and truncation are applied."""
        ...


@dataclass(frozen=True, slots=True)
class AutoregressiveParts:
    """What an autoregressive drafter that reads features is made of. Vd: tokens it can draft."""

    layers: Stack
    embedding: Stack  # the stack whose embedding it reads, and the one whose head it uses: its own or the target's
    head: Stack
    fusion: Tensor | None  # [D, F]: features to a state; None: they are one
    feature_norm: Tensor | None  # [F], before the fusion
    feature_groups: int  # parts of the features that are normalised each by itself
    embed_norm: Tensor  # [D]
    hidden_norm: Tensor  # [D]
    projection: Tensor | None  # [D, 2 D]; None: the layers take embedding and state side by side, and a residual
    norm_residual: bool  # whether that residual is the normalised state
    feeds_normed: bool  # whether the state fed back is the one after the final norm
    ids: Tensor | None  # int64 [Vd]: target id of each draft id; None: the same


@runtime_checkable
class DraftsInTurn(Protocol):
    """A backend that drafts several tokens, each from the state of the one before, in one call."""

    def autoregressive_drafter(self, parts: AutoregressiveParts, dtype: torch.dtype | str) -> InTurnDrafter | None:
        """None where it cannot: a part is on another backend, for instance."""
        ...


class InTurnDrafter(Protocol):
    """An autoregressive drafter on one kind of hardware."""

    def draft(
        self,
        cache: KVCache,
        slots: Sequence[int],
        counts: Sequence[int],
        features: Sequence[Tensor],
        tokens: Sequence[int],
        drafts: int,
        keys: Tensor | None,
        params: Sequence[SamplingParams],
    ) -> Drafts:
        """Run the waiting features of n rows, then draft K ``drafts`` a row.

        ``counts`` [n], at least 1: waiting features of each row; ``features`` [T, F] in pieces and ``tokens`` [T], the
        one that follows each of them, row after row. All but each row's last one stay in the cache. ``keys`` and
        ``params`` as in ``BlockDrafter.draft``.
        """
        ...


@runtime_checkable
class HasStack(Protocol):
    """A target whose embedding, layers and head are one stack. A drafter may share its embedding and head."""

    stack: Stack


@runtime_checkable
class TiedHead(Protocol):
    """A stack that says whether head and embedding are one matrix in memory: then ``embed`` gives the head's rows."""

    tied: bool


@runtime_checkable
class ReadsHidden(Protocol):
    """A drafter whose ``observe`` wants the target's last hidden states."""

    reads_hidden: Literal[True]


@runtime_checkable
class ResetsRows(Protocol):
    """A drafter that can close all of its slots at once, whatever state an interrupted call left them in."""

    def reset_rows(self) -> None: ...


@runtime_checkable
class Forgets(Protocol):
    """A drafter that remembers earlier requests and can forget them."""

    def forget(self) -> None: ...


@runtime_checkable
class TargetModel(Protocol):
    """The model whose text it is."""

    spec: TargetSpec
    backend: Backend

    def new_cache(self, slots: int, capacity: int) -> KVCache: ...
    def forward(
        self, batch: RaggedBatch, cache: KVCache, aux_layers: Sequence[int] = (), logits_at: Tensor | None = None
    ) -> TargetOutput:
        """One pass. ``aux_layers`` are 0-based layers, -1 the embedding output; the last layer is refused."""
        ...

    def embed(self, tokens: Tensor) -> Tensor: ...  # int64 [...] -> [..., D]
    def unembed(self, hidden: Tensor) -> Tensor: ...  # [..., D] after the final norm -> [..., V]


@runtime_checkable
class Drafter(Protocol):
    """Proposes; is told what became of it. A slot is a row for its whole life, the engine's number for it."""

    aux_layers: tuple[int, ...]  # target layers whose features it reads; () for none
    block: int  # the most tokens it can propose

    def open(self, slot: int, capacity: int) -> None:
        """Reserve ``slot`` for a sequence of up to ``capacity`` tokens. Nothing is read yet."""
        ...

    def propose(self, slots: Tensor, last: Tensor, context: Context, limit: Tensor, rng: Rng) -> Proposal:
        """Draft up to ``limit[b]`` tokens after ``last[b]``. slots, last, limit: int64 [B]."""
        ...

    def observe(self, batch: RaggedBatch, features: Tensor | None, hidden: Tensor | None = None) -> None:
        """Committed tokens that passed through the target: every prefill chunk, and of every round the
        row's ``last`` and its accepted drafts (never the new ``last``).

        features [T, F] of ``aux_layers``, or None. hidden [C, D]: the target's state after its final norm at the
        last token of each of the first C rows, from which the row's next token was sampled; the rows after them
        end in the middle of their prompt. None where the target cannot tell it.
        """
        ...

    def close(self, slot: int) -> None: ...


@runtime_checkable
class SchedulerPolicy(Protocol):
    """How much is drafted, and how much of it is verified.

    Non-anticipating: (keep[b] >= j) may depend on confidence[b, :j], on other rows and on the past; never on
    confidence[b, j:]; and it never sees the tokens (DSpark, Appendix A). Where every row that ``plan`` was shown is
    greedy or ``coupled``, texts do not depend on the schedule, and the next ``choose`` may look at everything.
    """

    def plan(self, step: StepView) -> Sequence[int]:
        """The most tokens to draft for each row in this step, from the past only; 0 = plain decoding. -> B"""
        ...

    def choose(self, confidence: Tensor | None, lengths: Tensor) -> Tensor:
        """float32 [B, K] or None, int64 [B] -> keep int64 [B], 0 <= keep <= lengths."""
        ...

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        """What the step cost, and accepted drafts per row [B]."""
        ...


@runtime_checkable
class StepsAside(Protocol):
    """A policy that can leave the drafter out altogether, so that steps cost what plain decoding costs."""

    @property
    def follows(self) -> bool:
        """Whether the drafter is shown what is committed from this step on. Rows that it has not followed from their
        beginning are drafted for again only after they were shown to it, which counts as time spent on drafting."""
        ...


@runtime_checkable
class StepObserver(Protocol):
    """Sees every step after its commit: evaluation, metrics and audits."""

    def step(self, record: StepRecord) -> None: ...
