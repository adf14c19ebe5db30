"""Text to tokens and back, against the tokenizers library, Transformers, and brute force."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import BOS, CHAT_TEMPLATE, EOT, TEXTS, byte_level_bpe, save_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from outrider.errors import CheckpointError, InvalidRequest
from outrider.tokenization.tokenizer import Detokenizer, StopMatcher, Tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("plain"), byte_level_bpe()))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("bos"), byte_level_bpe(bos=True)))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary like Llama 2's: pieces with a marked leading space, and bytes where no piece fits."""
    pieces = ["<unk>", EOT, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁the", "é", "�"]
    tokenizer = FastTokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)}, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.add_special_tokens([AddedToken(EOT, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("fallback"), tokenizer))


# ------------------------------------------------------------------------------------------------ encode, decode


@given(st.text())
def test_any_text_survives_the_round_trip(plain: Tokenizer, text: str) -> None:
    assert plain.decode(plain.encode(text)) == text


@given(st.binary())
@example(b"caf\xe9 \xff\xfe ok")
@example(b"\x80")
def test_any_bytes_arrive_exactly(plain: Tokenizer, with_bos: Tokenizer, raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")  # what Python makes of arguments and standard input
    ids = plain.encode(text)
    assert b"".join(map(plain.token_bytes, ids)) == raw
    assert with_bos.encode(text) == [1, *ids]
    assert with_bos.encode(text, add_special_tokens=False) == ids


def test_other_lone_surrogates_become_the_replacement_character(plain: Tokenizer, byte_fallback: Tokenizer) -> None:
    assert plain.decode(plain.encode("a\ud800b")) == "a�b"
    assert byte_fallback.decode(byte_fallback.encode("a\udcffb")) == "a�b"


def test_special_tokens_are_added_by_the_files_own_post_processor(plain: Tokenizer, with_bos: Tokenizer) -> None:
    bare = plain.encode(TEXTS[0])
    assert with_bos.encode(TEXTS[0]) == [with_bos.encode(BOS, add_special_tokens=False)[0], *bare]
    assert with_bos.encode(TEXTS[0], add_special_tokens=False) == bare
    assert with_bos.decode(with_bos.encode("ok")) == "ok"
    assert with_bos.decode(with_bos.encode("ok"), skip_special_tokens=False) == BOS + "ok"


def test_ids_equal_those_of_transformers(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(tiny_model_dir), Tokenizer(tiny_model_dir)
    for text in [*TEXTS, "", " ", f"a{EOT}b"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": "Yes?"}]
    for generation in (True, False):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        assert ours.apply_chat(messages, add_generation_prompt=generation) == text


def test_special_tokens_are_split_where_the_files_say_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": True}))
    text = f"a{EOT}b"
    ours = Tokenizer(folder).encode(text)
    assert ours == AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != Tokenizer(tiny_model_dir).encode(text)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPTNeoXTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_an_explicit_prefix_space_counts_where_transformers_follows_it(
    byte_fallback: Tokenizer, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, byte_level_bpe())
    wanted = kind != "LlamaTokenizer"  # the other way round than tokenizer.json
    if not wanted:
        shutil.copyfile(byte_fallback.directory / "tokenizer.json", tmp_path / "tokenizer.json")
    before = Tokenizer(tmp_path).encode("the", add_special_tokens=False)
    file = tmp_path / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "tokenizer_class": kind, "add_prefix_space": wanted}
    file.write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    for text in ("the", " the", "the ab", ""):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("the", add_special_tokens=False) != before
    file.write_text(json.dumps({**settings, "add_prefix_space": None}))  # the class's default: tokenizer.json counts
    assert Tokenizer(tmp_path).encode("the", add_special_tokens=False) == before


def test_vocabulary_facts(plain: Tokenizer, with_bos: Tokenizer, byte_fallback: Tokenizer) -> None:
    assert plain.vocab_size == max(plain.vocabulary.values()) + 1 == len(plain.vocabulary)
    assert plain.eos_token_ids == (plain.vocabulary[EOT],)
    assert plain.special_ids == {plain.vocabulary[EOT], plain.vocabulary[BOS]}
    assert plain.same_as(plain) and plain.same_as(with_bos)
    assert not plain.same_as(byte_fallback)


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [1.5], [None], 5, None, "abc"])
def test_what_is_no_list_of_ids_is_refused(plain: Tokenizer, byte_fallback: Tokenizer, ids: Any) -> None:
    for tokenizer in (plain, byte_fallback):
        assert tokenizer.decode([tokenizer.vocab_size]) == ""  # heads may have more rows than there are tokens
        with pytest.raises(InvalidRequest, match="expected a list of token ids"):
            tokenizer.decode(ids)
        with pytest.raises(InvalidRequest, match="expected a list of token ids"):
            tokenizer.decode_after([], ids)


def test_vocabularies_that_differ_in_one_id_are_not_the_same(plain: Tokenizer, tmp_path: Path) -> None:
    other = byte_level_bpe()
    other.add_tokens(["extra"])
    assert not plain.same_as(Tokenizer(save_tokenizer(tmp_path, other)))


@pytest.mark.parametrize("where", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_only_the_files_beside_give_ids_to(where: str, tmp_path: Path) -> None:
    """Else a chat's marks would be read as plain text."""
    directory = save_tokenizer(tmp_path, byte_level_bpe())
    first = Tokenizer(directory).vocab_size
    added = ("<|im_start|>", "<|im_end|>")
    if where == "added_tokens.json":
        (directory / where).write_text(json.dumps({text: first + i for i, text in enumerate(added)}))
    else:
        decoder = {str(first + i): {"content": text, "special": True} for i, text in enumerate(added)}
        settings = json.loads((directory / where).read_text())
        (directory / where).write_text(json.dumps({**settings, "added_tokens_decoder": decoder}))
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [first, *tokenizer.encode("a"), first + 1]
    assert {first, first + 1} <= tokenizer.special_ids and tokenizer.vocab_size == first + 2
    (directory / "added_tokens.json").write_text(json.dumps({"<|new|>": first + 7}))
    with pytest.raises(CheckpointError, match=rf"'<\|new\|>' is to have the id {first + 7}"):
        Tokenizer(directory)


def test_special_tokens_named_without_an_id(tmp_path: Path) -> None:
    """As in Transformers: entries of the vocabulary keep their ids, others come after it, up to the model's rows;
    special_tokens_map.json counts more than an older tokenizer_config.json."""
    directory = save_tokenizer(tmp_path, byte_level_bpe())
    first, ordinary = Tokenizer(directory).vocab_size, Tokenizer(directory).vocabulary["the"]
    named = {"eos_token": "not this", "pad_token": "the", "extra_special_tokens": {"start": "<|start|>"}}
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, **named}))
    older = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|user|>"]}
    (directory / "special_tokens_map.json").write_text(json.dumps(older))
    (directory / "config.json").write_text(json.dumps({"text_config": {"vocab_size": first + 2}}))
    tokenizer = Tokenizer(directory)
    assert tokenizer.encode("<|im_end|><|user|>the") == [first, first + 1, ordinary]
    assert tokenizer.special_ids >= {first, first + 1, ordinary} and tokenizer.eos_token_ids == (first,)
    assert tokenizer.vocab_size == first + 2  # the model has no row for <|start|>
    settings |= {**named, "added_tokens_decoder": {}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer(directory).special_tokens["eos_token"] == "not this"


def test_training_settings_in_the_file_do_not_cut_prompts(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    ours = Tokenizer(save_tokenizer(tmp_path, tokenizer))
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]


def test_a_usual_directory_needs_no_transformers_and_no_torch(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level_bpe())
    code = (
        "import sys; from outrider.tokenization.tokenizer import Tokenizer; t = Tokenizer(sys.argv[1]); t.encode('hi');"
        "t.apply_chat([{'role': 'user', 'content': 'hi'}]);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_older_files_go_through_transformers(plain: Tokenizer, tmp_path: Path) -> None:
    source = json.loads((plain.directory / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(source["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in source["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": EOT, "bos_token": EOT, "unk_token": EOT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    found = Tokenizer(tmp_path)
    assert found.decode(found.encode(TEXTS[1])) == TEXTS[1]
    assert found.is_byte_level and found.eos_token_ids == plain.eos_token_ids


# ------------------------------------------------------------------------------------------------ bad files


def test_missing_and_broken_files_are_named(plain: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer: expected tokenizer.json"):
        Tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        Tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((plain.directory / "tokenizer.json").read_bytes())
    for broken in ("[1, 2]", "{", "\udcff"):
        (tmp_path / "tokenizer_config.json").write_bytes(broken.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match="tokenizer_config.json"):
            Tokenizer(tmp_path)


def test_a_tokenizer_that_transformers_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchTokenizer"}')
    with pytest.raises(CheckpointError, match="transformers cannot read"):
        Tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------ chat templates


def with_template(tmp_path: Path, template: object) -> Tokenizer:
    save_tokenizer(tmp_path, byte_level_bpe())
    config = {"eos_token": {"content": EOT}, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


USER = [{"role": "user", "content": "<b> & 'c'"}]


def test_content_that_spells_a_special_token_is_encoded_as_within_the_text(
    byte_fallback: Tokenizer, tmp_path: Path
) -> None:
    """No space of a text's beginning in the middle of a chat, and none behind a token that swallows white space."""
    fast = FastTokenizer.from_file(str(byte_fallback.directory / "tokenizer.json"))
    fast.add_special_tokens([AddedToken("<|user|>", special=True, rstrip=True)])
    messages = [{"role": "user", "content": f"a{EOT}b"}]
    for number, (template, before) in enumerate([(EOT, EOT), ("<|user|>\n ", "<|user|>"), ("", "")]):
        ours = Tokenizer(save_tokenizer(tmp_path / str(number), fast, template + "{{ messages[0].content }}"))
        ids = ours.encode_chat(messages)
        expected = ours.encode(template + "a", add_special_tokens=False)
        assert ids[: len(expected)] == expected
        assert ours.decode(ids, skip_special_tokens=False) == f"{before}a{EOT}b"


def test_chat_template_from_either_place(tmp_path: Path) -> None:
    named = with_template(
        tmp_path, [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    )
    assert named.apply_chat(USER) == f"<user><b> & 'c'{EOT}<assistant>"
    assert named.apply_chat(USER, add_generation_prompt=False) == f"<user><b> & 'c'{EOT}"
    assert named.encode_chat(USER) == named.encode(f"<user><b> & 'c'{EOT}<assistant>", add_special_tokens=False)
    (tmp_path / "chat_template.jinja").write_text("{% generation %}{{ messages | tojson }}{% endgeneration %}")
    assert Tokenizer(tmp_path).apply_chat(USER) == json.dumps(USER)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match="has no chat template"):
        tokenizer.apply_chat(USER)


def test_a_template_may_refuse_but_never_escape(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="user must speak first"):
        with_template(tmp_path, "{{ raise_exception('user must speak first') }}").apply_chat(USER)
    with pytest.raises(InvalidRequest, match="unsafe"):
        with_template(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}").apply_chat(USER)
    with pytest.raises(InvalidRequest, match="has no attribute 'content'"):
        with_template(tmp_path, CHAT_TEMPLATE).apply_chat([{"role": "user"}])
    with pytest.raises(CheckpointError, match="does not compile"):
        with_template(tmp_path, "{% if %}").apply_chat(USER)


# ------------------------------------------------------------------------------------------------ detokenizer


def pieces(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, 520), max_size=40))
def test_pieces_add_up_to_the_full_decoding(plain: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(plain.detokenizer(), ids)) == plain.decode(ids)


@given(st.text(alphabet="aé你🙂\ufffd \n", max_size=12))
def test_no_piece_splits_a_character(plain: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    for tokenizer in (plain, byte_fallback):
        ids = tokenizer.encode(text)
        parts = pieces(tokenizer.detokenizer(), ids)
        assert "".join(parts) == tokenizer.decode(ids)
        assert "".join(parts).count("\ufffd") == text.count("\ufffd")  # none that a cut made


def test_an_incomplete_character_waits_for_its_bytes(plain: Tokenizer, byte_fallback: Tokenizer) -> None:
    smile = "🙂".encode()
    spelt = {
        plain: [plain.encode(bytes([b]).decode("utf-8", "surrogateescape"))[0] for b in smile],
        byte_fallback: [byte_fallback.vocabulary[f"<0x{b:02X}>"] for b in smile],
    }
    for tokenizer, ids in spelt.items():
        assert pieces(tokenizer.detokenizer(), ids) == ["", "", "", "🙂", ""]
        assert "".join(pieces(tokenizer.detokenizer(), ids[:3])) == tokenizer.decode(ids[:3])


def test_special_tokens_do_not_show_and_do_not_interrupt(plain: Tokenizer, byte_fallback: Tokenizer) -> None:
    eot = plain.vocabulary[EOT]
    smile = plain.encode("🙂".encode()[:2].decode("utf-8", "surrogateescape")), plain.vocabulary[EOT]
    assert pieces(plain.detokenizer(), [eot, *smile[0], eot])[:-1] == [""] * 4
    words = [byte_fallback.vocabulary[t] for t in ("▁the", EOT, "▁a", "b")]
    assert pieces(byte_fallback.detokenizer(), words) == ["the", "", " a", "b", ""]


def test_bytes_that_never_become_a_character_are_released(byte_fallback: Tokenizer) -> None:
    ids = [byte_fallback.vocabulary["<0x80>"]] * 40
    parts = pieces(byte_fallback.detokenizer(), ids)
    assert "".join(parts) == "\ufffd" * 40
    assert any(parts[:-1])


def piecewise(tmp_path_factory: pytest.TempPathFactory, decoder: Any, marked: str) -> Tokenizer:
    """A vocabulary of whole pieces, ``marked`` before or after a word, with any decoder."""
    words = ["a", "b", "the", "n't", ".", "time", "é"]
    pieces = ["<unk>", EOT, *words, *(marked.replace("*", word) for word in words), marked.replace("*", "")]
    model = models.WordLevel(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    tokenizer = FastTokenizer(model)
    tokenizer.add_special_tokens([AddedToken(EOT, special=True)])
    if decoder is not None:
        tokenizer.decoder = decoder
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("piecewise"), tokenizer))


DECODERS = {
    "strip": (
        lambda: decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        "▁*",
    ),
    "strip two": (
        lambda: decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        "▁*",
    ),
    "metaspace": (lambda: decoders.Metaspace(prepend_scheme="always"), "▁*"),
    "metaspace, first kept": (lambda: decoders.Metaspace(prepend_scheme="never"), "▁*"),
    "wordpiece": (lambda: decoders.WordPiece(prefix="##", cleanup=True), "##*"),
    "suffix": (lambda: decoders.BPEDecoder(suffix="</w>"), "*</w>"),
    "none": (lambda: None, "▁*"),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_output_is_the_whole_text_without_the_prompt(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    make, marked = DECODERS[kind]
    tokenizer = piecewise(tmp_path_factory, make(), marked)
    draw = random.Random(kind)
    for _ in range(300):
        prompt, output = ([draw.randrange(1, tokenizer.vocab_size) for _ in range(draw.randint(0, 25))] for _ in "po")
        expected = tokenizer.decode(prompt + output)[len(tokenizer.decode(prompt)) :]
        assert "".join(pieces(Detokenizer(tokenizer, prompt), output)) == expected, (prompt, output)
        assert tokenizer.decode_after(prompt, output) == expected


@given(st.text(alphabet="a b你🙂é", max_size=30), st.text(alphabet="a b你🙂é", max_size=12))
def test_output_after_a_prompt_with_byte_fallback(byte_fallback: Tokenizer, prompt: str, output: str) -> None:
    before, after = byte_fallback.encode(prompt), byte_fallback.encode(output)
    expected = byte_fallback.decode(before + after)[len(byte_fallback.decode(before)) :]
    assert "".join(pieces(Detokenizer(byte_fallback, before), after)) == expected


def test_the_first_tokens_leading_space_is_text_and_stop_strings_see_it(byte_fallback: Tokenizer) -> None:
    prompt, output = [[byte_fallback.vocabulary[t] for t in ts] for ts in (("▁the",), ("▁a", "b"))]
    assert pieces(Detokenizer(byte_fallback, prompt), output) == [" a", "b", ""]
    assert pieces(Detokenizer(byte_fallback, [byte_fallback.vocabulary[EOT]]), output) == ["a", "b", ""]
    matcher = StopMatcher([" a"])
    matcher.push(Detokenizer(byte_fallback, prompt).push(output[0]))
    assert matcher.matched == " a"


def test_a_character_that_begins_in_the_prompt_is_output(plain: Tokenizer, byte_fallback: Tokenizer) -> None:
    raw = "a🙂".encode()
    spelt = {
        plain: [plain.encode(bytes([b]).decode("utf-8", "surrogateescape"))[0] for b in raw],
        byte_fallback: [byte_fallback.vocabulary[f"<0x{b:02X}>"] for b in raw],
    }
    for tokenizer, ids in spelt.items():
        letter = tokenizer.vocabulary["a"]
        for cut in (2, 3, 4):
            assert "".join(pieces(Detokenizer(tokenizer, ids[:cut]), [*ids[cut:], letter])) == "🙂a"
            unfinished = pieces(Detokenizer(tokenizer, ids[:cut]), [letter])  # the prompt shows the U+FFFD
            assert "".join(unfinished) == "a"
            assert "".join(pieces(Detokenizer(tokenizer, ids[:cut]), [])) == ""


def test_generated_text_continues_the_prompt(tiny_model_dir: Path, tmp_path: Path) -> None:
    from outrider.config import SamplingParams
    from outrider.engine.llm import LLM

    shutil.copytree(tiny_model_dir, tmp_path / "model")
    words = FastTokenizer(models.WordLevel({"<unk>": 0} | {f"▁w{i}": i for i in range(1, 512)}, unk_token="<unk>"))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    llm = LLM(save_tokenizer(tmp_path / "model", words), "suffix", backend="reference", dtype="float32")
    prompt = [5, 6, 7]
    [output] = llm.generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True))
    whole = llm.tokenizer.decode(prompt + output.token_ids)
    assert output.text == whole.removeprefix("w5 w6 w7") and output.text.startswith(" w")
    first = output.text.split()[0]
    [stopped] = llm.generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True, stop=(f" {first}",)))
    assert (stopped.text, stopped.finish_reason) == ("", "stop")


def test_a_tokens_time_does_not_grow_with_the_text(byte_fallback: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        lengths.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    word, byte = byte_fallback.vocabulary["▁the"], byte_fallback.vocabulary["<0x41>"]
    detokenizer = Detokenizer(byte_fallback, [word] * 1000)
    text = "".join(detokenizer.push(token) for token in [word, byte, byte] * 300)
    assert text == " theAA" * 300 and max(lengths) <= 20 and len(lengths) <= 2 * 900 + 1


# ------------------------------------------------------------------------------------------------ stop strings


def oracle(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Read character by character; the first stop string to be complete ends the text, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text(alphabet="ab", max_size=24), st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_where_brute_force_cuts(text: str, stop: list[str]) -> None:
    kept, matched = oracle(text, stop)
    cuts = random.Random(text)
    matcher, released, position = StopMatcher(stop), "", 0
    while position < len(text):
        step = cuts.randint(1, 4)
        released += matcher.push(text[position : position + step])
        position = min(len(text), position + step)
        if matcher.matched is None:
            seen = text[:position]
            waiting = [
                n for n in range(len(seen) + 1) if any(len(s) > n and s.startswith(seen[len(seen) - n :]) for s in stop)
            ]
            assert len(seen) - len(released) == max(waiting, default=0)  # all that is safe, and nothing more
        assert kept.startswith(released)
    assert released + matcher.flush() == kept
    assert matcher.matched == matched


def test_stop_matcher_edges() -> None:
    matcher = StopMatcher(["\n\n", "END"])
    assert [matcher.push(t) for t in ("one\n", "two E", "N", "D of story", "more")] == ["one", "\ntwo ", "", "", ""]
    assert matcher.matched == "END" and matcher.flush() == ""
    free = StopMatcher([])
    assert free.push("anything") == "anything" and free.flush() == "" and free.matched is None
    with pytest.raises(InvalidRequest, match="must not be empty"):
        StopMatcher(["a", ""])
