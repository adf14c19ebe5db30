"""The target on an accelerator, for making training data: many answers at a time, and features of many texts.

Natively read targets only, in bfloat16 on the device, with PyTorch's own kernels. It neither serves nor speculates:
rounding differs from the backend that will serve, which costs a drafter nothing, but its text is not the same bit for
bit.

B rows, P tokens of the longest prompt, L tokens of the longest text, H heads, Hkv key/value heads, G = H / Hkv, Dh
head width, D width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.config import LayerConfig, SamplingParams
from outrider.errors import InvalidRequest
from outrider.models.decoder import make_spec
from outrider.models.loading import load_layers, model_config
from outrider.sampling.rng import RowRng, gumbel
from outrider.training.conversations import Answerer, ChatTurn, Settings
from outrider.training.dataset import Text, pack
from outrider.training.networks.batch import FeatureBatch, TrainableDrafter, send
from outrider.training.networks.stack import Angles, Attention, LearnedLayer, LearnedStack, rotate

__all__ = ["DeviceRunner", "DeviceTarget", "FrozenLayer", "check_device", "device_answers"]

PREFILL = 2**16  # tokens of a pass over prompts, padding included
LOOK = 16  # steps between looks at which rows have ended: each look waits for the device
STEP = 64  # keys are read up to a multiple of this many
SPARE = 1 / 8  # of a device's memory, which texts that are kept leave free


def check_device(name: str) -> torch.device:
    """The device of a name such as ``cuda``. Raises InvalidRequest for one that this machine does not have."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InvalidRequest(f"device {name!r} cannot be used here ({first}); leave it out to use the CPU") from None
    return device


class DeviceTarget:
    """A target's layers, embedding and head on one device. Raises InvalidRequest for a target that is not read
    natively, or whose layers have biases."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        with torch.device("cpu"):
            found = load_layers(model)
        if found is None:
            raise InvalidRequest(f"{model} is run by Transformers, which device = {str(device)!r} does not cover")
        self.config, weights = found
        biased = next((name for name in weights if name.endswith(".bias")), None)
        if biased is not None:
            raise InvalidRequest(f"{model} has {biased}; device = {str(device)!r} runs layers without biases only")
        self.device, self.dtype = device, dtype
        self.spec = make_spec(model_config(model), self.config, dtype, model)
        with torch.device("cpu"):
            self._stack = LearnedStack(self.config).eval().requires_grad_(False)
            for name, parameter in self._stack.named_parameters():
                parameter.copy_(weights[name])
        self._stack.to(device)
        self._layers = [FrozenLayer(cast(LearnedLayer, layer), dtype) for layer in self._stack.layers]
        with torch.device("cpu"):
            matrices = {name: weights[name] for name in ("embed.weight", "head.weight") if name in weights}
        self._embedding = matrices["embed.weight"].to(device, dtype)
        self._head = matrices["head.weight"].to(device, dtype) if "head.weight" in matrices else self._embedding

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., D], scaled as the layers see it."""
        return F.embedding(tokens, self._embedding).float() * self.config.embedding_scale

    def unembed(self, hidden: Tensor) -> Tensor:
        """[..., D] after the final norm -> float32 [..., V]."""
        logits, cap = F.linear(hidden.to(self.dtype), self._head).float(), self.config.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    # -------------------------------------------------------------------------------------------- features

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], aux_layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Whole texts, packed: features [N, F] and states after the final norm [N, D], in the target's precision."""
        where, length = _padded(texts, self.device)
        causal = _Causal(len(texts), length, where)
        tokens = _packed(texts, self.device)
        auxiliary, last = self._run(tokens, where % length, causal, aux_layers)
        features = torch.cat([auxiliary[layer] for layer in aux_layers], 1) if aux_layers else last[:, :0]
        return features.to(self.dtype), last.to(self.dtype)

    def _run(
        self, tokens: Tensor, positions: Tensor, attend: Any, aux_layers: Sequence[int] = ()
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Raw residual after each auxiliary layer, and states after the final norm. int64 [N], int64 [N]"""
        x = self.embed(tokens)
        auxiliary = {-1: x}
        angles = self._stack.angles(positions)
        for index, layer in enumerate(self._layers):
            x = layer(x, angles[self.config.layers[index].rope], attend)
            if index in aux_layers:
                auxiliary[index] = x
        return auxiliary, self._stack.norm(x)

    # -------------------------------------------------------------------------------------------- answers

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], ends: Sequence[int]
    ) -> list[list[int]]:
        """Continue all prompts together; random numbers are those of ``coupled`` decoding with each one's seed.

        An answer ends with one of ``ends`` (included) or at ``max_tokens``.
        """
        most = max(one.max_tokens for one in params)
        length = max(map(len, prompts)) + most
        cache = _Cache(self, len(prompts), -(-length // STEP) * STEP)
        logits = self._prefill(prompts, cache)
        keys = _keys(prompts, params, most).to(self.device)
        temperatures = torch.tensor([one.temperature for one in params], device=self.device)
        stop = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
        stop[list(ends)] = True
        found = torch.full((len(prompts), most), -1, device=self.device)
        rows = torch.arange(len(prompts), device=self.device)  # of ``found`` that are still being answered
        running = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        vocabulary = torch.arange(self.config.vocab_size, device=self.device)
        for step in range(most):
            tokens = _draw(logits, temperatures[rows], keys[rows, step], vocabulary)
            found[rows, step] = torch.where(running, tokens, -1)
            running = running & ~stop[tokens]
            if step + 1 == most:
                break
            if step % LOOK == LOOK - 1:
                left = int(running.sum())
                if not left:
                    break
                if left < 0.7 * len(rows):
                    rows, tokens = rows[running], tokens[running]
                    cache.keep(running)
                    running = running[running]
            _, last = self._run(tokens, cache.lengths, cache.extend())
            cache.lengths = cache.lengths + 1
            logits = self.unembed(last)
        answers = [[token for token in row if token >= 0] for row in found.tolist()]
        return [answer[: one.max_tokens] for answer, one in zip(answers, params, strict=True)]

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: _Cache) -> Tensor:
        """Fill the cache; logits of each prompt's last token. [B, V]"""
        longest = max(map(len, prompts))
        share = max(1, PREFILL // longest)
        logits = []
        for first in range(0, len(prompts), share):
            some = prompts[first : first + share]
            where, length = _padded(some, self.device)
            tokens = _packed(some, self.device)
            causal = _Causal(len(some), length, where, cache, first)
            _, last = self._run(tokens, where % length, causal)
            ends = torch.tensor([len(text) for text in some], device=self.device).cumsum(0) - 1
            logits.append(self.unembed(last[ends]))
        cache.hold([len(prompt) for prompt in prompts])
        return torch.cat(logits)


class FrozenLayer:
    """A ``LearnedLayer`` without gradients, in few operations: calling them takes a device longer than their work."""

    def __init__(self, layer: LearnedLayer, dtype: torch.dtype) -> None:
        """Takes the layer's matrices: those with the same input become one."""
        self._layer, self._dtype = layer, dtype
        inputs = [layer.q, layer.k] if layer.v is None else [layer.q, layer.k, layer.v]
        self._qkv = torch.cat([matrix.weight for matrix in inputs]).to(dtype)
        self._gate_up = torch.cat([layer.gate.weight, layer.up.weight]).to(dtype)
        for matrix in (*inputs, layer.gate, layer.up):
            matrix.weight.data = matrix.weight.data.new_empty(0)
        for matrix in (layer.o, layer.down):
            matrix.to(dtype)

    def __call__(self, x: Tensor, angles: Angles, attend: Attention) -> Tensor:
        """float32 [T, D] -> [T, D]"""
        layer, config = self._layer, self._layer.config
        assert layer.input_norm is not None
        heads = F.linear(layer.input_norm(x).to(self._dtype), self._qkv).view(len(x), -1, config.head_dim)
        queries, keys = config.num_heads, config.num_heads + config.num_kv_heads
        turned, v = heads[:, :keys], heads[:, queries:keys] if layer.v is None else heads[:, keys:]
        if layer.q_norm is not None and layer.k_norm is not None:
            turned = torch.cat([layer.q_norm(turned[:, :queries]), layer.k_norm(turned[:, queries:])], 1)
        if config.v_norm:
            v = F.rms_norm(v.float(), (config.head_dim,), eps=layer.mlp_norm.eps).to(self._dtype)
        turned = rotate(turned, angles).to(self._dtype)
        mixed = layer.o(attend(layer.index, config, turned[:, :queries], turned[:, queries:], v).flatten(1))
        x = x + (mixed if layer.attention_out_norm is None else layer.attention_out_norm(mixed))
        gate, up = F.linear(layer.mlp_norm(x).to(self._dtype), self._gate_up).chunk(2, -1)
        y = layer.down(layer.activation(gate) * up)
        x = x + (y if layer.mlp_out_norm is None else layer.mlp_out_norm(y))
        return x * config.layer_scalar if config.layer_scalar != 1.0 else x


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, int]:
    """Where each packed token is among texts padded at the end to the longest. -> int64 [N], L"""
    length = max(map(len, texts))
    inside = torch.arange(length) < torch.tensor([len(text) for text in texts])[:, None]
    return send(inside.flatten().nonzero()[:, 0], device), length


def _packed(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """All tokens, one text behind the other. -> int64 [N]"""
    return send(torch.tensor([token for text in texts for token in text]), device)


def _keys(prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], most: int) -> Tensor:
    """Keys of the Gumbel values, int64 [B, most], on the CPU."""
    seeds = [0 if one.seed is None else one.seed for one in params]
    rng = RowRng(seeds, [0] * len(params), ["coupled"] * len(params))
    rows = torch.arange(len(params)).repeat_interleave(most)
    first = torch.tensor([len(prompt) for prompt in prompts])
    positions = (first[:, None] + torch.arange(most)).flatten()
    return rng.token_keys(rows, positions, "own").view(len(params), most)


def _draw(logits: Tensor, temperatures: Tensor, keys: Tensor, vocabulary: Tensor) -> Tensor:
    """One token a row: greedy at temperature 0, else by Gumbel-max. [B, V], [B], int64 [B] -> [B]"""
    sampled = temperatures > 0
    scale = torch.where(sampled, temperatures, 1.0)[:, None]
    noise = gumbel(keys, vocabulary, logits.shape[1]).float()
    return torch.where(sampled[:, None], logits / scale + noise, logits).argmax(-1)


class _Causal:
    """Attention of whole texts, which may leave their keys and values in a cache."""

    def __init__(self, rows: int, length: int, where: Tensor, cache: _Cache | None = None, first: int = 0) -> None:
        self.rows, self.length, self.where, self.cache, self.first = rows, length, where, cache, first

    def __call__(self, layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[N, H, Dh], [N, Hkv, Dh], [N, Hkv, Dh] -> [N, H, Dh]"""
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = self._pad(torch.cat([q, k, v], 1)).split(heads, 1)
        if self.cache is not None:
            rows = slice(self.first, self.first + self.rows)
            self.cache.keys[layer][rows, :, : self.length] = k
            self.cache.values[layer][rows, :, : self.length] = v
        mask = None
        if config.window is not None and config.window < self.length:
            distance = torch.arange(self.length, device=q.device)
            distance = distance[:, None] - distance
            mask = (distance >= 0) & (distance < config.window)
        mixed = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=config.scale, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(0, 1).index_select(0, self.where)

    def _pad(self, x: Tensor) -> Tensor:
        """[N, heads, Dh] -> [B, heads, L, Dh]"""
        out = x.new_zeros(self.rows * self.length, *x.shape[1:]).index_copy_(0, self.where, x)
        return out.view(self.rows, self.length, *x.shape[1:]).transpose(1, 2)


class _Cache:
    """Keys and values of B rows, [B, Hkv, capacity, Dh] a layer, and how many tokens each row holds."""

    def __init__(self, target: DeviceTarget, rows: int, capacity: int) -> None:
        shapes = [(rows, layer.num_kv_heads, capacity, layer.head_dim) for layer in target.config.layers]
        self.keys = [torch.zeros(shape, dtype=target.dtype, device=target.device) for shape in shapes]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=target.device)
        self._longest = 0

    def hold(self, lengths: Sequence[int]) -> None:
        """Rows now hold this many tokens."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self._longest = max(lengths)

    def extend(self) -> Callable[..., Tensor]:
        """Attention of one new token a row, behind those it holds."""
        self._longest += 1
        reach = min(-(-(self._longest) // STEP) * STEP, self.keys[0].shape[2])
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        seen = torch.arange(reach, device=self.lengths.device)
        visible = (seen <= self.lengths[:, None])[:, None, None]

        def attend(layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, self.lengths] = k
            values[rows, :, self.lengths] = v
            mask = visible
            if config.window is not None:
                mask = mask & (self.lengths[:, None] - seen < config.window)[:, None, None]
            # The queries that share keys stand where others have their tokens.
            grouped = q.unflatten(1, (config.num_kv_heads, -1))
            near = keys[:, :, :reach], values[:, :, :reach]
            return F.scaled_dot_product_attention(grouped, *near, mask, scale=config.scale).flatten(1, 2)

        return attend

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but those of a bool mask [B]."""
        self.lengths = self.lengths[rows]
        for layer in range(len(self.keys)):
            self.keys[layer], self.values[layer] = self.keys[layer][rows], self.values[layer][rows]


# ------------------------------------------------------------------------------------------------ for the stages


class DeviceRunner:
    """A ``FeatureSource``: the target on the device. What it makes of a text is kept there while memory is left, so
    that later epochs do without its pass, nearly half of a step."""

    def __init__(self, target: DeviceTarget) -> None:
        self._target = target
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}  # by text: features [n, F], last states [n, D]
        if target.device.type == "cuda":
            torch.cuda.empty_cache()  # what earlier stages left would count as taken

    def batch(self, texts: Sequence[Text], drafter: TrainableDrafter, epoch: int) -> FeatureBatch:
        """See ``FeatureSource.batch``; one runner serves one drafter, or several that read the same layers."""
        packed = pack(texts)
        anchors, rows = drafter.wanted(packed, epoch)
        read = self._read([text for text in texts if text.id not in self._kept], drafter.aux_layers)
        states = [read[text.id] if text.id in read else self._kept[text.id] for text in texts]
        if read and self._room():
            self._kept |= read
        features, last = (torch.cat(parts) for parts in zip(*states, strict=True))
        hidden = last[send(rows, self._target.device)]
        return FeatureBatch(packed, anchors, rows, features.float(), self._target.unembed(hidden), hidden.float())

    def _read(self, texts: Sequence[Text], aux_layers: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        if not texts:
            return {}
        lengths = [len(text.tokens) for text in texts]
        read = self._target.read([text.tokens for text in texts], aux_layers)
        each = zip(*(part.split(lengths) for part in read), strict=True)
        return dict(zip((text.id for text in texts), each, strict=True))

    def _room(self) -> bool:
        """Whether what training itself takes, which grows with the longest texts, still has some to spare."""
        if self._target.device.type != "cuda":
            return self._target.device.type == "cpu"  # of other devices it is not known
        free, total = torch.cuda.mem_get_info(self._target.device)
        return free > SPARE * total


def device_answers(load: Callable[[], DeviceTarget], rows: int, settings: Settings) -> Answerer:
    """Answer ``rows`` prompts of similar length together. Raises InvalidRequest for sampling options beyond
    temperature."""
    params = settings.params
    if params.top_k or params.top_p < 1 or params.min_p or params.penalised or params.logit_bias:
        raise InvalidRequest(
            "on a device answers are drawn by temperature alone; set top_k = 0, top_p = 1, min_p = 0 and "
            "repetition_penalty = 1, or leave device out"
        )

    def answer(todo: deque[ChatTurn]) -> Iterator[list[tuple[ChatTurn, list[int]]]]:
        ends = () if params.ignore_eos else settings.end_tokens
        while todo:
            some = sorted((todo.popleft() for _ in range(min(len(todo), 16 * rows))), key=lambda t: len(t.tokens))
            for first in range(0, len(some), rows):
                turns = some[first : first + rows]
                answers = load().answer([t.tokens for t in turns], [settings.of(t) for t in turns], ends)
                yield list(zip(turns, answers, strict=True))

    return answer
