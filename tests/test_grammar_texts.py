"""Grammars: whole texts with and without drafts, interrupts, and grammars that fail or are hostile."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grammars import END, LETTERS, MERGED, REGEX, is_valid, random_schema, tokenizer_of
from interrupted import interrupted_runs
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer
from trained import DESIGNS, VOCABULARY, make_checkpoint, make_target
from typer.testing import CliRunner

from outrider import LLM, SamplingParams
from outrider.backends.reference import ReferenceBackend
from outrider.cli import app
from outrider.config import Grammar, build
from outrider.engine.engine import Engine
from outrider.errors import InvalidRequest
from outrider.models.toy import ToyTarget
from outrider.registry import find
from outrider.sampling.grammar import Grammars
from outrider.tokenization.tokenizer import Tokenizer

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "coupled": {"temperature": 0.9, "seed": 5},
    "penalised": {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.2, "top_k": 20},
    "block": {"temperature": 1.0, "rule": "block"},
    "rejection": {"temperature": 1.0, "rule": "rejection"},
}


@pytest.fixture(scope="module")
def llms() -> dict[str, LLM]:
    """The packaged target and drafters."""
    first = LLM(drafter="none", dtype="float32")
    return {"none": first, **{name: first.with_drafter(name) for name in ("ngram", "suffix", "draft_model")}}


def answers(llm: LLM, schemas: list[dict[str, Any]], tokens: int, **options: Any) -> list[Any]:
    prompts = [f"A record of kind {i}, as JSON:\n" for i in range(len(schemas))]
    params = [
        SamplingParams(max_tokens=tokens, grammar=Grammar("json_schema", json.dumps(schema)), **options)
        for schema in schemas
    ]
    found = llm.generate(prompts, params)
    for one, schema in zip(found, schemas, strict=True):
        if one.finish_reason == "stop":
            assert is_valid(json.loads(one.text), schema), (one.text, schema)
    return found


@pytest.mark.parametrize("sampling", SAMPLING)
def test_texts_are_valid_and_those_of_plain_decoding(sampling: str, llms: dict[str, LLM]) -> None:
    rng = random.Random(1)
    schemas, options = [random_schema(rng) for _ in range(6)], SAMPLING[sampling]
    plain = answers(llms["none"], schemas, 60, **options)
    assert any(one.finish_reason == "stop" for one in plain)
    for name in ("ngram", "suffix", "draft_model"):
        found = answers(llms[name], schemas, 60, **options)
        assert sum(one.stats.accepted for one in found) > 0
        if sampling not in ("block", "rejection"):
            assert [one.token_ids for one in found] == [one.token_ids for one in plain], name


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLING)
def test_many_schemas(sampling: str, llms: dict[str, LLM]) -> None:
    rng = random.Random(2)
    schemas = [random_schema(rng) for _ in range(100)]
    plain = answers(llms["none"], schemas, 120, **SAMPLING[sampling])
    found = answers(llms["draft_model"], schemas, 120, **SAMPLING[sampling])
    if sampling not in ("block", "rejection"):
        assert [one.token_ids for one in found] == [one.token_ids for one in plain]


def engine_of(target: Any, drafter: Any, tokenizer: Tokenizer) -> Engine:
    kind = find("policy", "fixed")
    policy = kind.from_config(build(kind.Config, {"draft_tokens": max(1, drafter.block)}, "policy"))
    return Engine(target, drafter, policy, max_rows=3, capacity=128, chunk=32, tokenizer=tokenizer)


def ngram(drafts: int) -> Any:
    kind = find("drafter", "ngram")
    return kind.from_config(build(kind.Config, {"draft_tokens": drafts, "min_ngram": 1}, "drafter"), None)


def finished(engine: Engine, wanted: Sequence[SamplingParams]) -> list[Any]:
    requests = [engine.submit([1 + i, 2, 3], params, params.seed or 0, i) for i, params in enumerate(wanted)]
    engine.wait(requests)
    return requests


@pytest.mark.parametrize("name", DESIGNS)
def test_trained_drafters_draft_under_the_mask(name: str) -> None:
    """Some draft from 30 tokens of 64, which the mask may all forbid. Rows without a grammar share the steps."""
    target, tokenizer = (
        make_target(dtype=torch.float64),
        tokenizer_of([*LETTERS, *MERGED, "q_"] + list("ABC"), ends=False),
    )
    assert tokenizer.vocab_size == VOCABULARY
    drafted = 30 if name in ("vanilla", "eagle3") else VOCABULARY
    checkpoint = make_checkpoint(DESIGNS[name], target=target, drafted=drafted)
    kind = find("drafter", checkpoint.kind)
    drafter = kind(checkpoint, target, ReferenceBackend(), config=kind.Config(""), dtype=torch.float64, max_rows=3)
    none = find("drafter", "none")
    rng = random.Random(4)
    for options in ({}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.0, "rule": "block"}):
        grammars = [Grammar("json_schema", json.dumps(random_schema(rng))) for _ in range(2)] + [None]
        wanted = [SamplingParams(max_tokens=30, grammar=grammar, **options) for grammar in grammars]
        found = finished(engine_of(target, drafter, tokenizer), wanted)
        if "rule" not in options:
            plain = finished(engine_of(target, none.from_config(none.Config(), target), tokenizer), wanted)
            assert [r.output for r in found] == [r.output for r in plain]
        for request, grammar in zip(found, grammars, strict=True):
            if grammar is not None and request.finish_reason == "stop":
                assert is_valid(json.loads(request.text), json.loads(grammar.text))
        drafter.reset_rows()


def test_forced_tokens_are_accepted_and_the_end_ends_the_text(llms: dict[str, LLM]) -> None:
    text = "the answer is forty-two, and no other."
    for options in ({"temperature": 0.7}, {"temperature": 0.7, "ignore_eos": True}, {}):
        grammar = Grammar("regex", re.escape(text).replace("\\ ", " "))
        params = SamplingParams(max_tokens=60, grammar=grammar, **options)
        for name in ("ngram", "draft_model"):
            one = llms[name].generate("Well,", params)[0]
            assert (one.text, one.finish_reason) == (text, "stop")
            assert one.stats.accepted == one.stats.drafted > 0
            assert one.stats.rounds < len(one.token_ids) / 2
    cut = llms["ngram"].generate("Well,", SamplingParams(max_tokens=4, grammar=grammar))[0]
    assert cut.finish_reason == "length" and len(cut.token_ids) == 4 and text.startswith(cut.text)
    stopped = llms["ngram"].generate("Well,", SamplingParams(max_tokens=60, grammar=grammar, stop=("forty",)))[0]
    assert (stopped.text, stopped.finish_reason) == ("the answer is ", "stop")


@pytest.mark.parametrize("prefix", [True, False])
def test_vocabularies_with_pieces_and_bytes(prefix: bool) -> None:
    """Of the SentencePiece kind, with byte tokens; Llama 2's puts a space before every text."""
    pieces = [
        "\u2581",
        *"abchelo",
        "\u2581a",
        "\u2581b",
        "he",
        "ll",
        "hell",
        "\u2581hell",
        "\u2581hello",
        "hello",
        "lo",
    ]
    vocabulary = ["<unk>", END, *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    merged = [("\u2581", "a"), ("\u2581", "b"), ("h", "e"), ("l", "l"), ("he", "ll"), ("\u2581", "hell"), ("hell", "o")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [*merged, ("\u2581hell", "o"), ("l", "o")]
    fast = FastTokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("\u2581")] * prefix + [normalizers.Replace(" ", "\u2581")]
    fast.normalizer = normalizers.Sequence(spaces)
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(END, special=True)])
    tokenizer = Tokenizer(Path("."), fast, {"eos_token": END})
    table = torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    engine = engine_of(ToyTarget(table, eos_token_ids=(1,)), ngram(4), tokenizer)
    for regex in ("hello a b[.]", r" hello\n(a|b| c){3} é hello", "(hello|a) hello"):
        for seed in range(4):
            params = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, grammar=Grammar("regex", regex))
            request = engine.submit(tokenizer.encode("a b"), params, seed, 0)
            engine.wait([request])
            assert request.finish_reason == "stop" and re.fullmatch(regex, request.text), request.text


def test_streams_and_neighbours(llms: dict[str, LLM]) -> None:
    params = SamplingParams(max_tokens=40, grammar=Grammar("regex", "[a-z]{3} [0-9]{2}"), temperature=1.0, seed=2)
    events = list(llms["suffix"].stream("x", params))
    assert re.fullmatch("[a-z]{3} [0-9]{2}", "".join(event.text for event in events))
    assert events[-1].finish_reason == "stop"
    alone = llms["suffix"].generate("def f(", SamplingParams(max_tokens=20))[0].token_ids
    both = llms["suffix"].generate(["def f(", "x"], [SamplingParams(max_tokens=20), params])
    assert both[0].token_ids == alone and both[1].text == "".join(event.text for event in events)


# ------------------------------------------------------------------------------------------------ interrupts, failures


def toy_engine(tokens: Sequence[str], drafts: int = 3, ends: bool = True) -> Engine:
    size = len(tokens) + ends
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = ToyTarget(table, eos_token_ids=(len(tokens),) if ends else ())
    return engine_of(target, ngram(drafts), tokenizer_of(tokens, ends))


@pytest.mark.parametrize("stride", [97, pytest.param(3, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_leaves_the_same_texts(stride: int) -> None:
    wanted = [
        SamplingParams(max_tokens=14, temperature=1.0, seed=9, grammar=Grammar("regex", regex))
        for regex in ("(ab|c){4,9}", "abcab[abc]+")
    ]
    expected = [r.output for r in finished(toy_engine("abc"), wanted)]

    def begin() -> tuple[Engine, list[Any]]:
        engine = toy_engine("abc")
        return engine, [engine.submit([1 + i, 2, 3], params, 9, i) for i, params in enumerate(wanted)]

    for line, engine, requests in interrupted_runs(begin, 4, stride, lines=1000):
        engine.wait(requests)
        assert [r.output for r in requests] == expected, f"interrupted at line {line}"


def test_preempted_rows_go_on_in_their_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [SamplingParams(max_tokens=14, temperature=1.0, seed=9, grammar=Grammar("regex", "(ab|c){4,9}"))] * 2
    expected = [r.output for r in finished(toy_engine("abc"), wanted)]
    engine = toy_engine("abc")
    requests = [engine.submit([1 + i, 2, 3], params, 9, i) for i, params in enumerate(wanted)]
    for _ in range(3):
        engine.step()
        engine._preempt(engine.admission.running[-1])
    engine.wait(requests)
    assert [r.output for r in requests] == expected


@pytest.mark.parametrize("drafts", [1, 4])
def test_a_grammar_that_cannot_go_on_fails_its_request_alone(drafts: int) -> None:
    """The vocabulary has no token for "x"; or a bias forbids what the grammar asks for."""
    engine = toy_engine("abc", drafts)
    good = SamplingParams(max_tokens=6, grammar=Grammar("regex", "(ab)+c"))
    for bad in (
        SamplingParams(max_tokens=6, grammar=Grammar("regex", "abx")),
        SamplingParams(max_tokens=6, grammar=Grammar("regex", "abc"), logit_bias=((2, float("-inf")),)),
    ):
        requests = [engine.submit([1, 2], params, 0, i) for i, params in enumerate([good, bad, good])]
        with pytest.raises(InvalidRequest, match="token"):
            engine.wait(requests)
        engine.wait([requests[0], requests[2]])
        assert requests[1].finish_reason == "error" and requests[1].output == [0, 1]
        assert requests[0].output == requests[2].output
    assert not engine.busy


HOSTILE = {
    "not a regex": Grammar("regex", "(a"),
    "look-around": Grammar("regex", "(?=a)b"),
    "deep regex": Grammar("regex", "(" * 40_000 + "a" + ")" * 40_000),
    "matches nothing": Grammar("regex", r"[^\x00-\x{10ffff}]"),
    "large repetition": Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "many dots": Grammar("regex", ".*" * 200 + "a.{500}b"),
    "deep schema": Grammar("json_schema", '{"items":' * 400 + "{}" + "}" * 400),
    "no such type": Grammar("json_schema", '{"type": "strin"}'),
    "unknown keyword": Grammar("json_schema", '{"not": {}}'),
    "remote": Grammar("json_schema", '{"$ref": "http://127.0.0.1:9/x.json"}'),
    "file": Grammar("json_schema", '{"$ref": "file:///etc/hostname"}'),
    "circle": Grammar("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
    "product": Grammar(
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(12)]}
        ),
    ),
    "long string": Grammar("json_schema", '{"type": "string", "minLength": 1000000}'),
    "many branches": Grammar(
        "json_schema",
        json.dumps({"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"} for j in range(20)}} for i in range(90)]}),
    ),
    "not lark": Grammar("lark", "start: undefined"),
    "deep lark": Grammar("lark", "start: " + "(" * 40_000 + '"a"' + ")" * 40_000),
    "endless lark": Grammar("lark", "start: start"),
    "ambiguous lark": Grammar("lark", 'start: start start | "a" | "aa"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_or_bounded(name: str, llms: dict[str, LLM]) -> None:
    """One InvalidRequest, or a text; soon."""
    began = time.perf_counter()
    try:
        one = llms["ngram"].generate(
            "x", SamplingParams(max_tokens=12, temperature=1.0, seed=1, grammar=HOSTILE[name])
        )[0]
        assert one.finish_reason in ("stop", "length")
    except InvalidRequest as error:
        assert 20 < len(str(error)) < 500
    assert time.perf_counter() - began < 3
    assert not llms["ngram"].engine.busy


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("json",), "kind"),
        (("json_object", "{}"), "no text"),
        (("json_schema", "[]"), "object"),
        (("json_schema", "{"), "JSON"),
        (("json_schema", "[" * 99_999), "nested"),
        (("regex", ""), "empty"),
        (("regex", b"a"), "string"),
        (("lark", "x" * 100_001), "characters"),
    ],
)
def test_what_is_no_grammar_is_refused(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        Grammar(*arguments)


def test_what_cannot_have_a_grammar_says_so() -> None:
    with pytest.raises(InvalidRequest, match="Grammar"):
        SamplingParams(grammar="{}")  # type: ignore[arg-type]
    engine = toy_engine("abc")
    engine_without = Engine(engine.target, engine.drafter, engine.policy, max_rows=1, capacity=16)
    with pytest.raises(InvalidRequest, match="tokenizer"):
        engine_without.submit([1], SamplingParams(grammar=REGEX), 0)
    word_level = FastTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(InvalidRequest, match="bytes"):
        Grammars(word_level.to_str, 2, ()).check(REGEX)


def test_the_command_line_takes_a_schema_and_an_expression(tmp_path: Path) -> None:
    def generate(*options: object) -> Any:
        return CliRunner().invoke(
            app, ["generate", "x", "--drafter", "ngram", "--max-tokens", "40", *map(str, options)]
        )

    schema = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    result = generate("--json-schema", tmp_path / "schema.json")
    assert result.exit_code == 0 and json.loads(result.stdout)["a"] in ("b", "c"), result.output
    result = generate("--regex", "[0-9]{4}-[0-9]{2}")
    assert result.exit_code == 0 and re.fullmatch(r"\d{4}-\d\d\n", result.stdout), result.output
    for wrong in (["--json-schema", tmp_path / "none.json"], ["--regex", "(a"], ["--regex", "a", "--json-schema", "b"]):
        result = generate(*wrong)
        assert result.exit_code == 2 and len(result.stderr.strip()) < 700, result.output
