"""Generated documentation: the file tree in ``docs/architecture.md``, the reference pages, and the manual in ``site/``.

    python docs/build.py           all of it; mkdocs.yml says what the manual holds
    python docs/build.py --tree    the tree alone

The tree describes a file by the first sentence of its docstring or opening comment.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["ARCHITECTURE", "build_site", "described", "main", "replace_tree", "tree", "write_reference"]

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
REFERENCE = ROOT / "docs" / "reference"
BEGIN, END = "<!-- tree: written by docs/build.py -->", "<!-- end of tree -->"
PAGES = ("engine.llm", "config", "types", "errors", "registry", "tokenization.tokenizer", "engine.engine")
"""Modules that users and authors of drafters, targets and policies work with."""
SHOWN = ("src/outrider", "native", "recipes", "benchmarks", "experiments", "examples", "docs", "tests")
SOURCE = {".py", ".cpp", ".hpp"}
DESCRIBED_HERE = {  # descriptions of files that have no docstring
    "Makefile": "Every command a developer needs; `make help` lists them.",
    "constraints.txt": "The exact versions that `make` installs.",
    "docs/architecture.md": "The shape of the whole, its floors and contracts, and why.",
    "docs/guide": "The manual's guides, one a task; `mkdocs.yml` puts them in order.",
    "docs/evaluation.md": "How drafters are compared, and how their confidences are calibrated.",
    "docs/grammars.md": "Structured output, tool calls and the playground.",
    "docs/log.md": "Decisions, failed tries and measured figures.",
    "docs/losslessness.md": "Why speculative decoding is lossless, what is promised, and how the audit checks it.",
    "docs/serving.md": "The server: interfaces, what speculation changes, limits, measuring, running it.",
    "docs/study.md": "Measurements of drafters on the embedded target.",
    "docs/training.md": "How to train a drafter for your own model in one command, and what each stage does.",
    "src/outrider/embedded": "Target, drafters, held-out prompts, their model card, and questions for chat models.",
    "tests/data": "The frozen command line; recorded runs of other engines.",
}


def described(path: Path) -> str:
    """The first sentence of a file: its docstring's or its opening comment's. Empty where it has none."""
    name = path.relative_to(ROOT).as_posix()
    if name in DESCRIBED_HERE:
        return DESCRIBED_HERE[name]
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if path.suffix == ".py":
        words = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix in SOURCE:
        comment = re.match(r"(?://.*\n)+", text)
        words = re.sub(r"^// ?", "", comment[0], flags=re.MULTILINE) if comment else ""
        header = path.with_suffix(".hpp")
        if not words and path != header and header.is_file():
            return f"Implements `{header.name}`."
    else:
        words = ""
    first = " ".join(words.split("\n\n")[0].split())
    sentence = re.match(r".*?[.?](?= |$)", first)
    return sentence[0] if sentence else first


def entries(folder: Path) -> Iterator[Path]:
    """A folder's entries in the tree: source files, folders that contain some, and files in ``DESCRIBED_HERE``."""
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        name = path.relative_to(ROOT).as_posix()
        if name in DESCRIBED_HERE:
            yield path
        elif path.is_dir() and path.name not in ("__pycache__",):
            if folder != ROOT and any(p.suffix in SOURCE for p in path.rglob("*")):
                yield path
        elif path.suffix in SOURCE and described(path):
            yield path


def tree() -> str:
    """The annotated tree of source files."""
    lines = ["outrider/"]

    def add(paths: list[Path], indent: str, label: str = "") -> None:
        for path in paths:
            last = path == paths[-1]
            name = path.relative_to(ROOT).as_posix() if not indent else path.name
            described_here = path.relative_to(ROOT).as_posix() in DESCRIBED_HERE
            inside = list(entries(path)) if path.is_dir() and not described_here else []
            head = f"{indent}{'└──' if last else '├──'} {name}{'/' if path.is_dir() else ''}"
            lines.append(f"{head:<34}  {described(path)}".rstrip())
            add(inside, indent + ("    " if last else "│   "))

    add([ROOT / name for name in ("Makefile", "constraints.txt", *SHOWN) if (ROOT / name).exists()], "")
    return "\n".join(lines) + "\n"


def replace_tree(text: str) -> str:
    """``text`` with the current tree between the markers. Raises ValueError where it does not have both."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the markers {BEGIN!r} and {END!r} in {ARCHITECTURE.name}")
    return f"{head}{BEGIN}\n```text\n{tree()}```\n{END}{tail}"


# ------------------------------------------------------------------------------------------------ pages


def command_line() -> str:
    """Every command's own help, in Markdown."""
    import typer
    from typer.testing import CliRunner

    from outrider.cli import COMMANDS, app

    group: Any = typer.main.get_command(app)
    names = []
    for name in COMMANDS:
        names += [name, *(f"{name} {inner}" for inner in getattr(group.commands[name], "commands", ()))]
    parts = ["# Command line"]
    for name in names:
        shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "110", "TERM": "dumb"}).stdout
        parts.append(f"## outrider {name}\n\n```text\n{shown.strip()}\n```")
    return "\n\n".join(parts)


def library() -> str:
    """Signatures and docstrings of everything that ``PAGES`` export, in Markdown."""
    parts = ["# Library"]
    for name in PAGES:
        module = import_module(f"outrider.{name}")
        parts.append(f"## outrider.{name}\n\n{inspect.getdoc(module)}")
        for exported in module.__all__:
            value = getattr(module, exported)
            if inspect.isclass(value) or inspect.isfunction(value):
                parts.append(_entry(exported, value, "###"))
                members = vars(value).items() if inspect.isclass(value) else ()
                methods = [(n, m) for n, m in members if inspect.isfunction(m) and not n.startswith("_")]
                parts += [_entry(f"{exported}.{n}", m, "####") for n, m in methods if inspect.getdoc(m)]
    return "\n\n".join(parts)


def _entry(name: str, value: object, level: str) -> str:
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except ValueError:  # an exception class has none
        signature = ""
    return f"{level} {name}\n\n```python\n{name}{signature}\n```\n\n{inspect.getdoc(value) or ''}"


def metrics() -> str:
    """Every metric of a server, in Markdown."""
    from outrider import LLM
    from outrider.serving.metrics import Metrics

    found = Metrics(LLM("embedded", drafter="none").engine).registry.collect()
    rows = [
        f"| `{one.name}{'_total' if one.type == 'counter' else ''}` | {one.type} | {one.documentation} |"
        for one in found
    ]
    head = "# Metrics\n\n`/metrics` of `outrider serve`.\n\n| name | type | what |\n|---|---|---|"
    return "\n".join([head, *rows])


def interfaces() -> str:
    """Every path of a server and the fields it takes, in Markdown."""
    from outrider.serving.openapi import openapi

    described = openapi()
    schemas = described.get("components", {}).get("schemas", {})
    parts = ["# HTTP", "What `/openapi.json` of `outrider serve` says."]
    for path, methods in described["paths"].items():
        for method, one in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{one.get('summary') or one.get('description') or ''}")
            schema = one.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            schema = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
            fields = ", ".join(f"`{name}`" for name in schema.get("properties", {}))
            if fields:
                parts.append(f"Fields: {fields}.")
    return "\n\n".join(parts)


def options() -> str:
    """The kinds of every catalogue and the options of each, in Markdown."""
    from outrider import registry

    parts = ["# Kinds and their options", "Built-in kinds; packages add others through entry points."]
    for catalogue in ("drafter", "policy", "trainer", "exporter", "target", "backend", "kv_cache"):
        parts.append(f"## {catalogue}")
        for name in registry.names(catalogue):
            kind = registry.find(catalogue, name)
            parts.append(f"### {name} ({catalogue})\n\n{(inspect.getdoc(kind) or '').splitlines()[0]}")
            config = getattr(kind, "Config", None)
            if config is not None:
                parts.append(f"```python\n{config.__name__}{inspect.signature(config)}\n```")
    return "\n\n".join(parts)


def write_reference() -> None:
    """The pages of ``docs/reference``, which are not kept in the repository."""
    REFERENCE.mkdir(exist_ok=True)
    pages = {
        "command-line": command_line,
        "library": library,
        "http": interfaces,
        "metrics": metrics,
        "options": options,
    }
    for name, page in pages.items():
        (REFERENCE / f"{name}.md").write_text(page() + "\n", encoding="utf-8")


def build_site(folder: Path) -> None:
    """The manual as HTML; a link that leads nowhere is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", action="store_true", help="the file tree in docs/architecture.md alone")
    options = parser.parse_args()
    ARCHITECTURE.write_text(replace_tree(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
    if not options.tree:
        write_reference()
        build_site(ROOT / "site")
        print(f"wrote {ROOT / 'site' / 'index.html'}")


if __name__ == "__main__":
    main()
