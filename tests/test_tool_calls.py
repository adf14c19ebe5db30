"""Tool calls in the forms of public models: the same pieces however the text is cut, and grammars whose texts parse."""

from __future__ import annotations

import json
import random
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from outrider import LLM, SamplingParams
from outrider.errors import InvalidRequest
from outrider.serving.tool_calls import ToolDelta, ToolParser, form_of, tool_grammar
from outrider.serving.tool_use import ToolUse, joined
from outrider.types import Piece

TEMPLATES = {
    "hermes": "{% if tools %}<tools></tools> <tool_call>{% endif %}",
    "tags": "{% if tools %}<tool_call>\n<function=x>\n<parameter=y>{% endif %}",
    "llama": '{% if tools %}Environment: ipython {"name": f, "parameters": {}}{% endif %}',
    "mistral": "{% if tools %}[AVAILABLE_TOOLS] [TOOL_CALLS]{% endif %}",
    "colon": "{% if tools %}<start_function_call>call:x{}<end_function_call>{% endif %}",
    "tool_code": "{% if tools %}```tool_code{% endif %}",
    "json": "{% if tools %}{{ tools | tojson }}{% endif %}",
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 8, "default": "Rome"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ROME = ("weather", {"city": "Rome", "days": 3})
NOW: tuple[str, dict[str, Any]] = ("now", {})

# form, answer, its text, its calls
ANSWERS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", "No tool is needed: 1 < 2.", "No tool is needed: 1 < 2.", []),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>',
        "I look.",
        [ROME],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"city": "Rome", "days": 3}, "name": "weather"}</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n',
        "",
        [ROME, NOW],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', "Done.", [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [NOW]),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 3}"}</tool_call>',
        "",
        [ROME],
    ),
    (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "now", "arguments": {}}}</tool_call>',
        "",
        [NOW],
    ),
    (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call> {\\"}", "days": 1}}</tool_call>',
        "",
        [("weather", {"city": '</tool_call> {"}', "days": 1})],
    ),
    ("hermes", "<tool_call>now please</tool_call> a", "<tool_call>now please</tool_call> a", []),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}, oops}</tool_call> Done.', "Done.", [NOW]),
    ("hermes", '<tool_call>{"name": "unknown"}</tool_call>', "", [("unknown", {})]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> {"name": "Rome"}', '{"name": "Rome"}', [NOW]),
    ("hermes", "a <tool_cal", "a <tool_cal", []),
    ("hermes", "An end of lines.\n\n", "An end of lines.\n\n", []),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}, oops}</tool_call>', "", [NOW]),
    (
        "hermes",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        [],
    ),
    ("llama", '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}', "", [ROME]),
    ("llama", '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', "", [NOW, NOW]),
    ("llama", '{"name": "now", "parameters": {}}; {"name": "nobody"}', '{"name": "nobody"}', [NOW]),
    ("llama", '<|python_tag|>{"name": "now"}; {"name": "unknown"}', "", [NOW, ("unknown", {})]),
    ("llama", '{"name": "nobody", "age": 3}', '{"name": "nobody", "age": 3}', []),
    ("llama", '{"answer": 42}', '{"answer": 42}', []),
    ("llama", '\n {"answer": 42}', '\n {"answer": 42}', []),
    ("llama", 'Use {"name": "now", "parameters": {}}', 'Use {"name": "now", "parameters": {}}', []),
    ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]', "", [ROME]),
    ("mistral", '[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]', "", [NOW, NOW]),
    ("mistral", "[1, 2]", "[1, 2]", []),
    ("mistral", '[1] [{"name": "now", "arguments": {}}]', '[1] [{"name": "now", "arguments": {}}]', []),
    ("mistral", '[{"name": "now", "arguments": {}},\n[1]]', "[1]]", [NOW]),
    ("mistral", '[TOOL_CALLS][{"name": "unknown", "arguments": {}}]', "", [("unknown", {})]),
    ("colon", "<start_function_call>call:weather{city:<escape>Rome<escape>,days:3}<end_function_call>", "", [ROME]),
    ("colon", "Yes. <start_function_call>call:now{}<end_function_call>", "Yes.", [NOW]),
    ("colon", "<start_function_call>call:weather{city:Rome,days:3}<end_function_call>", "", [ROME]),
    ("colon", "call:weather{city:Rome,days:3}", "", [ROME]),  # the marks are special tokens that nobody fed
    ("colon", "callers", "callers", []),
    ("colon", "call", "call", []),
    ("colon", "call:now{}\ncall:nobody{}", "call:now{}\ncall:nobody{}", []),
    ("colon", "call:me<end_function_call>call:now{}", "call:me<end_function_call>call:now{}", []),
    ("colon", '{"name": "now", "arguments": {}}', "", [NOW]),
    ("colon", '{"name": "nobody"}', '{"name": "nobody"}', []),
    ("colon", "call:me", "call:me", []),
    (
        "colon",
        "<start_function_call>call:f{a:{b:[1,<escape>x, y<escape>,true]},c:null}<end_function_call>",
        "",
        [("f", {"a": {"b": [1, "x, y", True]}, "c": None})],
    ),
    ("tool_code", '```tool_code\nprint(weather(city="Rome", days=3))\n```\nThere.', "There.", [ROME]),
    ("tool_code", '```tool_code\nweather("Rome", 3)\nnow()\n```', "", [ROME, NOW]),
    ("tool_code", '```tool_call\n{"name": "now", "arguments": {}}\n```', "", [NOW]),
    ("tool_code", '```tool_code\n[{"name": "now", "arguments": {}}, {"name": "now"}]\n```', "", [NOW, NOW]),
    ("tool_code", "```tool_code\nnow()\n```\nAnd:\n```python\n1\n```", "And:\n```python\n1\n```", [NOW]),
    (
        "tool_code",
        '```tool_code\nnow()\n```\n```tool_call\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n```',
        "",
        [NOW, ROME],
    ),
    ("tool_code", "```tool_code\nimport os\n```", "```tool_code\nimport os\n```", []),
    ("tool_code", "```python\nprint(1)\n```", "```python\nprint(1)\n```", []),
    (
        "tags",
        "Well.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>",
        "Well.",
        [ROME],
    ),
    ("json", '{"name": "weather", "arguments": {"city": "Rome", "days": 3}}', "", [ROME]),
    ("json", '[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]', "", [NOW, NOW]),
]


def parse(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer in pieces; checks what every client relies on."""
    numbers = count()
    parser = ToolParser(TEMPLATES[form], TOOLS, new_id=lambda: f"id{next(numbers)}")
    found = [one for piece in pieces for one in parser.feed(piece)] + parser.finish()
    text, names, arguments = "", [], []
    for one in found:
        if isinstance(one, str):
            assert one, "an empty piece of text"
            text += one
            continue
        assert isinstance(one, ToolDelta)
        if one.name is not None:
            assert one.index == len(names) and one.id == f"id{one.index}" and not one.arguments
            names.append(one.name)
            arguments.append("")
        else:
            assert one.id is None and one.index == len(names) - 1, "arguments of a call that is over"
            arguments[one.index] += one.arguments
    assert parser.calls == len(names)
    return text, [(name, json.loads(given)) for name, given in zip(names, arguments, strict=True)]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
def test_answers_are_read_the_same_however_they_are_cut(form: str, answer: str, text: str, calls: list[Any]) -> None:
    assert form_of(TEMPLATES[form]).name == form  # type: ignore[union-attr]
    assert parse(form, [answer]) == (text, calls)
    assert parse(form, list(answer)) == (text, calls)
    for seed in range(20):
        rng, rest, pieces = random.Random(seed), answer, []
        while rest:
            size = rng.randrange(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert parse(form, pieces) == (text, calls), pieces


def test_arguments_are_streamed_as_they_come() -> None:
    parser = ToolParser(TEMPLATES["hermes"], TOOLS)
    assert parser.feed("Let me see.") == ["Let me see."]
    assert parser.feed("\n<tool_") == []
    (begun,) = parser.feed('call>{"name": "weather", "argum')
    assert isinstance(begun, ToolDelta) and begun.name == "weather" and begun.id and begun.id.startswith("call_")
    given = "".join(one.arguments for one in parser.feed('ents": {"city": "Ro') if isinstance(one, ToolDelta))
    assert given == '{"city": "Ro'
    given += "".join(one.arguments for one in parser.feed('me"') if isinstance(one, ToolDelta))
    assert given == '{"city": "Rome"'
    assert parser.finish() == [] and parser.calls == 1, "an answer may be cut off by its budget"


def use(choice: str, *, named: bool = False, parallel: bool = True) -> ToolUse:
    tokenizer: Any = SimpleNamespace(
        chat_template_text=lambda tools: TEMPLATES["hermes"] if tools else "",
        vocabulary={"<tool_call>": 7, "</tool_call>": 8},
        special_ids={7},
    )
    return ToolUse(tokenizer, TOOLS, choice, named=named, parallel=parallel)


@pytest.mark.parametrize("parallel", [True, False])
def test_without_parallel_calls_an_answer_ends_with_its_first_one(parallel: bool) -> None:
    reader = use("auto", parallel=parallel).reader()
    texts = [
        ("", 7),
        ('{"name": "now"}', 1),
        ("</tool_call>", 8),
        ("", 7),
        ('{"name": "now"}', 1),
        ("</tool_call> a", 8),
    ]
    found = [reader.feed([Piece(token, text, False, None, None)]) for text, token in texts]  # type: ignore[list-item]
    assert [(one.index, one.name) for one in joined(call for _, calls in found for call in calls)] == (
        [(0, "now"), (1, "now")] if parallel else [(0, "now")]
    )
    assert "".join(text for text, _ in found) == ("a" if parallel else "")
    assert reader.complete is not parallel


def test_a_named_choice_asks_for_one_call_and_a_required_one_for_any_number() -> None:
    form = form_of(TEMPLATES["hermes"])
    assert form is not None and use("auto").grammar is None
    assert use("now", named=True).grammar == tool_grammar(form, TOOLS, "now", parallel=False)
    assert use("required").grammar == tool_grammar(form, TOOLS)
    assert (
        use("required", parallel=False).grammar
        == tool_grammar(form, TOOLS, parallel=False)
        != tool_grammar(form, TOOLS)
    )


def test_text_is_not_held_back_longer_than_a_mark() -> None:
    parser = ToolParser(TEMPLATES["hermes"], TOOLS)
    assert parser.feed("a < b") == ["a < b"]
    assert parser.feed(" <") == []
    assert parser.feed("= c") == [" <= c"]
    assert len(ToolParser(TEMPLATES["mistral"], TOOLS)._new_id()) == 9


@pytest.mark.parametrize(
    "text", ["<tool_call>" * 300, '<tool_call>{"name":' + "[" * 5000, "{" * 5000, "call:a{a:" * 999]
)
@pytest.mark.parametrize("form", TEMPLATES)
def test_hostile_answers_are_text(form: str, text: str) -> None:
    marks = form_of(TEMPLATES[form]).begin  # type: ignore[union-attr]
    for whole in (text, "".join(marks[:1]) + text):
        found, calls = parse(form, [whole])
        assert calls == [] and found.replace(" ", "") == whole


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("name", [None, "weather"])
def test_forced_calls_parse_and_are_valid(form: str, name: str | None, llm: LLM) -> None:
    found = form_of(TEMPLATES[form])
    assert found is not None
    complete = 0
    for seed in range(3):
        grammar = tool_grammar(found, TOOLS[:1] if name else TOOLS, name, parallel=seed == 2)
        params = SamplingParams(max_tokens=120, grammar=grammar, temperature=1.0, seed=seed)
        output = llm.generate("The weather: ", params)[0]
        if output.finish_reason == "length":  # several calls without an end
            continue
        text, calls = parse(form, list(output.text))
        assert text == "" and calls, output.text
        assert seed == 2 or len(calls) == 1
        for called, arguments in calls:
            assert called in ("weather", "now") and (called == "weather" or name is None)
            if called == "weather":
                assert set(arguments) == {"city", "days"} and 1 <= arguments["days"] <= 9
        complete += 1
    assert complete


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(drafter="ngram")


def test_schemas_are_followed_strictly_where_a_function_asks_for_it_and_names_are_written_as_they_are() -> None:
    form = form_of(TEMPLATES["hermes"])
    assert form is not None
    for strict, lenient in ((True, "false"), (False, "true"), (None, "true")):
        text = tool_grammar(form, [{"function": {"name": "größe", "strict": strict}}]).text
        assert f'"lenient": {lenient}' in text and "größe" in text


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object", "properties": None}])
@pytest.mark.parametrize("answer", ["<tool_call><function=now><parameter=at>1</parameter></function></tool_call>"])
def test_a_tool_without_properties_can_be_called(parameters: Any, answer: str) -> None:
    """Forms that are not JSON look up the kind of an argument there."""
    parser = ToolParser(TEMPLATES["tags"], [{"function": {"name": "now", "parameters": parameters}}])
    found = [one for one in parser.feed(answer) if isinstance(one, ToolDelta)]
    assert found[0].name == "now" and json.loads("".join(one.arguments for one in found)) in ({"at": 1}, {"at": "1"})


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="template has no tools"):
        ToolParser("{{ messages }}", TOOLS)
    form = form_of(TEMPLATES["hermes"])
    assert form is not None and form_of("{{ messages }}") is None
    with pytest.raises(InvalidRequest, match="'then'"):
        tool_grammar(form, TOOLS, "then")
    with pytest.raises(InvalidRequest, match="no `tools`"):
        tool_grammar(form, [])
