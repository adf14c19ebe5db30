"""The training loop. It uses ``wanted`` and ``loss`` of the drafter, and reads the target through a ``FeatureSource``.

A step processes several packs of texts. Gradients are sums, divided once by the weight of the whole step, so neither
the packs nor the number of processes change the result. All randomness follows from (seed, step), so a killed run
resumes with the same result.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from outrider.errors import OutriderError
from outrider.training.artefact import write_state
from outrider.training.dataset import Text, TextSampler
from outrider.training.networks.batch import FeatureBatch, Loss, TrainableDrafter
from outrider.training.target_runner import FeatureSource

__all__ = ["Plan", "Step", "Trainer", "TrainingFailed", "multiplies_bfloat16", "rank_and_world", "steadier"]

Sharding = Literal["ddp", "fsdp"]


class TrainingFailed(OutriderError):
    """Training cannot continue; the files written so far are intact."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Number of steps, learning-rate schedule and optimiser settings."""

    steps: int
    learning_rate: float
    warmup: float = 0.04
    """Share of the steps in which the rate rises linearly; it then falls along a cosine to 0.1 % of its peak."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest gradient norm."""
    bfloat16: bool = True
    """Matrix products in bfloat16; weights, sums and optimiser state stay in float32."""
    save_seconds: float = 60.0
    """Seconds between saved states."""

    def rate(self, step: int) -> float:
        """Learning rate of ``step``."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * max(0.001, (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the log."""

    step: int  # steps finished, this one included
    loss: float
    parts: dict[str, float]
    rate: float
    gradient: float  # norm before clipping
    tokens: int  # in this step, over all processes
    seconds: float
    processor_seconds: float  # of this process, all threads: what other programs take does not count


class Trainer:
    """Trains one drafter. Its folder holds ``state.pt``, from which a run resumes, and ``log.jsonl``, a line a step."""

    def __init__(
        self,
        module: nn.Module,
        target_runner: FeatureSource,
        sampler: TextSampler,
        plan: Plan,
        folder: Path,
        sharding: Sharding = "ddp",
    ) -> None:
        """``module`` is a ``TrainableDrafter``. In a process group it is wrapped as ``sharding`` says."""
        self.module, self.target_runner, self.sampler = module, target_runner, sampler
        self.plan, self.folder = plan, folder
        self.rank, self.world = rank_and_world()
        self.wrapped = self._wrap(sharding)
        self._device = next(module.parameters()).device
        decayed = [p for p in module.parameters() if p.ndim > 1]
        other = [p for p in module.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": other, "weight_decay": 0.0}],
            lr=plan.learning_rate,
            betas=plan.betas,
            fused=self._device.type == "cuda",
        )
        self.done = 0
        self._next: FeatureBatch | None = None  # of the next step's first pack, where it was read ahead

    def run(self, every: int = 0, evaluate: Callable[[int], dict[str, Any]] = lambda step: {}) -> Iterator[Step]:
        """Train from the saved state to the end of the plan, yielding each step. ``evaluate`` runs every ``every``
        steps (0: never) and after the last one; its result is added to the log line.

        Raises TrainingFailed where the loss, the gradient or the weights are not finite; the last saved state stays.
        """
        self.resume()
        saved = time.monotonic()
        while self.done < self.plan.steps:
            step = self._step()
            self.done += 1
            line: dict[str, Any] = {"step": step.step, "loss": step.loss, **step.parts}
            line |= {"rate": step.rate, "gradient": step.gradient, "tokens": step.tokens, "seconds": step.seconds}
            line["processor_seconds"] = step.processor_seconds
            last = self.done == self.plan.steps
            evaluated = last or bool(every and self.done % every == 0)
            saving = last or self._broadcast(time.monotonic() - saved > self.plan.save_seconds)
            if evaluated or saving:
                self._check_weights()
            if evaluated:
                line |= evaluate(self.done)
            if self.rank == 0:
                self._log(line)
            if saving:
                self._save()
                saved = time.monotonic()
            yield step

    # -------------------------------------------------------------------------------------------- one step

    def _step(self) -> Step:
        began, processor, rate = time.monotonic(), time.process_time(), self.plan.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        packs = self.sampler.packs(self.done, self.rank, self.world)
        epoch = self.sampler.epoch(self.done)
        sums: dict[str, Tensor] = {}
        for index, texts in enumerate(packs):
            with self._syncing(last=index == len(packs) - 1):
                loss = self._backward(texts or packs[0], epoch, counted=bool(texts))
            if texts:
                for name, value in {"loss": loss.total.detach(), "weight": loss.weight, **loss.parts}.items():
                    sums[name] = sums[name] + value if name in sums else value
        tokens = sum(len(text.tokens) for texts in packs for text in texts)
        sums["tokens"] = torch.full((), float(tokens), device=self._device)  # made of a number, a tensor would wait
        totals = self._summed(sums)
        gradient = self._clip(totals["weight"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = self._read({**totals, "gradient": gradient})
        weight, norm, count = means.pop("weight"), means.pop("gradient"), int(means.pop("tokens"))
        means = {name: value / weight for name, value in means.items()}
        mean = means.pop("loss")
        for what, number in (("loss", mean), ("gradient's norm", norm)):
            if not math.isfinite(number):
                raise self._diverged(f"the {what} is {number} at step {self.done + 1}")
        seconds, processor_seconds = time.monotonic() - began, time.process_time() - processor
        return Step(self.done + 1, mean, means, rate, norm, count, seconds, processor_seconds)

    def _check_weights(self) -> None:
        """Raise TrainingFailed where the last step made a weight NaN or infinite: its loss was taken before."""
        norm = nn.utils.get_total_norm(self.module.parameters())
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(float(norm)):
            raise self._diverged(f"weights are no longer finite after step {self.done}")

    def _diverged(self, what: str) -> TrainingFailed:
        return TrainingFailed(
            f"{what}; {self._saved()}. Going on would end the same way: start in a new directory with "
            f"{steadier(self.plan)}"
        )

    def _backward(self, texts: Sequence[Text], epoch: int, counted: bool) -> Loss:
        """Forward and backward through one pack."""
        batch, self._next = self._next, None
        if batch is None:
            batch = self._batch(texts, epoch)
        with torch.autocast(batch.features.device.type, dtype=torch.bfloat16, enabled=self.plan.bfloat16):
            loss: Loss = self.wrapped(batch)
        (loss.total if counted else loss.total * 0).backward()
        return loss

    def _batch(self, texts: Sequence[Text], epoch: int) -> FeatureBatch:
        return self.target_runner.batch(texts, cast(TrainableDrafter, self.module), epoch)

    def _clip(self, weight: Tensor) -> Tensor:
        """Turn gradient sums into means, then clip. -> norm before clipping.

        DDP and FSDP average over the processes: multiplying by ``world`` restores the sum."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, self.world / weight)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.clip)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _read(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The values, once they are there. A device reads the next step's texts meanwhile."""
        wide = torch.stack([value.double() for value in values.values()])
        if self._device.type == "cuda":
            wide = wide.to("cpu", non_blocking=True)
            there = torch.cuda.Event()
            there.record()
            if self.done + 1 < self.plan.steps:
                following = self.sampler.packs(self.done + 1, self.rank, self.world)
                self._next = self._batch(following[0], self.sampler.epoch(self.done + 1))
            there.synchronize()
        return dict(zip(values, wide.tolist(), strict=True))

    # -------------------------------------------------------------------------------------------- processes

    def _wrap(self, sharding: Sharding) -> nn.Module:
        if self.world == 1:
            return self.module
        if sharding == "ddp":
            return nn.parallel.DistributedDataParallel(self.module)
        for child in self.module.modules():
            if isinstance(child, nn.ModuleList):
                for layer in child:
                    if sum(p.numel() for p in layer.parameters()) > 1_000_000:
                        fully_shard(layer)
        return cast(nn.Module, fully_shard(self.module))

    @contextlib.contextmanager
    def _syncing(self, last: bool) -> Iterator[None]:
        """Synchronise gradients between processes only with the last pack of a step."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
        else:
            if isinstance(self.wrapped, FSDPModule):
                self.wrapped.set_requires_gradient_sync(last)
            yield

    def _summed(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes."""
        names = sorted(sums)
        values = torch.stack([sums[name].double() for name in names])
        if self.world > 1:
            dist.all_reduce(values)
        return dict(zip(names, values.unbind(), strict=True))

    def _broadcast(self, value: bool) -> bool:
        """Rank 0's value, on every process."""
        if self.world == 1:
            return value
        flag = torch.tensor(float(value), device=self._device)
        dist.broadcast(flag, 0)
        return bool(flag)

    # -------------------------------------------------------------------------------------------- folder

    @property
    def state(self) -> Path:
        return self.folder / "state.pt"

    def _save(self) -> None:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        module, optimizer = get_state_dict(self.module, self.optimizer, options=whole)
        if self.rank == 0:
            try:
                write_state(self.state, {"step": self.done, "module": module, "optimizer": optimizer})
            except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
                raise TrainingFailed(
                    f"cannot save step {self.done} to {self.state}: {error}; {self._saved()}. Free disk space and run "
                    "the same command again"
                ) from error

    def _saved(self) -> str:
        if not self.state.exists():
            return "no state was saved before"
        return f"the state in {self.folder} is of an earlier step and intact"

    def resume(self) -> int:
        """Load the saved state, if there is one. -> steps done."""
        if self.state.exists() and not self.done:
            saved = torch.load(self.state, map_location="cpu", weights_only=True)
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            set_state_dict(
                self.module,
                self.optimizer,
                model_state_dict=saved["module"],
                optim_state_dict=saved["optimizer"],
                options=whole,
            )
            self.done = saved["step"]
        if self.rank == 0:
            self._truncate_log()
        return self.done

    def _log(self, line: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _truncate_log(self) -> None:
        """Drop log lines of steps after the saved state: those steps run again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.done]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def steadier(plan: Plan) -> str:
    """What to change where numbers are no longer finite, for messages."""
    rate, decay = f"learning_rate (now {plan.learning_rate:g})", f"weight_decay (now {plan.weight_decay:g})"
    return f"a lower {rate} or {decay}, smaller weights of the loss{', or bfloat16 = false' if plan.bfloat16 else ''}"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are fast there. A processor without instructions for them takes some forty
    times as long as for float32 (AVX2)."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def rank_and_world() -> tuple[int, int]:
    """Rank of this process, and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
