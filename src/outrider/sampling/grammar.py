"""Grammars: which tokens may follow a prefix, as masks on logits.

llguidance does the parsing. A ``GrammarMatcher`` belongs to one request and is a ``types.Processor``, so its masks
reach the target and every drafter that draws from processed logits. It is told the committed tokens (``consume``);
along drafts it looks ahead and takes them back. Each mask of a round is computed once, for both sides together.

A mask is a function of the tokens before it, so target and drafter are masked alike, and the distribution that is
verified is the one that was drawn from. Where the text can only go on in one way, the mask has that one token.

Rows without a token. Where the logits are -inf for all that the mask allows (a drafter with a reduced vocabulary, a
bias of -inf, a grammar that this vocabulary cannot continue), the row becomes uniform over the allowed tokens without
such a bias, or over the forbidden ones where there are none. A forbidden token is never accepted as a draft, and ends
the request with an error where it is the text's next token.

Legend: R rows of logits, V vocabulary, W words of a mask (32 tokens each).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from outrider.config import Grammar, SamplingParams
from outrider.errors import InvalidRequest
from outrider.types import RequestRows

__all__ = ["JSON_WHITESPACE", "GrammarMatcher", "Grammars"]

_Mask = npt.NDArray[np.uint32]  # [W], bit t % 32 of word t // 32: token t is allowed
_Floats = npt.NDArray[np.floating]
_COMPILED = 32  # grammars that are kept ready
_LONGEST_REASON = 300  # characters of llguidance's messages, which quote the grammar
JSON_WHITESPACE = r"[ ]|\n[ ]{0,16}"
"""Between the parts of a JSON text: a model that may write any number of spaces may write nothing else."""
_LEXER_STATES = 20_000  # about 20 MB; llguidance's other limits bound the time of a step


class Grammars:
    """The grammars of one tokenizer, compiled when they are first asked for. Any thread may ask."""

    def __init__(self, definition: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``definition``: the tokenizer as the ``tokenizers`` library writes it, read at the first grammar.
        ``vocab_size``: rows of the target's head. ``eos_token_ids``: what may end a text; () where nothing does."""
        self._definition = definition
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def check(self, grammar: Grammar) -> None:
        """Raise InvalidRequest for a grammar that cannot be used: not valid, too large, or without any text."""
        with self._lock:
            self._get(grammar)

    def start(self, grammar: Grammar, anew: bool = False) -> LLMatcher:
        """llguidance's matcher before the first token. ``anew``: compile it again. Raises InvalidRequest.

        All matchers of a compiled grammar share what its lexer has found so far, up to a limit that fails them all.
        """
        with self._lock:
            if anew:
                self._compiled.pop(grammar, None)
            return self._get(grammar).deep_copy()

    def _get(self, grammar: Grammar) -> LLMatcher:
        """Compiled, and counted as the one that was used last. Needs the lock."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compiled[grammar] = self._compile(grammar)
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiled

    def no_token(self) -> _Mask:
        """A mask that allows nothing."""
        assert self._tokenizer is not None
        return np.zeros((self._tokenizer.vocab_size + 31) // 32, np.uint32)

    def only_end(self, mask: _Mask | None) -> bool:
        """Whether nothing but the end may follow, in a vocabulary that has no token for it."""
        return not self.eos_token_ids and _only(mask) == self.vocab_size

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._definition(), self.vocab_size, sorted(self.eos_token_ids))
        limits = LLParserLimits(max_lexer_states=_LEXER_STATES, verbose_errors=False)
        try:
            matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=limits)
        except ValueError as error:
            raise _refused(grammar, str(error)) from None
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():  # too large for a single step, or no text at all
            raise _refused(grammar, f"no token can begin its text: {first.get_error()}")
        return matcher


class GrammarMatcher:
    """Where one request's text is in its grammar (``types.Processor``)."""

    def __init__(self, grammars: Grammars, params: SamplingParams) -> None:
        """Raises InvalidRequest for a grammar that cannot be used."""
        assert params.grammar is not None
        self._grammars, self._params, self._grammar = grammars, params, params.grammar
        self._matcher = grammars.start(params.grammar)
        self._taken: list[int] = []  # committed tokens
        self._ahead: list[int] = []  # drafts that ``_matcher`` has read behind them
        self._masks: dict[tuple[int, ...], _Mask | None] = {}  # by the drafts before
        self._forced: dict[tuple[int, ...], tuple[list[int], int]] = {}  # tokens that must come, and which is next
        self._barred = [token for token, bias in params.logit_bias if bias == -math.inf]
        self.ended = False
        """Whether the committed text is complete and nothing may follow it."""
        self.failure: str | None = None
        """Why the last token was not allowed."""

    def fresh(self) -> GrammarMatcher:
        """The same before its first token: what an interrupted step replays the committed tokens into."""
        return GrammarMatcher(self._grammars, self._params)

    def consume(self, token: int) -> bool:
        """Commit a token. False, and a ``failure``, where it is not allowed: then no token was."""
        if not self.allows((), token):
            reason = self._matcher.get_error() or "no token of the vocabulary goes on"
            self.failure = f"the grammar cannot be continued after {len(self._taken)} tokens: {_short(reason)}"
            return False
        if token in self._grammars.eos_token_ids:  # not shown to llguidance, which does not take it back in a rollback
            self.ended = True
            return True
        if not (self._move((token,)) or self._move((token,))):  # once more, with a new lexer
            self.failure = (
                f"the grammar's parser failed after {len(self._taken)} tokens: {_short(self._matcher.get_error())}"
            )
            return False
        self._taken.append(token)
        self._ahead.clear()
        self._masks = {drafts[1:]: mask for drafts, mask in self._masks.items() if drafts[:1] == (token,)}
        tokens, at = self._forced.get((), ([], 0))
        self._forced = {drafts[1:]: forced for drafts, forced in self._forced.items() if drafts[:1] == (token,)}
        if at + 1 < len(tokens):
            self._masks.setdefault((), self._force((), tokens, at + 1))
        self.ended = self._matcher.is_stopped() or self._grammars.only_end(self.mask(()))
        return True

    # ------------------------------------------------------------------------------------------ along drafts

    def __call__(self, logits: Tensor, rows: RequestRows) -> None:
        """Forbid what may not follow each row's drafts. Rows behind a forbidden draft or behind the end of the grammar
        stay as they are: nothing of them is ever committed. logits [R, V]"""
        drafts = tuple(rows.tokens[rows.prompt_length + len(self._taken) :])
        on_cpu = logits.device.type == "cpu"
        for row, depth in zip(rows.index.tolist(), rows.depth.tolist(), strict=True):
            mask = self.mask(drafts[:depth])
            if mask is None:
                continue
            if on_cpu:  # numpy: the row is too short to be worth starting torch's threads
                self._restrict(logits[row].numpy(), mask)
            else:
                values = logits[row].cpu().numpy()
                self._restrict(values, mask)
                logits[row] = torch.from_numpy(values)

    def mask(self, drafts: tuple[int, ...]) -> _Mask | None:
        """Which tokens may follow these drafts, uint32 [W]; none of them where a limit of the parser is reached. None
        behind a forbidden draft and behind the end of the grammar."""
        if drafts not in self._masks:
            self._masks[drafts] = self._compute(drafts)
        return self._masks[drafts]

    def allows(self, drafts: tuple[int, ...], token: int) -> bool:
        """Whether ``token`` may follow these drafts."""
        mask = self.mask(drafts)
        return mask is not None and _has(mask, token)

    def only(self, drafts: tuple[int, ...]) -> int | None:
        """The one token that may follow these drafts; None where there are none or several."""
        token = _only(self.mask(drafts))
        return token if token is not None and token < self._grammars.vocab_size else None

    # ------------------------------------------------------------------------------------------ parts

    def _compute(self, drafts: tuple[int, ...]) -> _Mask | None:
        if drafts:
            last = drafts[-1]
            if last in self._grammars.eos_token_ids or not self.allows(drafts[:-1], last):
                return None
        mask = self._grammars.no_token()
        tokens, at = self._forced.get(drafts[:-1], ([], 0)) if drafts else ([], 0)
        if at + 1 < len(tokens):
            return self._force(drafts, tokens, at + 1)
        for _ in range(2):  # what fails with a lexer that is full succeeds with a new one
            if self._move(drafts):
                if self._matcher.is_stopped():
                    return None
                if tokens := self._matcher.compute_ff_tokens():
                    return self._force(drafts, tokens, 0)
                self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
                if not self._matcher.is_error():
                    return mask
        mask[:] = 0  # after an error it is the mask of the end
        return mask

    def _force(self, drafts: tuple[int, ...], tokens: list[int], at: int) -> _Mask:
        """The mask of one token of a text that can go on in one way only, which is turned into tokens once: token by
        token llguidance would do so anew each time."""
        self._forced[drafts] = tokens, at
        mask = self._grammars.no_token()
        mask[tokens[at] >> 5] = 1 << (tokens[at] & 31)
        return mask

    def _move(self, drafts: tuple[int, ...]) -> bool:
        """Bring llguidance's matcher behind the committed tokens and these allowed drafts. False where it fails."""
        same = 0
        while same < min(len(drafts), len(self._ahead)) and drafts[same] == self._ahead[same]:
            same += 1
        back = len(self._ahead) - same
        if self._matcher.is_error() or (back and not self._matcher.rollback(back)):  # an error cannot be taken back
            self._matcher = self._grammars.start(self._grammar, anew=True)
            same = 0
            self._ahead.clear()
            if not self._matcher.consume_tokens(self._taken):
                return False
        del self._ahead[same:]
        for token in drafts[same:]:
            if not self._matcher.consume_token(token):
                return False
            self._ahead.append(token)
        return True

    def _restrict(self, values: _Floats, mask: _Mask) -> None:
        """values [V], in place"""
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(values)).view(bool)
        if np.count_nonzero(allowed) < len(values) // 8:  # the faster of two ways
            columns = np.flatnonzero(allowed)
            kept = values[columns]
            values.fill(-np.inf)
            values[columns] = kept
        else:
            np.copyto(values, -np.inf, where=~allowed)
        if values.max() == -np.inf:
            open_ = allowed.copy()
            open_[self._barred] = False
            values[open_ if open_.any() else ~allowed] = 0


# ------------------------------------------------------------------------------------------------ for llguidance


def _tokenizer(definition: str, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """Raises InvalidRequest for tokenizers whose tokens llguidance cannot read as bytes."""
    try:
        tokenizer = LLTokenizer(definition, n_vocab=vocab_size, eos_token=eos_token_ids or None)
        return tokenizer if eos_token_ids else LLTokenizer(TokenizerWrapper(_Endless(tokenizer)), slices=[])
    except ValueError as error:
        raise InvalidRequest(
            f"grammars need a tokenizer whose tokens are bytes of the text: {_short(str(error))}; leave the grammar out"
        ) from None


class _Endless:
    """A tokenizer without an end-of-text token, as llguidance's wrapper wants it: one more id stands for the end."""

    bos_token_id = None

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._encode = tokenizer.tokenize_bytes
        size = tokenizer.vocab_size
        self.tokens = [tokenizer.decode_bytes([token]) for token in range(size)] + [b"<end>"]
        self.special_token_ids = [token for token in range(size) if tokenizer.is_special_token(token)] + [size]
        self.eos_token_id = size

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text)


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's form. Raises ValueError."""
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return LLMatcher.grammar_from_lark(grammar.text)
    schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_WHITESPACE})


def _refused(grammar: Grammar, reason: str) -> InvalidRequest:
    return InvalidRequest(f"the {grammar.kind} grammar cannot be used: {_short(reason)}; correct or simplify it")


def _short(reason: str) -> str:
    """The first lines of a message of llguidance's."""
    text = " ".join(reason.replace("<non-verbose/>", "").split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _only(mask: _Mask | None) -> int | None:
    """The one token of a mask; None where there are none or several."""
    if mask is None or len(words := np.flatnonzero(mask)) != 1:
        return None
    word = int(mask[words[0]])
    return 32 * int(words[0]) + word.bit_length() - 1 if word & (word - 1) == 0 else None


def _has(mask: _Mask, token: int) -> bool:
    return bool(mask[token >> 5] >> (token & 31) & 1)
