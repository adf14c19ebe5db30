"""The shape of the whole: floors, independent siblings, sorted ``__all__``, catalogues, the frozen command line."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer

from outrider import registry
from outrider.cli import COMMANDS, app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "outrider"
FROZEN = Path(__file__).parent / "data" / "command_line.json"

# The rooms by floor. A room imports only from rooms on lower floors: two rooms of one floor never import each other.
FLOORS: list[tuple[str, ...]] = [
    ("config", "core", "errors", "files", "registry", "types", "version"),
    ("kv_cache", "sampling", "scheduling", "tokenization"),
    ("backends",),
    ("models",),
    ("checkpoints",),
    ("drafters.base",),
    ("drafters",),
    ("engine",),
    ("evaluation",),
    ("training.networks",),
    ("planning", "proof", "training"),
    ("serving",),
    ("cli",),
]
# Imports that go against the floors, each with its reason. Never more than five.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("config", "errors"): "the ground floor has an order of its own: errors, config, types",
    ("registry", "errors"): "the same",
    ("files", "errors"): "the same",
    ("types", "config"): "the same",
}
OUTSIDE = ("", "__main__")  # the package's face and ``python -m outrider``: above everything


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """``drafters/ngram.py`` -> ``drafters.ngram``; a package's own file -> ``drafters``."""
    names = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def room(module: str) -> str:
    """The room of a module: the longest name on a floor that it begins with."""
    found = [name for names in FLOORS for name in names if f"{module}.".startswith(f"{name}.")]
    assert found or module in OUTSIDE, f"{module} is in no room: add it to FLOORS"
    return max(found, key=len, default=module)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module of this package that is imported anywhere in a file, under TYPE_CHECKING and in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names = [name if is_module(name) else node.module or "" for name in inner.values()]
        else:
            continue
        for name in names:
            package, _, module = name.partition(".")
            if package == "outrider" and module != "_native":
                yield module


def is_module(name: str) -> bool:
    path = ROOT / "src" / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def arrows() -> dict[str, set[str]]:
    """Module -> the modules of the package it imports, the package's face left out."""
    return {
        dotted(path): {name for name in imports(ast.parse(path.read_text())) if name not in OUTSIDE}
        for path in modules()
    }


def floor(name: str) -> int:
    return next(level for level, names in enumerate(FLOORS) if name in names)


def upward(graph: dict[str, set[str]]) -> dict[tuple[str, str], str]:
    """Room -> room where an import does not go down, with the file that has it."""
    wrong = {}
    for module, imported in graph.items():
        for other in imported:
            mine, theirs = room(module), room(other)
            if mine not in OUTSIDE and mine != theirs and floor(theirs) >= floor(mine):
                wrong[mine, theirs] = f"{module} imports {other}"
    return wrong


def test_rooms_import_only_lower_floors(capsys: pytest.CaptureFixture[str]) -> None:
    graph = arrows()
    with capsys.disabled():
        print("\nfloors, from the top:")
        for level, names in reversed(list(enumerate(FLOORS))):
            print(f"  {level:2}  {', '.join(sorted(names))}")
    wrong = {pair: where for pair, where in upward(graph).items() if pair not in EXCEPTIONS}
    assert not wrong, wrong
    assert len(EXCEPTIONS) <= 5 and EXCEPTIONS.keys() <= upward(graph).keys(), "an exception that is not needed goes"


def test_no_files_import_each_other_in_a_circle() -> None:
    """A package's own file counts as a file; what is imported inside a function counts too."""
    TopologicalSorter(arrows()).prepare()  # raises CycleError


def test_inference_never_imports_training() -> None:
    graph = arrows()
    for name, imported in graph.items():
        if not name.startswith(("training", "cli")):
            assert not [other for other in imported if other.startswith("training")], name


def test_the_check_of_imports_sees_what_is_forbidden() -> None:
    up = {"drafters.ngram": set(imports(ast.parse("if TYPE_CHECKING:\n    from outrider.engine.llm import LLM")))}
    sideways = {"kv_cache.x": set(imports(ast.parse("def f():\n    from outrider.sampling import rng")))}
    assert upward(up) and upward(sideways)
    assert not upward({"drafters.ngram": set(imports(ast.parse("import outrider.models.toy")))})
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_no_two_modules_share_a_basename() -> None:
    """A command is named like nothing else, so that a name says which file is meant."""
    names = Counter(path.stem for path in modules() if path.stem != "__init__")
    twice = {name for name, count in names.items() if count > 1}
    assert twice <= {"eval", "export", "prompts"}, twice


@pytest.mark.parametrize("path", modules(), ids=dotted)
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


# ------------------------------------------------------------------------------------------------ catalogues

METHODS = {  # what the engine calls; a class provides them, an instance the contract's attributes
    "target": ("new_cache", "forward", "embed", "unembed"),
    "trainer": ("start",),
    "exporter": ("write",),
    "drafter": ("open", "propose", "observe", "close", "from_config"),
    "policy": ("plan", "choose", "observe", "from_config"),
    "backend": ("load",),
    "kv_cache": ("open", "reserve", "rewind", "release"),
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


# ------------------------------------------------------------------------------------------------ documentation


@pytest.mark.parametrize("script", ["benchmarks/dequantised.py", "docs/build.py"])
def test_scripts_explain_themselves(script: str) -> None:
    shown = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: "), shown.stderr


def test_the_file_tree_in_the_documentation_is_current() -> None:
    """If this fails: ``python docs/build.py --tree``."""
    spec = spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    build = module_from_spec(spec)
    spec.loader.exec_module(build)
    text = build.ARCHITECTURE.read_text()
    assert build.replace_tree(text) == text
