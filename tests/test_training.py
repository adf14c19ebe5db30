"""The trainer: interrupted and distributed runs give the same result; bad data is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from outrider import LLM, SamplingParams, checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.errors import ArtefactError, InvalidRequest
from outrider.models.locations import resolve_model
from outrider.training.dataset import Text, TextSampler, pack, read_texts
from outrider.training.features import CachedFeatures, features
from outrider.training.features import Config as FeaturesConfig
from outrider.training.networks.batch import FeatureBatch, Loss
from outrider.training.prompts import Config as PromptsConfig
from outrider.training.prompts import Source, make_prompts
from outrider.training.recipe import configure
from outrider.training.regenerate import Config as RegenerateConfig
from outrider.training.regenerate import regenerate
from outrider.training.run import Config, Evaluator, _counts, learn, plan_of, run, trainable
from outrider.training.trainer import Plan, TrainingFailed, multiplies_bfloat16

SMALL: dict[str, Any] = {
    "drafter": {"markov_rank": 8, "intermediate_size": 64, "target_layers": [2, 5], "loss": {"anchors": 4}},
    "steps": 8,
    "batch": 4,
    "pack_tokens": 64,
    "length": 48,
    "learning_rate": 2e-3,
    "sanity": False,
    "eval_every": 0,
    "bfloat16": False,
    "tensorboard": False,
}

RUN = """
import json, sys, torch
from pathlib import Path
from outrider.training.run import Config, learn, processes
torch.set_num_threads(1)
options, answers, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
report = lambda step, steps: print(step.step, flush=True)
with processes():
    learn(Config(**options), answers, out, "embedded", dtype="float32", watch=report)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    generator = torch.Generator().manual_seed(1)
    for name, count in (("train", 12), ("held_out", 3)):
        lines = []
        for i in range(count):
            length = 20 + int(torch.randint(30, (1,), generator=generator))
            tokens = torch.randint(2, 4096, (length,), generator=generator).tolist()
            lines.append(json.dumps({"id": f"{name}{i}", "domain": "x", "prompt": tokens[:6], "answer": tokens[6:]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def process(options: dict[str, Any], answers: Path, out: Path, launcher: list[str] | None = None) -> list[str]:
    script = out.parent / "run.py"
    script.write_text(RUN)
    return [sys.executable, *(launcher or []), str(script), json.dumps(options), str(answers), str(out)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OUTRIDER_THREADS": "1"}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load(out / "drafter").tensors)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "state" / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the same result


@pytest.mark.slow
def test_a_run_killed_twice_ends_with_the_same_weights(answers: Path, tmp_path: Path) -> None:
    options = SMALL | {"save_seconds": 0.01, "steps": 12}
    command = process(options, answers, tmp_path / "whole")
    subprocess.run(command, check=True, env=environment(), capture_output=True)

    killed = 0
    for after in (3, 7):  # by kill -9 after so many steps
        child = subprocess.Popen(
            process(options, answers, tmp_path / "cut"), env=environment(), stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= after:
                child.send_signal(signal.SIGKILL)
                break
        child.stdout.close()
        child.wait()
        killed += child.returncode == -signal.SIGKILL
    subprocess.run(process(options, answers, tmp_path / "cut"), check=True, env=environment(), capture_output=True)

    assert killed == 2
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(losses(tmp_path / "cut")) == 12  # no step is logged twice


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_train_like_one(sharding: str, answers: Path, tmp_path: Path) -> None:
    learn(Config(**SMALL), answers, tmp_path / "one", "embedded", dtype="float32")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(29500 + os.getpid() % 500)]
    options = SMALL | {"sharding": sharding}
    done = subprocess.run(
        process(options, answers, tmp_path / "two", launcher), env=environment(), capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3", "mtp", "draft_model"])
def test_every_kind_trains_and_drafts(kind: str, answers: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "dspark": SMALL["drafter"],
        "dflash": {"target_layers": [2, 5]},
        "eagle3": {"depth": 3, "target_layers": [2, 5]},
        "mtp": {"depth": 2},
        "draft_model": {"intermediate_size": 64},
    }[kind]
    config = Config(**SMALL | {"kind": kind, "drafter": own, "steps": 12, "eval_every": 12, "eval_tokens": 4})
    learn(config, answers, tmp_path / kind, "embedded", dtype="float32")
    curve = losses(tmp_path / kind)
    llm = LLM("embedded", str(tmp_path / kind / "drafter"), dtype="float32")
    plain = LLM("embedded", "none", dtype="float32")
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)

    assert sum(curve[-3:]) < sum(curve[:3])
    assert llm.generate("Question:", params)[0].token_ids == plain.generate("Question:", params)[0].token_ids
    assert llm.drafter_name == kind
    assert (tmp_path / kind / "report.html").stat().st_size > 10_000
    log = (tmp_path / kind / "state" / "log.jsonl").read_bytes()
    learn(config, answers, tmp_path / kind, "embedded", dtype="float32")  # finished: nothing is repeated
    assert (tmp_path / kind / "state" / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("kind", [pytest.param("dspark", marks=pytest.mark.slow), "dflash"])
def test_one_text_can_be_over_fitted(kind: str, answers: Path, tmp_path: Path) -> None:
    """One learns the target's distribution, the other the text's tokens."""
    printed: list[str] = []
    drafter = {"dspark": {"markov_rank": 16}, "dflash": {"loss": {"cross_entropy": 1.0, "total_variation": 0.0}}}[kind]
    options = SMALL | {"kind": kind, "sanity": True, "steps": 1, "drafter": {**drafter, "target_layers": [2, 5]}}
    console = Console(file=io.StringIO(), width=200)
    learn(
        Config(**options), answers, tmp_path / "out", "embedded", dtype="float32", say=printed.append, console=console
    )
    assert "over-fitted" in printed[0]
    assert "sanity check on one text" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_sanity_check_stops_a_drafter_that_cannot_learn(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(TrainingFailed, match="one single text"):
        learn(Config(**SMALL | {"sanity": True}), answers, tmp_path / "out", "embedded", dtype="float32")
    assert not (tmp_path / "out" / "drafter").exists()


# ------------------------------------------------------------------------------------------------ stages


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of answers, made by the stages before."""
    folder = tmp_path_factory.mktemp("stages")
    lines = [json.dumps({"text": f"Question: Tom has {i} boxes. How many has he?"}) for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    make_prompts(PromptsConfig(sources=[Source(path=folder / "prompts.jsonl")]), folder / "prompts")
    regenerate(RegenerateConfig(max_tokens=16), folder / "prompts", folder / "answers", "embedded")
    return folder / "answers"


def test_cached_features_train_like_the_target(stage: Path, tmp_path: Path) -> None:
    keep = FeaturesConfig(layers=(2, 5), length=48, keep="float32", part_texts=5)
    features(keep, stage, tmp_path / "features", "embedded")
    config = Config(**SMALL)
    run(config, stage, tmp_path / "online", "embedded")
    run(config, stage, tmp_path / "cached", "embedded", features=tmp_path / "features")
    run(config, stage, tmp_path / "cached", "embedded", features=tmp_path / "features")  # finished: nothing to do

    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "online"), rel=1e-5)
    record = json.loads((tmp_path / "cached" / "provenance.json").read_text())
    assert set(record["parents"]) == {"answers", "features"} and record["facts"]["steps"] == 8
    with pytest.raises(InvalidRequest, match=r"layers \[2, 5\], 48 tokens a text; the drafter reads layers \[1, 5\]"):
        other = Config(**SMALL | {"drafter": SMALL["drafter"] | {"target_layers": [1, 5]}})
        run(other, stage, tmp_path / "other", "embedded", features=tmp_path / "features")
    made = tmp_path / "features" / "provenance.json"
    made.write_text(json.dumps(json.loads(made.read_text()) | {"parents": {"answers": "another"}}))
    with pytest.raises(ArtefactError, match="was made from other answers"):
        run(config, stage, tmp_path / "foreign", "embedded", features=tmp_path / "features")


def test_features_resume_after_the_last_file(stage: Path, tmp_path: Path) -> None:
    keep = FeaturesConfig(layers=(2,), length=48, part_texts=3)
    whole = features(keep, stage, tmp_path / "whole", "embedded")
    features(keep, stage, tmp_path / "cut", "embedded")
    parts = sorted((tmp_path / "cut").glob("*.safetensors"))
    for lost in ("provenance.json", "index.json"):
        (tmp_path / "cut" / lost).unlink()
    parts[-1].unlink()
    kept = parts[0].stat().st_mtime_ns
    begun = json.loads((tmp_path / "whole" / "provenance.json").read_text())
    (tmp_path / "cut" / "begun.json").write_text(json.dumps(begun))
    again = features(keep, stage, tmp_path / "cut", "embedded")

    assert len(parts) > 1
    assert again.sha256 == whole.sha256
    assert parts[0].stat().st_mtime_ns == kept
    with pytest.raises(ArtefactError, match=r"made with part_texts: 3, now 4"):  # files would hold other texts
        features(keep.model_copy(update={"part_texts": 4}), stage, tmp_path / "cut", "embedded")


def test_features_and_run_stay_within_a_short_context(stage: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(resolve_model("embedded"), target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    regenerate(RegenerateConfig(max_tokens=16), stage.parent / "prompts", tmp_path / "answers", str(target))
    features(FeaturesConfig(layers=(2, 5)), tmp_path / "answers", tmp_path / "features", str(target))
    options = Config(**SMALL | {"length": 512, "steps": 1})
    run(options, tmp_path / "answers", tmp_path / "run", str(target), features=tmp_path / "features")
    assert (tmp_path / "run" / "drafter").exists()


@pytest.mark.parametrize("lines", ["", '{"id": "a", "prompt": [1, 2], "answer": [3]}\n'])
def test_a_run_without_held_out_prompts_is_not_evaluated(lines: str, answers: Path, tmp_path: Path) -> None:
    shutil.copytree(answers, tmp_path / "answers")
    (tmp_path / "answers" / "held_out.jsonl").write_text(lines)
    said: list[str] = []
    options = Config(**SMALL | {"eval_every": None, "steps": None, "epochs": 0.25})
    facts = learn(options, tmp_path / "answers", tmp_path / "out", "embedded", dtype="float32", say=said.append)
    assert facts["steps"] == 1  # a quarter of 12 texts, 4 a step
    assert "acceptance_length" not in facts and "no held-out prompts" in said[0]


def test_training_goes_on_from_a_drafter_of_the_same_kind_and_layers(stage: Path, tmp_path: Path) -> None:
    run(Config(**SMALL), stage, tmp_path / "first", "embedded")
    start = str(tmp_path / "first" / "drafter")
    run(Config(**SMALL | {"start_from": start}), stage, tmp_path / "then", "embedded")
    assert losses(tmp_path / "then")[0] < losses(tmp_path / "first")[0]
    llm = LLM("embedded", "none", dtype="float32")
    for options, message in (
        ({"drafter": SMALL["drafter"] | {"target_layers": [1, 5]}}, r"reads layers \[2, 5\] .* trained \[1, 5\]"),
        ({"kind": "eagle3", "drafter": {}}, "is a drafter of kind 'dspark', .* of kind 'eagle3'"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            trainable(Config(**SMALL | {"start_from": start, **options}), llm)
    with pytest.raises(InvalidRequest, match="here: start_from goes on .* a draft model starts anew$"):
        configure("run", {"kind": "draft_model", "start_from": start}, "here")
    shutil.copytree(start, tmp_path / "copy")
    moved = Config(**SMALL | {"start_from": str(tmp_path / "copy")})
    run(moved, stage, tmp_path / "then", "embedded")  # the same drafter elsewhere: still finished
    shutil.copy(tmp_path / "then" / "drafter" / "model.safetensors", tmp_path / "copy")
    with pytest.raises(ArtefactError, match="made with another start_from"):
        run(moved, stage, tmp_path / "then", "embedded")


def test_a_start_keeps_an_embedding_and_a_head_of_its_own_and_the_order_of_its_vocabulary(tmp_path: Path) -> None:
    llm = LLM("embedded", "none", dtype="float32")
    options = {**SMALL, "kind": "dflash", "drafter": {"target_layers": [2, 5], "intermediate_size": 64}}
    new = trainable(Config(**options), llm)
    fresh: DraftCheckpoint = new.snapshot()  # type: ignore[operator]

    def started(name: str, changes: dict[str, Any], **more: Any) -> DraftCheckpoint:
        given = replace(fresh, **{**changes, "tensors": {**fresh.tensors, **changes.get("tensors", {})}})
        folder = str(checkpoints.save(given, tmp_path / name, "outrider", {}))
        drafter = {**options["drafter"], **more}
        made: Any = trainable(Config(**{**options, "drafter": drafter, "start_from": folder}), llm)
        snapshot: DraftCheckpoint = made.snapshot()
        for tensor, own in (("head.weight", made.frozen.head), ("embed.weight", made.frozen.embed(torch.arange(4096)))):
            assert torch.equal(snapshot.tensors.get(tensor, own), own)  # trained with what is stored
        return snapshot

    copies: DraftCheckpoint = new.frozen.filled(fresh)  # type: ignore[operator, union-attr]
    narrow = {name: tensor.bfloat16() for name, tensor in copies.tensors.items()}
    assert started("copies", {"tensors": narrow}).tensors.keys() == fresh.tensors.keys()
    generator = torch.Generator().manual_seed(0)
    own = {name: torch.randn(4096, 256, generator=generator) for name in ("embed.weight", "head.weight")}
    kept = started("own", {"tensors": own, "frozen_embedding": False})
    assert not kept.frozen_embedding and all(torch.equal(kept.tensors[name], own[name]) for name in own)
    order = torch.randperm(4096, generator=generator)[:100]
    few = {"d2t": order - torch.arange(100), "head.weight": own["head.weight"][:100]}
    reduced: dict[str, Any] = {"draft_vocab_size": 100, "tensors": few}
    kept = started("reduced", reduced, draft_vocab=100)
    assert all(torch.equal(kept.tensors[name], few[name]) for name in few)

    decoder = {**fresh.decoder, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    masks = {"design": replace(fresh.design, mask_token_id=9)}  # type: ignore[type-var]
    for name, changes, message in (
        ("vocabulary", reduced, "has draft_vocab 100, the drafter to be trained 4096; give the options"),
        ("mask", masks, "has mask_token_id 9, the drafter to be trained"),
        ("rotations", {"decoder": decoder}, "layers of another rotary embedding, window"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            started(name, changes)


def test_a_run_refuses_changed_answers(stage: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    shutil.copytree(stage, answers)
    run(Config(**SMALL), answers, tmp_path / "out", "embedded")
    with (answers / "train.jsonl").open("a") as file:
        file.write('{"id": "new", "domain": "", "prompt": [1, 2], "answer": [3, 4]}\n')
    with pytest.raises(ArtefactError, match="changed since"):
        run(Config(**SMALL), answers, tmp_path / "out", "embedded")
    with pytest.raises(ArtefactError, match=r"learning_rate.*0\.002.*0\.003"):
        run(Config(**SMALL | {"learning_rate": 3e-3}), stage, tmp_path / "out", "embedded")


# ------------------------------------------------------------------------------------------------ errors


def test_a_nan_loss_stops_the_run_and_keeps_the_state(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outrider.training.networks import TrainableBlock

    true_loss, calls = TrainableBlock.loss, []

    def broken(self: nn.Module, batch: FeatureBatch) -> Loss:
        calls.append(1)
        loss: Loss = true_loss(self, batch)  # type: ignore[arg-type]
        return loss if len(calls) not in (6, 7) else Loss(loss.total * float("nan"), loss.parts, loss.weight)

    options = Config(**SMALL | {"save_seconds": 1e-6, "pack_tokens": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(TrainableBlock, "loss", broken)
        with pytest.raises(TrainingFailed, match="the loss is nan at step 6; the state .* is of an earlier step"):
            learn(options, answers, tmp_path / "out", "embedded", dtype="float32")
        with pytest.raises(TrainingFailed, match="the loss is nan at step 1; no state was saved before"):
            learn(options, answers, tmp_path / "at_once", "embedded", dtype="float32")
    state = torch.load(tmp_path / "out" / "state" / "state.pt", weights_only=True)
    learn(options, answers, tmp_path / "out", "embedded", dtype="float32")

    assert state["step"] == 5
    assert all(bool(tensor.isfinite().all()) for tensor in state["module"].values())
    assert (tmp_path / "out" / "drafter").exists() and len(losses(tmp_path / "out")) == 8


def test_weights_that_are_no_numbers_are_neither_saved_nor_finished(answers: Path, tmp_path: Path) -> None:
    options = Config(**SMALL | {"steps": 1, "learning_rate": 1.0}).model_copy(update={"weight_decay": 1e308})
    message = r"weights are no longer finite after step 1; no state .* lower learning_rate \(now 1\) or weight_decay"
    with pytest.raises(TrainingFailed, match=message):
        learn(options, answers, tmp_path, "embedded", dtype="float32")
    assert not (tmp_path / "drafter").exists() and not (tmp_path / "state" / "state.pt").exists()


def test_the_sanity_check_stops_at_a_loss_that_is_no_number(answers: Path, tmp_path: Path) -> None:
    huge = Config(**SMALL | {"sanity": True, "drafter": {**SMALL["drafter"], "loss": {"cross_entropy": 1e308}}})
    with pytest.raises(TrainingFailed, match=r"sanity check .*the loss is inf at step 1; try a lower learning_rate"):
        learn(huge, answers, tmp_path, "embedded", dtype="float32")


def test_a_full_disk_keeps_the_previous_state(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_save, calls = torch.save, []

    def full(value: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        true_save(value, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        TrainingFailed, match=r"No space left.*is of an earlier step and intact.*run the same command again"
    ):
        learn(Config(**SMALL | {"save_seconds": 1e-6}), answers, tmp_path / "out", "embedded", dtype="float32")
    assert torch.load(tmp_path / "out" / "state" / "state.pt", weights_only=True)["step"] == 2
    assert [path.name for path in (tmp_path / "out" / "state").iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ('{"id": 1, "prompt": [3]}', "line 2: expected an object"),
        ('{"id": 1, "prompt": [3], "answer": [4, 99999]}', "token 99999 is outside the target's vocabulary of 4096"),
    ],
)
def test_a_malformed_answer_names_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"id": "a", "prompt": [1, 2], "answer": [3, 4]}\n' + line + "\n")
    with pytest.raises(InvalidRequest, match=message):
        read_texts(path, length=16, vocab_size=4096)


def test_no_usable_answer_at_all(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "a", "prompt": [1, 2], "answer": [3]}\n')
    with pytest.raises(InvalidRequest, match="holds no text"):
        read_texts(tmp_path / "train.jsonl", length=16, vocab_size=4096)


def test_untrainable_kinds_and_unknown_options_are_refused() -> None:
    llm = LLM("embedded", "none", dtype="float32")
    with pytest.raises(InvalidRequest, match="'ngram' cannot be trained"):
        trainable(Config(kind="ngram"), llm)
    with pytest.raises(InvalidRequest, match="did you mean 'markov_rank'"):
        trainable(Config(drafter={"markov_rnak": 3}), llm)


# ------------------------------------------------------------------------------------------------ sampling texts


def test_every_text_appears_once_per_epoch_with_any_number_of_processes() -> None:
    some = [Text(str(i), "", tuple(range(3 + i)), 1) for i in range(10)]
    sampler = TextSampler(some, batch=4, pack_tokens=12, seed=5)
    seen = [text.id for step in range(5) for part in sampler.packs(step) for text in part]
    shared = [[t.id for r in range(3) for part in sampler.packs(step, r, 3) for t in part] for step in range(5)]
    counts = {len(sampler.packs(0, rank, 3)) for rank in range(3)}

    assert sorted(seen[:20]) == sorted([str(i) for i in range(10)] * 2)
    assert all(sorted(shared[s]) == sorted(t.id for p in sampler.packs(s) for t in p) for s in range(5))
    assert len(counts) == 1
    assert all(sum(len(t.tokens) for t in part) <= 12 for s in range(5) for part in sampler.packs(s) if len(part) > 1)


def test_each_epoch_has_an_order_of_its_own_and_so_has_each_seed() -> None:
    some = [Text(str(i), "", (1, 2, 3), 1) for i in range(12)]
    samplers = [TextSampler(some, batch=12, pack_tokens=3, seed=seed) for seed in (5, 6)]
    orders = [[text.id for pack in s.packs(epoch) for text in pack] for s in samplers for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    halves = TextSampler(some, batch=6, pack_tokens=3, seed=5)
    assert [halves.epoch(step) for step in range(5)] == [0, 0, 1, 1, 2]


def test_texts_are_cut_to_their_length(tmp_path: Path) -> None:
    lines = [{"id": str(n), "prompt": [1] * n, "answer": [2] * 9} for n in (3, 4, 5)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_texts(tmp_path / "train.jsonl", length=6, vocab_size=4)
    assert [(text.id, text.tokens) for text in found] == [("3", (1, 1, 1, 2, 2, 2)), ("4", (1, 1, 1, 1, 2, 2))]


def test_features_of_other_layers_or_lengths_are_refused(tmp_path: Path) -> None:
    target: Any = None
    for layers, length in (([5, 2], 48), ([2], 48), ([2, 5], 47)):
        (tmp_path / "index.json").write_text(json.dumps({"layers": layers, "length": length, "places": {}}))
        with pytest.raises(InvalidRequest, match=r"the drafter reads layers \[2, 5\], 48 tokens"):
            CachedFeatures(target, tmp_path, (2, 5), 48)


def test_a_draft_vocabulary_is_counted_in_the_answers() -> None:
    texts = [Text("a", "", (3, 3, 3, 4), 3), Text("b", "", (3, 4, 2), 1)]
    assert _counts(texts, 6).tolist() == [0, 0, 1, 0, 2, 0]


def test_an_evaluation_gives_the_prompts_without_their_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"id": f"{d}{i}", "domain": d, "prompt": [1, i], "answer": [2, 3]} for d in "ab" for i in range(3)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked: list[Any] = []

    def generate(prompts: Any, params: Any) -> list[Any]:
        asked.extend(prompts)
        assert {one.seed for one in params} == {0, 1}
        return [SimpleNamespace(stats=SimpleNamespace(rounds=5, generated=10 * len(asked) + 1)) for _ in prompts]

    llm: Any = SimpleNamespace(target=SimpleNamespace(spec=SimpleNamespace(vocab_size=9)))
    llm.with_drafter = lambda path: SimpleNamespace(generate=generate)
    monkeypatch.setattr("outrider.training.run.save_drafter", lambda *given: None)
    found = Evaluator(Config(eval_prompts=4), llm, tmp_path / "held_out.jsonl", 48)(None)
    assert asked == [(1, 0), (1, 1)] * 2
    assert found == {"acceptance_length": 6.0, "acceptance_lengths": {"a": 4.0, "b": 8.0}}


def test_a_pack_marks_the_answers() -> None:
    packed = pack([Text("a", "", (5, 6, 7), 1), Text("b", "", (8, 9), 2)])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9]
    assert packed.answers.tolist() == [False, True, True, False, False]
    assert packed.offsets.tolist() == [0, 3, 5]
    assert packed.keys[0] != packed.keys[1]


def test_products_in_bfloat16_only_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    x = {dtype: torch.ones(256, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}

    def seconds(dtype: torch.dtype) -> float:
        began = time.process_time()
        x[dtype] @ x[dtype].T
        return time.process_time() - began

    single, half = (min(seconds(dtype) for _ in range(5)) for dtype in x)
    assert half < 6 * single or not multiplies_bfloat16(cpu)
    for fast in (True, False):
        monkeypatch.setattr("outrider.training.run.multiplies_bfloat16", lambda device, fast=fast: fast)
        assert plan_of(Config(), 1, cpu).bfloat16 is fast
        assert plan_of(Config(bfloat16=not fast), 1, cpu).bfloat16 is not fast


def test_the_learning_rate_rises_then_falls() -> None:
    plan = Plan(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0.001 <= rates[-1] < 0.01
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)  # half of the cosine is over
