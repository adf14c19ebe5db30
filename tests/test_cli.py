"""The command line on a small random model: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS, save_llama
from typer.testing import CliRunner, Result

from outrider.cli import COMMANDS, app
from outrider.cli.common import SOME_FAILED, output_record
from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.tokenization.tokenizer import Tokenizer

PROMPT = TEXTS[2]


def outrider(*args: str | Path, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=stdin)


def process(*args: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "outrider", *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **environment}, timeout=120)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> list[str]:
    """The options that choose the small model on the backend that every machine has."""
    return ["--model", str(tiny_model_dir), "--backend", "reference", "--dtype", "float32"]


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    return LLM(tiny_model_dir, "none", backend="reference", dtype="float32")


# ------------------------------------------------------------------------------------------------ generate


def test_json_without_a_file_prints(model: list[str]) -> None:
    flags = [*model, "--max-tokens", "4", "--seed", "3"]
    records = [
        json.loads(outrider("generate", *arguments).stdout)["token_ids"]
        for arguments in (
            [PROMPT, *flags, "--json", "-"],
            [PROMPT, *flags, "--json"],
            [PROMPT, "--json", *flags],
            [*flags, "--json", "--", PROMPT],
        )
    ]
    assert records == records[:1] * 4
    assert "--rows" in outrider("profile", "--json", "--rowz", "1").stderr


def test_json_goes_to_stdout_alone_and_equals_the_library(model: list[str], llm: LLM) -> None:
    result = outrider("generate", PROMPT, *model, "--drafter", "suffix", "--max-tokens", "24", "--json", "-")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)  # nothing but JSON
    [output] = llm.generate(PROMPT, SamplingParams(max_tokens=24))
    assert record["token_ids"] == output.token_ids
    assert record["text"] == output.text and output.text in result.stderr
    assert record["finish_reason"] == output.finish_reason
    stats = record["stats"]
    assert set(stats) == {"rounds", "drafted", "accepted", "acceptance_length", "tokens_per_second"}
    assert stats["accepted"] <= stats["drafted"] and stats["tokens_per_second"] > 0
    assert stats["rounds"] + stats["accepted"] + 1 == len(output.token_ids)
    assert stats["acceptance_length"] == pytest.approx((len(output.token_ids) - 1) / stats["rounds"], abs=1e-4)


def test_text_goes_to_stdout_and_its_figures_to_stderr(model: list[str], llm: LLM, tmp_path: Path) -> None:
    result = outrider("generate", PROMPT, *model, "--max-tokens", "16", "--json", tmp_path / "out.json")
    [output] = llm.generate(PROMPT, SamplingParams(max_tokens=16))
    assert result.stdout == output.text + "\n"
    assert "16 tokens" in result.stderr and "acceptance length" in result.stderr
    assert json.loads((tmp_path / "out.json").read_text())["text"] == output.text


@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix"])
def test_greedy_ids_equal_those_of_transformers(model: list[str], tiny_model_dir: Path, drafter: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    result = outrider(
        "generate", PROMPT, *model, "--drafter", drafter, "--max-tokens", "32", "--ignore-eos", "--json", "-"
    )
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = Tokenizer(tiny_model_dir).encode(PROMPT)
    expected = theirs.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :]
    assert json.loads(result.stdout)["token_ids"] == expected.tolist()


def test_a_seed_gives_the_same_text_with_any_drafter(model: list[str], tiny_draft_dir: Path) -> None:
    sampled = ["--temperature", "1", "--seed", "5", "--max-tokens", "24", "--json", "-"]
    drafters = [
        ["none"],
        ["ngram"],
        ["suffix", "--draft-tokens", "2"],
        [str(tiny_draft_dir)],
        ["suffix", "--draft-tokens", "0"],
    ]
    texts = [
        json.loads(outrider("generate", PROMPT, *model, *sampled, "--drafter", *d).stdout)["token_ids"]
        for d in drafters
    ]
    assert texts == [texts[0]] * len(texts)
    other = outrider("generate", PROMPT, *model, *sampled[:3], "6", *sampled[4:])
    assert json.loads(other.stdout)["token_ids"] != texts[0]


def test_sampling_options_reach_the_sampler(model: list[str], llm: LLM) -> None:
    plain = llm.generate(PROMPT, SamplingParams(max_tokens=12))[0]
    first = plain.token_ids[0]
    banned = json.loads(
        outrider(
            "generate", PROMPT, *model, "--max-tokens", "12", "--logit-bias", f"{first}=-100", "--json", "-"
        ).stdout
    )
    assert first not in banned["token_ids"]
    options = {
        "temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "seed": 4, "max_tokens": 20, "rule": "coupled",
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    [expected] = llm.generate(PROMPT, SamplingParams(**options))  # type: ignore[arg-type]
    found = outrider("generate", PROMPT, *model, *flags, "--ignore-eos", "--json", "-")
    assert json.loads(found.stdout)["token_ids"][: len(expected.token_ids)] == expected.token_ids


def test_stop_strings_end_the_text_and_are_not_part_of_it(model: list[str], llm: LLM) -> None:
    text = llm.generate(PROMPT, SamplingParams(max_tokens=24))[0].text
    stop = text[8:11]
    result = outrider("generate", PROMPT, *model, "--max-tokens", "24", "--stop", stop, "--stop", "\0", "--json", "-")
    record = json.loads(result.stdout)
    assert record["text"] == text[: text.find(stop)] and record["finish_reason"] == "stop"


def test_prompt_of_any_bytes_from_standard_input(model: list[str], tiny_model_dir: Path) -> None:
    raw = "naïve ".encode() + b"\xff\xfe\x80 caf\xe9\n"
    llm = LLM(tiny_model_dir, "none", backend="reference", dtype="float32")
    [expected] = llm.generate(raw.decode("utf-8", "surrogateescape"), SamplingParams(max_tokens=8))
    result = outrider("generate", "-", *model, "--max-tokens", "8", "--json", "-", stdin=raw)
    assert json.loads(result.stdout) | {"stats": {}} == output_record(expected) | {"stats": {}}


def test_chat_template_on_demand(model: list[str], llm: LLM) -> None:
    ids = llm.tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    [expected] = llm.generate(ids, SamplingParams(max_tokens=8))
    result = outrider("generate", "Hello", *model, "--chat", "--max-tokens", "8", "--json", "-")
    assert json.loads(result.stdout)["token_ids"] == expected.token_ids


def test_many_prompts_from_a_file(model: list[str], llm: LLM, tmp_path: Path) -> None:
    prompts = [*TEXTS, "a \u2028 b"]
    lines = [json.dumps({"turns": [prompt, "a later turn"]}, ensure_ascii=False) for prompt in prompts]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    result = outrider("generate", "--prompts", file, *model, "--max-tokens", "6", "--json", "-")
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)
    assert [record["prompt"] for record in records] == prompts
    for prompt, record in zip(prompts, records, strict=True):
        assert record["token_ids"] == llm.generate(prompt, SamplingParams(max_tokens=6))[0].token_ids


@pytest.fixture
def one_too_long(tmp_path: Path) -> Path:
    """Forty prompts; the 36th is too long for the model and stands in line 37, after a byte order mark and a blank."""
    lines = [json.dumps({"turns": [f"word {i}" if i != 35 else "word " * 300]}) for i in range(40)]
    file = tmp_path / "forty.jsonl"
    file.write_text("\ufeff" + "\n".join([*lines[:3], "", *lines[3:]]), encoding="utf-8")
    return file


def test_one_prompt_too_long_does_not_stop_the_others(model: list[str], llm: LLM, one_too_long: Path) -> None:
    arguments = ("generate", "--prompts", one_too_long, *model, "--max-tokens", "2", "--json", "-")
    result = outrider(*arguments)
    assert result.exit_code == SOME_FAILED == 3
    records = json.loads(result.stdout)
    assert [record["index"] for record in records] == list(range(40))
    assert [record["index"] for record in records if "error" in record] == [35]
    assert records[35]["line"] == 37 and "pass the context" in records[35]["error"] and "text" not in records[35]
    [last] = llm.generate("word 39", SamplingParams(max_tokens=2))
    assert records[39]["token_ids"] == last.token_ids and records[0]["line"] == 1
    assert "prompt 36" in result.stderr and "1 of 40 prompts could not be answered" in result.stderr
    strict = outrider(*arguments, "--fail-fast")
    assert strict.exit_code == 2 and "line 37: the prompt has" in strict.stderr and strict.stdout == ""


def test_one_prompt_that_fails_as_it_runs_does_not_stop_the_others(model: list[str], tmp_path: Path) -> None:
    """The bias of token 5 overflows where the prompt has that token, as its penalty multiplies it."""
    file = tmp_path / "three.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": ids}) for ids in ([7, 8], [5, 8], [9])))
    arguments = ("generate", "--prompts", file, *model, "--max-tokens", "1", "--logit-bias", "5=1e30")
    arguments += ("--repetition-penalty", "1e-9", "--json", "-")
    result = outrider(*arguments)
    assert result.exit_code == SOME_FAILED, result.output
    records = json.loads(result.stdout)
    assert [record.get("token_ids") for record in records] == [[5], None, [5]]
    assert "repetition_penalty" in records[1]["error"] and records[1]["line"] == 2
    assert "prompt 2" in result.stderr and "1 of 3 prompts could not be answered" in result.stderr
    strict = outrider(*arguments, "--fail-fast")
    assert strict.exit_code == 2 and "line 2: the request's sampling options" in strict.stderr


def test_bench_leaves_out_what_is_too_long(model: list[str], one_too_long: Path) -> None:
    arguments = ("bench", "--prompts", one_too_long, *model, "--drafter", "ngram", "--max-tokens", "2")
    arguments += ("--repeats", "1", "--temperature", "0", "--json", "-", "--limit")
    result = outrider(*arguments, "36")
    assert result.exit_code == SOME_FAILED and "1 of 36 prompts" in result.stderr
    found = json.loads(result.stdout)
    assert [(error["index"], error["line"]) for error in found["errors"]] == [(35, 37)]
    assert found["rows"][0]["generated"] == 2 * 35
    assert outrider(*arguments, "36", "--fail-fast").exit_code == 2
    assert outrider(*arguments, "2").exit_code == 0


def test_a_template_that_refuses_one_prompt_does_not_stop_the_others(tmp_path: Path) -> None:
    template = "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    picky = save_llama(tmp_path / "picky", layers=1, chat_template=template)
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "good"}\n{"text": "bad"}\n{"prompt": [5, 6]}\n{"prompt": [5, 600]}\n{"turns": [""]}\n')
    options = ["--model", picky, "--backend", "reference", "--chat", "--max-tokens", "2", "--json", "-"]
    result = outrider("generate", "--prompts", file, *options)
    errors = [record.get("error", "") for record in json.loads(result.stdout)]
    assert result.exit_code == SOME_FAILED and [bool(error) for error in errors] == [False, True, False, True, True]
    assert "refuses these messages: no" in errors[1] and "between 0 and" in errors[3] and "empty" in errors[4]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "temperature must be between 0"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--top-k", "-1"], "top_k must be"),
        (["--min-p", "1.5"], "min_p must be"),
        (["--max-tokens", "0"], "max_tokens must be"),
        (["--repetition-penalty", "0"], "repetition_penalty must be"),
        (["--rule", "blok"], "did you mean 'block'"),
        (["--stop", ""], "stop must be a non-empty string"),
        (["--logit-bias", "x=1"], "expected ID=VALUE"),
        (["--draft-tokens", "-1"], "draft_tokens must be"),
        (["--drafter", "./nowhere"], "nowhere"),
        (["--backend", "cpuu"], "unknown backend 'cpuu'"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--max-tokens", "100000"], "context of 256 tokens"),
        (["--json", "/nowhere/out.json"], "cannot write /nowhere/out.json"),
    ],
)
def test_bad_values_get_one_line_and_code_2(model: list[str], args: list[str], message: str) -> None:
    result = outrider("generate", PROMPT, *model, "--max-tokens", "2", *args)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_bad_files_get_one_line_and_code_2(model: list[str], tmp_path: Path) -> None:
    def refused(*args: str | Path) -> str:
        result = outrider("generate", *args)
        assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return result.stderr

    assert "no such model directory" in refused("x", "--model", tmp_path / "none")
    assert "config.json" in refused("x", "--model", tmp_path)
    file = tmp_path / "prompts.jsonl"
    for line in ("{", "[1]", '{"turn": ["x"]}', '{"turns": []}', '{"turns": [1]}', '{"turns": "x"}'):
        file.write_text('{"turns": ["fine"]}\n\n' + line + "\n")
        assert "line 3" in refused("--prompts", file, *model)
    assert "prompts" in refused("--prompts", tmp_path / "none.jsonl", *model)
    assert "not both" in refused("x", "--prompts", file) and "expected a PROMPT" in refused("--max-tokens", "2")


def test_an_empty_prompt_and_one_too_long(model: list[str]) -> None:
    for prompt, message in (("", "prompt is empty"), ("word " * 300, "pass the context")):
        result = outrider("generate", prompt, *model)
        assert result.exit_code == 2 and message in result.stderr


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    plain = save_llama(tmp_path / "plain", layers=1, chat_template=None)
    for command in (["chat"], ["generate", "hi", "--chat"]):
        result = outrider(*command, "--model", plain, "--backend", "reference")
        assert result.exit_code == 2 and "no chat template" in result.stderr


def test_unknown_commands_and_options_are_refused_with_a_hint() -> None:
    result = outrider("generate", "x", "--temprature", "1")
    assert result.exit_code == 2 and "--temperature" in result.stderr
    result = outrider("eval", "--model", "x")
    assert result.exit_code == 2 and "No such option: --model (Possible options: --target)" in result.stderr
    result = outrider("generate", "--target", "x")
    assert result.exit_code == 2 and "No such option: --target (Possible options: --model)" in result.stderr
    result = outrider("generat")
    assert result.exit_code == 2 and "generate" in result.stderr


def test_an_unforeseen_error_is_one_line_unless_asked(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr("outrider.engine.llm.LLM.__init__", broken)
    result = outrider("generate", "x", *model)
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: deep inside; OUTRIDER_DEBUG=1" in result.stderr
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    assert isinstance(outrider("generate", "x", *model).exception, ZeroDivisionError)


def test_a_warning_is_one_line(model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*args: object, **options: object) -> None:
        warnings.warn("the cache\nis full", stacklevel=2)
        raise InvalidRequest("enough")

    monkeypatch.setattr("outrider.engine.llm.LLM.__init__", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = outrider("generate", "x", *model)
    assert result.stderr.splitlines()[-2:] == ["warning: the cache is full", "error: enough"]


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--drafter", "ngram", "--out", "OUT"],
        ["calibrate", "ngram", "OUT"],
        ["convert", "x", "OUT", "--to", "speculators"],
        ["export", "x", "OUT", "--to", "vllm", "--target", "embedded"],
        ["doctor", "x", "--json", "OUT"],
        ["train", "RECIPE", "--out", "OUT"],
    ],
)
def test_a_place_that_cannot_be_written_is_refused_first(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*args: object, **options: object) -> None:
        raise AssertionError("the place should have been looked at before")

    for name in ("loading.load_tokenizer", "loading.load_target", "locations.drafter_location"):
        monkeypatch.setattr(f"outrider.models.{name}", loads)
    monkeypatch.setattr("outrider.training.estimate.estimate", loads)
    (tmp_path / "file").touch()
    (tmp_path / "my.toml").write_text('target = "embedded"\nout = "runs"\n[prompts]\nsources = [{ self = 100 }]\n')
    places = {"OUT": str(tmp_path / "file" / "x"), "RECIPE": str(tmp_path / "my.toml")}
    result = outrider(*(places.get(word, word) for word in command))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
    assert places["OUT"] in result.stderr


# ------------------------------------------------------------------------------------------------ the process


def test_help_explains_by_example_without_loading_torch() -> None:
    show = "from outrider.cli import app; app(['--help'], standalone_mode=False)"
    code = f"import sys; {show}; assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    for name in COMMANDS:
        assert name in found.stdout
        text = outrider(name, "--help").stdout
        assert "Examples" in text and f"outrider {name}" in text


@pytest.mark.parametrize("command", [[], ["bench"], ["train"], ["train", "run"]])
def test_help_breaks_lines_by_the_width_alone(command: list[str]) -> None:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "1000", "TERM": "dumb"}).stdout
    prose = re.split(r"^[╭+]", shown, flags=re.M)[0].strip()
    assert "\n" not in re.sub(r"\n(\s*\n)+", "", prose), prose


def test_interruption_keeps_what_was_written(model: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "outrider", "generate", PROMPT, *model, "--json", str(tmp_path / "out.json")]
    long = [*command, "--ignore-eos", "--max-tokens", "200", "--drafter", "none", "--temperature", "1"]
    child = subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert child.stdout is not None
    beginning = child.stdout.read(4)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    if child.returncode == 0:
        pytest.skip("the text was complete before the signal came")
    assert child.returncode == 130 and b"Traceback" not in errors
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["finish_reason"] == "cancelled" and 0 < len(record["token_ids"]) < 200
    assert (beginning + rest).decode() == record["text"] + "\n"


def test_an_interruption_while_it_is_imported_shows_no_traceback() -> None:
    code = """
import os, runpy, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
runpy.run_module("outrider", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGINT and not done.stderr, done.stderr


def test_an_interruption_while_torch_is_imported_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT); print('went on')")
    code = (
        "import runpy, sys; sys.argv = ['outrider', 'generate', 'x']; runpy.run_module('outrider', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert done.returncode == -signal.SIGINT and not done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("command", [["generate", "x", "--max-tokens", "100", "--ignore-eos"], ["models"]])
def test_a_reader_that_goes_away_is_no_error(model: list[str], command: list[str]) -> None:
    line = " ".join([sys.executable, "-m", "outrider", *command, *(model if command[0] == "generate" else [])])
    done = subprocess.run(
        ["bash", "-c", f"{line} | head -c 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, timeout=120
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"error" not in done.stderr


@pytest.mark.parametrize("command", ["", "models", "train"])
def test_help_may_be_read_in_part(command: str) -> None:
    line = f"{sys.executable} -m outrider {command} --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_arguments_that_are_not_utf8_and_an_output_that_is_not(model: list[str]) -> None:
    done = process("generate", os.fsdecode(b"caf\xe9"), *model, "--max-tokens", "4", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_is_closed_is_empty(model: list[str], closed: str) -> None:
    line = shlex.join([sys.executable, "-m", "outrider", "chat", *model, "--max-tokens", "4"])
    sent = "" if closed == "<&-" else "echo Hi | "
    done = subprocess.run(["bash", "-c", f"{sent}{line} {closed}"], capture_output=True, timeout=120)
    assert done.returncode == 0 and b"error" not in done.stderr, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_named(model: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = ["generate", "x", *model, "--max-tokens", "2"]
    line = shlex.join([sys.executable, "-m", "outrider", *args])
    done = subprocess.run(["bash", "-c", f"{line} > /dev/full"], capture_output=True, timeout=120)
    assert done.returncode == 2 and b"error: a file or standard output: No space left on device" in done.stderr
    result = outrider(*args, "--json", "/dev/full")
    assert result.exit_code == 2 and "/dev/full cannot be written: No space left on device" in result.stderr
    earlier = tmp_path / "out.json"
    earlier.write_text("[]")

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert outrider(*args, "--json", earlier).exit_code == 2
    assert earlier.read_text() == "[]" and list(tmp_path.iterdir()) == [earlier]


def test_version() -> None:
    from outrider import __version__

    assert outrider("--version").stdout == f"outrider {__version__}\n"


# ------------------------------------------------------------------------------------------------ chat, models, demo


def test_chat_keeps_and_forgets_the_conversation(model: list[str], llm: LLM) -> None:
    params = SamplingParams(max_tokens=6)
    messages: list[dict[str, str]] = []
    answers = []
    for said in ("Hello", "And then?"):
        messages.append({"role": "user", "content": said})
        answers.append(llm.generate(llm.tokenizer.encode_chat(messages), params)[0].text)
        messages.append({"role": "assistant", "content": answers[-1]})
    said = "Hello\n\nAnd then?\n/what\n/reset\nHello\n/exit\nnever read\n"
    result = outrider("chat", *model, "--max-tokens", "6", stdin=said)
    assert result.exit_code == 0
    assert result.stdout == "".join(answer + "\n" for answer in (*answers, answers[0]))
    assert "unknown command /what" in result.stderr and result.stderr.count("acceptance length") == 3


def test_chat_reads_bytes_that_are_not_utf8(model: list[str]) -> None:
    done = process("chat", *model, "--max-tokens", "4", stdin=b"caf\xe9\n/exit\n", PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0 and b"acceptance length" in done.stderr and b"error" not in done.stderr


def test_chat_survives_a_conversation_that_is_too_long(model: list[str]) -> None:
    result = outrider("chat", *model, "--max-tokens", "4", stdin="word " * 300 + "\nHello\n")
    assert result.exit_code == 0 and "/reset begins anew" in result.stderr
    assert result.stderr.count("acceptance length") == 1


def test_a_missing_native_core_is_said_once(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.cli.common.find_spec", lambda name: None)
    options = ["generate", "x", "--model", str(tiny_model_dir), "--max-tokens", "2"]
    assert outrider(*options).stderr.count("the native core is not built") == 1
    assert "native core" not in outrider(*options, "--backend", "reference").stderr


def test_models_lists_what_is_here() -> None:
    result = outrider("models", "--json", "-")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert {"embedded", "embedded-draft", "embedded-dspark"} <= {entry["name"] for entry in found["embedded"]}
    assert found["catalogues"]["drafter"]["suffix"] is None
    assert found["catalogues"]["backend"]["reference"] is None
    assert found["native"]["built"] == (found["catalogues"]["backend"]["native"] is None)
    assert "embedded-draft" in result.stderr
    (here,) = (entry for entry in found["models"] if entry["name"] == "smollm2")
    assert here["runs"] == (here["problem"] is None) == (here["path"] is not None)
    assert found["packed_weights"]["limit_bytes"] == 8 << 30


def test_a_port_in_use_and_missing_packages_are_said_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = outrider("serve", tmp_path / "model", "--port", str(other.getsockname()[1]))
    assert found.exit_code == 2 and "cannot listen on 127.0.0.1 port" in found.stderr
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setenv("OUTRIDER_SERVE_TELEMETRY", "true")
    found = outrider("serve", tmp_path / "model", "--port", "0")
    assert found.exit_code == 2 and "outrider[telemetry]" in found.stderr


def test_a_wrong_file_of_keys_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    found = outrider("serve", tmp_path / "model", "--api-key-file", tmp_path / "keys")
    assert found.exit_code == 2 and "--api-key-file" in found.stderr and "cannot be read" in found.stderr
