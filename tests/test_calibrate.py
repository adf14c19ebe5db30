"""Calibrating a drafter: the calibration is stored in its directory, and loaded and used from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_level_bpe, save_tokenizer
from trained import DESIGNS, Session, make_checkpoint, make_target, propose, random_tokens, save_target
from typer.testing import CliRunner, Result

from outrider import checkpoints
from outrider.backends.reference import ReferenceBackend
from outrider.cli import app
from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import CheckpointError, InvalidRequest
from outrider.evaluation.conversion import convert
from outrider.evaluation.recording import Observed
from outrider.registry import find
from outrider.scheduling.calibration import Calibration, Scaling, fit, logits_of
from outrider.training.artefact import target_hash
from outrider.training.fit_calibration import Config, Report, _bucket, _collect, _write, calibrate

HALF = {(rule, t): Scaling((2.0,), (-1.0,)) for rule in ("rejection", "block", "coupled") for t in (0.0, 1.0)}
SMALL = Config(temperatures=(0.0, 1.0), rules=("rejection", "block"), rounds=60, max_tokens=24, bins=5)


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target with an unused tokenizer: the prompts are token ids."""
    folder = save_target(tmp_path_factory.mktemp("calibrate") / "target", make_target())
    save_tokenizer(folder, byte_level_bpe())
    return folder


@pytest.fixture(scope="module")
def drafter_dir(target_dir: Path) -> Path:
    checkpoint = make_checkpoint(DESIGNS["vanilla"], target=make_target())
    return checkpoints.save(checkpoint, target_dir.parent / "drafter", "deepspec", {})


@pytest.fixture(scope="module")
def prompts(target_dir: Path) -> Path:
    file = target_dir.parent / "held_out.jsonl"
    lines = [{"id": str(i), "domain": "ab"[i % 2], "prompt": random_tokens(5 + i, i), "answer": []} for i in range(10)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


# ------------------------------------------------------------------------------------------------ a drafter's file


@pytest.mark.parametrize("name", ["vanilla", "dflash", "eagle3", "mtp"])
def test_a_trained_drafter_puts_its_confidences_right(name: str) -> None:
    target = make_target()
    plain = make_checkpoint(DESIGNS[name], target=target)
    kind = find("drafter", plain.kind)
    history = random_tokens(12, 3)
    found = {}
    for checkpoint in (plain, replace(plain, calibration=Calibration(HALF))):
        drafter = kind(checkpoint, target, ReferenceBackend(), config=kind.Config(""), dtype=torch.float32, max_rows=1)
        session = Session(target, drafter, 1)
        session.observe([history[:-1]], [0])
        found[checkpoint.calibration is None] = propose(drafter, session.slots, [history])
    raw, right = found[True].confidence, found[False].confidence
    assert raw is not None and right is not None
    expected = torch.sigmoid(torch.logit(raw.double()) / 2 - 1)
    assert torch.allclose(right.double(), expected, atol=1e-6)
    assert torch.equal(found[True].tokens, found[False].tokens)


@pytest.mark.parametrize("form", ["deepspec", "speculators"])
def test_a_calibration_is_written_and_read_with_its_checkpoint(tmp_path: Path, form: str) -> None:
    checkpoint = replace(make_checkpoint(DESIGNS["vanilla"], target=make_target()), calibration=Calibration(HALF))
    folder = checkpoints.save(checkpoint, tmp_path / form, form, {})
    assert checkpoints.load(folder).calibration == checkpoint.calibration
    (folder / "calibration.json").unlink()
    assert checkpoints.load(folder).calibration is None
    for text in ("{}", "[]", "nonsense"):
        (folder / "calibration.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"calibration\.json"):
            checkpoints.load(folder)


def test_a_conversion_keeps_the_calibration(tmp_path: Path) -> None:
    checkpoint = replace(make_checkpoint(DESIGNS["vanilla"], target=make_target()), calibration=Calibration(HALF))
    folder = checkpoints.save(checkpoint, tmp_path / "a", "deepspec", {})
    convert(folder, tmp_path / "b", "speculators")
    assert checkpoints.load(tmp_path / "b").calibration == checkpoint.calibration


def test_a_drafter_without_a_checkpoint_takes_a_calibration_by_an_option(tmp_path: Path, target_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no calibration\.json"):
        LLM(target_dir, "ngram", drafter_options={"calibration": tmp_path})
    (tmp_path / "calibration.json").write_text(json.dumps(Calibration(HALF).to_json()))
    prompt, params = random_tokens(4, 0) * 6, SamplingParams(max_tokens=24, ignore_eos=True)
    kept = []
    for options in ({}, {"calibration": tmp_path}):
        llm = LLM(
            target_dir,
            "ngram",
            drafter_options=options,
            policy="threshold",
            policy_options={"threshold": 0.7},
            dtype="float32",
            backend="reference",
        )
        kept.append(llm.generate([prompt], params)[0])
    assert kept[0].token_ids == kept[1].token_ids
    assert kept[0].stats.drafted > kept[1].stats.drafted  # the same drafts with lower confidences


# ------------------------------------------------------------------------------------------------ the stage


def test_the_stage_writes_a_drafter_with_its_calibration(
    target_dir: Path, drafter_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "calibrated"
    shares: list[float] = []
    report = calibrate(
        SMALL,
        drafter_dir,
        [prompts],
        out,
        str(target_dir),
        backend="reference",
        progress=lambda text, done: shares.append(done),
    )
    assert {path.name for path in out.iterdir()} == {"drafter", "provenance.json", "reliability.png", "report.json"}
    copy = checkpoints.load(out / "drafter")
    assert copy.calibration == Calibration.from_json(report.calibration.to_json())
    assert set(copy.calibration.scalings) == {(rule, t) for rule in SMALL.rules for t in (0.0, 1.0)}
    assert report.signal == "head"
    assert shares == sorted(shares) and 0 <= shares[0] < shares[-1] <= 1
    assert [bucket.rules for bucket in report.buckets] == [SMALL.rules, ("rejection",), ("block",)]
    for bucket in json.loads((out / "report.json").read_text())["buckets"]:
        assert len(bucket["after"]) == len(bucket["scaling"]["temperatures"]) == 5
        assert bucket["before"][0]["rounds"] >= 15
        assert all(0.1 <= t <= 32 for t in bucket["scaling"]["temperatures"])
    provenance = json.loads((out / "provenance.json").read_text())
    facts = json.loads((out / "drafter" / "calibration.json").read_text())["facts"]
    assert (facts["target"], facts["target_sha256"]) == (target_dir.name, target_hash(str(target_dir)))
    assert str(tmp_path) not in (out / "report.json").read_text() and report.drafter == drafter_dir.name
    assert provenance["arguments"]["rounds"] == 60 and set(provenance["parents"]) == {"drafter", "held_out.jsonl"}
    llm = LLM(target_dir, out / "drafter", backend="reference")
    assert llm.drafter.calibration is not None  # type: ignore[attr-defined]


def test_a_calibrated_drafter_is_measured_without_its_calibration(
    target_dir: Path, drafter_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = replace(checkpoints.load(drafter_dir), calibration=Calibration(HALF, {}))
    calibrated = checkpoints.save(checkpoint, tmp_path / "calibrated", "deepspec", {})
    assert checkpoints.load(calibrated).calibration is not None

    def looked(llm: Any) -> None:
        assert llm.drafter.calibration is None
        raise KeyboardInterrupt

    monkeypatch.setattr("outrider.training.fit_calibration.recorded", looked)
    with pytest.raises(KeyboardInterrupt):
        calibrate(SMALL, calibrated, [prompts], tmp_path / "out", str(target_dir), backend="reference")


def test_rounds_to_fit_on_come_from_other_prompts_and_no_answer_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def answered(llm: Any, recorder: Any, prompt: int, params: SamplingParams) -> Any:
        seeds.append(params.seed or 0)
        made = [SimpleNamespace(prompt=prompt, verified=verified, confidence=[0.5]) for verified in (0, 1, 2)]
        return SimpleNamespace(rounds=made)

    monkeypatch.setattr("outrider.training.fit_calibration.answer", answered)
    monkeypatch.setattr("outrider.training.fit_calibration.observed", list)
    halves: Any = [(SimpleNamespace(prompt=number), number % 2 == 0) for number in range(4)]
    nothing: Any = None
    fitting, held_out = _collect(nothing, nothing, halves, SamplingParams(temperature=1.0), 120, lambda share: None)
    assert [{one.prompt for one in rounds} for rounds in (fitting, held_out)] == [{0, 2}, {1, 3}]  # type: ignore[attr-defined]
    assert all(one.verified for one in [*fitting, *held_out])  # type: ignore[misc]
    assert len(set(seeds)) == len(seeds) > 8


def test_the_scaling_is_fitted_on_one_half_and_measured_on_the_other() -> None:
    said = torch.linspace(0.05, 0.95, 40, dtype=torch.float64)[:, None]
    one = torch.ones(40, dtype=torch.int64)
    kept, lost = Observed(said, one, (torch.arange(40) % 5 > 0).long()), Observed(said[:30], one[:30], 0 * one[:30])
    bucket = _bucket(("block",), 1.0, kept, lost, False, 5)
    assert bucket.fitted_on == 40
    scaling, other = (fit(logits_of(r.confidence), r.verified, r.accepted, shift=False, bins=5) for r in (kept, lost))
    assert bucket.scaling == scaling != other
    measured = (bucket.before, bucket.after, bucket.conditional_before, bucket.conditional_after)
    assert [quality.observed for (quality,) in measured] == [0] * 4
    assert (bucket.pooled_before.observed, bucket.pooled_after.observed) == (0, 0)


def test_an_earlier_calibration_makes_no_other_parent(
    target_dir: Path, drafter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider.training.fit_calibration.plots.available", lambda: False)
    calibrated = tmp_path / "calibrated"
    shutil.copytree(drafter_dir, calibrated)
    (calibrated / "calibration.json").write_text(json.dumps(Calibration(HALF, {}).to_json()))
    parents = []
    for number, folder in enumerate((drafter_dir, calibrated)):
        report = Report(folder.name, "target", "head", Calibration({}, {}), [], 0.0)
        _write(report, folder, str(target_dir), [], SMALL, tmp_path / f"{number}")
        parents.append(json.loads((tmp_path / f"{number}" / "provenance.json").read_text())["parents"])
    assert parents[0] == parents[1] and parents[0]["drafter"]


def test_without_a_checkpoint_only_the_calibration_is_written(target_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "loops.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": random_tokens(3, i) * 8}) for i in range(12)))
    config = Config(temperatures=(0.0,), rules=("block",), rounds=60, max_tokens=40, bins=5, shift=True)
    report = calibrate(config, "ngram", [file], tmp_path / "out", str(target_dir), backend="reference")
    assert report.signal == "training-free"
    assert any(report.buckets[0].scaling.shifts)
    assert {path.name for path in (tmp_path / "out" / "drafter").iterdir()} == {"calibration.json"}


def test_invalid_calibrations_are_refused(target_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidRequest, match="gave only 0 rounds with confidences"):
        calibrate(SMALL, "none", [prompts], out, str(target_dir), backend="reference")
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": [1, 2]}')
    with pytest.raises(InvalidRequest, match="at least 4 prompts"):
        calibrate(SMALL, "ngram", [few], out, str(target_dir), backend="reference")
    assert not out.exists()
    out.mkdir()
    with pytest.raises(InvalidRequest, match="exists already"):
        calibrate(SMALL, "ngram", [prompts], out, str(target_dir), backend="reference")


# ------------------------------------------------------------------------------------------------ the command


def outrider(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command_prints_the_report(target_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--target", target_dir, "--prompts", prompts, "--backend", "reference", "--rounds", 60]
    file = tmp_path / "report.json"
    result = outrider("calibrate", "ngram", out, *options, "--temperature", 0, "--max-tokens", 60, "--json", file)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_text()) == json.loads((out / "report.json").read_text())
    assert "any rule, temperature 0" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "blocks"], "--rule must be one of rejection, block, coupled"),
        (["--temperature", "-1"], "--temperature must be between 0"),
        (["--draft-tokens", "0"], "--draft-tokens must be at least 1"),
    ],
)
def test_bad_input_is_one_line(target_dir: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = outrider("calibrate", "ngram", tmp_path / "out", "--target", target_dir, *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.strip().count("\n") == 0
