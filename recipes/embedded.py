"""Train the embedded models: a small Qwen3-shaped target, its tokenizer, and a one-layer draft model.

    python recipes/embedded.py --corpora DIR --out runs/embedded

DIR holds ``gsm8k_train.jsonl`` (grade-school maths, MIT) and ``public_domain_books.txt.xz`` (prose); the
third domain, Python code, is the standard library of the interpreter that runs this file (PSF licence).
Documents are split by a hash of their text, so evaluation never uses training documents.

Stages: ``tokens`` -> ``target`` -> ``draft`` -> ``package``. Each skips what is already done, resumes from its
last checkpoint after any interruption, and gives the same result for the same seed, thread count and steps.
The learning rate is constant after a warm-up and decays over the last fifth (warm-up, stable, decay), so
a finished run can be continued by asking for more steps: the stable checkpoint is kept beside the final one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import random
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

DOMAINS = ("maths", "code", "prose")
MIXTURE = (0.25, 0.40, 0.35)  # share of the training sequences
EOT, MASK = "<|endoftext|>", "<|mask|>"
# The split of Qwen2's tokenizer, which vLLM and llama.cpp know by name ("qwen2").
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Plan:
    """Options of a training run."""

    steps: int
    learning_rate: float
    sequences: int = 16  # per step
    length: int = 512  # tokens per sequence
    micro: int = 4  # sequences per backward pass
    warmup: int = 60
    decay: float = 0.2  # last share of the steps, linear to zero
    seed: int = 20260

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: warm-up, stable, decay."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)

    @property
    def stable_until(self) -> int:
        return int(self.steps * (1 - self.decay))


# ------------------------------------------------------------------------------------------------ documents


def held_out(text: str, share: int) -> bool:
    """True for one document in ``share``, by the hash of its text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % share == 0


def maths_documents(corpora: Path) -> Iterator[str]:
    for index, line in enumerate((corpora / "gsm8k_train.jsonl").read_text().splitlines()):
        row = json.loads(line)
        suffix = BOXED if index % 10 == 0 else ""  # the wording of public prompt sets
        yield f"Question: {row['question']}{suffix}\nAnswer: {row['answer']}"


def code_documents() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"encodings", "site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if skipped.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata"):
            text = path.read_text(errors="ignore")
            if 400 < len(text) < 200_000:
                yield text


def prose_documents(corpora: Path) -> Iterator[str]:
    with lzma.open(corpora / "public_domain_books.txt.xz", "rt") as file:
        yield from (book.strip() for book in file.read().split(EOT) if len(book) > 1000)


def documents(corpora: Path) -> dict[str, dict[str, list[str]]]:
    """Documents of each domain, split into ``train`` and ``held_out``."""
    sources = {
        "maths": (maths_documents(corpora), 50),
        "code": (code_documents(), 25),
        "prose": (prose_documents(corpora), 25),
    }
    split: dict[str, dict[str, list[str]]] = {}
    for domain, (texts, share) in sources.items():
        split[domain] = {"train": [], "held_out": []}
        for text in texts:
            split[domain]["held_out" if held_out(text, share) else "train"].append(text)
    return split


# ------------------------------------------------------------------------------------------------ tokens


def train_tokenizer(texts: list[str], size: int = 4096) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[AddedToken(EOT, special=True), AddedToken(MASK, special=True)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def make_tokens(corpora: Path, out: Path) -> None:
    """Write ``tokenizer/`` and one ``uint16`` file of tokens per domain and split."""
    folder = out / "tokens"
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    split = documents(corpora)
    sample: list[str] = []
    for domain in DOMAINS:  # 6 MB of each domain, in documents' order, is enough for 4096 entries
        size = 0
        for text in split[domain]["train"]:
            sample.append(text[:40_000])
            size += len(sample[-1])
            if size > 6_000_000:
                break
    tokenizer = train_tokenizer(sample)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOT,
        pad_token=EOT,
        mask_token=MASK,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out / "tokenizer")
    eot = tokenizer.token_to_id(EOT)
    for domain in DOMAINS:
        for part, texts in split[domain].items():
            order = list(texts)
            random.Random(domain).shuffle(order)
            ids = [token for text in order for token in [*tokenizer.encode(text).ids, eot]]
            np.asarray(ids, dtype=np.uint16).tofile(folder / f"{domain}.{part}.bin")
            print(f"{domain:6s} {part:9s} {len(texts):6d} documents {len(ids):10,d} tokens")
        (folder / f"{domain}.held_out.json").write_text(json.dumps(split[domain]["held_out"]))
    (folder / "done").touch()


class Corpus:
    """Batches that depend on (seed, step) only, so a resumed run gets the same batches."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan = plan
        self.train = [np.memmap(folder / f"{d}.train.bin", dtype=np.uint16, mode="r") for d in DOMAINS]
        self.test = [np.memmap(folder / f"{d}.held_out.bin", dtype=np.uint16, mode="r") for d in DOMAINS]

    def batch(self, step: int) -> Tensor:
        """int64 [sequences, length + 1]."""
        draw = np.random.default_rng((self.plan.seed, step))
        rows = []
        for domain in draw.choice(len(DOMAINS), size=self.plan.sequences, p=MIXTURE):
            tokens = self.train[domain]
            start = int(draw.integers(0, len(tokens) - self.plan.length - 1))
            rows.append(torch.from_numpy(tokens[start : start + self.plan.length + 1].astype(np.int64)))
        return torch.stack(rows)

    def held_out(self, rows: int = 16) -> Iterator[tuple[str, Tensor]]:
        """Per domain int64 [rows, length + 1]: evenly spaced windows, always the same."""
        for domain, tokens in zip(DOMAINS, self.test, strict=True):
            last = len(tokens) - self.plan.length - 1
            starts = np.linspace(0, last, rows).astype(int)
            windows = [tokens[s : s + self.plan.length + 1].astype(np.int64) for s in starts]
            yield domain, torch.from_numpy(np.stack(windows))


# ------------------------------------------------------------------------------------------------ training


def shape(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (update scaled to AdamW's RMS), AdamW for embeddings and norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(inner, lr=1.0, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def next_token_loss(model: Qwen3ForCausalLM, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats. tokens [rows, length + 1]."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def distillation_loss(target_runner: Qwen3ForCausalLM) -> Callable[[Qwen3ForCausalLM, Tensor], Tensor]:
    """KL(target || draft): acceptance depends on how close the draft model's distribution is to the target's."""

    def loss(model: Qwen3ForCausalLM, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = target_runner(input_ids=tokens[:, :-1]).logits.flatten(0, 1).float().log_softmax(-1)
        got = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1).float().log_softmax(-1)
        return F.kl_div(got, wanted, log_target=True, reduction="batchmean")

    return loss


def save_state(path: Path, state: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(
    folder: Path,
    model: Qwen3ForCausalLM,
    corpus: Corpus,
    loss_of: Callable[[Qwen3ForCausalLM, Tensor], Tensor],
    checkpoint_every: int = 50,
) -> Qwen3ForCausalLM:
    """Train up to ``plan.steps``; the loss curve is ``loss.jsonl``, the resumable state ``state.pt``."""
    plan = corpus.plan
    folder.mkdir(parents=True, exist_ok=True)
    opts = optimizers(model)
    start, curve = 0, []
    for name in ("state.pt", "stable.pt"):  # a run continued past its old end restarts from the stable phase
        if (folder / name).exists():
            state = torch.load(folder / name, weights_only=True)
            if state["step"] <= plan.stable_until or state["steps"] == plan.steps:
                model.load_state_dict(state["model"])
                for opt, saved in zip(opts, state["optimizers"], strict=True):
                    opt.load_state_dict(saved)
                start, curve = state["step"], state["curve"]
                break
    model.train()
    began = time.monotonic()
    for step in range(start, plan.steps):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = plan.rate(step)
        mean = 0.0
        for part in corpus.batch(step).split(plan.micro):  # small enough for the activations to stay in cache
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, part) * (len(part) / plan.sequences)
            loss.backward()
            mean += loss.item()
        if not math.isfinite(mean):
            sys.exit(f"loss is {mean} at step {step}: the last checkpoint in {folder} is intact")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        curve.append(round(mean, 4))
        done = step + 1
        if done % checkpoint_every == 0 or done in (plan.steps, plan.stable_until):
            state = {
                "step": done,
                "steps": plan.steps,
                "model": model.state_dict(),
                "optimizers": [opt.state_dict() for opt in opts],
                "curve": curve,
            }
            save_state(folder / "state.pt", state)
            if done == plan.stable_until:
                save_state(folder / "stable.pt", state)
            (folder / "loss.jsonl").write_text("".join(f'{{"step": {i}, "loss": {v}}}\n' for i, v in enumerate(curve)))
            speed = (done - start) * plan.sequences * plan.length / (time.monotonic() - began)
            recent = sum(curve[-50:]) / len(curve[-50:])
            left = (plan.steps - done) * plan.sequences * plan.length / speed / 60
            print(
                f"{folder.name} {done}/{plan.steps} loss {recent:.3f} {speed:,.0f} tokens/s {left:.0f} min left",
                flush=True,
            )
    return model.eval()


@torch.inference_mode()
def held_out_losses(model: Qwen3ForCausalLM, corpus: Corpus) -> dict[str, float]:
    """Mean cross-entropy in nats per token, per domain, on documents never trained on."""
    return {domain: round(next_token_loss(model, tokens).item(), 4) for domain, tokens in corpus.held_out()}


@torch.inference_mode()
def held_out_overlap(model: Qwen3ForCausalLM, target_runner: Qwen3ForCausalLM, corpus: Corpus) -> dict[str, float]:
    """Expected acceptance of one drafted token at temperature 1: the mean of sum_x min(p, q)."""
    result = {}
    for domain, tokens in corpus.held_out():
        p = target_runner(input_ids=tokens[:, :-1]).logits.softmax(-1)
        q = model(input_ids=tokens[:, :-1]).logits.softmax(-1)
        result[domain] = round(torch.minimum(p, q).sum(-1).mean().item(), 4)
    return result


# ------------------------------------------------------------------------------------------------ package


@torch.inference_mode()
def sample(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int = 60) -> str:
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt)])
    out = model.generate(ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=0)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def save_model(folder: Path, model: Qwen3ForCausalLM, out: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    config.dtype = "bfloat16"
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for file in ("tokenizer.json", "chat_template.jinja"):
        (folder / file).write_bytes((out / "tokenizer" / file).read_bytes())
    about = json.loads((out / "tokenizer" / "tokenizer_config.json").read_text())
    about["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of Transformers knows
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def make_prompts(tokens: Path, folder: Path, count: int = 24) -> None:
    """Prompts of each domain from the held-out documents, as JSON Lines with ``turns``."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        draw = random.Random(f"prompts {domain}")
        texts = json.loads((tokens / f"{domain}.held_out.json").read_text())
        prompts: list[str] = []
        while len(prompts) < count:
            text = draw.choice(texts)
            if domain == "maths":
                prompt = text.split("\nAnswer:")[0].removesuffix(BOXED) + "\nAnswer:"
            elif domain == "code":  # up to the head of a function
                heads = [m.end() for m in re.finditer(r"\n *def \w+\([^)]*\):\n", text)]
                if not heads:
                    continue
                end = draw.choice(heads)
                prompt = text[max(0, end - 500) : end]
                prompt = prompt[prompt.find("\n") + 1 :]
            else:
                start = draw.randrange(2000, max(2001, len(text) - 2000))
                prompt = text[start : start + 400]
                prompt = prompt[prompt.find(" ") + 1 : prompt.rfind(" ")]
            if 40 < len(prompt) < 900 and prompt not in prompts:
                prompts.append(prompt)
        lines = [json.dumps({"turns": [prompt]}, ensure_ascii=False) for prompt in prompts]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")


CARD = """# The embedded models

Two small causal language models that share one tokenizer, shipped with Outrider so that everything runs offline.
They exist to show and to test speculative decoding; they know little and are wrong often. Do not rely on their text.
Three trained drafters for the target lie beside them (`dspark`, `dflash`, `eagle3`), each with a card of its own.

| | target | draft model |
|---|---|---|
| shape | Qwen3, 8 layers, width 256, 4 heads, 2 key/value heads | the same with 1 layer |
| parameters | {target[parameters]:,} | {draft[parameters]:,} |
| trained on | {target[tokens_seen]:,} tokens, next-token loss | {draft[tokens_seen]:,} tokens, distilled from the target |
{rows}

Held-out loss is in nats per token; overlap is the mean of sum_x min(p, q) at temperature 1, the chance that
one drafted token is accepted. Held-out documents were chosen by a hash of their text and never trained on.

Tokenizer: byte-level BPE with {vocabulary} entries and Qwen2's pre-tokenizer.

Data: the training questions of GSM8K (MIT licence), Python's standard library (PSF licence), 130 English books in the
public domain. The weights are released under Apache-2.0. Made by `recipes/embedded.py` (seed {seed}, torch {torch});
the loss curves are in `loss.png`.

## Samples (temperature 0.7)

{samples}
"""  # noqa: E501


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """README.md and facts.json: data, training budget, losses and samples."""
    target, draft = facts["target"], facts["draft"]
    rows = [f"| held-out loss, {d} | {target['held_out_loss'][d]} | {draft['held_out_loss'][d]} |" for d in DOMAINS]
    rows += [f"| overlap with the target, {d} | | {draft['held_out_overlap'][d]} |" for d in DOMAINS]
    samples = "\n\n".join(f"{domain}:\n\n```\n{text}\n```" for domain, text in facts["samples"].items())
    card = CARD.format(**{**facts, "rows": "\n".join(rows), "samples": samples})
    (folder / "README.md").write_text(card)
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def plot_curves(out: Path) -> None:
    """Training loss of both models, smoothed, as ``package/loss.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, name, what in zip(axes, ("target", "draft"), ("cross-entropy", "KL to the target"), strict=True):
        values = [json.loads(line)["loss"] for line in (out / name / "loss.jsonl").read_text().splitlines()]
        smooth = np.convolve(values, np.ones(20) / 20, mode="valid")
        axis.plot(np.arange(len(smooth)) + 20, smooth)
        axis.set(title=name, xlabel="step (8,192 tokens)", ylabel=f"{what}, nats per token", yscale="log")
    figure.savefig(out / "package" / "loss.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder with the maths and prose files")
    parser.add_argument("--out", type=Path, default=Path("runs/embedded"), help="checkpoints and results")
    parser.add_argument("--target-steps", type=int, default=2000, help="of 8192 tokens each")
    parser.add_argument("--draft-steps", type=int, default=700, help="of 8192 tokens each")
    parser.add_argument("--seed", type=int, default=20260)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the losses: a fifth faster, another rounding"
    )
    parser.add_argument("--stop-after", choices=["tokens", "target", "draft", "package"], default="package")
    args = parser.parse_args()
    for name in ("gsm8k_train.jsonl", "public_domain_books.txt.xz"):
        if not (args.corpora / name).is_file():
            sys.exit(f"expected {args.corpora / name}: --corpora names the folder that holds it")
    torch.set_num_threads(args.threads)

    make_tokens(args.corpora, args.out)
    if args.stop_after == "tokens":
        return

    torch.manual_seed(args.seed)
    plan = Plan(steps=args.target_steps, learning_rate=4e-3, seed=args.seed)
    corpus = Corpus(args.out / "tokens", plan)
    compiled = torch.compile if args.compile else lambda loss: loss
    target = train(args.out / "target", Qwen3ForCausalLM(shape(layers=8)), corpus, compiled(next_token_loss))
    if args.stop_after == "target":
        return

    torch.manual_seed(args.seed + 1)
    draft = Qwen3ForCausalLM(shape(layers=1))
    draft.model.embed_tokens.weight.data.copy_(target.model.embed_tokens.weight)
    draft.model.norm.weight.data.copy_(target.model.norm.weight)
    draft_plan = Plan(steps=args.draft_steps, learning_rate=4e-3, seed=args.seed + 1)
    draft_corpus = Corpus(args.out / "tokens", draft_plan)
    target.requires_grad_(False)
    draft = train(args.out / "draft", draft, draft_corpus, compiled(distillation_loss(target)))
    if args.stop_after == "draft":
        return

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer")
    make_prompts(args.out / "tokens", args.out / "package" / "prompts")
    save_model(args.out / "package" / "target", target, args.out)
    save_model(args.out / "package" / "draft", draft, args.out)
    facts = {
        "target": {
            "parameters": sum(p.numel() for p in target.parameters()),
            "tokens_seen": plan.steps * plan.sequences * plan.length,
            "held_out_loss": held_out_losses(target, corpus),
        },
        "draft": {
            "parameters": sum(p.numel() for p in draft.parameters()),
            "tokens_seen": draft_plan.steps * draft_plan.sequences * draft_plan.length,
            "held_out_loss": held_out_losses(draft, corpus),
            "held_out_overlap": held_out_overlap(draft, target, corpus),
        },
        "samples": {
            "maths": sample(
                target, tokenizer, "Question: Tom has 3 boxes with 4 pens each. How many pens has he?\nAnswer:"
            ),
            "code": sample(target, tokenizer, "def read_lines(path):\n"),
            "prose": sample(target, tokenizer, "It was a dark and stormy night,"),
        },
        "vocabulary": target.config.vocab_size,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    write_card(args.out / "package", facts)
    plot_curves(args.out)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
