"""Make the file of maths and code questions that SmolLM2's drafter is trained on, beside the target's own prompts.

    python recipes/smollm2_prompts.py --gsm8k gsm8k_train.jsonl

``--gsm8k``: the training questions of grade-school-math (MIT licence), lines with ``question``. Code questions are made
of the functions with a docstring in the standard library of the Python that runs this (PSF licence): their head and
docstring. It writes ``smollm2-prompts.jsonl.gz`` beside this file, lines ``{"domain", "document", "turns"}``. None of
the problems of MT-Bench, GSM8K's test set, HumanEval or MBPP is among them.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
MATHS = ("", BOXED, BOXED, " Think step by step.")
CODE = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{head}\n```",
    "Complete this Python function:\n\n{head}",
    "Write a Python function `{name}`. {summary}",
    "Explain what this Python function should do, then write it.\n```python\n{head}\n```",
)
LONGEST = 1200  # characters of a code question
SKIPPED = ("test", "tests", "encodings", "lib2to3", "idlelib", "site-packages", "__pycache__")


def maths(path: Path, draw: random.Random) -> Iterator[dict[str, object]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)["question"].strip()
        yield {"domain": "maths", "document": _digest(question), "turns": [question + draw.choice(MATHS)]}


def code(draw: random.Random) -> Iterator[dict[str, object]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if any(part in SKIPPED for part in path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (told := ast.get_docstring(node)):
                continue
            arguments = ast.unparse(node.args)
            indented = told.replace("\n", "\n    ")
            head = f'def {node.name}({arguments}):\n    """{indented}\n    """'
            text = draw.choice(CODE).format(head=head, name=node.name, summary=told.split("\n\n")[0])
            if len(text) <= LONGEST and not node.name.startswith("__"):
                yield {"domain": "code", "document": _digest(str(path.relative_to(library))), "turns": [text]}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True)
    lines = [*maths(parser.parse_args().gsm8k, random.Random(0)), *code(random.Random(1))]
    with gzip.GzipFile(HERE / "smollm2-prompts.jsonl.gz", "wb", mtime=0) as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    print(f"{len(lines)} questions")


if __name__ == "__main__":
    main()
