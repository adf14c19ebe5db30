"""Any other causal language model, through Transformers: slower than a native target, and never running remote code."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from outrider.errors import CheckpointError, InvalidRequest, OutriderError
from outrider.kv_cache.contiguous import ContiguousCache
from outrider.models.decoder import check_aux_layers, end_tokens, refuse_quantised, sampling_defaults
from outrider.models.weights import DTYPES, TensorFiles
from outrider.registry import find
from outrider.types import Backend, KVCache, RaggedBatch, TargetOutput, TargetSpec, to_list

__all__ = ["HuggingFaceTarget", "TransformersCache"]

POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length"),
    *("seq_length", "seq_len", "n_ctx", "context_length", "max_target_positions", "model_max_length"),
)
"""What configs of different families call the longest text, in the order in which they are asked."""
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose keys and values can be rewound."""


class TransformersCache(ContiguousCache):
    """One cache of Transformers per slot, cropped when it is rewound."""

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, [], torch.float32)
        # Without a config every layer keeps all it saw, windows or not: a ring buffer could not be rewound.
        self.caches = [DynamicCache() for _ in range(slots)]

    def open(self) -> int:
        """Reserve an empty slot. Raises CacheFull."""
        slot = super().open()
        self.caches[slot] = DynamicCache()
        return slot

    def rewind(self, slots: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor) -> None:
        """Forget everything past ``lengths[b]`` tokens of slot ``slots[b]``."""
        for slot, length in zip(to_list(slots), to_list(lengths), strict=True):
            self.crop(slot, length)
        super().rewind(slots, lengths)

    def crop(self, slot: int, length: int) -> None:
        """Cut a slot's cache to ``length`` tokens."""
        extra = self.caches[slot].get_seq_length() - length
        if extra > 0:
            self.caches[slot].crop(-extra)

    def release(self, slot: int) -> None:
        """Give a slot back, and its tensors."""
        super().release(slot)
        self.caches[slot] = DynamicCache()


class HuggingFaceTarget:
    """A causal language model of Transformers, one row at a time."""

    def __init__(self, model: PreTrainedModel, spec: TargetSpec, backend: Backend) -> None:
        self.model, self.spec, self.backend = model.eval().requires_grad_(False), spec, backend
        self._layers = _decoder_layers(model, spec.num_layers)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._check()

    @classmethod
    def load(cls, path: Path, config: Mapping[str, Any], *, dtype: str, backend: Backend) -> Self:
        """Read a Hugging Face directory. Transformers runs the layers; ``backend`` verifies and samples.

        Raises CheckpointError, also for models whose state cannot be rewound; InvalidRequest for a quantised dtype.
        """
        if dtype in ("int8", "int4", "file"):
            raise InvalidRequest(
                f"dtype {dtype!r} needs an architecture that the native core runs, and {_kind(config)} runs through "
                "Transformers; give float32, bfloat16 or float64"
            )
        if _kind(config) not in CONFIG_MAPPING_NAMES:
            remote = "; its files bring code, which is never run" if "auto_map" in config else ""
            raise CheckpointError(f"model_type {_kind(config)!r} is not known to Outrider or Transformers{remote}")
        if _kind(config) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise CheckpointError(
                f"model_type {_kind(config)!r} is no causal language model of Transformers (does it read images, "
                "or is it an encoder?); choose one that continues text"
            )
        refuse_quantised(config)
        TensorFiles(path)  # finds pickles and damaged files before Transformers does
        model = _from_pretrained(path, DTYPES[dtype])
        text = model.config.get_text_config()
        spec = TargetSpec(
            architecture=_kind(config),
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            max_positions=_max_positions(text),
            dtype=DTYPES[dtype],
            name=str(path),
            eos_token_ids=end_tokens(config),
            defaults=sampling_defaults(config),
        )
        return cls(model, spec, backend)

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Caches for ``slots`` sequences of up to ``capacity`` tokens."""
        cache: KVCache = find("kv_cache", "transformers")(slots, capacity)
        return cache

    @torch.no_grad()
    def forward(
        self,
        batch: RaggedBatch,
        cache: Any,
        aux_layers: Sequence[int] = (),
        logits_at: Tensor | None = None,
    ) -> TargetOutput:
        """One pass; see ``outrider.types.TargetModel``. Features are caught by hooks on the decoder layers."""
        check_aux_layers(aux_layers, self.spec.num_layers)
        wanted = torch.arange(len(batch.tokens)) if logits_at is None else logits_at
        logits = torch.empty(
            len(wanted), self.spec.vocab_size, dtype=torch.promote_types(self.spec.dtype, torch.float32)
        )
        features: list[Tensor] = []
        for slot, begin, end in zip(
            batch.slots.tolist(), batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True
        ):
            if begin == end:
                continue
            start = int(batch.positions[begin])
            cache.require(slot, start, start + end - begin)
            cache.crop(slot, start)
            here = ((wanted >= begin) & (wanted < end)).nonzero().flatten()
            with self._catching(aux_layers) as auxiliary:
                rows = self._run(batch.tokens[begin:end], cache.caches[slot], wanted[here] - begin)
                logits[here] = rows.to(logits.dtype)
            cache.lengths[slot] = start + end - begin
            if aux_layers:
                features.append(torch.cat([auxiliary[aux_layer] for aux_layer in aux_layers], -1))
        empty = torch.empty(0, len(aux_layers) * self.spec.hidden_size, dtype=self.spec.dtype)
        return TargetOutput(logits, torch.cat([empty, *features]) if aux_layers else None)

    def _run(self, tokens: Tensor, cache: DynamicCache, rows: Tensor) -> Tensor:
        """One row: int64 [n], int64 [m] -> logits [m, V] of those rows."""
        keep = {"logits_to_keep": rows} if self._keeps else {}
        output = self.model(input_ids=tokens[None], past_key_values=cache, use_cache=True, **keep)
        return output.logits[0] if self._keeps else output.logits[0, rows]

    @contextmanager
    def _catching(self, aux_layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the raw residual [n, D] after each auxiliary layer; -1: the first layer's input."""
        auxiliary: dict[int, Tensor] = {}

        def catch(aux_layer: int, value: Any) -> None:
            auxiliary[aux_layer] = (value[0] if isinstance(value, tuple) else value)[0].clone()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            catch(-1, args[0] if args else kwargs["hidden_states"])

        hooks = [
            self._layers[0].register_forward_pre_hook(before, with_kwargs=True)
            if aux_layer == -1
            else self._layers[aux_layer].register_forward_hook(
                lambda module, args, output, aux_layer=aux_layer: catch(aux_layer, output)
            )
            for aux_layer in aux_layers
        ]
        try:
            yield auxiliary
        finally:
            for hook in hooks:
                hook.remove()

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        embedded: Tensor = self.model.get_input_embeddings()(tokens)
        return embedded

    def unembed(self, hidden: Tensor) -> Tensor:
        """[..., D] after the final norm -> [..., V]. Raises InvalidRequest where the model's logits are more."""
        if not self._plain_head:
            raise InvalidRequest(
                f"{self.spec.architecture} does more to its logits than a head and a soft cap, "
                "so a drafter cannot use its head; choose a draft model, or a drafter with a head of its own"
            )
        return self._head(hidden)

    def _head(self, hidden: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden.to(self.spec.dtype)).to(torch.promote_types(self.spec.dtype, torch.float32))
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    @torch.no_grad()
    def _check(self) -> None:
        """Rewind once and compare, so that a model with another kind of state is refused at load."""
        refusal = CheckpointError(
            f"{self.spec.architecture} keeps a state that cannot be rewound (a recurrent or convolutional one?), "
            "so its drafts could not be taken back; choose a model with a plain key/value cache"
        )
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or [])
        stateful = kinds - ATTENTION if kinds else getattr(self.model, "_is_stateful", False)
        if stateful:  # a hybrid family may have members of attention layers alone: Granite 4.0 Micro
            raise refusal
        cache, seen = TransformersCache(2, 8), []
        slot, other = cache.open(), cache.open()
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        try:
            whole = self.forward(RaggedBatch.pack([[1, 2, 3]], [0], [slot]), cache).logits
            if cache.caches[slot].get_seq_length() != 3:
                raise refusal
            cache.rewind(torch.tensor([slot]), torch.tensor([1]))
            again = self.forward(RaggedBatch.pack([[2, 3]], [1], [slot]), cache).logits
            alone = self.forward(RaggedBatch.pack([[1, 2]], [0], [other]), cache).logits
        except OutriderError:
            raise
        except Exception as error:  # whatever the model's code raises
            raise CheckpointError(
                f"Transformers loads {self.spec.name} and cannot run it ({type(error).__name__}: {error}); is its "
                "config.json complete?"
            ) from error
        finally:
            hook.remove()
        if not torch.isfinite(torch.cat([whole, again])).all():
            raise CheckpointError(
                f"the logits of {self.spec.name} are NaN or infinite: its weights or its config are damaged, or its "
                "dtype is too narrow for it; check the files, or try dtype='float32'"
            )
        scale = float(whole.abs().max()) * (0.05 if self.spec.dtype is torch.bfloat16 else 1e-3)
        if not torch.allclose(whole[1:], again, atol=scale, rtol=0):
            raise refusal
        if not torch.allclose(whole[:2], alone, atol=scale, rtol=0):
            raise CheckpointError(
                f"{self.spec.architecture}: a token's logits depend on the tokens after it, so as its config stands it "
                "is no causal language model (an encoder?); choose one that writes text"
            )
        self._plain_head = torch.allclose(self._head(seen[0]), whole, atol=scale, rtol=0)


def _max_positions(config: Any) -> int:
    """The longest text a model was made for; 2048 where its config names none.

    With longrope, texts beyond a length have all their positions rotated otherwise, also those in the cache: that one.
    Likewise where layers choose ``keep_window_size`` keys of more (Doge): equal tokens tie, and which of them is chosen
    depends on how the text is cut into passes.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    most = getattr(config, "keep_window_size", None) or math.inf
    for one in (ropes, *ropes.values()):
        if isinstance(one, Mapping) and one.get("rope_type") == "longrope":
            most = min(most, one.get("original_max_position_embeddings") or math.inf)
    for name in POSITIONS:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return int(min(value, most))
    return int(min(2048, most))


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type"))


def _from_pretrained(path: Path, dtype: torch.dtype) -> Any:
    """The model, with every tensor found and finite. Raises CheckpointError."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    except Exception as error:  # each architecture checks its config in its own way
        raise CheckpointError(f"Transformers could not load {path}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model, report = loaded
    for what in ("missing_keys", "unexpected_keys"):
        if report.get(what):
            raise CheckpointError(f"{what.replace('_keys', '')} tensor {sorted(report[what])[0]!r} in {path}")
    for name, found, expected in sorted(report.get("mismatched_keys") or ()):
        raise CheckpointError(
            f"tensor {name!r} of {path} has shape {list(found)}, but the config says {list(expected)}"
        )
    for name, tensor in model.named_parameters():
        if not math.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).item()):
            raise CheckpointError(f"tensor {name!r} of {path} holds values that are NaN or infinite; is it damaged?")
    return model


def _decoder_layers(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """The list of decoder layers: the outermost module list of as many entries as the config says."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(f"found no list of {count} decoder layers in {type(model).__name__}")
