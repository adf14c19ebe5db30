"""A model directory's tokenizer files, as a tokenizer of the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from outrider.errors import CheckpointError, reading_config

__all__ = ["load_fast", "named_tokens", "read_settings", "read_templates"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
# Classes of Transformers that build a text's first space from `add_prefix_space`, whatever tokenizer.json says.
_OWN_PREFIX = tuple(f"{name}Tokenizer" for name in ("CodeLlama", "Cohere", "GPT2", "GPTNeoX", "Llama", "Qwen2"))
_ADDED_OPTIONS = ("lstrip", "normalized", "rstrip", "single_word")


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise CheckpointError(f"{path} cannot be read: expected JSON, got {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def load_fast(directory: Path, settings: Mapping[str, Any]) -> FastTokenizer:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: expected a model directory with its tokenizer.json")
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            found = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a broken file
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}; copy it again") from None
        _set_prefix_space(found, directory, settings)
        _add_tokens(found, directory, settings)
        return found
    known = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
    if not any((directory / name).is_file() for name in known):
        raise CheckpointError(
            f"{directory} has no tokenizer: expected tokenizer.json (or one of {', '.join(known)}); "
            "copy it from the model's source"
        )
    return _convert(directory)


def _set_prefix_space(fast: FastTokenizer, directory: Path, settings: Mapping[str, Any]) -> None:
    """Follow an ``add_prefix_space`` that contradicts tokenizer.json, if Transformers does. Raises CheckpointError."""
    wanted = settings.get("add_prefix_space")
    if not isinstance(wanted, bool) or str(settings.get("tokenizer_class")).removesuffix("Fast") not in _OWN_PREFIX:
        return
    text = fast.normalizer.normalize_str("x") if fast.normalizer else "x"
    if fast.pre_tokenizer:
        text = "".join(piece for piece, _ in fast.pre_tokenizer.pre_tokenize_str(text))
    if text.startswith(("\u0120", "\u2581")) != wanted:  # a space in byte-level and in SentencePiece vocabularies
        theirs = _convert(directory)  # the model's type counts too
        fast.normalizer, fast.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
        fast.decoder = theirs.decoder


def _add_tokens(fast: FastTokenizer, directory: Path, settings: Mapping[str, Any]) -> None:
    """Tokens that only the files beside tokenizer.json give ids to, as chats' special tokens at times. ``settings``:
    tokenizer_config.json. Raises CheckpointError."""
    with reading_config(f"{directory}: added_tokens.json, or tokenizer_config.json,"):
        declared = read_settings(directory / "added_tokens.json")
        given: dict[int, Any] = {number: {"content": text} for text, number in declared.items()}
        decoder = settings.get("added_tokens_decoder") or {}
        given |= {int(number): token for number, token in decoder.items()}
        there = {token.content for token in fast.get_added_tokens_decoder().values()}
        for number, token in sorted(given.items()):
            if token["content"] in there:
                continue
            options = {name: bool(token[name]) for name in _ADDED_OPTIONS if name in token}
            added = AddedToken(token["content"], special=bool(token.get("special", True)), **options)
            fast.add_special_tokens([added]) if added.special else fast.add_tokens([added])
            if fast.token_to_id(added.content) != number:
                raise CheckpointError(
                    f"{directory}: {added.content!r} is to have the id {number}, but tokenizer.json leaves it "
                    f"{fast.token_to_id(added.content)}; copy the tokenizer's files again, they do not belong together"
                )
        _add_named(fast, directory, settings)


def _add_named(fast: FastTokenizer, directory: Path, settings: Mapping[str, Any]) -> None:
    """Special tokens that are named without an id: entries of the vocabulary as they are, others after all entries, as
    far as the model has rows for them."""
    named = _with_older(directory, settings)
    values = [named.get(name) for name in _SPECIAL_NAMES]
    for name in _MORE_SPECIAL:
        more = named.get(name) or []
        values += more.values() if isinstance(more, Mapping) else more
    values += named_tokens(directory, settings).values()
    there = {token.content for token in fast.get_added_tokens_decoder().values()}
    texts = [text for text in dict.fromkeys(map(_text_of, values)) if text and text not in there]
    if texts:
        model = read_settings(directory / "config.json")
        rows = {**model, **(model.get("text_config") or {})}.get("vocab_size")
        for text in texts:
            if fast.token_to_id(text) is not None or rows is None or fast.get_vocab_size() < rows:
                fast.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def named_tokens(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> text of special tokens: ``bos_token`` and the like first, then the model's own, such as ``image_token``.
    ``settings``: tokenizer_config.json."""
    named = _with_older(directory, settings)
    own = {name: value for name, value in named.items() if name.endswith("_token")}
    if isinstance(more := named.get("extra_special_tokens"), Mapping):
        own |= more
    return {name: text for name in (*_SPECIAL_NAMES, *own) if (text := _text_of(own.get(name))) is not None}


def read_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; ``default`` is the one of most conversations. Where it has a file of its own, templates
    in the settings (tokenizer_config.json) do not count. Raises CheckpointError."""
    files = {"default": directory / "chat_template.jinja"}
    files |= {file.stem: file for file in (directory / "additional_chat_templates").glob("*.jinja")}
    found = {}
    for name, file in files.items():
        if file.is_file():
            try:
                found[name] = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{file} cannot be read: expected UTF-8, got {error}; copy it again") from None
    if "default" in found:
        return found
    given = settings.get("chat_template")
    if given is None:  # a processor's
        given = read_settings(directory / "chat_template.json").get("chat_template", {})
    if isinstance(given, str):
        named: Any = {"default": given}
    elif isinstance(given, list):
        named = {t.get("name"): t.get("template") for t in given if isinstance(t, Mapping)}
    else:
        named = given
    if not isinstance(named, Mapping) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError(
            f"{directory}: expected a chat_template that is a text, or several by name, got {str(given)[:60]!r}; "
            "copy tokenizer_config.json again"
        )
    return {**named, **found}


def _with_older(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json; where it is of the older kind, what special_tokens_map.json says counts more."""
    older = {} if "added_tokens_decoder" in settings else read_settings(directory / "special_tokens_map.json")
    return {**settings, **older}


def _text_of(token: Any) -> str | None:
    """The text of a special token, which is written as such or as an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _convert(directory: Path) -> FastTokenizer:
    """The directory's tokenizer as ``transformers`` makes it, from older files too. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever a model's own files make it raise
        raise CheckpointError(f"{directory}: transformers cannot read its tokenizer: {error}") from None
    fast = getattr(found, "backend_tokenizer", None)
    if not isinstance(fast, FastTokenizer):
        raise CheckpointError(
            f"{directory} has a {type(found).__name__}, which cannot be converted; expected a tokenizer.json"
        )
    return fast
