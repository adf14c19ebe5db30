"""Values that travel between the floors, and the contracts of those who send and receive them.

Shape legend, used in names and docstrings everywhere:
B rows in a step   K drafted tokens at most   T packed tokens   R rows of logits   V vocabulary   D model width
F feature width (= aux_layers x D)   H heads   Hkv key/value heads   Dh head width   N training tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from outrider.config import SamplingParams, StackConfig

__all__ = [
    "Backend",
    "Context",
    "Distribution",
    "Drafter",
    "Event",
    "KVCache",
    "Mask",
    "Output",
    "Piece",
    "Proposal",
    "RaggedBatch",
    "RequestStats",
    "Rng",
    "SchedulerPolicy",
    "Stack",
    "StackOutput",
    "StepCost",
    "TargetModel",
    "TargetOutput",
    "TargetSpec",
    "Verification",
]

Mask = Literal["causal", "block"]
"""Who a new token attends to beside the cached ones: new tokens up to itself, or all new tokens of its row."""


# ------------------------------------------------------------------------------------------------ values


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Some new tokens of some rows. Prefill chunk, decode and verify are all this."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]    absolute position of each token in its sequence; consecutive within a row
    slots: Tensor  # int64 [B]        the memory slot of each row
    offsets: Tensor  # int64 [B+1]    row b owns tokens[offsets[b]:offsets[b+1]]

    @staticmethod
    def pack(rows: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int]) -> RaggedBatch:
        """Pack rows of token ids, row b starting at position ``starts[b]``."""
        tokens = [token for row in rows for token in row]
        positions = [start + i for row, start in zip(rows, starts, strict=True) for i in range(len(row))]
        offsets = [0]
        for row in rows:
            offsets.append(offsets[-1] + len(row))
        as_tensor = torch.tensor([*tokens, *positions, *slots, *offsets], dtype=torch.int64)  # one allocation
        t, b = len(tokens), len(rows)
        return RaggedBatch(as_tensor[:t], as_tensor[t : 2 * t], as_tensor[2 * t : 2 * t + b], as_tensor[2 * t + b :])

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: new tokens of each row."""
        return self.offsets.diff()


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
    """The distribution of the next token at each of R places, as it is really sampled from (float32 or float64)."""

    def __len__(self) -> int: ...
    def at(self, tokens: Tensor) -> Tensor:
        """Probability of ``tokens[r]`` at place r. int64 [R] -> [R]."""
        ...

    def dense(self, places: Tensor) -> Tensor:
        """Full rows of probabilities. int64 [n] -> [n, V]."""
        ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a drafter proposes for each row."""

    tokens: Tensor  # int64 [B, K]        entries past ``lengths[b]`` are meaningless
    lengths: Tensor  # int64 [B]          0 <= lengths <= limit
    distribution: Distribution | None = None
    # The distribution each token was really drawn from: place b * K + j is token (b, j); None = deterministic.
    # (lengths[b] >= j) may depend on tokens[b, :j] only.
    confidence: Tensor | None = None  # float32 [B, K]  P(token j accepted | those before were); from tokens[b, :j] only

    @staticmethod
    def empty(rows: int) -> Proposal:
        """No drafts at all: the step is plain decoding."""
        return Proposal(torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64))

    @staticmethod
    def pack(tokens: Sequence[Sequence[int]], confidence: Sequence[Sequence[float]]) -> Proposal:
        """Pad ragged deterministic drafts, and how sure of each token the drafter is, to the longest row."""
        lengths = [len(row) for row in tokens]
        shape = len(lengths), max(lengths, default=0)
        return Proposal(
            torch.tensor([[*row, *[0] * (shape[1] - len(row))] for row in tokens], dtype=torch.int64).view(shape),
            torch.tensor(lengths, dtype=torch.int64),
            None,
            torch.tensor([[*row, *[0.0] * (shape[1] - len(row))] for row in confidence]).view(shape),
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """What the target made of a proposal."""

    accepted: Tensor  # int64 [B]         drafted tokens kept
    tokens: Tensor  # int64 [B, K+1]      accepted tokens, then one of the target's own
    lengths: Tensor  # int64 [B]          accepted + 1

    @staticmethod
    def of(accepted: Tensor, drafted: Tensor, own: Tensor) -> Verification:
        """accepted [B], drafted [B, K], own [B]: the target's token after the accepted ones."""
        tokens = torch.cat([drafted, own[:, None]], 1).scatter(1, accepted[:, None], own[:, None])
        return Verification(accepted, tokens, accepted + 1)


@dataclass(frozen=True, slots=True)
class Context:
    """What a distribution may depend on besides logits: each row's request and its committed tokens."""

    params: Sequence[SamplingParams]  # B
    history: Sequence[list[int]]  # B lists: prompt and output so far, the last committed token included
    prompt_lengths: Sequence[int]  # B


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

    @property
    def acceptance_length(self) -> float:
        """Mean tokens a round commits: accepted drafts plus the target's own token."""
        return (self.generated - 1) / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one committed token (may be empty while a character is incomplete)."""

    token_id: int
    text: str
    drafted: bool  # the drafter proposed it and the target accepted it


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
    tokens: int  # verified, the rows' own tokens included
    context: int  # cached tokens over all rows


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
    """The cache of a layer stack: append, then take back exactly."""

    capacity: int  # tokens a slot can hold
    lengths: Tensor  # int64 [slots]   tokens each slot holds

    def open(self) -> int:
        """Reserve a slot. Raises CacheFull."""
        ...

    def rewind(self, slots: Tensor, lengths: Tensor) -> None:
        """Forget everything past ``lengths[b]`` tokens of slot ``slots[b]``."""
        ...

    def close(self, slot: int) -> None: ...


class Stack(Protocol):
    """A decoder stack on one kind of hardware."""

    config: StackConfig

    def new_cache(self, slots: int, capacity: int) -> KVCache: ...
    def forward(
        self,
        batch: RaggedBatch,
        memory: KVCache,
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

    def project(self, hidden: Tensor, batch: RaggedBatch, memory: KVCache) -> None:
        """Write every layer's keys and values of ``hidden`` [T, D] without running the layers (DSpark's context)."""
        ...

    def embed(self, tokens: Tensor) -> Tensor: ...  # int64 [...] -> [..., D]
    def unembed(self, hidden: Tensor) -> Tensor: ...  # [..., D] after the final norm -> [..., V]


class Backend(Protocol):
    """Runs layer stacks on one kind of hardware."""

    name: str

    def load(self, config: StackConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | str) -> Stack:
        """``weights`` by the canonical names of ``outrider.backends.layers``; may keep or repack them."""
        ...


@runtime_checkable
class TargetModel(Protocol):
    """The model whose text it is."""

    spec: TargetSpec

    def new_cache(self, slots: int, capacity: int) -> KVCache: ...
    def forward(
        self, batch: RaggedBatch, memory: KVCache, aux_layers: Sequence[int] = (), logits_at: Tensor | None = None
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

    def observe(self, batch: RaggedBatch, features: Tensor | None) -> None:
        """Committed tokens that passed through the target: every prefill chunk, and of every round the
        row's ``last`` and its accepted drafts (never the new ``last``). features [T, F] or None."""
        ...

    def close(self, slot: int) -> None: ...


@runtime_checkable
class SchedulerPolicy(Protocol):
    """How much is drafted, and how much of it is checked.

    Non-anticipating: (keep[b] >= j) may depend on confidence[b, :j], on other rows and on the past; never on
    confidence[b, j:]; and the tokens are not shown to it at all (DSpark, Appendix A).
    """

    def plan(self, rows: int) -> int:
        """The most tokens to draft per row in this step, from the past only; 0 = plain decoding."""
        ...

    def choose(self, confidence: Tensor | None, lengths: Tensor) -> Tensor:
        """float32 [B, K] or None, int64 [B] -> keep int64 [B], 0 <= keep <= lengths."""
        ...

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        """What the step cost, and accepted drafts per row [B]."""
        ...
