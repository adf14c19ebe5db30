"""Layer stacks in the compiled core: a whole pass over a ragged batch in one call, with the GIL released.

Every row's sums are taken in one order, whatever the number of rows, the batch's composition, the chunking of a
prefill or the thread count, so results are bit-identical across them (per dtype and instruction set). Tensors are
float32 on the way in and out; weights are kept as ``dtype`` says, and keys and values as float32 with float32 weights,
else as bfloat16. Letters: T packed tokens, R rows of logits, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
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
from outrider.backends.native_drafting import (
    NativeBlockDrafter,
    NativeInTurnDrafter,
    autoregressive_parts,
    block_parts,
)
from outrider.backends.native_verification import verify_native
from outrider.backends.packed_weights import PackedFile
from outrider.backends.tuning import apply_once
from outrider.config import LayerConfig, RopeConfig, StackConfig
from outrider.core import native as _native
from outrider.errors import CacheFull, InvalidRequest, OutriderError, nearest
from outrider.kv_cache.block_cache import RETAINED, BlockCache
from outrider.kv_cache.block_pool import BlockPool
from outrider.registry import find
from outrider.sampling.distribution import Processed
from outrider.types import (
    AutoregressiveParts,
    BlockParts,
    Context,
    Distribution,
    KVCache,
    Mask,
    PagedCache,
    Proposal,
    RaggedBatch,
    Rng,
    StackOutput,
    Verification,
)

__all__ = ["NativeBackend", "NativeCache", "NativeStack", "available"]

DTYPES = (*FORMATS, FILE)
KV_DTYPES = ("auto", "int8")
PIECE = 8192  # rows of an embedding or a head that are read at a time; a multiple of 64
NORMS = ("input_norm", "mlp_norm", "attention_out_norm", "mlp_out_norm", "q_norm", "k_norm")


def available() -> bool:
    """Whether this installation has the compiled core."""
    return _native is not None


class NativeCache(BlockCache):
    """The core's cache: pages of 64 positions, read through each slot's table. Untouched pages cost no memory."""

    def __init__(self, core: Any, ahead: int = 0) -> None:
        pool = BlockPool(core.pages, _native.block_tokens, ahead, retained=max(1, RETAINED // core.page_bytes))
        super().__init__(core.slots, core.capacity, pool, core.page_bytes)
        self.core = core
        self.lengths: Tensor = _native.lengths(core)  # shares memory with the core
        self._held = self.lengths.numpy()

    def make_room(self, batch: RaggedBatch, more: int = 0) -> None:
        """Room for a batch, and for ``more`` tokens of each row after it. Raises CacheFull."""
        _, positions, slots, offsets = batch.lists
        for slot, begin, end in zip(slots, offsets, offsets[1:], strict=False):
            if begin < end:
                self.require(slot, positions[begin], positions[end - 1] + 1 + more)

    def _apply(self, slot: int, table: list[int], fixed: int) -> None:
        self.core.set_table(slot, table, fixed * self.pool.size)

    def _copy(self, source: int, target: int) -> None:
        self.core.copy_page(source, target)

    def _set_open(self, slot: int, is_open: bool) -> None:
        self.core.set_open(slot, is_open)


class NativeBackend:
    """Makes stacks that run in the compiled core."""

    name = "native"
    device = torch.device("cpu")

    def __init__(self, isa: str = "") -> None:
        """``isa``: amx, avx512, avx_vnni, avx2 or portable; empty: what OUTRIDER_ISA says, else the best there is."""
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
        apply_once(core.isa, core.weight_bytes, measure=False)
        kept, began = PackedFile(weights, key, core.isa), perf_counter()
        if not kept.read_into(core.packed):
            _pack(core, config, weights, formats)
            kept.write(core.packed, perf_counter() - began)
        _set_norms(core, config, weights)
        return NativeStack(config, core, key, formats)

    def verify(
        self, target: Distribution, proposal: Proposal, keep: Sequence[int], context: Context, rng: Rng
    ) -> Verification:
        """See ``outrider.types.Backend``."""
        assert isinstance(target, Processed)
        return verify_native(target, proposal, keep, context, rng)

    def sample(self, distribution: Distribution, keys: Tensor) -> Tensor:
        """See ``outrider.types.Backend``."""
        assert isinstance(distribution, Processed)
        return distribution.draw(keys)

    def block_drafter(self, parts: BlockParts, dtype: torch.dtype | str) -> NativeBlockDrafter | None:
        """See ``outrider.types.DraftsBlocks``: None where a stack is not the core's, or ids do not ascend."""
        stacks = _shared(parts)
        if not stacks:
            return None
        stacks["fusion"] = self._product(parts.fusion, dtype)
        if parts.markov is not None and parts.markov.mix_hidden is not None:
            stacks["mix"] = self._product(parts.markov.mix_hidden, dtype)
        return NativeBlockDrafter(block_parts(parts, stacks, self.isa, dtype))

    def autoregressive_drafter(
        self, parts: AutoregressiveParts, dtype: torch.dtype | str
    ) -> NativeInTurnDrafter | None:
        """See ``outrider.types.DraftsInTurn``: None where a stack is not the core's, or ids do not ascend."""
        stacks = _shared(parts)
        if not stacks:
            return None
        if parts.fusion is not None:
            stacks["fusion"] = self._product(parts.fusion, dtype)
        if parts.projection is not None:
            stacks["projection"] = self._product(parts.projection, dtype)
        return NativeInTurnDrafter(autoregressive_parts(parts, stacks))

    def _product(self, weight: Tensor, dtype: torch.dtype | str) -> Any:
        """A matrix [out, in] as the head of a stack without layers."""
        out, width = weight.shape
        config = StackConfig(vocab_size=out, hidden_size=width, layers=())
        return self.load(config, {"head.weight": weight, "norm.weight": torch.ones(width)}, dtype).core


class NativeStack:
    """A decoder stack in the core."""

    finds_largest = True

    def __init__(self, config: StackConfig, core: Any, dtype: str, formats: Formats) -> None:
        self.config, self.core, self.dtype, self.formats = config, core, dtype, formats
        self.tied = formats.tied
        self._width, self._vocabulary = config.hidden_size, config.vocab_size

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """A cache of ``slots`` sequences of up to ``capacity`` tokens."""
        return self.paged_cache(slots, capacity)

    def paged_cache(
        self, slots: int, capacity: int, memory: int | None = None, kv_dtype: str = "auto", ahead: int = 0
    ) -> PagedCache:
        """See ``outrider.types.PagedTarget``. ``kv_dtype``: ``auto`` (float32 with float32 weights, else bfloat16) or
        ``int8``, with a scale per position and head. Raises InvalidRequest."""
        if kv_dtype not in KV_DTYPES:
            raise InvalidRequest(
                f"the native backend keeps no keys and values as {kv_dtype!r}; {nearest(kv_dtype, KV_DTYPES)}"
            )
        int8, size = kv_dtype == "int8", _native.block_tokens
        pages = slots * -(-capacity // size)
        if memory is not None:
            page_bytes = self.core.new_cache(1, 1, 1, int8).page_bytes
            pages = min(pages, max(1, memory // max(1, page_bytes)))
        cache: PagedCache = find("kv_cache", "native")(self.core.new_cache(slots, capacity, pages, int8), ahead)
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
        largest: bool = False,
    ) -> StackOutput:
        """See ``outrider.types.Stack``. Raises InvalidRequest, and CacheFull past a slot's capacity."""
        count = len(batch)
        rows = count if logits_at is None else len(logits_at)
        last = np.empty((rows, self._width), np.float32)
        logits = np.empty((rows, self._vocabulary), np.float32) if self._vocabulary and not largest else None
        found = np.empty(rows, np.int64) if largest else None
        features = np.empty((count, len(aux_layers) * self._width), np.float32) if aux_layers else None
        try:
            arguments = (
                cache.core,
                *batch.lists,
                mask == "causal",
                list(aux_layers),
                None if hidden is None else hidden.detach().float().numpy(),
                None if residual is None else residual.detach().float().numpy(),
                None if logits_at is None else logits_at.numpy(),
                last,
                logits,
                features,
                found,
            )
            _with_room(self.core.forward, arguments, cache, batch)
        except (TypeError, ValueError, IndexError) as error:
            raise _explained(error, batch, hidden, residual, logits_at) from error
        return StackOutput(last, logits, features, None if found is None else found.tolist())

    def draft_loop(self, batch: RaggedBatch, cache: Any, keys: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """Draft in one call: run the batch, then one token a row at a time, each drawn from the pass before it.

        keys int64 [B, K] of ``rng.gumbel``, temperatures float32 [B] (0 = the largest logit) -> tokens int64 [B, K],
        logits [B * K, V] before temperature, row b * K + j. The last token drawn is not run.
        """
        drawn = torch.empty_like(keys)
        logits = torch.empty(keys.numel(), self._vocabulary)
        arrays = (keys, temperatures, drawn, logits)
        try:
            arguments = (cache.core, *batch.lists, *(array.numpy() for array in arrays))
            _with_room(self.core.draft_loop, arguments, cache, batch, keys.shape[1] - 1)
        except (TypeError, ValueError, IndexError) as error:
            raise _explained(error, batch, None, None, None) from error
        return drawn, logits

    def project(self, hidden: Tensor, batch: RaggedBatch, cache: Any) -> None:
        """Write every layer's keys and values of ``hidden`` [T, D], taken as it is: no layer's norm is applied."""
        given = hidden.detach().float().numpy()
        try:
            _with_room(self.core.project, (cache.core, *batch.lists, given), cache, batch)
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


def _shared(parts: BlockParts | AutoregressiveParts) -> dict[str, Any]:
    """The core's stacks of a drafter's parts by name; empty where one is on another backend, or ids do not ascend."""
    stacks = {"layers": parts.layers, "embedding": parts.embedding, "head": parts.head}
    ascending = parts.ids is None or bool((parts.ids.diff() > 0).all())
    found = {name: stack.core for name, stack in stacks.items() if isinstance(stack, NativeStack)}
    return found if ascending and len(found) == len(stacks) else {}


def _with_room(
    call: Callable[..., None], arguments: tuple[Any, ...], cache: NativeCache, batch: RaggedBatch, more: int = 0
) -> None:
    """Call the core; where a slot has no page yet for what is written, give it some and call again."""
    try:
        call(*arguments)
    except _native.NoRoom:
        cache.make_room(batch, more)
        call(*arguments)


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
