"""Recipes: one command from prompts to the exported drafter, checked before anything runs."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from outrider import LLM, SamplingParams, checkpoints
from outrider.cli import app
from outrider.errors import ArtefactError, InvalidRequest
from outrider.training.artefact import open_artefact, read_lines
from outrider.training.estimate import _Trial, estimate, expected_length
from outrider.training.export import Config as ExportConfig
from outrider.training.export import card, export
from outrider.training.recipe import read_recipe, run_recipe
from outrider.training.stages import STAGES

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = """
target = "embedded"
out = "made"
eval_prompts = ["held.jsonl"]

[prompts]
sources = [{ path = "data.jsonl", domain = "code" }, { path = "held.jsonl", domain = "code", split = "held_out" }]

[regenerate]
max_tokens = 24

[run]
steps = 2
batch = 2
length = 48
sanity = false
eval_every = 0
tensorboard = false
drafter = { markov_rank = 8, intermediate_size = 64, target_layers = [2, 5], loss = { anchors = 4 } }

[calibrate]
rules = ["rejection"]
temperatures = [1.0]
rounds = 60
max_tokens = 40

[eval]
temperatures = [1.0]
max_tokens = 16
limit = 1
draws = 100

[export]
name = "A first drafter"
licence = "apache-2.0"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name, count in (("data", 6), ("held", 4)):
        lines = [json.dumps({"text": f"def {name}_{i}(first, second):\n    return"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


def outrider(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


# ------------------------------------------------------------------------------------------------ refused input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.epoch=1", r"\[run\]: unknown key 'epoch'; did you mean 'epochs'"),
        ("runn.steps=1", "unknown key 'runn'; did you mean 'run'"),
        ('prompts.sources=[{pth="x"}]', r"\[prompts\]: unknown key 'sources.0.pth'; did you mean 'path'"),
        ("run.batch=0", r"\[run\]: batch: input should be greater than or equal to 1, got 0"),
        ("run.drafter.layer=1", r"\[run\] drafter 'dspark': unknown option 'layer'; did you mean 'layers'"),
        ("run.drafter.block_size=abc", r"\[run\] drafter 'dspark': block_size must be of type int, got 'abc'"),
        ("run.drafter.loss.anchors=0", r"\[run\] drafter 'dspark': loss: anchors must be at least 1, got 0"),
        ("run.drafter.loss.anchor=1", "loss: unknown option 'anchor'; did you mean 'anchors'"),
        ('run={kind="eagle3", drafter={loss={soft_cross_entropy=0}}}', "one of soft_cross_entropy, .* must be above 0"),
        ('run={kind="draft_model", drafter={soft_cross_entropy=-1}}', "must be 0 or above, got -1"),
        ("run.seed=-1", r"\[run\]: seed: input should be greater than or equal to 0, got -1"),
        ("run.epochs=inf", r"\[run\]: epochs: input should be a finite number"),
        ("run.learning_rate=1e308", r"\[run\]: learning_rate: input should be less than or equal to 1, got 1e\+308"),
        ("run.weight_decay=1e308", r"\[run\]: weight_decay: input should be less than or equal to 100, got 1e\+308"),
        ("run.dtype=flaot32", r"\[run\]: dtype: unknown dtype 'flaot32'; did you mean 'float32'"),
        ("features={layers=[1, 5]}", r"layers are \[1, 5\], but the drafter of \[run\] reads target_layers \[2, 5\]"),
        ("features={layers=[2, 5], length=64}", r"\[features\] length is 64, but \[run\] reads texts of length 48"),
        ("run.drafter.block_size=0", r"\[run\] drafter 'dspark': block_size must be at least 1, got 0"),
        ("run.drafter.layers=0", r"\[run\] drafter 'dspark': layers must be at least 1, got 0"),
        ("run.drafter.markov_rank=-1", r"\[run\] drafter 'dspark': markov_rank must be at least 0, got -1"),
        ("run.drafter.target_layers=[2, 2]", r"target_layers must be different layers .* got \[2, 2\]"),
        ("run.drafter.target_layers=[]", r"target_layers must be different layers .* got \[\]"),
        ('run={kind="eagle3", drafter={depth=0}}', r"\[run\] drafter 'eagle3': depth must be at least 1, got 0"),
        ("run.kind=suffix", "drafter 'suffix' cannot be trained"),
        ("run.kind=dsparc", "unknown drafter 'dsparc'; did you mean 'dspark'"),
        ("run=3", "run must be a section"),
        ("target={a=1}", "target must be no section"),
        ("target=3", "target must be a str, got 3"),
        ("target=./nowhere", "no such model directory or GGUF file: ./nowhere"),
        ('skip=["run"]', "skip may list calibrate, eval, export"),
        ('eval_prompts=["none.jsonl"]', "no such file"),
        ("run", "expected KEY=VALUE"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(change: str, message: str, recipe: Path) -> None:
    result = outrider("train", str(recipe), "--set", change)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    with pytest.raises(Exception, match=message):
        read_recipe(recipe, [change])
    assert not (recipe.parent / "made").exists()


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("target = ")
    with pytest.raises(InvalidRequest, match=r"a\.toml is not TOML"):
        read_recipe(tmp_path / "a.toml")
    with pytest.raises(InvalidRequest, match="cannot read the recipe"):
        read_recipe(tmp_path / "b.toml")
    (tmp_path / "a.toml").write_text('target = "embedded"\n')
    with pytest.raises(InvalidRequest, match=r"a recipe needs target, out"):
        read_recipe(tmp_path / "a.toml")
    assert "No such command 'rnu'" in outrider("train", "rnu").stderr


def test_models_beside_the_recipe(recipe: Path) -> None:
    folder = recipe.parent
    (folder / "model").mkdir()
    for name in ("model.gguf", "model/model.gguf"):
        (folder / name).write_bytes(b"GGUF" + bytes(20))
    assert read_recipe(recipe, ["target=./model.gguf"]).target == str(folder / "model.gguf")
    assert read_recipe(recipe, ["target=model"]).target == str(folder / "model")
    (folder / "before").mkdir()
    (folder / "before" / "config.json").write_text("{}")
    for name, found in (("before", str(folder / "before")), ("owner/name", "owner/name")):
        config: Any = read_recipe(recipe, [f"run.start_from={name}"]).configs["run"]
        assert config.start_from == found
    for name, found in (("before", str(folder / "before")), ("suffix", "suffix"), ("none", "none")):
        config = read_recipe(recipe, [f"regenerate.drafter={name}"]).configs["regenerate"]
        assert config.drafter == found


def test_answers_that_fill_the_context_are_refused_before_anything_runs(recipe: Path) -> None:
    filled = read_recipe(recipe, ["regenerate.max_tokens=99999"])
    for start in (estimate, run_recipe):
        with pytest.raises(InvalidRequest, match=r"max_tokens = 99999 .* fewer, as regenerate\.max_tokens=\d+ in"):
            start(filled)  # type: ignore[operator]
    assert not (recipe.parent / "made").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.drafter.target_layers=[2, 99]"], r"\[run\] target_layers: layer 99 cannot be read"),
        (["run.drafter.mask_token_id=4096"], r"\[run\] mask_token_id must be 0 to 4095, .* 4096 tokens; got 4096"),
        (["run.drafter.draft_vocab=4097"], r"\[run\] draft_vocab must be 1 to 4096, .* got 4097"),
        (["run.drafter.target_layers=[7]"], r"layer 7 cannot be read; of the target's 8 layers those from 0 to 6 can"),
        (['run={kind="mtp", length=48}', "features={layers=[7], length=48}"], r"\[features\] layers: layer 7 cannot"),
        (['run={kind="mtp", drafter={target_layer=7}}'], r"\[run\] target_layer: layer 7 cannot be read"),
        (
            ['run={kind="mtp", drafter={target_layer=5}}', "features={layers=[6]}"],
            r"layers are \[6\], but the drafter of \[run\] reads target_layer \[5\]",
        ),
    ],
)
def test_layers_that_the_target_lacks_are_refused_before_anything_runs(
    changes: list[str], message: str, recipe: Path
) -> None:
    for start in (estimate, run_recipe):
        with pytest.raises(InvalidRequest, match=message):
            start(read_recipe(recipe, changes))  # type: ignore[operator]
    assert not (recipe.parent / "made").exists()


def test_too_few_held_out_prompts_are_refused_before_training(recipe: Path) -> None:
    few = ['prompts={sources=[{path="data.jsonl"}], held_out=0.0}']
    with pytest.raises(
        InvalidRequest, match=r"calibrate need at least 4 .* there are 0.* \(skip = \[\"calibrate\"\]\)"
    ):
        run_recipe(read_recipe(recipe, few))
    with pytest.raises(InvalidRequest, match="calibrate and eval need at least 4 held-out prompts"):
        run_recipe(read_recipe(recipe, [*few, "eval_prompts=[]"]))
    with pytest.raises(InvalidRequest, match="calibrate need at least 4"):
        estimate(read_recipe(recipe, few))
    assert not (recipe.parent / "made").exists()  # so that the advice can be followed
    assert run_recipe(read_recipe(recipe, few), until="prompts").keys() == {"prompts"}
    with pytest.raises(InvalidRequest, match=r"there are 0: remove .*made/prompts, then give more prompts"):
        run_recipe(read_recipe(recipe, few))


def test_of_few_self_written_prompts_as_many_are_held_out_as_the_share_says(recipe: Path) -> None:
    with pytest.raises(InvalidRequest, match="calibrate need at least 4 held-out prompts, there are 2: give more"):
        run_recipe(read_recipe(recipe, ["prompts={sources=[{self=100}]}"]))
    assert not (recipe.parent / "made").exists()


def test_bad_data_is_reported_before_anything_runs(recipe: Path) -> None:
    (recipe.parent / "data.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    result = outrider("train", str(recipe))
    assert result.exit_code == 2 and "data.jsonl line 2: got the keys 'txt'" in result.stderr
    assert not (recipe.parent / "made").exists()


# ------------------------------------------------------------------------------------------------ results


def test_the_recipes_in_the_repository_are_valid() -> None:
    found = sorted(RECIPES.glob("*.toml"))
    assert found
    for path in found:
        stages = read_recipe(path).stages()
        assert stages == [name for name in STAGES if name in stages]
        assert {"prompts", "regenerate", "run", "export"} <= set(stages)


def test_all_stages_in_one_command(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run once, found finished the second time; the drafter works; card and provenance have the facts."""
    made = recipe.parent / "made"
    first = outrider("train", str(recipe), "--json", "-")
    assert first.exit_code == 0, first.stderr
    result = json.loads(first.stdout)
    assert list(result["stages"]) == [name for name in STAGES if name != "features"]
    assert all(cost["seconds"] > 0 and cost["disk"] > 0 for cost in result["estimate"])
    for name, child in (("prompts", "regenerate"), ("regenerate", "run"), ("run", "calibrate"), ("eval", "export")):
        assert open_artefact(made / name, name).sha256 in open_artefact(made / child).provenance["parents"].values()

    drafter = made / "export" / "drafter"
    card = (drafter / "README.md").read_text()
    answers = list(read_lines(made / "regenerate" / "train.jsonl"))
    for fact in (
        "# A first drafter",
        "license: apache-2.0",
        "| prompts, train | code 6 |",
        "2 steps",
        "## Calibration",
    ):
        assert fact in card
    assert f"| the target's answers | 6 with {sum(len(line['answer']) for line in answers):,} tokens |" in card
    history = json.loads((drafter / "provenance.json").read_text())["lineage"]
    assert list(history) == ["prompts", "regenerate", "run", "calibrate", "eval"]
    assert str(recipe.parent) not in json.dumps(history)  # nothing published contains paths of this machine
    assert (drafter / "calibration.json").is_file()
    params = SamplingParams(max_tokens=16)
    plain = LLM("embedded", "none").generate("def f(", params)[0]
    drafted = LLM("embedded", str(drafter)).generate("def f(", params)[0]
    assert drafted.token_ids == plain.token_ids and drafted.stats.drafted > 0

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a finished stage ran again")

    for stage in STAGES.values():
        if stage.outputs:
            monkeypatch.setattr(stage.reference.replace(":", "."), never)
    read = read_recipe(recipe)
    assert {cost.note for cost in estimate(read)} == {"finished"}
    assert {name: one.sha256 for name, one in run_recipe(read).items()} == {
        name: one["sha256"] for name, one in result["stages"].items()
    }
    for change, message in (
        ("run.steps=3", r"run was made with steps: 2, now 3"),
        ("prompts.held_out=0.5", r"prompts was made with held_out"),
        ("export.licence=mit", r"export was made with licence"),
    ):
        with pytest.raises(ArtefactError, match=message):
            estimate(read_recipe(recipe, [change]))
    with pytest.raises(ArtefactError, match=r"run was made with steps: 2, now 3"):
        run_recipe(read_recipe(recipe, ["run.steps=3"]))
    (recipe.parent / "held.jsonl").write_text('{"text": "another"}\n')
    with pytest.raises(ArtefactError, match="prompts was made with another source 2: held"):
        estimate(read)

    copy = export(ExportConfig(form="deepspec", dtype="bfloat16"), open_artefact(made / "run"), made / "x", "embedded")
    tensors = checkpoints.load(copy).tensors
    assert "embed.weight" in tensors and tensors["fc.weight"].dtype.itemsize == 2


def test_single_stage_commands_make_the_same_artefacts(recipe: Path) -> None:
    """One command per stage, with options from its Config."""
    folder = recipe.parent
    run_recipe(read_recipe(recipe, ["prompts.sources=[{path='data.jsonl'}]", "prompts.held_out=0.3"]), "regenerate")
    by_hand = folder / "by_hand"
    for arguments in (
        ["prompts", str(folder / "data.jsonl"), "--held-out", "0.3", "--out", str(by_hand / "prompts")],
        ["regenerate", "--prompts", str(by_hand / "prompts"), "--max-tokens", "24", "--out", str(by_hand / "answers")],
    ):
        result = outrider("train", *arguments)
        assert result.exit_code == 0, result.stderr
    for name, other in (("prompts", "prompts"), ("regenerate", "answers")):
        assert open_artefact(folder / "made" / name).sha256 == open_artefact(by_hand / other).sha256
    wrong = outrider("train", "run", "--answers", str(by_hand / "prompts"), "--out", str(by_hand / "run"))
    assert (
        wrong.exit_code == 2 and "made by the stage 'prompts'; expected an artefact of `outrider train" in wrong.stderr
    )


def test_a_card_names_every_temperature_of_the_answers() -> None:
    sampling = {"max_tokens": 128, "temperature": [0.0, 0.7, 1.0]}
    history = {"regenerate": {"facts": {"train": {"answers": 6, "tokens": 70}, "sampling": sampling}}}
    text = card(ExportConfig(), "my-model", {"kind": "dspark"}, history)
    assert "| sampled with | max_tokens 128, temperature 0 / 0.7 / 1 |" in text


def test_a_card_promises_no_speed_but_what_was_measured() -> None:
    slow = {"value": 0.63, "low": 0.43, "high": 0.91}
    row = {"temperature": 1.0, "domain": "maths", "prompts": 20, "acceptance_length": slow, "speedup": slow}
    text = card(ExportConfig(), "my-model", {"kind": "dspark"}, {"eval": {"facts": {"rows": [row]}}})
    assert "less time" not in text and "0.63 (0.43 to 0.91) |" in text


def test_prompts_and_answers_are_estimated_apart(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's answers are short: a speed over prompts and answers together would be far too low for long ones. The
    length of answers is seen from some that may end by themselves."""

    def answer(self: Any, turns: Any, rows: int, tokens: int, ends: bool = False) -> tuple[float, list[int]]:
        return rows * (0.05 + 0.001 * (tokens - 1)), [min(tokens, 36) if ends else tokens] * len(turns)

    monkeypatch.setattr(_Trial, "_answer", answer)
    answers = estimate(read_recipe(recipe, ["regenerate.max_tokens=48"]), "regenerate")[-1]
    assert answers.seconds == pytest.approx(10 * (0.05 + 36 * 0.001))
    assert "10 answers of 36 tokens" in answers.note
    onwards = ["regenerate.max_tokens=48", "regenerate.ignore_eos=true"]
    longer = estimate(read_recipe(recipe, onwards), "regenerate")[-1]
    assert longer.seconds == pytest.approx(10 * (0.05 + 48 * 0.001))
    assert longer.disk - answers.disk == pytest.approx(2 * 10 * (48 - 36) * 6)  # two files of ids of six bytes
    assert _Trial(read_recipe(recipe))._key_value_bytes == 2 * 4 * 8 * 2 * 64  # float32, 8 layers, 2 heads of 64


def test_the_length_of_answers_that_were_stopped() -> None:
    """Answers that end at a constant rate: what was seen of their beginning says how long they are."""
    drawn = random.Random(0)
    lengths = [min(400, math.ceil(drawn.expovariate(1 / 100))) for _ in range(20_000)]
    truth = sum(lengths) / len(lengths)
    for most in (20, 60, 200, 400):
        stopped = [min(length, most) for length in lengths]
        assert expected_length(stopped, most, 400) == pytest.approx(truth, rel=0.05), most
    assert expected_length([16, 16], 16, 1000) == 1000  # none has ended
    assert expected_length([3, 5], 16, 1000) == 4


def test_what_is_counted(recipe: Path) -> None:
    """Every turn of a conversation is answered; limits hold by domain, also for what the target writes itself."""
    chats = [json.dumps({"turns": [f"First {i}", "second", "third"]}) for i in range(4)]
    with gzip.open(recipe.parent / "chats.jsonl.gz", "wt") as file:
        file.write("\n".join(chats))
    sources = "prompts.sources=[{path='chats.jsonl.gz', domain='a', split='train'}"
    sources += ", {self=30, domain='a', split='train'}, {self=50}, {self=8, split='held_out'}]"
    changes = [sources, "prompts.held_out=0.2", 'eval_prompts=["chats.jsonl.gz"]', "regenerate.answers_per_prompt=2"]

    def counted(*more: str) -> list[Any]:
        trial = _Trial(read_recipe(recipe, [*changes, *more]))
        return [trial._count("train"), trial._count("held_out"), trial._questions(trial.configs["eval"])]

    assert counted("eval.limit=9") == [2 * (4 * 2 + 30 + 40), 10 + 8, 4]
    assert counted("eval.limit=3", "prompts.limit=20") == [2 * (4 * 2 + 16 + 20), 10 + 8, 3]
    assert counted("eval_prompts=[]", "eval.limit=5", "prompts.held_out_limit=12")[1:] == [12, 5]


def test_an_estimate_writes_nothing(recipe: Path) -> None:
    result = outrider("train", str(recipe), "--estimate", "--until", "run", "--json", "-")
    assert result.exit_code == 0, result.stderr
    costs = {cost["stage"]: cost for cost in json.loads(result.stdout)["estimate"]}
    assert list(costs) == ["prompts", "regenerate", "run"]
    assert costs["regenerate"]["note"].startswith("10 answers of") and costs["run"]["note"].startswith("2 steps at")
    assert costs["run"]["memory"] > 50e6 and not (recipe.parent / "made").exists()
    kept = estimate(read_recipe(recipe, ["features.layers=[2, 5]", "features.length=48"]), "features")[-1]
    assert kept.stage == "features" and kept.disk == pytest.approx(6 * 48 * 3 * 256 * 2, rel=0.4)  # at most 48 tokens
    longer = {cost.stage: cost for cost in estimate(read_recipe(recipe, ["regenerate.max_tokens=48"]), "regenerate")}
    assert longer["regenerate"].disk > costs["regenerate"]["disk"]
