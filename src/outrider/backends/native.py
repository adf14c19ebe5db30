"""Layer stacks in the compiled core: a whole pass over a ragged batch in one call, with the GIL released.

Every row's sums are taken in one order, whatever the number of rows, the batch's composition, the chunking of a
prefill or the thread count, so results are bit-identical across them (per dtype and instruction set). Tensors are
float32 on the way in and out; weights are kept as ``dtype`` says, and keys and values as float32 with float32 weights,
else as bfloat16. Letters: T packed tokens, R rows of logits, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from outrider.backends.file_formats import (
    BLOCKS,
    FILE,
    FORMATS,
    GROUPS,
    BlockWeights,
    Formats,
    choose_formats,
    takes_blocks,
)
from outrider.backends.layers import check_weights, shapes_of
from outrider.backends.native_verification import verify_native
from outrider.backends.packed_weights import PackedFile
from outrider.backends.tuning import apply_once
from outrider.config import LayerConfig, RopeConfig, StackConfig
from outrider.core import native as _native
from outrider.errors import CacheFull, InvalidRequest, OutriderError, nearest
from outrider.registry import find
from outrider.sampling.distribution import Processed
from outrider.types import Context, Distribution, KVCache, Mask, Proposal, RaggedBatch, Rng, StackOutput, Verification

__all__ = ["NativeBackend", "NativeCache", "NativeMarkovHead", "NativeStack", "available"]

DTYPES = (*FORMATS, FILE)
PIECE = 8192  # rows of an embedding or a head that are read at a time; a multiple of 64
NORMS = ("input_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm", "q_norm", "k_norm")


def available() -> bool:
    """Whether this installation has the compiled core."""
    return _native is not None


class NativeCache:
    """The core's cache: contiguous per slot, blocked by absolute positions. Untouched pages cost no memory."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.capacity: int = core.capacity
        self.lengths: Tensor = _native.lengths(core)  # shares memory with the core
        self._free = list(range(core.slots))

    def open(self) -> int:
        """Reserve an empty slot, the lowest free one. Raises CacheFull."""
        if not self._free:
            raise CacheFull(f"all {len(self.lengths)} slots are in use; close one, or make the cache with more slots")
        slot = min(self._free)
        self._free.remove(slot)
        self.core.set_open(slot, True)
        return slot

    def reserve(self, slot: int, tokens: int) -> bool:
        """Whether a sequence of ``tokens`` fits: every slot has its full capacity from the start."""
        return tokens <= self.capacity

    def rewind(self, slots: Tensor, lengths: Tensor) -> None:
        """Drop everything past ``lengths[b]`` tokens of slot ``slots[b]``. int64 [B], int64 [B]."""
        self.core.rewind(slots.numpy(), lengths.numpy())

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot not in self._free, f"slot {slot} is not open"
        self._free.append(slot)
        self.core.set_open(slot, False)


class NativeBackend:
    """Makes stacks that run in the compiled core."""

    name = "native"
    device = torch.device("cpu")

    def __init__(self, isa: str = "") -> None:
        """``isa``: avx512, avx2 or portable; empty = what OUTRIDER_ISA says, else the best this processor has."""
        self.isa = isa

    def load(self, config: StackConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | str) -> NativeStack:
        """``dtype``: float32, bfloat16, ``int8`` (a scale per output channel), ``int4`` (a scale per 32 weights; the
        head stays int8) or ``file`` (weights of a GGUF file as it stores them, see ``backends.file_formats``). Weights
        are packed one by one; they are left as they are. Quantised ones of files that took a while are kept on
        disk for the next time (``backends.packed_weights``).

        Raises CheckpointError for weights that do not fit the config, OutriderError where the core is missing.
        """
        if _native is None:
            raise OutriderError("the compiled core is not installed; choose the reference backend, or install a wheel")
        key = str(dtype).removeprefix("torch.")
        if key not in DTYPES:
            raise InvalidRequest(
                f"the native backend has no dtype {key!r}; {nearest(key, DTYPES)} (it has {', '.join(DTYPES)})"
            )
        check_weights(config, weights)
        formats = choose_formats(config, weights, key)
        spec = _spec(config, weights, formats)
        spec.isa = self.isa
        try:
            core = _native.Stack(spec)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        apply_once(core.isa, core.weight_bytes)
        kept, began = PackedFile(weights, key, core.isa), perf_counter()
        if not kept.read_into(core.packed):
            _pack(core, config, weights, formats)
            kept.write(core.packed, perf_counter() - began)
        _set_norms(core, config, weights)
        return NativeStack(config, core, key, formats)

    def verify(
        self, target: Distribution, proposal: Proposal, keep: Tensor, context: Context, rng: Rng
    ) -> Verification:
        """See ``outrider.types.Backend``."""
        assert isinstance(target, Processed)
        return verify_native(target, proposal, keep, context, rng)

    def sample(self, distribution: Distribution, keys: Tensor) -> Tensor:
        """See ``outrider.types.Backend``."""
        assert isinstance(distribution, Processed)
        return distribution.draw(keys)

    def markov_head(
        self,
        kind: str,
        w1: Tensor,
        w2: Tensor,
        mix: Tensor | None,
        ids: Tensor | None,
        dtype: torch.dtype | str,
        shortlist: int,
    ) -> NativeMarkovHead:
        """The sequential head of a block drafter: see ``NativeMarkovHead``.

        kind: vanilla, gated or rnn; w1 [V, r], w2 [Vd, r]; mix: the part without hidden states, [r, r] gated,
        [3 r, 2 r] rnn; ids int64 [Vd]: the target id of each draft id, ascending, None where they are the same.
        Stored as float32 with ``float32``, else as bfloat16: only a few rows are read, so fewer bits save nothing.
        """
        spec = _native.MarkovSpec()
        spec.isa, spec.kind, spec.rank = self.isa, getattr(_native.MarkovKind, kind), w1.shape[1]
        spec.dtype = _native.DType.f32 if str(dtype).removeprefix("torch.") == "float32" else _native.DType.bf16
        spec.vocabulary, spec.drafted, spec.shortlist = len(w1), len(w2), shortlist
        matrices = [None if m is None else m.detach().float().contiguous() for m in (w1, w2, mix)]
        return NativeMarkovHead(_native.MarkovHead(spec, *matrices, ids))


class NativeStack:
    """A decoder stack in the core."""

    def __init__(self, config: StackConfig, core: Any, dtype: str, formats: Formats) -> None:
        self.config, self.core, self.dtype, self.formats = config, core, dtype, formats
        self._width, self._vocabulary = config.hidden_size, config.vocab_size

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """A cache of ``slots`` sequences of up to ``capacity`` tokens."""
        cache: KVCache = find("kv_cache", "native")(self.core.new_cache(slots, capacity))
        return cache

    def forward(
        self,
        batch: RaggedBatch,
        cache: Any,
        *,
        hidden: Tensor | None = None,
        residual: Tensor | None = None,
        aux_layers: Sequence[int] = (),
        logits_at: Tensor | None = None,
        mask: Mask = "causal",
    ) -> StackOutput:
        """See ``outrider.types.Stack``. Raises InvalidRequest, and CacheFull past a slot's capacity."""
        count = len(batch.tokens)
        rows = count if logits_at is None else len(logits_at)
        last = torch.empty(rows, self._width)
        logits = torch.empty(rows, self._vocabulary) if self._vocabulary else None
        features = torch.empty(count, len(aux_layers) * self._width) if aux_layers else None
        try:
            self.core.forward(
                cache.core,
                *_arrays(batch),
                mask == "causal",
                list(aux_layers),
                None if hidden is None else hidden.detach().float().numpy(),
                None if residual is None else residual.detach().float().numpy(),
                None if logits_at is None else logits_at.numpy(),
                last.numpy(),
                None if logits is None else logits.numpy(),
                None if features is None else features.numpy(),
            )
        except (TypeError, ValueError, IndexError) as error:
            raise _explained(error, batch, hidden, residual, logits_at) from error
        return StackOutput(last, logits, features)

    def draft_loop(self, batch: RaggedBatch, cache: Any, keys: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """Draft in one call: run the batch, then one token a row at a time, each drawn from the pass before it.

        keys int64 [B, K] of ``rng.gumbel``, temperatures float32 [B] (0 = the largest logit) -> tokens int64 [B, K],
        logits [B * K, V] before temperature, row b * K + j. The last token drawn is not run.
        """
        drawn = torch.empty_like(keys)
        logits = torch.empty(keys.numel(), self._vocabulary)
        arrays = (keys, temperatures, drawn, logits)
        try:
            self.core.draft_loop(cache.core, *_arrays(batch), *(array.numpy() for array in arrays))
        except (TypeError, ValueError, IndexError) as error:
            raise _explained(error, batch, None, None, None) from error
        return drawn, logits

    def project(self, hidden: Tensor, batch: RaggedBatch, cache: Any) -> None:
        """Write every layer's keys and values of ``hidden`` [T, D], taken as it is: no layer's norm is applied."""
        given = hidden.detach().float().numpy()
        try:
            self.core.project(cache.core, *_arrays(batch), given)
        except (TypeError, ValueError, IndexError) as error:
            raise _explained(error, batch, hidden, None, None) from error

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., D], scaled as the layers see it."""
        out = torch.empty(tokens.numel(), self._width)
        try:
            self.core.embed(tokens.reshape(-1), out)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"cannot embed {_described(tokens)}: {error}") from error
        return out.view(*tokens.shape, self._width)

    def unembed(self, hidden: Tensor) -> Tensor:
        """[..., D] after the final norm -> float32 logits [..., V]."""
        flat = hidden.detach().float().reshape(-1, hidden.shape[-1])
        logits = torch.empty(len(flat), self._vocabulary)
        try:
            self.core.unembed(flat, logits)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"cannot unembed {_described(hidden)}: {error}") from error
        return logits.view(*hidden.shape[:-1], self._vocabulary)


def _arrays(batch: RaggedBatch) -> tuple[Any, ...]:
    """A batch as numpy arrays on the same memory: they cross to the core several times faster than tensors."""
    return batch.tokens.numpy(), batch.positions.numpy(), batch.slots.numpy(), batch.offsets.numpy()


class NativeMarkovHead:
    """Drafts a block in one call, from a shortlist of the tokens whose base logits are largest.

    Greedy drafts are the largest of all corrected logits all the same: a bound shows whether a token outside the
    shortlist could win, and then it is computed. Sampled ones are drawn from the distribution of the shortlist.
    n rows, K drafts, Vd draft vocabulary, S entries of a shortlist.
    """

    def __init__(self, core: Any) -> None:
        self.core = core

    def draft(
        self, base: Tensor, mixed: Tensor | None, anchors: Tensor, keys: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """base [n, K, Vd] logits, mixed [n, K, r or 3 r] of the hidden states with its bias (None: vanilla), anchors
        int64 [n], keys int64 [n, K] of ``rng.gumbel``, temperatures float32 [n] (0 = the largest logit).

        -> target ids int64 [n, K]; by how much the largest corrected logit exceeds the second, float32 [n, K]; and,
        where rows are sampled, what each draft was drawn from: target ids int64 [n * K, S], ascending (the vocabulary's
        size: no token), and logits after temperature [n * K, S].
        """
        count = keys.numel()
        tokens, margins = torch.empty_like(keys), torch.empty(keys.shape)
        distribution = None
        if bool(temperatures.any()):
            size = self.core.shortlist
            distribution = torch.empty(count, size, dtype=torch.int64), torch.empty(count, size)
        try:
            self.core.draft(
                base.reshape(count, -1).numpy(),
                None if mixed is None else mixed.reshape(count, -1).numpy(),
                anchors.numpy(),
                keys.numpy(),
                temperatures.numpy(),
                tokens.numpy(),
                margins.numpy(),
                *((None, None) if distribution is None else (distribution[0].numpy(), distribution[1].numpy())),
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return tokens, margins, distribution


# ------------------------------------------------------------------------------------------------ loading


def _spec(config: StackConfig, weights: Mapping[str, Tensor], formats: Formats) -> Any:
    """The shape of a stack, as the core wants it."""
    spec = _native.StackSpec()
    spec.dtype, spec.tied = _dtype(formats.cache), formats.tied
    spec.head, spec.embedding = _dtype(formats.head), _dtype(formats.embedding)
    spec.activation = getattr(_native.Activation, config.activation)
    spec.hidden, spec.input_width = config.hidden_size, config.input_width
    spec.vocabulary = config.vocab_size
    spec.embeddings = shapes_of(weights).get("embed.weight", (0,))[0]
    spec.eps, spec.embedding_scale, spec.softcap = config.norm_eps, config.embedding_scale, config.logit_softcap
    spec.sandwich = config.sandwich_norms
    spec.bias = any(name.endswith(".bias") for name in weights)
    ropes = list(dict.fromkeys(layer.rope for layer in config.layers))
    spec.ropes = [_rope(rope) for rope in ropes]
    spec.layers = [_layer(layer, ropes, weights.get(f"layers.{i}.scalar")) for i, layer in enumerate(config.layers)]
    for layer, chosen in zip(spec.layers, formats.layers, strict=True):
        for group, name in chosen.items():
            setattr(layer, group, _dtype(name))
    return spec


def _dtype(name: str) -> Any:
    return getattr(_native.DType, name)


def _rope(config: RopeConfig) -> Any:
    rope = _native.RopeSpec()
    rope.inverse_frequencies, rope.scale = list(config.inverse_frequencies), config.scale
    return rope


def _layer(config: LayerConfig, ropes: list[RopeConfig], scalar: Tensor | None) -> Any:
    layer = _native.LayerSpec()
    layer.heads, layer.kv_heads, layer.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    layer.intermediate = config.intermediate_size
    layer.rope = ropes.index(config.rope)
    layer.window = config.window or 0
    layer.attention_scale = config.scale
    layer.qk_norm, layer.v_norm, layer.value_is_key = config.qk_norm, config.v_norm, config.value_is_key
    layer.scalar = config.layer_scalar * (1.0 if scalar is None else float(scalar))
    return layer


def _pack(core: Any, config: StackConfig, weights: Mapping[str, Tensor], formats: Formats) -> None:
    """Pack every matrix; each is float32, or the parts of its blocks, only while it is being packed."""
    for i, chosen in enumerate(formats.layers):
        for group, names in GROUPS.items():
            for name in names:
                key = f"layers.{i}.{name}"
                if f"{key}.weight" in weights:
                    bias = _matrix(weights, f"{key}.bias", "f32") if f"{key}.bias" in weights else None
                    core.set_linear(i, name, _matrix(weights, f"{key}.weight", chosen[group]), bias)
    shared = bool(config.vocab_size) and "head.weight" not in weights
    if "embed.weight" in weights and not formats.tied:
        for first, rows in _pieces(weights, "embed.weight", formats.embedding):
            core.set_embedding(rows, first)
            if shared:
                core.set_head(rows, first)
    if config.vocab_size and (formats.tied or not shared):
        for first, rows in _pieces(weights, "embed.weight" if shared else "head.weight", formats.head):
            core.set_head(rows, first)


def _pieces(weights: Mapping[str, Tensor], name: str, chosen: str) -> Iterator[tuple[int, Any]]:
    """A large matrix: the first row of each piece, and the piece. Only files that are read by rows have several."""
    if not isinstance(weights, BlockWeights):
        yield 0, _matrix(weights, name, chosen)
        return
    rows = shapes_of(weights)[name][0]
    for first in range(0, rows, PIECE):
        yield first, _matrix(weights, name, chosen, first, min(first + PIECE, rows))


def _matrix(weights: Mapping[str, Tensor], name: str, chosen: str, begin: int = 0, end: int | None = None) -> Any:
    """Rows of a weight as the core takes them for that format: float32, or the parts of their blocks."""
    if not isinstance(weights, BlockWeights):
        whole = weights[name][begin:end]
    elif takes_blocks(chosen, weights.kinds[name]):
        parts = weights.blocks(name, begin, end)
        assert parts is not None, f"{name} is {weights.kinds[name]}, but has no parts"
        return _dtype(BLOCKS[parts.kind]), parts.values.contiguous().view(torch.uint8), parts.scale, parts.minimum
    else:
        whole = weights.read(name, begin, end)
    return whole.detach().to(torch.float32).contiguous()


def _set_norms(core: Any, config: StackConfig, weights: Mapping[str, Tensor]) -> None:
    def set_norm(layer: int, name: str, key: str) -> None:
        core.set_norm(layer, name, (weights[key].detach().double() + config.norm_offset).float().contiguous())

    for i in range(len(config.layers)):
        for name in NORMS:
            if f"layers.{i}.{name}.weight" in weights:
                set_norm(i, name, f"layers.{i}.{name}.weight")
    set_norm(-1, "norm", "norm.weight")


# ------------------------------------------------------------------------------------------------ errors


def _described(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}{layout}"


def _explained(
    error: Exception, batch: RaggedBatch, hidden: Tensor | None, residual: Tensor | None, logits_at: Tensor | None
) -> OutriderError:
    """What was wrong with a pass: the core's message, or the name of an array that it cannot take."""
    if isinstance(error, IndexError):
        return CacheFull(f"{error}; shorten the sequence, or make the cache with a larger capacity")
    if isinstance(error, ValueError):
        return InvalidRequest(str(error))
    integers = {
        "tokens": batch.tokens,
        "positions": batch.positions,
        "slots": batch.slots,
        "offsets": batch.offsets,
        "logits_at": logits_at,
    }
    for name, tensor in integers.items():
        if tensor is not None and not _fits(tensor, 1, torch.int64):
            return InvalidRequest(f"{name} is {_described(tensor)}; expected contiguous int64 [n] on the CPU")
    for name, tensor in {"hidden": hidden, "residual": residual}.items():
        if tensor is not None and not _fits(tensor, 2, None):
            return InvalidRequest(f"{name} is {_described(tensor)}; expected a contiguous matrix on the CPU")
    raise error


def _fits(tensor: Any, dimensions: int, dtype: torch.dtype | None) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.dim() == dimensions
        and tensor.is_contiguous()
        and tensor.device.type == "cpu"
        and dtype in (None, tensor.dtype)
    )
