"""The audit: its quick tier on the packaged models, its negative controls, and the certificate's forms."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from outrider import LLM
from outrider.cli import app
from outrider.cli.audit import _prompts
from outrider.config import SamplingParams
from outrider.engine.loader import load_model
from outrider.evaluation.speedup import default_prompt_files
from outrider.proof import controls, equality
from outrider.proof.certificate import Certificate, Check, Tier
from outrider.proof.certify import Audit
from outrider.proof.controls import CONTROLS, Control, sound_repetition
from outrider.proof.enumeration import enumerate_texts
from outrider.proof.equality import measured_rounding
from outrider.proof.evidence import Budget, Evidence, power, samples_needed
from outrider.proof.exact import OPTIONS, RULES, TOLERANCE, Setting
from outrider.proof.literal import Chain, next_token, plain_texts, total_variation
from outrider.proof.statistical import ToySetting, toy_settings
from outrider.proof.toy_world import RemembersLastRound, make_policy
from outrider.types import RequestStats, StepView

RUN = CliRunner()


def test_the_quick_audit_of_the_packaged_models_passes(tmp_path: Path) -> None:
    files = {option: tmp_path / f"certificate.{option}" for option in ("json", "markdown", "html")}
    options = [word for option, path in files.items() for word in (f"--{option}", str(path))]
    result = RUN.invoke(app, ["audit", "--tier", "quick", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(files["json"].read_text())
    assert found["verdict"] == "pass" and found["machine"]["cpu"] and found["versions"]["outrider"]
    assert [tier["tier"] for tier in found["tiers"]] == ["exact", "contracts", "equality", "statistical"]
    checks = {check["name"]: check for tier in found["tiers"] for check in tier["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert found["tiers"][3]["false_alarm_rate"] == 1e-3
    assert sum(check.get("accepted", 0) for check in checks.values()) > 100, "an audit without accepted drafts is empty"
    assert all(check["samples"] > 1000 and check["power"] > 0.9 for check in found["tiers"][3]["checks"])
    page = files["markdown"].read_text()
    assert page.startswith("# Losslessness certificate: pass") and all(
        tier["method"] in page for tier in found["tiers"]
    )
    assert files["html"].read_text().count("<tr class=pass>") == len(checks)


@pytest.mark.parametrize("ids", [[5], [5, 6, 7, 8]])
def test_texts_of_a_few_tokens_are_compared_whole(ids: list[int]) -> None:
    target = LLM("embedded", "none").target
    found = measured_rounding(target, [ids, ids[:1]])
    assert found.largest == 0 and found.tokens == len(ids) * (2 if len(ids) == 1 else 1)


@pytest.mark.slow
def test_one_tier_can_be_chosen() -> None:
    result = RUN.invoke(app, ["audit", "--tier", "equality", "--tier", "quick", "--drafter", "ngram", "--json", "-"])
    assert result.exit_code == 0 and json.loads(result.stdout)["subject"]["drafters"] == ["ngram"]


def test_bad_options_are_refused(tmp_path: Path) -> None:
    same = str(tmp_path / "report")
    for words, message in [
        (["--tier", "exakt"], "did you mean 'exact'"),
        (["--drafter", "ngram, sufix"], "did you mean 'suffix'"),
        (["--markdown", same, "--html", same], "--markdown and --html both name"),
        (["--json", same, "--html", same], "--json and --html both name"),
        (["--policy", "fixt"], "did you mean 'fixed'"),
        (["--drafter", "ngramm"], "ngramm"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**31)], "--seed"),
    ]:
        refused = RUN.invoke(app, ["audit", "--tier", "quick", *words])
        assert refused.exit_code == 2 and message in refused.output
    unknown = RUN.invoke(app, ["audit", "--tier", "zzz"])
    assert unknown.exit_code == 2 and unknown.output.count("statistical") == 1


def test_texts_without_an_accepted_draft_are_said_to_show_little(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, said = load_model("embedded"), []

    def checks(*given: object, **more: object) -> list[Check]:
        found = [("suffix", 0), ("ngram", 2), ("none", 0)]
        return [Check(f"greedy, {name}, policy fixed", True, "", {"accepted": n}) for name, n in found]

    monkeypatch.setattr(equality, "equality_checks", checks)
    names = ("suffix", "ngram", "none")
    audit = Audit(loaded, names, ("fixed",), ((1, 2),), ("equality",), quick=True, progress=said.append)
    assert audit.run().passed
    assert [text.split()[4] for text in said if "no draft of" in text] == ["suffix"]


def test_each_policy_that_is_asked_for_is_compared_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compared: list[str] = []

    def checks(plain: object, others: dict[str, object], *given: object, **more: object) -> list[Check]:
        compared.extend(others)
        return [Check(f"greedy, {name}", True, "", {"accepted": 1}) for name in others]

    monkeypatch.setattr(equality, "equality_checks", checks)
    file = tmp_path / "certificate.json"
    options = ["--tier", "quick", "--tier", "equality", "--drafter", "ngram", "--json", str(file)]
    result = RUN.invoke(app, ["audit", *options, "--policy", "fixed, threshold"])
    assert result.exit_code == 0, result.output
    assert compared == ["ngram, policy fixed", "ngram, policy threshold"]
    assert json.loads(file.read_text())["subject"]["policies"] == ["fixed", "threshold"]


# ------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_broken_variants_are_caught(control: Control) -> None:
    outcome = control.run()
    assert outcome.caught, outcome.found


def test_every_control_that_the_certificate_promises_is_there() -> None:
    assert len({control.name for control in CONTROLS}) == len(CONTROLS) == 17
    assert {control.tier for control in CONTROLS} == {"exact", "contracts", "equality", "statistical"}


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 1)) for seed in range(1, 21)])
def test_the_sound_configuration_raises_no_alarm(seed: int) -> None:
    assert sound_repetition(seed) == []


def test_a_missed_control_fails_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Control("harmless", "exact", "nothing is broken", controls._exact(Setting("rejection", length=3)))
    monkeypatch.setattr(controls, "CONTROLS", (harmless,))
    result = RUN.invoke(app, ["audit", "--self-test", "--repetitions", "0", "--json", "-"])
    assert result.exit_code == 1
    assert [one["caught"] for one in json.loads(result.stdout)["controls"]] == [False]


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_texts_of_three_tokens_are_exact(rule: str, option: str) -> None:
    setting = Setting(rule, option, "remembers", size=3, length=3, seed=4)  # type: ignore[arg-type]
    assert setting.distance() <= TOLERANCE


def test_a_policy_that_looks_at_its_neighbours_is_enumerated_jointly() -> None:
    """All rows of one engine follow one sequence of outcomes, and the marginals are those of plain decoding."""
    setting = Setting("block", length=3, rows=2)
    found = enumerate_texts(
        lambda: setting.world.enumerated(make_policy("threshold", 2), 2, rows=2),
        [[0], [1, 0]],
        setting.params,
        together=True,
    )
    for texts, prompt in zip(found, ([0], [1, 0]), strict=True):
        assert sum(texts.values()) == pytest.approx(1)
        assert total_variation(texts, plain_texts(setting.world.chain, prompt, setting.params)) <= TOLERANCE


def test_literal_decoding_by_hand() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    assert next_token(logits, SamplingParams(temperature=1.0, top_k=2), [0], []) == pytest.approx([0.625, 0.375, 0])
    assert next_token(logits, SamplingParams(temperature=1.0, top_p=0.75), [0], []) == pytest.approx([0.625, 0.375, 0])
    assert next_token(logits, SamplingParams(temperature=1.0, min_p=0.5), [0], []) == pytest.approx([0.625, 0.375, 0])
    assert next_token(logits, SamplingParams(temperature=0.5), [0], []) == pytest.approx([25 / 38, 9 / 38, 4 / 38])
    assert next_token(logits, SamplingParams(), [0], []) == pytest.approx([1, 0, 0])
    presence = SamplingParams(temperature=1.0, presence_penalty=float(np.log(2)))
    assert next_token(logits, presence, [1], [0]) == pytest.approx([1 / 3, 0.4, 4 / 15])
    repetition = SamplingParams(temperature=1.0, repetition_penalty=2.0)  # negative logits are doubled
    assert next_token(logits, repetition, [1], []) == pytest.approx(np.array([0.5, 0.09, 0.2]) / 0.79)
    chain = Chain(np.zeros((2, 2)), no_repeat=1)
    assert plain_texts(chain, [0], SamplingParams(max_tokens=2, temperature=1.0)) == pytest.approx(
        {(0, 0): 0.25, (0, 1): 0.25, (1, 0): 0.5}
    )


# ------------------------------------------------------------------------------------------------ drafts in checks


def test_an_enumeration_without_drafts_fails() -> None:
    """One token a text: it comes from the prompt's own pass, and nothing is ever drafted."""
    check = Setting("rejection", length=1).check()
    assert not check.passed and check.figures["total_variation"] <= TOLERANCE and check.found.endswith("no drafts")
    drafting = Setting("rejection").check()
    assert drafting.passed and drafting.figures["deepest"] == 2


@pytest.mark.parametrize("setting", toy_settings(quick=False), ids=lambda setting: setting.name)
def test_streams_of_the_toy_target_verify_long_drafts_and_cut_ones(setting: ToySetting) -> None:
    engine = setting.engine()
    engine.wait([engine.submit([i % 4], replace(setting.params, max_tokens=64), i) for i in range(96)])
    first, second, third = engine.totals[1].drafted_per_position
    assert engine.totals[1].accepted_per_position[2] > 100
    assert 0.9 * first > second >= third > 0.1 * first


def test_the_policy_that_remembers_drafts_far_after_a_round_without_rejection() -> None:
    policy, stats = RemembersLastRound(3), RequestStats()
    limits: list[int] = []
    for drafted, accepted in ((3, 3), (3, 1), (1, 0), (1, 1), (3, 3)):
        limits += policy.plan(StepView([9], [stats], [SamplingParams()], requests=[7]))
        assert limits[-1] == drafted
        stats.drafted, stats.accepted, stats.rounds = (
            stats.drafted + drafted,
            stats.accepted + accepted,
            stats.rounds + 1,
        )
    assert limits == [3, 3, 1, 1, 3]


def test_chat_models_are_asked_in_their_template() -> None:
    loaded = LLM(drafter="none").loaded
    asked = json.loads(default_prompt_files(chat=True)[0].read_text().splitlines()[0])
    plain, chat = (_prompts(replace(loaded, name=name), None)[0] for name in ("embedded", "a chat model"))
    message = [{"role": "user", "content": asked["turns"][0]}]
    assert list(chat) == loaded.tokenizer.encode_chat(message) and plain != chat


# ------------------------------------------------------------------------------------------------ evidence


def test_evidence_is_the_mixture_it_says_it_is() -> None:
    """Two categories: the Dirichlet mixture by numerical integration over its beta prior."""
    expected, concentration = np.array([[0.3, 0.7]]), 8.0
    evidence = Evidence(expected, concentration)
    evidence.add([0, 1, 1, 0, 0])
    x = (np.arange(200_000) + 0.5) / 200_000
    prior = x ** (0.3 * concentration - 1) * (1 - x) ** (0.7 * concentration - 1)
    mean = (prior * x**3 * (1 - x) ** 2).sum() / prior.sum()
    assert evidence.log_value == pytest.approx(np.log(mean / (0.3**3 * 0.7**2)), abs=1e-4)
    evidence.add([1], [0])
    assert evidence.samples == 6


def test_false_alarms_and_power_are_as_stated() -> None:
    """Rates of simulated tests: no more false alarms than the budget allows, looking 20 times; power where promised."""
    expected = np.full((1, 16), 1 / 16)
    budget = Budget(tests=5, alpha=0.05)
    needed = samples_needed(expected, 0.03, budget.threshold)
    rates = [power(expected, bias, needed, budget.threshold, needed / 3, repetitions=400) for bias in (0.0, 0.03)]
    assert rates[0] <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / 400)
    assert rates[1] > 0.95


def test_a_token_of_no_probability_is_proof() -> None:
    evidence = Evidence(np.array([[0.5, 0.5, 0.0]]), 10.0)
    evidence.add([0, 1, 2])
    assert evidence.log_value == np.inf


# ------------------------------------------------------------------------------------------------ certificate


def test_a_certificate_fails_with_one_check_and_says_which() -> None:
    tiers = (Tier("exact", "by hand", (Check("a", True, "fine"), Check("b | c", False, "<off>")), 1.0),)
    certificate = Certificate({"model": "toy"}, tiers)
    assert certificate.to_json()["verdict"] == certificate.to_json()["tiers"][0]["verdict"] == "fail"
    assert re.search(r"\| b \\\| c \| \*\*fail\*\* \| <off> \|", certificate.to_markdown())
    assert "<tr class=fail><td>b | c</td><td>fail</td><td>&lt;off&gt;</td></tr>" in certificate.to_html()
    assert not Certificate({}, ()).passed and not Tier("exact", "", ()).passed, "nothing checked is nothing proved"
