"""Text to tokens and back: prompts of any bytes, chat templates, streamed text that never ends within a character.

``tokenizer.json`` is read by the ``tokenizers`` library and the chat template by sandboxed Jinja, so most model
directories load without ``transformers``; other tokenizer files are converted by ``AutoTokenizer``. No code of the
model directory is run.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel

from outrider.errors import CheckpointError, InvalidRequest
from outrider.tokenization.chat_template import ChatTemplate, Message, has_calls
from outrider.tokenization.literal_content import mark_special_tokens, split_at_marks
from outrider.tokenization.tokenizer_files import load_fast, named_tokens, read_settings, read_templates

__all__ = ["Detokenizer", "StopMatcher", "Tokenizer"]

_REPLACEMENT = "\ufffd"
_IDS = 1 << 32  # what the library can look up
_LONGEST_WAIT = 8  # tokens; a character has at most 4 bytes, so what is still broken then stays broken
_CONTEXT = 8  # tokens before an open one that are decoded with it
_SURROGATES = re.compile(r"[\ud800-\udfff]+")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: the character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


class Tokenizer:
    """The tokenizer of one model directory. Raises CheckpointError where it has none, or one that cannot be read."""

    def __init__(
        self,
        directory: str | Path,
        fast: FastTokenizer | None = None,
        settings: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """``fast`` and ``settings`` (as in tokenizer_config.json) replace the directory's: a GGUF file has its own.

        ``notes``: what a user should be told about this tokenizer.
        """
        self.directory = Path(directory)
        self.notes = tuple(notes)
        self._settings = read_settings(self.directory / "tokenizer_config.json") if settings is None else dict(settings)
        self._fast = fast or load_fast(self.directory, self._settings)
        self._fast.no_truncation()  # a file may hold settings that were used in training
        self._fast.no_padding()
        self._fast.encode_special_tokens = bool(self._settings.get("split_special_tokens"))  # texts spell them only
        self._templates: dict[str, ChatTemplate] = {}
        self._token_bytes: dict[int, bytes] = {}
        self.whole_texts: dict[int, str] = {}
        """Text of the tokens met so far that are whole characters, whatever comes before them."""

    # ------------------------------------------------------------------------------------------ text and tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of any text.

        Bytes that were not UTF-8 arrive as surrogates U+DC80 to U+DCFF (Python's ``surrogateescape``): a byte-level
        vocabulary gets exactly those bytes, any other one U+FFFD. Other lone surrogates become U+FFFD everywhere.
        """
        if not _SURROGATES.search(text):
            return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
        if not self._byte_ids:
            return self.encode(_SURROGATES.sub(lambda m: _REPLACEMENT * len(m[0]), text), add_special_tokens)
        ids: list[int] = []
        start = 0
        for match in _SURROGATES.finditer(text):
            ids += self._fast.encode(text[start : match.start()], add_special_tokens=False).ids
            for char in match[0]:
                escaped = "\udc80" <= char <= "\udcff"
                ids += [self._byte_ids[b] for b in (bytes([ord(char) - 0xDC00]) if escaped else _REPLACEMENT.encode())]
            start = match.end()
        ids += self._fast.encode(text[start:], add_special_tokens=False).ids
        prefix, suffix = self._frame if add_special_tokens else ([], [])
        return [*prefix, *ids, *suffix]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete characters read U+FFFD, and an id that is no token's has no text.

        Raises InvalidRequest for what is no list of token ids."""
        return str(self._fast.decode(_token_ids(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, prompt_tail: Sequence[int] = ()) -> Detokenizer:
        """A fresh incremental decoder of what follows the prompt."""
        return Detokenizer(self, prompt_tail)

    def decode_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text of token ids that follow a prompt, its leading space included. Raises InvalidRequest as ``decode``."""
        detokenizer = self.detokenizer(_token_ids(prompt))
        return "".join(map(detokenizer.push, _token_ids(ids))) + detokenizer.flush()

    # ------------------------------------------------------------------------------------------ vocabulary

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every entry, added tokens included."""
        return dict(self._fast.get_vocab(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """All ids are below this. A model's head may have more rows (padding), never fewer."""
        return max(self.vocabulary.values(), default=-1) + 1

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are left out of text."""
        return frozenset(i for i, token in self._fast.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Name -> text of ``bos_token``, ``eos_token`` and the like, from the directory's settings."""
        return named_tokens(self.directory, self._settings)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end-of-text token; a model's generation settings may name more."""
        token = self._fast.token_to_id(self.special_tokens.get("eos_token", ""))
        return () if token is None else (token,)

    @property
    def definition(self) -> str:
        """The tokenizer as JSON, in the ``tokenizers`` library's form."""
        return str(self._fast.to_str())

    def same_as(self, other: Tokenizer) -> bool:
        """Whether every token has the same id in both, so that one model can verify ids that the other drafted."""
        return self is other or self.vocabulary == other.vocabulary

    # ------------------------------------------------------------------------------------------ chat

    @property
    def has_chat_template(self) -> bool:
        return "default" in self._template_sources

    @property
    def takes_system(self) -> bool:
        """Whether a system message reaches the text; else ``with_system_in_user`` puts it where it does."""
        return self._chat_template().takes_system

    def shows_calls(self, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        """See ``ChatTemplate.shows_calls``; of the template that conversations with calls get."""
        tools = self._tools_beside_calls(tools)
        return self._template_for(tools).shows_calls(tools)

    def chat_template_text(self, tools: bool = False) -> str:
        """The template itself, of conversations with or without tools; empty where there is none."""
        sources = self._template_sources
        return sources.get("tool_use" if tools and "tool_use" in sources else "default", "")

    def apply_chat(self, messages: Iterable[Message], add_generation_prompt: bool = True, **options: Any) -> str:
        """The conversation in the form that the model was trained on; encode it with ``add_special_tokens=False``.

        ``options``: see ``ChatTemplate.render``. A model with several templates uses ``tool_use`` where there are
        tools, and for calls that its other one leaves out. Raises InvalidRequest for messages that the template
        refuses, CheckpointError where there is no template.
        """
        conversation = list(messages)
        if has_calls(conversation):
            options["tools"] = self._tools_beside_calls(options.get("tools"))
        return self._template_for(options.get("tools")).render(conversation, add_generation_prompt, **options)

    def encode_chat(self, messages: Iterable[Message], add_generation_prompt: bool = True, **options: Any) -> list[int]:
        """Token ids of the conversation. Special tokens are those that the template writes: where a message's content
        spells one, it stays text, so that nobody can end or begin a turn from inside a message."""
        given = [m.model_dump() if hasattr(m, "model_dump") else m for m in messages]  # as OpenAI's client returns them
        (marked, values), marks = mark_special_tokens((given, options), self._special_texts)
        text = self.apply_chat(marked, add_generation_prompt, **values)
        if not marks:
            return self.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for part, literal in split_at_marks(text, marks, self._special_texts):
            ids += self.encode_literally(part, ids) if literal else self.encode(part, add_special_tokens=False)
        return ids

    def encode_literally(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """Token ids of a text in which special tokens are spelt like anything else; nothing is put around it.

        ``before``: ids that it follows; the first space of a whole text, which some vocabularies add, is not put there.
        """
        if before:
            last = self._fast.get_added_tokens_decoder().get(before[-1])
            text = text.lstrip() if last is not None and last.rstrip else text
        elif not any(special in text for special in self._special_texts):
            return self.encode(text, add_special_tokens=False)
        fast = self._literal_within if before else self._literal
        return list(fast.encode(_SURROGATES.sub(_REPLACEMENT, text), add_special_tokens=False).ids)

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        """Special tokens as they are written, the longest first."""
        found = [str(token.content) for token in self._fast.get_added_tokens_decoder().values() if token.special]
        return tuple(sorted(filter(None, found), key=len, reverse=True))

    @cached_property
    def _literal(self) -> FastTokenizer:
        """A copy that does not look for special tokens."""
        copy = FastTokenizer.from_str(self.definition)
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _literal_within(self) -> FastTokenizer:
        """The same for text that is not the first: ``first`` is the scheme that adds a space to a whole text only."""
        copy = FastTokenizer.from_str(self.definition.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"'))
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def _template_sources(self) -> dict[str, str]:
        return read_templates(self.directory, self._settings)

    @cached_property
    def _calls_need_tool_use(self) -> bool:
        """Whether the ``tool_use`` template alone shows calls."""
        return "tool_use" in self._template_sources and not self._chat_template().shows_calls()

    def _tools_beside_calls(self, tools: Any) -> Any:
        """The tools of a conversation with calls: no tools, instead of None, where ``tool_use`` alone shows calls."""
        return [] if tools is None and self._calls_need_tool_use else tools

    def _template_for(self, tools: Any) -> ChatTemplate:
        return self._chat_template("default" if tools is None else "tool_use")

    def _chat_template(self, name: str = "default") -> ChatTemplate:
        sources = self._template_sources
        name = name if name in sources else "default"
        if name not in sources:
            named = f" named default (there are {', '.join(sorted(sources))})" if sources else ""
            expected = "chat_template.jinja, or chat_template in tokenizer_config.json"
            if self.directory.is_file():
                expected = "the key tokenizer.chat_template"
            raise CheckpointError(
                f"{self.directory} has no chat template{named}: expected {expected}; "
                "give the model a plain prompt instead"
            )
        if name not in self._templates:
            try:
                self._templates[name] = ChatTemplate(sources[name], self.special_tokens)
            except CheckpointError as error:
                raise CheckpointError(f"{self.directory}: {error}; give the model a plain prompt instead") from None
        return self._templates[name]

    # ------------------------------------------------------------------------------------------ byte level

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether the text is the tokens' bytes, one after another."""
        return isinstance(self._fast.decoder, ByteLevel)

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Byte -> the token of that byte alone; empty where the vocabulary does not have all of them."""
        if not self.is_byte_level:
            return {}
        ids = {byte: self.vocabulary[char] for char, byte in _ALPHABET.items() if char in self.vocabulary}
        return ids if len(ids) == len(_ALPHABET) else {}

    @cached_property
    def byte_tokens(self) -> Mapping[int, int]:
        """Token id -> byte of the tokens ``<0x00>`` to ``<0xFF>``, where the decoder reads them as bytes."""
        ids = {byte: self._fast.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        letter = ids[ord("A")]
        if letter is None or self.decode([letter]) != "A":
            return {}
        return {token: byte for byte, token in ids.items() if token is not None}

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the file's post-processor puts before and after a text."""
        bare = self._fast.encode("a", add_special_tokens=False).ids
        framed = self._fast.encode("a").ids
        starts = range(len(framed) - len(bare) + 1)
        at = next((i for i in starts if framed[i : i + len(bare)] == bare), 0)
        return framed[:at], framed[at + len(bare) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level vocabulary; none for an id that is not in it."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._bytes_of(token_id)
        return known

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([_ALPHABET[char] for char in token])
        except KeyError:  # an added token, written as it is
            return token.encode()


class Detokenizer:
    """Text of a growing output: what ``push`` returns is final and never ends within a character.

    The pieces and ``flush`` add up to the decoding of prompt and output together, without the decoding of the prompt:
    decoders of the SentencePiece kind drop the space before the first token they see, which is the output's first
    token only where there is no prompt. ``prompt_tail``: the prompt's last token ids, or all of them.

    Special tokens are skipped. A character that begins in the prompt and ends in the output is output text. A byte
    that belongs to no character reads U+FFFD; byte-fallback decoders replace the valid characters beside it too, which
    were released before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._byte_of = tokenizer.byte_tokens
        tail = list(islice((token for token in reversed(prompt_tail) if token not in self._special), _CONTEXT))[::-1]
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.is_byte_level else None
        self._pending: list[int] = []  # byte tokens that do not form a character yet
        self._unshown = (
            0  # U+FFFD at the end of the prompt's decoding: not shown again unless a character replaces them
        )
        if self._utf8 is not None:
            self._utf8.decode(b"".join(map(tokenizer.token_bytes, tail)))
            self._unshown = int(bool(self._utf8.getstate()[0]))
        else:
            at = self._incomplete_end(tail)
            tail, self._pending = tail[:at], tail[at:]
            self._unshown = len(self._pending)
        self._whole = self._utf8 is not None and not self._unshown  # no incomplete character waits
        self._context = tail  # tokens whose text is known, at most 2 * _CONTEXT
        self._open: list[int] = []  # tokens whose text is not certain yet
        self._context_text = self._decode(tail)

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        if self._whole:
            known = self._tokenizer.whole_texts.get(token_id)
            if known is not None:
                return known
        if token_id in self._special:
            return ""
        if self._utf8 is not None:
            return self._push_bytes(self._utf8, token_id)
        if token_id in self._byte_of:
            self._pending.append(token_id)
            return self._show(self._release_bytes(final=False))
        return self._show(self._release_bytes(final=True) + self._release(token_id))

    def flush(self) -> str:
        """What is still held back, once the sequence has ended; an incomplete character reads U+FFFD."""
        if self._utf8 is not None:
            return self._show(self._utf8.decode(b"", final=True))
        return self._show(self._release_bytes(final=True) + self._release_open())

    # ------------------------------------------------------------------------------------------ byte level

    def _push_bytes(self, utf8: codecs.IncrementalDecoder, token_id: int) -> str:
        whole = self._whole
        text = self._show(utf8.decode(self._tokenizer.token_bytes(token_id)))
        self._whole = not (utf8.getstate()[0] or self._unshown)
        if whole and self._whole:
            self._tokenizer.whole_texts[token_id] = text
        return text

    # ------------------------------------------------------------------------------------------ byte tokens

    def _incomplete_end(self, tokens: list[int]) -> int:
        """Where an incomplete character of byte tokens at the end of ``tokens`` begins; their number if none does."""
        for at in range(max(0, len(tokens) - 3), len(tokens)):
            if all(token in self._byte_of for token in tokens[at:]) and _utf8_state(self._bytes(tokens[at:])) == 0:
                return at
        return len(tokens)

    def _release_bytes(self, final: bool) -> str:
        """Text of the pending byte tokens: characters that are complete, U+FFFD for bytes that cannot form one."""
        text = ""
        while self._pending:
            wrong = _utf8_state(self._bytes(self._pending))
            if wrong == 0 and not final:
                break
            count = len(self._pending) if wrong <= 0 else wrong
            done, self._pending = self._pending[:count], self._pending[count:]
            if wrong >= 0:
                text += self._release_open() + _REPLACEMENT * count
            elif self._context or self._open:
                text += self._release_open() + self._bytes(done).decode()
            else:  # the first text of all: the decoder may strip it
                text += self._decode(done)
            self._advance(done)
        return text

    def _bytes(self, tokens: Iterable[int]) -> bytes:
        return bytes(self._byte_of[token] for token in tokens)

    # ------------------------------------------------------------------------------------------ other tokens

    def _release(self, token_id: int) -> str:
        """Text of the open tokens and this one, after those before: a leading space depends on what precedes it."""
        self._open.append(token_id)
        return self._release_open(final=False)

    def _release_open(self, final: bool = True) -> str:
        """Text of the open tokens; nothing, unless it is final, while it ends in an incomplete character."""
        if not self._open:
            return ""
        text, before = self._decode(self._context + self._open), self._context_text
        if not text.startswith(before):  # an incomplete character was completed
            before = before.rstrip(_REPLACEMENT)
        new = text[len(before) :]
        if not final and (not new or (new.endswith(_REPLACEMENT) and len(self._open) < _LONGEST_WAIT)):
            return ""
        done, self._open = self._open, []
        self._advance(done)
        return new

    def _advance(self, tokens: list[int]) -> None:
        """Count tokens among those whose text is known, and forget the oldest ones."""
        self._context = self._context + tokens
        if len(self._context) > 2 * _CONTEXT:
            self._context = self._context[-_CONTEXT:]
        self._context_text = self._decode(self._context)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _show(self, text: str) -> str:
        """``text`` without the replacement characters that the prompt's decoding already ends with."""
        while self._unshown and text:
            if not text.startswith(_REPLACEMENT):
                self._unshown = 0
            else:
                text, self._unshown = text[1:], self._unshown - 1
        return text


def _token_ids(given: Iterable[int]) -> list[int]:
    """Ids as Python's integers. Raises InvalidRequest for anything else."""
    try:
        ids = [index(value) for value in given]
    except TypeError:
        ids = [-1]
    if ids and not 0 <= min(ids) <= max(ids) < _IDS:
        raise InvalidRequest(f"expected a list of token ids (whole numbers of at least 0), got {str(given)[:60]!r}")
    return ids


def _utf8_state(raw: bytes) -> int:
    """-1 for whole characters, 0 for the beginning of one, else the number of leading bytes that belong to none."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return 0 if error.reason == "unexpected end of data" and error.start == 0 else error.end
    return -1


class StopMatcher:
    """Lets text through until a stop string appears, and never a part of that string.

    The stop string that is complete first ends the text (the longest, if several are complete at one character), so
    the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise InvalidRequest("stop strings must not be empty")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string. Nothing comes after a match."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            released, self._held = self._held[:at], ""
            return released
        length = min(len(self._held), self._longest - 1)
        while length and not self._may_begin(self._held[-length:]):
            length -= 1
        cut = len(self._held) - length
        released, self._held = self._held[:cut], self._held[cut:]
        return released

    def flush(self) -> str:
        """What is still held back, once the sequence has ended without a match."""
        released, self._held = self._held, ""
        return released

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)
