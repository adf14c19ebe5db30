"""Package trained drafters with the embedded target: copy the recipes' exports, and record their facts.

    python recipes/package.py runs/embedded-dspark/export runs/embedded-dflash/export runs/embedded-eagle3/export

Each folder's ``drafter`` goes to ``src/outrider/embedded/KIND``, replacing an older one; its facts to ``facts.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from outrider import checkpoints
from outrider.training.artefact import open_artefact

EMBEDDED = Path(__file__).parents[1] / "src" / "outrider" / "embedded"
MOST = 20_000_000  # bytes of all drafters together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path, nargs="+", help="artefacts of `outrider train export`")
    for folder in parser.parse_args().exports:
        artefact = open_artefact(folder, "export", "embedded")
        drafter = checkpoints.load(folder / "drafter")
        destination = EMBEDDED / drafter.kind
        shutil.rmtree(destination, ignore_errors=True)
        shutil.copytree(folder / "drafter", destination)
        run = artefact.lineage["run"]["facts"]
        facts = json.loads((EMBEDDED / "facts.json").read_text())
        facts[drafter.kind] = {
            "parameters": sum(t.numel() for t in drafter.tensors.values() if t.is_floating_point()),
            "tokens_seen": run["tokens"],
            "steps": run["steps"],
            "acceptance_length": run["acceptance_lengths"],
        }
        (EMBEDDED / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    kinds = ("dspark", "dflash", "eagle3")
    size = sum(file.stat().st_size for kind in kinds for file in (EMBEDDED / kind).rglob("*") if file.is_file())
    assert size <= MOST, f"the drafters have {size:,} bytes, expected at most {MOST:,}"
    print(f"{size:,} bytes")


if __name__ == "__main__":
    main()
