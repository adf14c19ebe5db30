"""``outrider export``: a drafter for vLLM, SGLang or llama.cpp, with the command that starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outrider.cli.common import JsonFile, check_folder, command, human, write_json

__all__ = ["export"]


@command
def export(
    drafter: Annotated[
        str,
        typer.Argument(metavar="DRAFTER", help="A trained drafter or draft model: a directory, GGUF file or hub id."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist.")],
    to: Annotated[str, typer.Option("--to", help="vllm, sglang or llama.cpp.")],
    target: Annotated[
        str, typer.Option("--target", help="Its target: a directory, GGUF file, hub id, 'smollm2' or 'embedded'.")
    ],
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="JSON of `outrider plan`: how many drafts, and from which load on none."),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Hand a drafter over to another engine: what it loads, launch.sh, and its speculative config.

    What the engine cannot load is refused with the reason. handover.json says against what the form was checked and
    what was not run.

    [bold]Examples[/bold]

    [cyan]outrider export runs/dspark/drafter for-vllm --to vllm --target Qwen/Qwen3-4B[/cyan]

    [cyan]outrider export small.gguf for-llama --to llama.cpp --target large.gguf --plan plan.json[/cyan]
    """
    from dataclasses import asdict

    from outrider.files import read_json
    from outrider.training.handover import hand_over

    console = human(json)
    check_folder("OUT", out)
    made = hand_over(drafter, to, out, target, plan=None if plan is None else read_json(plan))
    console.print(f"{out}: {made.kind} for {made.engine}", style="green", markup=False)
    console.print(made.script(), markup=False, soft_wrap=True)
    write_json(json, asdict(made))
