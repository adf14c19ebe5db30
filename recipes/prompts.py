"""Extract prompts for training and evaluating the embedded target's drafters from its corpora.

    python recipes/prompts.py --corpora DIR

DIR is the folder that ``recipes/embedded.py`` takes. It writes ``embedded-prompts.jsonl.gz``, from documents that the
target was trained on, and ``embedded-held-out.jsonl.gz``, from held-out documents and without the packaged prompts,
beside this file; lines ``{"domain", "document", "text"}``, the same for the same corpora.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from embedded import BOXED, DOMAINS, documents

from outrider.evaluation.speedup import embedded_prompt_sets

HERE = Path(__file__).parent
SHORTEST, LONGEST = 40, 700  # characters
FUNCTION = re.compile(r"\n *def \w+\([^)]*\):\n")


def cut(domain: str, text: str, draw: random.Random) -> str:
    """A prompt from a document: a question, code up to the head of a function, or prose; empty if there is none."""
    if domain == "maths":
        return text.split("\nAnswer:")[0].removesuffix(BOXED) + "\nAnswer:"
    length = draw.randint(SHORTEST + 20, LONGEST)
    if domain == "code":
        heads = [match.end() for match in FUNCTION.finditer(text)]
        end = draw.choice(heads) if heads else 0
        part = text[max(0, end - length) : end]
        return part[part.find("\n") + 1 :]
    start = draw.randrange(max(1, len(text) - length))
    part = text[start : start + length]
    return part[part.find(" ") + 1 : part.rfind(" ")]


def prompts(
    domain: str, texts: list[str], count: int, draw: random.Random, taken: set[str]
) -> Iterator[dict[str, str]]:
    """``count`` different prompts that are not in ``taken``; adds them to it."""
    while count:
        text = draw.choice(texts)
        prompt = cut(domain, text, draw)
        if SHORTEST <= len(prompt) <= LONGEST and prompt not in taken:
            taken.add(prompt)
            count -= 1
            yield {"domain": domain, "document": hashlib.sha256(text.encode()).hexdigest()[:8], "text": prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True, help="folder with the maths and prose files")
    parser.add_argument("--train", type=int, default=2000, help="training prompts of each domain")
    parser.add_argument("--held-out", type=int, default=100, help="held-out prompts of each domain")
    args = parser.parse_args()
    split = documents(args.corpora)
    taken = {prompt for prompts_of in embedded_prompt_sets().values() for prompt in prompts_of}
    for name, part, count in (("prompts", "train", args.train), ("held-out", "held_out", args.held_out)):
        lines = []
        for domain in DOMAINS:
            draw = random.Random(f"{part} {domain}")
            lines += list(prompts(domain, split[domain][part], count, draw, taken))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path = HERE / f"embedded-{name}.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path}: {len(lines)} prompts, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
