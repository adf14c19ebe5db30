"""Is a server's model the one it claims to be? Its sampled tokens against a local copy of that model.

*Likelihood*: at temperature 1 the tokens must be distributed as the reference says. The bets are its own distribution
at other temperatures and truncations (``alternatives``), and copies of it in fewer bits: a server that runs such a
copy is found at the rate of the two distributions' divergence.

*Shared seeds*, where the server draws its tokens as Outrider does for a seed: every token follows from the seed, so
each token that the reference would not have drawn counts ("DiFR: Inference verification despite nondeterminism", arXiv
2511.20621, Token-DiFR). A few are allowed for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.proof.alternatives import Bets
from outrider.proof.certificate import Check
from outrider.proof.completion_server import Completion, CompletionServer
from outrider.proof.evidence import Budget, mean_of
from outrider.sampling.rng import RowRng, gumbel
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import RaggedBatch, TargetModel

__all__ = ["METHOD", "ReferenceAudit", "SeededDraws", "TokenNames", "add_answer", "text_logits"]

METHOD = (
    "The server's sampled tokens under a local reference model: likelihood ratios against other temperatures, "
    "truncations and copies of the reference in fewer bits, by e-values; with shared seeds also the share of tokens "
    "that the reference would not have drawn (Token-DiFR, arXiv 2511.20621)."
)
Ints = npt.NDArray[np.int64]
COLUMNS = 64  # likeliest tokens that are bets of their own; the others are one
ALLOWED = 0.02  # share of seeded draws that rounding may change
RATES = (0.03, 0.05, 0.08, 0.15, 0.3, 0.6)  # shares that are bet on


@torch.inference_mode()
def text_logits(target: TargetModel, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """Logits of each token of ``output``, float64 [n, V], by one plain pass."""
    text = [*prompt, *output]
    cache = target.new_cache(1, len(text))
    batch = RaggedBatch.pack([text[:-1]], [0], [cache.open()])
    return target.forward(batch, cache, logits_at=torch.arange(len(prompt) - 1, len(text) - 1)).logits.double().clone()


def add_answer(
    bets: Bets,
    target: TargetModel,
    copies: Mapping[str, TargetModel],
    prompt: Sequence[int],
    output: Sequence[int],
    ambiguous: Tensor | None = None,
) -> None:
    """Bet on the tokens of one answer. ``ambiguous`` bool [V]: tokens that count as one with the less likely ones."""
    tokens = torch.tensor(list(output))
    p = text_logits(target, prompt, output).softmax(-1)
    named = p if ambiguous is None else p.masked_fill(ambiguous, 0)
    top = named.topk(min(COLUMNS, p.shape[1] - 1), -1).indices
    same = top == tokens[:, None]
    columns = torch.where(same.any(1), same.long().argmax(1), top.shape[1])

    def in_columns(probabilities: Tensor) -> npt.NDArray[np.float64]:
        head = probabilities.gather(1, top)
        found: npt.NDArray[np.float64] = torch.cat([head, (1 - head.sum(1, keepdim=True)).clamp_min(1e-9)], 1).numpy()
        return found / found.sum(1, keepdims=True)

    stated = in_columns(p)
    others = {
        f"a copy in {name}": 0.98 * in_columns(text_logits(copy, prompt, output).softmax(-1)) + 0.02 * stated
        for name, copy in copies.items()
    }
    bets.add(stated, True, columns.numpy(), np.arange(len(tokens)), others)


@dataclass
class SeededDraws:
    """Counts of tokens that a seed and a reference do not explain, and the evidence that they are too many."""

    wrong: int = 0
    samples: int = 0

    def add(self, target: TargetModel, prompt: Sequence[int], output: Sequence[int], seed: int) -> None:
        """One answer at temperature 1 under the coupled rule."""
        logits = text_logits(target, prompt, output)
        n = len(output)
        rng = RowRng([seed], [0], ["coupled"])
        keys = rng.token_keys(torch.zeros(n, dtype=torch.int64), len(prompt) + torch.arange(n), "own")
        drawn = (logits + gumbel(keys, None, logits.shape[1])).argmax(1)
        self.wrong += int((drawn != torch.tensor(list(output))).sum())
        self.samples += n

    @property
    def log_value(self) -> float:
        """The natural logarithm of the evidence that more than ``ALLOWED`` of the draws differ."""
        right = self.samples - self.wrong
        return mean_of([self.wrong * math.log(r / ALLOWED) + right * math.log((1 - r) / (1 - ALLOWED)) for r in RATES])


@dataclass(frozen=True)
class TokenNames:
    """From the texts of tokens, as a server tells them, to the tokens of a reference's tokenizer."""

    tokenizer: Tokenizer

    @cached_property
    def _known(self) -> tuple[dict[str, int], Tensor]:
        names: dict[str, list[int]] = {}
        for token in range(self.tokenizer.vocab_size):
            names.setdefault(self.tokenizer.decode([token]), []).append(token)
        unique = {name: ids[0] for name, ids in names.items() if len(ids) == 1 and name and "\ufffd" not in name}
        ambiguous = torch.ones(self.tokenizer.vocab_size, dtype=torch.bool)
        ambiguous[torch.tensor(sorted(unique.values()))] = False
        return unique, ambiguous

    def ambiguous(self, size: int) -> Tensor:
        """bool [V]: tokens whose text does not name them."""
        mask = torch.ones(size, dtype=torch.bool)
        mask[: len(self._known[1])] = self._known[1][:size]
        return mask

    def tokens(self, answer: Completion) -> list[int]:
        """The answer's tokens up to the first whose text does not name it; that one is -1, and the last."""
        found: list[int] = []
        for token in answer.tokens or ():
            found.append(self._known[0].get(token.text, -1))
            if found[-1] < 0:
                break
        return found


@dataclass(frozen=True)
class ReferenceAudit:
    """A server against a local model."""

    server: CompletionServer
    target: TargetModel
    tokenizer: Tokenizer
    copies: Mapping[str, TargetModel]
    """Of the reference in fewer bits, by dtype."""
    prompts: tuple[str, ...]
    max_tokens: int = 64
    tokens: int = 6000
    shared_seeds: bool = False
    seed: int = 0
    alpha: float = 1e-3

    def checks(self) -> Iterator[Check]:
        budget = Budget(1 + self.shared_seeds, self.alpha)
        bets, draws, names, asked = Bets(), SeededDraws(), TokenNames(self.tokenizer), 0
        ambiguous = names.ambiguous(self.target.spec.vocab_size)
        while bets.samples < self.tokens and bets.log_value < budget.threshold:
            before = bets.samples
            prompts = [self.prompts[(asked + i) % len(self.prompts)] for i in range(8)]
            seeds: list[int | None] = [(self.seed << 20) + asked + i for i in range(len(prompts))]
            asked += len(prompts)
            found = self.server.many(prompts, seeds, max_tokens=self.max_tokens, temperature=1.0, logprobs=1)
            for prompt, seed, answer in zip(prompts, seeds, found, strict=True):
                ids, output = self.tokenizer.encode(prompt), names.tokens(answer)
                if not output:
                    continue
                output = [token if token >= 0 else int(ambiguous.long().argmax()) for token in output]
                add_answer(bets, self.target, self.copies, ids, output, ambiguous)
                if self.shared_seeds and output[:-1]:
                    draws.add(self.target, ids, output[:-1], seed or 0)
            if bets.samples == before:
                yield Check("likelihood under the reference", False, "the server gives no tokens (`logprobs`) to test")
                return
        alternative, evidence = bets.best
        rejected = bets.log_value >= budget.threshold
        found_text = f"{bets.samples} tokens, nothing found"
        if rejected:
            found_text = (
                f"rejected after {bets.samples} tokens; best explained by {alternative} (evidence e^{evidence:.0f})"
            )
        figures = {
            "samples": bets.samples,
            "log_evidence": round(bets.log_value, 3),
            "log_threshold": round(budget.threshold, 3),
            "likeliest_alternative": alternative,
        }
        yield Check("likelihood under the reference", not rejected, found_text, figures)
        if self.shared_seeds:
            wrong = draws.log_value >= budget.threshold
            yield Check(
                "draws of shared seeds",
                not wrong,
                f"{draws.wrong} of {draws.samples} tokens are not the reference's draw; {ALLOWED:.0%} are allowed",
                {"wrong": draws.wrong, "samples": draws.samples, "log_evidence": round(draws.log_value, 3)},
            )
