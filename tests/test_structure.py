"""The shape of the whole: floors, independent siblings, sorted ``__all__``, catalogues, the frozen command line."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from outrider import registry
from outrider.cli import COMMANDS, app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "outrider"
FROZEN = Path(__file__).parent / "data" / "command_line.json"

# A module imports only from floors below its own. A package name stands for every module in it.
FLOORS: list[tuple[str, ...]] = [
    ("types", "config", "core", "errors", "lessons", "registry"),
    (
        *("sampling", "noise", "truncation", "acceptance", "calibration", "drift"),
        *("costs", "losses", "chat_template", "figures"),
    ),
    (
        *("layers", "weights", "attention", "tokenizer", "decoder"),
        *("backends", "memory", "checkpoints", "drafting", "learning"),
    ),
    ("targets", "drafters"),
    ("admission", "policies"),
    ("choice", "engine", "llm", "rounds"),
    ("training",),
    ("evaluation", "planning", "proof"),
    ("serving",),
    ("cli", "__main__"),
]

# What a floor has inside: the module on the left may import those on the right. Everything else on one floor,
# and every two files of one package, are strangers.
INSIDE: dict[str, set[str]] = {
    "types": {"config", "errors"},
    "config": {"errors"},
    "registry": {"errors"},
    "sampling": {"noise", "truncation"},
    "acceptance": {"noise", "sampling"},
    "drift": {"calibration"},
    "decoder": {"layers", "weights"},  # a Llama-like decoder is layers filled from files
    "checkpoints": {"layers", "weights"},
    "learning": {"checkpoints", "layers"},  # drafters with gradients
    "drafting": {"checkpoints", "layers"},  # what trained drafters share
    "backends": {"attention", "layers", "weights"},
    "llm": {"choice", "engine"},
    "rounds": {"llm"},
    "__main__": {"cli"},
}
PARTS = {  # a package's modules may import those that are there to be shared
    "backends": {"packed"},
    "checkpoints": {"decoder", "draft"},
    "cli": {"command", "common"},
    "drafting": {"cache", "drawing", "net", "trained"},
    "evaluation": {"comparison", "intervals", "replay"},
    "learning": {"attention", "fresh", "frozen", "net", "stack", "warm"},
    "training": {
        *("artefact", "progress", "questions", "server"),  # what stages share
        *("data", "features", "report", "teacher", "trainer"),  # learning
        *("prompts", "recipe", "regenerate", "stages"),  # the whole run, for who estimates it
    },
}
ROOT_MODULE = "__init__"  # the package itself: imports on use, for everybody


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def parts(path: Path) -> tuple[str, ...]:
    """``drafters/ngram.py`` -> ("drafters", "ngram"); a package's own file -> ("drafters",)."""
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" and len(names) > 1 else names


def imports(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """Every module of this package that is imported anywhere in a file, under TYPE_CHECKING and in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names = [
                f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module for alias in node.names
            ]
        else:
            continue
        yield from (tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "outrider")


def is_module(name: str) -> bool:
    path = ROOT / "src" / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def floor(name: str) -> int:
    found = [level for level, names in enumerate(FLOORS) if name in names]
    assert found, f"{name} is on no floor: add it to FLOORS"
    return found[0]


def allowed(importer: tuple[str, ...], imported: tuple[str, ...]) -> bool:
    if not imported or imported[0].startswith("_"):  # the package's version, or the compiled core
        return True
    own, other = importer[0], imported[0]
    if own == ROOT_MODULE:
        return True
    if own == other:  # two files of one package: only a part that is there to be shared, or the package's own file
        return len(imported) == 1 or len(importer) == 1 or imported[1] in PARTS.get(own, set())
    if floor(other) == floor(own):
        return other in INSIDE.get(own, set())
    return floor(other) < floor(own)


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(parts(path)))
def test_a_module_imports_only_lower_floors(path: Path) -> None:
    wrong = {".".join(name) for name in imports(ast.parse(path.read_text())) if not allowed(parts(path), name)}
    assert not wrong, f"{'.'.join(parts(path))} must not import {', '.join(sorted(wrong))}"


def test_the_check_of_imports_sees_what_is_forbidden() -> None:
    upward = ast.parse("if TYPE_CHECKING:\n    from outrider.engine import Engine")
    sideways = ast.parse("def f():\n    from outrider.drafters import suffix")
    assert not allowed(("drafters", "ngram"), *imports(upward))
    assert not allowed(("drafters", "ngram"), *imports(sideways))
    assert not allowed(("drafters", "ngram"), *imports(ast.parse("import outrider.targets.toy")))
    assert allowed(("drafters", "ngram"), *imports(ast.parse("from outrider import registry")))


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(parts(path)))
def test_every_module_has_a_sorted_all_and_a_docstring(path: Path) -> None:
    """Constants, then classes, then functions, as ruff sorts them."""
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py" and not tree.body:
        return  # an empty package file has nothing to say
    assert ast.get_docstring(tree), "a module says what it is for"
    exported = [
        ast.literal_eval(node.value)  # type: ignore[arg-type]
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and "__all__" in ast.unparse(node).split("=")[0]
    ]
    assert len(exported) == 1, "a module has one __all__"
    assert exported[0] == sorted(exported[0], key=lambda name: (not name.isupper(), not name[:1].isupper(), name))


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(parts(path)))
def test_modules_fit_on_a_few_screens(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


# ------------------------------------------------------------------------------------------------ catalogues

METHODS = {  # what the engine calls; a class provides them, an instance the contract's attributes
    "target": ("new_memory", "forward", "embed", "unembed"),
    "drafter": ("open", "propose", "observe", "close", "from_config"),
    "policy": ("plan", "choose", "observe", "from_config"),
    "backend": ("load",),
    "memory": ("open", "rewind", "close"),
}


@pytest.mark.parametrize(("catalogue", "name"), [(c, n) for c in METHODS for n in registry.names(c)])
def test_every_catalogue_entry_has_the_methods_of_its_contract(catalogue: str, name: str) -> None:
    kind = registry.find(catalogue, name)
    missing = [method for method in METHODS[catalogue] if not callable(getattr(kind, method, None))]
    assert not missing
    assert inspect.getdoc(kind), "a kind says what it is"


def test_unknown_names_get_the_nearest_known_one() -> None:
    from outrider.errors import UnknownKind

    with pytest.raises(UnknownKind, match="did you mean 'suffix'"):
        registry.find("drafter", "sufix")


# ------------------------------------------------------------------------------------------------ command line


def command_line() -> dict[str, list[str]]:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    commands = {name: group.commands[name] for name in COMMANDS}
    for name, command in list(commands.items()):
        commands |= {f"{name} {inner}": one for inner, one in getattr(command, "commands", {}).items()}
    found = {}
    for name, command in commands.items():
        names = [", ".join(p.opts) if p.param_type_name == "option" else p.name.upper() for p in command.params]
        found[name] = sorted(names)
    return found


def test_the_command_line_is_frozen() -> None:
    """People's scripts depend on it. A change on purpose: write what this test prints into the file."""
    assert command_line() == json.loads(FROZEN.read_text()), json.dumps(command_line(), indent=2)


# ------------------------------------------------------------------------------------------------ documents


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """Every source file has its line, and every line its file. `python docs/build.py --tree` writes it anew."""
    place = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert place and place.loader
    build = importlib.util.module_from_spec(place)
    place.loader.exec_module(build)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "outrider/\n├── Makefile" in readme
    assert build.replace_tree(readme) == readme, "run `python docs/build.py --tree`"
