"""Stage ``run``: train a drafter on the target's answers, with regular evaluation on held-out prompts.

It writes ``drafter/``, a checkpoint that ``LLM(target, drafter=...)`` loads, ``report.html``, and ``state/``, from
which an interrupted run resumes. Under torchrun every process calls ``run``; rank 0 writes.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from rich.console import Console
from torch import Tensor, nn

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import ArtefactError, InvalidRequest
from outrider.files import new_folder, write_json
from outrider.models.loading import load_layers, model_config
from outrider.models.locations import beside, resolve_model
from outrider.training.artefact import Artefact, begin, open_artefact, target_hash
from outrider.training.dataset import Text, TextSampler, read_texts
from outrider.training.device_target import DeviceRunner, DeviceTarget, check_device
from outrider.training.features import CachedFeatures
from outrider.training.networks import (
    FeatureBatch,
    Frozen,
    TrainableNet,
    fill,
    in_four_bits,
    matrices_of,
    second_moments,
    training_of,
)
from outrider.training.progress import Progress
from outrider.training.report import read_log, write_report
from outrider.training.target_runner import FeatureSource, TargetRunner
from outrider.training.trainer import Plan, Step, Trainer, TrainingFailed, multiplies_bfloat16, rank_and_world, steadier
from outrider.types import TargetModel

__all__ = [
    "Config",
    "Evaluator",
    "learn",
    "over_fit",
    "plan_of",
    "processes",
    "run",
    "save_drafter",
    "sources",
    "trainable",
]

SANITY_TOKENS = 24  # of the answer that the sanity check prefers: fewer prove little, more take longer
ROUNDED_FOR = 192  # texts whose states decide how matrices are rounded to 4 bits
ACCEPTED = 0.9  # share of drafts that must be accepted on the single text of the sanity check
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Config(BaseModel):
    """Options of a training run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    free: ClassVar[frozenset[str]] = frozenset({"save_seconds", "sanity", "tensorboard", "form", "start_from"})

    kind: str = "dspark"
    """Kind of drafter: a trainable name of the catalogue (see ``outrider models``)."""
    drafter: dict[str, Any] = Field(default_factory=dict)
    """Options of that kind: layers, block_size, target_layers, markov_rank, loss, ..."""
    start_from: str | None = None
    """A finished drafter of the same kind, target layers and shape, whose weights training goes on from. What it holds
    is hashed, not its path."""
    epochs: float = Field(3.0, gt=0, allow_inf_nan=False)
    """Passes over all texts."""
    steps: int | None = Field(None, ge=1)
    """Number of steps of ``batch`` texts; replaces ``epochs``."""
    batch: int = Field(4, ge=1)
    """Texts per step, over all processes. Small steps learn more in the same time; an accelerator idles with few."""
    length: int = Field(512, ge=4)
    """Most tokens of a text, prompt included; longer texts are cut."""
    pack_tokens: int = Field(1024, ge=1)
    """Tokens in one pass through the drafter: more need more memory, fewer use the processor less well."""
    learning_rate: float = Field(6e-4, gt=0, le=1)
    warmup: float = Field(0.04, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0, le=100)
    clip: float = Field(1.0, gt=0)
    dtype: str = "auto"
    """Precision of the target during training."""
    device: str = "cpu"
    """cuda trains on an accelerator, the target in bfloat16 beside the drafter."""
    bfloat16: bool | None = None
    """Matrix products in bfloat16; weights and sums stay in float32. Default: where the processor or accelerator has
    instructions for it; without them it is some forty times slower than float32."""
    seed: int = Field(0, ge=0, lt=2**63)
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: full copies (ddp), or weights sharded over the processes (fsdp)."""
    save_seconds: float = Field(60.0, gt=0)
    """Seconds between saved states: the most work that a killed run loses."""
    sanity: bool = True
    """Before a long run, over-fit a single text until its drafts are accepted: a drafter that fails cannot learn."""
    eval_every: int | None = Field(None, ge=0)
    """Steps between evaluations on held-out prompts; 0: no evaluation. By default an eighth of the run. An evaluation
    also follows the last step."""
    eval_prompts: int = Field(12, ge=1)
    """Held-out prompts of an evaluation, over all domains."""
    eval_tokens: int = Field(64, ge=4)
    """New tokens per prompt of an evaluation."""
    form: Literal["auto", "speculators", "deepspec", "outrider"] = "auto"
    """Checkpoint format of the finished drafter; auto: speculators where it can hold the kind, else outrider."""
    four_bits: bool = False
    """Round the finished drafter's layers and head to 4 bits, so that what they make of some of the texts changes least
    (GPTQ): a draft on the native core takes about a quarter less time, and some 1 % fewer drafts are accepted.
    Needs the form outrider."""
    tensorboard: bool = True
    """Write TensorBoard events where TensorBoard is installed."""

    @model_validator(mode="after")
    def _start_of_its_kind(self) -> Self:
        if self.start_from is not None and self.kind == "draft_model":
            raise ValueError("start_from goes on from a trained drafter of the target, and a draft model starts anew")
        return self

    @model_validator(mode="after")
    def _form_of_four_bits(self) -> Self:
        if self.four_bits and (self.form in ("speculators", "deepspec") or self.kind == "draft_model"):
            raise ValueError("four_bits needs a trained drafter in the form outrider, the only one that has 4 bits")
        return self

    @field_validator("start_from")
    @classmethod
    def _from_the_recipe(cls, name: str | None, info: ValidationInfo) -> str | None:
        return name if name is None or info.context is None else beside(name, Path(info.context["folder"]))


def trainable(
    config: Config, llm: LLM, texts: Sequence[Text] = (), target: TargetModel | DeviceTarget | None = None
) -> nn.Module:
    """A new, untrained drafter of ``config.kind`` for this target, which ``target`` stands for on another device. A
    reduced draft vocabulary is chosen by the answers of ``texts``. Raises InvalidRequest."""
    options = training_of(config.kind, config.drafter)
    torch.manual_seed(config.seed)
    with torch.device("cpu"):
        facts, layers = model_config(llm.model), load_layers(llm.model)
    if layers is not None:
        layers = layers[0], _ReadOnCpu(layers[1])
    counts = partial(_counts, texts, llm.target.spec.vocab_size)
    target = llm.target if target is None else target
    if config.start_from is None:
        module: nn.Module = options.start(target, facts, llm.tokenizer.vocabulary, layers, counts)
        return module
    with torch.device("cpu"):
        given = checkpoints.load(config.start_from)
        drafted = given.drafted
    drafted = drafted.to(torch.get_default_device())
    module = options.start(target, facts, llm.tokenizer.vocabulary, None, lambda: drafted)
    fill(module, given, config.start_from)
    return module


class _ReadOnCpu(Mapping[str, Tensor]):
    """Weights that are read when they are asked for, from files whose readers make tensors on the CPU."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        with torch.device("cpu"):
            return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _counts(texts: Sequence[Text], vocab_size: int) -> Tensor:
    """How often the target wrote each token. -> int64 [V]"""
    written = [token for text in texts for token in text.tokens[text.prompt_length :]]
    return torch.bincount(torch.tensor(written, dtype=torch.int64), minlength=vocab_size)


def run(
    config: Config,
    answers: Path,
    out: Path,
    target: str,
    *,
    features: Path | None = None,
    console: Console | None = None,
) -> Artefact:
    """Train a drafter on an artefact of answers, resuming an interrupted run. ``features``: an artefact of cached
    target features of these answers.

    Raises ArtefactError for parents that do not fit; CheckpointError for the target; InvalidRequest for options that
    do not fit; TrainingFailed where training cannot continue.
    """
    with processes():
        parent = open_artefact(answers, "regenerate", target)
        if rank_and_world()[0] > 0:  # only rank 0 writes the artefact
            learn(config, answers, out, target, features=features)
            return parent
        parents = {"answers": parent}
        if features is not None:
            parents["features"] = open_artefact(features, "features", target)
            if parents["features"].provenance["parents"]["answers"] != parent.sha256:
                raise ArtefactError(f"{features} was made from other answers than those in {answers}; make it again")
        with begin(out, "run", config, parents=parents, sources=sources(config), target=target) as work:
            if not work.finished:
                say = console.print if console is not None else _silent
                facts = learn(config, answers, out, target, features=features, say=say, console=console)
                work.finish(["drafter"], facts)
    return Artefact(out, "run", work.record["sha256"], work.record["target"], work.record)


def sources(config: Config) -> dict[str, str]:
    """The hash of the drafter that training starts from. Raises CheckpointError where there is none."""
    return {} if config.start_from is None else {"start_from": target_hash(config.start_from)}


def learn(
    config: Config,
    answers: Path,
    out: Path,
    target: str,
    *,
    features: Path | None = None,
    dtype: str | None = None,
    watch: Callable[[Step, int], None] = lambda step, steps: None,
    say: Callable[[str], None] = lambda text: None,
    console: Console | None = None,
) -> dict[str, Any]:
    """``run`` without artefacts: train on ``answers`` (train.jsonl, held_out.jsonl), write ``out/drafter`` unless it
    exists, and return facts about the run."""
    device = check_device(config.device)
    if config.device != "cpu" and features is not None:
        raise InvalidRequest("cached features are read on the CPU; train without them on a device")
    llm = LLM(target, "none", dtype=dtype or config.dtype)
    rank, world = rank_and_world()
    vocab, length = llm.target.spec.vocab_size, min(config.length, llm.target.spec.max_positions)
    texts = read_texts(answers / "train.jsonl", length=length, vocab_size=vocab)
    if config.batch < world:
        raise InvalidRequest(f"batch must be at least the number of processes, {world}; got {config.batch}")
    steps = config.steps or math.ceil(config.epochs * len(texts) / config.batch)
    plan = plan_of(config, steps, device)
    work, finished = out / "state", out / "drafter"
    with device:  # new tensors are made there; steps do without, as it makes every call three times as long
        device_target = None if config.device == "cpu" else DeviceTarget(target, device)
        module = trainable(config, llm, texts, device_target)
    if config.four_bits:
        matrices_of(module)  # refused now, not after training
    target_runner: FeatureSource = TargetRunner(llm.target, length)
    if device_target is not None:
        target_runner = DeviceRunner(device_target)
    if features is not None:
        target_runner = CachedFeatures(llm.target, features, module.aux_layers, length)  # type: ignore[arg-type]
    if config.sanity and rank == 0 and not (work / "state.pt").exists():
        with device:
            tried = trainable(config, llm, texts, device_target).to(device)
        say(over_fit(tried, target_runner, texts, plan, console=console))
    every = max(1, steps // 8) if config.eval_every is None else config.eval_every
    evaluator = Evaluator(config, llm, answers / "held_out.jsonl", length) if every else None
    if evaluator is not None and not evaluator.prompts and rank == 0:
        say("no held-out prompts: trained without evaluation; more prompts, or prompts.held_out, give some")
    board = _tensorboard(config, out) if rank == 0 else None

    def evaluate(step: int) -> dict[str, Any]:
        drafter = _on_cpu(module.snapshot())  # type: ignore[operator]
        return evaluator(drafter) if evaluator is not None and rank == 0 else {}

    sampler = TextSampler(texts, config.batch, config.pack_tokens, config.seed)
    trainer = Trainer(module.to(device), target_runner, sampler, plan, work, config.sharding)
    with Progress(console, f"{config.kind}, steps", steps, trainer.resume()) as progress:
        for step in trainer.run(every, evaluate):
            if board is not None:
                for name, value in {"loss": step.loss, "rate": step.rate, **step.parts}.items():
                    board.add_scalar(name, value, step.step)
            progress.advance(1, step.tokens, f"loss {step.loss:.3f}")
            watch(step, steps)
    if config.four_bits and not finished.exists():
        some = random.Random(config.seed).sample(texts, min(ROUNDED_FOR, len(texts)))
        drafter = _on_cpu(_rounded(module, target_runner, some, plan.bfloat16, console))
    else:
        drafter = _on_cpu(module.snapshot())  # type: ignore[operator]
    log = read_log(work / "log.jsonl") if rank == 0 else []
    facts = {"steps": steps, "texts": len(texts), **_facts(log)}
    if rank == 0:
        if not finished.exists():
            save_drafter(drafter, finished, config.form, {"config": config.model_dump(), **facts}, llm)
        write_report(log, out, config.model_dump(), facts)
    return facts


def _rounded(
    module: nn.Module, source: FeatureSource, texts: Sequence[Text], bfloat16: bool, console: Console | None
) -> DraftCheckpoint:
    """The drafter with its matrices in 4 bits."""
    assert isinstance(module, TrainableNet)
    device = next(module.parameters()).device
    with Progress(console, "rounding to 4 bits, texts", len(texts)) as progress:

        def batches() -> Iterator[FeatureBatch]:
            for text in texts:
                yield source.batch([text], module, 0)  # type: ignore[arg-type]
                progress.advance(1, len(text.tokens))

        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            moments = second_moments(module, batches())
    return in_four_bits(module, moments)


def plan_of(config: Config, steps: int, device: torch.device) -> Plan:
    """The trainer's part of the options."""
    return Plan(
        steps=steps,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        bfloat16=multiplies_bfloat16(device) if config.bfloat16 is None else config.bfloat16,
        save_seconds=config.save_seconds,
    )


def _facts(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evaluated = [line for line in log if "acceptance_length" in line]
    facts: dict[str, Any] = {
        "seconds": round(sum(line["seconds"] for line in log), 1),
        "processor_seconds": round(sum(line.get("processor_seconds", 0.0) for line in log), 1),
        "tokens": sum(line["tokens"] for line in log),
        "loss": log[-1]["loss"] if log else None,
    }
    return facts | {name: evaluated[-1][name] for name in ("acceptance_length", "acceptance_lengths") if evaluated}


def _silent(text: str) -> None: ...


def _on_cpu(drafter: Any) -> Any:
    """The result of ``snapshot``, its tensors on the CPU."""
    if not isinstance(drafter, DraftCheckpoint):
        return drafter if next(drafter.parameters()).device.type == "cpu" else deepcopy(drafter).cpu()
    tensors, scales = ({name: t.cpu() for name, t in of.items()} for of in (drafter.tensors, drafter.four_bits))
    return replace(drafter, tensors=tensors, four_bits=scales)


def over_fit(
    module: nn.Module,
    target_runner: FeatureSource,
    texts: Sequence[Text],
    plan: Plan,
    most: int = 400,
    *,
    console: Console | None = None,
) -> str:
    """Sanity check: train on the same blocks of one text until more than ``ACCEPTED`` of its drafts are accepted.

    Acceptance is the larger of two measures: under the target's distribution, and exp(-cross-entropy), the probability
    of the text's tokens, for losses that train on tokens only (DFlash). Returns a line for the log. Raises
    TrainingFailed if ``most`` steps are not enough, and where the loss is not finite.
    """
    text = min(texts, key=lambda text: abs(len(text.tokens) - text.prompt_length - SANITY_TOKENS))
    batch = target_runner.batch([text], module, 0)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(module.parameters(), lr=max(plan.learning_rate, 1e-3), weight_decay=0.0)
    accepted, began = 0.0, time.monotonic()
    with Progress(console, "sanity check on one text, steps at most", most) as progress:
        for step in range(most):
            loss = module(batch)
            if not math.isfinite(value := float(loss.total.detach() / loss.weight)):
                raise TrainingFailed(
                    f"sanity check on one text: the loss is {value} at step {step + 1}; try {steadier(plan)}"
                )
            (loss.total / loss.weight).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            by_distribution = loss.parts["acceptance"] / loss.weight
            by_tokens = torch.exp(-loss.parts["cross_entropy"] / loss.weight)
            accepted = max(float(by_distribution), float(by_tokens))
            progress.advance(1, note=f"{accepted:.0%} of its drafts accepted")
            if accepted > ACCEPTED:
                seconds = time.monotonic() - began
                share = f"{accepted:.0%} of its drafts accepted"
                return f"one text over-fitted in {step + 1} steps, {seconds:.0f} s: {share}"
    raise TrainingFailed(
        f"after {most} steps on one single text only {accepted:.0%} of its drafts would be accepted, expected "
        f"{ACCEPTED:.0%}: the options or the data are probably wrong (a learning rate far too low or high, features "
        "of the wrong layers); sanity = false skips this check"
    )


class Evaluator:
    """Acceptance length on held-out prompts, measured by decoding them under ``rejection`` at temperature 1."""

    def __init__(self, config: Config, llm: LLM, held_out: Path, length: int) -> None:
        self._llm, self._form, self._tokens = llm, config.form, config.eval_tokens
        vocab = llm.target.spec.vocab_size  # of few prompts there may be none that is held out
        texts = read_texts(held_out, length=length, vocab_size=vocab, required=False) if held_out.exists() else []
        by_domain: dict[str, list[Text]] = defaultdict(list)
        for text in texts:
            by_domain[text.domain].append(text)
        share = math.ceil(config.eval_prompts / max(1, len(by_domain)))
        self.prompts = {domain: some[:share] for domain, some in sorted(by_domain.items())}

    def __call__(self, drafter: Any) -> dict[str, Any]:
        """Acceptance length, bonus token included: the mean over domains, and each domain's."""
        if not self.prompts:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "drafter"
            save_drafter(drafter, path, self._form, {}, self._llm)
            llm = self._llm.with_drafter(str(path))
            lengths = {}
            for domain, texts in self.prompts.items():
                prompts = [text.tokens[: text.prompt_length] for text in texts]
                outputs = llm.generate(
                    prompts,
                    [
                        SamplingParams(temperature=1.0, max_tokens=self._tokens, seed=i, rule="rejection")
                        for i in range(len(prompts))
                    ],
                )
                rounds = sum(output.stats.rounds for output in outputs)
                generated = sum(output.stats.generated - 1 for output in outputs)
                lengths[domain] = round(generated / rounds, 4) if rounds else 1.0
        mean = sum(lengths.values()) / len(lengths)
        return {"acceptance_length": round(mean, 4), "acceptance_lengths": lengths}


def save_drafter(drafter: Any, folder: Path, form: str, provenance: Mapping[str, Any], llm: LLM) -> None:
    """Write the result of ``TrainableDrafter.snapshot`` atomically."""
    if isinstance(drafter, DraftCheckpoint):
        if form == "deepspec":
            drafter = Frozen(drafter, llm.target).filled(drafter)
        form = checkpoints.default_format(drafter) if form == "auto" else form
        checkpoints.save(drafter, folder, form, provenance)
        return
    with new_folder(folder) as partial:
        drafter.save_pretrained(partial)
        for name in TOKENIZER_FILES:
            source = resolve_model(llm.model) / name
            if source.exists():
                shutil.copyfile(source, partial / name)
        write_json(partial / "provenance.json", dict(provenance))


@dataclass
class processes:  # noqa: N801 (used like a function)
    """Opens the process group that torchrun asks for, and closes it at the end. Does nothing without torchrun."""

    opened: bool = False

    def __enter__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))
            self.opened = True

    def __exit__(self, kind: object, *error: object) -> None:
        if self.opened:
            if kind is None:
                dist.barrier()  # wait until rank 0 has written the artefact
            dist.destroy_process_group()


def _tensorboard(config: Config, out: Path) -> Any:
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # optional dependency
        return None
    return SummaryWriter(str(out / "tensorboard"))  # type: ignore[no-untyped-call]
