"""The regular expressions by which each ``tokenizer.ggml.pre`` splits text before byte-pair merging.

The expressions of one entry are applied in turn, each within the pieces that the one before left. Matches and the text
between them become pieces. The syntax is Oniguruma's, which ``tokenizers`` uses: ``\\s`` is Unicode white space.
Source: ``llm_tokenizer_bpe`` and ``unicode_regex_split`` of llama.cpp. Where llama.cpp differs from the model's own
``tokenizer.json`` (upper and lower case of letters outside ASCII in ``tekken`` and ``gpt-4o``, for example), this file
follows llama.cpp, because a GGUF file is written for it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PRE_TOKENIZERS", "PreTokenizer"]


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split text, and what llama.cpp ties to its name."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    """A piece that is a vocabulary entry becomes that token, whatever the merges say."""
    add_bos: bool = False
    """Whether a text starts with the bos token when the file does not say."""


_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_ENDINGS = r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"  # 's 'll 've ..., in upper and lower case
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_GPT2 = rf"'(?:s|t|re|ve|m|ll|d)| ?\p{{L}}+| ?\p{{N}}+|{_SIGNS}|{_SPACES}"
_ONE_DIGIT = r"\p{N}"
_THREE_DIGITS = r"\p{N}{1,3}"


def _cl100k(digits: str, word: str = _WORD, signs: str = _SIGNS + r"[\r\n]*", lines: str = _LINES) -> str:
    """The family of OpenAI's cl100k expression: endings, words, digits, signs, line ends, white space."""
    return rf"{_ENDINGS}|{word}|{digits}|{signs}|{lines}"


def _o200k(endings: str, digits: str) -> str:
    """The family of OpenAI's o200k expression, where words also split between lower and upper case.

    llama.cpp knows the case of ASCII letters only: any other letter counts as both.
    """
    upper, lower = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{upper}*{lower}+{endings}|{before}{upper}+{lower}*{endings}"
    return rf"{words}|{digits}|{_SIGNS}[\r\n/]*|{_LINES}"


_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES
)
# llama.cpp reads white space outside ASCII as \v here, so that these ranges do not contain it.
_DEEPSEEK_HAN = r"[[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}]&&[^\s]]+"
_DEEPSEEK_CASED = (  # code points of the cased letters that DeepSeek LLM's expression lists, in hexadecimal
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c "
    "38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b "
    "1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 "
    "1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 "
    "2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b "
    "2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 "
    "fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df "
    "1e900-1e943 "
)


def _code_points(ranges: str) -> str:
    """The inside of a character class from hexadecimal numbers and ranges of them."""
    return "".join("-".join(rf"\x{{{point}}}" for point in part.split("-")) for part in ranges.split())


_SENTENCE_SIGNS = "(|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)"  # what ends a word in Bloom's vocabulary

_gpt2 = PreTokenizer((_GPT2,))
_digits_gpt2 = PreTokenizer((_ONE_DIGIT, _GPT2))
_llama3 = PreTokenizer((_cl100k(_THREE_DIGITS),), ignore_merges=True, add_bos=True)
_qwen2 = PreTokenizer((_cl100k(_ONE_DIGIT),))
_o200k_three = PreTokenizer((_o200k(rf"(?:{_ENDINGS})?", _THREE_DIGITS),))
_deepseek3 = PreTokenizer((_THREE_DIGITS, r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+", _DEEPSEEK_WORDS))
_bloom = PreTokenizer((rf" ?[^{_SENTENCE_SIGNS}\s]+",))
_bailing = PreTokenizer((_cl100k(_ONE_DIGIT, lines=r"\s*[\r\n]|" + _SPACES),))
_glm4 = PreTokenizer(_llama3.expressions, ignore_merges=True)
_like_llama3 = PreTokenizer(_llama3.expressions)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>\^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais"), _gpt2),
    **dict.fromkeys(("exaone4", "trillion", "granite-docling", "modern-bert"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _digits_gpt2),
    **dict.fromkeys(("exaone", "minerva-7b", "mellum2"), _digits_gpt2),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _llama3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _like_llama3),
    **dict.fromkeys(("glm4", "glm5"), _glm4),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _qwen2),
    **dict.fromkeys(("solar-open", "grok-2", "kormo", "f2llmv2"), _qwen2),
    "qwen35": PreTokenizer(
        (_cl100k(_ONE_DIGIT, word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", signs=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)
    ),
    "tekken": PreTokenizer((_o200k("", _ONE_DIGIT),), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _o200k_three),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_code_points(_DEEPSEEK_CASED)}]+",
            r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3001}\x{3002}]+",
            r"\s+\z",
            _DEEPSEEK_HAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, _ONE_DIGIT)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _deepseek3),
    "falcon": PreTokenizer((r"[\p{P}$+<=>\^~|`]+", _GPT2, "[0-9]{3}")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _bloom),
    "viking": PreTokenizer((*_bloom.expressions, _ONE_DIGIT)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _bailing),
    "seed-coder": PreTokenizer((_cl100k(_ONE_DIGIT, signs=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "minicpm5": PreTokenizer((_THREE_DIGITS, _cl100k(r"\p{N}+")), ignore_merges=True),
}
"""By the name that the file gives. Names that llama.cpp knows and that are missing here are refused."""
