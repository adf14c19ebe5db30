"""Drafters with gradients: the peers' losses (skipped where the golden folder is absent), and that what is trained is
what drafts."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from trained import DECODER, DESIGNS, WIDTH, make_checkpoint, make_target

from outrider import checkpoints, registry
from outrider.config import LayerConfig, RopeConfig
from outrider.drafters.dspark import DSparkConfig, DSparkDrafter
from outrider.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from outrider.drafters.mtp import MTPConfig, MTPDrafter
from outrider.errors import InvalidRequest
from outrider.files import read_config
from outrider.models.loading import load_backend, load_layers, load_target
from outrider.models.locations import resolve_model
from outrider.training.dataset import Text
from outrider.training.networks import (
    AutoregressiveLoss,
    BlockLoss,
    DFlashTraining,
    DraftModelTraining,
    DSparkTraining,
    Eagle3Training,
    Frozen,
    MTPTraining,
    TrainableAutoregressive,
    TrainableBlock,
    fill,
    training_of,
)
from outrider.training.networks.batch import FeatureBatch, TokenBatch
from outrider.training.networks.block_attention import AutoregressiveAttention, BlockAttention
from outrider.training.networks.initial import mask_token, spread_aux_layers
from outrider.training.networks.losses import position_weights
from outrider.training.target_runner import TargetRunner
from outrider.types import RaggedBatch, TargetModel

GOLDEN = Path(os.environ.get("OUTRIDER_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
LOSSES = GOLDEN / "loss" / "loss_golden.json"
CASES: dict[str, dict[str, Any]] = json.loads(LOSSES.read_text())["cases"] if LOSSES.exists() else {}
VOCABULARY = {f"t{i}": i for i in range(4096)} | {"<|mask|>": 1}


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return load_target("embedded", dtype="float32", backend="reference")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return read_config(resolve_model("embedded"))


def texts() -> list[Text]:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(2, 4096, (n,), generator=generator).tolist() for n in (23, 31, 17)]
    return [Text(str(i), "", tuple(tokens), 5 + i) for i, tokens in enumerate(draw)]


def shaken(module: nn.Module) -> nn.Module:
    """Weights large enough for every part to matter."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("name", CASES or [pytest.param("", marks=pytest.mark.skip(reason=f"no {LOSSES}"))])
def test_losses_and_gradients_are_the_peers(name: str) -> None:
    case, batch = CASES[name], load_file(LOSSES.parent / "batch.safetensors")
    own = load_file(LOSSES.parent / f"{name}.safetensors")
    checkpoint = checkpoints.load(GOLDEN / case["checkpoint"])
    folder = json.loads((GOLDEN / case["checkpoint"] / "golden.json").read_text())["target"]
    target = load_target(GOLDEN / folder, dtype="float32", backend="reference")
    eagle3 = "ttt_length" in case
    rows, length = batch["input_ids"].shape
    inside = own["attention_mask"].bool() if eagle3 else torch.ones(rows, length, dtype=torch.bool)
    answers = (own if eagle3 else batch)["loss_mask"].bool()[inside]
    offsets = torch.tensor([0, *inside.sum(1).cumsum(0).tolist()])
    packed = TokenBatch(batch["input_ids"][inside], offsets, answers, tuple(range(rows)))
    module: TrainableBlock | TrainableAutoregressive
    if eagle3:
        module = TrainableAutoregressive(checkpoint, target, AutoregressiveLoss(decay=case["step_loss_decay"]))
        anchors = torch.cat([torch.arange(begin, end - 1) for begin, end in packed.spans()])
        features = own["target_hidden_states"][inside]
    else:
        loss = BlockLoss(
            cross_entropy=case["ce_loss_alpha"],
            total_variation=case["l1_loss_alpha"],
            confidence=case["confidence_head_alpha"],
            gamma=case["loss_decay_gamma"],
        )
        module = TrainableBlock(checkpoint, target, loss)
        anchors = (batch["anchor_positions"] + offsets[:-1, None])[batch["block_keep_mask"]]
        features = batch["target_hidden_states"][inside]
    logits = batch["target_last_hidden_states"][inside] @ module.frozen.head.T

    got = module.loss(FeatureBatch(packed, anchors, torch.arange(len(packed.tokens)), features, logits))
    got.total.backward()
    weight = float(rows * length) if eagle3 else float(got.weight)  # the peer's EAGLE-3 divides by all positions

    assert float(got.total.detach()) / weight == pytest.approx(case["total_loss"], abs=1e-4)
    for part, key in (("cross_entropy", "ce"), ("total_variation", "l1"), ("confidence", "confidence")):
        if case.get(f"{key}_loss") and part in got.parts:
            assert float(got.parts[part]) / weight == pytest.approx(case[f"{key}_loss"], abs=1e-4)
    names = checkpoints.tensor_names(checkpoint)
    seen = set()
    for name_, parameter in module.named_parameters():
        file = names[name_.removeprefix("stack.")]
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) / weight == pytest.approx(case["grad_norms"][file], rel=1e-3, abs=1e-5)
        if f"grad.{file}" in own:
            torch.testing.assert_close(parameter.grad / weight, own[f"grad.{file}"], rtol=1e-3, atol=1e-5)
        seen.add(file)
    assert seen == set(case["grad_norms"])


# ------------------------------------------------------------------------------------------------ training, drafting


@pytest.mark.parametrize(
    "training",
    [
        DSparkTraining(layers=2, block_size=5, markov_rank=8),
        DSparkTraining(block_size=4, markov_rank=8, markov_head="gated", confidence_with_markov=False),
        DSparkTraining(block_size=4, markov_rank=8, markov_head="rnn", target_layers=(0, 6)),
        DFlashTraining(block_size=4),
        DFlashTraining(block_size=5, sample_from_anchor=False),
        DSparkTraining(block_size=5, sample_from_anchor=False, markov_rank=8),
    ],
    ids=["vanilla", "gated", "rnn", "dflash", "dflash, masks alone", "dspark, masks alone"],
)
def test_a_block_in_training_is_the_block_that_drafts(
    training: DSparkTraining, target: TargetModel, config: dict[str, Any]
) -> None:
    module = shaken(training.start(target, config, VOCABULARY))
    assert isinstance(module, TrainableBlock)
    assert module.design.drafts == training.block_size - (not training.sample_from_anchor)
    some = texts()
    batch = TargetRunner(target, 64).batch(some, module, epoch=0)
    valid = module._valid(batch.texts, batch.anchors)
    with torch.no_grad():
        logits, sure = module.predict(batch)
    drafter = DSparkDrafter(
        module.snapshot(),
        target,
        load_backend("reference", "float32"),
        config=DSparkConfig("", training.block_size),
        dtype=torch.float32,
        max_rows=1,
    )

    checked = 0
    ends = valid.sum(1).cumsum(0).tolist()
    for anchor, begin, end in list(zip(batch.anchors.tolist(), [0, *ends], ends, strict=False))[::5]:
        text = next(i for i, (_, stop) in enumerate(batch.texts.spans()) if anchor < stop)
        start = batch.texts.spans()[text][0]
        context = list(some[text].tokens[: anchor - start])
        drafter.open(0, 64)
        drafter.observe(RaggedBatch.pack([context], [0], [0]), batch.features[start:anchor])
        path = batch.texts.tokens[anchor : anchor + end - begin][None]
        expected, confidence = drafter.follow([0], path)
        drafter.close(0)
        torch.testing.assert_close(logits[begin:end], expected[0], rtol=1e-3, atol=1e-3)
        if sure is not None and confidence is not None:
            torch.testing.assert_close(sure[begin:end], confidence[0], rtol=1e-3, atol=1e-3)
        checked += 1
    assert checked > 5


def test_a_block_learns_the_tokens_that_follow_its_anchors_up_to_the_first_that_is_not_the_answers(
    target: TargetModel, config: dict[str, Any]
) -> None:
    module = shaken(DSparkTraining(block_size=4, target_layers=(1, 4), markov_rank=8).start(target, config, VOCABULARY))
    assert isinstance(module, TrainableBlock)
    batch = TargetRunner(target, 64).batch(texts(), module, epoch=0)
    answers = batch.texts.answers.clone()
    answers[batch.anchors[::3] + 2] = False  # questions of a line inside the block
    batch = replace(batch, texts=replace(batch.texts, answers=answers))
    with torch.no_grad():
        logits, sure = module.predict(batch)
        loss = module.loss(batch)
    assert sure is not None
    weights, at = position_weights(4, module.weights.gamma), 0
    expected = {name: torch.zeros(()) for name in ("cross_entropy", "confidence", "acceptance")}
    for anchor in batch.anchors.tolist():
        end = next(stop for _, stop in batch.texts.spans() if anchor < stop)
        for depth, position in enumerate(range(anchor + 1, min(anchor + 5, end))):
            if not answers[position]:
                break
            q = logits[at].softmax(-1)
            p = batch.logits[int(torch.searchsorted(batch.rows, position - 1))].softmax(-1)
            expected["cross_entropy"] -= weights[depth] * q[batch.texts.tokens[position]].log()
            expected["confidence"] += weights[depth] * nn.functional.binary_cross_entropy_with_logits(
                sure[at], torch.minimum(p, q).sum()
            )
            expected["acceptance"] += weights[depth] * torch.minimum(p, q).sum()
            at += 1
    assert at == len(logits)
    for name, value in expected.items():
        torch.testing.assert_close(loss.parts[name], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_autoregressive_training_is_what_drafts(
    kind: str, target: TargetModel, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Eagle3Training(depth=4, target_layers=(1, 4)) if kind == "eagle3" else MTPTraining(depth=3)
    module = shaken(training.start(target, config, VOCABULARY))
    assert isinstance(module, TrainableAutoregressive)
    some = texts()
    batch = TargetRunner(target, 64).batch(some, module, epoch=0)
    made: list[torch.Tensor] = []
    unembed = module.frozen.unembed
    monkeypatch.setattr(module.frozen, "unembed", lambda hidden: made.append(unembed(hidden)) or made[-1])
    loss = module.loss(batch)
    make, options = (Eagle3Drafter, Eagle3Config) if kind == "eagle3" else (MTPDrafter, MTPConfig)
    drafter = make(
        module.snapshot(),
        target,
        load_backend("reference", "float32"),
        config=options(""),
        dtype=torch.float32,
        max_rows=1,
    )

    steps = module.design.drafts
    for text, (begin, end) in enumerate(batch.texts.spans()):
        for start in range(begin + some[text].prompt_length, end - steps - 1, 4):
            drafter.open(0, 64)
            context = list(some[text].tokens[: start + 1 - begin])
            drafter.observe(RaggedBatch.pack([context], [0], [0]), batch.features[begin : start + 1])
            path = batch.texts.tokens[start + 1 : start + 1 + steps][None]
            expected, _ = drafter.follow([0], path)
            drafter.close(0)
            for k in range(steps):
                valid = batch.anchors[module._valid(batch.texts, batch.anchors, k)]
                row = int((valid == start).nonzero()[0, 0])
                torch.testing.assert_close(made[k][row].detach(), expected[0, k], rtol=1e-3, atol=1e-3)

    weight, hard, accepted = 0.0, 0.0, 0.0
    for k in range(steps):
        valid = batch.anchors[module._valid(batch.texts, batch.anchors, k)]
        q, p = (x.detach().softmax(-1) for x in (made[k], batch.logits[torch.searchsorted(batch.rows, valid + k + 1)]))
        weight += module.weights.decay**k * len(valid)
        inside = valid + k + 2 < batch.texts.ends(valid)  # behind a text's last token there is none to learn
        following = batch.texts.tokens[valid[inside] + k + 2, None]
        hard -= module.weights.decay**k * float(q[inside].gather(1, following).log().sum())
        accepted += module.weights.decay**k * float(torch.minimum(p, q).sum())
    found = [float(value) for value in (loss.weight, loss.parts["cross_entropy"], loss.parts["acceptance"])]
    assert found == pytest.approx([weight, hard, accepted], rel=1e-3)


@pytest.mark.parametrize("training", [DSparkTraining(markov_rank=8), Eagle3Training(depth=3), DraftModelTraining()])
def test_a_pack_changes_nothing(training: Any, target: TargetModel, config: dict[str, Any]) -> None:
    """Texts side by side give the sum of what each gives alone: no text sees another."""
    torch.manual_seed(0)
    module = training.start(target, config, VOCABULARY)
    target_runner, some = TargetRunner(target, 64), texts()
    together = module.loss(target_runner.batch(some, module, epoch=1))
    alone = [module.loss(target_runner.batch([text], module, epoch=1)) for text in some]

    assert float(together.weight) == pytest.approx(sum(float(loss.weight) for loss in alone))
    assert float(together.total.detach()) == pytest.approx(sum(float(loss.total.detach()) for loss in alone), rel=1e-4)


@pytest.mark.parametrize("window", [None, 6])
def test_all_texts_in_one_product_have_the_same_mask(window: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    packed = TokenBatch(torch.zeros(30).long(), torch.tensor([0, 12, 30]), torch.ones(30).bool(), (0, 1))
    anchors, slots = torch.tensor([9, 14, 18, 22]), 4
    layer = LayerConfig(4, 2, 16, 32, RopeConfig((1.0,) * 8), window=window)

    def draw(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, 16, generator=generator)

    given = draw(16, 4), draw(16, 2), draw(16, 2), draw(30, 2), draw(30, 2)
    attention = BlockAttention(packed, anchors, slots, torch.device("cpu"))
    torch.testing.assert_close(attention._padded(layer, *given), attention._by_text(layer, *given))


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_all_texts_in_one_product_give_the_same_draft_steps(window: int | None, heads: int) -> None:
    generator = torch.Generator().manual_seed(6)
    packed = TokenBatch(torch.zeros(32).long(), torch.tensor([0, 13, 14, 32]), torch.ones(32).bool(), (0, 1, 2))
    layers = [LayerConfig(heads, 2, 8, 32, RopeConfig((1.0,) * 4), window=some) for some in (window, 5, None)]
    drawn: list[torch.Tensor] = []

    def draw(count: int) -> torch.Tensor:
        drawn.append(torch.randn(32, count, 8, generator=generator).requires_grad_())
        return drawn[-1]

    given = [(index, layer, draw(heads), draw(2), draw(2)) for _ in range(5) for index, layer in enumerate(layers)]
    apart, together = (AutoregressiveAttention(packed, torch.device("cpu")) for _ in range(2))
    expected = torch.stack([apart._by_text(*step) for step in given])
    got = torch.stack([together._padded(*step) for step in given])
    torch.testing.assert_close(got, expected)

    slope = torch.randn(got.shape, generator=generator)
    gradients = torch.autograd.grad((expected * slope).sum(), drawn)
    for gradient, right in zip(torch.autograd.grad((got * slope).sum(), drawn), gradients, strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize(
    "training",
    [
        Eagle3Training(depth=3, draft_vocab=9, loss={"cross_entropy": 0.5, "total_variation": 0.5}),
        MTPTraining(),
        DSparkTraining(markov_rank=4, draft_vocab=9),
    ],
    ids=["eagle3", "mtp", "dspark"],
)
def test_a_step_on_a_device_never_waits_for_it(
    training: Any, target: TargetModel, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the device "meta" hold no values: whatever reads one, or has a size that depends on one, fails, and so
    does a product with a tensor that was made elsewhere."""
    module = training.start(target, config, VOCABULARY, counts=lambda: torch.arange(target.spec.vocab_size))
    batch, meta = TargetRunner(target, 64).batch(texts(), module, epoch=0), torch.device("meta")
    expected = module.loss(batch)
    for name in ("autoregressive_network", "block_attention", "block_network"):
        monkeypatch.setattr(f"outrider.training.networks.{name}.send", lambda tensor, device: tensor.to(device))
    embedding = torch.empty(target.spec.vocab_size, target.spec.hidden_size)
    for name, value in {**vars(module.frozen), "_embedding": embedding}.items():
        if isinstance(value, torch.Tensor):
            monkeypatch.setattr(module.frozen, name, value.to(meta))
    got = module.to(meta)(replace(batch, features=batch.features.to(meta), logits=batch.logits.to(meta)))
    got.total.backward()

    assert got.total.device == got.weight.device == meta
    assert got.parts.keys() == expected.parts.keys()
    assert all(parameter.grad is not None for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ choices


def test_a_warm_start_sees_the_context_as_the_target_does(target: TargetModel, config: dict[str, Any]) -> None:
    """Keys and values of the context are those of the target's layer behind the aux_layer."""
    layers = load_layers("embedded")
    assert layers is not None
    training = DSparkTraining(layers=1, markov_rank=4, target_layers=(1, 3))
    module = training.start(target, config, VOCABULARY, layers)
    batch = TargetRunner(target, 64).batch(texts()[:1], module, 0)
    config4, weights = layers[0], layers[1]
    state = batch.features[:, -config4.hidden_size :]
    normed = torch.nn.functional.rms_norm(state, state.shape[-1:], weights["layers.4.input_norm.weight"], 1e-6)
    expected = (normed @ weights["layers.4.v.weight"].T).unflatten(1, (-1, 64))
    angles = module.stack.angles(torch.arange(len(state)))[config4.layers[4].rope]
    _, values = module.stack.layers[0].keys_values(module.hidden_norm(module.fc(batch.features)), angles)

    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    for kind in (Eagle3Training(target_layers=(1, 3)), MTPTraining(), DFlashTraining(layers=2, target_layers=(1, 3))):
        module = kind.start(target, config, VOCABULARY, layers)
        loss = module.loss(TargetRunner(target, 64).batch(texts(), module, 0))
        assert bool(loss.total.isfinite())
        first = max(aux_layer for aux_layer in module.aux_layers if aux_layer < 8 - len(module.stack.layers)) + 1
        assert torch.equal(module.stack.layers[0].down.weight, weights[f"layers.{first}.down.weight"])


def test_anchors_depend_on_the_text_and_the_epoch_alone(target: TargetModel, config: dict[str, Any]) -> None:
    module = DSparkTraining(markov_rank=0, confidence=False, loss={"anchors": 3}).start(target, config, VOCABULARY)
    target_runner, some = TargetRunner(target, 64), texts()
    first = target_runner.batch(some, module, 0)
    alone = target_runner.batch([some[1]], module, 0)
    later = target_runner.batch(some, module, 1)
    begin, end = first.texts.spans()[1]
    inside = first.anchors[(first.anchors >= begin) & (first.anchors < end)] - begin

    assert len(first.anchors) == 9
    assert torch.equal(inside, alone.anchors)
    assert not torch.equal(first.anchors, later.anchors)
    assert all(bool(first.texts.answers[a]) for a in first.anchors)


@pytest.mark.parametrize("starts", [None, 4])
def test_drafting_starts_where_it_reaches_an_answer(
    starts: int | None, target: TargetModel, config: dict[str, Any]
) -> None:
    """One text after the other, by the definition."""
    module = Eagle3Training(depth=3, loss={"starts": starts}).start(target, config, VOCABULARY)
    draw = random.Random(7)
    for epoch in range(50):
        offsets = torch.tensor([0, *(draw.randint(1, 12) for _ in range(draw.randint(1, 5)))]).cumsum(0)
        share = draw.choice([0.0, 0.2, 1.0])
        answers = torch.tensor([draw.random() < share for _ in range(int(offsets[-1]))])
        packed = TokenBatch(torch.zeros(len(answers)).long(), offsets, answers, tuple(range(len(offsets) - 1)))
        anchors, rows = [], set()
        for key, (begin, end) in zip(packed.keys, packed.spans(), strict=True):
            first = next((i for i in range(begin, end) if answers[i]), end)
            possible = [i for i in range(begin, end - 1) if i > first - 3]
            if starts is not None and len(possible) > starts:
                possible = sorted(random.Random(f"{key} {epoch}").sample(possible, starts))
            anchors += possible
            # Step k is trained where the token it reads last is an answer's, up to the text's last.
            rows |= {i + k + 1 for i in possible for k in range(3) if i + k + 1 < end and answers[i + k]}
        got = module.wanted(packed, epoch)

        assert got[0].tolist() == anchors
        assert got[1].tolist() == sorted(rows)


def test_no_row_and_no_anchor_lies_outside_what_an_answer_follows(target: TargetModel, config: dict[str, Any]) -> None:
    whole = TokenBatch(torch.zeros(7).long(), torch.tensor([0, 3, 7]), torch.ones(7).bool(), (0, 1))
    asked = replace(whole, answers=torch.tensor([0, 0, 1, 0, 0, 1, 1]).bool())
    model = DraftModelTraining().start(target, config, VOCABULARY)
    block = DSparkTraining(markov_rank=0, confidence=False).start(target, config, VOCABULARY)
    assert [model.wanted(texts, 0)[0].tolist() for texts in (whole, asked)] == [[0, 1, 3, 4, 5], [1, 4, 5]]
    assert [block.wanted(texts, 0)[0].tolist() for texts in (whole, asked)] == [[1, 4, 5], [5]]


def test_every_trainable_kind_is_in_the_catalogue() -> None:
    kinds = registry.names("trainer")
    assert set(kinds) >= {"dspark", "dflash", "eagle3", "mtp", "draft_model"}


def test_without_a_mask_token_a_spare_control_token_stands_for_it(target: TargetModel) -> None:
    full = {f"t{i}": i for i in range(target.spec.vocab_size)}
    spare = {"<|im_start|>" if i == 1 else "<file_sep>" if i == 5 else text: i for text, i in full.items()}
    assert mask_token(None, target.spec, spare) == 5
    with pytest.raises(InvalidRequest, match=r"--set run\.drafter\.mask_token_id=\.\.\. of `outrider train RECIPE`"):
        mask_token(None, target.spec, full)


def test_a_reduced_vocabulary_holds_the_most_frequent_tokens(target: TargetModel, config: dict[str, Any]) -> None:
    counts = torch.zeros(target.spec.vocab_size, dtype=torch.int64)
    counts[[40, 7, 300]] = torch.tensor([9, 5, 2])
    for training in (DSparkTraining(markov_rank=8, draft_vocab=3), Eagle3Training(depth=2, draft_vocab=3)):
        module = training.start(target, config, VOCABULARY, counts=lambda: counts)
        assert (module.snapshot().tensors["d2t"] + torch.arange(3)).tolist() == [7, 40, 300]
        assert module.frozen.head.shape[0] == 3
    with pytest.raises(InvalidRequest, match="draft_vocab must be between 1 and"):
        DSparkTraining(draft_vocab=10**9).start(target, config, VOCABULARY, counts=lambda: counts)


def test_taps_and_mask_tokens(target: TargetModel) -> None:
    assert spread_aux_layers(36, 5) == (1, 9, 18, 26, 34)
    assert spread_aux_layers(8, 3) == (1, 4, 6)
    assert spread_aux_layers(2, 3) == (0,)
    with pytest.raises(InvalidRequest, match="cannot give features"):
        spread_aux_layers(1, 3)
    assert mask_token(None, target.spec, VOCABULARY) == 1
    assert mask_token(7, target.spec, VOCABULARY) == 7
    assert mask_token(None, target.spec, {"a": 0, "b": 1}) == 2
    with pytest.raises(InvalidRequest, match="mask_token_id"):
        mask_token(None, target.spec, {str(i): i for i in range(4096)})


def test_wrong_options_are_refused(target: TargetModel, config: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'gamma'"):
        DSparkTraining(loss={"gama": 1}).start(target, config, VOCABULARY)
    with pytest.raises(InvalidRequest, match="layers"):
        DSparkTraining(layers=0).start(target, config, VOCABULARY)


def test_a_target_that_caps_its_logits_caps_those_of_the_drafter_in_training() -> None:
    target, states = make_target(), torch.randn(3, WIDTH) * 20

    class Capped:
        spec = target.spec

        def unembed(self, hidden: Tensor) -> Tensor:
            return torch.tanh(target.unembed(hidden) / 30) * 30

    checkpoint = make_checkpoint(DESIGNS["dflash"])
    for one in (target, Capped()):
        torch.testing.assert_close(Frozen(checkpoint, one).unembed(states), one.unembed(states), atol=1e-3, rtol=1e-4)  # type: ignore[arg-type]


def test_a_start_whose_biases_would_be_lost_is_refused() -> None:
    options = {"target_layers": [0, 2], "markov_rank": 4, "mask_token_id": 1}
    module = training_of("dspark", options).start(make_target(), DECODER, {})
    given = module.snapshot()
    fill(module, given, "mine")
    biased = replace(given, tensors={**given.tensors, "layers.0.q.bias": torch.zeros(32)})
    with pytest.raises(
        InvalidRequest, match=r"mine holds layers\.0\.q\.bias, which the drafter to be trained has no place"
    ):
        fill(module, biased, "mine")
