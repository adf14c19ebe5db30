"""``outrider convert``: a drafter from one format to another, verified by acceptance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outrider.cli.common import Backend, Dtype, JsonFile, check_folder, command, human, write_json
from outrider.errors import InvalidRequest

__all__ = ["convert"]


@command
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A trained drafter: a directory or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist.")],
    to: Annotated[str, typer.Option("--to", help="deepspec, or speculators (what vLLM loads).")],
    target: Annotated[
        str | None,
        typer.Option("--target", help="Its target. Default: the one the checkpoint names, where it is here."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSON Lines with `turns` (text) or `ids`. Default: packaged ones.")
    ] = None,
    target_layer: Annotated[
        list[int] | None,
        typer.Option(
            "--target-layer",
            help="An auxiliary layer of the target, from 0, where the file names none. May be repeated.",
        ),
    ] = None,
    unverified: Annotated[bool, typer.Option("--unverified", help="Write without measuring acceptance.")] = False,
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    json: JsonFile = None,
) -> None:
    """Write a drafter in another format.

    The copy is compared bit for bit and drafts beside the original on the target's own text before it appears; a
    provenance.json says what it was made from.

    [bold]Examples[/bold]

    [cyan]outrider convert my-dspark for-vllm --to speculators --target Qwen/Qwen3-4B[/cyan]
    """
    from outrider.engine.loader import suggesting
    from outrider.evaluation.conversion import convert as write
    from outrider.evaluation.conversion import named_target
    from outrider.evaluation.replay import sample_prompts
    from outrider.models.loading import load_backend, load_target
    from outrider.models.locations import EMBEDDED, SMOLLM2, drafter_location, resolve_model

    console = human(json)
    check_folder("OUT", destination)
    source = drafter_location(source, target)
    with suggesting(source, "drafter", EMBEDDED):
        resolve_model(source)
    if target is None:
        folder = named_target(source)
    else:
        with suggesting(target, "model", (*EMBEDDED, SMOLLM2)):
            folder = resolve_model(target)
    layers = tuple(target_layer) if target_layer else None
    if unverified:
        result = write(source, destination, to, target_folder=folder, target_layers=layers)
    elif folder is None:
        raise InvalidRequest(
            "the target is not known here, so the copy's acceptance cannot be measured; give --target, or --unverified"
        )
    else:
        sample = sample_prompts(folder, prompts)
        result = write(
            source,
            destination,
            to,
            target=load_target(folder, dtype=dtype, backend=backend),
            target_folder=folder,
            target_layers=layers,
            prompts=sample,
            backend=load_backend(backend, "float32" if dtype == "auto" else dtype),
        )
    acceptance = result.acceptance
    console.print(f"{result.folder}: {result.kind}, {result.source_format} to {result.format}", markup=False)
    if acceptance is None:
        console.print("not verified: no acceptance was measured", style="yellow")
    else:
        console.print(
            f"verified: {acceptance.greedy_length:.2f} tokens a round greedy, {acceptance.expected_length:.2f} at "
            f"temperature 1, as before ({sample.source})",
            style="green",
            markup=False,
        )
    write_json(json, result.to_json())
