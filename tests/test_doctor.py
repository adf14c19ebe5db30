"""The doctor finds the errors of a checkpoint, and the converter verifies its output."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from trained import DECODER, LAYERS, VOCABULARY, WIDTH, make_checkpoint, make_target, norm, rotate, save_target
from typer.testing import CliRunner

from outrider import checkpoints
from outrider.checkpoints import DraftCheckpoint
from outrider.cli import app
from outrider.drafters.dspark_design import BlockDesign
from outrider.errors import CheckpointError
from outrider.evaluation.diagnosis import Report, examine
from outrider.evaluation.replay import Acceptance, Prompts, Transcript, replay, transcribe
from outrider.models.locations import drafter_location
from outrider.registry import find

DESIGN = BlockDesign(4, 63, markov_rank=4, confidence=True, confidence_with_markov=True)
PROMPTS = [torch.randint(0, 63, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 7, 9, 12)]
LAYERS_READ = (0, 2, 3)


# ------------------------------------------------------------------------------------------------ a drafter that works


def dense_logits(w: dict[str, Tensor], context: Tensor, seen: Tensor, block: Tensor, starts: Tensor, embedding: Tensor):
    """The block's base logits, differentiable: context [N, C, F], seen bool [N, C], block int64 [N, S] -> [N, S, V]."""
    heads, groups, width = 4, 2, 8
    count, size = block.shape
    cache = norm(context @ w["fc.weight"].T, w["hidden_norm.weight"])
    x = embedding[block]
    ahead = starts[:, None] + torch.arange(size)
    places = torch.cat([torch.arange(context.shape[1]).expand(count, -1), ahead], 1)
    mask = torch.cat([seen, torch.ones(count, size, dtype=torch.bool)], 1)[:, None, None]
    for i in range(2):
        layer = {n.split(".")[2]: t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        inner = norm(x, layer["input_norm"])
        both = torch.cat([cache, inner], 1)

        def split(states: Tensor, matrix: Tensor, many: int) -> Tensor:
            return (states @ matrix.T).unflatten(-1, (many, width))

        def turn(states: Tensor, positions: Tensor) -> Tensor:
            return rotate(states.flatten(0, 1), positions.flatten()).view(states.shape)

        q = turn(norm(split(inner, layer["q"], heads), layer["q_norm"]), ahead)
        k = turn(norm(split(both, layer["k"], groups), layer["k_norm"]), places).repeat_interleave(2, 2)
        v = split(both, layer["v"], groups).repeat_interleave(2, 2)
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) * width**-0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2) @ layer["o"].T
        inner = norm(x, layer["mlp_norm"])
        x = x + (silu(inner @ layer["gate"].T) * (inner @ layer["up"].T)) @ layer["down"].T
    return norm(x, w["norm.weight"])


def fit(checkpoint: DraftCheckpoint, target: Any, transcripts: list[Transcript], steps: int = 120) -> DraftCheckpoint:
    """Over-fit the drafter on these texts: enough for every wrong reading of it to lower acceptance."""
    design, frozen = checkpoint.design, ("embed.weight", "head.weight", "confidence.weight", "confidence.bias")
    w = {n: t.clone().requires_grad_(n not in frozen) for n, t in checkpoint.tensors.items()}
    places = [(t, i) for t in transcripts for i in range(t.prompt_length, len(t.tokens) - design.block_size)]
    longest = max(i for _, i in places)
    context = torch.zeros(len(places), longest, 3 * WIDTH)
    seen = torch.zeros(len(places), longest, dtype=torch.bool)
    for n, (t, i) in enumerate(places):
        context[n, :i] = torch.cat([t.features[layer][:i] for layer in LAYERS_READ], -1)
        seen[n, :i] = True
    path = torch.tensor([t.tokens[i : i + design.block_size + 1] for t, i in places])
    block = torch.full_like(path[:, :-1], design.mask_token_id)
    block[:, 0] = path[:, 0]
    starts = torch.tensor([i for _, i in places])
    optimizer = torch.optim.Adam([t for t in w.values() if t.requires_grad], lr=8e-3)
    for _ in range(steps):
        hidden = dense_logits(w, context, seen, block, starts, w["embed.weight"])
        logits = hidden @ w["head.weight"].T + w["markov.w1.weight"][path[:, :-1]] @ w["markov.w2.weight"].T
        loss = cross_entropy(logits.flatten(0, 1), path[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return replace(checkpoint, tensors={n: t.detach() for n, t in w.items()})


@pytest.fixture(scope="module")
def target() -> Any:
    return make_target()


@pytest.fixture(scope="module")
def taught(target: Any) -> DraftCheckpoint:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        texts = transcribe(target, PROMPTS, LAYERS_READ, 24)
        checkpoint = fit(make_checkpoint(DESIGN, target=target), target, texts)
    return replace(checkpoint, extras={"dtype": "float32"})


@pytest.fixture
def folder(tmp_path: Path, taught: DraftCheckpoint) -> Path:
    return checkpoints.save(taught, tmp_path / "drafter", "deepspec", {})


def diagnose(folder: Path, target: Any = None) -> Report:
    config = {**DECODER, "num_hidden_layers": LAYERS}
    prompts = Prompts(PROMPTS, "over-fitted", natural=True)
    return examine(folder, target, target_config=config, prompts=prompts, new_tokens=24)


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensor(folder: Path, name: str, tensor: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "model.safetensors")


def test_a_healthy_checkpoint_has_no_findings(folder: Path, target: Any) -> None:
    report = diagnose(folder, target)
    assert report.healthy and not report.findings and report.best.reading == "as the file says"
    assert report.best.acceptance.greedy_length > 3
    facts = report.to_json()
    assert facts["is"]["kind"] == "dspark" and facts["expects"]["target_layers"] == [0, 2, 3]
    assert facts["works"] == "as the file says" and json.dumps(facts)
    assert diagnose(folder).healthy  # without a target


DAMAGE: dict[str, tuple[Any, str, str]] = {  # the damage, the finding's subject, and words of its message
    "layers off by one": (
        lambda f: change(f, target_layer_ids=[-1, 1, 2]),
        "layers",
        r"layers one higher .*\[0, 2, 3\]",
    ),
    "the last layer": (lambda f: change(f, target_layer_ids=[1, 3, 4]), "last layer", r"last layer \(4\)"),
    "the mask token": (lambda f: change(f, mask_token_id=17), "mask token", "mask token 63"),
    "rotary positions": (
        lambda f: change(f, rope_parameters={"rope_type": "default", "rope_theta": 40.0}),
        "rope",
        "the target's rotary positions",
    ),
    "the vocabulary": (lambda f: change(f, vocab_size=99), "tensors", r"config says \[99"),
    "a missing tensor": (lambda f: change_tensor(f, "fc.weight", None), "tensors", "'fc.weight' is missing"),
    "NaN": (
        lambda f: change_tensor(f, "fc.weight", torch.full((WIDTH, 3 * WIDTH), torch.nan)),
        "tensors",
        "'fc.weight' holds 3072 values that are NaN",
    ),
    "another target's": (
        lambda f: change_tensor(f, "embed_tokens.weight", torch.randn(VOCABULARY, WIDTH)),
        "target",
        "embedding differs",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_found(folder: Path, target: Any, name: str) -> None:
    damage, about, words = DAMAGE[name]
    damage(folder)
    report = diagnose(folder, target)
    faults = [finding for finding in report.findings if finding.level == "fault"]
    assert not report.healthy
    assert any(f.about == about for f in faults), faults
    assert any(re.search(words, f.message) for f in faults), faults


def test_the_working_anchor_layout_is_found(tmp_path: Path, taught: DraftCheckpoint, target: Any) -> None:
    folder = checkpoints.save(taught, tmp_path / "drafter", "speculators", {})
    change(folder, sample_from_anchor=False)
    report = diagnose(folder, target)
    assert [f.about for f in report.findings if f.level == "fault"] == ["anchor"]
    assert report.best.reading == "the anchor's slot predicts"


def test_layers_counted_from_one_are_found(folder: Path, target: Any) -> None:
    """Layers as speculators counts them, in DeepSpec's key: the last layer is refused, the working reading is found."""
    change(folder, target_layer_ids=[1, 3, 4])
    report = diagnose(folder, target)
    assert report.best.reading == "layers one lower" and report.best.checkpoint.target_layers == LAYERS_READ


@pytest.mark.parametrize("layers", [(0, 1, 7), (-2, 0, 1), (0, 1), (0, 1, 1)])
def test_given_layers_are_for_files_that_name_none(monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...]) -> None:
    options = [text for layer in layers for text in ("--target-layer", str(layer))]
    named = CliRunner().invoke(app, ["doctor", "embedded-eagle3", *options])
    assert named.exit_code == 2 and "names its own" in named.stderr
    nameless = replace(checkpoints.load("embedded-eagle3"), target_layers=None)
    monkeypatch.setattr(checkpoints, "load", lambda folder: nameless)
    refused = CliRunner().invoke(app, ["doctor", "embedded-eagle3", *options])
    assert refused.exit_code == 2 and "3 different target layers, from -1 (the embedding) to 6" in refused.stderr
    assert CliRunner().invoke(app, ["doctor", "embedded-eagle3"]).exit_code == 0


def test_the_report_has_no_python_values() -> None:
    shown = CliRunner().invoke(app, ["doctor", "embedded-eagle3"]).output
    assert "None" not in shown and "[" not in shown and "not said" in shown


def test_suspicious_values_without_a_target(folder: Path) -> None:
    def findings(**changes: Any) -> list[tuple[str, str]]:
        before = (folder / "config.json").read_text()
        change(folder, **changes)
        report = diagnose(folder)
        (folder / "config.json").write_text(before)
        return [(finding.level, finding.about) for finding in report.findings]

    assert findings() == []
    assert findings(dtype="bfloat16") == [("suspicious", "dtype")]
    assert findings(rope_parameters={"rope_type": "default"}) == [("suspicious", "rope")]
    assert findings(target_layer_ids=[2, 0, 3]) == [("suspicious", "layers")]
    assert findings(mask_token_id=400) == [("fault", "mask token")]
    assert findings(rope_parameters={"rope_type": "spiral"}) == [("fault", "rope")]
    change_tensor(folder, "markov_head.markov_w2.weight", torch.zeros(VOCABULARY, 4))
    assert findings() == [("suspicious", "tensors")]


def test_useless_weights(folder: Path, target: Any) -> None:
    for name in ("layers.0.mlp.down_proj.weight", "layers.1.self_attn.o_proj.weight", "markov_head.markov_w2.weight"):
        tensor = load_file(folder / "model.safetensors")[name]
        change_tensor(folder, name, torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    report = diagnose(folder, target)
    assert report.best is None
    assert any("almost no draft is accepted" in finding.message for finding in report.findings)


def test_replay_counts_what_greedy_decoding_accepts(taught: DraftCheckpoint, target: Any) -> None:
    """Against the drafter's proposals, position by position."""
    from trained import Session, propose

    from outrider.backends.reference import ReferenceBackend

    kind = find("drafter", "dspark")

    def make() -> Any:
        return kind(taught, target, ReferenceBackend(), config=kind.Config(""), dtype=torch.float32, max_rows=4)

    (text,) = transcribe(target, PROMPTS[:1], LAYERS_READ, 14)
    acceptance = replay(make(), [text])
    expected = []
    for place in range(text.prompt_length, len(text.tokens) - 4):
        drafter = make()
        Session(target, drafter, 1).observe([text.tokens[:place]], [0])
        drafts = propose(drafter, [0], [text.tokens[: place + 1]]).tokens[0].tolist()
        true = text.tokens[place + 1 : place + 5]
        expected.append(next((i for i, (a, b) in enumerate(zip(drafts, true, strict=True)) if a != b), 4))
    assert acceptance.greedy.tolist() == expected


class Oracle:
    """States the target's own logits behind every position of one text, but those of one draft turned round."""

    block, aux_layers, wrong = 3, (0,), 3

    def __init__(self, text: Transcript) -> None:
        self.text, self.cache, self.net, self.end = text, self, self, 0

    def open(self, slot: int, tokens: int) -> None: ...

    def close(self, slot: int) -> None: ...

    def end_of(self, slot: int) -> int:
        return self.end

    def spread(self, logits: Tensor) -> Tensor:
        return logits

    def observe(self, batch: Any, features: Tensor) -> None:
        self.end += len(batch.tokens)

    def follow(self, slots: list[int], path: Tensor) -> tuple[Tensor]:
        first = self.end + 1 - self.text.prompt_length  # the last token, at `end`, is known: the next one is drafted
        logits = self.text.logits[None, first : first + self.block].clone()
        logits[:, self.wrong :][:, :1] *= -1
        return (logits,)


def test_a_drafter_that_states_the_targets_logits_has_all_accepted() -> None:
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    text = Transcript([1, 2, 3, 4, *logits.argmax(-1).tolist()], 4, {0: torch.zeros(13, 2)}, logits)
    drafter: Any = Oracle(text)
    acceptance = replay(drafter, [text])
    assert len(acceptance.greedy) == 6 and (acceptance.greedy == 3).all()
    assert acceptance.expected.tolist() == pytest.approx([3.0] * 6)
    drafter = Oracle(text)
    drafter.wrong = 1  # the third draft is the target's, behind one that is not
    acceptance = replay(drafter, [text])
    assert (acceptance.greedy == 1).all() and bool((acceptance.expected < 2.5).all())


def test_acceptance_by_hand() -> None:
    """Three positions; the mean gain is 0.5, its standard error (0.25 / 3) ** 0.5."""
    one = Acceptance(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    other = Acceptance(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
    assert (one.greedy_length, one.expected_length, one.score) == (2.0, 2.0, 1.0)
    assert one.advantage(other) == pytest.approx((0.5, 0.5 / (0.25 / 3) ** 0.5))
    assert other.advantage(one)[0] == pytest.approx(-0.5) and one.advantage(one) == (0.0, 0.0)


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory, target: Any) -> Path:
    return save_target(tmp_path_factory.mktemp("targets") / "target", target)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in PROMPTS))
    return file


def outrider(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_converted_and_back_through_the_command(
    tmp_path: Path, folder: Path, target_folder: Path, prompts_file: Path
) -> None:
    """Equal bit for bit and key for key, measured, with its provenance."""
    options = ("--prompts", prompts_file, "--backend", "reference", "--json", "-")
    there = outrider("convert", folder, tmp_path / "b", "--to", "speculators", "--target", target_folder, *options)
    assert there.exit_code == 0, there.output
    facts = json.loads(there.stdout)
    assert facts["verified"] and facts["greedy_acceptance_length"] > 3 and facts["kind"] == "dspark"
    provenance = json.loads((tmp_path / "b" / "provenance.json").read_text())
    assert provenance["source"] == str(folder) and len(provenance["source_sha256"]["model.safetensors"]) == 64

    (tmp_path / "target").symlink_to(target_folder)  # the copy names its target, which is now beside it
    back = outrider("convert", tmp_path / "b", tmp_path / "c", "--to", "deepspec", *options)
    assert back.exit_code == 0, back.output
    assert json.loads((tmp_path / "c" / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    a, c = load_file(folder / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    assert a.keys() == c.keys() and all(torch.equal(a[n], c[n]) for n in a)


def test_a_drafter_without_embedding_takes_its_targets(
    tmp_path: Path, taught: DraftCheckpoint, target: Any, target_folder: Path, prompts_file: Path
) -> None:
    bare = {n: t for n, t in taught.tensors.items() if n not in ("embed.weight", "head.weight")}
    source = checkpoints.save(replace(taught, tensors=bare), tmp_path / "bare", "speculators", {})
    options = ("--target", target_folder, "--prompts", prompts_file, "--backend", "reference")
    result = outrider("convert", source, tmp_path / "full", "--to", "deepspec", *options)
    assert result.exit_code == 0, result.output
    full = checkpoints.load(tmp_path / "full")
    assert all(torch.equal(full.tensors[n], target.tensors[n]) for n in ("embed.weight", "head.weight"))


def test_a_drafter_no_better_than_guessing_is_not_converted(
    tmp_path: Path, target: Any, target_folder: Path, prompts_file: Path
) -> None:
    source = checkpoints.save(make_checkpoint(DESIGN, target=target, seed=9), tmp_path / "random", "deepspec", {})
    options = ("--to", "speculators", "--prompts", prompts_file, "--backend", "reference")
    refused = outrider("convert", source, tmp_path / "out", *options, "--target", target_folder)
    assert refused.exit_code == 2 and "almost no draft is accepted" in refused.stderr
    unknown = outrider("convert", source, tmp_path / "out", *options)
    assert unknown.exit_code == 2 and "--target" in unknown.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["random"]  # nothing was written
    unverified = outrider("convert", source, tmp_path / "out", "--to", "speculators", "--unverified")
    assert unverified.exit_code == 0 and "not verified" in unverified.output
    again = outrider("convert", source, tmp_path / "out", "--to", "speculators", "--unverified")
    assert again.exit_code == 2 and "exists already" in again.stderr


def test_the_doctor_as_a_command(folder: Path, target_folder: Path, prompts_file: Path) -> None:
    options = ("--target", target_folder, "--prompts", prompts_file, "--backend", "reference", "--json", "-")
    healthy = outrider("doctor", folder, *options)
    assert healthy.exit_code == 0 and json.loads(healthy.stdout)["works"] == "as the file says"
    change(folder, mask_token_id=17)
    sick = outrider("doctor", folder, *options)
    facts = json.loads(sick.stdout)
    assert sick.exit_code == 1 and not facts["healthy"] and facts["findings"][0]["about"] == "mask token"
    unreadable = outrider("doctor", target_folder)
    assert unreadable.exit_code == 1 and "no drafter" in unreadable.output


def test_the_doctor_knows_packaged_drafters_by_their_kinds() -> None:
    refused = outrider("doctor", "dspark")
    assert refused.exit_code == 2 and "'dspark' is a kind of drafter" in refused.stderr
    found = drafter_location("dspark", "embedded")
    assert found == "embedded-dspark" and outrider("doctor", found).exit_code == 0


def test_with_random_prompts_findings_are_only_suspicious(folder: Path, target_folder: Path) -> None:
    """A target without a tokenizer has no natural prompts, so measured findings are not faults."""
    change(folder, mask_token_id=17)
    result = outrider("doctor", folder, "--target", target_folder, "--backend", "reference", "--json", "-")
    facts = json.loads(result.stdout)
    assert "random prompts" in facts["prompts"] and all(f["level"] == "suspicious" for f in facts["findings"])


def test_invalid_prompt_files_get_one_clear_error(folder: Path, target_folder: Path, tmp_path: Path) -> None:
    for text, words in (
        ("{}", "line 1"),
        ("", "holds no prompts"),
        ('{"ids": ["a"]}', "token ids"),
        ('{"ids": [99]}', "token 99"),
    ):
        file = tmp_path / "prompts.jsonl"
        file.write_text(text)
        result = outrider("doctor", folder, "--target", target_folder, "--prompts", file, "--backend", "reference")
        assert result.exit_code == 2 and words in result.stderr, result.output


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("doctor", "embeded-eagle3"), "there is no drafter 'embeded-eagle3'; did you mean 'embedded-eagle3'?"),
        (("doctor", "embedded-eagle3", "--target", "embeded"), "there is no model 'embeded'; did you mean 'embedded'?"),
        (("convert", "embeded-eagle3", "x", "--to", "deepspec"), "did you mean 'embedded-eagle3'?"),
        (("convert", "embedded-eagle3", "x", "--to", "deepspec", "--target", "embeded"), "did you mean 'embedded'?"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_one(
    arguments: tuple[str, ...], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider.models.locations._hub", _no_hub)
    result = outrider(*arguments)
    assert result.exit_code == 2 and hint in result.stderr and result.stderr.count("\n") == 1


def _no_hub(name: str) -> Path:
    raise CheckpointError(f"{name!r} is not on the hub")
