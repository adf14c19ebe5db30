"""The tokenizer of a GGUF file from the file's metadata, with the ids that llama.cpp gives.

Two kinds of vocabulary are read: ``gpt2`` (byte-level byte-pair encoding: tokens, merges, and a pre-tokenizer by name)
and ``llama`` (SentencePiece's byte-pair encoding: tokens with scores, bytes for unknown characters). Other kinds and
unknown pre-tokenizers are refused by name: a guess would give wrong tokens and no error.

Source: ``src/llama-vocab.cpp`` of llama.cpp. ``transformers`` is not used: it ignores ``tokenizer.ggml.pre``.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import AddedToken, NormalizedString, PreTokenizedString, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as InTurn
from tokenizers.processors import TemplateProcessing

from outrider.errors import CheckpointError, nearest
from outrider.tokenization.pre_tokenizers import PRE_TOKENIZERS

__all__ = ["GGUFTokenizer", "end_of_generation", "read_gguf_tokenizer"]

_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"  # SentencePiece writes a space so
_Pair = tuple[str, str]  # what merges into one token
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types; 1 is normal, 5 unused, 6 a byte
_NAMED_IDS = {
    "bos": ("bos_token_id",),
    "eos": ("eos_token_id",),
    "eot": ("eot_token_id",),
    "eom": ("eom_token_id",),
    "unk": ("unknown_token_id",),
    "sep": ("seperator_token_id", "separator_token_id"),  # the format's own spelling, and the usual one
    "pad": ("padding_token_id",),
    "mask": ("mask_token_id",),
    "fim_pad": ("fim_pad_token_id",),
    "fim_rep": ("fim_rep_token_id",),
    "fim_sep": ("fim_sep_token_id",),
    "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
    "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
    "fim_mid": ("fim_mid_token_id", "middle_token_id"),
}
# Tokens known by their text, where the file does not name their ids. They count as control tokens.
_END_OF_TURN = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>"),
    *("[EOT]", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>"),
)
_BY_TEXT = {
    "eot": _END_OF_TURN,
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>", "\u2581<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>", "\u2581<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>", "\u2581<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_END_OF_GENERATION = (  # they end an answer, whatever ids a file names
    *_END_OF_TURN,
    *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "</s>", "<|eom_id|>", "[EOS]", "<eos>", "<turn|>"),
    *("<|tool_response>", "[e~["),
)
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # of gpt-oss: they carry structure


@dataclass(frozen=True)
class GGUFTokenizer:
    """What a GGUF file says about text: two tokenizers that share one vocabulary, special ids, chat template."""

    kind: str
    """``gpt2`` or ``llama``."""
    pre: str | None
    """Name of the pre-tokenizer in use; none for the kind ``llama``."""
    parsing: Tokenizer
    """Special tokens written in the text become tokens (llama.cpp's ``parse_special``): for text of a chat template."""
    plain: Tokenizer
    """Control tokens written in the text stay text; only user-defined tokens are looked for."""
    ids: Mapping[str, int]
    """Special ids by short name: ``bos``, ``eos``, ``eot``, ``eom``, ``unk``, ``sep``, ``pad``, ``mask``, ``fim_*``."""
    eog_ids: frozenset[int]
    """A model's answer ends at any of these."""
    special_ids: frozenset[int]
    """Control and unknown tokens: they never show in text."""
    add_bos: bool
    """Whether ``encode`` puts the bos token first."""
    add_eos: bool
    """Whether ``encode`` puts the eos token last."""
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """Texts of the special tokens by the names that chat templates use, ``bos_token`` and the like."""
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    """Further templates by name, ``tool_use`` for example."""
    notes: tuple[str, ...] = ()
    """What a user should be told about this tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids, equal to llama.cpp's for the same two switches."""
        tokenizer = self.parsing if parse_special else self.plain
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete characters read U+FFFD."""
        return str(self.parsing.decode(list(ids), skip_special_tokens=skip_special_tokens))


def read_gguf_tokenizer(metadata: Mapping[str, Any], pre: str | None = None) -> GGUFTokenizer:
    """Build the tokenizer from the metadata of a GGUF file: key -> value, arrays as lists or numpy arrays.

    ``pre`` replaces the file's ``tokenizer.ggml.pre``. Raises CheckpointError for metadata that is missing, damaged or
    of an unknown kind.
    """
    kind = metadata.get(_PREFIX + "model")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        got = "no tokenizer" if kind is None else f"a tokenizer of kind {kind!r}"
        raise CheckpointError(
            f"the file has {got} (tokenizer.ggml.model): expected 'gpt2' or 'llama'; "
            "use a model with one of these, or a Hugging Face directory with tokenizer.json"
        )
    with _no_garbage_collection():
        return _build(metadata, kind, pre)


def end_of_generation(metadata: Mapping[str, Any]) -> frozenset[int]:
    """Ids of the tokens that end an answer, as llama.cpp finds them. ``metadata``: see ``read_gguf_tokenizer``.

    Raises CheckpointError for a vocabulary that is no list of strings, and an id that is no number.
    """
    index = {token: i for i, token in enumerate(_strings(metadata, "tokens"))}
    ids = _named_ids(metadata, str(metadata.get(_PREFIX + "model")), index)
    return frozenset(_end_of_generation(ids, index, set(), set()))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Half a million small tuples are made and kept: the collector would look at them again and again, for seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build(metadata: Mapping[str, Any], kind: str, pre: str | None) -> GGUFTokenizer:
    vocabulary = _Vocabulary.read(metadata, kind)
    name: str | None = None
    notes: tuple[str, ...] = ()
    add_bos = True
    if kind == "gpt2":
        name, notes = _pre_name(metadata, pre)
        assembled = _byte_level(vocabulary, _merges(metadata), name)
        add_bos = PRE_TOKENIZERS[name].add_bos
    else:
        assembled = _sentence_piece(vocabulary, _flag(metadata, "add_space_prefix", True))
    return _finish(metadata, vocabulary, assembled, kind, name, notes, add_bos)


# ------------------------------------------------------------------------------------------------ vocabulary


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    index: dict[str, int]
    scores: np.ndarray
    special: frozenset[int]
    """Control and unknown tokens."""
    user_defined: frozenset[int]
    """Found in every text before anything else."""
    ids: dict[str, int]
    eog_ids: frozenset[int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any], kind: str) -> _Vocabulary:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(_strings(metadata, "tokens"))]
        if not tokens:
            raise CheckpointError("tokenizer.ggml.tokens is empty: expected the vocabulary; download the file again")
        index = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(index) != len(tokens):
            twice = next(token for i, token in enumerate(tokens) if index[token] != i)
            raise CheckpointError(
                f"tokenizer.ggml.tokens holds {twice!r} twice: expected every token once; convert the model again"
            )
        scores = _numbers(metadata, "scores", len(tokens), 0.0).astype(np.float32)
        types = _numbers(metadata, "token_type", len(tokens), 1)
        control = set(np.flatnonzero(types == _CONTROL).tolist())
        user_defined = set(np.flatnonzero(types == _USER_DEFINED).tolist())
        ids = _named_ids(metadata, kind, index)
        eog = _end_of_generation(ids, index, control, user_defined)
        special = control | set(np.flatnonzero(types == _UNKNOWN).tolist())
        return cls(tokens, index, scores, frozenset(special), frozenset(user_defined - special), ids, frozenset(eog))


def _named_ids(metadata: Mapping[str, Any], kind: str, index: Mapping[str, int]) -> dict[str, int]:
    """Special ids that the file names, else SentencePiece's usual ones. Ids outside the vocabulary do not count.

    llama.cpp takes 11 (Falcon's) for bos and eos of a ``gpt2`` file that names none; here such a file has none.
    """
    found = {"unk": 0, "bos": 1, "eos": 2} if kind == "llama" else {}
    for name, keys in _NAMED_IDS.items():
        for key in keys:
            value = metadata.get(_PREFIX + key)
            if value is not None and not isinstance(value, int | np.integer):
                raise CheckpointError(f"{_PREFIX}{key}: expected a token id, got {value!r}; download the file again")
            if value is not None and 0 <= value < len(index):
                found[name] = int(value)
    return {name: i for name, i in found.items() if i < len(index)}


def _end_of_generation(ids: dict[str, int], index: Mapping[str, int], control: set[int], user: set[int]) -> set[int]:
    """The tokens that end an answer; completes ``ids``, ``control`` and ``user`` by what tokens' texts tell."""
    for name, texts in _BY_TEXT.items():
        text = next((text for text in texts if text in index), None)
        if name not in ids and text is not None:
            ids[name] = index[text]
            control.add(index[text])
    ending = {index[text] for text in _END_OF_GENERATION if text in index}
    control |= ending
    shown = {index[text] for text in _ALWAYS_SHOWN if text in index}
    ending |= {ids[name] for name in ("fim_pad", "fim_rep", "fim_sep", "eos", "eot", "eom") if name in ids}
    found = {
        text for text in ("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|end|>") if index.get(text) in ending
    }
    calls = bool(found & {"<|call|>", "<|calls|>"})
    if "<|end|>" in found and calls and found & {"<|return|>", "<|flush|>"}:  # there it ends a message, not the answer
        ending.discard(index["<|end|>"])
        shown.add(index["<|end|>"])
    control -= shown
    user |= shown
    if "</s>" in index and any(index.get(text) in ending for text in ("<|tool_response>", "<|plamo:eos|>")):
        ending.discard(index["</s>"])  # ordinary text in these vocabularies
        control.discard(index["</s>"])
        user.discard(index["</s>"])
    return ending


# ------------------------------------------------------------------------------------------------ byte-level


def _pre_name(metadata: Mapping[str, Any], pre: str | None) -> tuple[str, tuple[str, ...]]:
    """The pre-tokenizer to use and what to say about it. Raises CheckpointError for an unknown name."""
    name = metadata.get(_PREFIX + "pre") if pre is None else pre
    if name is None or (isinstance(name, str) and not name):
        note = (
            "the file names no pre-tokenizer (tokenizer.ggml.pre); 'default' is used, as by llama.cpp: "
            "tokens may differ from those the model was trained on"
        )
        return "default", (note,)
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"unknown pre-tokenizer {name!r} (tokenizer.ggml.pre): {nearest(str(name), PRE_TOKENIZERS)}; "
            "use another file of this model, or a Hugging Face directory with tokenizer.json"
        )
    return name, ()


def _merges(metadata: Mapping[str, Any]) -> list[_Pair]:
    """Pairs in the order in which they merge; the first of equal pairs counts."""
    lines = dict.fromkeys(_strings(metadata, "merges"))
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    for number, (left, right) in enumerate(pairs):
        if not left or not right or " " in right:
            raise CheckpointError(
                f"tokenizer.ggml.merges, entry {number}: expected two tokens with a space between them, "
                f"got {list(lines)[number]!r}; convert the model again"
            )
    return pairs


@dataclass(frozen=True)
class _Assembled:
    """The parts of a ``tokenizers.Tokenizer``; two of them can share one model."""

    model: BPE
    decoder: decoders.Decoder
    pre_tokenizer: PreTokenizer | None = None
    normalizer: normalizers.Normalizer | None = None


def _byte_level(vocabulary: _Vocabulary, merges: list[_Pair], name: str) -> _Assembled:
    pre = PRE_TOKENIZERS[name]
    try:
        model = BPE(vocabulary.index, merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"tokenizer.ggml.merges do not fit the vocabulary: {error}; expected both parts of every pair and their "
            "union among tokenizer.ggml.tokens; convert the model again"
        ) from None
    steps: list[PreTokenizer] = [Split(Regex(expression), "isolated") for expression in pre.expressions]
    steps.append(ByteLevel(add_prefix_space=False, use_regex=False))
    missing = "".join(char for char in ByteLevel.alphabet() if char not in vocabulary.index)
    if missing:  # such a byte has no token, yet what stands before and after it must not merge
        steps.append(Split(Regex("".join(("[", *(rf"\x{{{ord(char):x}}}" for char in missing), "]"))), "removed"))
    return _Assembled(model, decoders.ByteLevel(), InTurn(steps))


# ------------------------------------------------------------------------------------------------ SentencePiece


def _sentence_piece(vocabulary: _Vocabulary, space_prefix: bool) -> _Assembled:
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary.index]
    if missing:
        raise CheckpointError(
            f"the vocabulary has no token for {len(missing)} of the 256 bytes, {missing[0]} for example: expected all, "
            "so that every text has tokens; convert the model again"
        )
    splits = _splits(vocabulary)
    if _ties(vocabulary, splits):
        model = BPE(vocabulary.index, [], ignore_merges=True, byte_fallback=True)
        pre_tokenizer = PreTokenizer.custom(_ScoreMerger(vocabulary))
    else:
        model = BPE(vocabulary.index, _ranked(vocabulary, splits), byte_fallback=True)
        pre_tokenizer = None
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    escape: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if space_prefix:
        escape.insert(0, normalizers.Prepend(_SPACE))
    return _Assembled(model, decoders.Sequence(steps), pre_tokenizer, normalizers.Sequence(escape))


def _splits(vocabulary: _Vocabulary) -> dict[int, list[_Pair]]:
    """Token -> the pairs of tokens that it can come from, those with the longest left part first."""
    index = vocabulary.index
    found = {}
    for i, token in enumerate(vocabulary.tokens):
        cuts = range(len(token) - 1, 0, -1)
        pairs = [(left, token[at:]) for at in cuts if (left := token[:at]) in index and token[at:] in index]
        if pairs:
            found[i] = pairs
    return found


def _ranked(vocabulary: _Vocabulary, splits: Mapping[int, list[_Pair]]) -> list[_Pair]:
    """Merges for a model that ranks pairs, so that it merges as one that ranks results by score.

    All pairs with one result have one score, and of two that overlap in a text the left one merges. A model with
    ranked pairs must therefore have the pair first that can stand on the left: for xy = yz that is (x, y). Where both
    orders can stand, as in a run of one character, merging from the left leaves the longer part on the left.
    """
    merges: list[_Pair] = []
    for group in _by_score(vocabulary, splits):
        runs: list[_Pair] = []  # of one character, all with one score: the leftmost grows as long as a token fits
        for i in group:
            if len(group) > 1 and _is_run(vocabulary.tokens[i]):
                runs += splits[i]
            else:
                merges += _left_first(splits[i])
        merges += sorted(runs, key=lambda pair: (-len(pair[0]), -len(pair[1])))
    return merges


def _by_score(vocabulary: _Vocabulary, splits: Mapping[int, list[_Pair]]) -> Iterator[list[int]]:
    """The tokens that can come from a merge, those of one score together, best score first."""
    candidates = np.fromiter(splits, np.int64, len(splits))
    scores = vocabulary.scores[candidates]
    order = np.argsort(-scores, kind="stable")
    starts = [0, *(np.flatnonzero(np.diff(scores[order])) + 1).tolist(), len(order)]
    ordered = candidates[order].tolist()
    return (ordered[start:end] for start, end in pairwise(starts))


def _is_run(token: str) -> bool:
    return token == token[0] * len(token)


def _left_first(pairs: list[_Pair]) -> list[_Pair]:
    """The pairs of one token in the order in which they must rank; given longest left part first."""
    if len(pairs) == 1:
        return pairs
    ranked = list(pairs)
    by_size = {len(left): (left, right) for left, right in pairs}
    for short in reversed(pairs):
        long = by_size.get(len(short[1]))
        if long is None or len(short[0]) >= len(long[0]):
            continue
        if short[1] == long[0] and long[1] != short[0]:  # only the shorter left part can stand on the left
            at, other = ranked.index(short), ranked.index(long)
            ranked[at], ranked[other] = long, short
    return ranked


def _ties(vocabulary: _Vocabulary, splits: Mapping[int, list[_Pair]]) -> bool:
    """Whether two tokens of one score can compete for a part between them, so that no ranking of pairs is right."""
    for group in _by_score(vocabulary, splits):
        if len(group) == 1:
            continue
        begins = defaultdict(set)
        for i in group:
            for left, _ in splits[i]:
                begins[left].add(i)
        for i in group:
            for _, right in splits[i]:
                rivals = begins.get(right, {i}) - {i}
                if rivals and not all(_is_run(vocabulary.tokens[token]) for token in (i, *rivals)):
                    return True
    return False


class _ScoreMerger:
    """Merges neighbours as llama.cpp does: the best score first, the leftmost of equals. Slow, exact for any scores."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._index = vocabulary.index
        self._scores = vocabulary.scores.tolist()

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(self._cut)

    def _cut(self, _: int, text: NormalizedString) -> list[NormalizedString]:
        ends = self.ends(text.normalized)
        pieces = (text[start:end] for start, end in pairwise([0, *ends]))
        return [piece for piece in pieces if piece is not None]

    def ends(self, text: str) -> list[int]:
        """Where the merged pieces of a text end."""
        index, scores = self._index, self._scores
        after = list(range(1, len(text) + 1))  # start of a piece -> its end
        before = list(range(-1, len(text) - 1))  # start of a piece -> start of the piece on its left
        alive = [True] * len(text)
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, middle: int) -> tuple[float, int, int, int] | None:
            token = index.get(text[left : after[middle]])
            return None if token is None else (-scores[token], left, middle, after[middle])

        queue = [pair for left in range(len(text) - 1) if (pair := offer(left, left + 1))]
        heapify(queue)
        while queue:
            _, left, middle, end = heappop(queue)
            if not alive[left] or not alive[middle] or after[left] != middle or after[middle] != end:
                continue
            after[left] = end
            alive[middle] = False
            if end < len(text):
                before[end] = left
                if pair := offer(left, end):
                    heappush(queue, pair)
            if before[left] >= 0 and (pair := offer(before[left], left)):
                heappush(queue, pair)
        return [after[start] for start in range(len(text)) if alive[start]]


# ------------------------------------------------------------------------------------------------ assembly


def _finish(
    metadata: Mapping[str, Any],
    vocabulary: _Vocabulary,
    parts: _Assembled,
    kind: str,
    pre: str | None,
    notes: tuple[str, ...],
    add_bos: bool,
) -> GGUFTokenizer:
    ids, tokens = vocabulary.ids, vocabulary.tokens
    bos = ids.get("bos") if _flag(metadata, "add_bos_token", add_bos) else None
    eos = ids.get("eos") if _flag(metadata, "add_eos_token", False) else None
    strips = _strips_right(metadata, vocabulary)
    user = _added(vocabulary, vocabulary.user_defined, strips)
    both = _added(vocabulary, vocabulary.user_defined | vocabulary.special, strips)
    named = "tokenizer.chat_template."
    templates = {key: value for key, value in metadata.items() if key == named[:-1] or key.startswith(named)}
    for key, value in templates.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{key}: expected a template's text, got {value!r}; convert the model again")
    template = templates.pop(named[:-1], None)
    return GGUFTokenizer(
        kind=kind,
        pre=pre,
        parsing=_assemble(parts, both, vocabulary, bos, eos),
        plain=_assemble(parts, user, vocabulary, bos, eos),
        ids=ids,
        eog_ids=vocabulary.eog_ids,
        special_ids=vocabulary.special,
        add_bos=bos is not None,
        add_eos=eos is not None,
        chat_template=template,
        special_tokens={
            f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "sep", "pad", "mask") if name in ids
        },
        chat_templates={key[len(named) :]: value for key, value in templates.items()},
        notes=notes,
    )


def _assemble(
    parts: _Assembled, added: list[AddedToken], vocabulary: _Vocabulary, bos: int | None, eos: int | None
) -> Tokenizer:
    tokenizer = Tokenizer(parts.model)
    tokenizer.decoder = parts.decoder
    if parts.normalizer is not None:
        tokenizer.normalizer = parts.normalizer
    if parts.pre_tokenizer is not None:
        tokenizer.pre_tokenizer = parts.pre_tokenizer
    tokenizer.add_tokens(added)
    if bos is not None or eos is not None:
        first = [] if bos is None else ["bos"]
        last = [] if eos is None else ["eos"]
        tokenizer.post_processor = TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B:1", *last],
            special_tokens=[
                {"id": name, "ids": [i], "tokens": [vocabulary.tokens[i]]}
                for name, i in (("bos", bos), ("eos", eos))
                if i is not None
            ],
        )
    return tokenizer


def _added(vocabulary: _Vocabulary, ids: Iterable[int], strips: frozenset[int]) -> list[AddedToken]:
    """Tokens to look for in the text itself, before it is split or changed."""
    return [
        AddedToken(vocabulary.tokens[i], special=i in vocabulary.special, normalized=False, rstrip=i in strips)
        for i in sorted(ids)
    ]


def _strips_right(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> frozenset[int]:
    """Special tokens that swallow the white space after them: Phi-3's, which llama.cpp knows by the model's name."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    keep = {vocabulary.index.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
    return frozenset(i for i in vocabulary.special | vocabulary.user_defined if i not in keep)


# ------------------------------------------------------------------------------------------------ metadata


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(_PREFIX + name)
    if values is None:
        raise CheckpointError(
            f"the file has no {_PREFIX}{name}: expected it beside tokenizer.ggml.model; "
            "use a file with its vocabulary, or a Hugging Face directory"
        )
    if not isinstance(values, list | tuple | np.ndarray) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{_PREFIX}{name}: expected a list of strings; download the file again")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:  # bytes that were not UTF-8 arrive as surrogates
        raise CheckpointError(f"{_PREFIX}{name}: expected UTF-8; download the file again") from None
    return list(values)


def _numbers(metadata: Mapping[str, Any], name: str, count: int, default: float) -> np.ndarray:
    """One number for every token; where the file has no such list, the default for all."""
    values = metadata.get(_PREFIX + name)
    if values is None:
        return np.full(count, default)
    try:
        numbers = np.asarray(values)
        damaged = numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or len(numbers) < count
    except ValueError:
        damaged = True
    if damaged:
        raise CheckpointError(f"{_PREFIX}{name}: expected {count} numbers, one a token; download the file again")
    if np.isnan(numbers).any():
        raise CheckpointError(f"{_PREFIX}{name}: expected numbers, got NaN; download the file again")
    return numbers[:count]


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + name, default)
    if not isinstance(value, int) or value not in (0, 1):
        raise CheckpointError(f"{_PREFIX}{name}: expected true or false, got {value!r}; convert the model again")
    return bool(value)
