"""The study's figures: signals with known values, what a scheduler may not depend on, and tables from tiny inputs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.evaluation.recording import read_prompts
from outrider.sampling.distribution import Categorical
from outrider.sampling.verification import DraftRound, acceptance_probabilities
from outrider.training.run import save_drafter, trainable
from outrider.types import Proposal

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import signals  # noqa: E402
import study  # noqa: E402
import study_drafters  # noqa: E402
from signals import Costs, Recording  # noqa: E402

WORDS = ("def add(a, b):\n    return a + b\n", "It was the best of times", "Question: how many?\nAnswer: 3")


# ------------------------------------------------------------------------------------------------ signals


def test_continuations_follow_the_longest_earlier_occurrence() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        text = generator.integers(0, 3, generator.integers(2, 30))
        length, followers = signals.continuations(text)
        found = Counter()  # type: ignore[var-annotated]
        for m in range(len(text) - 1, -1, -1):
            end = text[len(text) - m :]
            places = [i for i in range(m, len(text)) if np.array_equal(text[i - m : i], end)]
            if places and (m or length == 0):
                found = Counter(text[places].tolist())
                break
        assert (length, Counter(followers.tolist())) == (m, found if m else Counter(text[1:].tolist()))


def test_only_the_signal_that_says_so_sees_the_drafted_token() -> None:
    history, drafts = [1, 2, 3, 1, 2, 4, 1, 2], [3, 1, 2, 4]
    before, seeing = signals.ngram_signals(history, drafts)
    for j in range(len(drafts)):
        others = [*drafts[:j], *[9] * (len(drafts) - j)]
        again, other = signals.ngram_signals(history, others)
        assert again[: j + 1] == before[: j + 1]
        assert other[j] == 0 < seeing[j]


def test_margin_and_entropy_of_known_distributions() -> None:
    distribution = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    assert signals.margin_signal(distribution) == pytest.approx([2 / 3, 1 / 2, 1])
    assert signals.entropy_signal(distribution) == pytest.approx([2**-1.5, 1 / 4, 1])


def test_the_oracle_is_the_probability_with_which_the_rule_accepts() -> None:
    """The mean over the drafter's distribution of what the rule decides by."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 6, generator=generator, dtype=torch.float64).softmax(-1) ** 3
    p, q = p / p.sum(), q / q.sum()
    target = Categorical(6, probabilities=torch.stack([p, p]))
    accepted = 0.0
    for token in range(6):
        proposal = Proposal(torch.tensor([[token]]), torch.tensor([1]), Categorical(6, probabilities=q[None]), None)
        result = acceptance_probabilities(DraftRound.of(target, proposal, [1]), np.array([False]))
        accepted += float(q[token]) * result.probability[0, 0]
    assert signals.overlap(p[None], q[None]) == pytest.approx([accepted])


# ------------------------------------------------------------------------------------------------ treatments, figures


def synthetic(rounds: int = 4000, seed: int = 0) -> Recording:
    """Rounds that are accepted with exactly the oracle's probabilities; the head is a bold version of them."""
    generator = np.random.default_rng(seed)
    oracle = generator.uniform(0.05, 0.95, (rounds, 3))
    accepted = np.logical_and.accumulate(generator.random((rounds, 3)) < oracle, 1).sum(1)
    logits = np.log(oracle / (1 - oracle))
    head = 1 / (1 + np.exp(-(3 * logits + generator.normal(0, 0.5, oracle.shape))))
    prompt = np.arange(rounds) // 40
    return Recording(
        {"head": head, "oracle": oracle}, np.full(rounds, 3), accepted, accepted + 1, prompt, prompt % 2, prompt % 4 < 2
    )


def test_qualities_tell_a_true_signal_from_a_bold_one() -> None:
    recording = synthetic()
    found = {(row["signal"], row["treatment"]): row for row in signals.qualities(recording, draws=10)}
    for name in ("ece", "survival_ece"):
        error, chance = found["oracle", "raw"][name]
        assert error < 2 * chance
        assert found["head", "raw"][name][0] > 3 * chance
        assert found["head", "STS"][name][0] < found["head", "raw"][name][0] / 2
        assert found["head", "online"][name][0] < found["head", "raw"][name][0]
    for row in found.values():
        assert row["auc"][1] <= row["auc"][2]
    (difference,) = signals.differences(recording, draws=20)
    value, low, high = difference["auc"]
    assert difference["signal"] == "oracle" and 0 < low <= value <= high


def test_online_correction_knows_the_past_only_and_sts_the_fitting_half_only() -> None:
    recording = synthetic(400)
    changed = recording.accepted.copy()
    changed[200:] = 3 - changed[200:]
    other = replace(recording, accepted=changed)
    before, after = (signals.treated(one, "head", "online")[0] for one in (recording, other))
    assert np.array_equal(before[:201], after[:201]) and not np.allclose(before[201:], after[201:])
    changed = np.where(recording.fitting, recording.accepted, 0)
    scalings = [signals.treated(one, "head", "STS")[1] for one in (recording, replace(recording, accepted=changed))]
    assert scalings[0] == scalings[1]


def test_simulated_rounds_by_hand() -> None:
    confidence = np.array([[0.9, 0.2, 0.8], [0.4, 0.9, 0.9], [0.9, 0.9, 0.9]])
    accepted = np.array([3, 0, 1])
    recording = Recording(
        {"head": confidence}, np.full(3, 3), accepted, accepted + 1, np.arange(3), np.zeros(3), np.ones(3, bool)
    )
    costs = Costs(draft=1.0, bookkeeping=0.5, verify=(2.0, 3.0, 4.0, 5.0), plain=2.5)
    found = signals.simulate(recording, confidence, 0.5, costs)  # verifies 1, 0 and 3 drafts
    assert found["acceptance_length"] == pytest.approx((2 + 1 + 2) / 3)
    assert found["acceptance_rate"] == pytest.approx(2 / 4)
    assert found["verify_rate"] == pytest.approx(4 / 9)
    assert found["speedup"] == pytest.approx(5 * 2.5 / (3 * 1.5 + 3 + 2 + 5))
    whole = signals.simulate(recording, confidence, 0.0, costs)
    assert whole["acceptance_length"] == pytest.approx(7 / 3) and whole["verify_rate"] == 1
    blind = signals.simulate_blind(recording, costs)
    assert [one["acceptance_length"] for one in blind] == pytest.approx([5 / 3, 6 / 3, 7 / 3])
    assert {k: v for k, v in blind[-1].items() if k not in ("drafts", "threshold")} == {
        k: v for k, v in whole.items() if k != "threshold"
    }
    threshold = signals.threshold_for(recording, confidence, 4 / 9)
    assert signals.simulate(recording, confidence, threshold, costs)["verify_rate"] == pytest.approx(4 / 9)


# ------------------------------------------------------------------------------------------------ tables


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few held-out prompts of two domains, as token ids."""
    folder, llm = tmp_path_factory.mktemp("answers"), LLM("embedded", "none")
    lines = [
        {"id": f"{domain}-{i}", "domain": domain, "prompt": llm.encode(WORDS[i % 3]), "answer": [5, 6, 7]}
        for i in range(4)
        for domain in ("code", "prose")
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    for name in ("train.jsonl", "held_out.jsonl"):
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DSpark drafter as a run by the recipe would leave it, only that it was not trained."""
    folder, config = tmp_path_factory.mktemp("run"), study.DSPARK.config(5)
    llm = LLM("embedded", "none", dtype="float32")
    save_drafter(
        trainable(config, llm).snapshot(), folder / "drafter", "speculators", {"config": config.model_dump()}, llm
    )
    return folder


def study_of(answers: Path, out: Path, elsewhere: Path, **more: Any) -> study.Study:
    settings = {"results": out / "results", "steps": 5, "max_tokens": 16, "trained": {"dspark": elsewhere}, **more}
    return study.Study(answers, out / "study", **settings)


def test_a_recording_holds_what_the_engine_did(answers: Path, elsewhere: Path) -> None:
    llm = LLM("embedded", str(elsewhere / "drafter"), max_rows=1, policy="fixed", guard=False)
    questions = [(question, True) for question in read_prompts(answers / "held_out.jsonl")]
    params = SamplingParams(max_tokens=24, temperature=1.0, rule="rejection", seed=1)
    found = signals.record(llm, questions, params)
    stats = llm.stats()
    assert set(found.signals) == set(signals.SIGNALS)
    assert 0 < len(found.verified) <= stats["rounds"] and found.accepted.sum() <= stats["accepted"]
    for name, values in found.signals.items():
        inside = values[np.arange(values.shape[1]) < found.verified[:, None]]
        assert ((inside >= 0) & (inside <= 1)).all(), name
    first = found.signals["oracle"][:, 0]
    assert abs(first.mean() - (found.accepted > 0).mean()) < 4 * 0.5 / len(first) ** 0.5


def test_signals_and_their_page(answers: Path, elsewhere: Path, tmp_path: Path) -> None:
    made = study_of(answers, tmp_path, elsewhere, realised=2, draws=10)
    study.signals(made)
    result = json.loads((tmp_path / "results" / "signals.json").read_text())
    assert len(result["rows"]) == 18 and len(result["realised"]) == 13
    page = tmp_path / "study.md"
    lines = [f"<!-- study: {name} -->\nstale figures\n<!-- end: {name} -->" for name in study.TABLES]
    page.write_text("\n\n".join(["Prose.", *lines, "More prose."]))
    study.main(["report", "--results", str(tmp_path / "results"), "--into", str(page)])
    text = page.read_text()
    assert text.startswith("Prose.") and text.endswith("More prose.") and "stale" not in text
    assert "| oracle |" in text and text.count("Not measured yet") == len(study.TABLES) - 1
    study.main(["report", "--results", str(tmp_path / "results"), "--into", str(page)])
    assert page.read_text() == text


def test_tables_of_drafters_have_their_diagram(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"drafter": name, "domain": domain, "temperature": 1.0, "layers": 1, "conditional": [0.5, 0.25, None]}
        for name in ("dspark", "dspark-layers1")
        for domain in ("code", "prose", "macro average")
    ]
    path = study.study_report.draw("depth", {"rows": rows}, tmp_path)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")


def test_runs_by_other_settings_are_refused(answers: Path, elsewhere: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="steps 5 instead of 6"):
        study_of(answers, tmp_path, elsewhere, steps=6).checkpoint(study.DSPARK)
    with pytest.raises(InvalidRequest, match="holds no drafter"):
        study_of(answers, tmp_path, tmp_path).checkpoint(study.DSPARK)


def test_processes_share_the_training(answers: Path, elsewhere: Path, tmp_path: Path) -> None:
    mine = study_of(answers, tmp_path, elsewhere)
    folder = tmp_path / "study" / "runs" / "dspark"
    with study_drafters.alone(folder) as first, study_drafters.alone(folder) as second:
        assert first and not second
        mine.train([study.DSPARK])
        assert not (folder / "drafter").exists()  # left to the process that has it
    mine.train([study.DSPARK, study.DSPARK])
    assert (folder / "drafter" / "config.json").exists()


def test_steps_are_in_proportion_to_the_recipes() -> None:
    full = {kind: study_drafters.Trained(kind).config(None).steps for kind in study.TRAINED}
    half = {kind: study_drafters.Trained(kind).config(full["dspark"] // 2).steps for kind in study.TRAINED}
    assert all(2 * half[kind] == steps for kind, steps in full.items())
    blocks = {drafter.config(None).drafter["block_size"]: drafter.config(None) for drafter in study.needed("blocks", 1)}
    drafts = [size * config.drafter["loss"]["anchors"] for size, config in blocks.items()]
    assert max(drafts) - min(drafts) < 16  # whole anchors


def test_every_drafter_has_one_name_and_tables_share_what_they_can() -> None:
    named: dict[str, set[str]] = {}
    for table in study.TABLES:
        for drafter in study.needed(table, 3):
            named.setdefault(drafter.name, set()).add(drafter.config(5).model_dump_json() + str(drafter.texts))
    assert all(len(settings) == 1 for settings in named.values())
    assert len({next(iter(settings)) for settings in named.values()}) == len(named)
    assert study.DSPARK in study.needed("table1", 1)
