"""The training loop on a network of two parameters: means over packs, rates, clipping, evaluations, resuming."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from outrider.training.dataset import Text, TextSampler
from outrider.training.networks.batch import Loss
from outrider.training.trainer import Plan, Trainer

TEXTS = [Text(str(i), "", tuple(range(i, 2 * i + 3)), 1) for i in range(6)]
PLAN = Plan(steps=8, learning_rate=0.1, warmup=0.25, clip=0.5, bfloat16=False, save_seconds=1e9)


class Line(nn.Module):
    """A line through the texts' tokens; its loss weighs a text by its length."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.slope = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([[0.5]]))

    def forward(self, batch: Any) -> Loss:
        total = ((batch.features * self.slope[0] + self.shift - 3) ** 2).sum()
        return Loss(total, {"sum": batch.features.sum()}, torch.tensor(float(len(batch.features))))


class Source:
    """The texts' tokens, and the epochs in which they were asked for."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def batch(self, texts: Sequence[Text], drafter: Any, epoch: int) -> Any:
        self.epochs.append(epoch)
        return SimpleNamespace(features=tokens(texts))


def tokens(texts: Sequence[Text]) -> Tensor:
    return torch.tensor([float(token) for text in texts for token in text.tokens])


def trainer(folder: Path, plan: Plan = PLAN, pack_tokens: int = 12) -> Trainer:
    return Trainer(Line(), Source(), TextSampler(TEXTS, 4, pack_tokens, 0), plan, folder)  # type: ignore[arg-type]


def weights(trained: Trainer) -> list[float]:
    return [float(p.detach()) for p in trained.module.parameters()]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_step_is_the_mean_over_its_texts_however_they_are_packed(tmp_path: Path) -> None:
    texts = [text for pack in TextSampler(TEXTS, 4, 999, 0).packs(0) for text in pack]
    whole = Line()
    loss = whole(SimpleNamespace(features=tokens(texts)))
    (loss.total / loss.weight).backward()
    mean = float(loss.total.detach() / loss.weight)
    norm = float(nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None]))
    for pack_tokens in (1, 999):
        step = next(trainer(tmp_path / str(pack_tokens), pack_tokens=pack_tokens).run())
        assert step.loss == pytest.approx(mean, rel=1e-5)
        assert step.parts["sum"] == pytest.approx(float(tokens(texts).mean()), rel=1e-5)
        assert step.gradient == pytest.approx(norm, rel=1e-5) and step.tokens == len(tokens(texts))


def test_each_step_has_its_rate_and_clipped_gradients_and_only_matrices_decay(tmp_path: Path) -> None:
    trained, norms, rates = trainer(tmp_path), [], []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for p in trained.module.parameters() if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(gradients)))
        rates.append([group["lr"] for group in optimizer.param_groups])

    trained.optimizer.register_step_pre_hook(look)
    steps = list(trained.run())
    assert rates == [[PLAN.rate(step)] * 2 for step in range(8)] and len(set(map(tuple, rates))) > 5
    assert norms == pytest.approx([min(0.5, step.gradient) for step in steps], rel=1e-4) and steps[0].gradient > 1
    decays = {p: group["weight_decay"] for group in trained.optimizer.param_groups for p in group["params"]}
    line = trained.module
    assert isinstance(line, Line) and decays == {line.slope: PLAN.weight_decay, line.shift: 0.0}


def test_epochs_and_evaluations_come_when_they_are_due(tmp_path: Path) -> None:
    trained, evaluated = trainer(tmp_path, pack_tokens=999), []
    list(trained.run(3, lambda step: evaluated.append(step) or {}))  # type: ignore[func-returns-value]
    assert evaluated == [3, 6, 8]
    source = trained.target_runner
    assert isinstance(source, Source) and source.epochs == [step * 4 // 6 for step in range(8)]


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    list(whole.run())
    stopped = trainer(tmp_path / "stopped", replace(PLAN, save_seconds=0.0)).run()
    for _ in range(4):
        next(stopped)
    with (tmp_path / "stopped" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.0}\n{"step": 6, "lo')  # steps after the state that was saved last
    again = trainer(tmp_path / "stopped")
    list(again.run())
    assert weights(again) == weights(whole)
    logs = [[(line["step"], line["loss"]) for line in logged(tmp_path / name)] for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and [step for step, _ in logs[1]] == list(range(1, 9))
