"""Is the greedy text of a GGUF file, in float32, the text that Transformers writes on its dequantised weights?

    python benchmarks/same_as_transformers.py [--model smollm2] [--prompts FILES] [--limit 60] [--json FILE]

Chat prompts, with every drafter that needs no training. The exit code is 1 if any answer differs. Where one does, the
gap between Transformers' two largest logits at the first different token is printed: rounding can flip a near-tie.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from dequantised import write_dequantised
from support import add_json, facts, prompt_sets, say, write_json
from transformers import AutoModelForCausalLM, logging

from outrider import LLM, SamplingParams

DRAFTERS = ("none", "ngram", "suffix")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSON Lines with `turns`; default: packaged prompts")
    parser.add_argument("--limit", type=int, default=60, help="prompts in all")
    parser.add_argument("--max-tokens", type=int, default=128)
    add_json(parser)
    options = parser.parse_args()
    plain = LLM(options.model, "none", dtype="float32")
    sets = list(prompt_sets(options.prompts, options.limit).values())
    texts = [texts[i] for i in range(options.limit) for texts in sets if i < len(texts)][: options.limit]
    prompts = [plain.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    params = SamplingParams(max_tokens=options.max_tokens)
    answers = {name: plain.with_drafter(name).generate(prompts, params) for name in DRAFTERS}
    say("answered; Transformers next")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(write_dequantised(options.model, Path(folder))).eval()
    ends = list(plain.target.spec.eos_token_ids)
    different: list[dict[str, Any]] = []
    for number, ids in enumerate(prompts):
        with torch.inference_mode():
            found = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=options.max_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
                output_logits=True,
                return_dict_in_generate=True,
            )
        theirs = found.sequences[0, len(ids) :].tolist()
        for name, outputs in answers.items():
            ours = outputs[number].token_ids
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs) - 1)
                two = found.logits[at][0].topk(2).values
                different.append({"prompt": number, "drafter": name, "token": at, "gap": float(two[0] - two[1])})
        say(f"  {number + 1}/{len(prompts)}: {len(different)} different")
    result = {**facts(), "model": options.model, "prompts": len(prompts), "drafters": DRAFTERS, "different": different}
    write_json(options.json, result)
    print(f"{len(prompts)} prompts x {len(DRAFTERS)} drafters: {len(different)} answers differ {different or ''}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
