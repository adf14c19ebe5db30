"""``outrider train``: a drafter for your own model, stage by stage or by one recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from rich.table import Table
from typer.core import TyperGroup

from outrider.cli.command import CutHelp, flowing, make_command
from outrider.cli.common import JsonFile, check_folder, command, human, write_json

if TYPE_CHECKING:
    from pydantic import BaseModel

    from outrider.training.artefact import Artefact
    from outrider.training.estimate import Estimate

__all__ = ["app", "recipe"]

STAGES = {  # those that have no command of their own elsewhere -> what their help says
    "prompts": """Collect the user messages of data sets: filtered, deduplicated, split by document.

    FILES are JSON Lines, plain or .gz: `text` or `prompt` to be continued, `turns`, OpenAI's `messages` or ShareGPT's
    `conversations`. Only user and system messages are taken. Lines with the same `document` stay on one side of the
    split.

    [bold]Examples[/bold]

    [cyan]outrider train prompts questions.jsonl chats.jsonl.gz --out runs/my/prompts[/cyan]

    [cyan]outrider train prompts --self 20000 --target smollm2 --out runs/my/prompts[/cyan]
    """,
    "regenerate": """Let the target answer every prompt, with its own sampling settings.

    A drafter is trained to predict its target, so the answers must be the target's own. A run that was stopped
    goes on where it was; the result is the same.

    [bold]Examples[/bold]

    [cyan]outrider train regenerate --target ./my-model --prompts runs/my/prompts --out runs/my/regenerate[/cyan]

    [cyan]outrider train regenerate --target my/model --prompts runs/my/prompts --out runs/my/regenerate --server
    http://localhost:8000[/cyan]
    """,
    "features": """Store the target's features of its answers, so that `train run` need not compute them again.

    Optional: by default the target runs during training and nothing is stored. It pays for many epochs on a fast disk.

    [bold]Examples[/bold]

    [cyan]outrider train features --target ./my-model --answers runs/my/regenerate --out runs/my/features --set
    layers='[1, 9, 17]'[/cyan]
    """,
    "run": """Train a drafter on the target's answers.

    OUT/drafter is what `--drafter` takes everywhere, OUT/report.html shows how it went. A run that was stopped goes on
    from its last checkpoint.

    [bold]Examples[/bold]

    [cyan]outrider train run --target ./my-model --answers runs/my/regenerate --out runs/my/run --kind dspark --set
    drafter.block_size=7[/cyan]
    """,
    "export": """Write the finished drafter in vLLM's or DeepSpec's format, with a model card.

    [bold]Examples[/bold]

    [cyan]outrider train export --target ./my-model --drafter runs/my/calibrate --evaluation runs/my/eval --out
    runs/my/export --licence apache-2.0[/cyan]
    """,
}
SIMPLE = (int, float, str, bool)

Change = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any option, by its name; VALUE as TOML has it. May be repeated."),
]
Target = Annotated[str, typer.Option("--target", help="A model directory, a GGUF file, a hub id, or 'embedded'.")]


# ------------------------------------------------------------------------------------------------ a recipe


@command
def recipe(
    file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; recipes/embedded-dspark.toml is one.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where its stages go, but for those it shares. Default: what it says.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change the recipe for this run. May be repeated."),
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda: prompts, answers and training on an accelerator.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Say what it will cost, by a trial of some seconds, and stop there.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Make a drafter for a target: prompts, answers, training, calibration, evaluation and export.

    [bold]outrider train RECIPE[/bold] is short for it. First come disk, memory and time that each stage will take,
    by a trial of some seconds on this machine. Finished stages are kept, a stopped one goes on where it was.

    [bold]Examples[/bold]

    [cyan]outrider train recipes/embedded-dspark.toml[/cyan]

    [cyan]outrider train my.toml --set run.epochs=1 --set target=./other-model --out runs/other --until run[/cyan]
    """
    from outrider.training.estimate import estimate as forecast
    from outrider.training.recipe import read_recipe, run_recipe

    console = human(json)
    on_device = [f"{stage}.device={device}" for stage in ("prompts", "regenerate", "run")] if device else []
    read = read_recipe(file, [*(change or ()), *on_device], out)
    check_folder("--out" if out else f"{file}: out", read.out)
    costs = [] if device else forecast(read, until)  # the trial runs on the CPU
    if costs:
        console.print(_costs(costs))
    if estimate:
        write_json(json, {"estimate": [cost.to_json() for cost in costs]})
        return
    made = run_recipe(read, until, console)
    for name, artefact in made.items():
        console.print(f"{name:<10}  {artefact.folder}", style="green", markup=False)
    write_json(
        json,
        {
            "estimate": [cost.to_json() for cost in costs],
            "stages": {name: _record(artefact) for name, artefact in made.items()},
        },
    )


def _record(artefact: Artefact) -> dict[str, Any]:
    told = ("sha256", "seconds", "facts")
    return {"folder": str(artefact.folder), **{name: artefact.provenance[name] for name in told}}


def _costs(costs: list[Estimate]) -> Table:
    from outrider.training.progress import duration

    table = Table(
        title="what it will take",
        caption="by short trials on this machine, as busy as it is now",
    )
    for name in ("stage", "time", "memory", "disk", ""):
        table.add_column(name, justify="right" if name in ("time", "memory", "disk") else "left")
    for cost in costs:
        table.add_row(cost.stage, duration(cost.seconds), _size(cost.memory), _size(cost.disk), cost.note)
    table.add_section()
    most = max(cost.memory for cost in costs)
    table.add_row("all", duration(sum(c.seconds for c in costs)), _size(most), _size(sum(c.disk for c in costs)), "")
    return table


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# ------------------------------------------------------------------------------------------------ one stage


def _stage_command(name: str) -> Callable[..., None]:
    """The command of one stage, its options read off the stage's ``Config``."""
    from outrider.training.stages import STAGES as KINDS

    stage = KINDS[name]
    options = dict(_options(stage.config))
    kind = Parameter.KEYWORD_ONLY
    parents = [
        Parameter(
            role,
            kind,
            default=None if role in stage.optional else Parameter.empty,
            annotation=Annotated[
                Path | None if role in stage.optional else Path,
                typer.Option(f"--{role}", help=f"What `{' or '.join(kinds)}` made: its directory."),
            ],
        )
        for role, kinds in stage.parents.items()
    ]
    files = Annotated[list[Path] | None, typer.Argument(metavar="[FILES...]", help="Data sets.")]
    written = Annotated[int | None, typer.Option("--self", min=1, help="Prompts that the target writes itself.")]
    sources = []
    if name == "prompts":
        sources = [Parameter("files", kind, default=None, annotation=files)]
        sources.append(Parameter("self_written", kind, default=None, annotation=written))
    place = Annotated[Path, typer.Option("--out", help="The stage's own directory.")]
    common = [Parameter("out", kind, annotation=place)]
    common.insert(0, Parameter("target", kind, default="embedded", annotation=Target))
    last = [Parameter("change", kind, default=None, annotation=Change)]
    last += [Parameter("json", kind, default=None, annotation=JsonFile)]

    def run(**given: Any) -> None:
        from outrider.errors import InvalidRequest
        from outrider.training.recipe import changed, configure
        from outrider.training.stages import make, opened

        console = human(given["json"])
        values = {key: given[key] for key in options if given[key] is not None}
        if name == "prompts":
            values["sources"] = [{"path": str(path)} for path in given["files"] or ()]
            if given["self_written"] is not None:
                values["sources"].append({"self": given["self_written"]})
            if not values["sources"]:
                raise InvalidRequest(
                    "train prompts: give files of prompts, or --self N for prompts of the target's own"
                )
        config = configure(name, changed(values, given["change"] or ()), f"train {name}")
        folders = {role: given[role] for role in stage.parents if given[role] is not None}
        target = given["target"]
        artefact = make(name, config, opened(name, folders, target), given["out"], target, console=console)
        console.print(f"{artefact.folder}: finished", style="green", markup=False)
        write_json(given["json"], _record(artefact))

    run.__name__, run.__doc__ = name, STAGES[name]
    parameters = [*sources, *parents, *common, *options.values(), *last]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return command(run)


def _options(config: type[BaseModel]) -> Iterator[tuple[str, Parameter]]:
    """One option for every plain field, None by default so that the ``Config`` alone decides; the rest goes by
    ``--set``."""
    for name, field in config.model_fields.items():
        kind = _plain(field.annotation)
        if kind is None:
            continue
        default = "" if field.default is None else f" Default: {field.default}."
        told = f"{(field.description or '').strip().replace(chr(10), ' ')}{default}"
        flag = f"--{name.replace('_', '-')}"
        option = typer.Option(f"{flag}/--no-{flag[2:]}" if kind is bool else flag, help=told, show_default=False)
        yield name, Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _plain(annotation: Any) -> Any:
    """The type of an option: a number, a word or a switch; None for anything else."""
    inner = [one for one in get_args(annotation) if one is not type(None)]
    if annotation in SIMPLE:
        return annotation
    if get_origin(annotation) is Literal:
        return str
    if len(inner) == 1 and inner[0] in SIMPLE and type(None) in get_args(annotation):
        return inner[0]
    return None


# ------------------------------------------------------------------------------------------------ the group


class _OnUse(Mapping[str, Any]):
    """The subcommands, each made when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        if name not in ("recipe", *STAGES):
            raise KeyError(name)
        return make_command(name, recipe if name == "recipe" else _stage_command(name))

    def __iter__(self) -> Iterator[str]:
        return iter(("recipe", *STAGES))

    def __len__(self) -> int:
        return 1 + len(STAGES)


class _Group(CutHelp, TyperGroup):
    """``outrider train FILE.toml`` is ``outrider train recipe FILE.toml``."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.help = flowing(self.help)
        self.commands = _OnUse()  # type: ignore[assignment]  # it is only ever read

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and (args[0].endswith(".toml") or Path(args[0]).is_file()):
            args = ["recipe", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="train",
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def train() -> None:
    """Train a drafter for your own model: by a recipe, or stage by stage.

    [bold]outrider train RECIPE.toml[/bold] runs all stages: prompts, regenerate, run, calibrate, eval, export. Each
    makes one directory with a provenance.json, refuses parents that do not fit, and goes on where it was stopped.

    [bold]Examples[/bold]

    [cyan]outrider train recipes/embedded-dspark.toml --out runs/first --set run.epochs=1[/cyan]
    """
