"""Stage ``run``: from the target's answers to a drafter, by the trainer, watched on held-out prompts.

Written is ``drafter/``, a checkpoint that ``LLM(target, drafter=...)`` loads, beside ``report.html``; ``state/`` holds
what an interrupted run goes on from. Under torchrun every process calls ``run``; the first one writes.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from torch import nn

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import ArtefactError, InvalidRequest
from outrider.files import new_folder, write_json
from outrider.models.loading import load_layers, model_config
from outrider.models.locations import resolve_model
from outrider.training.artefact import Artefact, begin, open_artefact
from outrider.training.dataset import Text, TextSampler, read_texts
from outrider.training.features import CachedTeacher
from outrider.training.networks import Frozen, training_of
from outrider.training.progress import Progress
from outrider.training.report import read_log, write_report
from outrider.training.target_runner import FeatureSource, TargetRunner
from outrider.training.trainer import Plan, Step, Trainer, TrainingFailed, rank_and_world

__all__ = ["Config", "Evaluator", "learn", "over_fit", "processes", "run", "save_drafter", "trainable"]

ACCEPTED = 0.9  # of the drafts on a text that was learnt by heart
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Config(BaseModel):
    """What one training run asks for."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    free: ClassVar[frozenset[str]] = frozenset({"save_seconds", "sanity", "tensorboard", "form"})

    kind: str = "dspark"
    """Which drafter: a name of the catalogue that can be trained (see ``outrider models``)."""
    drafter: dict[str, Any] = Field(default_factory=dict)
    """Options of that kind: layers, block_size, target_layers, markov_rank, loss, ..."""
    epochs: float = Field(3.0, gt=0)
    """How often every text is seen."""
    steps: int | None = Field(None, ge=1)
    """Or: how many steps of ``batch`` texts."""
    batch: int = Field(16, ge=1)
    """Texts of a step, over all processes."""
    length: int = Field(512, ge=4)
    """Tokens of a text, prompt included; what is longer is cut."""
    pack_tokens: int = Field(1024, ge=1)
    """Tokens that pass through the drafter together: more need more memory, fewer keep processors less busy."""
    learning_rate: float = Field(6e-4, gt=0)
    warmup: float = Field(0.04, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    dtype: str = "auto"
    """Precision of the target while it teaches."""
    bfloat16: bool = True
    """Products in bfloat16; weights and sums stay in float32."""
    seed: int = 0
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: whole copies, or weights spread over the processes."""
    save_seconds: float = Field(60.0, gt=0)
    """The most work that a killed run loses."""
    sanity: bool = True
    """Before a long run, over-fit one text until its whole block is accepted: what cannot do that cannot learn."""
    looks: int = Field(8, ge=0)
    """How often the acceptance length on held-out prompts is measured."""
    look_prompts: int = Field(12, ge=1)
    look_tokens: int = Field(64, ge=4)
    form: Literal["speculators", "deepspec"] = "speculators"
    """The format of the finished drafter."""
    tensorboard: bool = True
    """Write events for TensorBoard, where it is installed."""


def trainable(config: Config, llm: LLM) -> nn.Module:
    """A new drafter of the kind, for this target. Raises InvalidRequest."""
    options = training_of(config.kind, config.drafter)
    torch.manual_seed(config.seed)
    facts, layers = model_config(llm.model), load_layers(llm.model)
    module: nn.Module = options.start(llm.target, facts, llm.tokenizer.vocabulary, layers)
    return module


def run(
    config: Config,
    answers: Path,
    out: Path,
    target: str,
    *,
    features: Path | None = None,
    console: Console | None = None,
) -> Artefact:
    """Train a drafter on an artefact of answers, from where an earlier run stopped. ``features``: what the target makes
    of them, if that was kept.

    Raises ArtefactError for parents that do not fit; CheckpointError for the target; InvalidRequest for options that
    do not fit; TrainingFailed where it cannot go on.
    """
    with processes():
        parent = open_artefact(answers, "regenerate", target)
        if rank_and_world()[0] > 0:  # the first process keeps the books
            learn(config, answers, out, target, features=features)
            return parent
        parents = {"answers": parent}
        if features is not None:
            parents["features"] = open_artefact(features, "features", target)
            if parents["features"].provenance["parents"]["answers"] != parent.sha256:
                raise ArtefactError(f"{features} was made of other answers than those in {answers}; make it again")
        with begin(out, "run", config, parents=parents, target=target) as work:
            if not work.finished:
                say = console.print if console is not None else _silent
                facts = learn(config, answers, out, target, features=features, say=say, console=console)
                work.finish(["drafter"], facts)
    return Artefact(out, "run", work.record["sha256"], work.record["target"], work.record)


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
    """``run`` without the books: train on ``answers`` (train.jsonl, held_out.jsonl), write ``out/drafter`` unless it is
    there already, and return facts about it."""
    llm = LLM(target, "none", dtype=dtype or config.dtype)
    rank, world = rank_and_world()
    vocab, length = llm.target.spec.vocab_size, min(config.length, llm.target.spec.max_positions)
    texts = read_texts(answers / "train.jsonl", length=length, vocab_size=vocab)
    if config.batch < world:
        raise InvalidRequest(f"batch must be at least the number of processes, {world}; got {config.batch}")
    steps = config.steps or math.ceil(config.epochs * len(texts) / config.batch)
    plan = _plan(config, steps)
    work, finished = out / "state", out / "drafter"
    module = trainable(config, llm)
    target_runner: FeatureSource = TargetRunner(llm.target, length)
    if features is not None:
        target_runner = CachedTeacher(llm.target, features, module.aux_layers, length)  # type: ignore[arg-type]
    if config.sanity and rank == 0 and not (work / "state.pt").exists():
        say(over_fit(trainable(config, llm), target_runner, texts, plan))
    evaluator = Evaluator(config, llm, answers / "held_out.jsonl", length) if config.looks else None
    board = _board(config, out) if rank == 0 else None

    def look(step: int) -> dict[str, Any]:
        drafter = module.snapshot()  # type: ignore[operator]
        return evaluator(drafter) if evaluator is not None and rank == 0 else {}

    sampler = TextSampler(texts, config.batch, config.pack_tokens, config.seed)
    trainer = Trainer(module, target_runner, sampler, plan, work, config.sharding)
    every = max(1, steps // config.looks) if config.looks else 0
    with Progress(console, f"{config.kind}, steps", steps, trainer.resume()) as progress:
        for step in trainer.run(every, look):
            if board is not None:
                for name, value in {"loss": step.loss, "rate": step.rate, **step.parts}.items():
                    board.add_scalar(name, value, step.step)
            progress.advance(1, step.tokens, f"loss {step.loss:.3f}")
            watch(step, steps)
    drafter = module.snapshot()  # type: ignore[operator]
    log = read_log(work / "log.jsonl") if rank == 0 else []
    facts = {"steps": steps, "texts": len(texts), **_facts(log)}
    if rank == 0:
        if not finished.exists():
            save_drafter(drafter, finished, config.form, {"config": config.model_dump(), **facts}, llm)
        write_report(log, out, config.model_dump(), facts)
    return facts


def _plan(config: Config, steps: int) -> Plan:
    return Plan(
        steps=steps,
        learning_rate=config.learning_rate,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        bfloat16=config.bfloat16,
        save_seconds=config.save_seconds,
    )


def _facts(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    looks = [line for line in log if "acceptance_length" in line]
    facts: dict[str, Any] = {
        "seconds": round(sum(line["seconds"] for line in log), 1),
        "tokens": sum(line["tokens"] for line in log),
        "loss": log[-1]["loss"] if log else None,
    }
    return facts | {name: looks[-1][name] for name in ("acceptance_length", "acceptance_lengths") if looks}


def _silent(text: str) -> None: ...


def over_fit(
    module: nn.Module, target_runner: FeatureSource, texts: Sequence[Text], plan: Plan, most: int = 400
) -> str:
    """The sanity gate: one text, the same blocks again and again, until they are all but always accepted: by the
    target's distribution, or, for losses that teach the tokens themselves, by a target that is sure of the text's own.

    Returns what to tell people. Raises TrainingFailed where ``most`` steps do not suffice.
    """
    text = min(texts, key=lambda text: abs(len(text.tokens) - text.prompt_length - 24))
    batch = target_runner.batch([text], module, 0)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(module.parameters(), lr=max(plan.learning_rate, 1e-3), weight_decay=0.0)
    accepted, began = 0.0, time.monotonic()
    for step in range(most):
        loss = module(batch)
        (loss.total / loss.weight).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        by_law, by_heart = loss.parts["acceptance"] / loss.weight, torch.exp(-loss.parts["cross_entropy"] / loss.weight)
        accepted = max(float(by_law), float(by_heart))
        if accepted > ACCEPTED:
            seconds = time.monotonic() - began
            return f"one text over-fitted in {step + 1} steps, {seconds:.0f} s: {accepted:.0%} of its drafts accepted"
    raise TrainingFailed(
        f"after {most} steps on one single text only {accepted:.0%} of its drafts would be accepted, expected "
        f"{ACCEPTED:.0%}: something is wrong with the options or the data (a learning rate far too low or high, "
        "features of the wrong layers); sanity = false goes on regardless"
    )


class Evaluator:
    """Acceptance length on held-out prompts, by real runs of the engine under the real rule at temperature 1."""

    def __init__(self, config: Config, llm: LLM, held_out: Path, length: int) -> None:
        self._llm, self._form, self._tokens = llm, config.form, config.look_tokens
        texts = read_texts(held_out, length=length, vocab_size=llm.target.spec.vocab_size) if held_out.exists() else []
        by_domain: dict[str, list[Text]] = defaultdict(list)
        for text in texts:
            by_domain[text.domain].append(text)
        share = math.ceil(config.look_prompts / max(1, len(by_domain)))
        self._prompts = {domain: some[:share] for domain, some in sorted(by_domain.items())}

    def __call__(self, drafter: Any) -> dict[str, Any]:
        """Acceptance length, the target's own token counted: the mean over domains, and each."""
        if not self._prompts:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "drafter"
            save_drafter(drafter, path, self._form, {}, self._llm)
            llm = self._llm.with_drafter(str(path))
            lengths = {}
            for domain, texts in self._prompts.items():
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
    """Write what ``TrainableDrafter.snapshot`` gave, whole or not at all."""
    if isinstance(drafter, DraftCheckpoint):
        if form == "deepspec":
            drafter = Frozen(drafter, llm.target).filled(drafter)
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
    """The process group that torchrun asks for, if it does."""

    ours: bool = False

    def __enter__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=1))
            self.ours = True

    def __exit__(self, kind: object, *error: object) -> None:
        if self.ours:
            if kind is None:
                dist.barrier()  # nobody goes on before the first process has finished its books
            dist.destroy_process_group()


def _board(config: Config, out: Path) -> Any:
    if not config.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra of the package
        return None
    return SummaryWriter(str(out / "tensorboard"))  # type: ignore[no-untyped-call]
