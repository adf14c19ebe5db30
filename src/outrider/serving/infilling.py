"""Filling in the middle: a prompt and a suffix in the form that a model with such tokens was trained on."""

from __future__ import annotations

from outrider.serving.web import ApiError
from outrider.tokenization.tokenizer import Tokenizer

__all__ = ["infill_tokens"]

FORMS = (  # before the prompt, before the suffix, before what is to be written
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SmolLM
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)


def infill_tokens(tokenizer: Tokenizer, prompt: str, suffix: str) -> list[int]:
    """Tokens of prompt and suffix around their markers. Raises ApiError where the tokenizer has no such markers."""
    known = tokenizer.vocabulary
    form = next((form for form in FORMS if all(token in known for token in form)), None)
    if form is None:
        raise ApiError(
            400,
            "suffix is not supported by this model: its tokenizer has no tokens for filling in the middle; "
            "leave it out",
            param="suffix",
            code="unsupported_parameter",
        )
    before, behind, middle = (known[token] for token in form)
    frame = tokenizer.encode("")  # a beginning-of-text token, where texts have one
    return [
        *frame,
        before,
        *tokenizer.encode_literally(prompt),
        behind,
        *tokenizer.encode_literally(suffix),
        middle,
    ]
