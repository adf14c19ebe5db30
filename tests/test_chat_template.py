"""Chat templates of the public families, in small versions of our own: equal to what Transformers renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import BOS, EOT, byte_level_bpe, save_tokenizer

from outrider.errors import CheckpointError, InvalidRequest
from outrider.tokenization.chat_template import ChatTemplate, with_system_in_user
from outrider.tokenization.tokenizer import Tokenizer

TEMPLATES = {
    "qwen2.5": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'You are Q.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "qwen3": """
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and message.content is string and not message.content.startswith('<tool') %}
        {%- set ns.last = index %}{%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>' ~ call.name ~ ' ' ~ (call.arguments if call.arguments is string
                else call.arguments | tojson) ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "llama3": """
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message["role"] == "tool_calls" or message.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {{- (tool_call.function|tojson)[:-1] }}{{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}
""",
    "gemma2": """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
""",
    "gemma3": """
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}
""",
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are S.<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "hermes": """
{%- macro json_to_python_type(spec) %}
    {%- set types = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
    {%- if spec.type in types %}{{- types[spec.type] }}
    {%- elif spec.type == "array" and spec["items"] is defined %}
        {{- "list[" + json_to_python_type(spec["items"]) + "]" }}
    {%- else %}{{- "Any" }}{%- endif %}
{%- endmacro %}
{{- bos_token }}{{- '<|im_start|>system\\n<tools> ' }}
{%- for tool in tools or [] %}
    {%- set tool = tool.function if tool.function is defined else tool %}
    {{- '{"type": "function", "function": {"name": "' + tool.name + '(' }}
    {%- for name, fields in tool.parameters.properties.items() %}
        {{- name + ": " + json_to_python_type(fields) }}{%- if not loop.last %}{{- ", " }}{%- endif %}
    {%- endfor %}
    {{- ')", "parameters": ' }}{{- tool.parameters | tojson(ensure_ascii=False, sort_keys=True) }}{{- "}" }}
{%- endfor %}
{{- " </tools><|im_end|>\\n" }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>tool\\n<tool_response>\\n" + message.content + "\\n</tool_response><|im_end|>\\n" }}
    {%- elif message.role == "assistant" and message.tool_calls is defined %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' + (call.function | tojson(separators=(",", ":"))) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "deepseek": """
{%- if not add_generation_prompt is defined %}{%- set add_generation_prompt = false %}{%- endif %}
{%- set ns = namespace(is_tool=false, system_prompt='', first=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
    {%- if ns.first %}{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{%- set ns.first = false %}
    {%- else %}{%- set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}
{%- endif %}{%- endfor %}
{{- bos_token + ns.system_prompt }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{%- set ns.is_tool = false %}{{- '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is none %}
        {{- '<｜Assistant｜>none' }}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] %}
        {%- set ns.is_tool = false %}
        {%- for tool in message['tool_calls'] %}
            {{- '<｜tool｜>' + tool['type'] + '<｜sep｜>' + tool['function']['name'] + '\\n```json\\n' }}
            {{- tool['function']['arguments'] | tojson(ensure_ascii=true, indent=2, sort_keys=true) + '\\n```' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message['role'] == 'assistant' %}
        {%- set content = message['content'] %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {% generation %}{{- '<｜Assistant｜>' + content + eos_token }}{% endgeneration %}
    {%- elif message['role'] == 'tool' %}{%- set ns.is_tool = true %}{{- '<｜out｜>' + message['content'] }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.is_tool %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}
""",
    "cites documents": (
        "{% if documents is none %}none{% endif %}{% for d in documents or [] %}{{ loop.index ~ d.title }}{% endfor %}"
        "{{ messages | tojson(indent=2) }}{# content #}{{ tools is none }}"
        "{{ messages[0].thinking }}{{ unknown }}{{ pad_token }}"
    ),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Weather <now> & "später" in 東京',
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}},
                "required": ["town"],
            },
        },
    }
]
CALL = {"id": "abc123xyz", "type": "function", "function": {"name": "weather", "arguments": {"town": "Köln", "b": 1}}}
SYSTEM, USER = {"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi <you> & 'me'\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes? "}, USER],
    "called with content None": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "15", "tool_call_id": "abc123xyz", "name": "weather"},
    ],
    "called with no content": [USER, {"role": "assistant", "tool_calls": [CALL]}],
    "no call after all": [USER, {"role": "assistant", "content": "No.", "tool_calls": None}, USER],
    "reasoned": [USER, {"role": "assistant", "content": "So.", "reasoning": "why"}],
    "content missing": [USER, {"role": "assistant"}],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
    ],
    "odd role": [{"role": "developer", "content": "x"}, USER],
    "assistant first": [{"role": "assistant", "content": "Hello"}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no generation prompt": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "no tools": {"tools": []},
    "documents": {"documents": [{"title": "A", "text": "b"}]},
    "variables": {"enable_thinking": False, "date_string": "1 May", "custom_tools": TOOLS},
    "continued": {"continue_final_message": True, "add_generation_prompt": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("chat"), byte_level_bpe(), None)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOT, bos_token=BOS)


@pytest.mark.parametrize("family", TEMPLATES)
def test_every_family_reads_as_transformers_renders_it(family: str, theirs: Any) -> None:
    source = TEMPLATES[family]
    ours = ChatTemplate(source, {"bos_token": BOS, "eos_token": EOT})
    rendered = 0
    for name, messages in CONVERSATIONS.items():
        for kind, options in OPTIONS.items():
            options = {"add_generation_prompt": True, **options}
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, chat_template=source, **options)
            except Exception:
                with pytest.raises(InvalidRequest):
                    ours.render(messages, **options)
                continue
            assert ours.render(messages, **options) == expected, (name, kind)
            rendered += 1
    assert rendered >= 20


def test_content_that_is_none_or_missing_renders_as_nothing() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}{{ m.tool_calls is defined }}]{% endfor %}", {})
    messages = [{"role": "assistant", "content": None, "tool_calls": None}, {"role": "assistant"}]
    assert template.render(messages) == "[False][False]"


def test_messages_that_are_none_are_named() -> None:
    template = ChatTemplate("{{ messages }}", {})
    wrong: list[tuple[Any, str]] = [
        ([], "conversation is empty"),
        ([{"content": "x"}], r"message 1: got the keys \['content'\], expected an object with a role"),
        (["x"], "message 1: got str"),
        ([{"role": 3}], "message 1: got the keys"),
        ([{"role": "user", "content": object()}], "message 1, content: got object, expected JSON values"),
    ]
    for messages, message in wrong:
        with pytest.raises(InvalidRequest, match=message):
            template.render(messages)
    with pytest.raises(InvalidRequest, match="expected only one of them"):
        template.render([USER], continue_final_message=True)
    with pytest.raises(InvalidRequest, match="no text to go on with"):
        template.render([{"role": "assistant"}], False, continue_final_message=True)
    for source in ("{{ 1 // 0 }}", "{{ messages[5].role }}", "{{ [1] + 'a' }}", "{% set x = {}[1].y %}"):
        with pytest.raises(InvalidRequest, match="refuses these messages"):
            ChatTemplate(source, {}).render([USER])


def test_a_system_message_goes_where_the_template_takes_it() -> None:
    refuses, drops, takes = (
        ChatTemplate(TEMPLATES["gemma2"], {}),
        ChatTemplate("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", {}),
        ChatTemplate(TEMPLATES["smollm2"], {}),
    )
    assert (refuses.takes_system, drops.takes_system, takes.takes_system) == (False, False, True)
    assert drops.render(with_system_in_user([SYSTEM, USER])) == f"{SYSTEM['content']}\n\n{USER['content']}"
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    texts = [part["text"] for part in with_system_in_user([SYSTEM, parts])[0]["content"]]
    assert texts == [f"{SYSTEM['content']}\n\n", "a"]
    assert with_system_in_user([USER]) == [USER] and with_system_in_user([SYSTEM]) == [SYSTEM]


def test_templates_come_from_every_place_that_transformers_knows(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level_bpe(), None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert Tokenizer(tmp_path).apply_chat([USER]) == "processor"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    both = Tokenizer(tmp_path)
    assert (both.apply_chat([USER]), both.apply_chat([USER], tools=TOOLS)) == ("plain", "tools")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[1:]}))
    (tmp_path / "chat_template.json").unlink()
    assert not Tokenizer(tmp_path).has_chat_template
    with pytest.raises(CheckpointError, match=r"no chat template named default \(there are tool_use\)"):
        Tokenizer(tmp_path).apply_chat([USER])
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": BOS}}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    files = Tokenizer(tmp_path)
    assert (files.apply_chat([USER]), files.apply_chat([USER], tools=TOOLS)) == (BOS, "more")


def test_a_template_in_a_file_replaces_all_in_the_settings(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level_bpe(), None)
    settings = {"eos_token": EOT, "chat_template": {"default": "plain", "tool_use": "tools"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    both = Tokenizer(tmp_path)
    assert (both.apply_chat([USER]), both.apply_chat([USER], tools=TOOLS)) == ("plain", "tools")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer(tmp_path).apply_chat([USER], tools=TOOLS) == "file"


def test_tokens_of_the_models_own_are_variables_and_special(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, byte_level_bpe(), "{{ pad_token + image_token }}|{{ boi_token }}|{{ add_bos_token }}")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own = {
        "image_token": "<img>",
        "add_bos_token": False,
        "pad_token": "",
        "extra_special_tokens": {"boi_token": "<boi>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **own}))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert ours.apply_chat([USER]) == theirs.apply_chat_template([USER], tokenize=False) == "<img>|<boi>|"
    for token in ("<img>", "<boi>"):
        assert len(ours.encode(token)) == len(theirs(token)["input_ids"]) == 1


@pytest.mark.parametrize(
    "template", [5, [{"name": 5, "template": "x"}], [{"name": "default", "template": 5}], {"default": None}]
)
def test_a_template_that_is_no_text_is_refused(template: Any, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level_bpe(), None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match="expected a chat_template that is a text, or several by name, got"):
        Tokenizer(tmp_path).apply_chat([USER])


def test_a_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level_bpe(), None)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="chat_template.jinja cannot be read: expected UTF-8"):
        Tokenizer(tmp_path).apply_chat([USER])


def test_templates_that_become_wrong_python_do_not_compile() -> None:
    for source in ("{% break %}", "{% if a %}" * 200 + "{% endif %}" * 200, f"{{{{ {'(' * 500}1{')' * 500} }}}}"):
        with pytest.raises(CheckpointError, match="does not compile"):
            ChatTemplate(source, {})


def test_a_generation_block_is_a_scope_of_its_own() -> None:
    source = "{% generation %}{% set a = 'in' %}{{ a }}{% endgeneration %}{{ a }}"
    assert ChatTemplate(source, {}).render([USER]) == "in"


@pytest.mark.parametrize("calls", ["", "{{ m.tool_calls | tojson }}"])
@pytest.mark.parametrize("result", ["", "{{ m.content }}"])
def test_whether_a_template_shows_calls_and_results(calls: str, result: str) -> None:
    roles = f"{{% if m.tool_calls %}}{calls}{{% elif m.role == 'tool' %}}{result}{{% endif %}}"
    assert ChatTemplate(f"{{% for m in messages %}}{roles}{{% endfor %}}", {}).shows_calls() is bool(calls and result)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3", "mistral", "hermes"])
def test_templates_of_models_with_tools_show_calls(name: str) -> None:
    assert ChatTemplate(TEMPLATES[name], {"bos_token": BOS, "eos_token": EOT}).shows_calls()


@pytest.mark.parametrize("shows", [False, True])
def test_calls_without_tools_get_the_template_that_shows_them(tmp_path: Path, shows: bool) -> None:
    """Hermes 2 Pro's default template leaves calls out, and its other one goes through the tools."""
    loop = (
        "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    )
    named = [
        {"name": "default", "template": f"plain {loop if shows else '{{ messages[0].content }}'}"},
        {"name": "tool_use", "template": f"tools {{% for tool in tools %}}{{{{ tool }}}}{{% endfor %}}{loop}"},
    ]
    save_tokenizer(tmp_path, byte_level_bpe(), None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = Tokenizer(tmp_path)
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": {}}}
    called = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
    called += [{"role": "tool", "tool_call_id": "c1", "content": "12"}]
    assert tokenizer.shows_calls(None)
    text = tokenizer.apply_chat(iter(called))
    assert text.startswith("plain" if shows else "tools") and "now" in text and text.endswith("12")
    assert tokenizer.apply_chat(called[2:]).startswith("plain" if shows else "tools"), "a result alone"
    assert tokenizer.apply_chat([USER]).startswith("plain")
    assert tokenizer.apply_chat([USER, {"role": "assistant", "content": "", "tool_calls": []}]).startswith("plain")
    assert tokenizer.apply_chat(called, tools=TOOLS).startswith("tools")


def test_a_template_that_refuses_calls_says_why() -> None:
    template = ChatTemplate("{% if messages[1].tool_calls %}{{ raise_exception('no calls') }}{% endif %}", {})
    assert template.shows_calls()
